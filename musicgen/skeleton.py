"""A MusicGen of fake tensors, which have shapes and formats but no values."""

import math
from typing import Any

import torch
from audiocraft.models import builders
from audiocraft.models.lm import LMModel
from audiocraft.modules.conditioners import BaseConditioner, ConditioningProvider, T5Conditioner
from omegaconf import OmegaConf
from torch import nn

from musicgen import attention
from musicgen.config import conditioner_configs
from musicgen.load import all_but_matrices_to, quiet
from musicgen.melody import MelodyConditioner


class _Text(T5Conditioner):
    """The trained part of a text conditioner; T5 itself runs before."""

    def __init__(self, width: int, output_dim: int) -> None:
        BaseConditioner.__init__(self, width, output_dim)


class _Melody(MelodyConditioner):
    """The trained part of a melody conditioner."""

    def __init__(self, cfg: Any, window_sec: float, output_dim: int) -> None:
        BaseConditioner.__init__(self, cfg.n_chroma, output_dim)
        self.chroma_len = 1 + int(window_sec * cfg.sample_rate) // (2**cfg.radix2_exp // 4)

    def none(self) -> torch.Tensor:
        return torch.empty(self.chroma_len, self.dim)


def build_skeleton(cfg: Any, t5_cfg: Any, layers: int, layers_dtype: torch.dtype) -> LMModel:
    """Build a language model with `layers` layers on the meta device, like that of `load_model`."""
    sizes = builders.dict_from_config(cfg.transformer_lm) | {"num_layers": layers}
    sizes.pop("q_modeling", None)  # an older name for the pattern
    window_sec = cfg.dataset.segment_duration
    with torch.device("meta"):
        conditioners: dict[str, BaseConditioner] = {
            name: _Text(t5_cfg.d_model, sizes["dim"])
            if conditioner.model == "t5"
            else _Melody(conditioner.chroma_stem, window_sec, sizes["dim"])
            for name, conditioner in conditioner_configs(cfg).items()
        }
        lm = LMModel(
            builders.get_codebooks_pattern_provider(sizes["n_q"], cfg.codebooks_pattern),
            ConditioningProvider(conditioners),
            builders.get_condition_fuser(cfg),
            **{**sizes, "cross_attention": bool(cfg.fuser.cross), "device": "meta"},
            dtype=layers_dtype,
        )
        attention.put_into(lm)
        all_but_matrices_to(lm, torch.float32)
    return lm


def build_encoder(codec_cfg: Any) -> tuple[Any, int, int]:
    """Build EnCodec's encoder on the meta device -> it, its channels, samples in a token frame."""
    here: Any = OmegaConf.merge(codec_cfg, {"device": "meta"})
    with torch.device("meta"), quiet():
        codec: Any = builders.get_compression_model(here)
    return codec.encoder, codec.channels, round(codec.sample_rate / codec.frame_rate)


def make_fake(module: nn.Module, device: torch.device) -> None:
    """Replace parameters and buffers by fake ones on a device; `Module.to` can't.

    Call it inside a FakeTensorMode.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                part._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def frame_rate(codec_cfg: Any) -> float:
    """Return the token frames a second."""
    return codec_cfg.sample_rate / math.prod(codec_cfg.seanet.ratios)
