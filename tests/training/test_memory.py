"""--dry_run: what it says, that it needs neither weights nor network, and what moves the peak."""

import sys

import pytest
import torch
from conftest import tiny_config

import run
from musicgen import load, melody, skeleton
from musicgen.config import configs
from training import memory


def need(folder, processes=1, **flags) -> memory.Need:
    config = tiny_config("demo", folder, folder / "out", **flags)
    return memory.estimate(config, configs("demo"), 100, torch.bfloat16, processes=processes)


def test_it_counts_the_model_that_a_run_would_train(tmp_path):
    lm = load.load_model("demo", torch.device("cpu")).lm
    found = need(tmp_path)
    assert found.parameters == found.trained == sum(p.numel() for p in lm.parameters())
    assert found.weights == found.gradients == 4 * found.parameters
    assert found.optimizer == 8 * found.parameters


@pytest.mark.parametrize(("grad_checkpointing", "batch_size"), [(False, 8), (True, 1)])
def test_activations_are_those_of_all_layers(grad_checkpointing, batch_size, tmp_path):
    """Two layers are measured, the others follow: compare with all five measured."""
    flags = {"grad_checkpointing": grad_checkpointing, "batch_size": batch_size}
    config = tiny_config("demo", tmp_path, tmp_path / "out", **flags)
    whole = memory._measure(config, configs("demo"), 5, 100, torch.bfloat16)
    peak = max(whole.forward, whole.backward)
    assert need(tmp_path, **flags).activations == pytest.approx(peak, rel=0.01)


def test_each_flag_lowers_the_part_that_it_is_for(tmp_path):
    base = need(tmp_path)
    checkpointed = need(tmp_path, grad_checkpointing=True)
    assert checkpointed.activations < 0.8 * base.activations
    assert checkpointed.weights == base.weights
    assert need(tmp_path, optimizer="adamw_8bit").optimizer < 0.3 * base.optimizer
    half = need(tmp_path, optimizer="adamw_8bit_bf16")
    assert half.trained == base.trained
    assert half.weights == half.gradients < 0.7 * base.weights
    adapted = need(tmp_path, lora_rank=4)
    assert adapted.trained < 0.1 * base.trained
    assert adapted.weights < 0.7 * base.weights
    assert need(tmp_path, batch_size=4).activations > 1.5 * base.activations
    accumulated = need(tmp_path, grad_acc=2)
    assert accumulated.peak > base.peak
    assert need(tmp_path, processes=2).peak == accumulated.peak  # DDP keeps its buckets
    text = need(tmp_path, tune_text=True)
    assert text.trained == 64 * 192 + 192  # T5's width to the model's
    assert text.weights < 0.7 * base.weights
    word = need(tmp_path, placeholder="<my-style>")
    assert word.trained == 64
    assert word.gradients == 4 * 64
    assert word.weights < 0.7 * base.weights
    assert word.parameters == base.parameters
    assert 0.2 * base.activations < word.activations < 0.7 * base.activations


def test_melodies_are_counted_as_they_are_in_the_loaded_model(melody_folder, tmp_path):
    model, lm = (
        configs(str(melody_folder)),
        load.load_model(str(melody_folder), torch.device("cpu")).lm,
    )
    config = tiny_config(melody_folder, tmp_path, tmp_path / "out")
    stand_in = memory.language_model(config, model, 2, torch.bfloat16)
    found, real = (melody.melody_conditioner(each) for each in (stand_in, lm))
    assert found.none().shape == real.none().shape
    shapes = [{name: p.shape for name, p in each.named_parameters()} for each in (stand_in, lm)]
    assert shapes[0] == shapes[1]
    longer = memory.estimate(config, model, 100, torch.bfloat16).activations
    model[0].fuser.prepend, model[0].fuser.cross = [], ["description"]
    del model[0].conditioners.self_wav
    assert longer > memory.estimate(config, model, 100, torch.bfloat16).activations


def test_dry_run_of_a_published_model_needs_no_weights(cli, make_pairs, tmp_path, monkeypatch):
    data = make_pairs()
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = cli(run, "--dry_run", dataset_path=data, output_dir=tmp_path / "out", lora_rank=16)
    assert result.code == 0, result.err
    assert "small, 4" in result.out
    assert " on each GPU (encoding" in result.out
    assert "--grad_checkpointing=1" in result.out
    assert not (tmp_path / "out").exists()


def test_published_sizes():
    """Parameters as the loaded models have them; small's is also Meta's figure."""
    for name, millions in (("small", 420.4), ("stereo-small", 437.2)):
        model = configs(name)
        layers = model[0].transformer_lm.num_layers
        lm = skeleton.build_skeleton(model[0], model[2], layers, torch.bfloat16)
        assert round(sum(p.numel() for p in lm.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"precision": "fp32"}, "give --precision=bf16, or --optimizer=adamw_8bit"),
        ({"ema_decay": 0.9}, "--ema_decay exclude each other"),
        ({"lora_rank": 4}, "does nothing with --lora_rank"),
        ({"tune_text": True}, "does nothing with --tune_text"),
        ({"placeholder": "<w>"}, "does nothing with --placeholder"),
        ({}, "--precision=auto is fp32 here"),  # on the CPU
    ],
)
def test_bf16_weights_are_refused_where_they_make_no_sense(
    flags, says, cli, mono_folder, make_pairs, tmp_path
):
    flags |= {"optimizer": "adamw_8bit_bf16", "output_dir": tmp_path / "out", "duration": 1}
    told = cli(run, dataset_path=make_pairs(), model_id=mono_folder, device="cpu", **flags)
    assert told.code == 1
    assert says in told.err


def test_a_missing_torchao_is_told(cli, mono_folder, make_pairs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    flags = {"optimizer": "adamw_8bit_bf16", "output_dir": tmp_path / "out", "precision": "bf16"}
    flags |= {"dataset_path": make_pairs(), "model_id": mono_folder, "device": "cpu", "duration": 1}
    told = cli(run, **flags)
    assert told.code == 1
    assert "pip install torchao, or use --optimizer=adamw_8bit" in told.err
