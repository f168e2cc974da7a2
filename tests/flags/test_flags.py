"""The command line: what each flag means, and what a mistyped one is told."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import generate
import run
from errors import UserError
from flags.generate import ExportConfig, GenerateConfig
from flags.parse import Flags, parse
from flags.prepare import CheckConfig, CleanConfig, EncodeConfig, ShardConfig
from flags.run import Config

# The original trainer's flags: default, another value as it is typed, and what that means.
ORIGINAL = {
    "dataset_path": (None, "music", "music"),
    "model_id": ("small", "medium", "medium"),
    "lr": (1e-5, "3e-4", 3e-4),
    "epochs": (100, "7", 7),
    "use_wandb": (0, "1", True),
    "save_step": (None, "50", 50),
    "no_label": (0, "1", True),
    "tune_text": (0, "1", True),
    "weight_decay": (1e-5, "0.01", 0.01),
    "grad_acc": (2, "8", 8),
    "warmup_steps": (16, "0", 0),
    "batch_size": (4, "1", 1),
    "use_cfg": (0, "1", True),
}
COMMANDS = [
    Config,
    GenerateConfig,
    ExportConfig,
    CheckConfig,
    CleanConfig,
    EncodeConfig,
    ShardConfig,
]
FORBIDDEN = {"torch", "audiocraft", "transformers", "accelerate", "matplotlib"}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line is given in a folder that holds these."""
    for name in ("music", "other", "2024"):
        (tmp_path / name).mkdir()
    (tmp_path / "song.wav").touch()
    (tmp_path / "prompts.txt").write_text("slow piano\n\n  fast drums \n", encoding="utf-8-sig")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch):
    """`read("--lr=1")` -> Config of that command line."""

    def reader(*words: str, cls: type[Flags] = Config):
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        return parse(cls)

    return reader


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_flag_keeps_its_default_and_meaning(name, read):
    default, typed, value = ORIGINAL[name]
    if name != "dataset_path":
        assert getattr(read("--dataset=other"), name) == default
    words = [f"--{name}={typed}"] + ([] if name == "dataset_path" else ["--dataset=music"])
    if name in ("no_label", "tune_text"):  # the one without the other
        assert not getattr(read("--dataset=music"), name)
    assert getattr(read(*words), name) == value


def test_no_original_flag_but_the_dataset_is_required(read):
    config = read("--dataset_path=music")
    assert {n: getattr(config, n) for n in ORIGINAL} == {
        n: "music" if n == "dataset_path" else default for n, (default, *_) in ORIGINAL.items()
    }


READS = [
    (["--dataset=2024"], "dataset_path", "2024"),
    (["--dataset", "2024"], "dataset_path", "2024"),
    (["--model_id=2024"], "model_id", "2024"),
    (["--output_dir", "1e3"], "output_dir", "1e3"),
    (["--epochs", "1e3"], "epochs", 1000),
    (["--epochs=20.0"], "epochs", 20),
    (["--use_wandb", "false"], "use_wandb", False),
    (["--use_wandb=0"], "use_wandb", False),
    (["--use_wandb=True"], "use_wandb", True),
    (["--use_wandb"], "use_wandb", True),
    (["--nouse_wandb"], "use_wandb", False),
    (["--save_step=None"], "save_step", None),
    (["--save_step=0"], "save_step", 0),
    (["--batch-size=2"], "batch_size", 2),
    (["--lr=1", "--lr=0.5"], "lr", 0.5),
    (["--seed=9007199254740993"], "seed", 9007199254740993),
    (["--sample_step=1", "--sample_prompts=lo-fi, calm"], "sample_prompts", ["lo-fi, calm"]),
    (["--sample_step=1", "--sample_prompts=2024"], "sample_prompts", ["2024"]),
    (["--sample_step=1", '--sample_prompts=["a, b", "c"]'], "sample_prompts", ["a, b", "c"]),
    (["--sample_step=1", "--sample_prompts=prompts.txt"], "sample_prompts", 2),
]


@pytest.mark.parametrize(("words", "name", "value"), READS, ids=lambda v: str(v)[:40])
def test_value_is_read_as_it_was_meant(words, name, value, read):
    has_dataset = any(word.startswith("--dataset") for word in words)
    got = getattr(read(*words, *([] if has_dataset else ["--dataset=music"])), name)
    if value == 2 and name == "sample_prompts":
        value = ["slow piano", "fast drums"]
    assert got == value
    assert type(got) is type(value)


DATA = "--dataset=music"
MISTAKES = [  # the command line, and what its message must hold
    ([], ["--dataset_path is missing", "folder of recordings"]),
    (["--dataset=nowhere"], ["--dataset_path=nowhere", "no such folder"]),
    (["--dataset=song.wav"], ["--dataset_path=song.wav", "is a file, not a folder"]),
    (["--dataset="], ["--dataset_path"]),
    (["--dataset"], ["--dataset_path", "needs a value"]),
    (["--dataset=music", "--dataset_path=other"], ["--dataset"]),
    ([DATA, "--lr"], ["--lr: needs a value", "learning rate", "1e-05"]),
    ([DATA, "--lr", "abc"], ["--lr=abc", "number", "learning rate"]),
    ([DATA, "--lr=0"], ["--lr=0", "greater than 0"]),
    ([DATA, "--lr=nan"], ["--lr=nan", "finite"]),
    ([DATA, "--lr=inf"], ["--lr=inf", "finite"]),
    ([DATA, "--epochs=0"], ["--epochs=0:", "greater than or equal to 1"]),
    ([DATA, "--epochs=0.5"], ["--epochs=0.5", "integer"]),
    ([DATA, "--epochs=many"], ["--epochs=many", "integer"]),
    ([DATA, "--batch_size=-1"], ["--batch_size=-1:", "greater"]),
    ([DATA, "--use_wandb=2"], ["--use_wandb=2", "boolean"]),
    ([DATA, "--use_wandb=maybe"], ["--use_wandb=maybe", "boolean", "0 = off"]),
    ([DATA, "--precision=fp8"], ["--precision=fp8", "'bf16'"]),
    ([DATA, "--lr_scheduler=linear"], ["--lr_scheduler=linear", "'cosine' or 'constant'"]),
    ([DATA, "--valid_split=1"], ["--valid_split=1", "less than 1"]),
    ([DATA, "--sample_step=1", "--sample_prompts=[]"], ["--sample_prompts=[]"]),
    ([DATA, "--sample_step=1", "--sample_prompts=no.txt"], ["--sample_prompts=no.txt", "no.txt"]),
    ([DATA, "--sample_step=1", "--sample_prompts=[a"], ["--sample_prompts=[a", '["one", "two"]']),
    ([DATA, "--model_id"], ["--model_id"]),
    ([DATA, "--learn_rate=1"], ["--learn_rate: no such flag"]),
    (["--datset=music"], ["--datset: no such flag", "did you mean --dataset_path?"]),
    ([DATA, "--epoch=3"], ["--epoch: no such flag", "did you mean --epochs?"]),
    ([DATA, "--words=3"], ["--words: no such flag"]),
    ([DATA, "-b", "2"], ["--b: no such flag"]),
    ([DATA, "lr", "0.1"], ["lr: not a flag", "0.1: not a flag"]),
    (["--lr=abc", "--epoch=3", "stray"], ["--lr=abc", "--epochs?", "stray: write it as --data"]),
    ([DATA, "--resume", "--overwrite"], ["--resume and --overwrite", "one of them"]),
    ([DATA, "--valid_path=other", "--valid_split=0.1"], ["--valid_path and --valid_split"]),
    ([DATA, "--tune_text", "--no_label"], ["--tune_text", "--no_label", "nothing to train"]),
    ([DATA, "--cfg_p=0.5"], ["--cfg_p does nothing without --use_cfg=1"]),
    ([DATA, "--keep_checkpoints=3"], ["--keep_checkpoints", "--save_step"]),
    ([DATA, "--wandb_name=x"], ["--wandb_name", "--use_wandb=1"]),
    ([DATA, "--valid_step=3", "--sample_duration=3"], ["--valid_step", "--sample_duration"]),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=lambda v: " ".join(v)[:50])
def test_mistake_is_told_with_flag_value_and_remedy(words, says, read):
    with pytest.raises(UserError) as error:
        read(*words)
    assert [part for part in says if part not in str(error.value)] == [], error.value
    assert "See --help" in str(error.value)
    for jargon in ("pydantic", "type=", "Input ", "String should", "Value should", "validation,"):
        assert jargon not in str(error.value)


@pytest.mark.parametrize(
    ("word", "cls", "flag"),
    [
        ("music", Config, "--dataset_path=music"),
        ("./my music", Config, "--dataset_path='./my music'"),
        ("slow piano", GenerateConfig, "--prompt='slow piano'"),
        ("music", ExportConfig, "--lora=music"),
    ],
)
def test_a_word_is_told_the_flag_that_it_is_meant_for_in_one_line(word, cls, flag, read, tmp_path):
    (tmp_path / "my music").mkdir()
    with pytest.raises(UserError) as error:
        read(word, cls=cls)
    assert str(error.value) == f"{word}: write it as {flag}"


def test_a_word_is_quoted_as_windows_reads_it(read, monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    for word, typed in {r"C:\music": r"C:\music", r"C:\my music": r'"C:\my music"'}.items():
        with pytest.raises(UserError) as error:
            read(word, cls=Config)
        assert f"write it as --dataset_path={typed}\n" in str(error.value)


def test_a_missing_path_is_told_without_the_flags_help(read):
    with pytest.raises(UserError) as error:
        read("--dataset_path=nowhere", "--valid_path=song.wav")
    assert str(error.value).splitlines() == [
        "--dataset_path=nowhere: no such folder",
        "--valid_path=song.wav: is a file, not a folder",
        "See --help for every flag.",
    ]


def test_the_help_of_the_dataset_is_one_line():
    assert len(Config.model_fields["dataset_path"].description) <= 74  # of 80 columns


# An alias, other flags that its command needs, and what the flag's own name then holds.
ALIASES = [
    (Config, "dataset", [], "music"),
    (GenerateConfig, "weights", ["--prompt=x"], "lm.pt"),
    (GenerateConfig, "output", ["--prompt=x"], "out"),
    (CheckConfig, "folder", [], "music"),
    (CleanConfig, "folder", ["--output_dir=out", "--loudness=-14"], "music"),
    (CleanConfig, "out", ["--dataset_path=music", "--loudness=-14"], "out"),
    (EncodeConfig, "folder", ["--output_dir=out"], "music"),
    (EncodeConfig, "out", ["--dataset_path=music"], "out"),
    (ShardConfig, "folder", ["--output_dir=out"], "music"),
    (ShardConfig, "out", ["--dataset_path=music"], "out"),
]


@pytest.mark.parametrize(("cls", "alias", "words", "value"), ALIASES)
def test_alias_is_the_flag(cls, alias, words, value, read):
    flag = cls.ALIASES[alias]
    config = read(f"--{alias}={value}", *words, cls=cls)
    assert config == read(f"--{flag}={value}", *words, cls=cls)
    assert getattr(config, flag) == value
    with pytest.raises(UserError, match=f"--{alias}: no such flag"):  # one of the two is meant
        read(f"--{alias}={value}", f"--{flag}={value}", *words, cls=cls)


def test_every_alias_is_tried():
    known = {(cls, alias) for cls in COMMANDS for alias in cls.ALIASES}
    assert known == {(cls, alias) for cls, alias, *_ in ALIASES}


REMOVED = {
    "drop_desc_p": "probability 0.5",
    "drop_other_p": "probability 0.5",
    "lora_rslora": "give a larger --lora_alpha",
}


@pytest.mark.parametrize("name", REMOVED)
def test_removed_flag_is_told_with_what_replaces_it(name, read):
    with pytest.raises(UserError) as error:
        read(DATA, f"--{name}=1")
    assert f"--{name}: no longer a flag: " in str(error.value)
    assert REMOVED[name] in str(error.value)
    assert "no such flag" not in str(error.value)


def test_home_folder_is_understood_in_every_path(read, monkeypatch, tmp_path):
    """A shell leaves the ~ of --flag=~/folder to the program."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    config = read("--dataset=~/music", "--output_dir=~/out", "--valid_path=~/other")
    assert config.dataset_path == str(tmp_path / "music")
    assert config.valid_path == str(tmp_path / "other")
    assert config.output_dir == str(tmp_path / "out")
    words = ["--prompt=x", "--weights_path=~/lm.pt", "--prompt_audio=~/song.wav"]
    config = read(*words, "--output_dir=~/out", cls=GenerateConfig)
    assert config.weights_path == str(tmp_path / "lm.pt")
    assert config.prompt_audio == str(tmp_path / "song.wav")
    assert config.output_dir == str(tmp_path / "out")


def test_generate_reads_its_flags(read):
    config = read("--prompt=prompts.txt", "--weights_path=None", "--top-k=5", cls=GenerateConfig)
    assert config.prompt == ["slow piano", "fast drums"]
    assert config.weights_path is None
    assert config.top_k == 5
    with pytest.raises(UserError, match="--prompt is missing"):
        read(cls=GenerateConfig)
    with pytest.raises(UserError, match=r"--duration=0: .*greater than 0"):
        read("--prompt=x", "--duration=0", cls=GenerateConfig)


@pytest.mark.parametrize("cls", COMMANDS)
def test_each_flag_has_a_line_of_help(cls):
    assert all(field.description for field in cls.model_fields.values())
    assert all("\n" not in field.description for field in cls.model_fields.values())


@pytest.mark.parametrize("cls", [Config, GenerateConfig])
def test_flags_are_frozen(cls, read):
    config = read("--dataset=music") if cls is Config else read("--prompt=x", cls=cls)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def listed(text: str) -> dict[str, list[str]]:
    """Read what --help printed: heading -> flags, in its order."""
    groups: dict[str, list[str]] = {}
    heading = ""
    for line in text.splitlines():
        if match := re.match(r"  --(\w+)(?:=| \(required\)$)", line):
            groups.setdefault(heading, []).append(match[1])
        elif line and not line.startswith(" "):
            heading = line
    return groups


@pytest.mark.parametrize("cls", COMMANDS)
def test_help_has_each_flag_once_under_its_heading(cls, read, capsys):
    with pytest.raises(SystemExit) as end:
        read("--help", cls=cls)
    assert end.value.code is None
    groups = listed(capsys.readouterr().out)
    assert list(groups.items()) == [(head, list(names)) for head, names in cls.groups().items()]
    assert sorted(name for names in groups.values() for name in names) == sorted(cls.model_fields)


def test_run_has_seven_flags_for_most_people_and_no_more_than_56():
    heading, names = next(iter(Config.groups().items()))
    assert ("seven" in heading, len(names)) == (True, 7)
    assert len(Config.model_fields) <= 56


STARTS = [
    ("run.py", ["--help"], Config, 0),
    ("run.py", ["--datset=music"], None, 1),
    ("generate.py", ["--help"], GenerateConfig, 0),
    ("generate.py", ["--promt=music"], None, 1),
    ("export.py", ["--help"], ExportConfig, 0),
]


@pytest.mark.parametrize(("script", "words", "cls", "code"), STARTS, ids=lambda v: str(v))
def test_help_and_mistyped_flags_are_answered_at_once(script, words, cls, code):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code
    imported = {name.split(".")[0] for name in re.findall(r"\| +(\S+)$", done.stderr, re.M)}
    assert "fire" in imported, "importtime is not read right"
    assert not imported & FORBIDDEN
    if cls:
        told = " ".join(done.stdout.split())
        assert listed(done.stdout) == {k: list(names) for k, names in cls.groups().items()}
        lines = [" ".join(field.description.split()) for field in cls.model_fields.values()]
        assert not [line for line in lines if line not in told]
    else:
        assert "did you mean" in done.stderr
        assert not done.stdout


@pytest.mark.parametrize("script", [run, generate])
def test_mistake_ends_with_code_1_and_one_message(script, cli):
    result = cli(script, "stray", lr="abc", duration=0)
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("See --help for every flag.") == 1
