"""What reading a clip costs: from a long file and a short one, and beside the original way.

    python -m benchmarks.data

From the project's root. Writes 44.1 kHz stereo 16-bit files of tones and noise (0.8 GB) into a
temporary folder and removes them; they are read from the system's file cache. The original way is
that of the first public trainer: decode the whole file, resample all of it with
`torchaudio.functional.resample`, then crop.
"""

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import fire
import numpy as np
import soundfile as sf
import torch
import torchaudio

from dataset import Clip, Clips, Pick, Track, scan
from plan import Plan, train_batches

RATE_HZ = 44_100
MODEL_RATE_HZ = 32_000
CROP_SEC = 30


class WholeFiles(Clips):
    """The original way. It loaded with torchaudio, which today is torchcodec or soundfile."""

    def __getitem__(self, pick: Pick) -> Clip:
        track = self.tracks[pick.index]
        data, rate = sf.read(track.path, dtype="float32", always_2d=True)
        wav = torchaudio.functional.resample(torch.from_numpy(data.T), rate, self.sample_rate)
        wav = wav.mean(dim=0, keepdim=True)
        rng = np.random.default_rng([self.seed, pick.epoch, pick.index])
        start = int(rng.integers(wav.shape[1] - self.samples + 1))
        crop = wav[:, start : start + self.samples].clone()
        return Clip(crop, self.samples, track.caption, track.name)


def write_track(path: Path, seconds: int) -> None:
    rng = np.random.default_rng(seconds)
    times = np.arange(RATE_HZ) / RATE_HZ
    with sf.SoundFile(path, "w", RATE_HZ, channels=2, subtype="PCM_16") as file:
        for _ in range(seconds):
            tones = np.sin(2 * np.pi * rng.uniform(50, 2000, (2, 1)) * times)
            file.write((0.4 * tones + 0.05 * rng.normal(size=tones.shape)).T)
    path.with_suffix(".txt").write_text("tones and noise\n")


def make_clips(cls: type[Clips], tracks: list[Track]) -> Clips:
    samples = CROP_SEC * MODEL_RATE_HZ
    return cls(tracks, sample_rate=MODEL_RATE_HZ, channels=1, samples=samples, seed=0)


def long_and_short(folder: Path, minutes: int, crops: int) -> None:
    """The same crop length out of 1 minute and out of many, in turns."""
    for length_min in (1, minutes):
        write_track(folder / f"{length_min:03d}.wav", 60 * length_min)
    clips = make_clips(Clips, scan(str(folder)))
    milliseconds: list[list[float]] = [[], []]
    for epoch in range(crops + 1):
        for index, taken in enumerate(milliseconds):
            start = time.perf_counter()
            clip = clips[Pick(epoch, index)]
            taken.append(1000 * (time.perf_counter() - start))
            assert clip.valid_samples == clips.samples and not clip.error
    short, long = (statistics.median(taken[1:]) for taken in milliseconds)
    print(f"a {CROP_SEC} s crop of 1 min   {short:8.1f} ms, median of {crops} random crops")
    print(f"a {CROP_SEC} s crop of {minutes} min  {long:8.1f} ms, ratio {long / short:.3f}")


def one_worker(folder: Path, repeats: int) -> None:
    """Clips a second through the training's own loader with one worker, in turns."""
    for seconds in (180, 200, 220, 240):
        write_track(folder / f"{seconds}.wav", seconds)
    tracks = scan(str(folder))
    rates: dict[str, list[float]] = {"ours": [], "original": []}
    for repeat in range(repeats):
        for (name, taken), cls, batches in zip(
            rates.items(), (Clips, WholeFiles), (17, 5), strict=True
        ):
            plan = Plan(
                files=4, batch_size=2, grad_acc=1, epochs=batches, max_steps=batches, seed=repeat
            )
            loader = train_batches(make_clips(cls, tracks), plan, start=0, rank=0, workers=1)
            next(loader)  # the worker has started
            start = time.perf_counter()
            count = sum(len(batch.names) for batch in loader)
            taken.append(count / (time.perf_counter() - start))
            print(f"  {name}: {count} clips, {taken[-1]:.2f} clips/s", flush=True)
    ours, original = (statistics.median(taken) for taken in rates.values())
    print("one worker, tracks of 3 to 4 minutes, 44.1 kHz stereo -> 32 kHz mono, medians:")
    print(f"ours {ours:.2f} clips/s, original {original:.2f} clips/s, ratio {ours / original:.1f}")


def main(minutes: int = 60, crops: int = 60, repeats: int = 5) -> None:
    """Both comparisons.

    Args:
        minutes: length of the long file.
        crops: random crops out of the long and out of the short file.
        repeats: runs of a worker, each way.
    """
    print(f"{platform.platform()}, {os.cpu_count()} cores", end=", ")
    print(f"torch {torch.__version__}, Python {platform.python_version()}", flush=True)
    for measure, count in ((long_and_short, (minutes, crops)), (one_worker, (repeats,))):
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), *count)


if __name__ == "__main__":
    fire.Fire(main)
