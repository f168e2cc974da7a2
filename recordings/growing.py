"""A wav file that grows while its music is made, and that plays even if the process is killed.

While NAME.wav is made, its music is in NAME.part.wav, in 32-bit float: the gain that keeps it from
clipping is known only at its end. Letters: C channels.
"""

import contextlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile as sf

import files
from errors import UserError

PEAK = 0.99
COPIED_FRAMES = 2**18  # at a time, so that memory doesn't grow with the length
PCM, FLOAT = 1, 3  # a wav's codes of its number format
START = 56  # bytes in front of the samples of a part file


class GrowingWav:
    """The wav file `path`; `add` lengthens its part file, `finish` makes the whole of it.

    Raises: UserError if the part file can't be written.
    """

    def __init__(self, path: Path, sample_rate: int, channels: int) -> None:
        self.path, self.part = path, part_path(path)
        self._sample_rate, self._channels = sample_rate, channels
        self._frames = 0  # one sample of each channel
        self._peak = 0.0
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.part.write_bytes(self._header(FLOAT))

    def add(self, samples: np.ndarray) -> None:
        """Append float32 samples `[C, samples]`.

        Raises: UserError if they can't be written; the part file plays up to their start.
        """
        assert len(samples) == self._channels
        with self._writing(), self.part.open("r+b") as file:
            file.seek(START + 4 * self._channels * self._frames)
            file.write(samples.T.astype("<f4").tobytes())
            file.flush()  # the header never promises samples that a kill could keep from the file
            self._frames += samples.shape[1]
            self._peak = max(self._peak, float(np.abs(samples).max(initial=0)))
            file.seek(0)
            file.write(self._header(FLOAT))

    def finish(self) -> None:
        """Write `path` as a 16-bit wav, turned down as a whole if it would clip; drop the part.

        Raises: UserError if it can't be written; the part file is kept.
        """
        try:
            files.write(self.path, self._copy)
        except UserError as error:
            raise UserError(f"{error}\nThe whole piece is in {self.part}.") from error
        self.part.unlink()

    def _copy(self, file: BinaryIO) -> None:
        gain = PEAK / max(PEAK, self._peak)
        file.write(self._header(PCM))
        for block in sf.blocks(self.part, COPIED_FRAMES, dtype="float32", always_2d=True):
            content = io.BytesIO()  # on a full disk, libsndfile would print tracebacks
            sf.write(content, block * gain, self._sample_rate, "PCM_16", "LITTLE", "RAW")
            file.write(content.getvalue())

    def _header(self, code: int) -> bytes:
        """Return what is in front of the samples."""
        width = {PCM: 2, FLOAT: 4}[code]  # bytes of a sample
        frame = width * self._channels
        rates = (self._sample_rate, self._sample_rate * frame)
        form = struct.pack("<HHIIHH", code, self._channels, *rates, frame, 8 * width)
        chunks = struct.pack("<4s4sI", b"WAVE", b"fmt ", len(form)) + form
        if code == FLOAT:  # as a wav that isn't PCM must
            chunks += struct.pack("<4sII", b"fact", 4, self._frames)
        size = frame * self._frames
        chunks += struct.pack("<4sI", b"data", size)
        return struct.pack("<4sI", b"RIFF", len(chunks) + size) + chunks

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.part}: can't be written ({error}); any music already in it plays"
            ) from error


def part_path(path: Path) -> Path:
    """Return where the music of a wav file is while it is made."""
    return path.with_suffix(".part.wav")


def longest_sec(sample_rate: int, channels: int) -> float:
    """Return how much music a part file can hold: a wav ends at 4 GiB."""
    return (2**32 - START) // (4 * channels) / sample_rate
