"""The documentation: its flags, commands, links and versions are those of the code."""

import ast
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

from flags.generate import ExportConfig, GenerateConfig
from flags.parse import Flags, parse
from flags.prepare import CheckConfig, CleanConfig, EncodeConfig, ShardConfig
from flags.run import Config

README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "demo/README.md",
    ROOT / "models/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS: dict[str, type[Flags]] = {  # in the order of docs/flags.md
    "run.py": Config,
    "generate.py": GenerateConfig,
    "export.py": ExportConfig,
    "prepare.py check": CheckConfig,
    "prepare.py clean": CleanConfig,
    "prepare.py encode": EncodeConfig,
    "prepare.py shard": ShardConfig,
}
SCRIPTS = {command.split()[0] for command in COMMANDS}
MOST_LINES = 170  # of the README: what a person reads before they start

# What the examples name, beside demo/.
FOLDERS = ["my_music", "my_tokens", "my_shards", "models/lora_final"]
FOLDERS += ["one/lora_final", "two/lora_final"]
FILES = ["start.wav", "hummed.wav", "models/learned_embeds.safetensors"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[str]:
    """The blocks of code, with lines that end in a backslash joined to the next."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.M | re.S)


def prose(page: Path) -> str:
    """Return what is outside the blocks of code."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^ *```\w*\n.*?^ *```$", "", text, flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """`Such` code within the text; a span may go on in the next line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


# docs/flags.md


def rows(cls: type[Flags], names: tuple[str, ...]) -> list[str]:
    return [
        f"| `--{name}` | {cls.default_text(name)} | {cls.model_fields[name].description} |"
        for name in names
    ]


def rows_by_heading(page: Path) -> dict[tuple[str, str], list[str]]:
    """(heading of a command, heading of a group in it or "") -> the rows of the tables there."""
    tables: dict[tuple[str, str], list[str]] = {}
    command = group = ""
    for line in prose(page).splitlines():
        if line.startswith("## "):
            command, group = line[3:], ""
        elif line.startswith("### "):
            group = line[4:]
        elif line.startswith("|") and line not in ("| flag | default | meaning |", "|---|---|---|"):
            tables.setdefault((command, group), []).append(line)
    return tables


def test_each_flag_has_its_row_under_its_heading():
    of_code = {
        (command, heading if cls.GROUPS else ""): rows(cls, names)
        for command, cls in COMMANDS.items()
        for heading, names in cls.groups().items()
    }
    of_docs = rows_by_heading(ROOT / "docs/flags.md")
    wrong = [
        f"under {' > '.join(filter(None, place))} put:\n" + "\n".join(table)
        for place, table in of_code.items()
        if of_docs.get(place) != table
    ]
    assert not wrong, "in docs/flags.md,\n" + "\n\n".join(wrong)
    assert list(of_docs) == list(of_code), "docs/flags.md has other headings, or in another order"


# The commands


class Command(NamedTuple):
    page: str
    words: list[str]  # from the script's name on, or from the module's after -m


def commands_in(page: Path) -> list[Command]:
    """List what a reader may type: in blocks of code, and in code within the text."""
    lines = [line for block in fences(page) for line in block.splitlines()] + spans(page)
    starts = r"\s*(\$ )?(python|torchrun|accelerate launch|(run|generate|prepare|export)\.py) "
    found = []
    for line in lines:
        if not re.match(starts, line):
            continue
        words = shlex.split(line, comments=True)
        starters = [i for i, word in enumerate(words) if word in SCRIPTS or word == "-m"]
        if not starters or words[:3] == ["python", "-m", "venv"]:
            continue
        start = starters[0] + (words[starters[0]] == "-m")
        named = 2 if words[start] == "prepare.py" else 1  # `prepare.py check` in a sentence
        if words[0] not in SCRIPTS or len(words) > named:
            found.append(Command(name_of(page), words[start:]))
    return found


ALL = [command for page in PAGES for command in commands_in(page)]
OURS = [command for command in ALL if command.words[0] in SCRIPTS]
MODULES = [command for command in ALL if command.words[0] not in SCRIPTS]


def shown(command: object) -> str | None:
    if isinstance(command, Command):
        return f"{command.page}: {' '.join(command.words)}"[:90]
    return None


def test_commands_are_found_at_all():
    assert {command.words[0] for command in OURS} == SCRIPTS
    assert {"README.md", "docs/data.md", "demo/README.md"} <= {command.page for command in OURS}
    assert {"docs/measurements.md", "CONTRIBUTING.md"} <= {command.page for command in MODULES}


@pytest.mark.parametrize("command", OURS, ids=shown)
def test_command_is_read_without_a_complaint(command, tmp_path, monkeypatch):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
    for file in FILES:
        (tmp_path / file).touch()
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    script, *words = command.words
    if script == "prepare.py":
        script = f"prepare.py {words.pop(0)}"
    assert script in COMMANDS, "no such command"
    monkeypatch.setattr(sys, "argv", [script.split()[0], *words])
    try:
        parse(COMMANDS[script])
    except SystemExit as end:
        assert "--help" in words and not end.code


def functions(module: Path) -> dict[str, ast.FunctionDef]:
    """The commands of a script that fire reads; "" is the one of a script with just one."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    known = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "fire.Fire"
    ]
    what = call.args[0]
    if isinstance(what, ast.Name):
        return {"": known[what.id]}
    assert isinstance(what, ast.Dict)
    return {
        ast.literal_eval(key): known[ast.unparse(value)]
        for key, value in zip(what.keys, what.values, strict=True)
        if key
    }


@pytest.mark.parametrize("command", MODULES, ids=shown)
def test_module_is_there_with_its_command_and_flags(command):
    module, *words = command.words
    if module == "pytest":
        wanted = words[words.index("-k") + 1]
        texts = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
        assert any(f"def {wanted}(" in text for text in texts)
        return
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert path.is_file()
    if not module.startswith("benchmarks."):
        return
    known = functions(path)
    called = "" if "" in known else words.pop(0)
    assert called in known
    arguments = known[called].args
    names = {argument.arg for argument in [*arguments.args, *arguments.kwonlyargs]}
    for word in words:
        assert word.removeprefix("--").split("=")[0] in names or arguments.kwarg, word


OTHERS = {"help", "flag", "no-deps", "nproc_per_node", "multi_gpu", "num_processes"}
OTHERS |= {"nnodes", "node_rank", "master_addr", "master_port", "max-restarts"}  # torchrun's
OTHERS |= {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"}  # Slurm's
OTHERS |= {"requeue", "open-mode"}
OTHERS |= {"size", "repeats", "loop_steps"}  # benchmarks/step.py


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_flag_that_a_page_names_exists(page):
    known = {name for cls in COMMANDS.values() for name in [*cls.model_fields, *cls.ALIASES]}
    code = "\n".join([*fences(page), *spans(page)])
    named = set(re.findall(r"(?<![\w-])--(\w[\w-]*)", code))
    assert named - known - OTHERS == set()


# Links


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        same = [f"{slug}-{number}" if number else slug for number in range(len(found) + 1)]
        found.add(next(name for name in same if name not in found))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`]+`", "`code`", prose(page))
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    dead = []
    for link in (one or other for one, other in links):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        is_dead_end = anchor and target.suffix == ".md" and anchor not in anchors(target)
        if not target.exists() or is_dead_end:
            dead.append(link)
    assert not dead


# Versions, and the README's length


def makefile_installs() -> list[list[str]]:
    """The words after `pip install` and its own settings, for what users need."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (audiocraft,) = re.findall(r"^AUDIOCRAFT := (\S+)$", text, re.M)
    recipe = text[text.index("$(INSTALLED): ") :].split("\n\n")[0]
    lines = re.findall(r"^\t@?\$\(PIP\) (.+)$", recipe, re.M)
    for_users = [line.replace(" --requirement requirements-dev.txt", "") for line in lines]
    return [line.replace("$(AUDIOCRAFT)", audiocraft).split() for line in for_users]


def test_the_plain_pip_commands_are_those_of_make_install():
    lines = [line for block in fences(README) for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("pip ")]
    plain = [
        ["--requirement" if word == "-r" else word for word in words[2:]] for words in commands
    ]
    assert plain == makefile_installs()
    assert len(plain) == 2


def test_one_version_of_audiocraft_is_named_everywhere():
    files = ("Makefile", "README.md", "requirements.txt", "finetune.ipynb")
    found = [
        re.findall(r"audiocraft==([\d.]+)", (ROOT / file).read_text(encoding="utf-8"))
        for file in files
    ]
    assert all(found), dict(zip(files, found, strict=True))
    assert len({version for versions in found for version in versions}) == 1


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
