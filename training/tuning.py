"""What learns: all weights, the text conditioning, LoRA, or a new word."""

from typing import TYPE_CHECKING, Any

import torch

from flags.run import Config
from musicgen import lora, placeholder
from musicgen.hub import portable_id
from musicgen.load import Model
from musicgen.text import text_conditioner

if TYPE_CHECKING:  # slow to import, and only for LoRA
    from peft import PeftModel


def layers_dtype(config: Config, dtype: torch.dtype) -> torch.dtype:
    """Of the transformer's matrices, `dtype` being the forward pass's.

    What is frozen gives the same in the format that autocast would bring it to, in half the room.
    """
    is_half = layers_are_frozen(config) or config.optimizer == "adamw_8bit_bf16"
    return dtype if is_half else torch.float32


def layers_are_frozen(config: Config) -> bool:
    return bool(config.lora_rank or config.placeholder or config.tune_text)


def set_up_training(config: Config, lm: Any) -> "PeftModel | None":
    """Freeze what the flags don't train, put adapters on; returns the model with them, if any."""
    if config.grad_checkpointing:
        lm.transformer.checkpointing = "torch"
    lm.requires_grad_(not config.tune_text)
    text_conditioner(lm).requires_grad_(True)
    if config.placeholder:
        lm.requires_grad_(False)  # the word is in the text encoder
    if not config.lora_rank:
        return None
    torch.manual_seed(config.seed)
    return lora.attach(
        lm,
        rank=config.lora_rank,
        alpha=config.lora_alpha or 2 * config.lora_rank,
        dropout=config.lora_dropout,
        rslora=config.lora_rslora,
        ends=config.lora_embeddings,
        base=portable_id(config.model_id),
    )


def make_word(config: Config, model: Model) -> placeholder.NewWord:
    conditioner = text_conditioner(model.lm)
    vector = placeholder.mean_vector(conditioner, config.placeholder_init)
    assert config.placeholder
    return placeholder.add(
        conditioner, config.placeholder, vector, f"--placeholder={config.placeholder}"
    )
