"""Errors that the user can fix, reported plainly: what is wrong, where, and how to fix it."""

import contextlib
import io
import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class UserError(Exception):
    """An error that the user can fix; its few plain lines say what, where and how."""


class Problem(NamedTuple):
    """A file and its fault; the reason does not name the file, so that others can share it."""

    name: str
    reason: str


class Finished(Exception):
    """Nothing is left to do; its line says why. With --resume=auto that is no error."""


class LostProcess(Exception):
    """Another process of the run has ended, or can't be reached."""


ADVICE_LOST = (
    "If it said why, put that right. Then start all processes again, with --resume=1 if the "
    "output folder has a resume.pt."
)


@contextlib.contextmanager
def plain_errors(advice_out_of_memory: str) -> Iterator[None]:
    """End the process with a plain message instead of a traceback if the user can fix the error."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao warns at each start
    show_any_text()
    try:
        yield
    except UserError as error:
        _exit(str(error))
    except Finished as finished:
        print(printable(str(finished)))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # as in `python run.py --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if is_lost_process(error):
            end_after_loss(error)
        if not is_out_of_memory(error):
            raise
        _exit(f"out of memory: {str(error).splitlines()[0]}\n{advice_out_of_memory}")


def show_any_text() -> None:
    """Let the console escape what it can't show, such as Japanese in cp1252, and not fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's shows everything
            stream.reconfigure(errors="backslashreplace")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that the device or the machine is out of memory."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in text
        or "can't allocate memory" in text
        or "not enough memory" in text
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
    )


def is_lost_process(error: BaseException) -> bool:
    """Return whether an exception means that another process of the run can't be reached."""
    names = ("LostProcess", "DistBackendError", "DistNetworkError", "DistStoreError")
    return type(error).__name__ in names or "/gloo/" in str(error)


def end_after_loss(error: BaseException) -> None:
    """End this process at once: a usual exit may wait for the lost one."""
    place = r"^\[[^]]*\] *"  # in gloo's source
    reason = re.sub(place, "", str(error).split("\n")[0]).split(". ")[0]
    _tell(f"another process of this run has ended or can't be reached ({reason}). {ADVICE_LOST}")
    sys.stdout.flush()
    os._exit(1)


def first_lines(lines: list[str], limit: int = 20) -> str:
    """Return up to `limit` lines, indented, then how many more there are.

    Escapes control characters, since names and captions could steer the terminal.
    """
    shown = ["  " + printable(line.replace("\n", "\\n")) for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)


def by_reason(problems: Iterable[Problem], *, all_names: bool = False) -> list[str]:
    """Return a line for each reason, the most frequent first.

    A reason that files share is said once, with their number and three names; or with all names,
    each in a line of its own.
    """
    names = defaultdict[str, list[str]](list)
    for name, reason in problems:
        names[reason].append(name)
    lines = []
    for reason, of in sorted(names.items(), key=lambda item: -len(item[1])):
        if len(of) == 1:
            lines.append(f"{of[0]}: {reason}")
        elif all_names:
            lines += [f"{len(of)} files: {reason}", *(f"  {name}" for name in of)]
        else:
            lines.append(f"{len(of)} files ({few(of)}): {reason}")
    return lines


def few(names: list[str]) -> str:
    """Return three names, and how many more there are. Example: "a, b, c and 18 more"."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def count(number: object, noun: str) -> str:
    """Return a number with its noun. Example: 1, "file" -> "1 file"; "2 or 1", "process"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if str(number) == '1' else plural}"


def printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _exit(message: str) -> None:
    _tell(message)
    sys.exit(1)


def _tell(message: str) -> None:
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)
