"""AAC and ALAC in .m4a, which libsndfile can't read: length and crops, with PyAV.

The container stores each frame's position, so a crop starts where it should. An AAC encoder may
replace noise by its level (PNS), and the decoder then makes up noise from where it starts: in such
bands a crop's noise differs from the whole file's, but is the same each time.
"""

from collections.abc import Iterator
from typing import BinaryIO

import av
import numpy as np

# Frames decoded before a crop and discarded: each AAC frame overlaps the last, by up to 2048.
PREROLL = 8_192
# ffmpeg's names. Some of its other formats (concat, hls) list further files, which it would read.
FORMATS = "mov,wav,w64,flac,mp3,ogg,aiff,aac"


def probe(file: str | BinaryIO) -> tuple[int, int, int]:
    """Return (sample rate in Hz, channels, frames) of a recording; decodes its end.

    Raises: ValueError that says what is wrong with the file.
    """
    try:
        with _open(file) as container:
            if container.format.name == "mp3":  # it stores no positions to seek to
                raise ValueError("is an mp3 with another suffix: rename it to .mp3")
            stream = container.streams.audio[0]
            rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
            declared = int((stream.duration or 0) * (stream.time_base or 0) * rate)
            end = 0
            if declared:
                end = max(
                    (at + len(wav) for at, wav in _decode(container, declared - 1)), default=0
                )
    except av.FFmpegError as error:
        raise ValueError(f"can't be read as audio ({error.strerror})") from None
    if end < declared - PREROLL:
        raise ValueError(
            f"truncated or damaged: its header says {declared / rate:.2f} s of audio, but its end "
            "can't be read"
        )
    return rate, channels, min(declared, end)  # the last frame may be padded


def read(file: str | BinaryIO, start: int, frames: int) -> tuple[np.ndarray, int]:
    """Return (wav `[frames, channels]`, sample rate in Hz); fewer frames where the file ends.

    Raises: ValueError that says what is wrong with the file.
    """
    pieces, stop = [], start + frames
    try:
        with _open(file) as container:
            rate = container.streams.audio[0].codec_context.sample_rate
            for at, wav in _decode(container, start):
                if at >= stop:
                    break
                pieces.append(wav[max(0, start - at) : max(0, stop - at)])
    except av.FFmpegError as error:
        raise ValueError(f"can't be read ({error.strerror})") from None
    return np.concatenate(pieces) if pieces else np.zeros((0, 1), np.float32), rate


def tags(file: str | BinaryIO) -> dict[str, str]:
    """Return the tags of a recording, with names in lower case. Raises: ValueError."""
    try:
        with _open(file) as container:  # ogg keeps them in the stream
            found = {**container.metadata, **container.streams.audio[0].metadata}
    except av.FFmpegError as error:
        raise ValueError(f"its tags can't be read ({error.strerror})") from None
    return {name.lower(): value for name, value in found.items()}


def _open(file: str | BinaryIO) -> "av.container.InputContainer":
    container = av.open(file, "r", options={"format_whitelist": FORMATS}, metadata_errors="replace")
    if not container.streams.audio:
        container.close()
        raise ValueError("contains no audio")
    if container.streams.audio[0].codec_context is None:
        container.close()
        raise ValueError("can't be read as audio (unknown codec)")
    return container


def _decode(
    container: "av.container.InputContainer", start: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first frame's number, wav `[frames, channels]`) of blocks, from before `start` on."""
    stream = container.streams.audio[0]
    rate, unit = stream.codec_context.sample_rate, stream.time_base or 1
    if start > PREROLL:
        container.seek(int((start - PREROLL) / rate / unit), stream=stream)
    as_float = av.AudioResampler(format="fltp")
    for block in container.decode(stream):
        for part in as_float.resample(block):
            yield round((part.pts or 0) * (part.time_base or 0) * rate), part.to_ndarray().T
