"""Files of tokens, one for each recording, as prepare.py encode writes them: safetensors.

One tensor "codes" `[K, T]` int16, and metadata: which codec encoded which recording.
Read and written here, as the safetensors library can't read from inside a tar and orders the
metadata differently each time.

Letters: K codebooks, T token frames.
"""

import contextlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from recordings.audio import Source
from recordings.facts import check_facts
from recordings.shards import Member

SUFFIX = ".safetensors"
MAX_HEADER = 2**16  # bytes; ours take a few hundred
MAX_CODEBOOKS, MAX_RATE_HZ = 64, 1000  # of token frames; a header that says more is damaged


class Facts(NamedTuple):
    """The metadata: facts of the codec, and of the recording in its own frames."""

    codec: str  # codec_hash
    model_id: str
    frame_rate: int  # token frames a second
    sample_rate: int
    frames: int
    source: str  # Track.stamp of the recording


class Header(NamedTuple):
    facts: Facts
    codebooks: int
    token_frames: int
    start: int  # where in the file the codes begin

    @property
    def codec(self) -> str:
        """Name the codec; all files of a dataset share one string."""
        return codec_name(self.facts.codec, self.codebooks)


def codec_name(codec_hash: str, codebooks: int) -> str:
    """Name a codec; stereo models use the mono ones' codec with twice the codebooks."""
    return sys.intern(f"{codec_hash} {codebooks}")


def read_header(source: Source) -> Header:
    """Return the header. Raises: OSError; ValueError if it is not a whole file of tokens."""
    with _opened(source) as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= min(MAX_HEADER, size):
            raise ValueError("is not a file of tokens, or is damaged: its header can't be read")
        try:
            header = json.loads(file.read(start - 8))
            metadata, codes = header.pop("__metadata__"), header.pop("codes")
            numbers = ("frame_rate", "sample_rate", "frames")
            given: dict[str, Any] = {name: metadata[name] for name in Facts._fields}
            facts = Facts(**{**given, **{name: int(given[name]) for name in numbers}})
            codebooks, length = codes["shape"]
            is_ours = not header and all(isinstance(n, int) for n in (codebooks, length))
            is_ours = is_ours and all(
                isinstance(n, str) for n in (facts.codec, facts.model_id, facts.source)
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError):
            is_ours = False
    if not is_ours:
        raise ValueError("is not a file of tokens: prepare.py encode makes them")
    if codes.get("dtype") != "I16":
        raise ValueError(f"its codes are {str(codes.get('dtype'))[:20]}, not 16-bit integers")
    if not (0 < codebooks <= MAX_CODEBOOKS and 0 < facts.frame_rate <= MAX_RATE_HZ):
        raise ValueError(
            f"damaged: it says {codebooks} codebooks, {facts.frame_rate} frames a second"
        )
    check_facts(facts.sample_rate, 1, facts.frames)
    if abs(length - facts.frames * facts.frame_rate // facts.sample_rate) > 1:  # by rounding
        raise ValueError(
            f"damaged: {length} token frames are not {facts.frames // facts.sample_rate} s of audio"
        )
    bytes_of_codes = 2 * codebooks * length
    if codes.get("data_offsets") != [0, bytes_of_codes] or size != start + bytes_of_codes:
        raise ValueError(f"truncated or damaged: it should hold {bytes_of_codes} bytes of codes")
    return Header(facts, codebooks, length, start)


def read(source: Source, first: int, token_frames: int, card: int) -> np.ndarray:  # [K, T]
    """Read the codes from token frame `first` on, and nothing else of the file.

    T is `token_frames`, or what is left. Raises: ValueError, also if a code is not below `card`.
    """
    try:
        header = read_header(source)
        length = max(0, min(token_frames, header.token_frames - first))
        codes = np.empty((header.codebooks, length), "<i2")
        with _opened(source) as file:
            for row, codebook in enumerate(codes):
                file.seek(header.start + 2 * (row * header.token_frames + first))
                data = file.read(2 * length)
                if len(data) < 2 * length:
                    raise ValueError("truncated: it has changed since the start")
                codebook[:] = np.frombuffer(data, "<i2")
    except OSError as error:
        raise ValueError(f"can't be read ({error})") from None
    if codes.size and not 0 <= codes.min() <= codes.max() < card:
        raise ValueError(f"damaged: it has codes outside 0 to {card - 1}")
    return codes


def write(file: BinaryIO, codes: np.ndarray, facts: Facts) -> None:
    """Write codes `[K, T]` int16."""
    data = np.ascontiguousarray(codes, "<i2").tobytes()
    metadata = {name: str(value) for name, value in facts._asdict().items()}
    tensor = {"dtype": "I16", "shape": codes.shape, "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": metadata, "codes": tensor}).encode()
    header += b" " * (-len(header) % 8)  # safetensors aligns the data to 8 bytes
    file.write(struct.pack("<Q", len(header)) + header + data)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    with source.open() if isinstance(source, Member) else Path(source).open("rb") as file:
        yield file
