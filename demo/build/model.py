"""Make the demo's model: `make demo-model` runs this after the music is rendered.

    python -m demo.build.model

Trains the codec if that has not been done, then the language model from random weights with this
project's own trainer, both on demo/output/build/; writes demo/model/ in audiocraft's exported
format. A build that was stopped continues where it was.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from demo import tiny
from demo.build import codec
from demo.build.music import WORK
from demo.build.render import CODEC_ONLY, INSTRUMENTS, KEYS, STYLE
from demo.demo import run

START, PRETRAINED = WORK / "start", WORK / "pretrained"
MODEL = Path("demo/model")
WINDOW_SEC = 10.0
LM: dict[str, Any] = {"dim": 192, "num_heads": 6, "num_layers": 5, "t5_dim": 64}
WORDS = " ".join(
    [
        "calm stately solemn lively merry bright solo played on the in bpm Irish",
        "chorale reel hornpipe jig strathspey clog waltz polka fling",
        *(instrument.name for instrument in (*INSTRUMENTS, *CODEC_ONLY, STYLE)),
        *KEYS,
        tiny.WORDS,
    ]
)
PRETRAIN = {
    "model_id": START,
    "dataset_path": WORK / "pretrain",
    "valid_path": WORK / "pretrain_valid",
    "output_dir": PRETRAINED,
    "duration": WINDOW_SEC,
    "max_steps": 2600,
    "batch_size": 8,
    "grad_acc": 1,
    "lr": 2e-3,
    "warmup_steps": 100,
    "weight_decay": 0.01,
    "use_cfg": 1,
    "cfg_p": 0.1,
    "precision": "bf16",
    "valid_step": 400,
    "save_step": 200,
    "keep_checkpoints": 1,
}


def main() -> None:
    if not codec.EXPORTED.exists():
        codec.main()
    if not (START / "compression_state_dict.bin").exists():
        sizes = codec.SIZES["seanet"]
        tiny.build_musicgen(
            START,
            **LM,
            card=codec.CARD,
            n_filters=sizes["n_filters"],
            codec_dim=sizes["dimension"],
            segment_sec=WINDOW_SEC,
            words=WORDS,
        )
    # the codec as it is shipped: the language model must learn the codes of that one
    shutil.copy(codec.EXPORTED, START / "compression_state_dict.bin")
    if not (PRETRAINED / "lm_final.pt").exists():
        run("run.py", PRETRAIN | {"resume": int((PRETRAINED / "resume.pt").exists())})
    shutil.copy(PRETRAINED / "training.png", Path(__file__).with_suffix(".png"))
    export()


def export() -> None:
    """Make demo/model/ from the result of pretraining."""
    shutil.copytree(START, MODEL, dirs_exist_ok=True)
    package = torch.load(START / "state_dict.bin", weights_only=True)
    lm = torch.load(PRETRAINED / "lm_final.pt", weights_only=True)
    package["best_state"] = {name: tensor.half() for name, tensor in lm.items()}
    torch.save(package, MODEL / "state_dict.bin")


if __name__ == "__main__":
    main()
