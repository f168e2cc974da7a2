"""Everything that the training loop works with.

Letters: B batch, C channels, K codebooks, T token frames, L text tokens, F chroma frames,
P pitch classes.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from dataset import Batch, Clips
from flags.run import Config
from musicgen import codec
from musicgen.device import to_device
from musicgen.load import Model
from musicgen.text import TextEncoder
from training.ema import EMA
from training.plan import Plan
from training.processes import Processes
from training.report import Report
from training.tuning import Tuning
from training.writer import Writer


@dataclass
class Session:
    """Everything that the training loop works with, after `step` optimizer steps.

    `module` is the TokenLoss wrapped by Accelerate; `trained` holds the parameters that learn.
    `report` is None except in the first process.
    """

    config: Config
    accelerator: Accelerator
    processes: Processes
    precision: str  # and the reason for it
    model: Model
    tuning: Tuning
    text_encoder: TextEncoder
    module: nn.Module
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    clips: Clips
    held_out: Clips
    plan: Plan
    frames: int  # T
    warmup: int
    prompts: list[str]
    step: int = 0
    resumed: str | None = None  # where a resumed run continues
    is_whole: bool = True  # False during an update: the weights belong to no step
    lock: threading.Lock = field(default_factory=threading.Lock)  # to change or save the weights
    saving: threading.Lock = field(default_factory=threading.Lock)  # held by who writes checkpoints
    report: Report | None = None
    wandb_id: str | None = None
    writer: Writer = field(default_factory=Writer)

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Mark the change of the weights inside the block; count the step."""
        with self.lock:
            self.is_whole = False
            yield
            self.step += 1
            self.is_whole = True

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the EMA's weights, if there are any, into the model inside the block."""
        if self.ema is None:
            yield
            return
        with self.lock:
            self.is_whole = False
            self.ema.swap()
            try:
                yield
            finally:
                self.ema.swap()
                self.is_whole = True

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def final(self) -> Path:
        """The file that a finished run writes."""
        return self.output / self.tuning.final

    @property
    def total(self) -> int:
        return self.plan.total_steps

    @property
    def trained_size(self) -> tuple[int, int]:
        """Return how many numbers learn, and their bytes."""
        parameters = list(self.trained.values())
        return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)

    @property
    def valid_step(self) -> int:
        return self.config.valid_step or max(1, self.total // 10)

    @property
    def workers(self) -> int:
        if self.config.num_workers is not None:
            return self.config.num_workers
        return min(4, os.cpu_count() or 1, len(self.clips))

    def lengths(self, batch: Batch) -> torch.Tensor:
        """Return each clip's unpadded token frames `[B]`; a partly padded frame does not count."""
        return batch.lengths * round(self.model.frame_rate) // self.model.sample_rate

    def inputs(self, batch: Batch) -> tuple[torch.Tensor | None, ...]:
        """Return TokenLoss's inputs on the device: codes, lengths, text, its mask and melody."""
        device = self.accelerator.device
        codes = self._codes(batch)
        text, mask = self.text_encoder(batch.captions, device)
        melody = None if batch.melody is None else to_device(batch.melody, device)
        return codes, to_device(self.lengths(batch), device), text, mask, melody

    def _codes(self, batch: Batch) -> torch.Tensor:
        """Return a batch's codes `[B, K, T]` on the device, cached or encoded now."""
        device = self.accelerator.device
        if batch.codes is not None:
            return to_device(batch.codes, device).long()
        assert batch.wav is not None
        return codec.encode_audio(self.model, to_device(batch.wav, device))
