"""Find how much of the computer's memory this process can still take."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

# A control group's files: limit, taken, and the line of memory.stat for what can be dropped.
UNIFIED = ("memory.max", "memory.current", "inactive_file")
FORMER = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory() -> int:
    """Return the bytes that are free on the computer, or in this container or job if it has less.

    Where Docker or Slurm set a limit, the kernel kills what exceeds it.
    """
    return min([psutil.virtual_memory().available, *_free_in_groups(Path("/"))])


def _free_in_groups(root: Path) -> Iterator[int]:
    """Yield what is free in each of Linux's control groups that this process is in."""
    groups = ""
    with contextlib.suppress(OSError):
        groups = (root / "proc/self/cgroup").read_text()
    for line in groups.splitlines():
        _, controllers, name = line.split(":", 2)
        mount, files = root / "sys/fs/cgroup", UNIFIED
        if "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", FORMER
        elif controllers:
            continue
        group = mount / name.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                with contextlib.suppress(OSError, ValueError):  # no limit is "max"
                    yield _free_in(folder, *files)


def _free_in(folder: Path, limit: str, taken: str, droppable: str) -> int:
    stat = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    dropped = next((int(value) for name, value in stat if name == droppable), 0)
    return int((folder / limit).read_text()) - int((folder / taken).read_text()) + dropped
