"""Plan which clips each optimizer step takes, and read them in batches."""

import functools
import math
import signal
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset import Batch, Clips, Pick, collate
from errors import UserError
from flags.run import Config


@dataclass(frozen=True)
class Plan:
    """A plan of the clips that each optimizer step and each process takes.

    An epoch is a random order of all clips, cut into as few steps as possible of at most
    `clips_per_step` clips; their sizes differ by at most one clip, so that no step learns from a
    few clips alone. Within a step, clips go to the processes in turn.

    Example: 9 clips, batches of 4, grad_acc 2, one process: steps of 5 and 4 clips.

    Args:
        is_even: False = as earlier versions cut an epoch: full steps, the rest in the last one
            (8 and 1 in the example). A run that began this way continues this way.
    """

    clips: int  # in an epoch
    batch_size: int
    grad_acc: int
    epochs: int
    max_steps: int | None
    seed: int
    processes: int = 1
    is_even: bool = True

    @property
    def clips_per_step(self) -> int:
        return self.batch_size * self.grad_acc * self.processes

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.clips / self.clips_per_step)

    @property
    def sizes(self) -> str:
        """Say how many clips a step takes, such as "5 or 4"."""
        size, larger = divmod(self.clips, self.steps_per_epoch)
        if not self.is_even:
            return f"up to {self.clips_per_step}"
        return f"{size + 1} or {size}" if larger else f"{size}"

    @property
    def total_steps(self) -> int:
        by_epochs = self.steps_per_epoch * self.epochs
        return min(by_epochs, self.max_steps or by_epochs)

    def step(self, step: int) -> list[Pick]:
        """Return all processes' clips of optimizer step `step` (from 0)."""
        epoch, part = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, self.clips)
        start = part * self.clips_per_step
        stop = start + self.clips_per_step
        if self.is_even:
            size, larger = divmod(self.clips, self.steps_per_epoch)  # the first steps are larger
            start = part * size + min(part, larger)
            stop = start + size + (part < larger)
        return [Pick(epoch, int(index)) for index in order[start:stop]]

    def batches(self, step: int, rank: int = 0) -> list[list[Pick]]:
        """Return a step's micro-batches for process `rank`; all processes get equally many."""
        return _share(self.step(step), self.batch_size, rank, self.processes)


@functools.lru_cache(maxsize=2)  # 2: the loader is ahead of the loop; 1,000,000 clips take 30 ms
def _order(seed: int, epoch: int, clips: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(clips)


def _share(picks: list[Pick], batch_size: int, rank: int, processes: int) -> list[list[Pick]]:
    filler = Pick(picks[0].epoch, picks[0].index, is_filler=True)
    picks = picks + [filler] * (-len(picks) % processes)
    mine = picks[rank::processes]
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


def train_batches(
    clips: Clips, plan: Plan, *, start: int, rank: int, workers: int
) -> Generator[Batch, None, None]:
    """Yield one process's micro-batches of steps start, start + 1, ... of a plan, in order."""
    steps = range(start, plan.total_steps)
    picks = (batch for step in steps for batch in plan.batches(step, rank))
    return _read(clips, picks, workers)


def held_out_batches(
    clips: Clips, batch_size: int, *, rank: int, processes: int, workers: int
) -> Generator[Batch, None, None]:
    """Yield all clips of epoch 0, always the same ones; each process gets a share."""
    picks = [Pick(0, index) for index in range(len(clips))]
    return _read(clips, _share(picks, batch_size, rank, processes), workers)


def _read(clips: Clips, picks: Iterable[list[Pick]], workers: int) -> Generator[Batch, None, None]:
    """Yield batches. Close it: the workers live until then and keep the program from ending."""
    loader = DataLoader(
        clips,
        batch_sampler=picks,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator(),  # the default would be the generator that dropout uses
    )
    try:
        for batch in loader:
            if batch.error:
                raise UserError(batch.error)
            yield batch
    except RuntimeError as error:
        if "shared memory" not in str(error) and "bus error" not in str(error):
            raise
        raise UserError(
            "the processes that read audio have no shared memory left: use --num_workers=0, or "
            "give the container more (docker run --shm-size=2g)"
        ) from error


def _leave_signals_to_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_plan(config: Config, clips: int, processes: int) -> Plan:
    return Plan(
        clips=clips,
        batch_size=config.batch_size,
        grad_acc=config.grad_acc,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        processes=processes,
    )
