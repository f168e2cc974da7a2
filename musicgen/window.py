"""Generate one window of codes after another, for a batch of pieces.

Letters: B pieces, h rows of each (with its conditions, and without them for guidance), R = B * h,
K codebooks, T token frames, S pattern steps, P0 places before the music, D model width.
"""

import functools
import sys
from collections.abc import Callable

import torch
from torch.nn import functional as F

from errors import is_out_of_memory
from musicgen.network import Network
from musicgen.sampling import Sampling, choose

UNKNOWN = -1  # a code that is not generated yet


class Windows:
    """Generates windows of up to `frames` token frames for a batch of pieces.

    Its memory is allocated once, and a step only reads and writes there: nothing waits for the
    device, and CUDA replays one captured graph.

    Args:
        crosses: what each piece's cross-attention reads, `[h, L, D]`.
        before: P0, the same for all pieces.
    """

    @torch.inference_mode()
    def __init__(
        self,
        network: Network,
        crosses: list[torch.Tensor],
        before: int,
        frames: int,
        sampling: Sampling,
    ) -> None:
        lm, device, B = network.lm, network.device, len(crosses)
        self.network, self.sampling, self.before = network, sampling, before
        self.h = len(crosses[0])
        S = len(lm.pattern_provider.get_pattern(frames).layout)
        # On the CPU each piece attends by itself: a batch rounds differently, and isn't faster.
        groups = [[cross] for cross in crosses] if device.type == "cpu" else [crosses]
        self.cache = network.cache(groups, before + S)
        self.sequence = torch.zeros(B, lm.num_codebooks, S, dtype=torch.long, device=device)
        self.noise = torch.zeros(S, B, lm.num_codebooks, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)  # the last one that is known
        self.graph = _capture(self._advance, device)

    @torch.inference_mode()
    def generate(
        self,
        prefixes: list[torch.Tensor],
        context: torch.Tensor,
        frames: int,
        draw: Callable[[int], torch.Tensor],
        on_frame: Callable[[], None],
    ) -> torch.Tensor:
        """Return codes `[B, K, frames]` that begin with the context.

        Args:
            prefixes: what each piece has before the music, `[h, P0, D]`.
            context: codes to continue, `[B, K, T]`.
            draw: gives random numbers `[steps, B, K]`.
            on_frame: called after each frame, of which the device may not have made all yet.
        """
        lm, kept = self.network.lm, context.shape[-1]
        pattern = lm.pattern_provider.get_pattern(frames)
        codes = F.pad(context, (0, frames - kept), value=UNKNOWN)
        sequence, _, _ = pattern.build_pattern_sequence(codes, lm.special_token_id)
        S, start = sequence.shape[-1], pattern.get_first_step_with_timesteps(kept)
        self.sequence[..., :S] = sequence
        self.noise[start:S] = draw(S - start).to(self.noise)
        self._read(prefixes, sequence[..., : start - 1])
        self.step.fill_(start - 1)
        for step in range(start, S):
            if self.graph:
                self.graph.replay()
            else:
                self._advance(self.before + step)
            if step >= S - (frames - kept):  # the first steps only fill the delays
                on_frame()
        made = self.sequence[..., :S].contiguous()
        return pattern.revert_pattern_sequence(made, special_token=UNKNOWN)[0][..., :frames]

    def _read(self, prefixes: list[torch.Tensor], sequence: torch.Tensor) -> None:
        """Read what comes before the music, then known steps `[B, K, S]`, into the cache."""
        count = self.before + sequence.shape[-1]
        if not count:
            return
        at = torch.arange(count, device=self.network.device)
        x = self.network.embed(sequence).repeat_interleave(self.h, dim=0)  # [R, S, D]
        x = torch.cat([torch.cat(prefixes), x], dim=1)
        for number, rows in enumerate(self.cache.groups):
            self.network.run(x[rows], at, self.cache.group(number), count)

    def _advance(self, span: int | None) -> None:
        """Choose the codes of the next step; `span` as for `Network.run`."""
        network, following = self.network, self.step + 1
        x = network.embed(self.sequence.index_select(2, self.step))  # [B, 1, D]
        x = x.repeat_interleave(self.h, dim=0)
        x = network.run(x, self.step + self.before, self.cache, span)
        logits = network.logits(x[:, -1])  # [R, K, card]
        if self.h == 2:
            given, null = logits.unflatten(0, (-1, 2)).unbind(1)
            logits = null + (given - null) * self.sampling.cfg_coef
        codes = choose(logits, self.noise.index_select(0, following)[0], self.sampling)
        known = self.sequence.index_select(2, following)  # special tokens, the context's codes
        codes = codes[..., None].where(known == UNKNOWN, known)
        self.sequence.index_copy_(2, following, codes)
        self.step.add_(1)


def _capture(
    advance: Callable[[int | None], None], device: torch.device
) -> torch.cuda.CUDAGraph | None:
    """Capture a step as a CUDA graph; None where there is no CUDA, or it can't be done."""
    if device.type != "cuda":
        return None
    try:
        graph, side, main = torch.cuda.CUDAGraph(), _side(device), torch.cuda.current_stream(device)
        side.wait_stream(main)
        with torch.cuda.device(device), torch.cuda.stream(side), torch.no_grad():
            advance(None)  # once outside: libraries set themselves up
            # Other threads, such as one that pins batches, may go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                advance(None)
        main.wait_stream(side)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        print(f"note: generation without a CUDA graph, so slower ({error})", file=sys.stderr)
        return None
    return graph


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """Return the stream to capture in, always the same: libraries keep memory for each."""
    return torch.cuda.Stream(device)
