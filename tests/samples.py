"""Recordings of every format, tars of them, and the crops that training would take."""

import io
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile as sf
from conftest import tone

from dataset import Clips
from recordings.scan import scan

RATE = 48_000  # one that all formats have
CONTAINERS = {  # libsndfile's container and coding
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "aif": ("AIFF", "FLOAT"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}
FORMATS = [*CONTAINERS, "m4a"]


def write(path: Path, wav: np.ndarray, tags: dict[str, str] | None = None, rate: int = RATE):
    """A recording in the format of its suffix, `wav` being [samples, channels]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".m4a":
        write_m4a(path, wav, tags or {}, rate)
        return
    form, subtype = CONTAINERS[path.suffix.lower()[1:]]
    whole = np.round(wav * 32_767)  # formats round differently; NaN stays in floats
    samples = whole.astype(np.int16) if subtype == "PCM_16" else whole / 32_768
    with sf.SoundFile(path, "w", rate, wav.shape[1], subtype, format=form) as file:
        for name, value in (tags or {}).items():
            setattr(file, name, value)
        for start in range(0, len(samples), RATE):  # libsndfile dies of a long block of Vorbis
            file.write(samples[start : start + RATE])


def write_m4a(path: Path, wav: np.ndarray, tags: dict[str, str], rate: int) -> None:
    if "aac" not in av.codecs_available:
        pytest.skip("this PyAV has no encoder of AAC")
    layout = {1: "mono", 2: "stereo"}[wav.shape[1]]
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as file:
        file.metadata.update(tags)
        # Without PNS, whose noise is another for each start; see m4a.py.
        stream = file.add_stream("aac", rate=rate, layout=layout, options={"aac_pns": "0"})
        samples = np.ascontiguousarray(wav.T, dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for block in (frame, None):
            file.mux(stream.encode(block))


def clips(folder: Path, seconds: float = 1.0, channels: int = 1, **options: Any) -> Clips:
    samples = round(seconds * 32_000)
    made = {"sample_rate": 32_000, "channels": channels, "samples": samples, "seed": 0}
    return Clips(scan(str(folder)), **{**made, **options})


Members = list[tuple[str, bytes]]


def sound(seed: int = 0, seconds: float = 1.0) -> bytes:
    file = io.BytesIO()
    sf.write(file, tone(seed, seconds), 32_000, format="WAV")
    return file.getvalue()


PAIR: Members = [("good.wav", sound()), ("good.txt", b"a good one")]


def tar_of(path: Path, members: Members = PAIR) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
