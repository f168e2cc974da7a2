"""Spawned worker processes, as on macOS and Windows: each imports all that it needs anew.

They run the main script again too, by another name; test_flags.py tests that it imports no torch.
"""

import contextlib
import multiprocessing
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import tiny_config

from dataset import Batch, Clips
from musicgen import load
from musicgen.melody import melodies_of, melody_conditioner
from training.plan import train_batches
from training.start import start

SPY = """
import dataclasses, sys

class Spied:
    def __init__(self, *clips):
        self.clips = clips
    def __len__(self):
        return len(self.clips[0])
    def __getitem__(self, pick):
        clip, *_ = [clips[pick] for clips in self.clips]
        heavy = [name for name in ("audiocraft", "musicgen") if name in sys.modules]
        return dataclasses.replace(clip, name=f"imported {heavy}")
"""


@pytest.fixture
def spawning() -> Iterator[None]:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_reading_audio_tokens_and_melodies_imports_no_model_code(
    spawning, mono_folder, melody_folder, make_pairs, tmp_path, monkeypatch
):
    (tmp_path / "spy.py").write_text(SPY)
    monkeypatch.syspath_prepend(str(tmp_path))  # a module of its own: this one imports musicgen
    from spy import Spied

    data, clips = make_pairs(), list[Clips]()
    for cache_tokens in (1, 0):
        flags = {"cache_tokens": cache_tokens, "trigger": "a word", "merge_text_p": 0.5}
        config = tiny_config(mono_folder, data, tmp_path / "run", **flags)
        session = start(config, contextlib.ExitStack())
        clips.append(session.clips)
    conditioner = melody_conditioner(load.load_model(str(melody_folder), torch.device("cpu")).lm)
    melodies = melodies_of(conditioner)
    melodies.cache.fill(clips[0].tracks, lambda _: np.eye(12, dtype=np.float16))
    clips[0].melodies = melodies

    def read(clips: Clips, workers: int) -> Batch:
        return next(train_batches(clips, session.plan, start=0, rank=0, workers=workers))

    there, here = read(Spied(*clips), 1), read(clips[0], 0)
    assert set(there.names) == {"imported []"}
    assert there.captions == here.captions
    assert torch.equal(there.codes, here.codes)
    assert torch.equal(there.melody, here.melody)
