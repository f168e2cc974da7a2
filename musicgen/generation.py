"""Generate music of any length for many prompts at once, by rolling continuation.

Letters: B pieces generated together, h rows of each (with its conditions, and without them for
guidance), C channels, K codebooks, T token frames.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from errors import UserError
from musicgen.codec import Decoding, decode
from musicgen.conditions import Conditions
from musicgen.host import free_memory
from musicgen.load import Model
from musicgen.network import Network
from musicgen.sampling import Sampling, draw, stream
from musicgen.window import Windows
from recordings.growing import GrowingWav

OVERLAP_SEC = 12.0
SHARE = 0.7  # of the free memory for caches; the rest is for EnCodec and what a step computes

NOT_FINITE = (
    "the model computes numbers that are not finite, so it makes no music: try --device=cpu, which "
    "computes in 32 bits; if that fails too, its weights are damaged"
)


class Piece(NamedTuple):
    """A piece to generate; its music depends on nothing else that is generated with it."""

    prompt: str
    variation: int = 0


class Block(NamedTuple):
    """The next codes `[K, T]` of a piece, on the CPU."""

    piece: int
    codes: torch.Tensor
    is_last: bool


def default_overlap_sec(model: Model) -> float:
    """Return the default of --overlap: 12 s, or half of a short window."""
    return min(OVERLAP_SEC, model.max_duration / 2)


def to_frames(model: Model, seconds: float) -> int:
    return max(1, round(seconds * model.frame_rate))


def generate(model: Model, prompts: list[str], *, variations: int = 1, **how: Any) -> torch.Tensor:
    """Generate `[pieces, C, samples]` on the CPU: all variations of the first prompt, and so on.

    The other arguments are those of `generate_blocks`.
    """
    pieces = [Piece(prompt, number) for prompt in prompts for number in range(variations)]
    codes: list[list[torch.Tensor]] = [[] for _ in pieces]
    for block in generate_blocks(model, pieces, **how):
        _check(model, block.codes)
        codes[block.piece].append(block.codes)
    return decode(model, torch.stack([torch.cat(blocks, dim=-1) for blocks in codes]))


@torch.no_grad()
def generate_blocks(
    model: Model,
    pieces: list[Piece],
    *,
    duration_sec: float,
    overlap_sec: float,
    seed: int,
    opening: torch.Tensor | None = None,
    melody: torch.Tensor | None = None,
    sampling: Sampling | None = None,
    network: Network | None = None,
    batch_size: int | None = None,
    on_frames: Callable[[int], None] = lambda pieces: None,
) -> Iterator[Block]:
    """Yield each piece's codes block by block, from its beginning to its end.

    Args:
        overlap_sec: how much of the previous window each further one continues; shorter than the
            window (`model.max_duration`, 30 s for the published models).
        opening: codes `[1, K, T]` to continue, no longer than the overlap; pieces begin with them.
        melody: recording `[1, samples]` at the model's rate whose melody to follow, repeated if
            it is too short; for melody models.
        network: the model's, if its weights are arranged in another way than as they are.
        batch_size: pieces at once; None = as many as memory holds.
        on_frames: called after each frame with the number of pieces that have got it; may raise
            to stop.
    """
    sampling = sampling or Sampling()
    network = network or Network(model.lm)
    window, overlap = to_frames(model, model.max_duration), to_frames(model, overlap_sec)
    begin = torch.zeros(1, model.lm.num_codebooks, 0, dtype=torch.long)
    if opening is not None:
        begin = opening.cpu()
    total = begin.shape[-1] + to_frames(model, duration_sec)
    assert begin.shape[-1] <= overlap < window

    conditions = Conditions(model, melody, guided=sampling.cfg_coef != 1)
    first = [conditions.at(piece.prompt, 0) for piece in pieces]
    befores, rows = [len(one.prefix[0]) for one in first], len(first[0].prefix)
    if batch_size is None:
        given = max(len(one.prefix[0]) + len(one.cross[0]) for one in first)
        need = rows * network.cache_bytes(given + min(window, total))
        batch_size = max(1, int(SHARE * _free(model.device)) // need)
    for numbers in _batches(befores, batch_size):
        crosses = [first[number].cross for number in numbers]
        before = befores[numbers[0]]
        windows = Windows(network, crosses, before, min(window, total), sampling)
        streams = [stream(seed, *pieces[number]) for number in numbers]
        draw_steps = functools.partial(draw, streams, codebooks=model.lm.num_codebooks)
        on_frame = functools.partial(on_frames, len(numbers))
        context, done = begin.expand(len(numbers), -1, -1).to(model.device), begin.shape[-1]
        if done:
            yield from (Block(number, begin[0], False) for number in numbers)
        while done < total:
            kept = context.shape[-1]
            length = min(window, kept + total - done)
            prefixes = [conditions.at(pieces[n].prompt, done - kept).prefix for n in numbers]
            made = windows.generate(prefixes, context, length, draw_steps, on_frame)
            done += length - kept
            for number, codes in zip(numbers, made[..., kept:].cpu(), strict=True):
                yield Block(number, codes, done == total)
            context = made[..., -overlap:]
        del windows  # before the next batch's caches are made


def write(model: Model, blocks: Iterable[Block], paths: list[Path]) -> Iterator[int]:
    """Write each piece's wav while it is made; yield the number of each that is whole.

    Raises: UserError if one can't be written, or the model's numbers are not finite.
    """
    decodings: dict[int, Decoding] = {}
    wavs: dict[int, GrowingWav] = {}
    for number, codes, is_last in blocks:
        _check(model, codes)
        if number not in decodings:
            decodings[number] = Decoding(model)
        for samples in decodings[number].add(codes, is_last=is_last):
            if number not in wavs:  # a part file holds music from its first moment
                wavs[number] = GrowingWav(paths[number], model.sample_rate, model.audio_channels)
            wavs[number].add(samples.numpy())
        if is_last:
            del decodings[number]
            wavs.pop(number).finish()
            yield number


def _check(model: Model, codes: torch.Tensor) -> None:
    """Raise UserError if codes are none, as `choose` gives them for NaN."""
    if (codes == model.lm.card).any():
        raise UserError(NOT_FINITE)


def _batches(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Yield the numbers of pieces to generate together: up to `size`, with equal prefixes.

    Example: [3, 5, 3, 3], 2 -> [0, 2], [3], [1]
    """
    for length in dict.fromkeys(lengths):
        same = [number for number, other in enumerate(lengths) if other == length]
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _free(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type != "cuda":
        return free_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
