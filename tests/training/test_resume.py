"""A run that was stopped, in whatever way and moment, ends as one that was not."""

import contextlib
import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pytest
import soundfile as sf
import torch
from conftest import metrics, tiny_config, tone, weights
from matplotlib.figure import Figure
from processes import Started

import files
import run as run_py
from demo.tiny import build_musicgen
from errors import Finished, UserError
from flags.run import Config
from musicgen import codec
from musicgen.loss import TokenLoss
from musicgen.text import TextEncoder
from train import NonFinite, train
from training.output import SAMPLES, check_output, checkpoints, remove_temporaries
from training.plan import make_plan
from training.resume import FREE_TO_CHANGE


class World(NamedTuple):
    """A model with dropout and data, so that all that is random in a run has a part in it."""

    model: Path
    data: Path
    held_out: Path
    whole: Path  # output of a run that nothing disturbed


# Three files and two a step: 2 steps an epoch, 6 steps; crops, captions, dropout are all random.
RANDOM = {"batch_size": 1, "grad_acc": 2, "epochs": 3, "use_cfg": True, "cfg_p": 0.4}
RANDOM |= {"word_dropout": 0.3, "ema_decay": 0.9, "seed": 7}
STEPS = 6


def run(world: World, output: Path, **flags: Any) -> Path:
    """Train in this process, with validation and samples."""
    watched = {"valid_path": str(world.held_out), "valid_step": 2}
    watched |= {"sample_step": 3, "sample_duration": 0.2, "sample_prompts": ["a tune", "drums"]}
    train(tiny_config(world.model, world.data, output, **{**RANDOM, **watched, **flags}))
    return output


def go_on(world: World, output: Path, **flags: Any) -> Path:
    """Resume, or start anew if no step had been made."""
    return run(world, output, resume="auto", **flags)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    model = build_musicgen(root / "model", segment_sec=20.0, dropout=0.1)
    for name, lengths in {"data": (1.5, 0.8, 2.0), "held_out": (1.0,)}.items():
        (root / name).mkdir()
        for i, seconds in enumerate(lengths):
            sf.write(root / name / f"{i}.wav", tone(i, seconds), 32_000)
            (root / name / f"{i}.txt").write_text("a slow piano tune with brushed drums" * (i + 1))
    world = World(model, root / "data", root / "held_out", root / "whole")
    run(world, world.whole)
    return world


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch):
    monkeypatch.setattr("training.report.plot", lambda rows: Figure(figsize=(1, 1)))


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_run(output: Path, expected: Path) -> None:
    """Bit by bit the same weights, metrics and samples, and no other files."""
    files = [
        {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
        for root in (output, expected)
    ]
    assert files[0] == files[1]
    assert metrics(output) == metrics(expected)
    for path in expected.glob("lm_*.pt"):
        step = path.stem.removeprefix("lm_")
        assert same_weights(weights(output, step), weights(expected, step)), path.name
    for path in expected.glob("samples/*.wav"):
        assert (output / "samples" / path.name).read_bytes() == path.read_bytes(), path.name


def test_one_seed_makes_one_run(world, tmp_path):
    torch.manual_seed(12345)
    assert_same_run(run(world, tmp_path / "again"), world.whole)
    other = run(world, tmp_path / "other", seed=8)
    assert not same_weights(weights(other), weights(world.whole))


# Stopped from inside.


class Fault(Exception):
    pass


def fail() -> None:
    raise Fault


def signalled(*numbers: int) -> Callable[[], None]:
    return lambda: [os.kill(os.getpid(), number) for number in numbers] and None


WAYS = {
    "fault": (fail, Fault, None),
    "SIGINT": (signalled(signal.SIGINT), SystemExit, 130),
    "SIGTERM": (signalled(signal.SIGTERM), SystemExit, 143),
    "SIGINT twice": (signalled(signal.SIGINT, signal.SIGINT), SystemExit, 130),
}


@contextlib.contextmanager
def at_encoding(number: int, act: Callable[[], None]) -> Iterator[None]:
    """`act` when the `number`-th batch of a run, of training or validation, is encoded."""
    encode, calls = codec.encode_audio, []

    def acting(model, wav):
        calls.append(None)
        if len(calls) == number:
            act()
        return encode(model, wav)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("musicgen.codec.encode_audio", acting)
        yield


# A run's 13 encodings, V of validation and 1 to 6 of these steps: V 11 2 V 33 4 V 55 6 V
MOMENTS = [("fault", number) for number in range(1, 14)]
SIGNALS = {"SIGINT": (1, 7, 12), "SIGTERM": (3, 4, 13), "SIGINT twice": (1, 4, 13)}
MOMENTS += [(way, number) for way, numbers in SIGNALS.items() for number in numbers]
MORE = [(way, n) for way in SIGNALS for n in (1, 3, 4, 7, 12, 13) if n not in SIGNALS[way]]
MOMENTS += [pytest.param(*moment, marks=pytest.mark.long) for moment in MORE]


@pytest.mark.parametrize(("way", "number"), MOMENTS)
def test_a_run_stopped_anywhere_is_resumed_to_the_same_end(way, number, world, tmp_path, capsys):
    act, error, code = WAYS[way]
    output = tmp_path / "run"
    with at_encoding(number, act), pytest.raises(error) as caught:
        run(world, output)
    assert code is None or caught.value.code == code

    steps_done = max((row["step"] for row in metrics(output) if "loss" in row), default=0)
    assert (output / "resume.pt").exists() == (steps_done > 0)
    if steps_done:
        assert torch.load(output / "resume.pt", weights_only=True)["step"] == steps_done
        assert f"stopped after step {steps_done} of {STEPS}" in capsys.readouterr().err
    assert_same_run(go_on(world, output), world.whole)


def test_a_run_stopped_again_and_again_is_resumed_to_the_same_end(world, tmp_path):
    output, stops = tmp_path / "run", 0
    while not (output / "lm_final.pt").exists():
        with contextlib.suppress(Fault), at_encoding(4, fail):
            go_on(world, output)
        stops += 1
    assert stops > 3
    assert_same_run(output, world.whole)


def test_a_fault_inside_the_update_saves_no_half_changed_weights(world, tmp_path, monkeypatch):
    output, step = tmp_path / "run", torch.optim.AdamW.step
    calls = []

    def failing(self, *args):
        calls.append(None)
        step(self, *args)
        if len(calls) == 4:
            raise Fault

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(Fault):
        run(world, output, save_step=2)
    assert torch.load(output / "resume.pt", weights_only=True)["step"] == 2
    run(world, output, save_step=2, resume=True)
    assert same_weights(weights(output), weights(world.whole))
    assert metrics(output) == metrics(world.whole)


def test_a_second_signal_while_the_average_is_taken_out_saves_no_mixed_weights(world, tmp_path):
    output, copy, copies = tmp_path / "run", torch.Tensor.copy_, []

    def interrupted_copy(self, *args):
        copies.append(None)
        if len(copies) == 4:
            raise KeyboardInterrupt
        return copy(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):

        def arm() -> None:
            patch.setattr(torch.nn.Parameter, "copy_", interrupted_copy, raising=False)

        with at_encoding(5, arm):  # the validation, of the average, after step 2
            run(world, output, save_step=1)
    run(world, output, save_step=1, resume=True)
    assert same_weights(weights(output), weights(world.whole))


# Stopped from outside.


def rows_on_disk(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(condition: Callable[[], bool], process: Any) -> None:
    while not condition() and process.is_alive():
        time.sleep(0.0005)


def is_writing(output: Path) -> bool:
    return any(output.glob(".*.tmp"))


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("kills", "count"), [(3, 1), pytest.param(20, 1, marks=LONG), pytest.param(20, 2, marks=LONG)]
)
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(
    kills, count, world, tmp_path, processes
):
    """By one process or two; each start is the same command."""
    rng, output = random.Random(1), tmp_path / "run"
    # Far too long to end before it is killed, however late that is on a busy machine.
    flags = {**RANDOM, "grad_acc": 2 // count, "epochs": 10_000, "save_step": 1}
    flags |= {"keep_checkpoints": 3, "valid_path": str(world.held_out), "valid_step": 5}
    flags |= {"lr_scheduler": "constant", "resume": "auto"}

    def started(output: Path, **more: Any) -> Started:
        config = tiny_config(world.model, world.data, output, **flags, **more)
        given = {name: getattr(config, name) for name in config.model_fields_set}
        return Started(processes, tmp_path / "logs", count=count, **given)

    while_writing = 0
    for _ in range(kills):
        process = started(output)
        if rng.random() < 0.8:  # else somewhere in the start
            rows = rows_on_disk(output) + rng.randrange(4)
            wait_until(lambda rows=rows: rows_on_disk(output) > rows, process)
        if rng.random() < 0.5:
            wait_until(lambda: is_writing(output), process)
        else:
            time.sleep(rng.uniform(0, 0.03))
        process.signal(signal.SIGKILL)
        codes, _, errors = process.end()
        assert -signal.SIGKILL in codes, errors  # the other may have seen that this one is gone
        while_writing += is_writing(output)
        for path in output.glob("*.pt"):
            torch.load(path, weights_only=True)
    print(f"{kills} kills, {while_writing} while writing")

    whole = tmp_path / "whole"
    last = 5
    if (output / "resume.pt").exists():
        last += torch.load(output / "resume.pt", weights_only=True)["step"]
    for folder in (output, whole):
        codes, _, errors = started(folder, max_steps=last).end()
        assert codes == {0}, errors
    assert_same_run(output, whole)
    assert len(checkpoints(output)) == 3


def test_a_kill_after_any_file_is_followed_by_the_same_command_to_the_same_end(
    world, tmp_path, monkeypatch
):
    flags = {"save_step": 4, "keep_checkpoints": 1, "resume": "auto"}
    write, killed = files.write, []

    def then_killed(path: Path, fill: Callable[[BinaryIO], object]) -> None:
        write(path, fill)
        if path.suffix == ".pt":
            killed.append((path.name, tmp_path / f"killed_{len(killed)}"))
            shutil.copytree(path.parent, killed[-1][1])

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", then_killed)
        whole = run(world, tmp_path / "whole", **flags)
    names = [name for name, _ in killed]
    assert names == ["resume.pt", "lm_4.pt", "lm_final.pt", "resume.pt"]
    for _, output in killed[:-1]:
        assert_same_run(run(world, output, **flags), whole)
    with pytest.raises(Finished, match=r"is finished already \(6 of 6 steps\)"):
        run(world, killed[-1][1], **flags)


NEW, GOES_ON = False, True


@pytest.mark.parametrize(
    ("names", "result"),
    [
        ([], NEW),
        (["run.json", "metrics.jsonl", "training.png", ".lm_2.pt.123.tmp"], NEW),
        (["resume.pt"], GOES_ON),
        (["resume.pt", "lm_2.pt", "lm_final.pt"], GOES_ON),
        (["lm_final.pt", "lm_2.pt"], Finished),
        (["learned_embeds.safetensors"], Finished),
        (["lm_2.pt"], UserError),
    ],
)
def test_resume_auto_decides_by_what_is_there(names, result, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    if isinstance(result, bool):
        assert check_output(tmp_path, resume="auto", overwrite=False) is result
    else:
        with pytest.raises(result, match=r"is finished already|holds an earlier run .*another"):
            check_output(tmp_path, resume="auto", overwrite=False)


def test_the_beginning_of_a_sample_is_removed_and_whole_ones_stay(tmp_path):
    """A kill leaves one; other part files may be the user's."""
    names = ["step_000002_1.part.wav", "step_000002_1.wav", "step_000002_1.mine.wav", "a.part.wav"]
    (tmp_path / SAMPLES).mkdir()
    for name in names:
        (tmp_path / SAMPLES / name).touch()
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in (tmp_path / SAMPLES).iterdir()) == sorted(names[1:])


@pytest.mark.parametrize("save_step", [0, 3])
def test_one_command_starts_goes_on_and_says_when_it_is_finished(save_step, world, tmp_path, cli):
    paths = {"model_id": world.model, "dataset_path": world.data, "output_dir": tmp_path / "run"}
    flags = {**RANDOM, **paths, "duration": 1, "device": "cpu", "num_workers": 0}
    flags |= {"save_step": save_step, "resume": "auto", "warmup_steps": 0}
    with at_encoding(5, fail), pytest.raises(Fault):  # in step 3
        cli(run_py, **flags)
    told = cli(run_py, **flags)
    assert told.code == 0, told.err
    assert ("a kill loses all steps (see --save_step)" in told.out) == (not save_step)
    assert "resumed    after step 2" in told.out
    assert [row["step"] for row in metrics(tmp_path / "run")] == [*range(1, STEPS + 1)]
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    told = cli(run_py, **flags)
    assert told.code == 0
    assert f"the run in {tmp_path / 'run'} is finished already (" in told.out
    assert told.err == ""
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_ctrl_c_in_the_terminal_stops_cleanly_with_workers_too(world, tmp_path, processes):
    """A terminal sends SIGINT to all processes, those that read audio among them."""
    output = tmp_path / "run"
    flags = {**RANDOM, "epochs": 500, "duration": 1.0, "warmup_steps": 0, "lr": 1e-3}
    flags |= {"num_workers": 2, "device": "cpu", "output_dir": output}
    flags |= {"dataset_path": world.data, "model_id": world.model}
    started = Started(processes, tmp_path / "logs", **flags)
    deadline = time.monotonic() + 120
    while rows_on_disk(output) < 3 and started.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    started.signal(signal.SIGINT)
    codes, _, errors = started.end()
    assert codes == {130}
    assert "Traceback" not in errors
    steps = len(metrics(output))
    assert f"stopped after step {steps} of 1000" in errors
    more = {**flags, "max_steps": steps + 2, "num_workers": 0, "resume": True}
    train(Config(**{k: str(v) if isinstance(v, Path) else v for k, v in more.items()}))
    assert [row["step"] for row in metrics(output)] == [*range(1, steps + 3)]


# What may differ on resuming.


@pytest.fixture
def stopped(world, tmp_path) -> Path:
    """The output of a run that was stopped after step 2."""
    output = tmp_path / "run"
    with at_encoding(7, fail), pytest.raises(Fault):
        run(world, output)
    return output


# Of every flag that shapes the training, another value.
OTHER: dict[str, Any] = {
    "model_id": ...,  # the mono model of the other tests
    "no_label": True,
    "tune_text": True,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "use_cfg": False,
    "duration": 1.5,
    "crops_by_length": True,
    "seed": 1,
    "cfg_p": 0.3,
    "word_dropout": 0.0,
    "lr_scheduler": "constant",
    "ema_decay": 0.5,
    "optimizer": "adamw_8bit",
    "lora_rank": 4,
    "lora_alpha": 3.0,
    "lora_dropout": 0.1,
    "lora_embeddings": True,
    "placeholder": "<my-style>",
    "placeholder_init": "piano",
    "cache_tokens": True,
    "caption": "one for all",
    "trigger": "my-style",
    "merge_text_p": 0.5,
}


def test_every_flag_is_free_to_change_or_refused():
    elsewhere = {"drop_melody", "caption_from"}  # in test_melody.py, test_sources.py
    assert set(OTHER) | elsewhere == set(Config.model_fields) - FREE_TO_CHANGE


def test_resuming_with_other_flags_is_refused_by_name(
    stopped, world, mono_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = {path: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    for name, value in OTHER.items():
        value = str(mono_folder) if value is ... else value
        flags = {**RANDOM, name: value}
        if not flags["use_cfg"]:
            del flags["cfg_p"]  # would do nothing, which is another error
        if name.startswith("lora_"):
            flags.setdefault("lora_rank", 4)
        if name == "placeholder_init":
            flags["placeholder"] = "<my-style>"
        with pytest.raises(UserError, match=re.escape(f"--{name}={value}, was ")):
            train(tiny_config(world.model, world.data, stopped, **{"resume": True, **flags}))
    after = {path: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    assert before == after


def with_state(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the resume state in a folder."""
    state = torch.load(output / "resume.pt", weights_only=True)
    change(state)
    torch.save(state, output / "resume.pt")


@pytest.mark.parametrize(
    ("flag", "value"), [("drop_desc_p", 0.2), ("lora_rslora", True), ("lr_scheduler", "linear")]
)
def test_a_run_with_another_value_of_what_was_a_flag_is_not_resumed(flag, value, stopped, world):
    with_state(stopped, lambda state: state["config"].update({flag: value}))
    with pytest.raises(UserError, match=f"earlier version with --{flag}={value}, which"):
        run(world, stopped, resume=True)


def test_a_run_of_an_earlier_version_goes_on_as_it_began(world, tmp_path, monkeypatch):
    """With epochs cut into steps of 4 and 1 clips, where this version takes 3 and 2."""
    data = copy_of(world.data, tmp_path / "data")
    for number in range(2):
        sf.write(data / f"more{number}.wav", tone(number, 1.0), 32_000)
        (data / f"more{number}.txt").write_text("more")
    world = world._replace(data=data)
    with monkeypatch.context() as patch:
        patch.setattr("training.start.make_plan", lambda *a: replace(make_plan(*a), is_even=False))
        whole = run(world, tmp_path / "whole", batch_size=2)
        with at_encoding(9, fail), pytest.raises(Fault):
            run(world, tmp_path / "run", batch_size=2)
    with_state(tmp_path / "run", lambda state: (state.pop("is_even"), state.pop("warmup")))
    assert_same_run(run(world, tmp_path / "run", batch_size=2, resume=True), whole)
    even = run(world, tmp_path / "even", batch_size=2)
    assert not same_weights(weights(even), weights(whole))


def test_a_run_of_before_crops_by_length_goes_on_without_it(stopped, world):
    with_state(stopped, lambda state: state["config"].pop("crops_by_length"))
    with pytest.raises(UserError, match="--crops_by_length=True, was False"):
        run(world, stopped, resume=True, crops_by_length=True)
    assert_same_run(run(world, stopped, resume=True), world.whole)


def test_a_run_by_length_is_resumed_to_the_same_end(world, tmp_path):
    """With 4 clips of 3 files, two in a step; stopped in each epoch."""
    whole = run(world, tmp_path / "whole", crops_by_length=True)
    output = tmp_path / "run"
    for number in (4, 6, 8):
        with at_encoding(number, fail), pytest.raises(Fault):
            go_on(world, output, crops_by_length=True)
    assert_same_run(go_on(world, output, crops_by_length=True), whole)
    assert not same_weights(weights(whole), weights(world.whole))


@pytest.mark.parametrize("of_an_earlier_version", [False, True])
def test_a_prolonged_run_does_not_warm_up_again(of_an_earlier_version, world, tmp_path):
    flags = {"save_step": 2, "warmup_steps": 8}
    output = run(world, tmp_path / "run", **flags)
    if of_an_earlier_version:
        with_state(output, lambda state: state.pop("warmup"))
    run(world, output, **flags, epochs=6, resume=True)
    rates = [row["lr"] for row in metrics(output) if "loss" in row]
    cosine = [5e-4 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert rates[STEPS:] == pytest.approx(cosine[STEPS:])


def add(data: Path) -> None:
    sf.write(data / "new.wav", tone(9, 1.0), 32_000)
    (data / "new.txt").write_text("a new one")


def remove(data: Path) -> None:
    (data / "0.wav").unlink()


def caption(data: Path) -> None:
    (data / "0.txt").write_text("another caption")


def shorten(data: Path) -> None:
    sf.write(data / "0.wav", tone(0, 1.2), 32_000)


def rename(data: Path) -> None:
    (data / "0.wav").rename(data / "00.wav")
    (data / "0.txt").rename(data / "00.txt")


@pytest.mark.parametrize(
    ("change", "steps"), [(add, 6), (remove, 3), (caption, 6), (shorten, 6), (rename, 6)]
)
def test_resuming_with_another_dataset_is_said(change, steps, stopped, world, tmp_path, capsys):
    data = copy_of(world.data, tmp_path / "data")
    change(data)
    run(world._replace(data=data), stopped, resume=True)
    assert "after step 2; the dataset has changed since" in capsys.readouterr().out
    assert [r["step"] for r in metrics(stopped) if "loss" in r] == [*range(1, steps + 1)]


@pytest.mark.parametrize("flags", [{"lr": 2e-3}, {"max_grad_norm": 2.0}, {"precision": "bf16"}])
def test_resuming_with_the_cure_of_a_non_finite_loss_is_said(flags, stopped, world, capsys):
    (name, value) = next(iter(flags.items()))
    run(world, stopped, resume=True, **flags)
    assert f"after step 2; --{name} is {value}, was" in capsys.readouterr().out
    assert [r["step"] for r in metrics(stopped) if "loss" in r] == [*range(1, STEPS + 1)]
    assert not same_weights(weights(stopped), weights(world.whole))


def copy_of(data: Path, target: Path) -> Path:
    target.mkdir()
    for path in data.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_dataset_and_a_run_that_were_moved_are_resumed(stopped, world, tmp_path, capsys):
    data = copy_of(world.data, tmp_path / "elsewhere")
    output = stopped.rename(tmp_path / "moved")
    assert_same_run(run(world._replace(data=data), output, resume=True), world.whole)
    assert "has changed" not in capsys.readouterr().out


def test_the_same_clips_a_step_may_be_cut_otherwise(world, mono_folder, tmp_path):
    world = world._replace(model=mono_folder)  # without dropout, which follows the batch's shape
    whole, output = run(world, tmp_path / "whole"), tmp_path / "run"
    with at_encoding(7, fail), pytest.raises(Fault):
        run(world, output)
    run(world, output, resume=True, batch_size=2, grad_acc=1, num_workers=1)
    losses = [[r.get("loss", r.get("valid_loss")) for r in metrics(o)] for o in (output, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("cut", [(2, 2), (1, 1), (4, 1)])
def test_another_number_of_clips_a_step_is_refused(cut, stopped, world):
    batch_size, grad_acc = cut
    with pytest.raises(UserError, match=f"{batch_size * grad_acc} clips in a step .*, were 2"):
        run(world, stopped, resume=True, batch_size=batch_size, grad_acc=grad_acc)


@pytest.mark.parametrize("save_step", [None, 2])
def test_a_finished_run_is_not_resumed_but_for_more_epochs(save_step, world, tmp_path):
    output = run(world, tmp_path / "run", save_step=save_step)
    why = "is finished" if save_step else "no .*resume.pt to resume from"
    with pytest.raises(UserError, match=why):
        run(world, output, resume=True, save_step=save_step)
    if save_step:
        run(world, output, resume=True, save_step=save_step, epochs=4)
        steps = [row["step"] for row in metrics(output) if "loss" in row]
        assert steps == [*range(1, 9)]
        assert [path.name for path in checkpoints(output)] == [f"lm_{n}.pt" for n in (2, 4, 6, 8)]
        assert not same_weights(weights(output), weights(world.whole))


def test_a_prolonged_run_stopped_at_its_end_is_resumed_to_the_same_end(world, tmp_path):
    outputs = [run(world, tmp_path / name, save_step=2) for name in ("whole", "stopped")]
    longer = {"save_step": 2, "epochs": 4, "resume": True}
    whole = run(world, outputs[0], **longer)
    with at_encoding(5, fail), pytest.raises(Fault):  # V 77 8 V
        run(world, outputs[1], **longer)
    assert_same_run(run(world, outputs[1], **longer), whole)


def test_a_run_can_be_cut_short_on_resuming(stopped, world):
    run(world, stopped, resume=True, max_steps=5)
    assert [row["step"] for row in metrics(stopped) if "loss" in row] == [1, 2, 3, 4, 5]
    assert {"lm_final.pt"} == {path.name for path in stopped.glob("*.pt")}


def test_an_earlier_run_is_not_overwritten_unasked(stopped, world):
    with pytest.raises(UserError, match=r"holds an earlier run .*--resume=1"):
        run(world, stopped)
    assert_same_run(run(world, stopped, overwrite=True), world.whole)


# A loss or gradient that is not finite.


def poisoned_caption(patch: pytest.MonkeyPatch, number: int) -> None:
    """The first caption of the `number`-th batch is not a number."""
    call, calls = TextEncoder.__call__, []

    def poisoning(self, captions, device):
        text, mask = call(self, captions, device)
        calls.append(None)
        if len(calls) == number:
            text[0] = float("nan")
        return text, mask

    patch.setattr(TextEncoder, "__call__", poisoning)


def poisoned_gradient(patch: pytest.MonkeyPatch, number: int) -> None:
    """The loss of the `number`-th batch is right, its gradient is not a number."""
    forward, calls = TokenLoss.forward, []

    def steep(self, *args):
        loss = forward(self, *args)
        calls.append(None)
        return loss + (loss * 0).sqrt() if len(calls) == number else loss  # no slope at 0

    patch.setattr(TokenLoss, "forward", steep)


@pytest.mark.parametrize(("save_step", "left"), [(3, 3), (None, 4)])
@pytest.mark.parametrize(
    ("poison", "what", "named"),
    [
        (poisoned_caption, "the loss is not finite at step 5 of 6", 1),
        (poisoned_gradient, "the gradient is not finite at step 5 of 6", 2),
    ],
)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(
    poison, what, named, save_step, left, world, tmp_path, monkeypatch
):
    def fit(output: Path, **more: Any) -> Path:
        flags = {"epochs": 3, "batch_size": 2, "save_step": save_step, "seed": 3}
        train(tiny_config(world.model, world.data, output, **flags, **more))
        return output

    batches: list[list[str]] = []  # of captions, which are longer the higher the file's number
    call = TextEncoder.__call__
    monkeypatch.setattr(
        TextEncoder, "__call__", lambda self, c, d: batches.append(c) or call(self, c, d)
    )
    whole = fit(tmp_path / "whole")
    culprits = {f"{caption.count('slow') - 1}.wav" for caption in batches[4][:named]}

    output, step, updates = tmp_path / "run", torch.optim.AdamW.step, []
    with monkeypatch.context() as patch, pytest.raises(NonFinite, match=what) as error:
        patch.setattr(
            torch.optim.AdamW, "step", lambda self, *a: updates.append(1) or step(self, *a)
        )
        poison(patch, 5)
        fit(output)
    assert {f"{i}.wav" for i in range(3) if f"{i}.wav" in str(error.value)} == culprits
    assert len(updates) == len(metrics(output)) == 4
    assert not (output / "lm_final.pt").exists()
    assert [path.name for path in checkpoints(output)] == (["lm_3.pt"] if save_step else [])
    assert torch.load(output / "resume.pt", weights_only=True)["step"] == left
    assert_same_run(fit(output, resume=True), whole)
