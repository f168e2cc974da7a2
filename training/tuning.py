"""The part of a model that learns: all weights, the text conditioning, adapters, or a new word."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flags.run import Config
from musicgen import lora, placeholder
from musicgen.hub import portable_id
from musicgen.text import text_conditioner
from musicgen.weights import portable, read_lm_state, save_tensors
from training import output

if TYPE_CHECKING:  # slow to import, and only LoRA needs it
    from peft import PeftModel


class Tuning:
    """Trains all weights; each subclass trains something else.

    Call `prepare` on the language model first, then `trained`.
    """

    final = output.FINAL  # the file that a finished run writes
    new_word: placeholder.NewWord | None = None
    usual_lr: str | None = None  # set where the default of --lr does not fit

    def __init__(self, config: Config) -> None:
        self.config = config

    def layers_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the number format of the layers' matrices; `dtype` is the forward pass's."""
        return dtype if self.config.optimizer == "adamw_8bit_bf16" else torch.float32

    def prepare(self, lm: Any) -> None:
        """Freeze what does not learn, and attach what is added."""
        if self.config.grad_checkpointing:
            lm.transformer.checkpointing = "torch"
        lm.requires_grad_(True)

    def trained(self, lm: Any) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by name."""
        return {name: p for name, p in lm.named_parameters() if p.requires_grad}

    def describe(self, count: int) -> str:
        """Say what learns; `count` is how many numbers that is."""
        return f"{count / 1e6:.1f} M trained"

    def saved_numbers(self, lm: Any) -> int:
        """Return how many numbers `save` writes."""
        return sum(t.numel() for t in lm.state_dict().values())

    def learned(self, lm: Any) -> Any:
        """Return what `write` needs: dicts or tuples with the tensors that training changes."""
        return lm.state_dict()

    def write(self, learned: Any, path: Path) -> None:
        """Write the language model's weights with what was learned."""
        save_tensors(path, portable(self._whole(learned), self.config.save_dtype))

    def save_final(self, lm: Any, folder: Path) -> None:
        self.write(self.learned(lm), folder / self.final)

    def _whole(self, learned: Any) -> dict[str, torch.Tensor]:
        return learned


class _Frozen(Tuning):
    """Leaves the layers as they are on disk.

    They are held in the format that autocast would convert them to: the same results in half the
    memory. Saving reads the originals from disk again.
    """

    def layers_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def learned(self, lm: Any) -> Any:
        return self.trained(lm)

    def _whole(self, learned: Any) -> dict[str, torch.Tensor]:
        return read_lm_state(self.config.model_id) | learned


class TextTuning(_Frozen):
    """Trains only the text conditioning (lm.condition_provider)."""

    def prepare(self, lm: Any) -> None:
        super().prepare(lm)
        lm.requires_grad_(False)
        text_conditioner(lm).requires_grad_(True)


class LoraTuning(_Frozen):
    """Trains adapters; saves them merged into the weights, and at the end also by themselves."""

    usual_lr = "LoRA usually needs --lr=1e-4"
    adapter: "PeftModel"  # the language model with its adapters

    def prepare(self, lm: Any) -> None:
        super().prepare(lm)
        config = self.config
        torch.manual_seed(config.seed)
        self.adapter = lora.attach(
            lm,
            rank=config.lora_rank,
            alpha=config.lora_alpha or 2 * config.lora_rank,
            dropout=config.lora_dropout,
            embeddings=config.lora_embeddings,
            base=portable_id(config.model_id),
        )

    def describe(self, count: int) -> str:
        return f"{super().describe(count)} as LoRA of rank {self.config.lora_rank}"

    def save_final(self, lm: Any, folder: Path) -> None:
        lora.save(self.adapter, folder / output.LORA)
        super().save_final(lm, folder)  # last: it says that the run has finished

    def learned(self, lm: Any) -> Any:
        return lora.parts(self.adapter)

    def _whole(self, learned: Any) -> dict[str, torch.Tensor]:
        state = read_lm_state(self.config.model_id)
        lora.merge(state, learned)
        return state


class WordTuning(_Frozen):
    """Trains the vector of a new word for the text encoder, and saves only that."""

    final = output.EMBEDDING

    def prepare(self, lm: Any) -> None:
        super().prepare(lm)
        lm.requires_grad_(False)  # the word is in the text encoder

    def trained(self, lm: Any) -> dict[str, nn.Parameter]:
        if self.new_word is None:
            word, conditioner = str(self.config.placeholder), text_conditioner(lm)
            vector = placeholder.mean_vector(conditioner, self.config.placeholder_init)
            self.new_word = placeholder.add(conditioner, word, vector, f"--placeholder={word}")
            self.usual_lr = f"a new word usually needs --lr={self.new_word.usual_lr():.0e}"
        return {"placeholder": self.new_word.vector}

    def describe(self, count: int) -> str:
        return f"{count} numbers trained, the vector of {self.config.placeholder}"

    def saved_numbers(self, lm: Any) -> int:
        return self.trained(lm)["placeholder"].numel()

    def write(self, learned: Any, path: Path) -> None:
        assert self.new_word
        model_id = portable_id(self.config.model_id)
        word = placeholder.Embedding(self.new_word.word, learned["placeholder"], model_id)
        placeholder.save(path, word, self.config.save_dtype, model_id)


def tuning_of(config: Config) -> Tuning:
    """Choose what learns by the flags, which exclude each other."""
    if config.placeholder:
        return WordTuning(config)
    if config.lora_rank:
        return LoraTuning(config)
    return TextTuning(config) if config.tune_text else Tuning(config)
