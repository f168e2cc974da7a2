"""EnCodec: audio -> codes, of clips and of whole recordings.

Letters: B batch, C channels, K codebooks, T token frames.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from musicgen.load import Model
from recordings import audio
from recordings.cache import Cache
from recordings.token_file import codec_name
from recordings.tokens import Tokens
from recordings.track import Track


@torch.no_grad()
def encode_audio(model: Model, wav: torch.Tensor) -> torch.Tensor:
    """wav `[B, C, samples]` at the model's rate -> codes `[B, K, T]`; in float32, no autocast.

    On a GPU as one batch. On the CPU, where that is no faster, clip by clip: there a batch rounds
    differently from a single clip, and of a nearly tied code another one wins.
    """
    parts = wav.split(1) if wav.device.type == "cpu" else [wav]
    encoded = [model.compression_model.encode(part) for part in parts]
    assert all(scale is None for _, scale in encoded), "MusicGen's codecs don't renormalize"
    return torch.cat([codes for codes, _ in encoded])


def move(model: Model, half: str, device: torch.device | str) -> None:
    """Move EnCodec's "encoder", unused with kept tokens, or its "decoder", used for samples."""
    for module in getattr(_codec(model), half).to(device).modules():
        weight = module.__dict__.get("weight")  # weight_norm keeps there what it last computed
        if isinstance(weight, torch.Tensor):
            module.weight = weight.to(device)


def codec_hash(model: Model) -> str:
    """Of what the codes depend on: EnCodec's weights and config."""
    codec = _codec(model)
    digest = hashlib.sha256(codec.cfg_text.encode())
    for name, tensor in codec.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _codec(model: Model) -> Any:
    codec: Any = model.compression_model
    while not hasattr(codec, "decoder"):  # around it: for stereo, for Hugging Face's
        codec = codec.model
    return codec


# Encoded at a time, and how much of it only to be heard, on both sides. EnCodec's LSTM goes on
# from all before; from half a second before and a tenth after on, the codes were those of the
# recording encoded as a whole (`python -m benchmarks.tokens`).
WINDOW_SEC, MARGIN_SEC = 30, 2


def tokens_of(model: Model) -> Tokens:
    """Tokens of the model's codec: of recordings in its cache, or in files of their own."""
    rate, codebooks, codec = round(model.frame_rate), model.lm.num_codebooks, codec_hash(model)
    settings = [codec, codebooks, model.audio_channels, model.sample_rate, WINDOW_SEC, MARGIN_SEC]
    return Tokens(
        codec=codec_name(codec, codebooks),
        codebooks=codebooks,
        card=model.lm.card,
        rate=rate,
        hop=model.sample_rate // rate,
        cache=Cache("tokens", settings),
    )


def fill(
    model: Model,
    tokens: Tokens,
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
        return encode_track(model, track, batch_size)

    tokens.cache.fill(tracks, find, rank=rank, processes=processes)


def encode_track(model: Model, track: Track, batch_size: int) -> np.ndarray:
    """The codes `[K, T]` of a whole recording. Errors: ValueError if it can't be read."""
    return np.concatenate(list(_blocks(model, track, batch_size)), axis=1)


def _blocks(model: Model, track: Track, batch_size: int) -> Iterator[np.ndarray]:
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
        encoded = encode_audio(model, batch).to("cpu", torch.int16)  # [B, K, T]
        for begin, codes in zip(group, encoded.numpy(), strict=True):
            heard = MARGIN_SEC * rate if begin else 0
            end = batch.shape[2] * rate // model.sample_rate  # whole frames
            if group != last:
                end -= MARGIN_SEC * rate
            yield codes[:, heard:end]
