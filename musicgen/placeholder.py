"""Textual inversion: T5 gets one new word, and only its vector is trained.

The vector is an input embedding: the frozen T5 reads it in context like any other word's.
Source: Gal et al., An Image is Worth One Word (2022); the file format is that of diffusers.

Letters: B batch, L text tokens, D width of T5.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from tokenizers import AddedToken
from torch import nn

import files
from errors import UserError
from musicgen.weights import portable

LR_SHARE = 0.05  # a usual learning rate, as a share of the size of T5's embeddings


class NewWord(nn.Module):
    """T5's input embedding with one new word, whose vector `[D]` is a parameter."""

    def __init__(self, embedding: nn.Module, word: str, token: int, vector: torch.Tensor) -> None:
        super().__init__()
        self.embedding = embedding
        self.word = word
        self.token = token
        self.vector = nn.Parameter(vector)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [B, L] -> [B, L, D]
        is_word = tokens == self.token
        others = self.embedding(tokens.masked_fill(is_word, 0))
        return torch.where(is_word[..., None], self.vector, others)

    def usual_lr(self) -> float:
        """Return a rate that fits the size of T5's embeddings; Adam's steps don't adapt to it."""
        return LR_SHARE * float(next(self.embedding.parameters()).std())


class Embedding(NamedTuple):
    """The content of a saved file: a word, its vector `[D]` and the model it was trained with."""

    word: str
    vector: torch.Tensor
    model_id: str | None


def mean_vector(conditioner: Any, text: str) -> torch.Tensor:
    """Return the mean of T5's embeddings of a text's tokens, `[D]`. Raises: UserError."""
    tokenizer = conditioner.t5_tokenizer
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens or tokenizer.unk_token_id in tokens:
        raise UserError(
            f"--placeholder_init={text}: the text encoder does not know it; give an English word"
        )
    embedding = conditioner.t5.get_input_embeddings()
    with torch.no_grad():
        return embedding(torch.tensor(tokens, device=conditioner.t5.device)).float().mean(0)


def add(conditioner: Any, word: str, vector: torch.Tensor, flag: str) -> NewWord:
    """Add a word with vector `[D]` to a T5Conditioner, and freeze its T5.

    `flag` is what asked for it. Raises: UserError if the word is not new or has another width.
    """
    t5, tokenizer = conditioner.t5, conditioner.t5_tokenizer
    tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id:
        raise UserError(f"{flag}: the text encoder has the word {word} already; name it <{word}>")
    if vector.shape != (t5.config.d_model,):
        raise UserError(
            f"{flag}: does not fit the model: {word} has {vector.numel()} numbers, but its text "
            f"encoder needs {t5.config.d_model}; give the --model_id that it was trained on"
        )
    # Matched as written, and not within another word.
    tokenizer.add_tokens(AddedToken(word, single_word=True, normalized=False))
    t5.requires_grad_(False)
    token = tokenizer.convert_tokens_to_ids(word)
    new = NewWord(t5.get_input_embeddings(), word, token, vector.to(t5.device))
    t5.set_input_embeddings(new)
    return new


def save(path: Path, new: NewWord | Embedding, dtype: str, model_id: str) -> None:
    state = portable({new.word: new.vector}, dtype)
    # One metadata entry: several are written in random order, so the file would vary.
    files.write_bytes(path, to_bytes(state, {"model_id": model_id}))


def read(path: str) -> Embedding:
    """Read a saved word. Raises: UserError if the file is damaged or is not one vector."""
    try:
        with safe_open(path, framework="pt") as file:
            words = list(file.keys())
            vectors = [file.get_tensor(word) for word in words]
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"--embedding={path}: can't be read ({type(error).__name__}: {error}); it is damaged, "
            "or is not a learned_embeds.safetensors that run.py wrote"
        ) from None
    if len(vectors) != 1 or vectors[0].ndim != 1 or not vectors[0].isfinite().all():
        raise UserError(f"--embedding={path}: is not the vector of one word")
    return Embedding(words[0], vectors[0].float(), metadata.get("model_id"))
