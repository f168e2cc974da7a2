"""Audio files of any common format, on disk or in a tar; only what is needed is decoded."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile as sf
import soxr

from recordings import ffmpeg, mp3
from recordings.facts import Facts, check_facts, missing_allowed, truncated
from recordings.shards import Member

Source = Path | Member  # of a recording or a caption
FOR_FFMPEG = (".m4a", ".mp4", ".aac", ".wma", ".mka", ".mkv", ".webm")
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff", ".w64", *FOR_FFMPEG)
STREAMED_BYTES = 0x7FFF0000  # a data size this large is a streaming writer's "unknown"
TRUNCATED = re.compile(
    r"(?:data|SSND|riff) : (\d+) \(should be (\d+)\)"
)  # from libsndfile's header log
UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's
SCAN_BLOCK_SEC = 60
OGG_PAGE_FRAMES = 2**18  # more than a Vorbis page usually holds: 255 packets of 1024


def check(source: Source) -> Facts:
    """Return the facts of a recording. Raises: ValueError if it can't be trained on."""
    if isinstance(source, Path) and not source.is_file():
        raise ValueError("is not a plain file")
    if (source.stat().st_size if isinstance(source, Path) else source.size) == 0:
        raise ValueError("the file is empty (0 bytes)")
    facts = probe(source)
    check_facts(facts.sample_rate, facts.channels, facts.frames)
    return facts


def probe(source: Source) -> Facts:
    """Return the facts of a recording, after a look at its end.

    Decodes those that may hold NaN, or don't say their length.
    Raises: ValueError that says what is wrong with the file.
    """
    with _opened(source) as file:
        if source.suffix.lower() != ".mp3":
            with contextlib.suppress(sf.SoundFileError), _libsndfile(source, file) as sound:
                return _probe_sound(sound, file)
        return ffmpeg.probe(file)


def read_crop(
    source: Source, start: int, frames: int, sample_rate: int, channels: int
) -> np.ndarray:  # [C, samples]
    """Decode and resample only the `frames` frames of a recording from frame `start` on.

    Mono models get the mean of all channels, stereo models the first two, or the only one twice.
    Raises: ValueError that says what is wrong with the file.
    """
    try:
        with _opened(source) as file:
            wav, source_rate = _decode(source, file, start, frames)
    except OSError as error:
        raise ValueError(f"can't be read ({error.strerror})") from None
    if len(wav) < frames:
        raise ValueError(f"ends after {start + len(wav)} frames: damaged, or it has changed since")
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
        return ffmpeg.tags(file)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[str | BinaryIO]:
    """Open what soundfile and PyAV accept: a path, which they read faster, or a part of a tar."""
    if isinstance(source, Path):
        yield str(source)
    else:
        with source.open() as file:
            yield file


def _decode(
    source: Source, file: str | BinaryIO, start: int, frames: int
) -> tuple[np.ndarray, int]:  # [frames, channels], sample rate in Hz
    with contextlib.suppress(sf.SoundFileError), _libsndfile(source, file) as sound:
        wav = _read(sound, start, frames)
        if sound.format != "MP3" or len(wav) == frames:  # else damaged, or its header is wrong
            return wav, sound.samplerate
    return ffmpeg.read(file, start, frames)


def _libsndfile(source: Source, file: str | BinaryIO) -> sf.SoundFile:
    """Open a recording with libsndfile. Raises: SoundFileError if it can't read it exactly."""
    suffix = source.suffix.lower()
    if suffix in FOR_FFMPEG or (suffix == ".mp3" and not mp3.promised_frames(file)):
        raise sf.SoundFileError
    sound = _from_start(file)
    if sound.frames == UNKNOWN_FRAMES or (sound.format == "MP3" and suffix != ".mp3"):
        sound.close()
        raise sf.SoundFileError
    return sound


def _from_start(file: str | BinaryIO) -> sf.SoundFile:
    if not isinstance(file, str):
        file.seek(0)
    return sf.SoundFile(file)


def _probe_sound(sound: sf.SoundFile, file: str | BinaryIO) -> Facts:
    rate, channels, frames = sound.samplerate, sound.channels, sound.frames
    declared, found = frames, _end(sound, file)
    if sizes := TRUNCATED.search(sound.extra_info):
        declared_bytes, found_bytes = map(int, sizes.groups())
        if found_bytes < declared_bytes < STREAMED_BYTES:
            declared = -(-frames * declared_bytes // max(1, found_bytes))
    if declared - found > missing_allowed(declared, rate):
        raise truncated(declared, rate)
    if sound.subtype in ("FLOAT", "DOUBLE"):  # only these can hold NaN
        sound.seek(0)
        for block in sound.blocks(SCAN_BLOCK_SEC * rate, dtype="float32"):
            if not np.isfinite(block).all():
                raise ValueError("holds samples that are not finite (NaN or infinity)")
    return Facts(rate, channels, found, ends_early=found < declared)


def _end(sound: sf.SoundFile, file: str | BinaryIO) -> int:
    """Return the number of frames that can be read, if few are missing; else a smaller one."""
    with contextlib.suppress(sf.SoundFileError):  # as flac raises
        if sound.frames == 0 or len(_read(sound, sound.frames - 1, 1)) == 1:
            return sound.frames
    first = max(0, sound.frames - OGG_PAGE_FRAMES)
    block = np.full((sound.frames - first, sound.channels), np.nan, np.float32)
    # After an error libsndfile has to open the file anew.
    with contextlib.suppress(sf.SoundFileError), _from_start(file) as sound:
        sound.seek(first)
        sound.read(out=block)
    return first + int(np.isfinite(block).all(axis=1).argmin())


def _read(sound: sf.SoundFile, start: int, frames: int) -> np.ndarray:  # [frames, channels]
    """Decode `frames` frames from `start` on.

    They equal those of the file decoded as a whole; for Opus at low rates to within 0.003, as its
    decoder takes long to settle after a seek.
    """
    first = start
    if sound.format == "OGG":  # libsndfile seeks to the wrong frame in the last page
        first = min(start, max(0, sound.frames - OGG_PAGE_FRAMES))
    elif sound.format == "MP3":  # libsndfile decodes a frame without the data before it
        first = max(0, start - ffmpeg.PREROLL)
    sound.seek(first)
    return sound.read(start - first + frames, dtype="float32", always_2d=True)[start - first :]
