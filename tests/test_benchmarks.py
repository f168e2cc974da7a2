"""The benchmarks that a test can afford."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config

from benchmarks import generate, gpu
from errors import UserError
from musicgen.config import configs
from training import memory


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_gpu_tables_have_a_row_for_each_way_and_run_on_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "in_new_process", gpu.attempt)
    monkeypatch.setattr(gpu, "MODES", {name: gpu.MODES[name] for name in ("adamw", "LoRA")})
    monkeypatch.setattr(gpu, "WARM_UP", 0)
    monkeypatch.setattr(gpu, "PIECES", (1, 8))
    gpu.main(steps=1, duration=0.2)
    out = capsys.readouterr().out
    assert out.startswith("no GPU: the demo model on the CPU, torch ")
    _, _, *training, _, _, one, eight = rows(out)
    assert [row[:3] for row in training] == [
        ["demo", mode, checkpointing]
        for mode in ("adamw", "LoRA")
        for checkpointing in ("no", "yes")
    ]
    for row in training:
        milliseconds, clips, mfu, encodec, peak, computed, card = row[3:]
        assert float(milliseconds) * float(clips) == pytest.approx(1000, rel=0.05)
        assert 0 < float(encodec.rstrip("%")) <= 100
        assert float(computed) > 0
        assert [mfu, peak, card] == ["-"] * 3  # of a GPU only
    assert [one[1], eight[1]] == ["1", "8"]
    assert float(eight[3]) > float(one[3]) > 0  # music a second
    assert float(one[2]) > float(eight[2]) > 0  # steps


def test_generation_is_compared_way_by_way_in_one_process(capsys, monkeypatch):
    monkeypatch.setattr(generate, "SUMMED", 10**6)
    generate.main(models="demo", seconds=0.4, repeats=1)
    head, _, one, eight, audiocraft, *decoders = rows(capsys.readouterr().out)
    assert head == ["way", "steps/s", "x real time", "ours / this", "of the limit"]
    assert [one[0], one[3], eight[0]] == ["ours", "1.00", "ours, 8 at once"]
    assert [row[0] for row in (audiocraft, *decoders)] == [
        "audiocraft",
        "transformers, growing cache",
        "transformers, fixed cache",
    ]
    for row in (one, eight, audiocraft, *decoders):
        pieces = 8 if row is eight else 1
        steps = 20 + 3  # 0.4 s at 50 frames a second, and the last codebook's delay
        assert float(row[2]) == pytest.approx(pieces * float(row[1]) * 0.4 / steps, rel=0.01)
        assert float(row[3]) == pytest.approx(float(one[2]) / float(row[2]), rel=0.02)


def test_a_step_reads_the_matrices_of_layers_and_heads():
    model = gpu.random_model("demo", torch.device("cpu"), torch.float32)
    sizes = model.lm.cfg.transformer_lm
    a_layer = (4 + 2 + 8) * sizes.dim**2  # attention; q and out of the other one; feed forward
    numbers = sizes.num_layers * a_layer + sizes.n_q * sizes.card * sizes.dim
    assert generate.bytes_read(model) == 4 * numbers


def test_a_row_that_fails_says_why_and_the_others_go_on(capsys, monkeypatch):
    errors = iter([torch.OutOfMemoryError("CUDA out of memory. Tried to"), UserError("no torchao")])

    def fail(*arguments):
        raise next(errors)

    monkeypatch.setattr(gpu, "in_new_process", gpu.attempt)
    monkeypatch.setattr(gpu, "measure_training", fail)
    monkeypatch.setattr(gpu, "measure_generation", lambda *arguments: ["5", "0.1", "1.0", ""])
    monkeypatch.setattr(gpu, "MODES", {"adamw": {}})
    gpu.main(models="small", steps=1)
    found = rows(capsys.readouterr().out)
    assert found[2][:4] == ["small", "adamw", "no", "out of memory"]
    assert found[3][:4] == ["small", "adamw", "yes", "UserError: no torchao"]
    assert found[-1] == ["small", "32", "5", "0.1", "1.0", ""]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_what_a_card_could_do_is_known_or_left_blank(name, tflops):
    assert gpu.peak_flops(name) == (tflops and 1e12 * tflops)


def test_flops_are_those_of_the_matrices_and_of_attention(tmp_path):
    """Six for each weight and token, and what depends on the square of the length."""
    model, flops = configs("demo"), []
    config = tiny_config("demo", tmp_path, tmp_path, batch_size=2)
    for frames in (100, 200):
        flops.append(gpu.model_flops(config, model, frames))
    lm = SimpleNamespace(**model[0].transformer_lm)
    a_layer = 12 * lm.dim**2 + 2 * lm.dim**2  # its cross attention's q and out are for each token
    token = 6 * lm.num_layers * a_layer + 8 * lm.dim * lm.n_q * lm.card  # heads run forward twice
    square = 2 * 12 * lm.num_layers * lm.dim * 100**2
    text = 2 * 6 * lm.num_layers * 2 * lm.dim**2 * memory.CAPTION_TOKENS  # its keys and values
    assert flops[1] - 2 * flops[0] == pytest.approx(2 * square - text, rel=0.05)
    assert 4 * flops[0] - flops[1] == pytest.approx(2 * 2 * 100 * token + 3 * text, rel=0.05)
