"""The state that a stopped run goes on from."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from errors import UserError
from recordings.track import Track
from training.output import RESUME

# What may differ when a run is resumed (batch_size and grad_acc: if their product is the same);
# every other flag shapes the training.
FREE_TO_CHANGE = {
    *("dataset_path", "batch_size", "grad_acc", "epochs", "max_steps", "output_dir", "resume"),
    *("lr", "precision", "max_grad_norm"),  # the cures of a loss that is not finite
    *("overwrite", "device", "grad_checkpointing", "num_workers", "valid_path", "valid_split"),
    *("dry_run", "valid_step", "sample_step", "sample_prompts", "sample_duration", "save_step"),
    *("keep_checkpoints", "save_dtype", "use_wandb", "wandb_project", "wandb_name"),
}


def load_resume(folder: Path) -> dict[str, Any]:
    path = folder / RESUME
    if not path.exists():
        raise UserError(
            f"--resume=1: there is no {path} to go on from; leave out --resume to start a run"
        )
    try:
        if any("torchao" in name for name in get_unsafe_globals_in_checkpoint(path)):
            import torchao.optim  # noqa: F401  (its moments may be loaded then)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError(
            f"{path} needs torchao, which can't be imported ({error}): pip install torchao"
        ) from None
    except Exception as error:  # torch.load has no class for "this is not my file"
        raise UserError(
            f"{path} can't be read ({type(error).__name__}): it is damaged; "
            "--overwrite=1 starts anew"
        ) from None


def fingerprint(tracks: Iterable["Track"]) -> str:
    """Of what a run trains on: names, lengths and captions, with the fields that some have."""
    facts = [
        (t.name, t.sample_rate, t.frames, t.caption)
        + ((t.written.description, *t.written.fields) if t.written and t.written.fields else ())
        for t in tracks
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
