"""All that a training loop works with.

Letters: K codebooks, T token frames.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from dataset import Batch, Clips
from errors import UserError
from flags.run import Config
from musicgen import codec, lora, placeholder
from musicgen.device import to_device
from musicgen.hub import portable_id
from musicgen.load import Model
from musicgen.text import TextEncoder
from musicgen.weights import portable, read_lm_state, save_tensors
from training import resume
from training.ema import EMA
from training.output import EMBEDDING, FINAL, LORA, RESUME
from training.plan import Plan
from training.report import Report
from training.resume import FREE_TO_CHANGE
from training.tuning import layers_are_frozen

if TYPE_CHECKING:  # slow to import, and only for LoRA
    from peft import PeftModel


@dataclass
class Session:
    """Everything that the training loop works with. `step` optimizer steps are done.

    `module` is the TokenLoss as Accelerate wraps it; `trained` are the parameters that learn.
    `report` is None in all but the first process.
    """

    config: Config
    accelerator: Accelerator
    model: Model
    adapter: "PeftModel | None"  # model.lm with LoRA
    new_word: placeholder.NewWord | None  # with --placeholder
    text_encoder: TextEncoder
    module: nn.Module
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    clips: Clips
    valid_clips: Clips
    plan: Plan
    frames: int  # T
    warmup: int
    prompts: list[str]
    step: int = 0
    is_whole: bool = True  # False inside an update: the weights are of no step then
    report: Report | None = None
    wandb_id: str | None = None

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Around the change of the weights; counts the step."""
        self.is_whole = False
        yield
        self.step += 1
        self.is_whole = True

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights that are saved and judged: the EMA's inside the block, if there is one."""
        if self.ema is None:
            yield
            return
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
        """The file that a finished run leaves."""
        return self.output / (EMBEDDING if self.new_word else FINAL)

    @property
    def total(self) -> int:
        return self.plan.total_steps

    @property
    def valid_step(self) -> int:
        return self.config.valid_step or max(1, self.total // 10)

    @property
    def workers(self) -> int:
        if self.config.num_workers is not None:
            return self.config.num_workers
        return min(4, os.cpu_count() or 1, len(self.clips))

    def valid_frames(self, valid_samples: torch.Tensor) -> torch.Tensor:
        """Whole frames in so many samples; a frame that is part padding is not trained on."""
        return valid_samples * round(self.model.frame_rate) // self.model.sample_rate

    def codes(self, batch: Batch) -> torch.Tensor:
        """A batch's codes `[B, K, T]` on the device: kept ones, or encoded now."""
        device = self.accelerator.device
        if batch.codes is not None:
            return to_device(batch.codes, device).long()
        assert batch.wav is not None
        return codec.encode_audio(self.model, to_device(batch.wav, device))

    def learning_rate(self) -> float:
        """Of the coming step: linear warm-up, then as lr_scheduler says."""
        config, step = self.config, self.step
        if step < self.warmup:
            return config.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)  # 0 <= done < 1
        factor = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        }
        return config.lr * factor[config.lr_scheduler]

    def save_resume(self, *, is_finished: bool = False) -> None:
        """Write what `--resume=1` needs. Random states are none: they follow from the step."""
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "is_finished": is_finished,  # the final file is of this step
            "config": self.config.model_dump(),
            "clips_per_step": self.plan.clips_per_step,
            "tracks": resume.fingerprint(self.clips.tracks),
            "weights": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
            "wandb_id": self.report.wandb_id if self.report else None,
        }
        save_tensors(self.output / RESUME, state)

    def save_weights(self, path: Path) -> None:
        """Write the language model's weights, an adapter merged into those that it was put on.

        With --placeholder they are as they were: then only the word's vector.
        """
        if self.new_word:
            model_id = portable_id(self.config.model_id)
            placeholder.save(path, self.new_word, self.config.save_dtype, model_id)
            return
        state = self.model.lm.state_dict()
        if layers_are_frozen(self.config):  # they are in another number format than on disk
            state = read_lm_state(self.config.model_id)
        if self.adapter:
            lora.merge(state, lora.parts(self.adapter))
        elif self.config.tune_text:
            state |= self.trained
        save_tensors(path, portable(state, self.config.save_dtype))

    def save_final(self) -> None:
        self.save_weights(self.final)
        if self.adapter:
            lora.save(self.adapter, self.output / LORA)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a resume state. Errors: UserError if it is of another run than the flags'."""
        old = Config.model_construct(**state["config"])
        changes = [
            f"--{name}={getattr(self.config, name)}, was {getattr(old, name)}"
            for name in Config.model_fields
            if name not in FREE_TO_CHANGE and getattr(self.config, name) != getattr(old, name)
        ]
        if state["clips_per_step"] != self.plan.clips_per_step:
            changes.append(
                f"{self.plan.clips_per_step} clips in a step (batch_size x grad_acc x processes), "
                f"were {state['clips_per_step']}"
            )
        if changes:
            raise UserError(
                "--resume=1 goes on with the run in "
                f"{self.output}, but this has changed: {'; '.join(changes)}.\nPut it back, or "
                "start anew with another --output_dir or --overwrite=1"
            )
        if state["step"] > self.total or (state["step"] == self.total and state["is_finished"]):
            raise UserError(
                f"the run in {self.output} is finished ({state['step']} of {self.total} steps): "
                "raise --epochs or --max_steps to train on"
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.wandb_id = state["wandb_id"]
