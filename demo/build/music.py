"""Render the music for the demo's model into demo/output/build/, or the demo's dataset.

pretrain/ is for codec and language model, pretrain_valid/ to measure both, codec/ only for the
codec, style/ for the judge of instruments; `dataset` renders demo/dataset/. No piece is in two of
them, except that codec/ shares pieces with pretrain/ and style/.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np

from demo.build.render import (
    CODEC_ONLY,
    INSTRUMENTS,
    RATE,
    STYLE,
    Instrument,
    Performance,
    write_pair,
)
from demo.build.scores import Piece, chorales, harmonise, oneill_jigs, ryan

WORK = Path("demo/output/build")  # relative to the project's root
DATASET = Path("demo/dataset")
SECONDS = 30.0  # of a pretraining clip
RENDERINGS = {"chorale": 3}  # of each piece, with different instruments and keys; else 2
VALID_EVERY = 20  # one piece in so many is held out of pretraining
CODEC_CLIPS = 360
STYLE_CLIPS = 50  # of the demo's style, for the judge
TRAIN_JIGS, VALID_JIGS = 10, 4
JIG_SECONDS, VALID_SECONDS = 10.5, 9.0
DATASET_RATE = 24000  # Hz: an ocarina has nothing above 12 kHz, and the files are smaller

Job = tuple[Path, str, Performance, float]  # folder, name, performance, seconds


def build_pretrain() -> None:
    """Render chorales and tunes other than jigs on eight instruments; for the codec on others."""
    pieces = [*chorales(), *(harmonise(piece) for piece in ryan() if piece.kind != "jig")]
    pieces = [piece for piece in pieces if piece.bar_length in (2, 3, 4)]
    jobs: list[Job] = []
    for index, piece in enumerate(pieces):
        folder = WORK / ("pretrain_valid" if index % VALID_EVERY == 0 else "pretrain")
        rng = np.random.default_rng((0, index))
        for player in rng.permutation(len(INSTRUMENTS))[: RENDERINGS.get(piece.kind, 2)]:
            performance = _perform(piece, INSTRUMENTS[player], len(jobs), rng)
            jobs.append((folder, f"{len(jobs):05d}", performance, SECONDS))
    print(f"{len(pieces)} pieces, {len(jobs)} clips for pretraining", flush=True)
    others = [piece for index, piece in enumerate(pieces) if index % VALID_EVERY]
    others += [harmonise(piece) for piece in _jigs()[TRAIN_JIGS + VALID_JIGS :]]
    rng = np.random.default_rng(1)
    for index, choice in enumerate(rng.permutation(len(others))[:CODEC_CLIPS]):
        player = CODEC_ONLY[index % len(CODEC_ONLY)]
        performance = _perform(others[choice], player, index, rng)
        jobs.append((WORK / "codec", f"{index:05d}", performance, SECONDS))
    for index, piece in enumerate(_jigs()[TRAIN_JIGS + VALID_JIGS :][:STYLE_CLIPS]):
        performance = _perform(piece, STYLE, index, rng)
        jobs.append((WORK / "style", f"{index:05d}", performance, SECONDS))
    _write(jobs)


def build_dataset() -> None:
    """Render O'Neill's jigs on the ocarina: the first ones to train on, the next held out."""
    jobs: list[Job] = []
    rng = np.random.default_rng(2)
    for index, piece in enumerate(_jigs()[: TRAIN_JIGS + VALID_JIGS]):
        is_train = index < TRAIN_JIGS
        performance = Performance(piece, STYLE, int(rng.integers(104, 121)), seed=index)
        folder = DATASET / ("train" if is_train else "valid")
        title = "_".join(piece.title.lower().strip(".").replace("'", "").split())
        jobs.append((folder, title, performance, JIG_SECONDS if is_train else VALID_SECONDS))
    _write(jobs, DATASET_RATE)


def _jigs() -> Sequence[Piece]:
    """Return O'Neill's jigs in a major key, without other settings of the same tune."""
    jigs = [piece for piece in oneill_jigs() if piece.mode == "major"]
    return [
        Piece(**{**piece.__dict__, "kind": "jig"})
        for piece in jigs
        if not any(word in piece.title for word in ("Setting", "No.", "("))
    ]


def _perform(
    piece: Piece, instrument: Instrument, seed: int, rng: np.random.Generator
) -> Performance:
    low, high = (60, 96) if piece.kind == "chorale" else (88, 132)
    bpm = int(rng.integers(low, high + 1)) // 4 * 4
    return Performance(piece, instrument, bpm, int(rng.integers(-5, 7)), seed)


def _write(jobs: list[Job], rate: int = RATE) -> None:
    for folder in {job[0] for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(write_pair, *zip(*jobs, strict=True), repeat(rate), chunksize=32):
            pass


if __name__ == "__main__":
    {"pretrain": build_pretrain, "dataset": build_dataset}[sys.argv[1]]()
