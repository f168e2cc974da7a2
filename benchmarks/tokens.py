"""Measure what --cache_tokens changes: a crop's codes, what is learned from them, the speed.

    python -m benchmarks.tokens codes     # the demo's model and data
    python -m benchmarks.tokens blocks    # windows, compared with the whole recording at once
    python -m benchmarks.tokens learn     # held-out cross entropy, trained both ways

Run it in the project's root; it uses the CPU and a temporary folder for tokens. `codes` compares
the codes of a crop encoded by itself with those of the same frames in the whole recording: for
crops that begin at a token frame, and for crops nearby that begin elsewhere, as nearly all do
without the flag. `learn` trains as `make demo` does, except for the steps; each run is validated on
the kind of codes that it was trained on.
"""

import os
import platform
import tempfile
from itertools import pairwise
from pathlib import Path

import fire
import numpy as np
import soundfile as sf
import torch

from demo.demo import DATASET, TRAIN, run
from musicgen import codec, load
from musicgen.load import Model
from recordings import audio
from recordings.scan import scan
from recordings.track import Track
from training.report import read_rows

EDGES_SEC = (0, 0.1, 0.5, 1, 3)  # distances from the nearer edge of a crop of 6 s
CPU = torch.device("cpu")


def _encode(model: Model, wav: np.ndarray) -> np.ndarray:
    return codec.encode_audio(model, torch.from_numpy(wav)[None])[0].numpy()


def _read(model: Model, track: Track) -> np.ndarray:
    return audio.read_crop(track.source, 0, track.frames, model.sample_rate, model.audio_channels)


def _row(equal: np.ndarray) -> str:
    """Return the share of equal codes in each codebook, from [K, ...]."""
    return " ".join(f"{share:.3f}" for share in equal.reshape(len(equal), -1).mean(axis=1))


def codes(crops: int = 5, crop_sec: int = 6) -> None:
    """Compare the codes of `crops` crops from each of the demo's ten recordings."""
    model, rng = load.load_model("demo", CPU), np.random.default_rng(0)
    rate = round(model.frame_rate)
    hop, T = model.sample_rate // rate, crop_sec * rate
    edge_sec = (np.minimum(np.arange(T), np.arange(T)[::-1]) + 0.5) / rate
    equal: dict[str, list[np.ndarray]] = {"at a frame": [], "elsewhere": []}  # [K, T] each
    for track in scan(str(DATASET / "train")):
        wav = _read(model, track)
        whole = _encode(model, wav)
        for _ in range(crops):
            first = int(rng.integers(1, wav.shape[1] // hop - T))
            for name, off in (("at a frame", 0), ("elsewhere", int(rng.integers(1, hop // 2)))):
                crop = wav[:, first * hop + off :][:, : T * hop]
                equal[name].append(_encode(model, crop) == whole[:, first : first + T])
    for name, found in equal.items():
        print(f"crops that begin {name}: share of equal codes in each codebook")
        for low, high in pairwise(EDGES_SEC):
            part = (edge_sec >= low) & (edge_sec < high)
            print(f"  {low:3} to {high:3} s from the edge  {_row(np.stack(found, 1)[..., part])}")


def blocks() -> None:
    """Compare the codes of the demo's training data, joined to one recording of 105 s."""
    model = load.load_model("demo", CPU)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        tracks = scan(str(DATASET / "train"))
        parts = [audio.read_crop(t.source, 0, t.frames, t.sample_rate, 1) for t in tracks]
        path = Path(folder) / "all.wav"
        sf.write(path, np.concatenate(parts, 1).T, tracks[0].sample_rate)
        (track,) = scan(folder, with_captions=False)
        tokens = codec.tokens_of(model)
        codec.fill(model, tokens, [track], 1)
        whole = _encode(model, _read(model, track))
        equal = tokens.crop(track, 0, whole.shape[1]) == whole
    print(f"{track.duration_sec:.0f} s in windows: share of equal codes  {_row(equal)}")


def learn(steps: int = 60, seed: int = 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for kept in (0, 1):
            output = Path(folder) / f"models{kept}"
            how = {"max_steps": steps, "valid_step": steps, "seed": seed, "output_dir": output}
            run("run.py", {**TRAIN, **how, "cache_tokens": kept}, quiet=True)
            rows = read_rows(output / "metrics.jsonl")
            before, after = (row["valid_loss"] for row in rows if "valid_loss" in row)
            speed = np.median([row["ms"] for row in rows if "ms" in row])
            print(
                f"--cache_tokens={kept}: held-out loss {before:.3f} -> {after:.3f} in {steps} "
                f"steps, {speed:.0f} ms a step",
                flush=True,
            )


def _main() -> None:
    print(f"{platform.platform()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    fire.Fire({"codes": codes, "blocks": blocks, "learn": learn})


if __name__ == "__main__":
    _main()
