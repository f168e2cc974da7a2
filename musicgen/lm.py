"""Build audiocraft's language model with any T5, our attention and our melody conditioner."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from audiocraft.models import builders
from audiocraft.models.lm import LMModel
from audiocraft.modules.conditioners import T5Conditioner
from omegaconf import DictConfig, OmegaConf

from musicgen import attention
from musicgen.config import text_name
from musicgen.melody import MelodyConditioner


def build_lm(cfg: DictConfig, t5: Path) -> LMModel:
    """Build the language model of a config, with the text encoder in the folder `t5`."""
    # autocast_dtype: audiocraft's autocast takes no device like cuda:0.
    here = {"t5": {"name": str(t5), "autocast_dtype": None}}
    merged: Any = OmegaConf.merge(cfg, {"conditioners": {text_name(cfg): here}})
    merged.conditioners.pop("args", None)  # of audiocraft's own training; its builder fails on null
    with _builders_accepting(t5):
        lm = builders.get_lm_model(merged)
    attention.put_into(lm)
    return lm


@contextlib.contextmanager
def _builders_accepting(t5: Path) -> Iterator[None]:
    """Make audiocraft's builders accept any T5 and use our melody conditioner."""
    name, theirs = str(t5), builders.ChromaStemConditioner
    lists: Any = T5Conditioner
    lists.MODELS.append(name)
    lists.MODELS_DIMS[name] = json.loads((t5 / "config.json").read_text())["d_model"]
    builders.ChromaStemConditioner = MelodyConditioner  # type: ignore
    try:
        yield
    finally:
        builders.ChromaStemConditioner = theirs  # type: ignore
        lists.MODELS.remove(name)
        del lists.MODELS_DIMS[name]
