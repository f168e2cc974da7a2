"""Checkpoints are written while training goes on: what they hold, and a disk that is full."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import psutil
import pytest
import soundfile as sf
import torch
from conftest import metrics, weights
from torch.utils._pytree import tree_leaves

import files
import run
from demo.tiny import build_musicgen
from training.report import Report
from training.writer import Writer, _plain

SAVED = {"epochs": 3, "save_step": 2, "batch_size": 1}  # of two clips: 6 steps


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_musicgen(tmp_path_factory.mktemp("model"), segment_sec=20.0, dropout=0.1)


@pytest.fixture
def data(make_pairs: Callable[..., Path]) -> Path:
    return make_pairs(seconds=(1.0, 0.8))


def plain(tree: Any) -> list[Any]:
    """The leaves of a tree, with torchao's tensors as those they are made of."""
    return [
        part
        for leaf in tree_leaves(tree)
        for part in (_plain(leaf) if torch.is_tensor(leaf) else [leaf])
    ]


def assert_same(left: Any, right: Any) -> None:
    pairs = list(zip(plain(left), plain(right), strict=True))
    assert all(a.equal(b) if torch.is_tensor(a) else a == b for a, b in pairs)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The resume states that were written; in another thread, not before the next step's row."""
    write, found = files.write, []

    def late(path: Path, fill: Callable[[BinaryIO], object]) -> None:
        if path.name != "resume.pt":
            return write(path, fill)
        if threading.current_thread() is not threading.main_thread():
            before = len(metrics(path.parent))
            wait_until(lambda: len(metrics(path.parent)) > before)
        write(path, fill)
        found.append(torch.load(path, weights_only=True))

    monkeypatch.setattr(files, "write", late)
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def no_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))


KINDS = {
    "all": {},
    "average": {"ema_decay": 0.9},
    "text": {"tune_text": True},
    "LoRA": {"lora_rank": 4},
    "word": {"placeholder": "<my-style>"},
    "8 bit": {"optimizer": "adamw_8bit"},
    "torchao": {"optimizer": "adamw_8bit_bf16", "precision": "bf16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_while_training_goes_on_is_of_the_step_it_is_named_after(
    kind, model, data, fit, states, monkeypatch, capsys
):
    flags = {**SAVED, **KINDS[kind], "max_steps": 5}
    late = fit(model, data, "late", **flags)
    assert "while training goes on, from a copy that takes 0.0 GB" in capsys.readouterr().out
    of_late = [*states]
    states.clear()
    no_room(monkeypatch)
    waiting = fit(model, data, "waiting", **flags)
    assert "training waits meanwhile: a copy would take 0.0 GB" in capsys.readouterr().out

    assert [state["step"] for state in of_late] == [2, 4, 5]
    for one, other in zip(of_late, states, strict=True):
        for part in ("step", "weights", "optimizer", "ema"):
            assert_same(one[part], other[part])
    assert {path.name for path in late.iterdir()} == {path.name for path in waiting.iterdir()}
    for path in waiting.glob("l*_?.*"):
        assert (late / path.name).read_bytes() == path.read_bytes(), path.name
    assert metrics(late) == metrics(waiting)


def test_one_job_at_a_time_and_its_error_is_raised():
    thread, may_end, running = Writer(), threading.Event(), []

    def job() -> None:
        running.append(threading.current_thread())
        assert len(running) == 1
        assert may_end.wait(30)
        running.clear()

    def fail() -> None:
        raise ValueError("full")

    thread.submit(job)
    thread.check()
    threading.Timer(0.05, may_end.set).start()
    thread.submit(job)
    assert may_end.is_set(), "it waited for the first"
    thread.wait()
    assert not running
    assert not thread.has_failed
    thread.submit(fail)
    with pytest.raises(ValueError, match="full"):
        wait_until(lambda: thread.check() is not None)
    assert thread.has_failed
    thread.wait()  # it is raised once


def test_ctrl_c_waits_for_what_is_being_written(model, data, fit, states, monkeypatch, tmp_path):
    """A stop while step 2's files are written; they are whole, and then so are step 3's."""
    log = Report.log

    def stop_after_step_3(self: Report, row: dict[str, Any], line: str) -> None:
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        log(self, row, line)

    monkeypatch.setattr(Report, "log", stop_after_step_3)
    with pytest.raises(SystemExit):
        fit(model, data, **SAVED)
    assert weights(tmp_path / "run", 2)
    assert [state["step"] for state in states] == [2, 3]


# A full disk.

VICTIMS = ["run.json", "metrics.jsonl", "training.png", "step_000004_1.wav"]
VICTIMS += ["resume.pt", "lm_4.pt", "lm_final.pt"]


def half(file: BinaryIO) -> None:
    file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def full_at(victim: str, ballast: Path | None) -> Iterator[None]:
    """The disk is full once a file is to be written: a true one if there is room for `ballast`."""
    write, log, times = files.write, Report.log, []

    def fill_up() -> None:
        if ballast:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(512))

    def failing_write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
        times.extend([path.name] if path.name == victim else [])
        is_it = path.name == victim and len(times) == (2 if victim == "resume.pt" else 1)
        if is_it and victim != "metrics.jsonl":  # which is appended to
            fill_up()
            fill = fill if ballast else half
        try:
            write(path, fill)
        finally:
            if ballast and victim == "training.png":  # the run goes on
                ballast.unlink(missing_ok=True)

    def failing_log(self: Report, row: dict[str, Any], line: str) -> None:
        if victim == "metrics.jsonl" and row["step"] == 4:
            fill_up()
            if not ballast:
                self._file.close()
                self._file = Path("/dev/full").open("a")  # noqa: SIM115
        log(self, row, line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write", failing_write)
        patch.setattr(Report, "log", failing_log)
        yield
    if ballast:
        ballast.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB, where this may be made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(mount, capture_output=True).returncode == 0:
            yield folder
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
            return
    pytest.skip("only root can mount a file system")


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_full_disk_is_told_and_leaves_no_half_file(victim, model, data, cli, tmp_path):
    check_full_disk(victim, model, data, cli, tmp_path, None)


@pytest.mark.long
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_disk_that_is_truly_full(victim, model, data, cli, small_disk):
    check_full_disk(victim, model, data, cli, small_disk, small_disk / "ballast")


def check_full_disk(
    victim: str,
    model: Path,
    data: Path,
    cli: Callable[..., Any],
    root: Path,
    ballast: Path | None,
) -> None:
    flags: dict[str, Any] = {**SAVED, "model_id": model, "dataset_path": data, "device": "cpu"}
    flags |= {"sample_step": 4, "sample_duration": 0.1, "sample_prompts": "a tune", "duration": 1}
    flags |= {"grad_acc": 1, "num_workers": 0, "warmup_steps": 0}
    output, whole = root / "run", root / "whole"
    with full_at(victim, ballast):
        told = cli(run, **flags, output_dir=output)
    if victim == "training.png":
        assert told.code == 0
        assert f"warning: {output / victim}: can't be written" in told.err
    else:
        assert told.code == 1
        assert "can't be written (" in told.err
        assert "No space left on device" in told.err
        assert "Traceback" not in told.err
    if victim != "run.json":
        assert weights(output, 2), "the former checkpoint"
    assert not list(output.rglob("*.tmp"))
    for path in output.rglob("*.*"):
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".wav":
            assert sf.info(path).frames == 3200
        elif path.suffix == ".json":
            assert json.loads(path.read_text())

    again = cli(run, **flags, output_dir=output, resume="auto")
    assert again.code == 0, again.err
    cli(run, **flags, output_dir=whole)
    assert metrics(output) == metrics(whole)
    for path in whole.glob("lm_*.pt"):
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name
