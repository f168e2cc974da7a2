"""The rules for imports and lengths hold, and each way to break one is found."""

import shutil
import subprocess
import sys
from pathlib import Path

import imports
import pytest
from conftest import ROOT

LATER = "def f():\n    "
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
TREE = {  # a project that breaks no rule
    "errors.py": "",
    "files.py": "import errors",
    "flags/__init__.py": "",
    "flags/parse.py": "from errors import UserError\nimport pydantic",
    "flags/run.py": "from flags.parse import Flags",
    "recordings/__init__.py": "",
    "recordings/audio.py": "import files, numpy",
    "recordings/scan.py": "from recordings import audio\nfrom safetensors import SafetensorError",
    "musicgen/__init__.py": "import torch",
    "musicgen/load.py": "from audiocraft.models import MusicGen\nimport recordings.audio",
    "dataset.py": "import torch\nimport flags.run",
    "training/start.py": "import dataset\nfrom flags.run import Config\nfrom musicgen import load",
    "commands/check.py": "from training import start\nfrom recordings.scan import scan",
    "train.py": "from flags.run import Config\nimport training.start",
    "run.py": "from flags.parse import parse\n" + LATER + "import train",
    "demo/tiny.py": LATER + "import audiocraft, run",
    "benchmarks/step.py": "import audiocraft\nfrom demo import tiny",
    "tests/test_run.py": "import audiocraft, run, benchmarks.step",
}
UP = "which is above it; imports only run down: run, generate"
BESIDE = "which is beside it; imports only run down: run, generate"
FLAGS = "imports flags, which only these may: run, generate"
AUDIOCRAFT = "imports audiocraft, which only these may: musicgen"


def write(root: Path, tree: dict[str, str]) -> None:
    for name, code in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(code + "\n")


def test_this_project_breaks_no_rule():
    assert imports.check(ROOT) == []


def test_what_is_allowed(tmp_path):
    write(tmp_path, TREE)
    assert imports.check(tmp_path) == []


BROKEN = [
    ("recordings/scan.py", "import training.start", 1, f"imports training.start, {UP}"),
    ("recordings/scan.py", "from musicgen import load", 1, f"imports musicgen.load, {UP}"),
    ("recordings/scan.py", "from musicgen import *", 1, f"imports musicgen, {UP}"),
    ("recordings/scan.py", TYPES + "from dataset import Clips", 3, f"imports dataset, {UP}"),
    ("files.py", LATER + "from recordings.audio import read", 2, f"imports recordings.audio, {UP}"),
    ("training/start.py", "from demo import tiny", 1, f"imports demo.tiny, {UP}"),
    ("training/start.py", "from tests.test_run import f", 1, f"imports tests.test_run, {UP}"),
    ("flags/run.py", "from train import train", 1, f"imports train, {UP}"),
    ("flags/run.py", "import files", 1, f"imports files, {BESIDE}"),
    ("dataset.py", "import musicgen", 1, f"imports musicgen, {BESIDE}"),
    ("musicgen/load.py", LATER + "import dataset", 2, f"imports dataset, {BESIDE}"),
    ("analysis/tempo.py", "from dataset import Clips", 1, f"imports dataset, {BESIDE}"),
    ("train.py", "import commands.check", 1, f"imports commands.check, {BESIDE}"),
    ("recordings/audio.py", "import flags", 1, FLAGS),
    ("recordings/audio.py", LATER + "from flags.run import Config", 2, FLAGS),
    ("musicgen/load.py", "import flags", 1, FLAGS),
    ("musicgen/load.py", TYPES + "from flags.run import Config", 3, FLAGS),
    ("analysis/tempo.py", "from flags import run", 1, FLAGS),
    ("commands/check.py", "import audiocraft", 1, AUDIOCRAFT),
    ("run.py", LATER + "from audiocraft.models import MusicGen", 2, AUDIOCRAFT),
    ("training/start.py", TYPES + "import audiocraft.models", 3, AUDIOCRAFT),
    ("other.py", "import run", 1, "other is in no layer yet"),
    ("other/thing.py", "", 1, "other is in no layer yet"),
]


@pytest.mark.parametrize(("name", "code", "line", "message"), BROKEN)
def test_an_import_that_is_not_allowed(tmp_path, name, code, line, message):
    write(tmp_path, {**TREE, name: code})
    found = imports.check(tmp_path)
    assert [text for text in found if text.startswith(f"{name}:{line}: {message}")], found


HEAVY = [
    ({"flags/run.py": "import torch.nn"}, "flags/run.py:1", "flags.run -> torch"),
    ({"flags/run.py": LATER + "import torch"}, "flags/run.py:2", "flags.run -> torch"),
    ({"flags/run.py": TYPES + "import torch"}, "flags/run.py:3", "flags.run -> torch"),
    ({"flags/__init__.py": "import torch"}, "flags/__init__.py:1", "flags -> torch"),
    ({"errors.py": "import torch"}, "errors.py:1", "flags.parse -> errors -> torch"),
    (
        {
            "flags/run.py": "import flags.x",
            "flags/x.py": "import files",
            "files.py": "import torch",
        },
        "files.py:1",
        "flags.x -> files -> torch",
    ),
    (
        {"recordings/audio.py": LATER + "from torch import nn"},
        "recordings/audio.py:2",
        "recordings.scan -> recordings.audio -> torch",
    ),
    (
        {"recordings/__init__.py": "import audiocraft"},
        "recordings/__init__.py:1",
        "recordings.scan -> recordings -> audiocraft",
    ),
    (
        {"recordings/scan.py": "import musicgen.load", "musicgen/load.py": ""},
        "musicgen/__init__.py:1",
        "recordings.scan -> musicgen.load -> musicgen -> torch",
    ),
    (
        {"recordings/scan.py": "from safetensors.torch import load_file"},
        "recordings/scan.py:1",
        "recordings.scan -> safetensors.torch",
    ),
    ({"pages/listen.py": "import torch"}, "pages/listen.py:1", "pages.listen -> torch"),
]


@pytest.mark.parametrize(("files", "place", "way"), HEAVY, ids=lambda v: str(v)[-40:])
def test_what_must_not_reach_torch_and_does(tmp_path, files, place, way):
    write(tmp_path, {**TREE, **files})
    found = imports.check(tmp_path)
    start, library = way.split(" -> ")[0], way.split(" -> ")[-1]
    assert f"{place}: imports {library}, which {start} must not reach: {way}" in found


CIRCLES = [
    ({"recordings/audio.py": "import recordings.scan"}, "recordings.scan -> recordings.audio"),
    ({"recordings/audio.py": LATER + "from . import scan"}, "recordings.scan -> recordings.audio"),
    ({"recordings/audio.py": TYPES + "from .scan import f"}, "recordings.scan -> recordings.audio"),
    (
        {"demo/tiny.py": "import demo.music", "demo/music.py": "from benchmarks import step"},
        "benchmarks.step -> demo.tiny -> demo.music",
    ),
]


@pytest.mark.parametrize(("files", "circle"), CIRCLES)
def test_a_circle(tmp_path, files, circle):
    write(tmp_path, {**TREE, **files})
    (found,) = imports.check(tmp_path)
    place, told = found.split(": imports in a circle: ")
    first, *others = told.split(" -> ")
    assert others[-1] == first
    assert place.startswith(first.replace(".", "/") + ".py:")
    assert sorted(others) == sorted(circle.split(" -> "))


def test_what_is_too_long(tmp_path):
    tree = {
        "files.py": "\n" * 399,
        "errors.py": "\n" * 400,
        "train.py": "def f():\n" + "    x = 0\n" * 69,
        "commands/check.py": "class A:\n    async def f():\n" + "        x = 0\n" * 70,
        "tests/test_run.py": "\n" * 400 + "def f():\n" + "    x = 0\n" * 70,
        "demo/build/codec.py": "\n" * 400,
    }
    write(tmp_path, {**TREE, **tree})
    assert imports.check(tmp_path) == [
        "commands/check.py:2: f has 71 lines; a function may have 70",
        "errors.py:1: has 401 lines; a file may have 400",
    ]


def test_the_exit_code(tmp_path):
    write(tmp_path, TREE)
    script = shutil.copy(imports.__file__, tmp_path / "tests" / "imports.py")

    def run() -> tuple[int, str]:
        done = subprocess.run([sys.executable, script], capture_output=True, text=True)
        return done.returncode, done.stdout

    assert run() == (0, "Imports and lengths are fine.\n")
    write(tmp_path, {"errors.py": "import files"})
    code, told = run()
    assert code == 1
    assert told.startswith("errors.py:1: imports files, which is above it; imports only run down: ")
