"""`make demo`: fine-tune a tiny MusicGen on a small dataset, then generate with it; about a minute.

Everything is in demo/work/: delete it to start afresh.
"""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("demo/work")  # relative to ROOT, where everything below runs
MODEL, DATASET, MODELS, GENERATED = (
    WORK / name for name in ("model", "dataset", "models", "generated")
)
CLIPS = 8
CARD = 64  # codebook size
TRAIN = {
    "dataset_path": DATASET,
    "model_id": MODEL,
    "output_dir": MODELS,
    "overwrite": 1,
    "duration": 10,
    "max_steps": 60,
    "batch_size": 3,
    "grad_acc": 1,
    "lr": 1e-3,
    "warmup_steps": 5,
    "use_cfg": 1,
    "valid_split": 0.25,
    "valid_step": 15,
    "sample_step": 60,
    "sample_duration": 5,
    "save_step": 30,
}
GENERATE = {
    "prompt": "a slow, wistful plucked guitar waltz in A minor, 84 bpm, with soft bass",
    "weights_path": MODELS / "lm_final.pt",
    "model_id": MODEL,
    "duration": 5,
    "output": GENERATED,
    "overwrite": 1,
}


def main() -> None:
    sys.path.insert(0, str(ROOT))  # `python demo/demo.py` only has demo/ in it
    from demo.music import build_dataset
    from demo.tiny import build_musicgen

    if len(list((ROOT / DATASET).glob("*.txt"))) < CLIPS:
        print(f"Synthesising {CLIPS} clips of music, with captions, in {DATASET}", flush=True)
        build_dataset(ROOT / DATASET, clips=CLIPS)
    if not (ROOT / MODEL / "compression_state_dict.bin").exists():  # the last of its files
        print(f"Building a tiny MusicGen with random weights in {MODEL}", flush=True)
        build_musicgen(ROOT / MODEL, card=CARD)
    run("run.py", TRAIN)
    run("generate.py", GENERATE)
    print(summary())


def run(script: str, flags: dict[str, object]) -> None:
    """Run one of the project's scripts as a user would; ends the demo if it fails."""
    words = [script, *(f"--{name}={value}" for name, value in flags.items())]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def summary() -> str:
    """What was made, where to look and listen, and what to expect of it."""
    rows = [json.loads(line) for line in (ROOT / MODELS / "metrics.jsonl").open(encoding="utf-8")]
    losses = [row["valid_loss"] for row in rows if "valid_loss" in row]
    return f"""
Done: {TRAIN["max_steps"]} steps on {DATASET}/. On the held-out clips the loss fell from
{losses[0]:.2f} to {losses[-1]:.2f} nats a token; guessing blindly gives {math.log(CARD):.2f}.

  {MODELS}/training.png    the loss curves
  {MODELS}/samples/        the model before and after training
  {MODELS}/lm_final.pt     the trained weights, for model.lm.load_state_dict
  {GENERATED}/             what generate.py made with them
  {DATASET}/               the music it was trained on: this is worth hearing

The tiny model starts from random weights, and so does its codec: what it plays is noise before and
after training, and only the falling loss shows that it learns. To hear music, fine-tune a
published model on your own recordings:

  python run.py --dataset_path=my_music"""


if __name__ == "__main__":
    main()
