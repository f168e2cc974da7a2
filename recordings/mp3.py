"""The length of an mp3, which is that of its frames: its header may be missing, or wrong."""

import re
from pathlib import Path
from typing import BinaryIO

import av

from recordings.facts import Facts, truncated

# A first frame without sound, which says how many follow: 4 bytes, perhaps 2 of a checksum, the
# side information, whose length depends on version and channels, a name, flags and the number.
HEADER = re.compile(
    rb"\xff[\xe2-\xff]..(?:..)?(?:.{9}|.{17}|.{32})(?:Xing|Info)\0\0\0[\1\3\5\7\x09\x0b\x0d\x0f](.{4})",
    re.DOTALL,
)
HEADER_BYTES = 4_096  # in which it begins
MAX_PADDING = 4_095  # frames at the end; 12 bits of the header
SYNC, SAME = 0xFFE00000, 0xFFFE0C00  # bits of a frame's head: sync; with version, layer, rate
KBIT_PER_SEC = {  # by version, of layer III
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def promised_frames(file: str | BinaryIO) -> int:
    """Return how many frames of mp3 the Xing or Info header promises; 0 without one."""
    if isinstance(file, str):
        with Path(file).open("rb") as opened:
            return promised_frames(opened)
    file.seek(0)
    start = file.read(10)
    while start[:3] == b"ID3" and len(start) == 10:
        file.seek(sum((byte & 127) << 7 * (9 - at) for at, byte in enumerate(start[6:], 6)), 1)
        start = file.read(10)
    header = HEADER.search(start + file.read(HEADER_BYTES))
    return int.from_bytes(header[1], "big") if header else 0


def probe(file: str | BinaryIO, container: "av.container.InputContainer") -> Facts:
    """Return the facts of an mp3, decoding none of it. Raises: ValueError if it is cut."""
    stream = container.streams.audio[0]
    rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
    unit = float((stream.time_base or 0) * rate)
    end, duration = _end(container)
    found = round((end - (stream.start_time or 0)) * unit)
    missing = round((promised_frames(file) * duration - end) * unit)
    if missing > rate:
        raise truncated(found + missing, rate)
    without_padding = round((stream.duration or 0) * unit)
    if missing >= 0 and found + missing - MAX_PADDING <= without_padding:
        return Facts(rate, channels, min(found, without_padding), ends_early=missing > 0)
    return Facts(rate, channels, found)


def _end(container: "av.container.InputContainer") -> tuple[int, int]:
    """Return where the last frame ends, and how long it is, in the stream's unit of time.

    Raises: ValueError if there are no frames, or the last is incomplete.
    """
    stream = container.streams.audio[0]
    same = last = size = end = duration = 0
    for packet in container.demux(stream):
        head = int.from_bytes(memoryview(packet)[:4], "big") if packet.size >= 4 else 0
        if head & SYNC == SYNC and (not same or head & SAME == same):  # else junk, or a tag
            same, last, size, duration = head & SAME, head, packet.size, packet.duration or 0
            end = (packet.pts or 0) + duration
    if not end:
        raise ValueError("can't be read as audio (it is no recording, or damaged)")
    if size < _frame_bytes(last, stream.codec_context.sample_rate):
        raise ValueError("truncated: its last frame is incomplete")
    return end, duration


def _frame_bytes(head: int, sample_rate: int) -> int:
    """Return the size of a frame of layer III, 0 if its head doesn't say it."""
    version, layer, index = head >> 19 & 3, head >> 17 & 3, head >> 12 & 15
    if layer != 1 or index == 15:
        return 0
    version = 1 if version == 3 else 2
    bit_rate = 1_000 * KBIT_PER_SEC[version][index]
    return (144 // version * bit_rate // sample_rate + (head >> 9 & 1)) if bit_rate else 0
