"""EnCodec: audio -> codes, for clips and for whole recordings; codes -> audio.

Letters: B batch, C channels, K codebooks, T token frames.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from musicgen.device import codec_device, without_tf32
from musicgen.load import Model
from recordings import audio
from recordings.cache import Cache
from recordings.token_file import codec_name
from recordings.tokens import Tokens
from recordings.track import Track


@torch.no_grad()
def encode_audio(model: Model, wav: torch.Tensor) -> torch.Tensor:
    """Encode wav `[B, C, samples]` at the model's rate to codes `[B, K, T]` on the wav's device.

    A GPU takes the whole batch. The CPU takes one clip at a time, which is as fast: a batch rounds
    differently there, and where two codes are nearly tied it may pick the other one.
    """
    on_codec = wav.to(codec_device(wav.device))
    parts = on_codec.split(1) if on_codec.device.type == "cpu" else [on_codec]
    with without_tf32():
        encoded = [model.compression_model.encode(part) for part in parts]
    assert all(scale is None for _, scale in encoded), "MusicGen's codecs don't renormalize"
    return torch.cat([codes for codes, _ in encoded]).to(wav.device)


DECODE_SEC = 10.0  # decoded at a time: with 30, the demo model's codec takes 400 MB meanwhile
DECODE_MARGIN_SEC = 2.0  # context on both sides, for the codec's LSTM and convolutions


class Decoding:
    """Decodes the codes of one piece as they come."""

    def __init__(self, model: Model) -> None:
        self.model, self.device = model, codec_device(model.device)
        self.hop = round(model.sample_rate / model.frame_rate)  # samples in a frame
        self.step = max(1, round(DECODE_SEC * model.frame_rate))
        self.margin = round(DECODE_MARGIN_SEC * model.frame_rate)
        self.codes = torch.zeros(model.lm.num_codebooks, 0, dtype=torch.long)  # still needed
        self.done = 0  # frames at their beginning that are decoded

    @torch.no_grad()
    def add(self, codes: torch.Tensor, *, is_last: bool) -> Iterator[torch.Tensor]:
        """Take the next codes `[K, T]`; yield the wav `[C, samples]` that can be decoded by now."""
        self.codes = torch.cat([self.codes, codes.cpu()], dim=-1)
        while (ready := self.codes.shape[-1] - self.done) > 0:
            if ready < self.step + self.margin and not is_last:
                return
            stop = self.done + min(ready, self.step)
            given = self.codes[None, :, : stop + self.margin].to(self.device)
            wav = self.model.compression_model.decode(given.contiguous())[0]
            yield wav[..., self.done * self.hop : stop * self.hop].float().cpu()
            passed = max(0, stop - self.margin)
            self.codes, self.done = self.codes[:, passed:], stop - passed


def decode(model: Model, codes: torch.Tensor) -> torch.Tensor:
    """Decode codes `[B, K, T]` to wav `[B, C, samples]` on the CPU, one after the other."""
    wavs = [list(Decoding(model).add(piece, is_last=True)) for piece in codes]
    return torch.stack([torch.cat(wav, dim=-1) for wav in wavs])


def move(model: Model, half: str, device: torch.device | str) -> None:
    """Move EnCodec's "encoder", unused with cached tokens, or its "decoder", used for samples.

    `device` is the model's; see `codec_device`.
    """
    device = codec_device(device)
    for module in getattr(_codec(model), half).to(device).modules():
        weight = module.__dict__.get("weight")  # where weight_norm keeps its last result
        if isinstance(weight, torch.Tensor):
            module.weight = weight.to(device)


def codec_hash(model: Model) -> str:
    """Return a hash of EnCodec's weights and config: the codes depend on nothing else."""
    codec = _codec(model)
    digest = hashlib.sha256(codec.cfg_text.encode())
    for name, tensor in codec.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _codec(model: Model) -> Any:
    codec: Any = model.compression_model
    while not hasattr(codec, "decoder"):  # wrappers for stereo, for Hugging Face's model
        codec = codec.model
    return codec


# The window encoded at a time, and the context at each end whose codes are dropped. EnCodec's
# LSTM remembers everything before, but with half a second of context before and a tenth after,
# the codes were those of the whole recording encoded at once (`python -m benchmarks.tokens`).
WINDOW_SEC, MARGIN_SEC = 30, 2


def tokens_of(model: Model) -> Tokens:
    """Return a reader of the codec's tokens, cached from recordings or in files of tokens."""
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

    Raises: UserError if a recording can't be read.
    """

    def find(track: Track) -> np.ndarray:
        return encode_track(model, track, batch_size)

    tokens.cache.fill(tracks, find, rank=rank, processes=processes)


def encode_track(model: Model, track: Track, batch_size: int) -> np.ndarray:
    """Return a recording's codes `[K, T]`. Raises: ValueError if it can't be read."""
    return np.concatenate(list(_blocks(model, track, batch_size)), axis=1)


def _blocks(model: Model, track: Track, batch_size: int) -> Iterator[np.ndarray]:
    """Yield the codes `[K, T]` of a whole recording in blocks, so that memory is bounded.

    Example: 60 s are encoded as 0 to 30 s, of which 0 to 28 s are kept; 26 to 56 s (28 to 54 s);
    52 to 60 s (54 to 60 s). Whole seconds begin at a frame of both the tokens and the file.
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
            first = MARGIN_SEC * rate if begin else 0
            end = batch.shape[2] * rate // model.sample_rate  # whole frames
            if group != last:
                end -= MARGIN_SEC * rate
            yield codes[:, first:end]
