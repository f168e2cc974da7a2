"""Fit the demo's judge of instruments on rendered clips: `python -m demo.build.judge`.

Writes demo/judge.json, a logistic regression on timbre. Clips are also passed through the codec,
so that the judge knows how instruments sound after it.
"""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from demo.build.music import WORK
from demo.build.render import INSTRUMENTS, STYLE
from demo.measure import JUDGE, RATE, features
from musicgen import load

NAMES = [instrument.name for instrument in (*INSTRUMENTS, STYLE)]
CLIPS = 40  # of each instrument
CLIP_SEC = 8


def main() -> None:
    model = load.load_model("demo", torch.device("cpu"))
    styles = sorted((WORK / "style").glob("*.txt"))
    held_out = _clips([*sorted((WORK / "pretrain_valid").glob("*.txt")), *styles[CLIPS:]], 10)
    wavs, labels = _clips(sorted((WORK / "pretrain").glob("*.txt")), CLIPS)
    style, style_labels = _clips(styles, CLIPS)
    wavs, labels = wavs + style, labels + style_labels
    rows, row_labels = _rows(model, wavs, labels)
    scaler = StandardScaler().fit(rows)
    classifier = LogisticRegression(C=0.1, max_iter=2000).fit(scaler.transform(rows), row_labels)
    state = {
        "instruments": classifier.classes_.tolist(),
        "mean": scaler.mean_.round(6).tolist(),
        "scale": scaler.scale_.round(6).tolist(),
        "weights": classifier.coef_.T.round(6).tolist(),
        "bias": classifier.intercept_.round(6).tolist(),
    }
    JUDGE.write_text(json.dumps(state) + "\n")
    rows, row_labels = _rows(model, *held_out)
    right = classifier.score(scaler.transform(rows), row_labels)
    print(f"judge: right in {right:.1%} of held-out windows of 2 s, among {len(NAMES)} instruments")


def _clips(captions: list[Path], count: int) -> tuple[list[np.ndarray], list[str]]:
    wavs: list[np.ndarray] = []
    labels: list[str] = []
    for path in captions:
        name = next((name for name in NAMES if name in path.read_text()), None)
        if name and labels.count(name) < count:
            wav, _ = soundfile.read(path.with_suffix(".wav"), CLIP_SEC * RATE, dtype="float32")
            wavs.append(wav)
            labels.append(name)
    return wavs, labels


@torch.no_grad()
def _rows(
    model: load.Model, wavs: list[np.ndarray], labels: list[str]
) -> tuple[np.ndarray, list[str]]:
    """Return the features of every clip and of its copy from the codec, with labels."""
    rows, row_labels = [], []
    for wav, label in zip(wavs, labels, strict=True):
        codec = model.compression_model
        copy = codec.decode(codec.encode(torch.from_numpy(wav)[None, None])[0])[0, 0].numpy()
        for sound in (wav, copy):
            found = features(sound)
            rows.append(found)
            row_labels += [label] * len(found)
    return np.concatenate(rows), row_labels


if __name__ == "__main__":
    main()
