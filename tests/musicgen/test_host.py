"""Free memory is that of the container or the job, not only that of its computer."""

from pathlib import Path

import pytest

from musicgen import host

GROUPS = {
    "unified": ("0::/job/step\n", "sys/fs/cgroup", host.UNIFIED),
    "former": ("4:cpu,memory:/job/step\n0::/\n", "sys/fs/cgroup/memory", host.FORMER),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_a_limit_of_the_job_counts(kind, tmp_path):
    names, mount, (limit, taken, droppable) = GROUPS[kind]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(names)
    limits = {"": None, "job": "1000\n", "job/step": "max\n"}
    for name, at_most in limits.items():
        folder = tmp_path / mount / name
        folder.mkdir(parents=True)
        (folder / "memory.stat").write_text(f"anon 5\n{droppable} 30\n")
        (folder / taken).write_text("400\n")
        if at_most:
            (folder / limit).write_text(at_most)
    assert list(host._free_in_groups(tmp_path)) == [630]


def test_without_control_groups_the_computer_counts(tmp_path):
    assert list(host._free_in_groups(tmp_path)) == []
    assert 0 < host.free_memory() <= host.psutil.virtual_memory().total


def test_here_they_can_be_read():
    for free in host._free_in_groups(Path("/")):
        assert isinstance(free, int)
