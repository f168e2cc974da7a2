"""`make demo`: teach the tiny MusicGen in demo/model/ a style; hear and see what changed.

Takes two minutes on two cores. Everything it makes is in demo/output/: delete that to start afresh.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from demo.measure import Audio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python demo/demo.py` puts only demo/ there

DATASET, WORK = Path("demo/dataset"), Path("demo/output")  # relative to ROOT
MODELS, BEFORE, AFTER = WORK / "models", WORK / "before", WORK / "after"
PICTURE = WORK / "before_after.png"
PROMPTS = [
    "a lively Irish jig for ocarina in D major, 112 bpm",
    "Irish jig played on the ocarina, merry, 108 bpm, in G major",
]
TRAIN = {
    "dataset_path": DATASET / "train",
    "valid_path": DATASET / "valid",
    "model_id": "demo",
    "output_dir": MODELS,
    "overwrite": 1,
    "duration": 6,
    "max_steps": 120,
    "batch_size": 5,
    "grad_acc": 1,
    "lr": 1e-3,
    "warmup_steps": 5,
    "use_cfg": 1,
    "valid_step": 40,
}
GENERATE: dict[str, Any] = {
    "prompt": json.dumps(PROMPTS),
    "model_id": "demo",
    "duration": 8,
    "variations": 4,
    "top_k": 50,  # of 512 codes: so small a model is too unsure for the default of 250
    "temperature": 0.8,
    "overwrite": 1,
}


def main() -> None:
    run("generate.py", {**GENERATE, "weights_path": None, "output_dir": BEFORE})
    run("run.py", TRAIN)
    run("generate.py", {**GENERATE, "weights_path": MODELS / "lm_final.pt", "output_dir": AFTER})
    print(summary())


def run(script: str, flags: dict[str, Any], *, quiet: bool = False) -> None:
    """Run one of the project's scripts as a user would; exit if it fails."""
    words = [script, *(f"--{name}={value}" for name, value in flags.items())]
    if not quiet:
        print(f"\n$ python {shlex.join(words)}", flush=True)
    output = subprocess.DEVNULL if quiet else None
    code = subprocess.run(
        [sys.executable, *words], cwd=ROOT, stdout=output, stderr=output
    ).returncode
    if code:
        sys.exit(code)


class Changes(NamedTuple):
    """Pieces before and after, the held-out clips, and numbers (before, after)."""

    before: list["Audio"]
    after: list["Audio"]
    held_out: list["Audio"]
    losses: tuple[float, float]  # nats a token, on the held-out clips
    distances: tuple[float, float]  # Fréchet, from the held-out clips
    heard: tuple[int, int]  # pieces in which the judge hears the style's instrument


def changes(models: Path, before: Path, after: Path) -> Changes:
    """Find what the run in `models` changed, from its log and the wav files in two folders."""
    from demo import measure
    from training.report import read_rows

    losses = [
        row["valid_loss"] for row in read_rows(models / "metrics.jsonl") if "valid_loss" in row
    ]
    old, new, held_out = (
        [measure.read(path) for path in sorted(folder.glob("*.wav"))]
        for folder in (before, after, ROOT / DATASET / "valid")
    )
    judge = measure.Judge()
    heard = [sum(judge.verdict(wav) == "ocarina" for wav in wavs) for wavs in (old, new)]
    distances = [measure.frechet_distance(wavs, held_out) for wavs in (old, new)]
    return Changes(
        old,
        new,
        held_out,
        (losses[0], losses[-1]),
        (distances[0], distances[1]),
        (heard[0], heard[1]),
    )


def summary() -> str:
    """Draw the picture; return what changed, in numbers, and where to look and listen."""
    from demo import measure

    found = changes(ROOT / MODELS, ROOT / BEFORE, ROOT / AFTER)
    measure.draw_before_after(found.before, found.after, found.held_out, ROOT / PICTURE)
    losses, distance, heard = found.losses, found.distances, found.heard
    return f"""
The model knew other instruments and other tunes. {TRAIN["max_steps"]} steps on \
{len(list((ROOT / DATASET / "train").glob("*.wav")))} short recordings of jigs on the
ocarina changed this, on tunes and prompts that it was not trained on:

                                                        before    after
  loss on held-out jigs (nats a token)                  {losses[0]:6.2f}   {losses[-1]:6.2f}
  distance of its music from them (Fréchet)             {distance[0]:6.0f}   {distance[1]:6.0f}
  pieces of {len(found.before)} in which a judge hears an ocarina     {heard[0]:6}   {heard[1]:6}

  Listen:  {BEFORE}/*.wav and {AFTER}/*.wav, the same prompts and seeds;
           {DATASET}/train/*.wav, what it learned from
  Look:    {PICTURE}, {MODELS}/training.png
  Use:     {MODELS}/lm_final.pt, the trained weights

It is 900 times smaller than MusicGen's large, so don't expect a concert. For real music,
fine-tune a published model on your own recordings:

  python run.py --dataset_path=my_music"""


if __name__ == "__main__":
    main()
