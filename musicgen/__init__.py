"""MusicGen: the only folder that touches audiocraft.

Python runs this file before any other file here, so it sets up what importing audiocraft needs.
"""

import contextlib
import importlib.machinery
import importlib.metadata
import logging
import sys
import types
import warnings
from collections.abc import Iterator

import torch

from errors import UserError

VERSION = "1.3.0"
INSTALL = f"pip install --no-deps audiocraft=={VERSION}"


def _stand_in_for_xformers() -> None:
    """Let audiocraft import without xformers, which many systems have no wheels for.

    audiocraft's attention then runs on torch and needs only these three names.
    """
    ops = types.ModuleType("xformers.ops")
    ops.unbind = torch.unbind  # type: ignore[attr-defined]
    ops.LowerTriangularMask = type("LowerTriangularMask", (), {})  # type: ignore[attr-defined]
    ops.memory_efficient_attention = None  # type: ignore[attr-defined]
    package = types.ModuleType("xformers")
    package.ops = ops  # type: ignore[attr-defined]
    for module in (package, ops):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules.setdefault(module.__name__, module)


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Make `import name` fail inside the block, as if it were not installed."""
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def _check_version() -> None:
    """Raise UserError with the line to type if audiocraft is missing, or another version."""
    try:
        installed = importlib.metadata.version("audiocraft")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"audiocraft is not installed: {INSTALL}") from None
    if installed != VERSION:
        raise UserError(f"audiocraft {installed} is installed, but {VERSION} is needed: {INSTALL}")


_check_version()
_stand_in_for_xformers()
# flashy, a part of audiocraft, would import wandb, which only --use_wandb=1 needs.
with warnings.catch_warnings(), _without("wandb"):
    warnings.simplefilter("ignore")  # from the libraries; users can do nothing about them
    import audiocraft.models  # noqa: F401
for _library in ("audiocraft", "bitsandbytes"):
    logging.getLogger(_library).setLevel(logging.ERROR)
