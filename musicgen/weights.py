"""The language model's weights, on disk and in a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from audiocraft.models.lm import LMModel

import files
from errors import UserError
from musicgen.hub import WEIGHTS, find_model, read_package

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def save_tensors(path: Path, content: Any) -> None:
    files.write(path, lambda file: torch.save(content, file))


def portable(state: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Return a state dict as plain tensors on the CPU, in a number format of --save_dtype."""
    return {
        name: tensor.detach().to("cpu", DTYPES[dtype] if tensor.is_floating_point() else None)
        for name, tensor in state.items()
    }


def load_weights(lm: LMModel, path: str) -> None:
    """Load an lm_*.pt into a model. Raises: UserError if it is damaged or of another model."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no class for "this is not my file"
        raise UserError(
            f"--weights_path={path} can't be read as weights ({type(error).__name__}); give the "
            "lm_final.pt or lm_<step>.pt that run.py wrote"
        ) from None
    try:
        lm.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"--weights_path={path} does not fit the model: give the --model_id that it was tuned "
            f"from ({' '.join(line.strip() for line in reason[:2])[:300]})"
        ) from None


def read_lm_state(model_id: str) -> dict[str, torch.Tensor]:
    """Read the language model's original weights from disk, onto the CPU. Raises: UserError."""
    folder = find_model(model_id)
    return read_package(folder / WEIGHTS[0], model_id)["best_state"]
