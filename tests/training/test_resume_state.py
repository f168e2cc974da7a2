"""A resume state is read from its file piece by piece, and the file is let go."""

import contextlib
import gc
import sys
from pathlib import Path

import pytest
from conftest import tiny_config

from training import start

is_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@is_linux
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"optimizer": "adamw_8bit", "ema_decay": 0.9},
        {"optimizer": "adamw_8bit_bf16", "precision": "bf16"},
    ],
)
def test_it_is_held_once_and_its_file_is_let_go(
    flags, mono_folder, make_pairs, fit, tmp_path, monkeypatch
):
    """Mapped while it is restored, so what is restored is not held beside it; and not after."""
    data = make_pairs()
    flags |= {"save_step": 1, "duration": 1}
    output = fit(mono_folder, data, max_steps=1, **flags)
    restore, mapped = start.restore, []

    def watched(session, state):
        mapped.append(is_mapped(output / "resume.pt"))
        restore(session, state)

    monkeypatch.setattr(start, "restore", watched)
    config = tiny_config(mono_folder, data, output, max_steps=2, resume=True, **flags)
    with contextlib.ExitStack() as held:
        session = start.start(config, held)
        gc.collect()
        assert mapped == [True]
        assert not is_mapped(output / "resume.pt")
        assert session.step == 1
