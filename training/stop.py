"""Ctrl-C and SIGTERM stop a run after the step that it is in."""

import contextlib
import signal
import sys
from collections.abc import Iterator

from accelerate import Accelerator


class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop after the step; a second one stops at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.requested = 0  # the signal's number
        self.is_saving = False

    def __call__(self, number: int, frame: object) -> None:
        if self.is_saving:
            say(self.accelerator, "saving; please wait")
        elif self.requested:
            raise KeyboardInterrupt
        else:
            self.requested = number
            say(self.accelerator, "stopping soon, with everything saved; again to stop at once")

    def check(self) -> None:
        """Stop here, if that leaves no other process waiting."""
        if self.requested and self.accelerator.num_processes == 1:
            raise KeyboardInterrupt


@contextlib.contextmanager
def handled_by(handler: StopSignals) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not in the main thread: the embedding program has the signals
        before = {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def say(accelerator: Accelerator, line: str) -> None:
    if accelerator.is_main_process:
        print(line, file=sys.stderr, flush=True)
