"""Write large files in a thread, from a copy in the computer's memory, while training goes on."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from musicgen.host import free_memory

MARGIN = 1.1  # times the copy must be free: the rest of the program grows too


class Writer:
    """Runs jobs in a thread, one after the other; an error of a job is raised here."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)  # Python ends only after its job
        self._job: Future[object] | None = None
        self.has_failed = False

    def submit(self, save: Callable[[], object]) -> None:
        """Start a job; first wait for the former one, and raise its error."""
        self.wait()
        self._job = self._thread.submit(save)

    def check(self) -> None:
        """Raise the error of a job that has ended."""
        if self._job and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the job, and raise its error."""
        job = self._job  # another thread may be waiting, too
        if not job:
            return
        try:
            job.result()
        finally:  # a second Ctrl-C ends only the waiting
            if job.done():
                self.has_failed = job.exception() is not None
                self._job = None


def copied(tree: Any) -> Any:
    """Return dicts, lists and tuples with copies of their tensors in the computer's memory."""
    return tree_map_only(torch.Tensor, _copy, tree)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if is_traceable_wrapper_subclass(tensor):  # torchao's moments, whose own .to() may not copy
        return transform_subclass(tensor, lambda _, inner: _copy(inner))
    return tensor.detach().to("cpu", copy=True)


def has_room(size: int) -> bool:
    """Return whether a copy of so many bytes fits into the computer's memory."""
    return MARGIN * size < free_memory()


def size_of(tree: Any) -> int:
    """Return the bytes of all tensors in dicts, lists and tuples."""
    return sum(plain.nbytes for leaf in tree_leaves(tree) for plain in _plain(leaf))


def _plain(leaf: Any) -> Iterator[torch.Tensor]:
    """Yield a tensor, or those that it is made of."""
    if is_traceable_wrapper_subclass(leaf):
        for name in leaf.__tensor_flatten__()[0]:
            yield from _plain(getattr(leaf, name))
    elif isinstance(leaf, torch.Tensor):
        yield leaf
