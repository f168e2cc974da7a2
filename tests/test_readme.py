"""The README's flag tables are those of the code."""

import re

import pytest
from conftest import ROOT

from flags.generate import ExportConfig as MergeConfig
from flags.generate import GenerateConfig
from flags.parse import Flags
from flags.prepare import CheckConfig, CleanConfig, EncodeConfig, ShardConfig
from flags.run import Config

COMMANDS = [
    Config,
    GenerateConfig,
    MergeConfig,
    CheckConfig,
    CleanConfig,
    EncodeConfig,
    ShardConfig,
]


def row(name: str, flags: type[Flags]) -> str:
    field = flags.model_fields[name]
    default = "required" if field.is_required() else field.default
    if isinstance(default, bool):
        default = int(default)
    return f"| `--{name}` | {default} | {field.description} |"


@pytest.mark.parametrize("flags", COMMANDS)
def test_readme_tells_every_flag(flags: type[Flags]) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    missing = [row(name, flags) for name in flags.model_fields if row(name, flags) not in lines]
    assert not missing, "put these rows into README.md:\n" + "\n".join(missing)
    told = {match[1] for line in lines if (match := re.match(r"\| `--(\w+)` ", line))}
    assert told == {name for command in COMMANDS for name in command.model_fields}
