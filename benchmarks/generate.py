"""Compare the speed of generation with audiocraft's, transformers' and what memory allows.

    python -m benchmarks.generate                             # small and demo, 10 s of music
    python -m benchmarks.generate --models=demo --repeats=9

Run it in the project's root. It downloads nothing: the models have their true size and random
weights, in float32 on the CPU and float16 on a GPU. Each way has a model of its own, so small takes
10 GB. In one process the ways take turns, and each figure is the median of its turns. All use
guidance and top-k; conditions are random, and EnCodec doesn't run. Ours is as in generate.py,
audiocraft's is `LMModel.generate`, and transformers' is a loop around its decoder, with a cache
that grows and with one of fixed size.

A step makes one code of each codebook. "of the limit" is the time that a step must take, over the
time that it takes: memory must deliver the matrices of the layers and heads once, without those
that make keys and values of the conditions. Memory's rate is that of a sum over 4 GB in the same
process, between the turns.

Letters: K codebooks, R rows (with and without conditions).
"""

import functools
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import torch
from transformers import DynamicCache, EncoderDecoderCache, MusicgenForCausalLM, StaticCache
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

import musicgen  # noqa: F401  (stands in for the xformers that audiocraft imports)

# isort: split
from audiocraft.modules.conditioners import ConditioningAttributes
from audiocraft.modules.transformer import StreamingTransformerLayer
from audiocraft.utils.utils import sample_top_k

from benchmarks.gpu import print_head, print_row, random_model, timed
from musicgen import generation
from musicgen.device import choose_device
from musicgen.generation import Piece
from musicgen.load import Model
from musicgen.network import Network
from musicgen.projection import packed, plain
from musicgen.sampling import Sampling
from training.memory import CAPTION_TOKENS

TOP_K, GUIDANCE = 250, 3.0
AT_ONCE = 8
SUMMED = 10**9  # numbers of 4 bytes
Way = Callable[[float], Any]  # generates that many seconds


def our_ways(model: Model) -> dict[str, Way]:
    """Return the ways of generate.py; on the CPU nothing else can use the model then."""
    network = Network(model.lm, packed if model.device.type == "cpu" else plain)
    sampling = Sampling(top_k=min(TOP_K, model.lm.card), cfg_coef=GUIDANCE)

    def generate(pieces: int, seconds: float) -> None:
        blocks = generation.generate_blocks(
            model,
            [Piece("music", number) for number in range(pieces)],
            duration_sec=seconds,
            overlap_sec=generation.default_overlap_sec(model),
            seed=0,
            sampling=sampling,
            network=network,
            batch_size=pieces,
        )
        for _ in blocks:
            pass

    ways = {"ours": 1, f"ours, {AT_ONCE} at once": AT_ONCE}
    return {name: functools.partial(generate, pieces) for name, pieces in ways.items()}


def audiocraft_way(model: Model) -> Way:
    """Return the way of audiocraft's MusicGen.generate."""
    lm: Any = model.lm
    for layer in lm.transformer.layers:
        layer.__class__ = StreamingTransformerLayer  # without our changes
    conditions = [ConditioningAttributes(text={"description": "music"})]

    def generate(seconds: float) -> None:
        frames = generation.to_frames(model, seconds)
        how = {"top_k": min(TOP_K, lm.card), "cfg_coef": GUIDANCE}
        lm.generate(None, conditions, max_gen_len=frames, **how)

    return generate


def transformers_ways(model: Model) -> dict[str, Way]:
    """Return a loop around transformers' decoder of the same size, with either cache."""
    lm: Any = model.lm
    sizes = lm.cfg.transformer_lm
    config = MusicgenDecoderConfig(
        vocab_size=sizes.card,
        num_codebooks=sizes.n_q,
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        ffn_dim=sizes.dim * sizes.hidden_scale,
        pad_token_id=sizes.card,
        bos_token_id=sizes.card,
    )
    decoder: Any = MusicgenForCausalLM(config).eval()
    decoder.to(model.device, next(lm.parameters()).dtype)
    K, top_k = sizes.n_q, min(TOP_K, sizes.card)
    text = torch.randn(2, CAPTION_TOKENS, sizes.dim).to(decoder.device, decoder.dtype)

    @torch.inference_mode()
    def generate(is_fixed: bool, seconds: float) -> None:
        steps = count_steps(model, seconds)
        own: Any = StaticCache(config, steps) if is_fixed else DynamicCache(config=config)
        cache = EncoderDecoderCache(own, DynamicCache(config=config))
        tokens = torch.full((2 * K, 1), sizes.card, device=decoder.device)  # [R * K, 1]
        for _ in range(steps):
            logits = decoder(tokens, None, text, None, cache).logits[:, -1].view(2, K, -1)
            given, null = logits.float().unbind()
            probs = torch.softmax(null + (given - null) * GUIDANCE, dim=-1)
            tokens = sample_top_k(probs, k=top_k).repeat(2, 1)

    return {
        f"transformers, {name} cache": functools.partial(generate, is_fixed)
        for name, is_fixed in {"growing": False, "fixed": True}.items()
    }


def count_steps(model: Model, seconds: float) -> int:
    """Return the steps of a piece: its frames and the longest delay."""
    pattern = model.lm.pattern_provider.get_pattern(generation.to_frames(model, seconds))
    return len(pattern.layout) - 1  # the first one is given


def bytes_read(model: Model) -> int:
    """Return the bytes of weights that a step must read."""
    lm: Any = model.lm
    total = 0
    for layer in lm.transformer.layers:
        total += sum(p.nbytes for p in layer.parameters() if p.ndim > 1)
        if layer.cross_attention is not None:
            total -= layer.cross_attention.in_proj_weight.nbytes * 2 // 3
    return total + sum(p.nbytes for p in lm.linears.parameters() if p.ndim > 1)


def measure(model_id: str, seconds: float, repeats: int) -> None:
    """Print the table of one model."""
    device = choose_device("auto")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    ours, theirs = (random_model(model_id, device, dtype) for _ in range(2))
    needed, steps = bytes_read(ours), count_steps(ours, seconds)
    ways = {**our_ways(ours), "audiocraft": audiocraft_way(theirs), **transformers_ways(theirs)}
    numbers = torch.ones(SUMMED, device=device)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    summing: list[float] = []
    for way in ways.values():  # warms up
        way(seconds / 10)
    numbers.sum()
    for _ in range(repeats):
        for name, way in ways.items():
            taken[name].append(timed(functools.partial(way, seconds), device))
            summing.append(timed(numbers.sum, device))
    bandwidth = numbers.nbytes / statistics.median(summing)
    print(f"\n{model_id}: {needed / 1e6:.0f} MB a step; {bandwidth / 1e9:.1f} GB/s")
    medians = {name: statistics.median(times) for name, times in taken.items()}
    print_head("way", "steps/s", "x real time", "ours / this", "of the limit")
    for name, median in medians.items():
        pieces = AT_ONCE if "at once" in name else 1
        ratio = median / pieces / medians["ours"]
        limit = steps * needed / bandwidth
        cells = [f"{steps / median:.2f}", f"{pieces * seconds / median:.3f}"]
        print_row([name, *cells, f"{ratio:.2f}", f"{limit / median:.0%}"], 5)


def about() -> str:
    """Return the processor, the threads that torch uses, the card if there is one, and torch."""
    name, cpus = platform.machine(), Path("/proc/cpuinfo")
    if cpus.exists():
        lines = cpus.read_text(encoding="utf-8").splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads{card}, torch {torch.__version__}"


def main(
    models: str | tuple[str, ...] = "small,demo", seconds: float = 10.0, repeats: int = 3
) -> None:
    """Print a table for each model.

    Args:
        models: names, with commas.
        seconds: music of a piece.
        repeats: timed turns of each way.
    """
    print(about())
    for name in models.split(",") if isinstance(models, str) else models:
        measure(name, seconds, repeats)


if __name__ == "__main__":
    fire.Fire(main)
