"""The processes of a run: they fail together, wait for each other and notice if one is gone."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import distributed
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from errors import Finished, LostProcess, UserError
from training.launch import local_process_count

# For what one process does while the others wait: encode, sample, save. The steps of training
# themselves have torch's own limit.
PATIENCE = timedelta(hours=12)
BEAT_SEC = 0.5
SILENCE = timedelta(minutes=1)  # without a beat: a machine that lost power closes no connection


class Processes:
    """The processes that train together, one of them this; without others, nothing waits.

    What they tell each other here goes through the computers' memory, on any device. Every
    process must call the same methods in the same order.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.local_rank, self.local_count = accelerator.local_process_index, local_process_count()
        self.is_first = accelerator.is_main_process
        self.is_one_lost = False  # known once `watch` was called
        self._is_leaving = threading.Event()
        self._has_failed = False
        self._watch: threading.Thread | None = None
        if self.count > 1:
            self._patient: Any = distributed.new_group(backend="gloo", timeout=PATIENCE)
            self._beating: Any = distributed.new_group(backend="gloo", timeout=SILENCE)

    def wait(self) -> None:
        """Wait until all processes have come here, for hours if need be."""
        if self.count > 1:
            distributed.barrier(self._patient)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Go on after the block when all processes have done it.

        Raises: UserError or Finished, in all processes, if any of them raises it in the block.
        """
        reason: Exception | None = None
        try:
            yield
        except (UserError, Finished) as error:
            reason = error
        for first in filter(None, self.gather(reason)):
            raise first

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise UserError, in all processes, if the facts are not the same in all."""
        first, *others = self.gather(facts)
        for rank, other in enumerate(others, start=1):
            if different := [name for name in first if other[name] != first[name]]:
                raise UserError(
                    f"process {rank} of the run differs from the first in "
                    f"{', '.join(different)}: start all with the same flags and the same dataset"
                )

    def gather(self, mine: Any) -> list[Any]:
        """Return what each process gives, in all of them."""
        gathered = [mine] * self.count
        if self.count > 1:
            distributed.all_gather_object(gathered, mine, group=self._patient)
        return gathered

    def broadcast(self, content: Any) -> Any:
        """Return the first process's `content` in all of them.

        Tensors in it are sent one by one, so that no more than one of them is in memory twice.
        """
        if self.count == 1:
            return content
        tensors: list[torch.Tensor] = []
        frame = [_take_out(content, tensors) if self.is_first else None]
        distributed.broadcast_object_list(frame, src=0, group=self._patient)
        for tensor in tensors:  # the first process's
            self._send(tensor.detach().to("cpu").contiguous())
        return content if self.is_first else _put_back(frame[0], self._send)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite a tensor with the first process's, as bytes: gloo doesn't know all formats."""
        if tensor.numel():
            distributed.broadcast(tensor.view(-1).view(torch.uint8), src=0, group=self._patient)
        return tensor

    def watch(self, on_loss: Callable[[], None]) -> None:
        """Call `on_loss`, in a thread, if another process ends before all have called `leave`."""

        def beat() -> None:
            is_last = torch.zeros(1)
            try:
                while not is_last:
                    self._is_leaving.wait(BEAT_SEC)
                    if self._has_failed:
                        return
                    is_last = torch.tensor([float(self._is_leaving.is_set())])
                    minimum = distributed.ReduceOp.MIN
                    distributed.all_reduce(is_last, minimum, group=self._beating)
            except RuntimeError:  # closed by the other one's system, or silent for too long
                self.is_one_lost = True
                on_loss()

        if self.count > 1:
            self._watch = threading.Thread(target=beat, daemon=True, name="watch")
            self._watch.start()

    def check(self) -> None:
        """Raise LostProcess if another process is known to have ended."""
        if self.is_one_lost:
            raise LostProcess("its connection was lost")

    def leave(self) -> None:
        """Wait until all processes are done. Raises: LostProcess if one has ended before."""
        self._is_leaving.set()
        while self._watch and self._watch.is_alive() and not self.is_one_lost:
            self._watch.join(BEAT_SEC)
        self.check()

    def fail(self) -> None:
        """Stop watching, before this process ends without the others.

        Python aborts if it ends while a thread waits in gloo.
        """
        self._has_failed = True
        if self._watch:
            self._watch.join(2 * BEAT_SEC)


@dataclass
class _Tensor:
    shape: torch.Size
    dtype: torch.dtype


@dataclass
class _Wrapper:
    """A tensor made of others, such as an 8-bit moment of torchao."""

    kind: type
    parts: dict[str, Any]
    context: Any
    size: torch.Size
    stride: tuple[int, ...]


def _take_out(content: Any, tensors: list[torch.Tensor]) -> Any:
    """Return `content` without its tensors, which are added to `tensors`."""

    def take(tensor: torch.Tensor) -> _Tensor | _Wrapper:
        if is_traceable_wrapper_subclass(tensor):
            names, context = tensor.__tensor_flatten__()
            parts = _take_out({name: getattr(tensor, name) for name in names}, tensors)
            return _Wrapper(type(tensor), parts, context, tensor.size(), tensor.stride())
        tensors.append(tensor)
        return _Tensor(tensor.shape, tensor.dtype)

    return tree_map_only(torch.Tensor, take, content)


def _put_back(frame: Any, fill: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return what `_take_out` made `frame` of; `fill` is given each tensor, in the same order."""

    def put(place: _Tensor | _Wrapper) -> torch.Tensor:
        if isinstance(place, _Tensor):
            return fill(torch.empty(place.shape, dtype=place.dtype))
        parts, kind = _put_back(place.parts, fill), cast(Any, place.kind)
        return kind.__tensor_unflatten__(parts, place.context, place.size, place.stride)

    return tree_map_only((_Tensor, _Wrapper), put, frame)
