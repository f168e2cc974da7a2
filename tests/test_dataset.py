"""--crops_by_length: each recording counts by its length, and each clip comes once an epoch."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_pairs

import prepare
import run
from dataset import Clips, Pick
from musicgen import codec, load
from recordings import audio
from recordings.scan import scan
from recordings.track import Track
from training.plan import Plan, train_batches

RATE = 32_000
COUNTS = {"clip0.wav": 7, "clip1.wav": 2, "clip2.wav": 1, "clip3.wav": 1}
SECONDS = (7.3, 2.0, 1.9, 0.6)


def track(frames: int, sample_rate: int = RATE, name: str = "mix.wav") -> Track:
    return Track("", name, None, "a long mix", sample_rate, frames)


def clips_of(tracks: list[Track], seconds: float = 1.0, **options) -> Clips:
    shape = {"sample_rate": RATE, "channels": 1, "samples": round(seconds * RATE), "seed": 3}
    return Clips(tracks, **{**shape, "by_length": True, **options})


@pytest.fixture
def starts(monkeypatch) -> list[int]:
    """The start of each crop that is read; nothing is there to read."""
    found: list[int] = []

    def read(source, start, frames, rate, channels):
        found.append(start)
        return np.zeros((channels, 1), np.float32)

    monkeypatch.setattr(audio, "read_crop", read)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "music", seconds=SECONDS)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000])
def test_a_recording_gives_a_clip_for_each_full_crop_in_it(rate):
    lengths = {60 * rate: 2, 60 * rate - 1: 1, 60 * rate + 1: 2, 90 * rate: 3, 7200 * rate: 240}
    lengths |= {5999 * rate // 100: 1, 30 * rate: 1, rate // 2: 1}
    for frames, count in lengths.items():
        assert len(clips_of([track(frames, rate)], 30)) == count
    every = clips_of([track(frames, rate) for frames in lengths], 30)
    assert len(every) == sum(lengths.values())
    assert len(clips_of([track(7200 * rate, rate)], 30, by_length=False)) == 1
    assert len(clips_of([])) == 0


@pytest.mark.parametrize("rate", [11_025, 32_000, 44_100])
@pytest.mark.parametrize("seconds", [2.0, 2.9999, 5.01, 40.0])
def test_the_clips_of_an_epoch_cover_the_recording_without_gaps(rate, seconds, starts):
    frames = round(seconds * rate)
    clips = clips_of([track(rate // 2, rate, "short.wav"), track(frames, rate)])
    firsts = set()
    for epoch in range(30):
        starts.clear()
        for index in range(1, len(clips)):
            clips[Pick(epoch, index)]
        assert len(starts) == int(seconds)
        assert starts[0] >= 0 and starts[-1] + rate <= frames
        assert starts[0] + (frames - starts[-1] - rate) < rate  # not covered: less than a crop
        distances = np.diff(starts)
        assert max(distances) <= rate and max(distances) - min(distances) <= 1
        firsts.add(starts[0])
    assert len(firsts) > 25, "each epoch has other crops"


def test_a_recording_with_one_crop_has_the_clips_that_it_has_without_the_flag(starts):
    tracks = [track(54_400, name="a.wav"), track(32_001, name="b.wav")]
    options = {"drop_caption": 0.3, "drop_word": 0.5}
    alone = clips_of(tracks, by_length=False, **options)
    beside = clips_of([track(9 * RATE), *tracks], **options)
    for epoch in range(20):
        for index in (0, 1):
            assert alone[Pick(epoch, index)].caption == beside[Pick(epoch, 9 + index)].caption
    assert starts[::2] == starts[1::2]
    assert len(set(starts)) > 20


def test_each_clip_of_a_recording_draws_for_itself(starts):
    made = clips_of([track(8 * RATE)], drop_caption=0.5)
    dropped = np.array([[not made[Pick(e, i)].caption for i in range(8)] for e in range(100)])
    assert (np.abs(dropped.mean(0) - 0.5) < 0.2).all()
    alike = np.corrcoef(dropped.T) - np.eye(8)
    assert np.abs(alike).max() < 0.4


def taken(data: Path, processes: int, workers: int = 0) -> list[Counter[tuple[str, bytes]]]:
    """Return the clips that all processes take in each of two epochs: name and samples."""
    clips = clips_of(scan(str(data)))
    plan = Plan(len(clips), 2, 1, epochs=2, max_steps=None, seed=0, processes=processes)
    seen: list[Counter[tuple[str, bytes]]] = [Counter(), Counter()]
    for rank in range(processes):
        batches = train_batches(clips, plan, start=0, rank=rank, workers=workers)
        for step in range(plan.total_steps):
            for batch in (next(batches) for _ in plan.batches(step, rank)):
                for name, wav, length in zip(batch.names, batch.wav, batch.lengths, strict=True):
                    if length:  # else only there to fill up a process's share
                        seen[step // plan.steps_per_epoch][name, wav.numpy().tobytes()] += 1
        batches.close()
    return seen


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (2, 0), (3, 0)])
def test_each_clip_comes_once_an_epoch_in_any_number_of_processes(processes, workers, data):
    seen = taken(data, processes, workers)
    for epoch in seen:
        assert Counter(name for name, _ in epoch) == COUNTS
        assert len(epoch) == 11, "a clip came twice"
    assert seen == taken(data, 1)
    assert {wav for name, wav in seen[0] if name == "clip0.wav"}.isdisjoint(
        wav for _, wav in seen[1]
    )


def test_folder_shards_and_tokens_give_the_same_clips(data, mono_folder, tmp_path, cli):
    for command, source, output in (
        ("shard", data, "shards"),
        ("encode", data, "tokens"),
        ("shard", tmp_path / "tokens", "shards of tokens"),
    ):
        flags = {"model_id": mono_folder, "device": "cpu"} if command == "encode" else {}
        result = cli(prepare, command, str(source), str(tmp_path / output), **flags)
        assert result.code == 0, result.err
    model = load.load_model(str(mono_folder), torch.device("cpu"))
    tokens = codec.tokens_of(model)
    codec.fill(model, tokens, scan(str(data)), 2)
    options = {"drop_caption": 0.3, "drop_word": 0.3}
    folder, shards = (clips_of(scan(str(f)), **options) for f in (data, tmp_path / "shards"))
    cached, files, packed = (
        clips_of(scan(str(place)), tokens=tokens, **options)
        for place in (data, tmp_path / "tokens", tmp_path / "shards of tokens")
    )
    for epoch in range(3):
        for index in range(11):
            pick = Pick(epoch, index)
            made = [every[pick] for every in (folder, shards, cached, files, packed)]
            assert len({(clip.caption, Path(clip.name).stem) for clip in made}) == 1
            assert torch.equal(made[0].wav, made[1].wav)
            assert torch.equal(made[2].codes, made[3].codes)
            assert torch.equal(made[2].codes, made[4].codes)
    assert {len(every) for every in (folder, shards, cached, files, packed)} == {11}


def test_the_run_says_how_many_crops_an_epoch_has(data, mono_folder, tmp_path, cli):
    paths = {"dataset_path": data, "model_id": mono_folder, "output_dir": tmp_path / "run"}
    flags = {"duration": 1, "batch_size": 4, "grad_acc": 1, "device": "cpu", "num_workers": 0}
    flags |= {"valid_path": data, "crops_by_length": 1, "epochs": 1}
    told = cli(run, "--dry_run", **paths, **flags).out
    assert "3: 3 an epoch, of 4 or 3 clips of 1 s; 11 an epoch, in proportion to length" in told
    told = cli(run, **paths, **flags).out
    assert (
        "data       4 files, 0:12 of audio, 11 crops of 1 s an epoch, in proportion to length; "
        "1 shorter file padded"
    ) in told
    assert "held out   4 files, 0:12, 11 crops, every 1 step\n" in told
    assert "steps      3: 3 an epoch, 1 epoch;" in told
    assert "step 3/3  loss" in told


def test_without_the_flag_a_run_says_that_a_long_mix_counts_once(mono_folder, tmp_path, cli):
    data = write_pairs(tmp_path / "music", seconds=(1.0, 1.5, 11.2))
    paths = {"dataset_path": data, "model_id": mono_folder, "output_dir": tmp_path / "run"}
    flags = {"duration": 1, "max_steps": 1, "device": "cpu", "num_workers": 0}
    told = cli(run, **paths, **flags).out
    assert "crops of 1 s, one an epoch from each file, though the longest has 11 (see" in told
