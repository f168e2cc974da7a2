"""The files that a run writes to its folder."""

import re
import shutil
from pathlib import Path
from typing import Literal

import files
from errors import Finished, UserError

FINAL = "lm_final.pt"
LORA = "lora_final"
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")  # peft's names
EMBEDDING = "learned_embeds.safetensors"  # diffusers' name
RESUME = "resume.pt"
RUN = "run.json"
METRICS = "metrics.jsonl"
PICTURE = "training.png"
SAMPLES = "samples"
GIB = 1024**3


def checkpoint_path(final: Path, step: int) -> Path:
    """Return the path of a checkpoint.

    Example: lm_final.pt -> lm_20.pt; learned_embeds.safetensors -> learned_embeds_20.safetensors
    """
    return final.with_stem(f"{final.stem.removesuffix('_final')}_{step}")


def checkpoints(folder: Path) -> list[Path]:
    """List a folder's lm_<step>.pt and learned_embeds_<step>.safetensors, oldest first."""
    names = re.compile(r"lm_(\d+)\.pt|learned_embeds_(\d+)\.safetensors")
    found = [(names.fullmatch(path.name), path) for path in folder.glob("*_*.*")]
    return [path for _, path in sorted((int(m[1] or m[2]), path) for m, path in found if m)]


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; 0 keeps all."""
    if keep:
        for path in checkpoints(folder)[:-keep]:
            path.unlink()


def check_output(folder: Path, *, resume: bool | Literal["auto"], overwrite: bool) -> bool:
    """Return whether the run in the folder is to be resumed. Removes nothing.

    Raises: UserError if an earlier run's weights are in the way, or none are there to resume;
    Finished with "auto", if a run that keeps no resume state has finished.
    """
    if (folder / LORA).is_file():
        raise UserError(
            f"{folder / LORA}: is a file; move it away, a folder of that name is needed"
        )
    made = weights(folder)
    has_state = (folder / RESUME) in made
    final = [path for path in (folder / FINAL, folder / EMBEDDING) if path in made]
    if resume == "auto" and final and not has_state:
        raise Finished(
            f"the run in {folder} is finished already ({final[0].name}): to train anew, give "
            "another --output_dir, or --overwrite=1 instead of --resume"
        )
    resumes = has_state if resume == "auto" else resume
    if made and not resumes and not overwrite:
        go_on = ", --resume=1 to continue it" if has_state else ""
        names = ", ".join(path.relative_to(folder).as_posix() for path in made[:5])
        raise UserError(
            f"--output_dir={folder} holds an earlier run ({names}): give another --output_dir"
            f"{go_on}, or --overwrite=1 to replace it"
        )
    if resumes and not has_state:
        remedy = "; leave out --resume to start a run"
        if final:
            remedy = ", as the run there has finished; give another --output_dir, or --overwrite=1"
        raise UserError(f"--resume=1: there is no {folder / RESUME} to resume from{remedy}")
    return resumes


def weights(folder: Path) -> list[Path]:
    """List a run's files that took time to make."""
    final = [folder / name for name in (FINAL, EMBEDDING, RESUME)]
    final += [folder / LORA / name for name in LORA_FILES]
    return checkpoints(folder) + [path for path in final if path.exists()]


def clear_weights(folder: Path) -> None:
    for path in weights(folder):
        path.unlink()


def clear_samples(folder: Path) -> None:
    for path in (folder / SAMPLES).glob("step_*.wav"):
        if re.fullmatch(r"step_\d{6}_\d+\.wav", path.name):
            path.unlink()


def remove_temporaries(folder: Path) -> None:
    """Remove the half-written files of a run that was stopped or killed."""
    for path in (folder / SAMPLES).glob("step_*.part.wav"):
        if re.fullmatch(r"step_\d{6}_\d+\.part\.wav", path.name):
            path.unlink()
    weights = r"lm_\w+\.pt|learned_embeds\w*\.safetensors|resume\.pt"
    left = {
        folder: rf"{weights}|run\.json|metrics\.jsonl|training\.png",
        folder / SAMPLES: r"step_\d{6}_\d+\.wav",
        folder / LORA: "|".join(map(re.escape, LORA_FILES)),
    }
    for place, names in left.items():
        for path in files.temporaries(place, names):
            path.unlink()


def check_space(folder: Path, needed: int, *, replacing: bool) -> None:
    """Raise UserError if the disk lacks `needed` bytes; replaced files count as free."""
    free = shutil.disk_usage(folder).free
    if replacing:
        free += sum(path.stat().st_size for path in weights(folder))
    if free < needed:
        raise UserError(
            f"--output_dir={folder}: this run's checkpoints need {needed / GIB:.1f} GiB, but "
            f"{free / GIB:.1f} GiB are free; make room, or use --save_dtype=fp16, a small "
            "--keep_checkpoints, or another --output_dir"
        )
