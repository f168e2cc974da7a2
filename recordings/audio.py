"""Audio files of any common format, on disk or in a tar; only what is needed is decoded."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile as sf
import soxr

from recordings import m4a
from recordings.shards import Member

Source = Path | Member  # of a recording or a caption
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff", ".m4a")
MIN_CLIP_SEC = 0.5
SAMPLE_RATES_HZ = (4_000, 768_000)  # outside these a header is damaged, not unusual
MAX_CHANNELS = 32
STREAMED_BYTES = 0x7FFF0000  # a data size this large is a streaming writer's "unknown"
TRUNCATED = re.compile(r"(?:data|SSND) : (\d+) \(should be (\d+)\)")  # from libsndfile's header log
SCAN_BLOCK_SEC = 60
OGG_PAGE_FRAMES = 2**18  # more than a Vorbis page usually holds: 255 packets of 1024


def check(source: Source) -> tuple[int, int]:
    """Return (sample rate in Hz, frames). Raises: ValueError if it can't be trained on."""
    if isinstance(source, Path) and not source.is_file():
        raise ValueError("is not a plain file")
    if (source.stat().st_size if isinstance(source, Path) else source.size) == 0:
        raise ValueError("the file is empty (0 bytes)")
    with _opened(source) as file:
        if _is_m4a(source):
            rate, channels, frames = m4a.probe(file)
            check_facts(rate, channels, frames)
            return rate, frames
        return _check_sound(file)


def probe(source: Source) -> tuple[int, int, int]:
    """Return (sample rate in Hz, channels, frames) of a recording. Raises: ValueError."""
    with _opened(source) as file:
        if _is_m4a(source):
            return m4a.probe(file)
        try:
            info = sf.info(file)
        except sf.SoundFileError as error:
            raise ValueError(str(error)) from None
    return info.samplerate, info.channels, info.frames


def read_crop(
    source: Source, start: int, frames: int, sample_rate: int, channels: int
) -> np.ndarray:  # [C, samples]
    """Decode and resample only the `frames` frames of a recording from frame `start` on.

    Mono models get the mean of all channels, stereo models the first two, or the only one twice.
    Raises: ValueError that says what is wrong with the file.
    """
    try:
        with _opened(source) as file:
            if _is_m4a(source):
                wav, source_rate = m4a.read(file, start, frames)  # [frames, channels]
            else:
                with sf.SoundFile(file) as sound:
                    wav, source_rate = _read(sound, start, frames), sound.samplerate
    except (sf.SoundFileError, OSError) as error:
        raise ValueError(f"can't be read ({_reason(error)})") from None
    if len(wav) < frames:
        raise ValueError(f"ends after {start + len(wav)} frames: it has changed since the start")
    if not np.isfinite(wav).all():
        raise ValueError("holds samples that are not finite (NaN or infinity)")
    if channels == 1:
        wav = wav.mean(axis=1, keepdims=True)
    elif wav.shape[1] != channels:
        wav = wav[:, :channels] if wav.shape[1] > channels else np.repeat(wav, channels, axis=1)
    if source_rate != sample_rate:
        wav = soxr.resample(wav, source_rate, sample_rate)
    return np.ascontiguousarray(wav.T)


def tags(source: Source) -> dict[str, str]:
    """Return the tags of a recording, with names in lower case. Raises: ValueError."""
    with _opened(source) as file:
        return m4a.tags(file)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[str | BinaryIO]:
    """Open what soundfile and PyAV accept: a path, which they read faster, or a part of a tar."""
    if isinstance(source, Path):
        yield str(source)
    else:
        with source.open() as file:
            yield file


def _is_m4a(source: Source) -> bool:
    return source.suffix.lower() == ".m4a"


def _check_sound(file: str | BinaryIO) -> tuple[int, int]:
    try:
        with sf.SoundFile(file) as sound:
            _check_header(sound)
            try:
                end_is_readable = len(_read(sound, sound.frames - 1, 1)) == 1
            except sf.SoundFileError:  # as flac does
                end_is_readable = False
            if not end_is_readable:
                seconds = sound.frames / sound.samplerate
                raise ValueError(
                    f"truncated or damaged: its header says {seconds:.2f} s of audio, but its end "
                    "can't be read"
                )
            if sound.subtype in ("FLOAT", "DOUBLE"):  # only these can hold NaN
                sound.seek(0)
                for block in sound.blocks(SCAN_BLOCK_SEC * sound.samplerate, dtype="float32"):
                    if not np.isfinite(block).all():
                        raise ValueError("holds samples that are not finite (NaN or infinity)")
            return sound.samplerate, sound.frames
    except sf.SoundFileError as error:
        raise ValueError(f"can't be read as audio ({_reason(error)})") from None


def _read(sound: sf.SoundFile, start: int, frames: int) -> np.ndarray:  # [frames, channels]
    """Decode `frames` frames from `start` on.

    They equal those of the file decoded as a whole; for Opus at low rates to within 0.003, as its
    decoder takes long to settle after a seek.
    """
    first = start
    if sound.format == "OGG":  # libsndfile seeks to the wrong frame in the last page
        first = min(start, max(0, sound.frames - OGG_PAGE_FRAMES))
    sound.seek(first)
    return sound.read(start - first + frames, dtype="float32", always_2d=True)[start - first :]


def _check_header(sound: sf.SoundFile) -> None:
    sizes = TRUNCATED.search(sound.extra_info)
    declared, found = map(int, sizes.groups()) if sizes else (0, 0)
    if found < declared < STREAMED_BYTES:
        raise ValueError(f"truncated: its header says {declared} bytes of audio, {found} are there")
    check_facts(sound.samplerate, sound.channels, sound.frames)


def check_facts(sample_rate: int, channels: int, frames: int) -> None:
    """Raise ValueError if the rate, channels or length are impossible, or it is too short."""
    low, high = SAMPLE_RATES_HZ
    if not low <= sample_rate <= high or channels > MAX_CHANNELS:
        raise ValueError(f"damaged: its header says {sample_rate} Hz and {channels} channels")
    if frames == 0:
        raise ValueError("its header says that it contains no audio (zero length)")
    if frames < MIN_CLIP_SEC * sample_rate:
        raise ValueError(f"too short: {frames / sample_rate:.2f} s; at least {MIN_CLIP_SEC} s")


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).rstrip(".") or "it is damaged"
