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
WITH_PYAV = {  # ffmpeg's container and coding; AAC without PNS, see recordings/ffmpeg.py
    "w64": ("w64", "pcm_s16le", {}),
    "m4a": ("mp4", "aac", {"aac_pns": "0"}),
    "mp4": ("mp4", "alac", {}),
    "aac": ("adts", "aac", {"aac_pns": "0"}),
    "wma": ("asf", "wmav2", {}),
    "mka": ("matroska", "flac", {}),
    "mkv": ("matroska", "aac", {"aac_pns": "0"}),
    "webm": ("webm", "libopus", {}),
}
FORMATS = [*CONTAINERS, *WITH_PYAV]
FROM_THE_START = {"wma", "mka", "mkv", "webm"}  # a crop is decoded from there


def write(path: Path, wav: np.ndarray, tags: dict[str, str] | None = None, rate: int = RATE):
    """A recording in the format of its suffix, `wav` being [samples, channels]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()[1:]
    if suffix in WITH_PYAV:
        form, codec, options = WITH_PYAV[suffix]
        write_with_pyav(path, wav, form, codec, options, tags, rate)
        return
    form, subtype = CONTAINERS[suffix]
    whole = np.round(wav * 32_767)  # formats round differently; NaN stays in floats
    samples = whole.astype(np.int16) if subtype == "PCM_16" else whole / 32_768
    with sf.SoundFile(path, "w", rate, wav.shape[1], subtype, format=form) as file:
        for name, value in (tags or {}).items():
            setattr(file, name, value)
        for start in range(0, len(samples), RATE):  # libsndfile dies of a long block of Vorbis
            file.write(samples[start : start + RATE])


def write_with_pyav(
    path: Path,
    wav: np.ndarray,
    form: str,
    codec: str,
    options: dict[str, str],
    tags: dict[str, str] | None = None,
    rate: int = RATE,
    **of_container: str,
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder of {codec}")
    layout = {1: "mono", 2: "stereo"}[wav.shape[1]]
    if form == "mp4":
        of_container["movflags"] = "faststart"
    with av.open(str(path), "w", format=form, options=of_container) as file:
        file.metadata.update(tags or {})
        stream = file.add_stream(codec, rate=rate, layout=layout, options=options)
        stream.bit_rate = 128_000
        # As whole 16-bit numbers, which lossless formats keep.
        samples = (np.round(wav.T * 32_767) / 32_768).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples), format="fltp", layout=layout
        )
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
