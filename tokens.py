"""The tokens of whole recordings, made once: training then has no EnCodec and no decoding in it.

They are kept in the user's cache folder, or in files that prepare.py encode has made.

Letters: B batch, C channels, K codebooks, T token frames.
"""

from collections.abc import Iterator

import numpy as np
import torch

import audio
import musicgen
import token_files
from cache import Cache
from dataset import Track
from flags import UserError
from musicgen import MusicGen

# Encoded at a time, and how much of it only to be heard, on both sides. EnCodec's LSTM goes on
# from all before; from half a second before and a tenth after on, the codes were those of the
# recording encoded as a whole (`python -m benchmarks.tokens`).
WINDOW_SEC, MARGIN_SEC = 30, 2


class Tokens:
    """The codes `[K, T]` int16 of recordings, for crops of them.

    Those of audio are on disk once `prepare` has run. `hop` is how many samples a frame has.
    """

    def __init__(self, model: MusicGen) -> None:
        self.codebooks, self.card = model.lm.num_codebooks, model.lm.card
        self.rate = round(model.frame_rate)  # frames a second
        self.hop = model.sample_rate // self.rate
        self.codec_hash = musicgen.codec_hash(model)
        codec = [self.codec_hash, self.codebooks, model.audio_channels]
        self._cache = Cache("tokens", [*codec, model.sample_rate, WINDOW_SEC, MARGIN_SEC])

    def prepare(
        self,
        model: MusicGen,
        tracks: list[Track],
        batch_size: int,
        *,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Encode what is not in the cache yet, on a GPU `batch_size` windows at a time.

        Errors: UserError if a recording can't be read.
        """

        def find(track: Track) -> np.ndarray:
            return encode(model, track, batch_size)

        self._cache.fill(tracks, find, rank=rank, processes=processes)

    def check(self, tracks: list[Track], model_id: str) -> None:
        """Errors: UserError if they are of another model's codec."""
        ours = token_files.codec_name(self.codec_hash, self.codebooks)
        for track in tracks:
            if track.codec != ours:
                theirs = token_files.read_header(track.source)
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
            return token_files.read(track.source, first, frames, self.card)
        return self._cache(track)[:, first : first + frames]


def encode(model: MusicGen, track: Track, batch_size: int) -> np.ndarray:
    """The codes `[K, T]` of a whole recording. Errors: ValueError if it can't be read."""
    return np.concatenate(list(_blocks(model, track, batch_size)), axis=1)


def _blocks(model: MusicGen, track: Track, batch_size: int) -> Iterator[np.ndarray]:
    """The codes `[K, T]` of a whole recording, in blocks of bounded memory.

    Example: 60 s are encoded as 0 to 30 s, of which 0 to 28 s are kept; 26 to 56 s (28 to 54 s);
    52 to 60 s (54 to 60 s). In whole seconds, which begin at a frame of both tokens and file.
    """
    rate, source = round(model.frame_rate), track.sample_rate
    block, margins = WINDOW_SEC - 2 * MARGIN_SEC, 2 * MARGIN_SEC * source
    begins = range(0, max(1, track.frames - margins), block * source)
    full, last = begins[:-1], begins[-1:]  # the last one is shorter
    groups = [full[i : i + batch_size] for i in range(0, len(full), batch_size)]
    for group in [*groups, last]:
        wavs = [
            audio.read_crop(
                track.source,
                begin,
                min(WINDOW_SEC * source, track.frames - begin),
                model.sample_rate,
                model.audio_channels,
            )
            for begin in group
        ]
        batch = torch.from_numpy(np.stack(wavs)).to(model.device)  # [B, C, samples]
        encoded = musicgen.encode_audio(model, batch).to("cpu", torch.int16)  # [B, K, T]
        for begin, codes in zip(group, encoded.numpy(), strict=True):
            heard = MARGIN_SEC * rate if begin else 0
            end = batch.shape[2] * rate // model.sample_rate  # whole frames
            if group != last:
                end -= MARGIN_SEC * rate
            yield codes[:, heard:end]
