"""What a run needs of the device's memory, by part, before anything is loaded or trained.

The training step runs on fake tensors, which have shapes and formats but no values, while what they
would take is counted. That needs no GPU, no weights and a few seconds.

Letters: B batch, K codebooks, S pattern steps, T token frames.
"""

import functools
import math
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import musicgen
import tokens
from config import Config
from musicgen import MelodyConditioner, TokenLoss, all_but_matrices_to
from session import (
    check_melody,
    crop_frames,
    layers_dtype,
    make_plan,
    moments_bytes,
    scan,
    set_up_training,
)

# isort: split
from audiocraft.models import builders
from audiocraft.models.lm import LMModel
from audiocraft.modules.conditioners import BaseConditioner, ConditioningProvider, T5Conditioner
from omegaconf import OmegaConf
from transformers import T5EncoderModel

Model = tuple[Any, Any, Any]  # configs of language model, codec and text encoder
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


class _Text(T5Conditioner):
    """The part of a text conditioner that is trained; T5 itself runs before."""

    def __init__(self, width: int, output_dim: int) -> None:
        BaseConditioner.__init__(self, width, output_dim)


class _Melody(MelodyConditioner):
    """The part of a melody conditioner that is trained."""

    def __init__(self, cfg: Any, window_sec: float, output_dim: int) -> None:
        BaseConditioner.__init__(self, cfg.n_chroma, output_dim)
        self.chroma_len = 1 + int(window_sec * cfg.sample_rate) // (2**cfg.radix2_exp // 4)

    def none(self) -> torch.Tensor:
        return torch.empty(self.chroma_len, self.dim)


def dry_run(config: Config) -> str:
    """What --dry_run=1 says: the model, the steps, the memory by part, and what would lower it.

    Errors: UserError, as for a real run.
    """
    model = musicgen.configs(config.model_id)
    tracks, _ = scan(config)
    check_melody(config, "self_wav" in model[0].conditioners, tracks)
    encodes = not tracks[0].codec
    plan = make_plan(config, len(tracks), processes=int(os.environ.get("WORLD_SIZE", 1)))
    codec_cfg = model[1]
    rate = frame_rate(codec_cfg)
    frames = crop_frames(config, model[0].dataset.segment_duration, rate, tracks)
    dtype, why = torch.bfloat16, "as on a GPU that has it"
    if config.precision != "auto":
        dtype, why = checkpoint.DTYPES[config.precision], "as asked for"
    need = estimate(config, model, frames, dtype, encodes=encodes)
    parts = ["weights", "gradients", "optimizer", "activations", "encoders", "encoding"]
    when = "encoding comes before the activations"
    if not encodes:
        parts.remove("encoding")
        when = "nothing is encoded"
    elif config.cache_tokens:
        parts.remove("encoding")
        before = need.weights + need.encoders + need.beforehand
        when = f"{_gb(before)} while recordings are encoded"
    memory = ", ".join(f"{name} {_gb(getattr(need, name))}" for name in parts)
    trained = f"{need.trained}" if config.placeholder else f"{need.trained / 1e6:.1f} M"
    rows = [
        f"model      {config.model_id}, {need.parameters / 1e6:.1f} M parameters, "
        f"{trained} trained",
        f"steps      {plan.total_steps}: {plan.steps_per_epoch} an epoch, of "
        f"{plan.clips_per_step} clips of {frames / rate:g} s",
        f"precision  {str(dtype).removeprefix('torch.')} ({why})",
        f"memory     {memory}",
        f"           at the peak {_gb(need.peak)} ({when}), and what CUDA itself takes",
    ]
    if torch.cuda.is_available():
        rows.append(f"           this GPU has {_gb(torch.cuda.mem_get_info()[1])}")
    rows.append("to need less, in the order of least harm, each with those above it:")
    for flags, changed in _thriftier(config):
        lower = estimate(changed, model, frames, dtype, encodes=encodes)
        rows.append(f"  {_gb(lower.peak):>8}  with {flags}")
    return "\n".join(rows)


def frame_rate(codec_cfg: Any) -> float:
    """Token frames a second."""
    return codec_cfg.sample_rate / math.prod(codec_cfg.seanet.ratios)


def _thriftier(config: Config) -> Iterator[tuple[str, Config]]:
    """Flags that lower the peak, and the config with them and all those before."""
    if not config.grad_checkpointing:
        config = config.model_copy(update={"grad_checkpointing": True})
        yield "--grad_checkpointing=1", config
    if config.batch_size > 1:
        grad_acc = config.batch_size * config.grad_acc
        config = config.model_copy(update={"batch_size": 1, "grad_acc": grad_acc})
        yield f"--batch_size=1 --grad_acc={grad_acc}", config
    if config.optimizer == "adamw" and not config.placeholder:
        config = config.model_copy(update={"optimizer": "adamw_8bit"})
        yield "--optimizer=adamw_8bit", config
    if not (config.lora_rank or config.tune_text or config.placeholder):
        takes_bf16 = config.precision in ("auto", "bf16") and not config.ema_decay
        if config.optimizer == "adamw_8bit" and takes_bf16:
            config = config.model_copy(update={"optimizer": "adamw_8bit_bf16"})
            yield "--optimizer=adamw_8bit_bf16", config
        flags = "--lora_rank=16 --lr=1e-4"
        if config.optimizer == "adamw_8bit_bf16":
            flags += " --optimizer=adamw_8bit"
        config = config.model_copy(update={"lora_rank": 16, "optimizer": "adamw_8bit"})
        yield flags, config


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def estimate(
    config: Config, model: Model, frames: int, dtype: torch.dtype, *, encodes: bool = True
) -> Need:
    """What training takes with these flags; `model` is what `musicgen.configs` gives.

    `frames` is T, `dtype` the number format that the forward pass runs in; files of tokens are not
    encoded.
    """
    lm_cfg, codec_cfg, t5_cfg = model
    few, more = (_measure(config, model, layers, frames, dtype) for layers in FEW_LAYERS)
    others = lm_cfg.transformer_lm.num_layers - FEW_LAYERS[0]
    lm = _Measured(*(one + others * (other - one) for one, other in zip(few, more, strict=True)))
    if config.cache_tokens:
        frames = round(tokens.WINDOW_SEC * frame_rate(codec_cfg))
    codec, encoding = _codec(OmegaConf.to_yaml(codec_cfg), config.batch_size, frames)
    beforehand = 0
    if config.cache_tokens:
        codec, encoding, beforehand = 0, 0, codec + encoding
    if not encodes:
        codec, encoding, beforehand = 0, 0, 0
    with torch.device("meta"):
        text_encoder = _bytes(T5EncoderModel(t5_cfg).parameters())
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


def _measure(
    config: Config, model: Model, layers: int, frames: int, dtype: torch.dtype
) -> _Measured:
    lm = build_lm(config, model, layers, dtype)
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
    return _Measured(count, trained, _bytes(parameters), gradients, forward, live.peak)


def build_lm(config: Config, model: Model, layers: int, dtype: torch.dtype) -> LMModel:
    """A language model of so many layers on the meta device, set up as for training."""
    cfg, _, t5_cfg = model
    sizes = builders.dict_from_config(cfg.transformer_lm) | {"num_layers": layers}
    sizes.pop("q_modeling", None)  # an older name for the pattern
    window_sec = cfg.dataset.segment_duration
    with torch.device("meta"):
        conditioners: dict[str, BaseConditioner] = {
            name: _Text(t5_cfg.d_model, sizes["dim"])
            if conditioner.model == "t5"
            else _Melody(conditioner.chroma_stem, window_sec, sizes["dim"])
            for name, conditioner in cfg.conditioners.items()
            if name != "args"
        }
        lm = LMModel(
            builders.get_codebooks_pattern_provider(sizes["n_q"], cfg.codebooks_pattern),
            ConditioningProvider(conditioners),
            builders.get_condition_fuser(cfg),
            **{**sizes, "cross_attention": bool(cfg.fuser.cross), "device": "meta"},
            dtype=layers_dtype(config, dtype),
        )
        all_but_matrices_to(lm, torch.float32)
        set_up_training(config, lm)
    return lm.train()


@functools.lru_cache
@torch.no_grad()
def _codec(cfg: str, batch_size: int, frames: int) -> tuple[int, int]:
    """Bytes of EnCodec's encoder, and those that a batch takes on its way through it.

    Of stereo clips the channels are encoded one after the other.
    """
    here: Any = OmegaConf.merge(OmegaConf.create(cfg), {"device": "meta"})
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        codec = builders.get_compression_model(here)
    encoder: Any = codec.encoder
    weights = _bytes(encoder.parameters())
    samples = frames * round(codec.sample_rate / codec.frame_rate)
    with FakeTensorMode():
        make_fake(encoder, CPU)
        wav = torch.empty(batch_size, codec.channels, samples)
        live = _Live()
        live.ignore(*encoder.parameters())
        with live:
            encoder(wav)
    return weights, live.peak


def make_fake(module: nn.Module, device: torch.device) -> None:
    """In a FakeTensorMode: replace parameters and buffers by fake ones on a device.

    `Module.to` can't do that.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                part._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
