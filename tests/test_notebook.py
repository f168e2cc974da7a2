"""finetune.ipynb: run from top to bottom it shows what it promises; as committed, it is clean."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import soundfile as sf
import torch
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

LONG_SEC = 11.0  # the demo model's window is 10 s
TINY = {"EPOCHS": 1, "DURATION": 1.0, "LONG_DURATION": LONG_SEC}


def load() -> NotebookNode:
    return nbformat.read(ROOT / "finetune.ipynb", as_version=4)


def execute(**settings: Any) -> dict[str, list[NotebookNode]]:
    """Run all cells with these settings -> each code cell's outputs, by the cell's id."""
    notebook = load()
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    defaults: dict[str, Any] = {}
    exec(cell.source, defaults)
    assert settings.keys() <= defaults.keys(), "a setting has another name now"
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    where = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, kernel_name="python3", timeout=600, resources=where).execute()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for all that the notebook and Jupyter write; the user's own settings are unseen."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        # Without the user's kernels, python3 is the interpreter that runs the tests.
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(folder / name.lower()))
        patch.setenv("PIP_NO_INDEX", "1")  # nothing is to be installed
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="module")
def output(home: Path) -> Path:
    return home / "models"


@pytest.fixture(scope="module")
def shown(output: Path) -> dict[str, list[NotebookNode]]:
    return execute(OUTPUT=str(output), **TINY)


def of_type(outputs: list[NotebookNode], mime: str) -> list[str]:
    return [output.data[mime] for output in outputs if mime in output.get("data", {})]


def players(outputs: list[NotebookNode]) -> int:
    """Count the players that carry their audio with them."""
    return "".join(of_type(outputs, "text/html")).count('<source src="data:audio/')


def test_it_shows_the_recordings_the_curve_and_the_spectrograms(shown):
    listed = "".join(o.text for o in shown["check"] if o.output_type == "stream")
    assert all(path.name in listed for path in (ROOT / "demo/dataset").rglob("*.wav"))
    for cell in ("train", "spectrograms"):
        (picture,) = of_type(shown[cell], "image/png")
        assert len(picture) > 10_000, cell


def test_it_plays_a_recording_and_both_prompts_before_and_after(shown):
    cells = ("check", "before", "players", "long")
    assert [players(shown[cell]) for cell in cells] == [1, 2, 4, 1]


def test_it_shows_what_the_commands_say(shown):
    (text,) = [t for t in of_type(shown["train"], "text/plain") if t.startswith("$ python run.py")]
    assert "held-out loss" in text
    assert text.endswith("lm_final.pt")
    assert "  eta " not in text, "of the progress, only the last line stays, until the next"


def test_it_leaves_the_weights_and_a_piece_longer_than_the_window(shown, output):
    weights = torch.load(output / "lm_final.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    (piece,) = (output / "long").glob("*.wav")
    assert sf.info(piece).duration == pytest.approx(LONG_SEC)
    assert "lm_final.pt" in of_type(shown["download"], "text/html")[0]


def test_a_second_run_stops_before_it_replaces_anything(shown, output):
    files = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(CellExecutionError, match="exists: give another --output_dir"):
        execute(OUTPUT=str(output), **TINY)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == files


def test_as_committed_it_is_valid_short_and_without_outputs():
    notebook = load()
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, cell.id
            assert cell.execution_count is None, cell.id
            assert len(cell.source.splitlines()) <= 20, cell.id
