"""The network for generation computes what the model's own forward pass computes.

Letters: R rows, K codebooks, S pattern steps, P0 places before the music.
"""

import copy
from typing import Any

import pytest
import torch
from audiocraft.modules.conditioners import ClassifierFreeGuidanceDropout
from conftest import tone
from omegaconf import OmegaConf
from torch import nn

from musicgen import load, lora, placeholder, published
from musicgen.conditions import Condition, Conditions
from musicgen.lm import build_lm
from musicgen.load import Model
from musicgen.melody import MelodyConditioner
from musicgen.network import Network
from musicgen.projection import Projector, packed, plain
from musicgen.text import text_conditioner

CPU = torch.device("cpu")
STEPS = 12
PROMPT = "slow piano and a bass"
VARIANTS: dict[str, dict[str, Any]] = {
    "bias": {"bias_attn": True, "bias_ff": True, "bias_proj": True},
    "relu": {"activation": "relu"},
    "rope": {"positional_embedding": "rope"},
    "xpos": {"positional_embedding": "sin_rope", "xpos": True, "positional_scale": 0.7},
    "qk_layer_norm": {"qk_layer_norm": True},
    "kv_repeat": {"kv_repeat": 2, "cross_attention": False},
    "layer_scale": {"layer_scale": 0.3},
    "norm_last": {"norm_first": False, "layer_scale": 0.3},
    "past_context": {"custom": True, "memory_efficient": False, "past_context": 4},
    "rope_custom": {
        **{"custom": True, "memory_efficient": False, "past_context": 5},
        "positional_embedding": "rope",
    },
}


def shaken(lm: nn.Module) -> None:
    """Add to all weights, that no bias is 0 and no norm does nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise.to(parameter.dtype))


@pytest.fixture(scope="module")
def loaded(mono_folder, stereo_folder, melody_folder) -> dict[str, Model]:
    folders = {"mono": mono_folder, "stereo": stereo_folder, "melody": melody_folder}
    return {kind: load.load_model(str(folder), CPU) for kind, folder in folders.items()}


@pytest.fixture
def model_of(loaded, mono_folder, melody_folder):
    """`model_of("rope")` -> a model of its own, with unusual weights."""

    def make(kind: str) -> Model:
        model = copy.copy(loaded.get(kind, loaded["mono"]))
        if kind in loaded:
            model.lm = copy.deepcopy(model.lm)
        else:
            # Only a model without cross-attention can have kv_repeat.
            melody = kind == "kv_repeat"
            sizes = {"dim": 64, "num_heads": 4, "num_layers": 2, "card": 64}
            cfg = published.family_config(
                {"dataset": {"segment_duration": 20.0}, "transformer_lm": {**sizes}}, melody=melody
            )
            cfg.transformer_lm.update(VARIANTS[kind])
            cfg = OmegaConf.merge(cfg, {"device": "cpu", "dtype": "float32"})
            model.lm = build_lm(cfg, (melody_folder if melody else mono_folder) / "t5").eval()
            model.lm.cfg = cfg
        shaken(model.lm)
        return model

    return make


def reference(
    model: Model, sequence: torch.Tensor, melody: torch.Tensor | None = None, prompt: str = PROMPT
) -> torch.Tensor:
    """Return the logits [R, K, S, card] of the model's own forward pass, with and without text."""
    lm: Any = model.lm
    wavs = {} if melody is None else {"melody_wavs": [melody]}
    if hasattr(model.lm.condition_provider.conditioners, "self_wav"):
        wavs.setdefault("melody_wavs", [None])
    attributes, _ = model._prepare_tokens_and_attributes([prompt], None, **wavs)
    rows = attributes + ClassifierFreeGuidanceDropout(p=1.0)(attributes)
    conditions = lm.condition_provider(lm.condition_provider.tokenize(rows))
    with torch.no_grad():
        return lm(sequence.expand(2, -1, -1), [], conditions)


def stepwise(
    network: Network,
    condition: Condition,
    sequence: torch.Tensor,
    *,
    read: int = 0,
    masked: bool = False,
) -> torch.Tensor:
    """Return the same from single steps, after `read` steps that are read at once."""
    before = condition.prefix.shape[1]
    cache = network.cache([[condition.cross]], before + sequence.shape[-1])
    rows = sequence.expand(2, -1, -1)
    logits = []
    with torch.inference_mode():
        x = torch.cat([condition.prefix, network.embed(rows[..., :read])], dim=1)
        if x.shape[1]:
            x = network.run(x, torch.arange(x.shape[1]), cache.group(0), x.shape[1])
            logits = [network.logits(x[:, before + step]) for step in range(read)]
        for step in range(read, sequence.shape[-1]):
            place = before + step
            x = network.embed(rows[..., step : step + 1])
            x = network.run(x, torch.tensor([place]), cache, None if masked else place + 1)
            logits.append(network.logits(x[:, 0]))
    return torch.stack(logits, dim=2)


def steps_of(model: Model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(65, (1, model.lm.num_codebooks, STEPS), generator=generator)


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("project", [plain, packed])
@pytest.mark.parametrize("kind", ["mono", "stereo", "melody", *VARIANTS])
def test_single_steps_give_the_logits_of_the_forward_pass(
    kind: str, project: Projector, model_of
) -> None:
    model = model_of(kind)
    sequence = steps_of(model)
    expected = reference(model, sequence)
    condition = Conditions(model, None, guided=True).at(PROMPT, 0)
    network = Network(model.lm, project)
    for how in ({}, {"masked": True}, {"read": 7}, {"read": 7, "masked": True}):
        close(stepwise(network, condition, sequence, **how), expected)


def test_conditions_differ_between_the_rows_and_the_rows_between_conditions(model_of) -> None:
    """So that the others' agreement says something."""
    for kind in ("mono", "melody"):
        given, null = reference(model := model_of(kind), steps_of(model))
        assert (given - null).abs().max() > 1e-2


def test_a_melody_is_heard(model_of, monkeypatch) -> None:
    model = model_of("melody")  # demucs takes long, and is not what is tested here
    monkeypatch.setattr(MelodyConditioner, "_get_stemmed_wav", lambda self, wav, rate: wav)
    melody = torch.from_numpy(tone(3, 20.0)).T.float()
    sequence = steps_of(model)
    expected = reference(model, sequence, melody)
    conditions = Conditions(model, melody, guided=True)
    found = stepwise(Network(model.lm), conditions.at(PROMPT, 0), sequence)
    close(found, expected)
    assert (found - reference(model, sequence)).abs().max() > 1e-2
    later = conditions.at(PROMPT, 250).prefix  # 5 s on, and from the beginning again
    moved = torch.cat([melody[:, 5 * 32_000 :], melody[:, : 5 * 32_000]], dim=1)
    torch.testing.assert_close(later, Conditions(model, moved, guided=True).at(PROMPT, 0).prefix)


def attach(model: Model) -> None:
    lora.attach(model.lm, rank=4, alpha=8, embeddings=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.lm.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", ["mono", "melody"])
def test_adapters_in_training_are_heard(kind: str, model_of) -> None:
    model = model_of(kind)
    sequence = steps_of(model)
    base = reference(model, sequence)
    attach(model)
    expected = reference(model, sequence)
    assert (expected - base).abs().max() > 0.1
    model.lm.train()  # as while training; without dropout here
    condition = Conditions(model, None, guided=True).at(PROMPT, 0)
    for how in ({}, {"masked": True}, {"read": 7}):
        close(stepwise(Network(model.lm), condition, sequence, **how), expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_layers_in_bfloat16_are_computed_in_it(adapted: bool, mono_folder) -> None:
    model = load.load_model(str(mono_folder), CPU, layers_dtype=torch.bfloat16)
    if adapted:
        attach(model)
    sequence = steps_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference(model, sequence).float()
    condition = Conditions(model, None, guided=True).at(PROMPT, 0)
    network = Network(model.lm)
    assert network.cache([[condition.cross]], 3).keys[0].dtype == torch.bfloat16
    found = stepwise(network, condition, sequence, read=5)
    assert found.dtype == torch.float32
    close(found, expected, atol=0.05 * float(expected.std()))


def test_a_new_word_is_heard(model_of) -> None:
    model = model_of("mono")
    conditioner = text_conditioner(model.lm)
    conditioner.t5 = copy.deepcopy(conditioner.t5)
    conditioner.t5_tokenizer = copy.deepcopy(conditioner.t5_tokenizer)
    vector = placeholder.mean_vector(conditioner, "slow piano")
    word = placeholder.add(conditioner, "<mine>", vector, "--placeholder")
    sequence, prompt = steps_of(model), "drums and <mine> and a bass"
    found = []
    for factor in (1, -3):
        word.vector.data = factor * vector
        expected = reference(model, sequence, prompt=prompt)
        condition = Conditions(model, None, guided=True).at(prompt, 0)
        found.append(stepwise(Network(model.lm), condition, sequence))
        close(found[-1], expected)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("span", ["exact", "whole"])
def test_captions_of_different_lengths_in_one_group_are_masked(span: str, model_of) -> None:
    model = model_of("mono")
    network, conditions = Network(model.lm), Conditions(model, None, guided=True)
    pieces = [conditions.at(prompt, 0) for prompt in (PROMPT, "drums", "flute and soft drums")]
    assert len({piece.cross.shape[1] for piece in pieces}) == 3
    sequence = steps_of(model)
    alone = torch.cat([stepwise(network, piece, sequence) for piece in pieces])
    cache = network.cache([[piece.cross for piece in pieces]], STEPS)
    rows, together = sequence.expand(6, -1, -1), []
    with torch.inference_mode():
        for step in range(STEPS):
            x = network.embed(rows[..., step : step + 1])
            x = network.run(x, torch.tensor([step]), cache, step + 1 if span == "exact" else None)
            together.append(network.logits(x[:, 0]))
    close(torch.stack(together, dim=2), alone)


def test_packed_weights_take_the_place_of_the_models(model_of) -> None:
    model = model_of("mono")
    before = {p.data_ptr() for p in model.lm.parameters()}
    Network(model.lm)
    assert {p.data_ptr() for p in model.lm.parameters()} == before
    Network(model.lm, packed)
    parts = [*model.lm.transformer.layers, model.lm.linears]
    matrices = [p for part in parts for p in part.parameters() if p.ndim == 2 or not p.numel()]
    assert len(matrices) == 2 * 6 + 4
    assert sum(p.nbytes for p in matrices) == 0
    assert all(p.untyped_storage().nbytes() == 0 for p in matrices)


@pytest.mark.parametrize("large", [False, True])
def test_a_row_of_a_packed_product_does_not_depend_on_the_others(large: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 1024 if large else 64, bias=large)
    project, x = packed(layer), torch.randn(24, 1, 512)
    with torch.inference_mode():
        whole = project(x)
        for rows in (2, 4, 6, 8, 16):
            assert torch.equal(project(x[:rows]), whole[:rows]), rows
            assert torch.equal(project(x[-rows:]), whole[-rows:]), rows
        torch.testing.assert_close(whole, layer(x))


def test_training_goes_on_after_a_sample_of_a_model_with_rotary_positions(model_of) -> None:
    """audiocraft keeps the rotations: none may come from inference mode."""
    model = model_of("xpos")
    with torch.inference_mode():
        Network(model.lm).cache([[torch.zeros(2, 1, 64)]], 3 * STEPS)
    sequence = steps_of(model)
    attributes, _ = model._prepare_tokens_and_attributes([PROMPT], None)
    model.lm(sequence, attributes).mean().backward()
    assert model.lm.emb[0].weight.grad is not None


def test_a_rows_logits_do_not_depend_on_the_others(model_of) -> None:
    """Not even without guidance, when a piece alone is a single row."""
    torch.manual_seed(0)
    network = Network(model_of("mono").lm)
    network.heads, x = packed(nn.Linear(2048, 4 * 64, bias=False)), torch.randn(8, 2048)
    with torch.inference_mode():
        assert torch.equal(network.logits(x[:1]), network.logits(x)[:1])
