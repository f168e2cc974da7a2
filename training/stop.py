"""Stop a run on Ctrl-C or SIGTERM."""

import contextlib
import signal
import sys
from collections.abc import Iterator

from accelerate import Accelerator


class StopSignals:
    """Handles Ctrl-C and SIGTERM: the first asks for a stop, the second stops at once."""

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
            say(self.accelerator, "stopping soon and saving everything; once more stops at once")

    def check(self) -> None:
        """Stop here if asked to, unless another process would be left waiting."""
        if self.requested and self.accelerator.num_processes == 1:
            raise KeyboardInterrupt


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


def say(accelerator: Accelerator, line: str) -> None:
    if accelerator.is_main_process:
        print(line, file=sys.stderr, flush=True)
