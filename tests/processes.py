"""run.py in processes of their own: two that train together, started by a launcher or at once."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics

import run

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
}


def launch(launcher: str, *flags: object) -> "subprocess.Popen[str]":
    """As a user would; about 25 s of the processor go to imports."""
    return subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(ROOT / "run.py"), *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Two:
    """Two processes that have what torchrun gives them, `main` being run.main or like it."""

    def __init__(
        self,
        context: ForkServerContext,
        logs: Path,
        *flags: object,
        main: Callable[[], object] = run.main,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        logs.mkdir(exist_ok=True)
        words, self.logs, self.processes = [str(flag) for flag in flags], logs, []
        for rank in map(str, range(2)):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            environment = {**os.environ, **where, **own}  # the server's is that of its start
            arguments = (main, words, environment, logs / rank)
            self.processes.append(context.Process(target=_work, args=arguments))
            self.processes[-1].start()

    def stop(self, number: int) -> None:
        """Send both a signal, as torchrun does with those it gets."""
        for process in self.processes:
            os.kill(process.pid, number)

    def end(self, timeout: float = 120) -> tuple[list[int | None], str, str]:
        """Wait for both -> exit codes, stdout, stderr."""
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        out, errors = (
            "".join(path.read_text() for path in sorted(self.logs.glob(f"*.{name}")))
            for name in ("out", "err")
        )
        return codes, out, errors


def _work(main: Callable[[], object], words: list[str], environment: dict, log: Path) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, name in ((1, "out"), (2, "err")):
        with log.with_suffix(f".{name}").open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["run.py", *words]
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
