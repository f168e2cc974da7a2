"""What a run needs of the device's memory, by part, before anything is loaded or trained.

The training step runs on fake tensors, which have shapes and formats but no values, while what they
would take is counted. That needs no GPU, no weights and a few seconds.

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
from musicgen.skeleton import build_encoder, build_lm, frame_rate, make_fake
from training.optimizer import moments_bytes
from training.tuning import tuning_of

Configs = tuple[Any, Any, Any]  # configs of language model, codec and text encoder
CPU = torch.device("cpu")
CAPTION_TOKENS = 32
FEW_LAYERS = (2, 3)  # measured; from there on each layer adds the same


@dataclass(frozen=True)
class Need:
    """Bytes on the device, and how many parameters there are."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int  # of the language model: what the backward pass needs, at its peak
    encoders: int  # T5 and EnCodec
    encoding: int  # EnCodec's activations, gone before the language model's turn
    beforehand: int  # EnCodec and its activations with --cache_tokens, gone before the first step
    accumulates: bool  # gradients are there from an earlier batch while activations pile up

    @property
    def language_model_peak(self) -> int:
        """Without what text encoder and codec take."""
        grown = self.activations + self.gradients
        if not self.accumulates:  # gradients come as activations go
            grown = max(self.activations, self.gradients)
        return self.weights + self.optimizer + grown

    @property
    def peak(self) -> int:
        gradients = self.gradients if self.accumulates else 0
        while_encoding = self.weights + self.optimizer + gradients + self.encoding
        before = self.weights + self.beforehand
        return self.encoders + max(self.language_model_peak, while_encoding, before)


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are still alive, and their peak."""

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
        """Tensors from outside, so that views of them are not counted."""
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
    config: Config, model: Configs, frames: int, dtype: torch.dtype, *, encodes: bool = True
) -> Need:
    """What training takes with these flags; `model` is what `configs` gives.

    `frames` is T, `dtype` the number format that the forward pass runs in; files of tokens are not
    encoded.
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
        accumulates=config.grad_acc > 1,
    )


class _Measured(NamedTuple):
    """Of one language model, in bytes from `weights` on."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    forward: int  # the peak until the loss is there, beside gradients and optimizer state
    backward: int  # and from there on: with recomputed layers that may be the higher one


def language_model(config: Config, model: Configs, layers: int, dtype: torch.dtype) -> Any:
    """A language model of so many layers on the meta device, set up as for training."""
    cfg, _, t5_cfg = model
    tuning = tuning_of(config)
    lm = build_lm(cfg, t5_cfg, layers, tuning.layers_dtype(dtype))
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
        if config.placeholder:  # the way to it is through the text
            text.requires_grad = True
            trained += width
            gradients += 4 * width
        live = _Live()
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
    """Bytes of EnCodec's encoder, and those that a batch takes on its way through it.

    Of stereo clips the channels are encoded one after the other.
    """
    encoder, channels, hop = build_encoder(OmegaConf.create(cfg))
    weights = bytes_of(encoder.parameters())
    with FakeTensorMode():
        make_fake(encoder, CPU)
        wav = torch.empty(batch_size, channels, frames * hop)
        live = _Live()
        live.ignore(*encoder.parameters())
        with live:
            encoder(wav)
    return weights, live.peak


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
