"""A run that does not fit into its card is told so before the weights are loaded."""

import os
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from processes import Started

import run
from errors import UserError
from musicgen import load
from musicgen.config import configs
from training import memory, room

GB = 10**9


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.setattr(load, "load_model", refuse)


def refuse(*args, **kwargs):
    raise UserError("the weights are loaded")


def have(free, monkeypatch):
    """Let the process have a card with so many free bytes, and its model on the CPU."""
    monkeypatch.setattr(room, "free_bytes", lambda device: free, raising=False)


NEED = memory.Need(
    **{"parameters": 2 * GB, "trained": 2 * GB, "weights": 8 * GB, "gradients": 8 * GB},
    **{"optimizer": 16 * GB, "activations": 10 * GB, "encoders": GB, "encoding": GB},
    **{"beforehand": 0, "keeps_gradients": False},
)


def need_of(config) -> memory.Need:
    """Need 35 GB; 33, 33, 21, 12 and 6 with the remedies one after the other."""
    need = NEED
    if config.grad_checkpointing:
        need = replace(need, activations=2 * GB)
    if config.optimizer != "adamw":
        need = replace(need, optimizer=4 * GB)
    if config.optimizer == "adamw_8bit_bf16":
        need = replace(need, weights=4 * GB, gradients=3 * GB)
    if config.lora_rank:
        need = replace(need, weights=4 * GB, gradients=0, optimizer=0, activations=GB)
    return need


CHECKPOINTED = "--grad_checkpointing=1 --batch_size=1 --grad_acc=8"


@pytest.mark.parametrize(
    ("free", "says", "remedy"),
    [
        (40.0, "", ""),
        (35.5, "35.0 GB at its peak, and the GPU has 35.5 GB free: it may", "--grad_checkpointing"),
        (34.9, "35.0 GB at its peak, and the GPU has 34.9 GB free: it will", "--grad_checkpoint"),
        (32.5, "it will run out", f"with {CHECKPOINTED} --optimizer=adamw_8bit it needs 21.0 GB"),
    ],
)
def test_two_lines_name_the_least_harmful_flags_that_fit(free, says, remedy, tmp_path):
    config = tiny_config("demo", tmp_path, tmp_path, batch_size=4, grad_acc=2)
    told = list(room.compare(config, round(free * GB), need_of))
    assert len(told) == (2 if says else 0)
    assert all(what in line for what, line in zip((says, remedy), told, strict=False))


def test_the_need_is_told_before_the_search_for_a_remedy(tmp_path):
    asked = []
    config = tiny_config("demo", tmp_path, tmp_path)
    told = room.compare(config, 33 * GB, lambda config: asked.append(config) or need_of(config))
    assert "needs about 35.0 GB" in next(told)
    assert asked == [config]


@pytest.mark.parametrize(
    ("free", "remedy"),
    [
        (23, f"with {CHECKPOINTED} --optimizer=adamw_8bit it needs 21.0 GB"),
        (14, f"with {CHECKPOINTED} --optimizer=adamw_8bit_bf16 it needs 12.0 GB"),
        (7, f"with {CHECKPOINTED} --optimizer=adamw_8bit --lora_rank=16 --lr=1e-4 it needs 6.0"),
        (5, "use a shorter --duration or a smaller --model_id"),
    ],
)
def test_what_can_not_be_held_at_all_is_refused(free, remedy, tmp_path):
    config = tiny_config("demo", tmp_path, tmp_path, batch_size=4, grad_acc=2)
    with pytest.raises(UserError) as refused:
        list(room.compare(config, round(free * GB), need_of))
    about, told = str(refused.value).splitlines()
    assert "alone take 32.0 GB" in about
    assert remedy in told


def test_a_gpu_without_bf16_gets_no_remedy_with_it(tmp_path):
    config = tiny_config("demo", tmp_path, tmp_path, precision="fp16")
    with pytest.raises(UserError, match="--lora_rank=16"):
        list(room.compare(config, 14 * GB, need_of))
    assert memory.estimate(config, configs("demo"), 100, torch.float16).peak > 0


FIXED = {"grad_checkpointing": 1, "batch_size": 1, "tune_text": 1, "optimizer": "adamw_8bit"}


@pytest.mark.parametrize(
    ("free", "flags", "says"),
    [
        (100 * GB, {}, ["the weights are loaded"]),
        (None, {}, ["the weights are loaded"]),  # as on the CPU
        (
            9 * GB,
            {},
            ["it will run out of memory", "with --grad_checkpointing=1", "the weights are loaded"],
        ),
        (
            GB // 2,
            FIXED,
            ["it will run out", "state alone take 1.", "no flag for memory is enough"],
        ),
    ],
)
def test_a_run_is_told_before_its_weights_are_loaded(
    free, flags, says, cli, make_pairs, tmp_path, monkeypatch
):
    have(free, monkeypatch)
    flags = {**flags, "dataset_path": make_pairs(seconds=(30.0,)), "device": "cpu"}
    told = cli(run, **flags, output_dir=tmp_path / "out", model_id="small")
    assert told.code == 1
    lines = told.err.splitlines()
    assert len(lines) == len(says), told.err
    assert all(what in line for what, line in zip(says, lines, strict=True)), told.err


def small_card_beside_a_large_one() -> None:
    load.load_model = refuse
    free = (100 * GB, 9 * GB)[int(os.environ["RANK"])]
    room.free_bytes = lambda device: free
    run.main()


def test_the_fullest_card_counts_and_the_first_process_speaks(processes, make_pairs, tmp_path):
    flags = {"dataset_path": make_pairs(seconds=(30.0,)), "device": "cpu", "model_id": "small"}
    flags |= {"output_dir": tmp_path / "out"}
    main = small_card_beside_a_large_one
    started = Started(processes, tmp_path / "log", main=main, count=2, **flags)
    codes, _, told = started.end()
    assert codes == {1}, told
    assert told.count("and the GPU has 9.0 GB free: it will run out of memory") == 1
    assert told.count("the weights are loaded") == 2
