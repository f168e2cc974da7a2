"""Read what libsndfile can't, or not exactly, with PyAV: length, crops and tags.

Only mp4 and its kin store each packet's exact position, so that a crop can be sought. In other
containers a position may be rounded, so samples are counted from the start; in some, packets before
the crop need not be decoded for that.

An AAC encoder may replace noise by its level (PNS), and the decoder then makes up noise from where
it starts: in such bands a crop's noise differs from the whole file's, but is the same each time.
"""

import contextlib
from collections.abc import Iterator
from typing import BinaryIO

import av
import numpy as np
from av.codec.context import Flags2

from recordings import mp3
from recordings.facts import Facts, check_header, missing_allowed, truncated

# Frames decoded before a crop and discarded: an AAC frame overlaps the last, by up to 2048, and the
# data of a frame of mp3 may begin ten frames before it.
PREROLL = 16 * 1_152
ROUNDED_SEC = 0.1  # by which lengths in headers are off: packets, milliseconds, an encoder's delay
# ffmpeg's names. Some of its other formats (concat, hls) list further files, which it would read.
FORMATS = "mov,wav,w64,flac,mp3,ogg,aiff,aac,matroska,asf"
MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
COUNTED = ("mp3", "aac", "flac")  # packets are numbered exactly as they are read


def probe(file: str | BinaryIO) -> Facts:
    """Return the facts of a recording; decodes all of it, or what is needed to know its length.

    Raises: ValueError that says what is wrong with the file.
    """
    try:
        with _open(file) as container:
            if container.format.name == "mp3":
                return mp3.probe(file, container)
            context = container.streams.audio[0].codec_context
            rate, channels, declared = context.sample_rate, context.channels, _declared(container)
            is_mp4, found = container.format.name == MP4, _end(container, declared)
            says_length = bool(container.streams.audio[0].duration)
        if declared - found > ROUNDED_SEC * rate and not says_length:
            declared = _declared_of_sound(file)  # a picture may be longer, or begin before it
    except av.FFmpegError as error:
        raise ValueError(f"can't be read as audio ({_reason(error)})") from None
    missing, rounded = declared - found, ROUNDED_SEC * rate
    if missing > max(rounded, missing_allowed(declared, rate)):
        raise truncated(declared, rate)
    if is_mp4 and declared:
        found = min(declared, found)  # the last packet may be padded
    return Facts(rate, channels, found, ends_early=missing > rounded)


def read(file: str | BinaryIO, start: int, frames: int) -> tuple[np.ndarray, int]:
    """Return (wav `[frames, channels]`, sample rate in Hz); fewer frames where the file ends.

    Raises: ValueError that says what is wrong with the file.
    """
    pieces, stop = [], start + frames
    try:
        with _open(file) as container:
            rate = container.streams.audio[0].codec_context.sample_rate
            for at, wav in _decode(container, start):
                pieces.append(wav[max(0, start - at) : max(0, stop - at)])
                if at + len(wav) >= stop:
                    break
    except av.FFmpegError as error:
        raise ValueError(f"can't be read ({_reason(error)})") from None
    return np.concatenate(pieces) if pieces else np.zeros((0, 1), np.float32), rate


def tags(file: str | BinaryIO) -> dict[str, str]:
    """Return the tags of a recording, with names in lower case. Raises: ValueError."""
    try:
        with _open(file) as container:  # ogg keeps them in the stream
            found = {**container.metadata, **container.streams.audio[0].metadata}
    except av.FFmpegError as error:
        raise ValueError(f"its tags can't be read ({_reason(error)})") from None
    return {name.lower(): value for name, value in found.items()}


def _open(file: str | BinaryIO) -> "av.container.InputContainer":
    if not isinstance(file, str):
        file.seek(0)
    container = av.open(file, "r", options={"format_whitelist": FORMATS}, metadata_errors="replace")
    if not container.streams.audio:
        container.close()
        raise ValueError("contains no audio")
    context = container.streams.audio[0].codec_context
    if context is None:
        container.close()
        raise ValueError("can't be read as audio (unknown codec)")
    if not context.sample_rate:
        container.close()
        raise ValueError("can't be read as audio (it is no recording, or damaged)")
    check_header(context.sample_rate, context.channels)  # ffmpeg may crash with impossible ones
    return container


def _declared(container: "av.container.InputContainer") -> int:
    """Return the frames that a recording's header promises, 0 where it says nothing."""
    stream = container.streams.audio[0]
    seconds = float((stream.duration or 0) * (stream.time_base or 0))
    if not seconds:
        seconds = (container.duration or 0) / av.time_base
    is_guessed = container.format.name == "aac"  # from the bit rate at its start
    return 0 if is_guessed else int(seconds * stream.codec_context.sample_rate)


def _declared_of_sound(file: str | BinaryIO) -> int:
    """Return the frames of the sound's packets, and of what the file lacks of its whole length."""
    begin, last, end = None, 0.0, 0.0  # of the sound, and of any stream, in seconds
    with _open(file) as container:
        sound, whole_sec = container.streams.audio[0], (container.duration or 0) / av.time_base
        with contextlib.suppress(av.InvalidDataError):
            for packet in container.demux():
                if packet.pts is None:
                    continue
                start = float(packet.pts * packet.time_base)
                stop = start + float((packet.duration or 0) * packet.time_base)
                end = max(end, stop)
                if packet.stream.index == sound.index:
                    begin, last = start if begin is None else begin, stop
        seconds = last - (begin or 0.0) + max(0.0, whole_sec - end)
        return int(seconds * sound.codec_context.sample_rate)


def _end(container: "av.container.InputContainer", declared: int) -> int:
    """Return the number of frames that can be decoded; where something is damaged, it ends."""
    rate = container.streams.audio[0].codec_context.sample_rate
    start = 0
    if container.format.name == MP4:
        start = max(0, declared - 1 - missing_allowed(declared, rate))
    end = 0
    try:
        for at, wav in _decode(container, start):
            end = at + len(wav)
    except av.InvalidDataError:
        if not declared:
            raise
    return end


def _decode(
    container: "av.container.InputContainer", start: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first frame's number, wav `[frames, channels]`) of blocks, from before `start` on."""
    stream = container.streams.audio[0]
    frames_per_unit = float((stream.time_base or 0) * stream.codec_context.sample_rate)
    name, first = container.format.name, stream.start_time or 0
    if name == "mp3":  # all that is decoded, also from files put one behind the other
        stream.codec_context.flags2 |= Flags2.skip_manual
    if name == MP4 and start > PREROLL:
        container.seek(first + int((start - PREROLL) / frames_per_unit), stream=stream)
    as_float = av.AudioResampler(format="flt")  # not one array a channel: PyAV knows 8 of those
    at = 0
    for packet in container.demux(stream):
        if name in COUNTED and packet.pts is not None:
            at = round((packet.pts - first) * frames_per_unit)
            if at < start - PREROLL:
                continue
        try:
            blocks = packet.decode()
        except av.InvalidDataError:
            if name not in COUNTED:
                raise
            length = round((packet.duration or 0) * frames_per_unit)  # a tag, or damaged: silence
            yield at, np.zeros((length, stream.codec_context.channels), np.float32)
            continue
        for block in blocks:
            if name == MP4 and block.pts is not None:
                at = round((block.pts - first) * frames_per_unit)
            for part in as_float.resample(block):
                yield at, part.to_ndarray().reshape(part.samples, -1)
                at += part.samples


def _reason(error: av.FFmpegError) -> str:
    if isinstance(error, (av.InvalidDataError, av.EOFError, av.ArgumentError)):
        return "it is no recording, or damaged"
    return str(error.strerror)
