"""The tokens of crops of recordings: from files of tokens, or from the cache.

Letters: K codebooks, T token frames.
"""

import numpy as np

from errors import UserError
from recordings import token_file
from recordings.cache import Cache
from recordings.track import Track


class Tokens:
    """A reader of the codes `[K, T]` int16 of crops of recordings.

    Args:
        codec: name of the codec that made them, as in `Track.codec`.
        codebooks: K.
        card: size of a codebook; codes are below it.
        rate: token frames a second.
        hop: samples of a token frame, at the model's rate.
        cache: holds the tokens of audio files, once filled.
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
        """Raise UserError if a track's tokens come from another model's codec."""
        for track in tracks:
            if track.codec != self.codec:
                theirs = token_file.read_header(track.source)
                raise UserError(
                    f"{track.place}: was encoded for {theirs.facts.model_id} "
                    f"({theirs.codebooks} codebooks), whose EnCodec differs from that of "
                    f"--model_id={model_id} ({self.codebooks} codebooks): train that model, or "
                    f"encode the recordings again with prepare.py encode --model_id={model_id}"
                )

    def crop(self, track: Track, start: int, token_frames: int) -> np.ndarray:
        """Return codes `[K, T]` from a track's own frame `start` on, rounded to a token frame.

        T is `token_frames`, or what is left of the recording's whole token frames.
        Raises: OSError if they are no longer in the cache; ValueError if a file is damaged.
        """
        first = round(start * self.rate / track.sample_rate)
        if track.codec:
            return token_file.read(track.source, first, token_frames, self.card)
        return self.cache(track)[:, first : first + token_frames]
