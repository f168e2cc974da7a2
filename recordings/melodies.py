"""The melodies of crops of recordings.

Letters: F chroma frames, P pitch classes.
"""

import numpy as np

from recordings.cache import Cache
from recordings.track import Track


class Melodies:
    """A reader of the melodies of crops of recordings.

    Args:
        frames: F, the chroma frames of each crop.
        rate: chroma frames a second.
        none: the melody that stands for "no melody", `[F, P]` float32.
        cache: holds the melodies, once filled.
    """

    def __init__(self, *, frames: int, rate: float, none: np.ndarray, cache: Cache) -> None:
        self.frames = frames
        self.rate = rate
        self.none = none
        self.cache = cache

    def crop(self, track: Track, start: int, frames: int) -> np.ndarray:
        """Return the melody of a track's `frames` own frames from `start` on, repeated to `[F, P]`.

        Raises: OSError if it is no longer in the cache.
        """
        chroma = self.cache(track)
        first = min(round(start * self.rate / track.sample_rate), len(chroma) - 1)
        part = chroma[first : first + 1 + int(frames * self.rate / track.sample_rate)]
        return np.resize(part, (self.frames, part.shape[1])).astype(np.float32)
