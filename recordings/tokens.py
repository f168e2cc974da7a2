"""The tokens of recordings, for crops of them: from files of tokens, or from the cache.

Letters: K codebooks, T token frames.
"""

import numpy as np

from errors import UserError
from recordings import token_file
from recordings.cache import Cache
from recordings.track import Track


class Tokens:
    """The codes `[K, T]` int16 of recordings, for crops of them.

    Args:
        codec: the name of the codec they are of, as in `Track.codec`.
        codebooks: K.
        card: codes are below it.
        rate: token frames a second.
        hop: samples of a token frame, at the model's rate.
        cache: where the tokens of audio are, once it is filled.
    """

    def __init__(
        self, *, codec: str, codebooks: int, card: int, rate: int, hop: int, cache: Cache
    ) -> None:
        self.codec = codec
        self.codebooks = codebooks
        self.card = card
        self.rate = rate
        self.hop = hop
        self.cache = cache

    def check(self, tracks: list[Track], model_id: str) -> None:
        """Errors: UserError if they are of another model's codec."""
        for track in tracks:
            if track.codec != self.codec:
                theirs = token_file.read_header(track.source)
                raise UserError(
                    f"{track.place}: has the tokens of {theirs.facts.model_id} "
                    f"({theirs.codebooks} codebooks), whose EnCodec is not that of "
                    f"--model_id={model_id} ({self.codebooks} codebooks): train that model, or "
                    f"make them anew from the recordings with prepare.py encode "
                    f"--model_id={model_id}"
                )

    def crop(self, track: Track, start: int, frames: int) -> np.ndarray:
        """Codes `[K, T]` from a track's own frame `start` on, which is rounded to a token frame.

        T is `frames`, or what is left of the recording's whole frames.
        Errors: OSError if they are no longer in the cache; ValueError if a file is damaged.
        """
        first = round(start * self.rate / track.sample_rate)
        if track.codec:
            return token_file.read(track.source, first, frames, self.card)
        return self.cache(track)[:, first : first + frames]
