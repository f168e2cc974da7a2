"""A launch that would train wrongly is refused; what a saved config adds has no effect."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import metrics, tiny_config, weights

import run
from errors import UserError
from training import accelerator


@pytest.mark.parametrize("what", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_launch_that_divides_the_model_is_refused(
    what, cli, mono_folder, make_pairs, tmp_path, monkeypatch
):
    monkeypatch.setenv(f"ACCELERATE_USE_{what}", "true")
    here = {"dataset_path": make_pairs(), "model_id": mono_folder, "output_dir": tmp_path / "run"}
    result = cli(run, **here, device="cpu", duration=1, max_steps=1, num_workers=0)
    assert result.code == 1
    assert f"ACCELERATE_USE_{what}" in result.err
    assert "torchrun --nproc_per_node=2 run.py" in result.err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=what):  # without run.py, too
        accelerator.start_accelerator(tiny_config(mono_folder, make_pairs("b"), tmp_path))


def test_a_saved_accelerate_config_changes_nothing(fit, mono_folder, make_pairs, monkeypatch):
    data = make_pairs()
    plain = fit(mono_folder, data, "plain", epochs=1)
    monkeypatch.setattr(torch, "compile", None)
    for name, value in {
        "GRADIENT_ACCUMULATION_STEPS": "4",
        "GRADIENT_CLIPPING": "0.01",
        "MIXED_PRECISION": "bf16",
        "DYNAMO_BACKEND": "EAGER",
        "USE_CPU": "True",
        "CPU_AFFINITY": "1",
    }.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
        saved = fit(mono_folder, data, name, epochs=1)
        assert metrics(saved) == metrics(plain), name
        assert all(tensor.equal(weights(plain)[key]) for key, tensor in weights(saved).items())


def test_another_device_than_that_of_the_flags_is_refused(
    mono_folder, make_pairs, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(UserError, match="would train on meta, not on cpu: give --device=meta"):
        accelerator.start_accelerator(tiny_config(mono_folder, make_pairs(), tmp_path))


def test_processes_that_can_not_train_together_are_refused(
    mono_folder, make_pairs, tmp_path, monkeypatch
):
    """Accelerate starts each of them by itself on mps; all would write to one folder."""
    mps = torch.device("mps")
    alone = SimpleNamespace(device=mps, num_processes=1)
    monkeypatch.setattr(accelerator, "choose_device", lambda _: mps)
    monkeypatch.setattr(accelerator, "Accelerator", lambda **_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes can't train together on mps"):
        accelerator.start_accelerator(tiny_config(mono_folder, make_pairs(), tmp_path))


def test_a_second_run_in_a_program_may_have_another_precision(fit, mono_folder, make_pairs):
    data = make_pairs(seconds=(1.0, 1.0))
    fit(mono_folder, data, "exact", max_steps=1)
    rounded = fit(mono_folder, data, "rounded", max_steps=1, precision="bf16")
    assert len(metrics(rounded)) == 1


def test_gloo_takes_the_network_that_leads_to_the_first_machine(monkeypatch):
    """By this machine's name it would often find 127.0.0.1, which no other machine can reach."""
    probe = contextlib.nullcontext(
        SimpleNamespace(connect=lambda _: None, getsockname=lambda: ("10.0.0.5", 1))
    )
    cards = {"lo": "127.0.0.1", "eth7": "10.0.0.5", "eth8": "192.168.0.5"}
    found = {name: [SimpleNamespace(address=address)] for name, address in cards.items()}
    monkeypatch.setattr(accelerator.socket, "socket", lambda *_: probe)
    monkeypatch.setattr(accelerator.psutil, "net_if_addrs", lambda: found)
    environment = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    monkeypatch.setattr(os, "environ", environment)
    accelerator._choose_interface()
    assert environment["GLOO_SOCKET_IFNAME"] == "eth7"
