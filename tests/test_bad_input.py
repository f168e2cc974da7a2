"""A user's mistake ends with exit code 1 and one plain message, and leaves the files alone."""

import dataclasses
import hashlib
import io
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT, Result, run_script, tone, weights, write_pairs
from huggingface_hub import constants
from processes import Started

import generate
import prepare
import run
from dataset import Clips, Pick
from errors import UserError
from recordings import scan
from training import report
from training.output import RESUME


@dataclasses.dataclass
class World:
    """The place of a case, which may spoil anything here and names the flags that lead to it."""

    tmp: Path
    data: Path
    output: Path
    model: Path  # not to be changed; see `model_without`
    patch: pytest.MonkeyPatch

    def model_with(self, change: Callable[[Path], object]) -> dict[str, Any]:
        copy = shutil.copytree(self.model, self.tmp / "model")
        change(copy)
        return {"model_id": copy}


@pytest.fixture
def world(tmp_path: Path, mono_folder: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    data = write_pairs(tmp_path / "music", seconds=(1.0, 1.5))
    output = tmp_path / "models"
    output.mkdir()
    (output / "notes.txt").write_text("of the user's own")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return World(tmp_path, data, output, mono_folder, monkeypatch)


def files(world: World) -> dict[str, str]:
    """Every file below the case's folders, and its content's hash."""
    found = (path for path in sorted(world.tmp.rglob("*")) if path.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def assert_told(result: Result, says: list[str]) -> None:
    assert result.code == 1
    assert sum(line.startswith("error: ") for line in result.err.splitlines()) == 1, result.err
    assert "Traceback" not in result.err
    assert "step 1/" not in result.out
    assert [part for part in says if part not in result.err] == [], result.err
    assert len(result.err.splitlines()) < 30


# Ways to spoil something. Each gives a function of the World that returns the flags.


def flags(**given: Any) -> Callable[[World], dict[str, Any]]:
    return lambda world: given


def put(content: bytes, name: str = "bad.wav") -> Callable[[World], dict[str, Any]]:
    """A file in the dataset; a wav gets a caption."""

    def spoil(world: World) -> dict[str, Any]:
        (world.data / name).write_bytes(content)
        if name.endswith(".wav"):
            (world.data / name).with_suffix(".txt").write_text("a caption")
        return {}

    return spoil


def lone_wav(world: World) -> dict[str, Any]:
    (world.data / "clip1.txt").unlink()
    return {}


def caption_is_a_folder(world: World) -> dict[str, Any]:
    (world.data / "clip1.txt").unlink()
    (world.data / "clip1.txt").mkdir()
    return {}


def empty_folder(world: World) -> dict[str, Any]:
    (world.tmp / "empty").mkdir()
    return {"dataset_path": world.tmp / "empty"}


def no_wavs(world: World) -> dict[str, Any]:
    for path in world.data.glob("*.wav"):
        path.rename(path.with_suffix(".mid"))
    return {}


def bad_held_out(world: World) -> dict[str, Any]:
    held_out = write_pairs(world.tmp / "held_out", seconds=(1.0,))
    (held_out / "clip0.wav").write_bytes(b"")
    return {"valid_path": held_out}


def an_earlier_run(*names: str) -> Callable[[World], dict[str, Any]]:
    def spoil(world: World) -> dict[str, Any]:
        for name in names:
            (world.output / name).write_bytes(b"precious")
        return {}

    return spoil


def output(path: str, **more: Any) -> Callable[[World], dict[str, Any]]:
    return lambda world: {"output_dir": world.tmp / path, **more}


def model(change: Callable[[Path], object]) -> Callable[[World], dict[str, Any]]:
    return lambda world: world.model_with(change)


def model_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[World], dict[str, Any]]:
    return model(lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())))


def without(content: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}


def package(change: Callable[[dict[str, Any]], Any]) -> Callable[[World], dict[str, Any]]:
    """Another content of the model's state_dict.bin, still a file that torch reads."""

    def respoil(folder: Path) -> None:
        content = torch.load(folder / "state_dict.bin", weights_only=True)
        torch.save(change(content), folder / "state_dict.bin")

    return model(respoil)


def config_of_model(old: str, new: str) -> Callable[[World], dict[str, Any]]:
    def change(content: dict[str, Any]) -> dict[str, Any]:
        assert old in content["xp.cfg"]
        return {**content, "xp.cfg": content["xp.cfg"].replace(old, new)}

    return package(change)


def model_path(path: str) -> Callable[[World], dict[str, Any]]:
    return lambda world: {"model_id": world.tmp / path}


def swap_files(folder: Path) -> None:
    (folder / "state_dict.bin").rename(folder / "x")
    (folder / "compression_state_dict.bin").rename(folder / "state_dict.bin")
    (folder / "x").rename(folder / "compression_state_dict.bin")


def machine(target: str, value: object, **given: Any) -> Callable[[World], dict[str, Any]]:
    def spoil(world: World) -> dict[str, Any]:
        world.patch.setattr(target, value)
        return given

    return spoil


def raises(error: BaseException) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def wav(samples: Any = None, subtype: str = "PCM_16", rate: int = 32_000) -> bytes:
    buffer = io.BytesIO()
    samples = tone(0, 1.0, rate) if samples is None else samples
    sf.write(buffer, samples, rate, subtype=subtype, format="WAV")
    return buffer.getvalue()


def sized(content: bytes, name: bytes, size: int) -> bytes:
    """The chunk `name` of a wav says that it has `size` bytes."""
    at = content.index(name) + 4
    return content[:at] + struct.pack("<I", size) + content[at + 4 :]


def holding(value: float) -> np.ndarray:
    samples = np.zeros(40_000)
    samples[39_000] = value
    return samples


DISK = namedtuple("DISK", "total used free")(10**9, 10**9, 10**5)
CASES: dict[str, tuple[Callable[[World], dict[str, Any]], list[str]]] = {
    # the dataset
    "folder missing": (flags(dataset_path="nowhere"), ["--dataset_path=nowhere", "no such folder"]),
    "folder empty": (empty_folder, ["empty: no recordings", "NAME.wav", "NAME.txt"]),
    "no pairs": (no_wavs, ["music: no recordings", "NAME.wav", "NAME.txt"]),
    "no caption": (lone_wav, ["clip1.wav: no caption", "write NAME.txt", "--no_label=1"]),
    "text as wav": (put(b"la la la " * 99), ["bad.wav: can't be read as audio", "move them"]),
    "0 bytes": (put(b""), ["bad.wav: the file is empty", "fix them or move them"]),
    "half a header": (put(wav()[:30]), ["bad.wav: can't be read as audio"]),
    "header only": (put(sized(wav()[:44], b"data", 0)), ["bad.wav: its header says", "no audio"]),
    "size of 0": (put(sized(wav(), b"data", 0)), ["bad.wav: its header says", "no audio"]),
    "truncated": (put(wav()[:20_000]), ["bad.wav: truncated", "1.00 s of audio"]),
    "2 % short": (put(wav()[:-1_280]), ["bad.wav: truncated"]),
    "too short": (put(wav(tone(0, 0.1))), ["bad.wav: too short: less than 0.5 s"]),
    "absurd rate": (put(wav(rate=1_000_000)), ["bad.wav: damaged: its header says 1000000 Hz"]),
    "NaN": (put(wav(holding(np.nan), "FLOAT")), ["bad.wav: holds samples that are not finite"]),
    "infinite": (put(wav(holding(-np.inf), "FLOAT")), ["bad.wav: holds samples that are not"]),
    "NaN in 64 bit": (put(wav(holding(np.nan), "DOUBLE")), ["bad.wav: holds samples that are"]),
    "not UTF-8": (
        put(b"caf\xe9", "clip1.txt"),
        ["clip1.wav: its .txt is not UTF-8", "save it"],
    ),
    "empty caption": (put(b"", "clip0.txt"), ["clip0.wav: its .txt is empty"]),
    "blank caption": (put(b" \r\n\t", "clip0.txt"), ["clip0.wav: its .txt is empty"]),
    "caption a folder": (caption_is_a_folder, ["clip1.wav: no caption", "NAME.txt"]),
    "held-out files": (bad_held_out, ["held_out", "clip0.wav: the file is empty"]),
    "all held out": (flags(valid_split=0.9), ["--valid_split=0.9 of 2 files", "lower it"]),
    # flags (test_flags has more)
    "wrong type": (flags(lr="fast"), ["--lr=fast", "number", "learning rate"]),
    "out of range": (flags(batch_size=0), ["--batch_size=0", "greater than or equal to 1"]),
    "unknown flag": (flags(batchsize=3), ["--batchsize: no such flag", "--batch_size"]),
    "crop too long": (flags(duration=20.5), ["--duration=20.5", "up to 20 s", "at most"]),
    # where it writes
    "a finished run": (an_earlier_run("lm_final.pt"), ["models", "lm_final.pt", "--overwrite=1"]),
    "a stopped run": (an_earlier_run("lm_50.pt", "resume.pt"), ["--resume=1", "--overwrite=1"]),
    "output is a file": (output("music/clip0.wav"), ["--output_dir=", "clip0.wav: is a file"]),
    "output in a file": (output("music/clip0.wav/x"), ["--output_dir=", "can't be written to"]),
    "nothing to resume": (flags(resume=1), ["--resume=1", "models/resume.pt", "leave out"]),
    "resume damaged": (
        lambda world: {**an_earlier_run("resume.pt")(world), "resume": 1},
        ["models/resume.pt can't be read", "--overwrite=1"],
    ),
    "disk full": (
        machine("shutil.disk_usage", lambda _: DISK),
        ["--output_dir=", "GiB", "--save_dtype=fp16", "--keep_checkpoints"],
    ),
    # the model
    "no such model": (model_path("nowhere"), ["--model_id=", "nowhere: no such folder"]),
    "a file as model": (model_path("music/clip0.wav"), ["--model_id=", "clip0.wav"]),
    "no model in it": (model_path("music"), ["--model_id=", "state_dict.bin"]),
    "model cut off": (
        model_file("state_dict.bin", lambda b: b[: len(b) // 2]),
        ["state_dict.bin can't be read", "download or export it again"],
    ),
    "model of text": (
        model_file("state_dict.bin", lambda _: b"version https://git-lfs"),
        ["state_dict.bin can't be read", "damaged"],
    ),
    "codec cut off": (
        model_file("compression_state_dict.bin", lambda b: b[: len(b) // 2]),
        ["compression_state_dict.bin can't be read"],
    ),
    "only weights": (package(lambda p: p["best_state"]), ["state_dict.bin", "exported format"]),
    "no weights": (package(lambda p: without(p, "best_state")), ["--model_id="]),
    "a name as model": (package(lambda p: {"pretrained": "x/y"}), ["--model_id="]),
    "weights missing": (
        package(lambda p: {**p, "best_state": without(p["best_state"], "emb.0.weight")}),
        ["--model_id=", "emb.0.weight"],
    ),
    "other sizes": (config_of_model("num_layers: 2", "num_layers: 3"), ["--model_id="]),
    "files swapped": (model(swap_files), ["--model_id="]),
    "T5 without config": (model(lambda f: (f / "t5/config.json").unlink()), ["t5", "config.json"]),
    "T5 without words": (model(lambda f: (f / "t5/tokenizer.json").unlink()), ["t5", "token"]),
    "T5 cut off": (
        model_file("t5/model.safetensors", lambda b: b[: len(b) // 2]),
        ["--model_id="],
    ),
    # the machine
    "no CUDA": (
        machine("torch.cuda.is_available", lambda: False, device="cuda"),
        ["--device=cuda"],
    ),
    "fp16 on a CPU": (flags(precision="fp16"), ["--precision=fp16", "fp32 or bf16"]),
    "GPU memory": (
        machine("train.train", raises(torch.OutOfMemoryError("CUDA out of memory. Tried"))),
        ["out of memory", "--grad_checkpointing=1", "--batch_size", "--grad_acc", "--duration"],
    ),
    "memory": (
        machine("train.train", raises(RuntimeError("DefaultCPUAllocator: can't allocate memory"))),
        ["out of memory", "--grad_checkpointing=1", "--batch_size"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_training_is_refused_with_a_reason_and_a_remedy(name, world, cli):
    spoil, says = CASES[name]
    given = {
        **{"dataset_path": world.data, "output_dir": world.output, "model_id": world.model},
        **{"duration": 1, "max_steps": 1, "device": "cpu", "num_workers": 0},
        **spoil(world),
    }
    before = files(world)
    result = cli(run, **given)
    assert_told(result, says)
    assert result.err.startswith("error: ")
    assert files(world) == before


def test_a_program_error_is_not_passed_off_as_the_users(world, cli):
    world.patch.setattr("train.train", raises(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli(run, dataset_path=world.data, output_dir=world.output)


def no_caption(world: World) -> list[object]:
    (world.data / "clip1.txt").unlink()
    return [f"--dataset_path={world.data}"]


def no_caption_held_out(world: World) -> list[object]:
    held_out = write_pairs(world.tmp / "held_out", seconds=(1.0,))
    (held_out / "clip0.txt").unlink()
    return [f"--dataset_path={world.data}", f"--valid_path={held_out}"]


def an_earlier_run_is_there(world: World) -> list[object]:
    (world.output / "lm_final.pt").touch()
    return [f"--dataset_path={world.data}", f"--output_dir={world.output}"]


def nothing_to_resume(world: World) -> list[object]:
    return [f"--dataset_path={world.data}", f"--output_dir={world.output}", "--resume=1"]


def to_encode(world: World) -> list[object]:
    (world.data / "clip1.txt").unlink()
    return [world.data, world.tmp / "tokens"]


AT_ONCE = {
    "a dataset": ("run.py", [], no_caption, "clip1.wav: no caption"),
    "a dry run's": ("run.py", ["--dry_run=1"], no_caption, "clip1.wav: no caption"),
    "held out": ("run.py", [], no_caption_held_out, "clip0.wav: no caption"),
    "an earlier run": ("run.py", [], an_earlier_run_is_there, "holds an earlier run"),
    "nothing to resume": ("run.py", [], nothing_to_resume, "to resume from"),
    "to encode": ("prepare.py", ["encode"], to_encode, "clip1.wav: no caption"),
    "to shard": ("prepare.py", ["shard"], to_encode, "clip1.wav: no caption"),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_what_is_wrong_is_told_before_torch_is_imported(name, world):
    """Importing torch and audiocraft takes 10 s."""
    script, words, spoil, says = AT_ONCE[name]
    command = [sys.executable, "-X", "importtime", ROOT / script, *words, *spoil(world)]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1
    assert says in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "recordings.scan" in imported, "importtime is not read right"
    assert not imported & {"torch", "audiocraft", "transformers", "accelerate"}


def test_of_many_bad_files_twenty_are_named_and_all_counted(world, cli):
    for number in range(25):
        whole = wav(tone(number, 2 + number / 10))
        (world.data / f"cut{number:02d}.wav").write_bytes(whole[: len(whole) // 2])
        (world.data / f"cut{number:02d}.txt").write_text("a caption")
    result = cli(run, dataset_path=world.data, output_dir=world.output)
    assert_told(result, ["25 of 27 recordings", "cut00.wav", "cut19.wav", "... and 5 more"])
    assert "cut20.wav" not in result.err


SHARED = {
    "no caption": (lambda path: None, "no caption: write NAME.txt"),
    "an empty one": (lambda path: path.with_suffix(".txt").touch(), "its .txt is empty"),
    "bytes": (lambda path: path.with_suffix(".txt").write_bytes(b"\xff"), "its .txt is not UTF-8"),
    "no object": (lambda path: path.with_suffix(".json").write_text("[1]"), "its .json is not"),
    "a table": (
        lambda path: (path.parent / "metadata.csv").write_text("x\ny"),
        "metadata.csv can't",
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_fault_that_many_files_share_is_said_once(name, world, cli):
    spoil, says = SHARED[name]
    for number in range(30):
        (world.data / f"lone{number:02d}.wav").write_bytes(wav())
        spoil(world.data / f"lone{number:02d}.wav")
    for command in (run, prepare):
        words = ["shard", "--caption_from=auto"] if command is prepare else []
        told = cli(command, *words, dataset_path=world.data, output_dir=world.output / "new").err
        count, shared = told.splitlines()
        assert "30 of 32 recordings can't be trained on" in count
        assert "prepare.py check names them all" in count
        names = "30 files (lone00.wav, lone01.wav, lone02.wav and 27 more)"
        assert shared.startswith(f"  {names}: {says}")


def test_what_is_shared_by_few_files_comes_first_and_names_them(world):
    for name in ("a", "b", "c"):
        (world.data / f"{name}.wav").write_bytes(b"" if name == "a" else wav())
        (world.data / f"{name}.txt").write_text("a caption" if name == "a" else "")
    with pytest.raises(UserError) as error:
        scan.scan(str(world.data))
    _, *lines = str(error.value).splitlines()
    assert lines == [
        "  2 files (b.wav, c.wav): its .txt is empty: write what is heard in it",
        "  a.wav: the file is empty (0 bytes)",
    ]


def test_a_name_that_is_not_utf_8_is_told_to_be_renamed(world):
    for suffix in ("wav", "txt"):
        name = os.fsdecode(b"caf\xe9." + suffix.encode())  # from an old disk
        (world.data / f"clip1.{suffix}").rename(world.data / name)
    with pytest.raises(UserError, match=r"1 of 2 recordings(?s:.)*caf.*UTF-8.*rename"):
        scan.scan(str(world.data))


def audio(content: bytes) -> Callable[[World], dict[str, Any]]:
    def spoil(world: World) -> dict[str, Any]:
        (world.tmp / "opening.wav").write_bytes(content)
        return {"prompt_audio": world.tmp / "opening.wav"}

    return spoil


def tuned(change: Callable[[dict[str, Any]], Any], **given: Any):
    """Weights in the user's folder that `change` has spoilt."""

    def spoil(world: World) -> dict[str, Any]:
        state = torch.load(world.model / "state_dict.bin", weights_only=True)["best_state"]
        torch.save(change(state), world.output / "lm_final.pt")
        return {"weights_path": world.output / "lm_final.pt", **given}

    return spoil


def garbage_weights(world: World) -> dict[str, Any]:
    (world.output / "lm_final.pt").write_bytes(b"precious")
    return {"weights_path": world.output / "lm_final.pt"}


def existing_piece(world: World) -> dict[str, Any]:
    (world.output / "x_0.wav").write_bytes(b"precious")
    return {}


def to(path: str, **more: Any) -> Callable[[World], dict[str, Any]]:
    return lambda world: {"output_dir": world.tmp / path, **more}


GENERATE_CASES: dict[str, tuple[Callable[[World], dict[str, Any]], list[str]]] = {
    "no weights": (flags(weights_path="no.pt"), ["--weights_path=no.pt", "--weights_path=None"]),
    "damaged weights": (garbage_weights, ["lm_final.pt can't be read", "--weights_path"]),
    "weights of another": (
        tuned(lambda state: {k: v[..., 1:] for k, v in state.items()}),
        ["lm_final.pt does not fit the model", "--model_id"],
    ),
    "a list as weights": (tuned(lambda state: [1, 2]), ["lm_final.pt does not fit", "--model_id"]),
    "no such model": (model_path("nowhere"), ["--model_id=", "no such folder"]),
    "no such opening": (flags(prompt_audio="no.wav"), ["--prompt_audio=no.wav", "no such file"]),
    "opening of text": (audio(b"la la"), ["--prompt_audio=", "opening.wav", "no recording"]),
    "opening empty": (audio(wav(np.zeros(0))), ["--prompt_audio=", "opening.wav"]),
    "opening with NaN": (audio(wav(holding(np.nan), "FLOAT")), ["--prompt_audio=", "not finite"]),
    "overlap = window": (flags(overlap=20), ["--overlap=20", "less than", "20 s"]),
    "overlap all but it": (flags(overlap=19.999), ["--overlap=19.999", "less than", "20 s"]),
    "piece exists": (existing_piece, ["x_0.wav exists", "--output_dir", "--overwrite=1"]),
    "one name for two": (to("a.wav", variations=2), ["a.wav: one file for 2 pieces"]),
    "output is a file": (to("music/clip0.txt"), ["--output_dir=", "clip0.txt: is a file"]),
    "output in a file": (to("music/clip0.txt/x"), ["--output_dir=", "clip0.txt"]),
    "wav in a file": (to("music/clip0.txt/x.wav"), ["--output_dir=", "clip0.txt"]),
    "no duration": (flags(duration=0), ["--duration=0:", "greater than 0"]),
    "no CUDA": (
        machine("torch.cuda.is_available", lambda: False, device="cuda"),
        ["--device=cuda"],
    ),
    "memory": (
        machine(
            "musicgen.generation.generate_blocks",
            raises(torch.OutOfMemoryError("CUDA out of memory.")),
        ),
        ["out of memory", "--model_id", "--duration"],
    ),
}


@pytest.mark.parametrize("name", GENERATE_CASES)
def test_generation_is_refused_with_a_reason_and_a_remedy(name, world, cli):
    spoil, says = GENERATE_CASES[name]
    given = {
        **{"prompt": "x", "duration": 0.1, "device": "cpu", "overlap": 1},
        **{"model_id": world.model, "output_dir": world.output, "weights_path": None},
        **spoil(world),
    }
    before = files(world)
    result = cli(generate, **given)
    assert_told(result, says)
    assert files(world) == before


def test_a_model_that_is_not_here_and_no_network(world, cli):
    """Offline; and unreachable, in a process of its own: the libraries write when imported too."""
    flags = {"dataset_path": world.data, "output_dir": world.output}
    offline = cli(run, **flags)
    words = [f"--{name}={value}" for name, value in flags.items()]
    network = {"HF_HOME": str(world.tmp / "hf_home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run_script("run.py", *words, timeout=60, **network)
    says = ["facebook/musicgen-small", "could not be downloaded", "Connect", "--model_id"]
    for result in (offline, Result(done.returncode, done.stdout, done.stderr)):
        assert_told(result, says)
        assert result.out == ""
        assert len(result.err.splitlines()) < 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clip_that_goes_bad_during_the_run_is_named_and_the_run_can_go_on(workers, world, cli):
    given = {
        **{"dataset_path": world.data, "output_dir": world.output, "model_id": world.model},
        **{"duration": 1, "max_steps": 12, "device": "cpu", "num_workers": workers},
        **{"batch_size": 1, "grad_acc": 2},
    }
    clip, aside = world.data / "clip1.wav", world.tmp / "aside.wav"
    log = report.Report.log

    def log_and_spoil(self, row, line):
        log(self, row, line)
        if row["step"] == 3:
            clip.rename(aside)

    with world.patch.context() as patch:
        patch.setattr(report.Report, "log", log_and_spoil)
        result = cli(run, **given)
    assert result.code == 1
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if "clip1.wav" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "--resume=1" in result.err
    assert "step 3/12" in result.out
    assert "step 12/12" not in result.out

    aside.rename(clip)
    resumed = cli(run, **given, resume=1)
    assert resumed.code == 0, resumed.err
    assert "step 3/12" not in resumed.out
    assert weights(world.output)


def test_a_clip_that_goes_bad_before_the_first_step_is_not_answered_with_resume(world, cli):
    scan_well = scan.scan

    def scan_and_spoil(*args, **kwargs):
        tracks = scan_well(*args, **kwargs)
        (world.data / "clip1.wav").write_bytes(wav(tone(0, 0.6)))
        return tracks

    world.patch.setattr("recordings.scan.scan", scan_and_spoil)
    result = cli(
        run, dataset_path=world.data, output_dir=world.output, model_id=world.model, duration=1
    )
    assert_told(result, ["clip1.wav", "has changed"])
    assert not (world.output / RESUME).exists()
    assert "--resume=1" not in result.err, "there is nothing to resume"


def test_a_run_that_failed_before_its_first_step_does_not_block_the_next(world, cli):
    """Who runs out of memory at once, as many do, lowers --batch_size and starts again."""
    given = {"dataset_path": world.data, "output_dir": world.output, "model_id": world.model}
    given |= {"duration": 1, "max_steps": 1, "device": "cpu", "num_workers": 0}
    with world.patch.context() as patch:
        patch.setattr(
            "musicgen.codec.encode_audio", raises(torch.OutOfMemoryError("out of memory"))
        )
        assert_told(cli(run, **given, batch_size=64), ["out of memory", "--batch_size"])
    assert (world.output / "notes.txt").read_text() == "of the user's own"
    again = cli(run, **given, batch_size=1)
    assert again.code == 0, again.err
    assert weights(world.output)


FUZZED = {
    subtype: wav(tone(1, 0.6, 16_000, 2), subtype, 16_000)
    for subtype in ("PCM_16", "PCM_24", "FLOAT")
}
ABSURD = {  # field of the fmt chunk: its offset in it, struct format, values
    "size": (4, "<I", (0, 1, 14, 17, 1000, 2**31, 2**32 - 1)),
    "format": (8, "<H", (0, 2, 3, 6, 7, 0x11, 0x31, 0x40, 0x50, 0xFFFE, 0xFFFF)),
    "channels": (10, "<H", (0, 1, 3, 32, 33, 255, 1024, 65535)),
    "rate": (12, "<I", (0, 1, 7, 3999, 4001, 767_999, 768_000, 2**31, 2**32 - 1)),
    "align": (20, "<H", (0, 1, 3, 65535)),
    "bits": (22, "<H", (0, 1, 8, 24, 32, 64, 65535)),
}


def damaged(seed: int) -> bytes:
    """A small wav with something wrong in its header; the same for the same seed."""
    rng = random.Random(seed)
    data = bytearray(FUZZED[rng.choice(list(FUZZED))])
    fmt, sound = data.index(b"fmt "), data.index(b"data")
    for _ in range(rng.choice((1, 1, 2))):
        match rng.choice(("bits", "bytes", "cut", "swap", "field", "field", "length")):
            case "bits":
                for _ in range(rng.randint(1, 4)):
                    data[rng.randrange(min(64, len(data)))] ^= 1 << rng.randrange(8)
            case "bytes":
                for _ in range(rng.randint(1, 4)):
                    data[rng.randrange(min(64, len(data)))] = rng.choice(
                        (0, 255, rng.randrange(256))
                    )
            case "cut":
                del data[max(1, rng.choice((rng.randrange(90), rng.randrange(len(data))))) :]
            case "swap":
                data[fmt : sound + 8] = data[sound : sound + 8] + data[fmt:sound]
            case "field":
                offset, form, values = rng.choice(list(ABSURD.values()))
                data = data.ljust(fmt + 26, b"\0")
                struct.pack_into(form, data, fmt + offset, rng.choice(values))
            case "length":
                data = data.ljust(sound + 8, b"\0")
                size = rng.choice((0, 1, 2, 100, 2**16, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1))
                struct.pack_into("<I", data, sound + 4, size)
    return bytes(data)


def test_damaged_headers_are_refused_or_read_and_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("a caption")
    refused, read, slowest = [], [], 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(500):
        (tmp_path / "a.wav").write_bytes(damaged(seed))
        start = time.monotonic()
        try:
            tracks = scan.scan(str(tmp_path))
        except UserError as error:
            assert "a.wav: " in str(error), seed
            refused.append(seed)
        else:
            made = Clips(tracks, sample_rate=32_000, channels=2, samples=32_000, seed=0)
            clip = made[Pick(0, 0)]
            assert clip.wav.shape == (2, 32_000), seed
            assert clip.wav.isfinite().all(), seed
            assert clip.error or 0 < clip.length <= 32_000, seed
            read.append(seed)
        slowest = max(slowest, time.monotonic() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (
        1 if sys.platform == "darwin" else 1024
    )
    assert len(refused) > 200
    assert len(read) > 50
    assert slowest < 5
    assert grown < 300e6


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_damaged_header_is_told_by_the_program(seed, world, cli):
    refused = (n for n in range(100 * seed, 500) if _is_refused(damaged(n), world.tmp / "x"))
    (world.data / "bad.wav").write_bytes(damaged(next(refused)))
    (world.data / "bad.txt").write_text("a caption")
    assert_told(cli(run, dataset_path=world.data, output_dir=world.output), ["bad.wav: "])


def _is_refused(content: bytes, folder: Path) -> bool:
    folder.mkdir(exist_ok=True)
    (folder / "a.wav").write_bytes(content)
    try:
        scan.scan(str(folder), with_captions=False)
    except UserError:
        return True
    return False


def run_with_a_broken_optimizer() -> None:
    torch.optim.AdamW.step = raises(RuntimeError("a bug"))
    run.main()


BROKEN = "import test_bad_input; test_bad_input.run_with_a_broken_optimizer()"


@pytest.mark.parametrize("is_fresh", [False, pytest.param(True, marks=pytest.mark.long)])
def test_an_unforeseen_error_ends_the_program_with_its_workers(
    is_fresh, mono_folder, make_pairs, tmp_path, processes
):
    flags = {"dataset_path": make_pairs(), "model_id": mono_folder, "output_dir": tmp_path / "out"}
    flags |= {"duration": 1, "num_workers": 1}
    if is_fresh:
        words = [f"--{name}={value}" for name, value in flags.items()]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        ended = subprocess.run(
            [sys.executable, "-c", BROKEN, *words],
            **{"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": path}},
            **{"capture_output": True, "text": True, "timeout": 90},
        )
        codes, errors = {ended.returncode}, ended.stderr
    else:
        started = Started(processes, tmp_path / "logs", main=run_with_a_broken_optimizer, **flags)
        codes, _, errors = started.end(timeout=60)
        assert started.is_gone()
    assert codes == {1}
    assert errors.rstrip().endswith("RuntimeError: a bug")
