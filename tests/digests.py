"""Train ten short runs with a checkout of this project and print digests of what they leave.

    python tests/digests.py CHECKOUT WORK

Two commits train alike, bit for bit, when both print the same lines:

    python tests/digests.py ANOTHER_CHECKOUT /tmp/work > before.txt
    python tests/digests.py . /tmp/work > after.txt
    diff before.txt after.txt

A line is CONFIG FILE SHA256. The digest covers the tensors in a file (name, dtype, shape, bytes),
not how they are packed; for metrics.jsonl it covers the rows without their times. WORK/inputs holds
the models and recordings: the first call makes them with its checkout's code, later calls reuse
them. WORK/<commit>/<config> holds a run's files and its log.

Compare on one machine with one set of packages: others may round differently. All steps of a run
have the same number of clips, so it does not matter how an epoch with a remainder is cut.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soundfile
import torch
from safetensors.torch import load_file, save_file

TIMES = ("ms", "clips_per_sec")  # keys of a row in metrics.jsonl that differ from run to run
Flags = dict[str, Any]
COMMON: Flags = {  # six steps, each of 4 of the 8 clips
    **{"model_id": "mono", "dataset_path": "music", "duration": 1, "batch_size": 2, "grad_acc": 2},
    **{"epochs": 3, "save_step": 3, "warmup_steps": 2, "lr": 1e-3, "device": "cpu"},
    "num_workers": 0,
}
CONFIGS: dict[str, Flags] = {
    "all": {"valid_path": "held_out"},
    "text": {"tune_text": 1},
    "lora": {"lora_rank": 4, "lora_dropout": 0.1},
    "word": {"placeholder": "<my-style>", "lr": 1e-2},
    "cfg": {
        **{"dataset_path": "fields", "merge_text_p": 0.7},
        **{"use_cfg": 1, "cfg_p": 0.3, "word_dropout": 0.2},
    },
    "ema": {"ema_decay": 0.9, "valid_split": 0.5, "grad_acc": 1},
    "stereo": {"model_id": "stereo"},
    "melody": {"model_id": "melody"},
    "tokens": {"cache_tokens": 1},
    "shards": {"dataset_path": "train-{0..1}.tar"},
}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python digests.py CHECKOUT WORK")
    checkout, work = (Path(word).resolve() for word in sys.argv[1:])
    inputs = make_inputs(checkout, work)
    for config, flags in CONFIGS.items():
        folder = work / commit(checkout) / config
        shutil.rmtree(folder, ignore_errors=True)
        train(checkout, folder, inputs, flags)
        for name, value in digests(folder / "models").items():
            print(config, name, value, flush=True)


def commit(checkout: Path) -> str:
    """Return the checkout's short commit, marked if its files have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.check_output(command, cwd=checkout, text=True).strip()


def train(checkout: Path, folder: Path, inputs: Path, flags: Flags) -> None:
    """Run the checkout's run.py; leaves models/, cache/ and log.txt in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        ended = subprocess.run(**how(checkout, folder, inputs, flags), stdout=log, stderr=log)
    if ended.returncode:
        sys.exit(f"{(folder / 'log.txt').read_text()[-2000:]}\n{folder}: run.py failed")


def how(checkout: Path, folder: Path, inputs: Path, flags: Flags) -> dict[str, Any]:
    """Return subprocess's arguments for run.py: offline, on one thread, with its own cache."""
    given = {**COMMON, **flags, "output_dir": folder / "models"}
    for name in ("model_id", "dataset_path", "valid_path"):
        if name in given:
            given[name] = inputs / given[name]
    environment = {
        **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(inputs / "hf_home")},
        **{"XDG_CACHE_HOME": str(folder / "cache"), "MPLCONFIGDIR": str(inputs / "matplotlib")},
    }
    return {
        "args": [sys.executable, "run.py", *(f"--{name}={given[name]}" for name in given)],
        "cwd": checkout,
        "env": {**os.environ, **environment},
        "stdin": subprocess.DEVNULL,
    }


def digests(models: Path) -> dict[str, str]:
    """Return the digests of all files with tensors below a folder, and of metrics.jsonl."""
    found = {}
    for path in sorted(p for p in models.rglob("*") if p.suffix in (".pt", ".safetensors")):
        name = path.relative_to(models).as_posix()
        if path.suffix == ".safetensors":
            found[name] = digest(load_file(path))
        elif name == "resume.pt":
            state = torch.load(path, weights_only=True)
            parts = [part for part in ("weights", "optimizer", "ema") if state.get(part)]
            found |= {f"{name}:{part}": digest(state[part]) for part in parts}
        else:
            found[name] = digest(torch.load(path, weights_only=True))
    rows = map(json.loads, (models / "metrics.jsonl").read_text().splitlines())
    untimed = [{key: row[key] for key in sorted(row) if key not in TIMES} for row in rows]
    found["metrics.jsonl"] = hashlib.sha256(json.dumps(untimed).encode()).hexdigest()
    return found


def digest(content: Any) -> str:
    """Hash the tensors in nested dicts and lists, in the order of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors(content)):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def tensors(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested dicts and lists, under names such as /state/0/exp_avg."""
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, dict | list):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in pairs:
            yield from tensors(value, f"{name}/{key}")


def make_inputs(checkout: Path, work: Path) -> Path:
    """Return WORK/inputs, made with the checkout's code if it is not there yet."""
    inputs, unfinished = work / "inputs", work / "inputs.unfinished"
    if inputs.exists():
        return inputs
    shutil.rmtree(unfinished, ignore_errors=True)
    sys.path.insert(0, str(checkout))
    torch.set_num_threads(1)
    import musicgen  # noqa: F401  (before audiocraft)
    from demo.tiny import build_musicgen

    build_musicgen(unfinished / "mono", segment_sec=20.0, dropout=0.1)  # to depend on the seeds
    build_musicgen(unfinished / "stereo", segment_sec=20.0, stereo=True)
    build_musicgen(unfinished / "melody", segment_sec=20.0, melody=True)
    build_demucs(unfinished / "hf_home" / "hub" / "models--adefossez--HTDemucs")
    write_clips(unfinished / "music", range(8))
    write_clips(unfinished / "held_out", range(8, 10))
    write_clips(unfinished / "fields", range(8), with_fields=True)
    for shard in (0, 1):
        with tarfile.open(unfinished / f"train-{shard}.tar", "w") as tar:
            for path in sorted((unfinished / "music").iterdir())[shard * 8 :][:8]:
                tar.add(path, path.name)
    return unfinished.rename(inputs)


def write_clips(folder: Path, numbers: range, *, with_fields: bool = False) -> None:
    """Write recordings of various lengths (one of them padded), rates and channels; captions."""
    from demo.music import song

    folder.mkdir()
    for i in numbers:
        rate = 44_100 if i % 4 == 3 else 32_000
        wav, caption = song(i, 0.7 + 0.4 * i, rate)
        soundfile.write(folder / f"clip{i}.wav", 0.7 * wav[: 1 + i % 2].T, rate)
        facts = {"description": caption, "genre": "folk", "bpm": 90 + i, "moods": ["calm"]}
        text = json.dumps(facts) if with_fields else caption
        (folder / f"clip{i}").with_suffix(".json" if with_fields else ".txt").write_text(text)


def build_demucs(repo: Path) -> None:
    """Put a small random demucs into a Hugging Face cache, as htdemucs."""
    from demucs.htdemucs import HTDemucs

    sizes = {"channels": 8, "t_layers": 1, "t_heads": 2, "segment": 1.0}
    settings = {"sources": ["drums", "bass", "other", "vocals"], **sizes}
    snapshot = repo / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("1")
    (snapshot / "htdemucs.yaml").write_text("models: [tiny]\n")
    torch.manual_seed(0)
    klass = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(settings)}
    save_file(HTDemucs(**settings).state_dict(), snapshot / "tiny.safetensors", klass)


if __name__ == "__main__":
    main()
