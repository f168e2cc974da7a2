"""Stop a run on Ctrl-C or SIGTERM."""

import contextlib
import signal
import sys
from collections.abc import Iterator

from training.processes import Processes


class StopSignals:
    """Handles Ctrl-C and SIGTERM: the first asks for a stop, the second stops at once."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.requested = 0  # the signal's number
        self.is_saving = False

    def __call__(self, number: int, frame: object) -> None:
        if self.is_saving:
            say(self.processes, "saving; please wait")
        elif self.requested:
            raise KeyboardInterrupt
        else:
            self.requested = number
            say(self.processes, "stopping soon and saving everything; once more stops at once")

    def check(self) -> None:
        """Stop here if asked to, or if another process has ended."""
        self.processes.check()
        if self.requested:
            raise KeyboardInterrupt

    def check_alone(self) -> None:
        """Stop here unless others are in the same step: they stop together after it."""
        if self.processes.count == 1:
            self.check()


@contextlib.contextmanager
def handled_by(handler: StopSignals) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not in the main thread: the program around us handles signals
        before = {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def say(processes: Processes, line: str) -> None:
    if processes.is_first:
        print(line, file=sys.stderr, flush=True)
