"""The melodies of recordings, for crops of them.

Letters: F chroma frames, P pitch classes.
"""

import numpy as np

from recordings.cache import Cache
from recordings.track import Track


class Melodies:
    """The melodies of recordings, for crops of them.

    Args:
        frames: F, the chroma frames of every crop.
        rate: chroma frames a second.
        none: the melody of no recording, `[F, P]` float32.
        cache: where the melodies are, once it is filled.
    """

    def __init__(self, *, frames: int, rate: float, none: np.ndarray, cache: Cache) -> None:
        self.frames = frames
        self.rate = rate
        self.none = none
        self.cache = cache

    def crop(self, track: Track, start: int, frames: int) -> np.ndarray:
        """The melody of `frames` of a track's own frames from `start` on, repeated to `[F, P]`.

        Errors: OSError if it is no longer in the cache.
        """
        chroma = self.cache(track)
        first = min(round(start * self.rate / track.sample_rate), len(chroma) - 1)
        part = chroma[first : first + 1 + int(frames * self.rate / track.sample_rate)]
        return np.resize(part, (self.frames, part.shape[1])).astype(np.float32)
