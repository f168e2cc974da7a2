"""Check which file imports which, and how long files and functions are: a part of `make lint`.

    python tests/imports.py

Imports inside functions and under TYPE_CHECKING count too.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

# Top files and folders, from the top down. Each may import itself and all lines below its own.
LAYERS = [
    ["run", "generate", "prepare", "export"],
    ["train", "commands"],
    ["training"],
    ["dataset", "musicgen", "analysis", "pages"],
    ["recordings"],
    ["files", "flags"],
    ["errors"],
]
FREE = ["benchmarks", "demo", "docs", "tests"]  # may import everything; no layer imports them
ONLY_FROM = {  # may be imported by FREE and by these only
    "audiocraft": ["musicgen"],
    "flags": ["run", "generate", "prepare", "export", "train", "commands", "training", "dataset"],
}
LIGHT = ["flags", "recordings.scan", "training.tracks", "pages"]  # must not reach HEAVY,
LIGHT += ["commands.encode_files", "commands.pieces", "commands.shard"]  # not even through others
HEAVY = ["torch", "audiocraft"]
HEAVY += ["accelerate", "bitsandbytes", "demucs", "peft", "safetensors.torch", "torchao"]
HEAVY += ["torchaudio", "transformers"]  # these import torch

MAX_FILE, MAX_FUNCTION = 400, 70  # lines
ANY_LENGTH = ["tests", "demo.build"]

RANKS = {top: rank for rank, tops in enumerate([FREE, *LAYERS]) for top in tops}
ORDER = " -> ".join(", ".join(tops) for tops in LAYERS)


class Import(NamedTuple):
    """One import: where it stands, and a module of the project or a name from a library."""

    line: int
    name: str


def check(root: Path) -> list[str]:
    """Return what breaks a rule in the project at `root`, each as `file:line: message`."""
    paths = dict(find_modules(root))
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    imports = {name: list(find_imports(name, tree, paths)) for name, tree in trees.items()}
    found = [(name, *wrong) for name in imports for wrong in _wrong_layer(name, imports[name])]
    found += [*_heavy(imports), *_circle(imports)]
    for name in (name for name in paths if not _within(name, ANY_LENGTH)):
        found += [(name, *wrong) for wrong in _too_long(texts[name], trees[name])]
    places = [(paths[name].relative_to(root).as_posix(), line, text) for name, line, text in found]
    return [f"{path}:{line}: {text}" for path, line, text in sorted(set(places))]


def find_modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and path of each file; a package's own file is `package.__init__`."""
    folders = {path.parent for path in root.glob("[!.]*/*.py")}
    for path in sorted([*root.glob("*.py"), *(p for f in folders for p in f.rglob("*.py"))]):
        yield ".".join(path.relative_to(root).with_suffix("").parts), path


def find_imports(module: str, tree: ast.Module, modules: Iterable[str]) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = [*above, node.module] if node.module else above
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(node.lineno, _module_of(name, modules))


def _module_of(name: str, modules: Iterable[str]) -> str:
    """Return the module of the project that a name is or is in, or else the name."""
    start = name
    while start:
        for module in (start, f"{start}.__init__"):
            if module in modules:
                return module
        start = start.rpartition(".")[0]
    return name


def _wrong_layer(module: str, imports: list[Import]) -> Iterator[tuple[int, str]]:
    own = _top(module)
    if own not in RANKS:
        yield 1, f"{own} is in no layer yet; add it to LAYERS in tests/imports.py"
    elif own not in FREE:
        for line, name in imports:
            other = _top(name)
            if other == own:
                continue
            if other in RANKS and RANKS[other] <= RANKS[own]:
                where = "beside" if RANKS[other] == RANKS[own] else "above"
                text = f"imports {_shown(name)}, which is {where} it"
                yield line, f"{text}; imports only run down: {ORDER}"
            if own not in ONLY_FROM.get(other, [own]):
                yield line, f"imports {other}, which only these may: {', '.join(ONLY_FROM[other])}"


def _heavy(imports: dict[str, list[Import]]) -> Iterator[tuple[str, int, str]]:
    """Follow the imports of what is LIGHT, each up to the first file that imports what is HEAVY."""
    ways = {module: [module] for module in imports if _within(module, LIGHT)}
    todo = list(ways)
    for module in todo:  # grows meanwhile
        lines = {i.name: i.line for i in reversed(imports[module])}
        heavy = {name: lines[i] for i in lines for name in HEAVY if _within(i, [name])}
        for name, line in heavy.items():
            start = _shown(ways[module][0])
            way = " -> ".join(map(_shown, [*ways[module], name]))
            yield module, line, f"imports {name}, which {start} must not reach: {way}"
        for name in () if heavy else (*lines, *_packages(module)):
            if name in imports and name not in ways:
                ways[name] = [*ways[module], name]
                todo.append(name)


def _packages(module: str) -> Iterator[str]:
    """Yield the packages that a module is in: Python runs them first."""
    parts = module.split(".")
    for end in range(1, len(parts)):
        yield ".".join([*parts[:end], "__init__"])


def _circle(imports: dict[str, list[Import]]) -> Iterator[tuple[str, int, str]]:
    """Yield the first circle, if there is one."""
    try:
        TopologicalSorter({m: [i.name for i in found] for m, found in imports.items()}).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]
        line = next(i.line for i in imports[circle[0]] if i.name == circle[1])
        yield circle[0], line, f"imports in a circle: {' -> '.join(map(_shown, circle))}"


def _too_long(text: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if (lines := len(text.splitlines())) > MAX_FILE:
        yield 1, f"has {lines} lines; a file may have {MAX_FILE}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MAX_FUNCTION:
                yield (
                    node.lineno,
                    f"{node.name} has {lines} lines; a function may have {MAX_FUNCTION}",
                )


def _within(name: str, tops: list[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def _top(name: str) -> str:
    return name.split(".")[0]


def _shown(name: str) -> str:
    return name.removesuffix(".__init__")


if __name__ == "__main__":
    wrong = check(Path(__file__).parent.parent)
    print("\n".join(wrong) or "Imports and lengths are fine.")
    sys.exit(1 if wrong else 0)
