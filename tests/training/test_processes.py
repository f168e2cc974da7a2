"""Two processes on the CPU train like one with the same global batch; the first one writes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, write_pairs

from flags.run import Config
from train import train

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
}


def launch(
    launcher: str, *flags: object, script: Path = ROOT / "run.py"
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(script), *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def options(dataset: Path, model: Path, output: Path) -> dict[str, Any]:
    return {
        "dataset_path": str(dataset),
        "model_id": str(model),
        "output_dir": str(output),
        "device": "cpu",
        "duration": 3.0,
        "lr": 1e-4,
        "warmup_steps": 2,
        "epochs": 4,
        "num_workers": 0,
        "valid_path": str(dataset),
        "valid_step": 4,
    }


def flags(*paths: Path) -> list[str]:
    return [f"--{name}={value}" for name, value in options(*paths).items()]


def rows(output: Path) -> list[dict]:
    """The rows of metrics.jsonl without the times."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    timed = {"ms", "clips_per_sec"}
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def assert_same_run(left: Path, right: Path, tolerance: float) -> None:
    a, b = (torch.load(folder / "lm_final.pt", weights_only=True) for folder in (left, right))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)
    assert [r["step"] for r in rows(left)] == [r["step"] for r in rows(right)]
    for left_row, right_row in zip(rows(left), rows(right), strict=True):
        for key in left_row.keys() & {"loss", "valid_loss", "grad_norm"}:
            assert left_row[key] == pytest.approx(right_row[key], abs=1e-5)


@pytest.fixture(scope="module")
def one_process(mono_folder, tmp_path_factory) -> tuple[Path, Path]:
    """(dataset, output) of a run by one process. 7 files: steps of 4 and of 3 clips."""
    folder = tmp_path_factory.mktemp("processes")
    dataset = write_pairs(folder / "dataset", seconds=(3.0, 2.0, 1.5, 4.0, 3.5, 1.0, 5.0))
    output = folder / "one"
    train(Config(**options(dataset, mono_folder, output), batch_size=4, grad_acc=1))
    return dataset, output


def test_two_processes_train_as_one(one_process, mono_folder, tmp_path) -> None:
    dataset, alone = one_process
    output = tmp_path / "two"
    shape = ["--batch_size=1", "--grad_acc=2"]
    process = launch("accelerate", *flags(dataset, mono_folder, output), *shape)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert_same_run(alone, output, 1e-6)
    assert stdout.count("step 8/8  loss") == 1  # one process speaks
    assert stdout.count("2 process(es)") == 2  # and says so in "device" and "batch"
    assert {p.name for p in output.iterdir()} == {p.name for p in alone.iterdir()}


EACH_KEEPS_ITS_WEIGHTS = """
import json, sys, torch
import train
from flags.run import Config

start, runs = train.start, []
train.start = lambda config: runs.append(start(config)) or runs[0]
config = Config(**json.loads(sys.argv[1]))
train.train(config)
torch.save(runs[0].trained, f"{config.output_dir}/{runs[0].accelerator.process_index}.pt")
"""


def test_weights_rounded_at_random_are_alike_in_two_processes(mono_folder, tmp_path) -> None:
    """If they rounded differently, DDP would not bring them together again."""
    dataset = write_pairs(tmp_path / "dataset", seconds=(3.0, 2.0, 1.5, 4.0))
    flags = options(dataset, mono_folder, tmp_path) | {"epochs": 1, "batch_size": 1, "grad_acc": 1}
    script = tmp_path / "script.py"
    script.write_text(EACH_KEEPS_ITS_WEIGHTS)
    rounding = {"optimizer": "adamw_8bit_bf16", "precision": "bf16"}
    process = launch("torchrun", json.dumps(flags | rounding), script=script)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    assert any(weight.dtype == torch.bfloat16 for weight in first.values())
    assert all(weight.equal(second[name]) for name, weight in first.items())


def test_two_processes_stop_and_resume(one_process, mono_folder, tmp_path) -> None:
    dataset, alone = one_process
    output = tmp_path / "two"
    same = [*flags(dataset, mono_folder, output), "--batch_size=2", "--grad_acc=1"]
    process = launch("torchrun", *same)
    assert process.stdout
    while not process.stdout.readline().startswith("step 3/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert "resume.pt" in stderr
    assert not (output / "lm_final.pt").exists()
    process = launch("torchrun", *same, "--resume=1")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "step 3/8  loss" not in stdout
    assert_same_run(alone, output, 1e-6)
