"""Measure what weights of 8 bits cost and gain when generating on the CPU.

    python -m benchmarks.int8 loss              # the demo model, on the demo's held-out recordings
    python -m benchmarks.int8 speed             # the true size of small, with random weights

Run it in the project's root. `loss` gives the cross entropy of the held-out tokens, in nats, and
the share of tokens for which the likeliest code stays the same. `speed` gives the steps a second of
one piece and of eight at once, in turns with float32; each figure is the median of its turns.

Letters: B clips, K codebooks, T token frames, S pattern steps.
"""

import copy
import statistics
from pathlib import Path

import fire
import torch
from torch.nn import functional as F

from benchmarks.gpu import random_model, timed
from musicgen import generation
from musicgen.codec import encode_audio
from musicgen.conditions import Conditions
from musicgen.generation import Piece
from musicgen.int8 import int8
from musicgen.load import Model, load_model
from musicgen.network import Network
from musicgen.projection import packed
from musicgen.sampling import Sampling
from recordings.audio import probe, read_crop

CPU = torch.device("cpu")
WAYS = {"float32": packed, "int8": int8}


def loss(model_id: str = "demo", folder: str = "demo/dataset/valid") -> None:
    """Compare the cross entropy of recordings, with their captions, up to a window of each."""
    found: dict[str, list[torch.Tensor]] = {way: [] for way in WAYS}
    targets = []
    for way, project in WAYS.items():
        model = load_model(model_id, CPU)
        network = Network(model.lm, project)
        for path in sorted(Path(folder).glob("*.wav")):
            logits, codes = _predict(model, network, path)
            found[way].append(logits)
            if way == "float32":
                targets.append(codes)
    target = torch.cat(targets)
    exact = torch.cat(found["float32"])
    for way, parts in found.items():
        logits = torch.cat(parts)
        same = (logits.argmax(-1) == exact.argmax(-1)).float().mean()
        print(f"{way:8} {F.cross_entropy(logits, target):.4f} nats, {same:.1%} the same code")
    print(f"{len(target)} tokens")


@torch.no_grad()
def _predict(model: Model, network: Network, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits `[tokens, card]` and the tokens of a recording's beginning."""
    lm, rate = model.lm, probe(path).sample_rate
    frames = min(probe(path).frames, round(model.max_duration * rate))
    wav = read_crop(path, 0, frames, model.sample_rate, model.audio_channels)
    codes = encode_audio(model, torch.from_numpy(wav)[None])
    pattern = lm.pattern_provider.get_pattern(codes.shape[-1])
    sequence, _, _ = pattern.build_pattern_sequence(codes, lm.special_token_id)
    caption = path.with_suffix(".txt").read_text().strip()
    condition = Conditions(model, None, guided=False).at(caption, 0)
    S = sequence.shape[-1] - 1
    cache = network.cache([[condition.cross]], S)
    x = network.run(network.embed(sequence[..., :-1]), torch.arange(S), cache, S)
    logits = network.logits(x[0]).flatten(0, 1)  # [S * K, card]
    following = sequence[0, :, 1:].T.flatten()
    is_real = following != lm.special_token_id
    return logits[is_real], following[is_real]


def speed(seconds: float = 5.0, repeats: int = 3, at_once: int = 8) -> None:
    """Compare the speed at the true size of small."""
    model = random_model("small", CPU, torch.float32)
    networks = {way: Network(copy.deepcopy(model.lm), project) for way, project in WAYS.items()}
    for pieces in (1, at_once):
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(repeats):
            for way, network in networks.items():
                times[way].append(_seconds(model, network, pieces, seconds))
        for way in WAYS:
            taken = statistics.median(times[way])
            gain = statistics.median(times["float32"]) / taken
            steps = seconds * model.frame_rate / taken
            print(f"{way:8} {pieces} at once: {steps:6.1f} steps/s, {gain:.2f} x", flush=True)


def _seconds(model: Model, network: Network, pieces: int, seconds: float) -> float:
    blocks = generation.generate_blocks(
        model,
        [Piece("music", number) for number in range(pieces)],
        duration_sec=seconds,
        overlap_sec=generation.default_overlap_sec(model),
        seed=0,
        sampling=Sampling(),
        network=network,
    )
    return timed(lambda: list(blocks), CPU)


if __name__ == "__main__":
    fire.Fire({"loss": loss, "speed": speed})
