"""Processes of a run fail together and end together; each on its own machine, too."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import write_pairs
from processes import Started, assert_same_run, launch

import train as train_module
from errors import UserError
from flags.run import Config
from run import main as run_main
from train import train
from training import data
from training import processes as processes_module
from training.accelerator import start_accelerator
from training.processes import Processes


def options(dataset: Path, model: Path, output: Path | str) -> dict[str, Any]:
    where = {"dataset_path": str(dataset), "model_id": str(model), "output_dir": str(output)}
    how = {"device": "cpu", "duration": 1.0, "lr": 1e-4, "warmup_steps": 2, "num_workers": 0}
    return {**where, **how, "epochs": 4, "batch_size": 2, "grad_acc": 1}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """7 files: steps of 4 and of 3 clips."""
    folder = tmp_path_factory.mktemp("together")
    return write_pairs(folder / "dataset", seconds=(1.2, 2.0, 1.5, 2.5, 3.5, 1.0, 3.0))


@pytest.fixture(scope="module")
def alone(dataset, mono_folder, tmp_path_factory) -> Path:
    """Output of a run by one process."""
    output = tmp_path_factory.mktemp("alone")
    flags = {**options(dataset, mono_folder, output), "batch_size": 4, "cache_tokens": True}
    train(Config(**flags))
    return output


def wait_for_step(started: Started, output: Path, step: int) -> None:
    rows = output / "metrics.jsonl"
    while not rows.exists() or f'"step": {step}, "loss"' not in rows.read_text():
        assert started.is_alive()
        time.sleep(0.005)


def talk() -> None:
    """Exchange what a run exchanges; argv: flags as JSON, folder."""
    config, folder = Config(**json.loads(sys.argv[1])), Path(sys.argv[2])
    processes = Processes(start_accelerator(config)[0])
    rank, told = processes.rank, []
    state = None
    if processes.is_first:
        from torchao.optim import AdamW8bit

        weight = torch.nn.Parameter(torch.linspace(-1, 1, 4096).bfloat16().view(64, 64))
        weight.grad = weight.detach().clone()
        optimizer = AdamW8bit([weight])
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        odd = [torch.tensor(3), torch.zeros(0, 2), torch.arange(6).view(2, 3).T]
        state = {"weight": weight, "optimizer": optimizer.state_dict(), "odd": (*odd, None, "a")}
    state = processes.broadcast(state)
    torch.save(state, folder / f"state{rank}.pt")
    for culprit in range(processes.count):
        try:
            with processes.together():
                if rank == culprit:
                    raise UserError(f"a mistake in {culprit}")
        except UserError as error:
            told.append(str(error))
    try:
        processes.check_same({"--lr": rank, "--seed": 0})
    except UserError as error:
        told.append(str(error))
    for flags in json.loads(sys.argv[3])[rank]:
        try:
            train(config.model_copy(update=flags))
        except UserError as error:
            told.append(str(error))
    processes.wait()
    (folder / f"told{rank}.json").write_text(json.dumps(told))


def test_processes_tell_each_other_what_they_must(dataset, mono_folder, tmp_path, processes):
    """Among it: a mistake that only one of them can see ends all, with one message."""
    flags = options(dataset, mono_folder, tmp_path / "out")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "lm_final.pt").write_bytes(b"")
    used, empty = ({"output_dir": str(tmp_path / name)} for name in ("used", "empty"))
    gone, other = {"dataset_path": str(tmp_path / "gone")}, {"lr": 0.1}
    first, second = [used, {}, {}], [empty, gone, other]
    words = [json.dumps(flags), tmp_path, json.dumps([first, second])]
    both = Started(processes, tmp_path / "logs", *words, main=talk, count=2)
    codes, _, errors = both.end()
    assert codes == {0}, errors
    sent, received = (torch.load(tmp_path / f"state{i}.pt", weights_only=True) for i in range(2))
    assert received["weight"].equal(sent["weight"])
    (mine,), (theirs,) = (s["optimizer"]["state"].values() for s in (sent, received))
    for name in ("exp_avg", "exp_avg_sq"):
        assert type(mine[name]) is type(theirs[name]) is not torch.Tensor
        assert theirs[name].dequantize().equal(mine[name].dequantize())
    assert theirs["step"].equal(mine["step"])
    assert [t.tolist() for t in received["odd"][:3]] == [t.tolist() for t in sent["odd"][:3]]
    assert received["odd"][3:] == (None, "a")
    told = [json.loads((tmp_path / f"told{i}.json").read_text()) for i in range(2)]
    assert told[0] == told[1]
    expected = ["in 0", "in 1", "--lr", "used holds an earlier run", "gone", "--lr"]
    for message, part in zip(told[0], expected, strict=True):
        assert part in message
    assert not (tmp_path / "empty").exists()


def test_no_two_processes_of_a_machine_fill_the_same_file():
    """Two machines of two processes: all share, then those of a machine, what it still lacks."""
    shares: list[list[tuple[int, int]]] = []
    for rank in range(4):
        alike = {"rank": rank, "count": 4, "local_rank": rank % 2, "local_count": 2}
        process = SimpleNamespace(**alike, together=contextlib.nullcontext)
        taken: list[tuple[int, int]] = []
        data._in_shares(lambda rank, processes, to=taken: to.append((rank, processes)), process)
        shares.append(taken)
    assert [taken[0] for taken in shares] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [taken[1] for taken in shares] == [(0, 2), (1, 2), (0, 2), (1, 2)]


def flags_of(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_is_killed_the_other_saves_and_ends(
    killed, alone, dataset, mono_folder, tmp_path, processes
):
    output = tmp_path / "out"
    same = {**options(dataset, mono_folder, output), "cache_tokens": 1, "save_step": 2}
    both = Started(processes, tmp_path / "logs", *flags_of(same), count=2)
    wait_for_step(both, output, 3)
    began = time.monotonic()
    os.kill(both.processes[killed].pid or 0, signal.SIGKILL)
    codes, _, errors = both.end()
    assert time.monotonic() - began < 60
    assert codes == {1, -signal.SIGKILL}
    assert "another process of this run has ended" in errors
    assert "Traceback" not in errors
    again = Started(processes, tmp_path / "more", *flags_of(same), "--resume=1", count=2)
    codes, told, errors = again.end()
    assert codes == {0}, errors
    done = 3 if killed else 2  # the first process saves its last step
    assert f"after step {done}" in told or "after step 4" in told
    assert_same_run(alone, output, 1e-6)


def hang_if_alone() -> None:
    """Run, but wait for ever where a collective fails, as NCCL does."""
    begin = train_module.start

    def start(*given):
        run = begin(*given)
        reduce = run.accelerator.reduce

        def hanging(*what):
            try:
                return reduce(*what)
            except RuntimeError:
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                while True:
                    time.sleep(1000)

        run.accelerator.reduce = hanging
        return run

    train_module.start, train_module.GRACE_SEC = start, 1.0
    run_main()


def test_a_process_that_waits_for_a_killed_one_saves_and_ends(
    dataset, mono_folder, tmp_path, processes
):
    output = tmp_path / "out"
    same = {**options(dataset, mono_folder, output), "ema_decay": 0.9}
    both = Started(processes, tmp_path / "logs", *flags_of(same), main=hang_if_alone, count=2)
    wait_for_step(both, output, 2)
    os.kill(both.processes[1].pid or 0, signal.SIGKILL)
    codes, _, errors = both.end(timeout=60)
    assert codes == {1, -signal.SIGKILL}
    assert "saved: continue with the same flags" in errors
    assert "another process of this run has ended" in errors
    state = torch.load(output / "resume.pt", weights_only=True)
    assert state["step"] >= 2


def notice_silence_soon() -> None:
    processes_module.SILENCE, train_module.GRACE_SEC = timedelta(seconds=3), 1.0
    run_main()


def test_a_process_that_falls_silent_counts_as_lost(dataset, mono_folder, tmp_path, processes):
    """Its connections stay open, as those of a machine that has lost power or the network."""
    output, main = tmp_path / "out", notice_silence_soon
    words = flags_of(options(dataset, mono_folder, output))
    both = Started(processes, tmp_path / "logs", *words, main=main, count=2)
    wait_for_step(both, output, 2)
    os.kill(both.processes[1].pid or 0, signal.SIGSTOP)
    both.processes[0].join(60)
    os.kill(both.processes[1].pid or 0, signal.SIGKILL)
    codes, _, errors = both.end()
    assert codes == {1, -signal.SIGKILL}
    assert "saved: continue with the same flags" in errors
    assert "another process of this run has ended" in errors


def tell_who_watches() -> None:
    try:
        run_main()
    finally:
        print(os.environ["RANK"], [t.name for t in threading.enumerate() if t.name == "watch"])


def test_a_process_that_ends_first_has_stopped_watching(dataset, mono_folder, tmp_path, processes):
    """Python would abort if the thread waited in gloo then: "terminate called"."""
    output = tmp_path / "out"
    words = flags_of(options(dataset, mono_folder, output))
    both = Started(processes, tmp_path / "logs", *words, main=tell_who_watches, count=2)
    wait_for_step(both, output, 2)
    both.signal(signal.SIGTERM)
    codes, told, errors = both.end()
    assert codes == {143}, errors
    assert "1 []" in told


@pytest.fixture
def stuck(monkeypatch) -> SimpleNamespace:
    """A run whose main thread waits for a lost process, and what was done about it."""
    run = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), told=[])
    run.processes = SimpleNamespace(is_first=True)
    run.writer, run.report, run.step = SimpleNamespace(wait=lambda: None), True, 3
    run.lock, run.saving = threading.Lock(), threading.Lock()
    monkeypatch.setattr(train_module, "GRACE_SEC", 0.01)
    monkeypatch.setattr(train_module, "_save_after_error", lambda *_: run.told.append("saved"))
    monkeypatch.setattr(train_module, "end_after_loss", lambda _: run.told.append("ended"))
    return run


def end(run: SimpleNamespace) -> threading.Thread:
    stop: Any = SimpleNamespace(is_saving=False)
    thread = threading.Thread(target=train_module._end_if_stuck, args=(run, stop, 0), daemon=True)
    thread.start()
    return thread


def test_what_the_main_thread_writes_is_not_written_over_by_another_thread(stuck):
    with stuck.saving:
        thread = end(stuck)
        thread.join(0.5)
        assert stuck.told == []
    thread.join(10)
    assert stuck.told == ["saved", "ended"]


def test_a_process_ends_after_a_loss_even_if_it_can_not_save(stuck, monkeypatch, capsys):
    def full(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(train_module, "_save_after_error", full)
    end(stuck).join(10)
    assert stuck.told == ["ended"]
    assert "could not be saved: the disk is full" in capsys.readouterr().err


def test_two_machines_train_as_one_process(alone, dataset, mono_folder, tmp_path, processes):
    """Each with its own cache and output folder; the first one's alone is used."""
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine in machines:
        machine.mkdir()
    same = {**options(dataset, mono_folder, "out"), "cache_tokens": 1, "save_step": 3}
    both = Started(processes, tmp_path / "logs", *flags_of(same), machines=machines)
    wait_for_step(both, machines[0] / "out", 3)
    both.signal(signal.SIGTERM)
    codes, _, errors = both.end()
    assert codes == {143}, errors
    words = [*flags_of(same), "--resume=1"]
    codes, told, errors = Started(processes, tmp_path / "more", *words, machines=machines).end()
    assert codes == {0}, errors
    assert "resumed    after step" in told
    assert_same_run(alone, machines[0] / "out", 1e-6)
    assert [path.name for path in machines[1].iterdir()] == ["cache"]
    for machine in machines:
        assert len(list((machine / "cache").rglob("tokens/*.npy"))) == 7


@pytest.mark.long
def test_when_torchrun_loses_a_process_the_other_saves_and_ends(
    alone, dataset, mono_folder, tmp_path
):
    output = tmp_path / "out"
    same = {**options(dataset, mono_folder, output), "cache_tokens": 1}
    process = launch("torchrun", *flags_of(same))
    assert process.stdout
    while not process.stdout.readline().startswith("step 3/"):
        assert process.poll() is None
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    second = next(w for w in workers if w.environ()["RANK"] == "1")
    began = time.monotonic()
    second.kill()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert "another process of this run has ended" in stderr
    assert "saved: continue" in stderr
    process = launch("torchrun", *flags_of(same), "--resume=1")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "step 3/8  loss" not in stdout
    assert_same_run(alone, output, 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("killed", ["0", "1"])
def test_torchrun_starts_again_after_a_kill(killed, alone, dataset, mono_folder, tmp_path):
    output = tmp_path / "out"
    same = {**options(dataset, mono_folder, output), "cache_tokens": 1, "save_step": 1}
    process = launch("restarts", *flags_of(same), "--resume=auto")
    assert process.stdout
    while not process.stdout.readline().startswith("step 3/"):
        assert process.poll() is None
    workers = psutil.Process(process.pid).children()
    next(w for w in workers if w.environ()["RANK"] == killed).kill()
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert "resumed    after step" in stdout
    assert_same_run(alone, output, 1e-6)
