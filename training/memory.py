"""Estimate the device memory that a run needs, by part, before anything is loaded or trained.

A training step runs on fake tensors, which have shapes and formats but no values, and the memory
that they would take is counted. That needs no GPU, no weights and a few seconds.

Letters: B batch, K codebooks, S pattern steps, T token frames.
"""

import functools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import T5EncoderModel

from flags.run import Config
from musicgen.codec import WINDOW_SEC
from musicgen.loss import TokenLoss
from musicgen.skeleton import build_encoder, build_skeleton, frame_rate, make_fake
from training.optimizer import moments_bytes
from training.tuning import tuning_of

Configs = tuple[Any, Any, Any]  # configs of language model, codec and text encoder
CPU = torch.device("cpu")
CAPTION_TOKENS = 32
FEW_LAYERS = (2, 3)  # measured; each further layer adds the same


@dataclass(frozen=True)
class Need:
    """The bytes that a run needs on the device, and its parameters."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int  # of the language model, at their peak
    encoders: int  # T5 and EnCodec
    encoding: int  # EnCodec's activations, freed before the language model runs
    beforehand: int  # EnCodec with --cache_tokens, freed before the first step
    keeps_gradients: bool  # they are there while activations build up

    @property
    def language_model_peak(self) -> int:
        """Bytes at the peak, without text encoder and codec."""
        grown = self.activations + self.gradients
        if not self.keeps_gradients:  # gradients replace activations
            grown = max(self.activations, self.gradients)
        return self.weights + self.optimizer + grown

    @property
    def peak(self) -> int:
        """Bytes at the peak of the whole run."""
        gradients = self.gradients if self.keeps_gradients else 0
        while_encoding = self.weights + self.optimizer + gradients + self.encoding
        before = self.weights + self.beforehand
        return self.encoders + max(self.language_model_peak, while_encoding, before)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that were made inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Leave out tensors from outside, and views of them."""
        for tensor in tensors:
            self._seen[id(tensor.untyped_storage())] = weakref.ref(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        known = self._seen.get(id(storage))
        if known is not None and known() is storage:
            return
        size = storage.nbytes()
        self._seen[id(storage)] = weakref.ref(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def estimate(
    config: Config,
    model: Configs,
    frames: int,
    dtype: torch.dtype,
    *,
    encodes: bool = True,
    processes: int = 1,
) -> Need:
    """Estimate what training needs with these flags; `model` is the result of `configs`.

    `frames` is T, `dtype` the number format of the forward pass; `encodes` is False for files of
    tokens. With several `processes`, it is what each of them needs.
    """
    lm_cfg, codec_cfg, t5_cfg = model
    few, more = (_measure(config, model, layers, frames, dtype) for layers in FEW_LAYERS)
    others = lm_cfg.transformer_lm.num_layers - FEW_LAYERS[0]
    lm = _Measured(*(one + others * (other - one) for one, other in zip(few, more, strict=True)))
    if config.cache_tokens:
        frames = round(WINDOW_SEC * frame_rate(codec_cfg))
    codec, encoding = _codec(OmegaConf.to_yaml(codec_cfg), config.batch_size, frames)
    beforehand = 0
    if config.cache_tokens:
        codec, encoding, beforehand = 0, 0, codec + encoding
    if not encodes:
        codec, encoding, beforehand = 0, 0, 0
    with torch.device("meta"):
        text_encoder = bytes_of(T5EncoderModel(t5_cfg).parameters())
    return Need(
        parameters=lm.parameters,
        trained=lm.trained,
        weights=lm.weights + (4 * lm.trained if config.ema_decay else 0),
        gradients=lm.gradients,
        optimizer=moments_bytes(config, lm.trained),
        activations=max(lm.forward, lm.backward),
        encoders=text_encoder + codec,
        encoding=encoding,
        beforehand=beforehand,
        # An earlier batch's; or DistributedDataParallel's buckets, which are the gradients and are
        # there all the time. It keeps nothing else that grows with the model.
        keeps_gradients=config.grad_acc > 1 or processes > 1,
    )


class _Measured(NamedTuple):
    """Numbers for one language model, in bytes from `weights` on."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    forward: int  # activations at their peak up to the loss
    backward: int  # and after it, which may be more if layers are recomputed


def language_model(config: Config, model: Configs, layers: int, dtype: torch.dtype) -> Any:
    """Build a language model on the meta device, set up for training."""
    cfg, _, t5_cfg = model
    tuning = tuning_of(config)
    lm = build_skeleton(cfg, t5_cfg, layers, tuning.layers_dtype(dtype))
    with torch.device("meta"):
        tuning.prepare(lm)
    return lm.train()


def _measure(
    config: Config, model: Configs, layers: int, frames: int, dtype: torch.dtype
) -> _Measured:
    lm = language_model(config, model, layers, dtype)
    B, width = config.batch_size, model[2].d_model
    trained = gradients = 0
    with FakeTensorMode():
        make_fake(lm, CPU)
        for parameter in lm.parameters():
            if parameter.requires_grad:
                trained += parameter.numel()
                gradients += parameter.nbytes
                parameter.grad = torch.empty_like(parameter)
        sequence = torch.empty(B, lm.num_codebooks, frames + 1, dtype=torch.long)
        text, mask = torch.empty(B, CAPTION_TOKENS, width), torch.empty(B, CAPTION_TOKENS)
        if config.placeholder:  # its gradient comes through the text
            text.requires_grad = True
            trained += width
            gradients += 4 * width
        live = _LiveBytes()
        live.ignore(*lm.parameters(), *(p.grad for p in lm.parameters() if p.grad is not None))
        with live:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = TokenLoss(lm).of_sequence(sequence, text, mask).sum()
            forward, live.peak = live.peak, live.now
            loss.backward()
    parameters = list(lm.parameters())
    count = sum(p.numel() for p in parameters)
    return _Measured(count, trained, bytes_of(parameters), gradients, forward, live.peak)


@functools.lru_cache
@torch.no_grad()
def _codec(cfg: str, batch_size: int, frames: int) -> tuple[int, int]:
    """Return the bytes of EnCodec's encoder, and those that encoding a batch needs.

    A stereo clip's channels are encoded one after the other.
    """
    encoder, channels, hop = build_encoder(OmegaConf.create(cfg))
    weights = bytes_of(encoder.parameters())
    with FakeTensorMode():
        make_fake(encoder, CPU)
        wav = torch.empty(batch_size, channels, frames * hop)
        live = _LiveBytes()
        live.ignore(*encoder.parameters())
        with live:
            encoder(wav)
    return weights, live.peak


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
