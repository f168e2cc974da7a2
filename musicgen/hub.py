"""Find a model's files: in a folder, or in the local cache of the Hugging Face hub."""

import contextlib
import difflib
import functools
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import AnyNode
from safetensors import SafetensorError
from torch.torch_version import TorchVersion

from errors import UserError, is_out_of_memory
from musicgen import published
from musicgen.published import SHORT_NAMES

FOLDERS = {"demo": Path(__file__).parent.parent / "demo" / "model"}
NAMES = [*FOLDERS, *SHORT_NAMES]
WEIGHTS = ["state_dict.bin", "compression_state_dict.bin"]
HF_FILES = ["*.json", "*.model", "model.safetensors"]
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
T5_NEEDS = [("config.json",), HF_WEIGHTS, ("tokenizer.json", "spiece.model")]
DAMAGES = (
    *(OmegaConfBaseException, SafetensorError, RuntimeError, OSError, ValueError),
    *(KeyError, AttributeError, TypeError, AssertionError),  # of a config with other keys or values
)
CODEC_NEEDS = [("config.json",), HF_WEIGHTS]
# All that a config saved as an object consists of, and torch's version beside it. They run no code.
CONFIG_CLASSES: list[Any] = [
    *(DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata, TorchVersion),
    *(defaultdict, dict, list, int, (Any, "typing.Any")),  # in Python 3.10 Any is no class
]


def find_model(model_id: str) -> Path:
    """Return the folder of a model's files; download them if need be. Raises: UserError."""
    path = FOLDERS.get(model_id, Path(model_id).expanduser())
    if model_id in SHORT_NAMES or not path.is_dir():
        if model_id.startswith(("/", ".", "~")) or model_id.count("/") > 1 or path.exists():
            raise UserError(f"--model_id={model_id}: no such folder")
        for word, reason in published.REFUSED.items():
            if word in f"musicgen-{model_id}".lower():
                raise UserError(f"--model_id={model_id} can't be trained: {reason}")
        repo, meant = SHORT_NAMES.get(model_id, model_id), _meant(model_id)
        if "/" not in repo:
            advice = f"did you mean {meant}?" if meant else f"known names are {', '.join(NAMES)}"
            raise UserError(f"--model_id={model_id}: no such model or folder; {advice}")
        needs = [(name,) for name in WEIGHTS]
        try:
            path = hub_folder(repo, WEIGHTS, needs, os.environ.get("AUDIOCRAFT_CACHE_DIR"))
        except UserError as error:
            if not meant:
                raise
            what = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"--model_id={model_id}: {what}; did you mean {meant}?") from None
    missing = [name for name in WEIGHTS if not (path / name).is_file()]
    if missing:
        raise UserError(
            f"--model_id={model_id}: is not a MusicGen in audiocraft's exported format: "
            f"it has no {' and no '.join(missing)}"
        )
    return path


def _meant(model_id: str) -> str | None:
    """Return the known name or id that a mistyped one is close to."""
    ids = {repo: repo for repo in (*SHORT_NAMES.values(), "facebook/audiogen-medium")}
    names = {name: name for name in NAMES} | {f"musicgen-{name}": name for name in SHORT_NAMES}
    known, cutoff = (ids, 0.9) if "/" in model_id else (names, 0.75)  # others have ids alike
    if known.get(model_id) == model_id:
        return None
    close = difflib.get_close_matches(model_id.lower(), known, n=1, cutoff=cutoff)
    return known[close[0]] if close else None


def portable_id(model_id: str) -> str:
    """Return a name, id or full path that means this model from any working folder."""
    folder = Path(model_id).expanduser()
    return model_id if model_id in NAMES or not folder.is_dir() else str(folder.resolve())


def hub_folder(
    repo: str, patterns: list[str], needs: Sequence[tuple[str, ...]], cache_dir: str | None = None
) -> Path:
    """Return the local snapshot of a Hugging Face repository; download it only if incomplete.

    `needs` lists the files that make it complete, each with its alternatives.
    """
    fetch = functools.partial(snapshot_download, repo, allow_patterns=patterns, cache_dir=cache_dir)
    try:
        path = Path(fetch(local_files_only=True))
        if not lacking(path, needs):
            return path
    except (OSError, ValueError):  # not in the cache, or not a valid id: the hub will say which
        pass
    try:
        path = Path(fetch())
        lacks = lacking(path, needs)
        reason = f"it has no {lacks}"
    except Exception as error:  # offline, no such id, no access: each its own class
        lines = str(error).strip().splitlines() or ["no reason given"]
        lacks, reason = "all", f"{type(error).__name__}: {lines[0]}"
    if lacks:
        raise UserError(
            f"{repo} is not in the Hugging Face cache and could not be downloaded ({reason}).\n"
            "Connect to the network once, or give --model_id a folder with "
            f"{' and '.join(WEIGHTS)} and its text encoder in t5/, or one of "
            f"{', '.join(NAMES)}."
        )
    return path


def lacking(folder: Path, needs: Sequence[tuple[str, ...]]) -> str:
    """Return the first needed file that a folder lacks, or an empty string."""
    missing = (names for names in needs if not any((folder / name).exists() for name in names))
    return " or ".join(next(missing, ()))


def read_package(path: Path, model_id: str) -> dict[str, Any]:
    """Read a file in audiocraft's exported format; "xp.cfg" is YAML text, however it was saved.

    Raises: UserError if it is not such a file.
    """
    mmap = zipfile.is_zipfile(path)  # files of torch before 1.6 are no zip files
    try:
        with torch.serialization.safe_globals(CONFIG_CLASSES):
            package = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load has no class for "this is not my file"
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"--model_id={model_id}: {path.name} holds {found[1]}, which is refused because "
                "loading it could run code: export it again as tensors and a config"
            ) from None
        raise UserError(
            f"--model_id={model_id}: {path.name} can't be read ({type(error).__name__}); "
            "it is damaged or not a torch file: download or export it again"
        ) from None
    exported = isinstance(package, dict) and {"xp.cfg", "best_state"} <= package.keys()
    named_codec = isinstance(package, dict) and path.name == WEIGHTS[1] and "pretrained" in package
    if not exported and not named_codec:
        raise UserError(
            f"--model_id={model_id}: {path.name} is not in audiocraft's exported format"
        )
    if exported and not isinstance(package["xp.cfg"], str):
        with damage_as_user_error(model_id):
            package["xp.cfg"] = OmegaConf.to_yaml(OmegaConf.create(package["xp.cfg"]))
    return package


@contextlib.contextmanager
def damage_as_user_error(model_id: str) -> Iterator[None]:
    """Turn any failure with a model's files inside the block into a UserError."""
    try:
        yield
    except DAMAGES as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--model_id={model_id}: can't be loaded as a MusicGen "
            f"({type(error).__name__}: {reason}); download or export it again"
        ) from error
