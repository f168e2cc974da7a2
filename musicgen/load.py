"""Load a MusicGen by short name, Hugging Face id or folder."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from audiocraft.models import MusicGen, builders
from audiocraft.models.encodec import CompressionModel, HFEncodecCompressionModel
from audiocraft.models.lm import LMModel
from omegaconf import OmegaConf
from torch import nn
from transformers import EncodecModel as HFEncodecModel
from transformers.utils import logging as transformers_logging

from errors import UserError
from musicgen.config import check_supported, text_name
from musicgen.device import codec_device
from musicgen.hub import (
    CODEC_NEEDS,
    HF_FILES,
    T5_NEEDS,
    WEIGHTS,
    damage_as_user_error,
    find_model,
    hub_folder,
    lacking,
    read_package,
)
from musicgen.lm import build_lm
from musicgen.text import text_conditioner


class Model(MusicGen):
    """MusicGen that also allows windows under 18 s, which audiocraft's constructor refuses."""

    def set_generation_params(self, **params: Any) -> None:  # type: ignore[override]
        super().set_generation_params(**{"extend_stride": 0.6 * self.max_duration, **params})


def load_model(
    model_id: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    layers_dtype: torch.dtype | None = None,
) -> Model:
    """Load a MusicGen by short name, Hugging Face id or folder; offline if it is on disk.

    A folder may hold its text encoder in `t5/`; otherwise that comes from the Hugging Face cache.
    `dtype` is the language model's number format; `layers_dtype` overrides it for the matrices of
    the transformer layers, nearly all of the weights.
    audiocraft's own `MusicGen.get_pretrained` reads the same files, but asks the hub first, does
    not let you choose the number format, and loads demucs with every melody model.
    Raises: UserError if it does not exist, can't be downloaded, or is of another family.
    """
    folder = find_model(model_id)
    with quiet(), damage_as_user_error(model_id):
        lm = _load_lm(folder, model_id, device, dtype, layers_dtype or dtype)
        return Model(model_id, _load_codec(folder, model_id, device), lm.eval())


def load_codec(model_id: str, device: torch.device) -> Model:
    """Load a MusicGen that only encodes: no text encoder, no language model.

    Raises: UserError, as `load_model` does.
    """
    folder = find_model(model_id)
    with quiet(), damage_as_user_error(model_id):
        cfg = OmegaConf.create(read_package(folder / WEIGHTS[0], model_id)["xp.cfg"])
        check_supported(cfg, model_id)
        lm: Any = nn.Linear(1, 1, device=device)  # a stand-in: MusicGen asks it for its device
        lm.cfg, lm.card, lm.num_codebooks = cfg, cfg.transformer_lm.card, cfg.transformer_lm.n_q
        return Model(model_id, _load_codec(folder, model_id, device), lm)


def _load_lm(
    folder: Path,
    model_id: str,
    device: torch.device,
    dtype: torch.dtype,
    layers_dtype: torch.dtype,
) -> LMModel:
    package = read_package(folder / WEIGHTS[0], model_id)
    cfg = OmegaConf.create(package["xp.cfg"])
    check_supported(cfg, model_id)
    cfg.device = str(device)
    cfg.dtype = str(layers_dtype).removeprefix("torch.")
    local = folder / "t5"
    if not local.is_dir():
        local = hub_folder(cfg.conditioners[text_name(cfg)].t5.name, HF_FILES, T5_NEEDS)
    elif lacks := lacking(local, T5_NEEDS):
        raise UserError(f"--model_id={model_id}: its text encoder t5/ has no {lacks}")
    lm = build_lm(cfg, local)
    conditioner = text_conditioner(lm)
    off = torch.autocast(device.type, enabled=False)
    conditioner.autocast = off  # type: ignore[assignment]
    conditioner.word_dropout = 0.0  # on in the published configs, but the dataset does it here
    conditioner.t5.float()  # in half precision, as some are stored, T5 can give NaN
    if layers_dtype != dtype:
        all_but_matrices_to(lm, dtype)
    lm.load_state_dict(package["best_state"])
    lm.cfg = cfg
    return lm


def all_but_matrices_to(lm: LMModel, dtype: torch.dtype) -> None:
    """Convert all weights but the layers' matrices to `dtype`: 4 % of small's."""
    matrices = {p for p in lm.transformer.layers.parameters() if p.ndim > 1}
    for parameter in set(lm.parameters()) - matrices:
        parameter.data = parameter.data.to(dtype)


def _load_codec(folder: Path, model_id: str, device: torch.device) -> CompressionModel:
    package = read_package(folder / WEIGHTS[1], model_id)
    device = codec_device(device)
    if "pretrained" in package:  # a name instead of weights, as for the stereo models
        local = folder / "encodec"
        if not local.is_dir():
            local = hub_folder(package["pretrained"], HF_FILES, CODEC_NEEDS)
        loaded: Any = HFEncodecModel.from_pretrained(local, output_loading_info=True)
        bare, found = loaded
        if lacks := found["missing_keys"]:  # transformers leaves random values there
            raise UserError(
                f"--model_id={model_id}: its codec has no {min(lacks)}: download it again"
            )
        bare.cfg_text = (local / "config.json").read_text()
        bare.float()  # some are stored in float16
        codec: CompressionModel = HFEncodecCompressionModel(bare).to(device)
    else:
        cfg = OmegaConf.create(package["xp.cfg"])
        cfg.device = str(device)
        codec = builders.get_compression_model(cfg)
        codec.load_state_dict(package["best_state"])
        codec.cfg_text = package["xp.cfg"]
    return codec.eval().requires_grad_(False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what users can do nothing about while a model loads.

    That is transformers' progress bars and advice, and torch's advice against its old weight_norm,
    with which EnCodec is built: the published weights have its names.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\S+weight_norm. is deprecated", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
