"""The files that a run writes to its folder."""

import re
import shutil
from pathlib import Path

import files
from errors import UserError

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


def check_output(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise UserError if an earlier run's weights are in the way, or none are there to resume.

    Removes nothing.
    """
    files.check_writable(folder, "--output_dir")
    if (folder / LORA).is_file():
        raise UserError(
            f"{folder / LORA}: is a file; move it away, a folder of that name is needed"
        )
    made = weights(folder)
    if made and not resume and not overwrite:
        go_on = ", --resume=1 to continue it" if (folder / RESUME) in made else ""
        names = ", ".join(path.relative_to(folder).as_posix() for path in made[:5])
        raise UserError(
            f"--output_dir={folder} holds an earlier run ({names}): give another --output_dir"
            f"{go_on}, or --overwrite=1 to replace it"
        )
    if resume and not (folder / RESUME).exists():
        remedy = "; leave out --resume to start a run"
        if any((folder / name).exists() for name in (FINAL, EMBEDDING)):
            remedy = ", as the run there has finished; give another --output_dir, or --overwrite=1"
        raise UserError(f"--resume=1: there is no {folder / RESUME} to resume from{remedy}")


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
    """Remove the half-written files of a run that was killed."""
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
