"""One run writes to a folder at a time; a file is written as a whole."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, Result, write_pairs

import export
import files
import prepare
import run
from musicgen import load, lora

HOLD = """
import os, sys, time, files, pathlib
with files.locked(pathlib.Path(sys.argv[1]), "--output_dir"):
    child = os.fork()  # as a process that reads audio
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


class World(NamedTuple):
    model: Path
    data: Path
    adapter: Path


@pytest.fixture(scope="module")
def world(mono_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    model = load.load_model(str(mono_folder), torch.device("cpu"))
    lora.save(lora.attach(model.lm, rank=2, alpha=4, base=str(mono_folder)), root / "adapter")
    data = write_pairs(root / "data", seconds=(1.0, 1.2))
    return World(mono_folder, data, root / "adapter")


class Command(NamedTuple):
    """A command that writes to a place, which is a folder or, for export.py, a file."""

    call: Callable[[], Result]
    place: Path
    lock: Path


@pytest.fixture(params=["run", "encode", "shard", "clean", "check", "export"])
def command(
    request: pytest.FixtureRequest, cli: Callable[..., Result], world: World, tmp_path: Path
) -> Command:
    here = {"device": "cpu", "model_id": world.model}
    tiny = {"max_steps": 1, "batch_size": 1, "duration": 1, "num_workers": 0}
    script, words, flag, flags = {
        "run": (run, [], "output_dir", {"dataset_path": world.data, **here, **tiny}),
        "encode": (prepare, ["encode", world.data], "output_dir", here),
        "shard": (prepare, ["shard", world.data], "output_dir", {}),
        "clean": (prepare, ["clean", world.data], "output_dir", {"loudness": -20}),
        "check": (prepare, ["check", world.data], "fix", {"picture": tmp_path / "check.png"}),
        "export": (export, [], "output", {"lora": world.adapter}),
    }[request.param]
    folder = tmp_path / "out"
    folder.mkdir()
    place, lock = folder, folder / ".lock"
    if request.param == "export":
        place, lock = folder / "merged.pt", folder / ".merged.pt.lock"
    return Command(lambda: cli(script, *map(str, words), **{flag: place}, **flags), place, lock)


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[Callable[[Path], "subprocess.Popen[str]"]]:
    """Start another process that holds the lock on a path, and has a child."""
    started: list[subprocess.Popen[str]] = []
    children: list[int] = []

    def start(path: Path) -> "subprocess.Popen[str]":
        hold = [sys.executable, "-c", HOLD, str(path)]
        started.append(subprocess.Popen(hold, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout
        children.append(int(started[-1].stdout.readline()))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
    for child in children:
        os.kill(child, signal.SIGKILL)


def everything(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_second_run_into_one_place_is_refused_and_names_the_first(command, other_run, tmp_path):
    """Until the first is killed: what it leaves, a lock file or its own child, is no lock."""
    call, place, lock = command
    holder = other_run(place)
    before = everything(tmp_path)
    told = call()
    assert told.code == 1
    assert everything(tmp_path) == before
    who = f"process {holder.pid} on {socket.gethostname()}, started "
    assert f"={place}: another run is writing there ({who}" in told.err
    holder.kill()
    holder.wait()
    assert lock.exists()
    told = call()
    assert told.code == 0, told.err
    assert place.exists()
    assert not lock.exists()


def test_the_lock_comes_before_all_that_is_decided_by_what_is_there(world, cli, tmp_path):
    """Another run may be replacing, at this moment, the weights that are in the way."""
    (tmp_path / "lm_20.pt").touch()
    flags = {"dataset_path": world.data, "model_id": world.model, "output_dir": tmp_path}
    with files.locked(tmp_path, "--output_dir"):
        assert "another run is writing there" in cli(run, **flags).err
    assert "holds an earlier run (lm_20.pt)" in cli(run, **flags).err
    assert {path.name for path in tmp_path.iterdir()} == {"lm_20.pt"}


def test_without_locks_in_the_file_system_there_is_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.locked(tmp_path, "--output_dir"), files.locked(tmp_path, "--output_dir"):
        pass
    assert f"{tmp_path / '.lock'}: no lock (" in capsys.readouterr().err
