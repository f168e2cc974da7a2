"""LoRA: what it changes and what not, what it leaves, and who can load that."""

import copy
import json
from pathlib import Path

import pytest
import torch
from audiocraft.modules.conditioners import ConditioningAttributes
from audiocraft.modules.transformer import StreamingTransformerLayer
from conftest import metrics, weights
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import export
import generate
import run
from musicgen import attention, load, lora
from musicgen.loss import TokenLoss
from musicgen.text import TextEncoder
from musicgen.weights import DTYPES, read_lm_state
from training.output import LORA_FILES

CPU = torch.device("cpu")
RANK = 4
PER_LAYER = 6  # in_proj and out_proj of two attentions, linear1, linear2


@pytest.fixture(scope="module")
def adapted(mono_folder, tmp_path_factory):
    """A model after one LoRA step, its base weights, and its adapter's folder."""
    model = load.load_model(str(mono_folder), CPU)
    base = {name: tensor.clone() for name, tensor in model.lm.state_dict().items()}
    torch.manual_seed(0)
    adapter = lora.attach(model.lm, rank=RANK, alpha=8, base=str(mono_folder))
    optimizer = torch.optim.AdamW([p for p in model.lm.parameters() if p.requires_grad], lr=1e-2)
    loss(model.lm.train()).backward()
    optimizer.step()
    folder = tmp_path_factory.mktemp("adapter") / "lora_final"
    lora.save(adapter, folder)
    return model.lm.eval(), base, folder


def loss(lm: torch.nn.Module) -> torch.Tensor:
    codes = torch.randint(0, 64, (2, 4, 40), generator=torch.Generator().manual_seed(1))
    text, mask = TextEncoder(lm)(["slow piano", "drums and a bass, fast"], CPU)
    return TokenLoss(lm)(codes, torch.tensor([40, 25]), text, mask).mean() / 40


def with_adapter(base, adapter, scale: float = 1.0) -> dict[str, torch.Tensor]:
    state = dict(base)
    lora.merge(state, adapter, scale)
    return state


def plain(folder: Path, state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    lm = load.load_model(str(folder), CPU).lm
    if state is not None:
        lm.load_state_dict(state)
    return lm.eval()


def test_one_step_changes_q_k_v_and_every_projection_of_every_layer_and_nothing_else(adapted):
    lm, base, folder = adapted
    merged = with_adapter(base, lora.read(str(folder)))
    assert list(merged) == list(base)
    changed = set()
    for name, weight in base.items():
        if name.endswith("in_proj_weight"):
            for part, now, before in zip(
                "qkv", merged[name].chunk(3), weight.chunk(3), strict=True
            ):
                if not torch.equal(now, before):
                    changed.add(f"{name}.{part}")
        elif not torch.equal(merged[name], weight):
            changed.add(name)
    projections = {
        *(f"{a}.in_proj_weight.{p}" for a in ("self_attn", "cross_attention") for p in "qkv"),
        *(f"{a}.out_proj.weight" for a in ("self_attn", "cross_attention")),
        *("linear1.weight", "linear2.weight"),
    }
    layers = len(lm.transformer.layers)
    assert changed == {f"transformer.layers.{i}.{p}" for i in range(layers) for p in projections}
    now = {k.replace("base_layer.", ""): v for k, v in lm.state_dict().items() if "lora_" not in k}
    assert now.keys() == base.keys()
    assert all(torch.equal(now[name], base[name]) for name in base)


def test_before_the_first_step_it_is_the_base_model(mono_folder):
    lm = plain(mono_folder)
    before = loss(lm)
    lora.attach(lm, rank=RANK, alpha=8)
    assert torch.equal(loss(lm), before)


def test_merged_equals_unmerged(adapted, mono_folder):
    lm, base, folder = adapted
    merged = plain(mono_folder, with_adapter(base, lora.read(str(folder))))
    assert abs(loss(lm) - loss(plain(mono_folder))) > 0.01
    torch.testing.assert_close(loss(merged), loss(lm), rtol=1e-5, atol=1e-5)


def test_it_gives_the_gradients_that_peft_itself_gives(adapted, monkeypatch):
    """attention.py sends x through A and B by itself; peft adds B A to the weight."""
    lm, _, _ = adapted
    trained = [p for p in lm.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss(lm), trained)
    monkeypatch.setattr(attention.Layer, "_sa_block", StreamingTransformerLayer._sa_block)
    theirs = torch.autograd.grad(loss(lm), trained)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_only_the_adapters_are_trained_and_no_whole_weight_has_a_gradient(adapted):
    lm, base, _ = adapted
    trained = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert {name for name, _ in lm.named_parameters() if "lora_" in name} == trained
    products = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                products.add(tuple(result.shape))
            return result

    total = loss(lm)
    with Products():
        total.backward()
    whole = {tuple(t.shape) for t in base.values() if t.ndim == 2}
    assert {(3 * lm.dim, lm.dim), (lm.dim, lm.dim)} < whole
    assert (RANK, lm.dim) in products
    assert not whole & products


def test_it_plays_the_same_merged_and_unmerged(adapted, mono_folder):
    lm, base, folder = adapted
    merged = plain(mono_folder, with_adapter(base, lora.read(str(folder))))
    tokens = [
        model.generate(
            None,
            [ConditioningAttributes(text={"description": "drums"})],
            max_gen_len=30,
            use_sampling=False,
        )
        for model in (lm, merged, plain(mono_folder))
    ]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


def test_plain_peft_loads_the_adapter(adapted, mono_folder):
    lm, _, folder = adapted
    fresh = plain(mono_folder)
    PeftModel.from_pretrained(fresh, str(folder))
    torch.testing.assert_close(loss(fresh), loss(lm), rtol=1e-6, atol=1e-6)
    _, config = lora.read(str(folder))
    assert config.base_model_name_or_path == str(mono_folder)


def test_scale_0_is_the_base_model_bitwise_and_scales_add_up(adapted):
    _, base, folder = adapted
    adapter = lora.read(str(folder))
    off, whole = with_adapter(base, adapter, 0.0), with_adapter(base, adapter)
    assert all(torch.equal(tensor, base[name]) for name, tensor in off.items())
    halves = with_adapter(with_adapter(base, adapter, 0.7), adapter, 0.3)
    torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-6)


def test_embeddings_and_heads_if_asked(mono_folder):
    lm = plain(mono_folder)
    base = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    adapter = lora.attach(lm, rank=RANK, alpha=8, embeddings=True)
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # in the first, the embeddings' inner half has no gradient
        loss(lm).backward()
        optimizer.step()
    merged = with_adapter(base, lora.parts(adapter))
    ends = [name for name in base if name.startswith(("emb.", "linears."))]
    assert len(ends) == 8
    assert not any(torch.equal(merged[name], base[name]) for name in ends)
    torch.testing.assert_close(loss(plain(mono_folder, merged)), loss(lm), rtol=1e-5, atol=1e-5)


def test_an_adapter_of_others_with_rslora_is_merged_with_its_own_scaling(adapted):
    _, base, folder = adapted
    plain_one = lora.read(str(folder))
    config = copy.copy(plain_one.config)
    config.use_rslora = True  # alpha / sqrt(rank) instead of alpha / rank
    name = "transformer.layers.0.linear1.weight"
    changes = [
        with_adapter(base, adapter)[name] - base[name]
        for adapter in (plain_one, plain_one._replace(config=config))
    ]
    torch.testing.assert_close(changes[1], changes[0] * RANK**0.5, rtol=1e-3, atol=1e-6)


def test_dropout_acts_on_every_adapter_while_training(mono_folder):
    lm = plain(mono_folder)
    lora.attach(lm, rank=RANK, alpha=8, dropout=0.5)
    dropouts = [m.lora_dropout["default"].p for m in lm.modules() if hasattr(m, "lora_dropout")]
    assert dropouts == [0.5] * (len(lm.transformer.layers) * PER_LAYER)
    assert torch.equal(loss(lm), loss(lm))
    lm.train()
    adapters = [m for m in lm.modules() if hasattr(m, "lora_dropout")]
    for adapter in adapters:  # one after the other gets an effect
        torch.nn.init.normal_(adapter.lora_B["default"].weight, std=0.1)
        assert loss(lm) != loss(lm)
        torch.nn.init.zeros_(adapter.lora_B["default"].weight)


def test_a_run_leaves_merged_weights_and_an_adapter(fit, mono_folder, make_pairs):
    flags = {"epochs": 4, "lora_rank": RANK, "lr": 1e-2, "save_step": 2}
    output = fit(mono_folder, make_pairs(), **flags)
    base = read_lm_state(str(mono_folder))
    final = weights(output)
    assert list(final) == list(base)
    assert {tensor.dtype for tensor in final.values()} == {torch.float32}
    merged = with_adapter(base, lora.read(str(output / "lora_final")))
    assert all(torch.equal(tensor, merged[name].float()) for name, tensor in final.items())
    assert weights(output, 2).keys() == base.keys()
    names = {path.name for path in (output / "lora_final").iterdir()}
    assert names == set(LORA_FILES)
    state = torch.load(output / "resume.pt", weights_only=True)
    assert all("lora_" in name for name in state["weights"])


def test_frozen_weights_in_half_precision_give_the_same_run(
    fit, mono_folder, make_pairs, monkeypatch
):
    lm = load.load_model(str(mono_folder), CPU, layers_dtype=torch.bfloat16).lm
    layer = lm.transformer.layers[0]
    assert layer.linear1.weight.dtype == layer.self_attn.in_proj_weight.dtype == torch.bfloat16
    assert layer.norm1.weight.dtype == lm.emb[0].weight.dtype == torch.float32

    data, flags = make_pairs(), {"max_steps": 3, "lora_rank": RANK, "lr": 1e-2}
    half = fit(mono_folder, data, "half", precision="bf16", **flags)
    monkeypatch.setitem(DTYPES, "bf16", torch.float32)
    whole = fit(mono_folder, data, "whole", precision="bf16", **flags)
    losses = [[row["loss"] for row in metrics(output)] for output in (half, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # peft rounds the adapters' first values


def test_a_resumed_run_ends_like_one_that_was_not_stopped(fit, mono_folder, make_pairs):
    data, flags = make_pairs(), {"lora_rank": RANK, "lora_dropout": 0.1, "save_step": 2}
    whole = fit(mono_folder, data, "whole", max_steps=4, lr_scheduler="constant", **flags)
    parts = fit(mono_folder, data, "parts", max_steps=2, lr_scheduler="constant", **flags)
    fit(mono_folder, data, "parts", max_steps=4, lr_scheduler="constant", resume=True, **flags)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=0)
    for folder in (whole, parts):
        assert (folder / "lora_final" / LORA_FILES[1]).exists()


def test_the_average_of_adapters_is_what_is_saved(fit, mono_folder, make_pairs):
    data, flags = make_pairs(), {"lora_rank": RANK, "lr": 1e-2, "max_steps": 4, "save_step": 4}
    output = fit(mono_folder, data, ema_decay=0.9, **flags)
    state = torch.load(output / "resume.pt", weights_only=True)
    adapter, _ = lora.read(str(output / "lora_final"))
    names = [name.replace(".default", "") for name in state["weights"]]
    for name, average in zip(names, state["ema"]["average"], strict=True):
        assert torch.equal(adapter[f"base_model.model.{name}"], average)


@pytest.mark.parametrize(
    "which",
    [
        {"optimizer": "adamw_8bit"},
        {"optimizer": "adamw_8bit_bf16", "precision": "bf16", "grad_acc": 2},
    ],
    ids=lambda which: which["optimizer"],
)
def test_8_bit_adam_learns_and_resumes_exactly(which, fit, mono_folder, make_pairs):
    data = make_pairs()
    flags = {**which, "save_step": 2, "lr_scheduler": "constant", "lr": 3e-3}
    whole = fit(mono_folder, data, "whole", max_steps=8, **flags)
    losses = [row["loss"] for row in metrics(whole)]
    assert losses[-1] < 0.9 * losses[0]
    fit(mono_folder, data, "parts", max_steps=4, **flags)
    parts = fit(mono_folder, data, "parts", max_steps=8, resume=True, **flags)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=0)
    kept = tree_leaves(torch.load(whole / "resume.pt", weights_only=True)["optimizer"]["state"])
    tensors = [getattr(leaf, "codes", leaf) for leaf in kept if torch.is_tensor(leaf)]
    assert torch.uint8 in {tensor.dtype for tensor in tensors}


def test_another_rank_is_not_resumed(fit, mono_folder, make_pairs):
    from errors import UserError

    data = make_pairs()
    fit(mono_folder, data, max_steps=2, lora_rank=RANK, save_step=1)
    with pytest.raises(UserError, match="--lora_rank=8, was 4"):
        fit(mono_folder, data, max_steps=4, lora_rank=8, save_step=1, resume=True)


def test_an_adapter_is_not_overwritten_unasked(cli, mono_folder, make_pairs, tmp_path):
    folder = tmp_path / "out" / "lora_final"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"mine")
    flags = {"model_id": mono_folder, "dataset_path": make_pairs(), "output_dir": tmp_path / "out"}
    result = cli(run, **flags, device="cpu", max_steps=1, duration=1, lora_rank=RANK)
    assert result.code == 1
    assert "holds an earlier run (lora_final/adapter_model.safetensors)" in result.err
    assert (folder / "adapter_model.safetensors").read_bytes() == b"mine"


# generate.py and export.py


def test_generate_plays_adapters_on_the_model_they_name(cli, adapted, mono_folder, tmp_path):
    _, _, folder = adapted
    tiny = {"prompt": "drums", "duration": 0.2, "device": "cpu", "temperature": 0}

    def play(name: str, **flags: object) -> bytes:
        path = tmp_path / f"{name}.wav"
        result = cli(generate, **tiny, output_dir=path, **flags)
        assert result.code == 0, result.err
        return path.read_bytes()

    base = play("base", model_id=mono_folder, weights_path=None)
    assert play("off", lora=folder, lora_scale=0) == base
    assert play("on", lora=folder) != base
    two = play("two", lora=json.dumps([str(folder)] * 2), lora_scale="[3, -3]")
    assert two == base


def test_export_merges_one_into_plain_weights(cli, adapted, tmp_path):
    _, base, folder = adapted
    path = tmp_path / "merged.pt"
    assert cli(export, lora=folder, lora_scale=0.5, output=path).code == 0
    state = torch.load(path, weights_only=True)
    torch.testing.assert_close(state, with_adapter(base, lora.read(str(folder)), 0.5))
    again = cli(export, lora=folder, output=path)
    assert again.code == 1
    assert f"--output={path}: exists; give another name, or --overwrite=1\n" in again.err
    assert cli(export, lora=folder, output=path, overwrite=1).code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora": "nowhere"}, "--lora=nowhere: no such folder"),
        ({"lora_scale": "0.5"}, "--lora_scale does nothing without --lora"),
        ({"lora": "{empty}"}, "it has no adapter_config.json and no adapter_model.safetensors"),
        ({"lora": "{lora}", "lora_scale": "[1, 2]"}, "has 2 numbers for 1 adapters"),
        ({"lora": "{damaged}"}, "is damaged"),
        ({"lora": "{lora}", "model_id": "demo"}, "does not fit the model at transformer.layers.0"),
    ],
)
def test_a_wrong_adapter_is_told(flags, message, cli, adapted, tmp_path):
    _, _, folder = adapted
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    for name in LORA_FILES:
        content = (folder / name).read_bytes()
        (tmp_path / "damaged" / name).write_bytes(content[: len(content) // 2])
    places = {"empty": tmp_path / "empty", "damaged": tmp_path / "damaged", "lora": folder}
    flags = {name: value.format(**places) for name, value in flags.items()}
    result = cli(generate, prompt="x", output_dir=tmp_path / "x.wav", device="cpu", **flags)
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err
