"""What a run leaves on disk: lm_*.pt, resume.pt; written under a temporary name, then renamed."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from flags import UserError

if TYPE_CHECKING:  # it imports this file
    from dataset import Track

FINAL = "lm_final.pt"
LORA = "lora_final"
EMBEDDING = "learned_embeds.safetensors"  # diffusers' name
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")  # peft's names
RESUME = "resume.pt"
RUN = "run.json"
METRICS = "metrics.jsonl"
PICTURE = "training.png"
SAMPLES = "samples"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = 1024**3


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let `fill` write a file under a temporary name; rename it when it is whole and on disk.

    Several processes may write the same file.
    Errors: UserError when the disk is full; what had that name before is still there then.
    """
    end = path.name.encode()[-200:].decode(errors="ignore")  # with more the name gets too long
    temporary = path.with_name(f".{end}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # else: how torch.save says that the disk is full
        raise UserError(f"{path} could not be written ({error}); what was there is kept") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save(path: Path, content: Any) -> None:
    write(path, lambda file: torch.save(content, file))


def write_bytes(path: Path, content: bytes) -> None:
    write(path, lambda file: file.write(content))


def portable(state: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """A state dict as plain tensors on the CPU, in a number format of --save_dtype."""
    return {
        name: tensor.detach().to("cpu", DTYPES[dtype] if tensor.is_floating_point() else None)
        for name, tensor in state.items()
    }


def checkpoint_path(final: Path, step: int) -> Path:
    """Example: lm_final.pt -> lm_20.pt, learned_embeds.safetensors -> learned_embeds_20..."""
    return final.with_stem(f"{final.stem.removesuffix('_final')}_{step}")


def checkpoints(folder: Path) -> list[Path]:
    """The lm_<step>.pt and learned_embeds_<step>.safetensors of a folder, oldest first."""
    names = re.compile(r"lm_(\d+)\.pt|learned_embeds_(\d+)\.safetensors")
    found = [(names.fullmatch(path.name), path) for path in folder.glob("*_*.*")]
    return [path for _, path in sorted((int(m[1] or m[2]), path) for m, path in found if m)]


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; 0 keeps all."""
    if keep:
        for path in checkpoints(folder)[:-keep]:
            path.unlink()


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


def check_output(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to start over an earlier run's weights. Removes nothing."""
    check_writable(folder, "--output_dir")
    if (folder / LORA).is_file():
        raise UserError(f"{folder / LORA}: is a file; move it away, a folder goes there")
    made = weights(folder)
    if made and not resume and not overwrite:
        go_on = ", --resume=1 to go on with it" if (folder / RESUME) in made else ""
        names = ", ".join(path.relative_to(folder).as_posix() for path in made[:5])
        raise UserError(
            f"--output_dir={folder} holds an earlier run ({names}): give another --output_dir"
            f"{go_on}, or --overwrite=1 to replace it"
        )


def check_writable(folder: Path, flag: str) -> None:
    """Make a folder if it is missing. Errors: UserError if it can't be made or written to."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag}={folder}: is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag}={folder}: can't be written to ({error.strerror})") from None


def check_outside(out: Path, folder: str) -> None:
    """Errors: UserError if --out is in the folder that is read."""
    root = Path(folder).resolve()
    if root in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out={out}: is in the folder that is read; name one outside")


def temporaries(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """What a killed run has left half written, in folders within too."""
    names = re.compile(rf"\..+\.({'|'.join(suffixes)})\.\d+\.tmp")
    return [path for path in folder.rglob(".*.tmp") if names.fullmatch(path.name)]


def weights(folder: Path) -> list[Path]:
    """The files of a run that took time to make."""
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


def remove_temporary(folder: Path) -> None:
    """What a killed run may have left half written."""
    weights = r"lm_\w+\.pt|learned_embeds\w*\.safetensors|resume\.pt"
    names = re.compile(rf"\.({weights}|run\.json|metrics\.jsonl|training\.png)(\.\d+)?\.tmp")
    for path in folder.glob(".*.tmp"):
        if names.fullmatch(path.name):
            path.unlink()
    left = ((SAMPLES, ".step_*.wav*.tmp"), (LORA, ".adapter_*.tmp"))
    for path in (path for name, pattern in left for path in (folder / name).glob(pattern)):
        path.unlink()


def check_space(folder: Path, needed: int, *, replacing: bool) -> None:
    """Errors: UserError when `needed` bytes are not free, or taken by what will be replaced."""
    free = shutil.disk_usage(folder).free
    if replacing:
        free += sum(path.stat().st_size for path in weights(folder))
    if free < needed:
        raise UserError(
            f"--output_dir={folder}: this run's checkpoints need {needed / GIB:.1f} GiB and "
            f"{free / GIB:.1f} GiB are free; make room, or use --save_dtype=fp16, a small "
            "--keep_checkpoints, or another --output_dir"
        )


def fingerprint(tracks: Iterable["Track"]) -> str:
    """Of what a run trains on: names, lengths and captions, with the fields that some have."""
    facts = [
        (t.name, t.sample_rate, t.frames, t.caption)
        + ((t.written.description, *t.written.fields) if t.written and t.written.fields else ())
        for t in tracks
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Without `indent` on one line, which takes far less time and memory."""
    write_bytes(path, json.dumps(content, indent=indent).encode() + b"\n")


def read_json(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None
