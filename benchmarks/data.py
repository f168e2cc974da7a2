"""Measure what reading clips costs, compared with the original way, and starting with many clips.

    python -m benchmarks.data lengths   # a crop of a long file and of a short one
    python -m benchmarks.data rates     # clips a second from one worker, five ways; 0.2 GB
    python -m benchmarks.data scale     # two starts of run.py with 100,000 clips; 1.3 GB
    python -m benchmarks.data stream    # the memory that reading 10,000 clips in shards takes

Run it in the project's root; it removes its temporary folder. All reads come from the system's file
cache. `lengths` and `rates` write 44.1 kHz stereo 16-bit files of tones and noise. The original way
is that of the first public trainer: decode the whole file, resample all of it with
`torchaudio.functional.resample`, then crop. `scale` and `stream` use files of 0.6 s, as what they
measure depends on the number of files.
"""

import contextlib
import io
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fire
import numpy as np
import psutil
import soundfile as sf
import torch
import torchaudio

import files
from benchmarks.step import peak_rss
from dataset import Clip, Clips, Pick
from demo.tiny import build_musicgen
from musicgen import codec, load
from recordings.scan import scan
from recordings.track import Track
from training.plan import Plan, train_batches

RATE_HZ = 44_100
MODEL_RATE_HZ = 32_000
CROP_SEC = 30


class WholeFiles(Clips):
    """The original way. It loaded with torchaudio, now replaced by torchcodec or soundfile."""

    def __getitem__(self, pick: Pick) -> Clip:
        track = self.tracks[pick.index]
        data, rate = sf.read(track.path, dtype="float32", always_2d=True)
        wav = torchaudio.functional.resample(torch.from_numpy(data.T), rate, self.sample_rate)
        wav = wav.mean(dim=0, keepdim=True)
        rng = np.random.default_rng([self.seed, pick.epoch, pick.index])
        start = int(rng.integers(wav.shape[1] - self.samples + 1))
        crop = wav[:, start : start + self.samples].clone()
        return Clip(crop, self.samples, track.caption, track.name)


class RawBytes(Clips):
    """The upper limit: read the bytes of a crop from its file, and do nothing else."""

    def __getitem__(self, pick: Pick) -> Clip:
        track = self.tracks[pick.index]
        frames = self.samples * track.sample_rate // self.sample_rate
        rng = np.random.default_rng([self.seed, pick.epoch, pick.index])
        start = 4 * int(rng.integers(track.frames - frames + 1))  # 16 bit, stereo
        begin = 44 + start + (track.member.offset if track.member else 0)
        data = np.fromfile(track.path, np.int16, 2 * frames, offset=begin)
        return Clip(torch.from_numpy(data), self.samples, track.caption, track.name)


def write_track(path: Path, seconds: int) -> None:
    rng = np.random.default_rng(seconds)
    times = np.arange(RATE_HZ) / RATE_HZ
    with sf.SoundFile(path, "w", RATE_HZ, channels=2, subtype="PCM_16") as file:
        for _ in range(seconds):
            tones = np.sin(2 * np.pi * rng.uniform(50, 2000, (2, 1)) * times)
            file.write((0.4 * tones + 0.05 * rng.normal(size=tones.shape)).T)
    path.with_suffix(".txt").write_text("tones and noise\n")


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """Make a temporary folder for everything, the cache included."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        yield Path(name)


def make_clips(cls: type[Clips], tracks: list[Track], **options: Any) -> Clips:
    samples = CROP_SEC * MODEL_RATE_HZ
    shape = {"sample_rate": MODEL_RATE_HZ, "channels": 1, "samples": samples, "seed": 0}
    return cls(tracks, **{**shape, **options})


def lengths(minutes: int = 60, crops: int = 60) -> None:
    """Time crops from a file of 1 minute and from one of many, in turns."""
    with temporary() as folder:
        for length_min in (1, minutes):
            write_track(folder / f"{length_min:03d}.wav", 60 * length_min)
        clips = make_clips(Clips, scan(str(folder)))
        milliseconds: list[list[float]] = [[], []]
        for epoch in range(crops + 1):
            for index, taken in enumerate(milliseconds):
                start = time.perf_counter()
                clip = clips[Pick(epoch, index)]
                taken.append(1000 * (time.perf_counter() - start))
                assert clip.length == clips.samples and not clip.error
    short, long = (statistics.median(taken[1:]) for taken in milliseconds)
    print(f"a {CROP_SEC} s crop of 1 min   {short:8.1f} ms, median of {crops} random crops")
    print(f"a {CROP_SEC} s crop of {minutes} min  {long:8.1f} ms, ratio {long / short:.3f}")


def rates(files: int = 4, repeats: int = 5) -> None:
    """Measure clips a second through training's own loader with one worker, in turns.

    Args:
        files: tracks of 3 minutes.
        repeats: runs of a worker for each way.
    """
    with temporary() as folder:
        data = folder / "data"
        data.mkdir()
        for index in range(files):
            write_track(data / f"{index}.wav", 180)
        with tarfile.open(folder / "shard.tar", "w") as tar:
            tar.add(data, ".")
        tracks, in_shard = scan(str(data)), scan(str(folder / "shard.tar"))
        # The tests' codec: the values of the codes don't affect the speed.
        model = load.load_model(str(build_musicgen(folder / "model")), torch.device("cpu"))
        tokens = codec.tokens_of(model)
        codec.fill(model, tokens, tracks, 1)
        ways = {  # and how many batches to read
            "original": (make_clips(WholeFiles, tracks), 5),
            "folder": (make_clips(Clips, tracks), 17),
            "shard": (make_clips(Clips, in_shard), 17),
            "tokens": (make_clips(Clips, tracks, tokens=tokens), 400),
            "raw bytes": (make_clips(RawBytes, tracks), 100),
        }
        found: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(repeats):
            for way, (clips, batches) in ways.items():
                plan = Plan(files, 2, 1, epochs=batches, max_steps=batches, seed=repeat)
                loader = train_batches(clips, plan, start=0, rank=0, workers=1)
                next(loader)  # the worker has started
                start = time.perf_counter()
                count = sum(len(batch.names) for batch in loader)
                found[way].append(count / (time.perf_counter() - start))
    print("one worker, tracks of 3 minutes, 44.1 kHz stereo -> 30 s of 32 kHz mono, medians:")
    original = statistics.median(found["original"])
    for way, taken in found.items():
        rate = statistics.median(taken)
        print(f"{way:10}{rate:9.2f} clips/s, {rate / original:7.1f} times the original way", end="")
        print(f"  ({min(taken):.2f} to {max(taken):.2f})")


def write_small(folder: Path, count: int) -> None:
    """Write recordings of 0.6 s with captions, 1000 in a folder."""
    wav = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, 4800)
    sf.write(wav, noise, 8000, format="WAV", subtype="PCM_16")
    for index in range(count):
        stem = f"{folder}/{index // 1000:03d}/{index:06d}"
        if index % 1000 == 0:
            Path(stem).parent.mkdir(parents=True)
        Path(f"{stem}.wav").write_bytes(wav.getvalue())
        Path(f"{stem}.txt").write_text(f"tune number {index}, slow piano")


def scale(count: int = 100_000) -> None:
    """Time a first and a second start: only scanning, and run.py with the demo model to step 1."""
    with temporary() as folder:
        data = folder / "data"
        write_small(data, count)
        write_small(folder / "one", 1)
        time.sleep(3)  # the index does not keep files that have just changed
        run = f"""run.py --dataset_path={data} --model_id=demo --max_steps=1 --duration=1
            --batch_size=2 --device=cpu --overwrite=1 --output_dir={folder}/models"""
        for start in ("first", "second"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, grown, peak = pool.apply(_scanning, (str(folder / "one"), str(data)))
            print(f"{start} scan: {seconds:.1f} s, {grown / count:.0f} bytes a clip", end=", ")
            print(f"at the peak {peak / count:.0f}", flush=True)
        shutil.rmtree(files.cache_folder("index"))
        for start in ("first", "second"):
            print(f"{start} run.py: {_first_step(run.split())}", flush=True)


def _scanning(small: str, folder: str) -> tuple[float, int, int]:
    """Scan a folder -> seconds, and bytes that the process grew by, in the end and at its peak.

    A `small` folder is scanned first, so that what is loaded on first use is not counted.
    """
    scan(small)
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    tracks = scan(folder)
    seconds, after = time.perf_counter() - began, psutil.Process().memory_info().rss
    assert tracks
    return seconds, after - before, peak_rss() - before


def _first_step(command: list[str]) -> str:
    began, said = time.perf_counter(), ""
    with psutil.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:  # to its end: run.py must not write to a closed pipe
            if line.startswith("data "):
                said = f"ready after {time.perf_counter() - began:.1f} s, "
            if line.startswith("step 1/"):
                gb = process.memory_info().rss / 1e9
                said += f"step 1 after {time.perf_counter() - began:.1f} s, {gb:.2f} GB"
    if process.returncode:
        raise RuntimeError("run.py failed")
    return said


def stream(count: int = 10_000, shards: int = 10) -> None:
    """Measure the memory of training's loader and its worker at each tenth of an epoch."""
    with temporary() as folder:
        write_small(folder / "data", count)
        names = sorted((folder / "data").glob("*/*"))
        for shard in range(shards):
            with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
                for name in names[shard * len(names) // shards :][: len(names) // shards]:
                    tar.add(name, name.name)
        shutil.rmtree(folder / "data")
        clips = make_clips(Clips, scan(str(folder)), samples=MODEL_RATE_HZ // 2)
        plan = Plan(count, 4, 1, epochs=1, max_steps=None, seed=0)
        began, megabytes = time.perf_counter(), []
        loader = train_batches(clips, plan, start=0, rank=0, workers=1)
        for done, _ in enumerate(loader, 1):
            if done % (plan.total_steps // 10) == 0 and done < plan.total_steps:
                both = [psutil.Process(), *psutil.Process().children()]
                megabytes.append(sum(p.memory_info().rss for p in both) / 1e6)
        rate = count / (time.perf_counter() - began)
    print(f"{count} clips in {shards} shards, {rate:.0f} clips/s; MB at each tenth of the epoch:")
    print(*(f"{mb:.0f}" for mb in megabytes), f"spread {max(megabytes) / min(megabytes) - 1:.1%}")


def _main() -> None:
    print(f"{platform.platform()}, {os.cpu_count()} cores", end=", ")
    print(f"torch {torch.__version__}, Python {platform.python_version()}", flush=True)
    fire.Fire({"lengths": lengths, "rates": rates, "scale": scale, "stream": stream})


if __name__ == "__main__":
    _main()
