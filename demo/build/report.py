"""Measure the demo's model on held-out music: `python -m demo.build.report`.

Needs the music of `python -m demo.build.music pretrain`; writes report.json beside this file.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo import measure
from demo.build.music import WORK
from demo.build.render import INSTRUMENTS
from demo.demo import GENERATE
from musicgen import codec, generation, load, sampling
from musicgen.loss import TokenLoss, token_counts
from musicgen.text import TextEncoder

CLIP_SEC = 10


def main() -> None:
    model = load.load_model("demo", torch.device("cpu"))
    held_out = sorted((WORK / "pretrain_valid").glob("*.wav"))[::2]
    others = sorted((WORK / "pretrain").glob("*.wav"))[::8]
    report = {
        "held-out clips": len(held_out),
        "codec": codec_quality(model, held_out),
        "language model": cross_entropies(model, held_out, others),
        "prompts": prompts_told_apart(model),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


@torch.no_grad()
def codec_quality(model: load.Model, paths: list[Path]) -> dict[str, Any]:
    """Measure the codec: entries in use by codebook, distances, and the share of notes kept."""
    codec = model.compression_model
    used: list[set[int]] = [set() for _ in range(codec.num_codebooks)]
    distortion, distance, kept = [], [], np.zeros(2)
    for path in paths:
        wav = _read(path)
        codes = codec.encode(torch.from_numpy(wav)[None, None])[0]
        copy = codec.decode(codes)[0, 0].numpy()[: len(wav)]  # without the last frame's padding
        for book, entries in zip(used, codes[0], strict=True):
            book.update(entries.tolist())
        distortion.append(measure.si_sdr(copy, wav))
        distance.append(measure.log_mel_distance(copy, wav))
        kept += measure.notes_kept(copy, wav)
    return {
        "entries used": [round(len(book) / codec.cardinality, 3) for book in used],
        "SI-SDR dB": round(float(np.mean(distortion)), 2),
        "log-mel distance dB": round(float(np.mean(distance)), 2),
        "notes within a semitone": round(kept[0] / kept[1], 3),
    }


@torch.no_grad()
def cross_entropies(model: load.Model, paths: list[Path], others: list[Path]) -> dict[str, Any]:
    """Return nats per token and codebook: model, frequencies of codes in `others`, chance."""
    lm, card = model.lm.eval(), model.lm.card
    counts = np.ones((lm.num_codebooks, card))
    for path in others:
        for book, codes in zip(counts, _codes(model, path)[0], strict=True):
            book += np.bincount(codes.numpy(), minlength=card)
    frequencies = np.log(counts / counts.sum(axis=1, keepdims=True))
    loss, text_encoder = TokenLoss(lm), TextEncoder(lm)
    sums, tokens = torch.zeros(2, lm.num_codebooks)
    unigram = np.zeros(lm.num_codebooks)
    for path in paths:
        codes = _codes(model, path)
        lengths = torch.tensor([codes.shape[-1]])
        text, mask = text_encoder(
            [path.with_suffix(".txt").read_text().strip()], torch.device("cpu")
        )
        sums += loss(codes, lengths, text, mask)[0]
        for k, entries in enumerate(codes[0]):
            unigram[k] -= frequencies[k][entries.numpy()].sum()
        tokens += token_counts(lm, lengths, codes.shape[-1])
    frames = len(paths) * CLIP_SEC * model.frame_rate
    return {
        "model": [round(value, 3) for value in (sums / tokens).tolist()],
        "unigram": [round(value, 3) for value in (unigram / frames).tolist()],
        "chance": round(float(np.log(card)), 3),
    }


def prompts_told_apart(model: load.Model, takes: int = 4, take_sec: float = 6.0) -> dict[str, Any]:
    """Count how often the judge hears the instrument that the prompt names, of all it knows."""
    judge, right = measure.Judge(), {}
    for instrument in INSTRUMENTS:
        wavs = generation.generate(
            model,
            [f"a calm chorale for {instrument.name} in G major, 76 bpm"],
            duration_sec=take_sec,
            overlap_sec=generation.default_overlap_sec(model),
            seed=0,
            variations=takes,
            sampling=sampling.Sampling(GENERATE["top_k"], temperature=GENERATE["temperature"]),
        )
        verdicts = [judge.verdict(wav[0].numpy()) for wav in wavs]
        right[instrument.name] = verdicts.count(instrument.name)
    share = sum(right.values()) / takes / len(right)
    chance = 1 / len(judge.instruments)
    return {"right": right, "of": takes, "share": round(share, 3), "chance": round(chance, 3)}


def _read(path: Path) -> measure.Audio:
    return measure.read(path)[: CLIP_SEC * measure.RATE]


def _codes(model: load.Model, path: Path) -> torch.Tensor:  # [1, K, T]
    return codec.encode_audio(model, torch.from_numpy(_read(path))[None, None])


if __name__ == "__main__":
    main()
