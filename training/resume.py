"""The state that a stopped run resumes from: save, load and restore it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from errors import Finished, UserError
from flags.run import Config
from recordings.track import Track
from recordings.wording import DROP_P
from training.optimizer import moments_bytes, warmup_steps
from training.output import RESUME
from training.session import Session

# Flags that may differ when a run is resumed (batch_size and grad_acc with the same product);
# all others shape the training.
FREE_TO_CHANGE = {
    *("dataset_path", "batch_size", "grad_acc", "epochs", "max_steps", "output_dir", "resume"),
    *("lr", "precision", "max_grad_norm"),  # remedies for a loss that is not finite
    *("overwrite", "device", "grad_checkpointing", "num_workers", "valid_path", "valid_split"),
    *("dry_run", "valid_step", "sample_step", "sample_prompts", "sample_duration", "save_step"),
    *("keep_checkpoints", "save_dtype", "use_wandb", "wandb_project", "wandb_name"),
}

# What earlier versions could be told otherwise, and the values that are left.
LEFT: dict[str, list[Any]] = {
    "drop_desc_p": [DROP_P],
    "drop_other_p": [DROP_P],
    "lora_rslora": [False],
    "lr_scheduler": ["cosine", "constant"],
}


def resume_state(session: Session, *, is_finished: bool = False) -> dict[str, Any]:
    """Return what `--resume=1` needs. No random state: that follows from the step."""
    scaler = session.accelerator.scaler
    return {
        "step": session.step,
        "is_finished": is_finished,  # the final file is written
        "config": session.config.model_dump(),
        "clips_per_step": session.plan.clips_per_step,
        "is_even": session.plan.is_even,
        "warmup": session.warmup,
        "tracks": fingerprint(session.clips.tracks),
        "weights": {name: p.detach() for name, p in session.trained.items()},
        "optimizer": session.optimizer.state_dict(),
        "ema": session.ema.state_dict() if session.ema else None,
        "scaler": scaler.state_dict() if scaler else None,
        "wandb_id": session.report.wandb_id if session.report else None,
    }


def resume_bytes(config: Config, numbers: int, size: int) -> int:
    """Return the bytes of a resume state: of `numbers` trained numbers that take `size` bytes."""
    return size * (1 + bool(config.ema_decay)) + moments_bytes(config, numbers)


def copy_bytes(config: Config, numbers: int, size: int) -> int:
    """Return the bytes of the copy from which the resume state and a checkpoint are written."""
    return resume_bytes(config, numbers, size) + size


def load_resume(folder: Path) -> dict[str, Any]:
    """Map a run's resume state into memory: what is not used is not read, and nothing held twice.

    Raises: UserError if it can't be read.
    """
    path = folder / RESUME
    try:
        if any("torchao" in name for name in get_unsafe_globals_in_checkpoint(path)):
            import torchao.optim  # noqa: F401  (lets torch load its moments)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ImportError as error:
        raise UserError(
            f"{path} needs torchao, which can't be imported ({error}): pip install torchao"
        ) from None
    except Exception as error:  # torch.load has no class for "this is not my file"
        raise UserError(
            f"{path} can't be read ({type(error).__name__}): it is damaged; "
            "--overwrite=1 starts the run again"
        ) from None


def restore(session: Session, state: dict[str, Any]) -> None:
    """Restore a resume state. Raises: UserError if it belongs to a run with other flags."""
    _check_same_run(session, state)
    with torch.no_grad():
        for name, parameter in session.trained.items():
            parameter.copy_(state["weights"][name])
    session.optimizer.load_state_dict(state["optimizer"])
    _release(session.optimizer)
    if session.ema:
        session.ema.load_state_dict(state["ema"])
    if session.accelerator.scaler and state["scaler"]:
        session.accelerator.scaler.load_state_dict(state["scaler"])
    session.step = state["step"]
    old = Config.model_construct(**state["config"])
    began_as = replace(session.plan, epochs=old.epochs, max_steps=old.max_steps)
    # Earlier versions saved neither of these.
    session.plan = replace(session.plan, is_even=state.get("is_even", False))
    session.warmup = state.get("warmup", warmup_steps(old, began_as.total_steps))
    session.wandb_id = state["wandb_id"]
    session.resumed = _describe(session, state)


def _release(optimizer: torch.optim.Optimizer) -> None:
    """Copy what is on the CPU, where it is still in the file, so that the file can go."""
    for values in (*optimizer.param_groups, *optimizer.state.values()):
        for name, value in values.items():
            if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
                continue
            if is_traceable_wrapper_subclass(value):  # torchao's moments can't be cloned as such
                for part in value.__tensor_flatten__()[0]:
                    setattr(value, part, getattr(value, part).clone())
            else:
                values[name] = value.clone()


def _check_same_run(session: Session, state: dict[str, Any]) -> None:
    gone = [
        f"--{name}={value}"
        for name, value in state["config"].items()
        if name in LEFT and value not in LEFT[name]
    ]
    if gone:
        raise UserError(
            f"--resume=1: the run in {session.output} was started by an earlier version with "
            f"{', '.join(gone)}, which this version no longer has. Finish it with that version, "
            "or start anew with another --output_dir or --overwrite=1"
        )
    config, old = session.config, Config.model_construct(**state["config"])
    changes = [
        f"--{name}={getattr(config, name)}, was {getattr(old, name)}"
        for name in Config.model_fields
        if name not in FREE_TO_CHANGE and getattr(config, name) != getattr(old, name)
    ]
    if state["clips_per_step"] != session.plan.clips_per_step:
        changes.append(
            f"{session.plan.clips_per_step} clips in a step (batch_size x grad_acc x processes), "
            f"were {state['clips_per_step']}"
        )
    if changes:
        raise UserError(
            "--resume=1 continues the run in "
            f"{session.output}, but this has changed: {'; '.join(changes)}.\nChange it back, or "
            "start a new run with another --output_dir or --overwrite=1"
        )
    total = session.total
    if state["step"] > total or (state["step"] == total and state["is_finished"]):
        finished = (
            f"the run in {session.output} is finished already ({state['step']} of {total} steps): "
            "raise --epochs or --max_steps to train on"
        )
        raise Finished(finished) if config.resume == "auto" else UserError(finished)


def _describe(session: Session, state: dict[str, Any]) -> str:
    """Say where a run resumes, and what has changed."""
    old, new = state["config"], session.config.model_dump()
    changed = [
        f"--{name} is {new[name]}, was {old[name]}"
        for name in ("lr", "precision", "max_grad_norm", "epochs", "max_steps")
        if new[name] != old[name]
    ]
    if state["tracks"] != fingerprint(session.clips.tracks):
        changed.append("the dataset has changed since")
    return "; ".join([f"after step {session.step}", *changed])


def fingerprint(tracks: Iterable[Track]) -> str:
    """Return a hash of the training data: names, lengths, captions and their fields."""
    facts = [
        (t.name, t.sample_rate, t.frames, t.caption)
        + ((t.written.description, *t.written.fields) if t.written and t.written.fields else ())
        for t in tracks
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
