"""A run shows what it does: lines on the screen, metrics.jsonl, training.png, samples, wandb."""

import hashlib
import io
import json
import math
import re
import statistics
import struct
import subprocess
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile as sf
from conftest import Result, run_script, write_pairs
from matplotlib import image
from processes import Started

import prepare
import run
from demo.tiny import build_musicgen
from training import report

PLOT = report.plot  # the true one: `cli` has it replaced
TINY = {"duration": 1, "device": "cpu", "num_workers": 0, "batch_size": 2, "grad_acc": 1}
SHOWN = {"valid_split": 0.3, "valid_step": 2, "sample_step": 2, "sample_duration": 0.3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips; a third of them is two."""
    return write_pairs(tmp_path_factory.mktemp("data") / "music", seconds=(1.0, 1.2, 1.5) * 2)


@pytest.fixture
def train(cli, data: Path, mono_folder: Path, tmp_path: Path) -> Callable[..., Result]:
    """`train(lr=1)` runs run.py for four steps into tmp_path/"run"."""

    def call(output: str = "run", **flags: Any) -> Result:
        here = {"dataset_path": data, "model_id": mono_folder, "output_dir": tmp_path / output}
        result = cli(run, **{**here, **TINY, "max_steps": 4, **flags})
        assert result.code == 0, result.err
        return result

    return call


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_have_a_row_for_every_step_and_validation(train, tmp_path):
    train(**SHOWN)
    kinds = [
        ("valid" if "valid_loss" in row else "train", row["step"]) for row in rows(tmp_path / "run")
    ]
    assert kinds == [
        *[("valid", 0), ("train", 1), ("train", 2), ("valid", 2)],
        *[("train", 3), ("train", 4), ("valid", 4)],
    ]
    for row in rows(tmp_path / "run"):
        if "loss" in row:
            assert set(row) == {
                *("step", "loss", "loss_codebooks", "lr", "grad_norm", "ms", "clips_per_sec"),
            }
            assert row["loss"] == pytest.approx(statistics.fmean(row["loss_codebooks"]))
            assert row["clips_per_sec"] == pytest.approx(2 / (row["ms"] / 1000))
            assert row["grad_norm"] > 0
        else:
            assert len(row["valid_loss_codebooks"]) == 4
            assert row["valid_loss"] == pytest.approx(statistics.fmean(row["valid_loss_codebooks"]))
            assert row["valid_perplexity"] == pytest.approx(math.exp(row["valid_loss"]))
            assert row["valid_perplexity_codebooks"] == pytest.approx(
                [math.exp(loss) for loss in row["valid_loss_codebooks"]]
            )
    # Random weights know nothing: about a uniform guess among the codebook's 64.
    assert rows(tmp_path / "run")[0]["valid_loss"] == pytest.approx(math.log(64), abs=0.6)


def test_the_picture_is_drawn_anew_while_the_run_goes_on(train, tmp_path, monkeypatch):
    hashes = []
    draw = report.Report.draw

    def recording(self):
        draw(self)
        hashes.append(hashlib.sha256((self.folder / "training.png").read_bytes()).hexdigest())
        self._next_draw = 0.0  # due again at once

    monkeypatch.setattr(report.Report, "draw", recording)
    monkeypatch.setattr(report, "plot", PLOT)
    train(max_steps=3, valid_split=0.3, valid_step=1)
    assert len(hashes) >= 6
    assert len(set(hashes[1:])) >= 5
    picture = image.imread(tmp_path / "run" / "training.png")
    assert picture.shape[0] > 400
    assert picture.shape[1] > 600
    blue = (picture[..., 2] > picture[..., 0] + 0.3).sum()
    red = (picture[..., 0] > picture[..., 2] + 0.3).sum()
    assert min(blue, red) > 50, "the curves of training and held-out loss are in it"


def test_a_long_run_does_not_spend_its_time_on_pictures(train, monkeypatch):
    drawn = []
    draw = report.Report.draw
    monkeypatch.setattr(report.Report, "draw", lambda self: drawn.append(1) or draw(self))
    train(max_steps=4)
    assert len(drawn) == 2  # after the first row, and at the end


STEP_LINE = re.compile(
    r"step (\d)/4  loss \d\.\d{4}  lr \d\.\d\de-\d\d  grad \d+\.\d\d  \d+ ms  [\d.]+ clips/s  "
    r"eta \d+:\d\d$"
)
VALID_LINE = re.compile(
    r"step (\d)/4  held-out loss \d\.\d{4}  perplexity [\d.]+  codebooks [\d. ]+$"
)


def test_the_screen_shows_facts_steps_held_out_loss_and_samples(train, tmp_path, mono_folder):
    out = train(**SHOWN, use_cfg=1, cfg_p=0.3).out.splitlines()
    facts = dict(line.split(maxsplit=1) for line in out[:9] if not line.startswith("held out"))
    assert facts["data"].startswith("4 files, 0:0")
    assert "crops of 1 s" in facts["data"]
    assert any(line.startswith("held out   2 files") for line in out[:9])
    assert "probability 0.3" in facts["captions"]
    assert str(mono_folder) in facts["model"]
    assert "0.2 M parameters, 0.2 M trained" in facts["model"]
    assert facts["device"].startswith("cpu")
    assert facts["precision"].startswith("fp32")
    assert facts["batch"].startswith("2 clips a step: 2 x 1")
    assert facts["steps"].startswith("4: 2 an epoch, 2 epochs")
    assert facts["output"] == str(tmp_path / "run")

    steps = [m[1] for line in out if (m := STEP_LINE.match(line))]
    assert steps == ["1", "2", "3", "4"]
    held_out = [m[1] for line in out if (m := VALID_LINE.match(line))]
    assert held_out == ["0", "2", "4"]
    samples = [line for line in out if line.startswith("sample ")]
    assert len(samples) == 6
    assert out[-1] == f"done: {tmp_path / 'run' / 'lm_final.pt'}"
    assert len(out) == 9 + 4 + 3 + 6 + 1


class Notebook:
    """A stream as a notebook's: no file, no encoding."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("is_notebook", [False, True])
@pytest.mark.parametrize("by_command", [False, True])
def test_a_caption_that_the_console_cannot_show_stops_nothing(
    by_command, is_notebook, fit, mono_folder, tmp_path, monkeypatch
):
    data = write_pairs(tmp_path / "data", seconds=(1.0,))
    (data / "clip0.txt").write_text("ピアノ", encoding="utf-8")
    flags = {"sample_step": 1, "sample_duration": 0.1, "max_steps": 1, "trigger": "静か"}
    console = Notebook() if is_notebook else io.TextIOWrapper(io.BytesIO(), "cp1252")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        if by_command:
            here = {"dataset_path": data, "model_id": mono_folder, "output_dir": tmp_path / "run"}
            words = [f"--{name}={value}" for name, value in {**here, **TINY, **flags}.items()]
            patch.setattr(sys, "argv", ["run.py", *words])
            run.main()
        else:
            fit(mono_folder, data, **flags)
        if isinstance(console, io.TextIOWrapper):
            console.seek(0)
            assert console.read().count(r"\u30d4\u30a2\u30ce") == 2
        else:
            assert console.text.count("ピアノ") == 2
    assert (tmp_path / "run" / "lm_final.pt").exists()


PLURAL = re.compile(r"\b1 (file|recording|clip|step|epoch|process|shard)s|\((s|es)\)")


def test_one_of_a_thing_is_told_in_the_singular(train, cli, tmp_path):
    data = write_pairs(tmp_path / "data", seconds=(0.8,))
    one = {"dataset_path": data, "epochs": 1, "max_steps": 1, "valid_path": data, "valid_step": 1}
    told = train(**one).out + train("dry", dry_run=1, **one).out
    for command in ("check", "shard"):
        own = {"check": {"picture": tmp_path / "x.png"}, "shard": {"output_dir": tmp_path / "x"}}
        told += cli(prepare, command, str(data), **own[command]).out
    assert not PLURAL.search(told), told
    assert "data       1 file, 0:01 of audio, crops of 0.8 s" in told
    assert "batch      1 clip a step: 2 x 1 accumulated x 1 process\n" in told
    assert "steps      1: 1 an epoch, 1 epoch; " in told
    assert "recordings 1, in 1 shard of up to" in told


def test_facts_tell_what_was_changed_or_left_out(train):
    out = train(duration=3, max_steps=2, tune_text=1).out
    assert "crops of 1.5 s; 4 shorter files padded, the padding is not trained on" in out
    assert "warm-up 0 (shortened from 16: the run has 2 steps)" in out
    assert "0.0 M trained" in out
    assert "none (see --valid_split)" in out


def test_samples_come_at_the_asked_steps_alike_in_all_but_the_weights(train, tmp_path):
    prompts = '["drums", "flute"]'
    train("still", sample_step=3, sample_prompts=prompts, sample_duration=0.5, lr=1e-12)
    train("moved", sample_step=3, sample_prompts=prompts, sample_duration=0.5, lr=0.01)
    names = [f"step_{step:06d}_{n}.wav" for step in (0, 3, 4) for n in (1, 2)]
    content = {}
    for run_name in ("still", "moved"):
        folder = tmp_path / run_name / "samples"
        assert sorted(path.name for path in folder.iterdir()) == names
        for name in names:
            assert sf.info(folder / name).frames == 16_000
            content[run_name, name] = (folder / name).read_bytes()
    for n in (1, 2):
        base = content["still", f"step_000000_{n}.wav"]
        assert base == content["moved", f"step_000000_{n}.wav"]
        assert base == content["still", f"step_000004_{n}.wav"], "same seed, prompt and weights"
        assert base != content["moved", f"step_000004_{n}.wav"]
    assert content["still", names[0]] != content["still", names[1]]


def test_samples_are_of_the_first_captions_if_no_prompts_are_given(train, data):
    out = train(max_steps=1, sample_step=1, sample_duration=0.1).out
    captions = [" ".join((data / f"clip{n}.txt").read_text().split()) for n in (0, 1)]
    told = [line.split(": ", 1)[1] for line in out.splitlines() if line.startswith("sample ")]
    assert told == captions * 2


def test_samples_and_validation_do_not_change_the_training(train, data, tmp_path):
    model = build_musicgen(tmp_path / "model", dropout=0.2)  # so that training draws at random
    train("with", **SHOWN, model_id=model)
    train("without", valid_split=0.3, valid_step=99, model_id=model)
    final = [(tmp_path / name / "lm_final.pt").read_bytes() for name in ("with", "without")]
    assert final[0] == final[1]


def test_wandb_is_not_imported_when_off(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    train(max_steps=1)


def test_a_wandb_that_cannot_start_is_told_plainly(cli, data, mono_folder, tmp_path, monkeypatch):
    wandb = types.ModuleType("wandb")
    wandb.Error = type("Error", (Exception,), {})

    def init(**_):
        raise wandb.Error("No API key configured")

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    paths = {"dataset_path": data, "model_id": mono_folder, "output_dir": tmp_path / "run"}
    result = cli(run, **paths, **TINY, use_wandb=1)
    assert result.code == 1
    assert "Traceback" not in result.err
    for part in ("--use_wandb=1", "No API key", "wandb login", "WANDB_MODE=offline"):
        assert part in result.err
    assert "step 1/" not in result.out


def test_a_normal_run_is_silent_on_stderr(data, mono_folder, tmp_path):
    flags = {**TINY, **SHOWN, "max_steps": 2, "save_step": 1, "num_workers": 2}
    paths = {"dataset_path": data, "model_id": mono_folder, "output_dir": tmp_path / "run"}
    done = run_script("run.py", *(f"--{n}={v}" for n, v in {**flags, **paths}.items()))
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("data ")
    assert "step 2/2" in done.stdout


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run's file: protobufs in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2 as proto

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(content):
        if (left := -position % 32_768) and left < 7:
            position += left  # the end of a block, too short for a header
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            parsed = proto.Record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


def run_without_network(flags: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """In a process that has none at all, where Linux allows it."""
    alone = ["unshare", "--map-root-user", "--net"]
    try:
        is_alone = subprocess.run([*alone, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        is_alone = False
    command = [sys.executable, run.__file__, *(f"--{n}={v}" for n, v in flags.items())]
    return subprocess.run(
        [*(alone if is_alone else []), *command], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("has_network", [True, pytest.param(False, marks=pytest.mark.long)])
def test_wandb_offline_keeps_config_metrics_and_audio_without_network(
    has_network, data, mono_folder, tmp_path, processes, monkeypatch
):
    flags = {**TINY, **SHOWN, "max_steps": 2, "use_wandb": 1, "wandb_name": "first try"}
    flags |= {"dataset_path": data, "model_id": mono_folder, "output_dir": tmp_path / "run"}
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    if has_network:
        codes, _, errors = Started(processes, tmp_path / "logs", **flags).end()
    else:
        done = run_without_network(flags)
        codes, errors = {done.returncode}, done.stderr
    assert codes == {0}, errors
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")

    config: dict[str, Any] = {}
    logged: dict[str, dict[int, Any]] = defaultdict(dict)
    for record in wandb_records(path):
        if record.HasField("run"):
            project, name = record.run.project, record.run.display_name
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            row: dict[str, Any] = {}
            for item in record.history.item:
                name_of_value, *part = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if part:  # of a media file: path, caption, ...
                    row.setdefault(name_of_value, {})[part[0]] = value
                else:
                    row[name_of_value] = value
            for key, value in row.items():
                logged[key][row["_step"]] = value
    assert (project, name) == ("musicgen-trainer", "first try")
    assert config["lr"] == 1e-5
    assert config["dataset_path"] == str(data)
    assert "2 clips a step" in config["batch"]

    metrics = rows(tmp_path / "run")
    for key in ("loss", "lr", "grad_norm"):
        expected = {row["step"]: row[key] for row in metrics if key in row}
        assert logged[key] == pytest.approx(expected), key
    expected = {row["step"]: row["valid_loss"] for row in metrics if "valid_loss" in row}
    assert logged["valid_loss"] == pytest.approx(expected)
    for number in (1, 2):
        audio = logged[f"samples/{number}"]
        assert set(audio) == {0, 2}
        for step, media in audio.items():
            sample = tmp_path / "run" / "samples" / f"step_{step:06d}_{number}.wav"
            assert (path.parent / "files" / media["path"]).read_bytes() == sample.read_bytes()
            assert media["caption"].startswith("melody number")
