"""Scripts in processes of their own: two that train together, or one that is to be stopped."""

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics

import run

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "restarts": [  # and started again after a failure
        *("torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3")
    ],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
}


def launch(launcher: str, *flags: object) -> "subprocess.Popen[str]":
    """Launch as a user would; imports take about 25 s of the processor."""
    return subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(ROOT / "run.py"), *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Started:
    """Processes with everything imported, in the project's folder: `main` with words and flags.

    Two of them have what torchrun gives its own, so that they train together. With `machines`,
    a folder for each, they are alone on theirs: another working folder and cache.
    """

    def __init__(
        self,
        context: ForkServerContext,
        logs: Path,
        *words: object,
        main: Callable[[], object] = run.main,
        count: int = 1,
        machines: Sequence[Path] = (),
        **flags: object,
    ) -> None:
        self.logs, self.processes = logs, []
        given = [*map(str, words), *(f"--{name}={value}" for name, value in flags.items())]
        logs.mkdir(exist_ok=True)
        count = len(machines) or count
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        for rank in range(count):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            together = {**where, **{name: str(value) for name, value in own.items()}}
            if machines:
                together |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
                together |= {"XDG_CACHE_HOME": f"{machines[rank]}/cache"}
            # The server has the environment of its start, not this one.
            environment = {**os.environ, **(together if count > 1 else {})}
            place = machines[rank] if machines else ROOT
            arguments = (main, given, environment, place, logs / str(rank))
            self.processes.append(context.Process(target=_work, args=arguments))
            self.processes[-1].start()

    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def signal(self, number: int) -> None:
        """To each one and to what it has started, as by Ctrl-C in a terminal."""
        for process in self.processes:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:  # it has just been started, and has no group yet
                os.kill(process.pid, number)

    def is_gone(self, timeout: float = 60) -> bool:
        """Return whether all have ended, and all they started: each holds a lock on the log."""
        end = time.monotonic() + timeout
        for path in self.logs.glob("*.err"):
            with path.open("rb") as file:
                while time.monotonic() < end:
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    time.sleep(0.05)
                else:
                    return False
        return True

    def end(self, timeout: float = 120) -> tuple[set[int | None], str, str]:
        """Wait for all -> their exit codes, stdout, stderr."""
        for process in self.processes:
            process.join(timeout)
        codes = {process.exitcode for process in self.processes}
        for process in self.processes:
            process.kill()
            process.join()
        told = [
            "".join(path.read_text() for path in sorted(self.logs.glob(f"*.{name}")))
            for name in ("out", "err")
        ]
        return codes, *told


def _work(
    main: Callable[[], object], words: list[str], environment: dict, place: Path, log: Path
) -> None:
    os.setsid()
    os.environ.update(environment)
    os.chdir(place)
    for number, name in ((1, "out"), (2, "err")):
        with log.with_suffix(f".{name}").open("wb") as file:
            os.dup2(file.fileno(), number)
    fcntl.flock(2, fcntl.LOCK_EX)
    sys.argv = [f"{main.__module__}.py", *words]
    main()


def assert_same_run(left: Path, right: Path, tolerance: float) -> None:
    """The same steps, with weights and losses that differ by rounding alone."""
    a, b = (torch.load(folder / "lm_final.pt", weights_only=True) for folder in (left, right))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)
    assert [r["step"] for r in metrics(left)] == [r["step"] for r in metrics(right)]
    for left_row, right_row in zip(metrics(left), metrics(right), strict=True):
        for key in left_row.keys() & {"loss", "valid_loss", "grad_norm"}:
            assert left_row[key] == pytest.approx(right_row[key], abs=1e-5)
