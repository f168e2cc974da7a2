"""Two processes on the CPU train like one with the same global batch; the first one writes."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_pairs
from processes import Started, assert_same_run, launch

import train as train_module
from flags.run import Config
from train import train


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


@pytest.fixture(scope="module")
def one_process(mono_folder, tmp_path_factory) -> tuple[Path, Path]:
    """(dataset, output) of a run by one process. 7 files: steps of 4 and of 3 clips."""
    folder = tmp_path_factory.mktemp("processes")
    dataset = write_pairs(folder / "dataset", seconds=(3.0, 2.0, 1.5, 4.0, 3.5, 1.0, 5.0))
    output = folder / "one"
    train(Config(**options(dataset, mono_folder, output), batch_size=4, grad_acc=1))
    return dataset, output


@pytest.mark.parametrize("is_launched", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_processes_train_as_one(
    is_launched, one_process, mono_folder, tmp_path, processes
) -> None:
    """With what a launcher gives them; and started by `accelerate launch` itself."""
    dataset, alone = one_process
    output = tmp_path / "two"
    words = [*flags(dataset, mono_folder, output), "--batch_size=1", "--grad_acc=2"]
    if is_launched:
        process = launch("accelerate", *words)
        stdout, stderr = process.communicate(timeout=120)
        codes = {process.returncode}
    else:
        codes, stdout, stderr = Started(processes, tmp_path / "logs", *words, count=2).end()
    assert codes == {0}, stderr
    assert_same_run(alone, output, 1e-6)
    assert stdout.count("step 8/8  loss") == 1  # one process speaks
    assert stdout.count("2 processes") == 2  # and says so in "device" and "batch"
    assert {p.name for p in output.iterdir()} == {p.name for p in alone.iterdir()}


def train_and_keep_weights() -> None:
    """Run as run.py's main does, with flags as JSON; each process saves what it has."""
    begin, runs, storages = train_module.start, [], []

    def count_storages() -> None:
        gradients = [weight.grad for weight in runs[0].trained.values()]
        assert None not in gradients
        storages.append(len({gradient.untyped_storage().data_ptr() for gradient in gradients}))

    def start(*given):
        runs.append(begin(*given))
        count_storages()
        return runs[0]

    train_module.start = start
    config = Config(**json.loads(sys.argv[1]))
    train(config)
    count_storages()
    kept = {"weights": runs[0].trained, "storages": storages}
    torch.save(kept, f"{config.output_dir}/{runs[0].accelerator.process_index}.pt")


def test_weights_rounded_at_random_are_alike_in_two_processes(
    mono_folder, tmp_path, processes
) -> None:
    """If they rounded differently, DDP would not bring them together again.

    And DDP's buckets, one of each number format here, are the gradients' only place.
    """
    dataset = write_pairs(tmp_path / "dataset", seconds=(1.0, 0.9, 0.8, 1.2))
    flags = options(dataset, mono_folder, tmp_path) | {"epochs": 2, "batch_size": 1, "grad_acc": 2}
    rounding = {"optimizer": "adamw_8bit_bf16", "precision": "bf16"}
    both = Started(
        processes,
        tmp_path / "logs",
        json.dumps(flags | rounding),
        main=train_and_keep_weights,
        count=2,
    )
    codes, _, errors = both.end()
    assert codes == {0}, errors
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    assert any(weight.dtype == torch.bfloat16 for weight in first["weights"].values())
    assert all(weight.equal(second["weights"][name]) for name, weight in first["weights"].items())
    assert max(first["storages"]) <= 3


def test_two_processes_stop_and_resume(one_process, mono_folder, tmp_path, processes) -> None:
    dataset, alone = one_process
    output = tmp_path / "two"
    same = [*flags(dataset, mono_folder, output), "--batch_size=2", "--grad_acc=1"]
    both = Started(processes, tmp_path / "logs", *same, count=2)
    rows = output / "metrics.jsonl"
    while not rows.exists() or '"step": 3, "loss"' not in rows.read_text():
        assert both.is_alive()
        time.sleep(0.005)
    both.signal(signal.SIGTERM)
    codes, _, errors = both.end()
    assert codes == {143}
    assert "resume.pt" in errors
    assert not (output / "lm_final.pt").exists()
    codes, told, errors = Started(processes, tmp_path / "logs", *same, "--resume=1", count=2).end()
    assert codes == {0}, errors
    assert "step 3/8  loss" not in told
    assert_same_run(alone, output, 1e-6)


@pytest.mark.long
def test_torchrun_is_stopped_and_resumed(one_process, mono_folder, tmp_path) -> None:
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
