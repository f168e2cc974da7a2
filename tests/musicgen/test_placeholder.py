"""Textual inversion: one vector is trained and nothing else, and its file makes the difference.

Letters: D width of T5.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from audiocraft.modules.conditioners import ConditioningAttributes
from conftest import ROOT, metrics, tiny_config, write_pairs
from processes import Started
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import generate
import run
from errors import UserError
from musicgen import load, lora, placeholder
from musicgen.load import Model
from musicgen.loss import TokenLoss
from musicgen.text import TextEncoder, text_conditioner
from musicgen.weights import read_lm_state
from recordings import wording
from train import train
from training.output import EMBEDDING
from training.tracks import scan_dataset as scan

CPU = torch.device("cpu")
WORD = "<my-style>"
CAPTIONS = ["slow piano waltz", "my-style", "drums, and <a> bass", "<my-styles", "héllo 夢 <pad>"]


def base(folder: object) -> Model:
    return load.load_model(str(folder), CPU)


def with_word(model: Model, vector: torch.Tensor | None = None) -> placeholder.NewWord:
    conditioner = text_conditioner(model.lm)
    if vector is None:
        vector = placeholder.mean_vector(conditioner, "music")
    return placeholder.add(conditioner, WORD, vector, "--placeholder")


def tensors(model: Model) -> dict[str, torch.Tensor]:
    """Return the tensors of language model and T5, without the new word, under their old names."""
    t5 = text_conditioner(model.lm).t5.state_dict()
    named = {f"t5.{name}".replace(".embedding.", "."): tensor for name, tensor in t5.items()}
    named |= {f"lm.{name}": tensor for name, tensor in model.lm.state_dict().items()}
    return {name: tensor.clone() for name, tensor in named.items() if ".vector" not in name}


def vector_of(output: Path, step: int | None = None) -> torch.Tensor:
    path = output / (EMBEDDING if step is None else f"learned_embeds_{step}.safetensors")
    (vector,) = load_file(path).values()
    return vector


@pytest.fixture(scope="module")
def learned(mono_folder, tmp_path_factory) -> Path:
    """A file with a vector that is far from where training starts."""
    path = tmp_path_factory.mktemp("learned") / EMBEDDING
    new = with_word(base(mono_folder))
    with torch.no_grad():
        new.vector.add_(torch.randn(len(new.vector), generator=torch.Generator().manual_seed(1)))
    placeholder.save(path, new, "fp32", str(mono_folder))
    return path


# What it is to T5.


@pytest.mark.parametrize(
    ("caption", "is_in"),
    [
        (WORD, True),
        (f"{WORD} slow piano", True),
        (f"a piano, {WORD}, and drums", True),
        (f"piano ({WORD})", True),
        (f"{WORD}{WORD}", True),
        (f"piano{WORD}", False),
        (f"{WORD}s", False),
        ("<MY-STYLE>", False),
        *((caption, False) for caption in CAPTIONS),
    ],
)
def test_the_word_is_one_token_where_it_stands_by_itself(caption, is_in, mono_folder):
    model = base(mono_folder)
    new = with_word(model)
    tokens = text_conditioner(model.lm).t5_tokenizer(caption)["input_ids"]
    assert tokens.count(new.token) == caption.count(WORD) * is_in
    assert wording.has(WORD, caption) == is_in


def test_captions_without_it_give_bitwise_what_they_gave(mono_folder):
    model = base(mono_folder)
    prompt = [ConditioningAttributes(text={"description": caption}) for caption in CAPTIONS]

    def states() -> list[torch.Tensor]:
        conditions = model.lm.condition_provider(model.lm.condition_provider.tokenize(prompt))
        text, mask = TextEncoder(model.lm)(CAPTIONS, CPU)
        return [text, mask, *conditions["description"]]

    before = states()
    with_word(model)
    assert all(torch.equal(now, then) for now, then in zip(states(), before, strict=True))


def test_its_neighbours_are_read_as_without_it(mono_folder):
    """No token is added or lost around it, but for the space that stands before punctuation."""
    model = base(mono_folder)
    with_word(model)
    tokenizer = text_conditioner(model.lm).t5_tokenizer
    said = tokenizer.tokenize(f"slow {WORD} piano, {WORD}, drums {WORD}")
    assert said == ["▁slow", WORD, "▁piano", ",", WORD, "▁", ",", "▁drums", WORD]


def test_it_starts_as_the_mean_of_the_words_it_is_given(mono_folder):
    model = base(mono_folder)
    conditioner = text_conditioner(model.lm)
    tokens = conditioner.t5_tokenizer("slow piano", add_special_tokens=False)["input_ids"]
    mean = conditioner.t5.get_input_embeddings().weight[tokens].mean(0)
    assert len(tokens) == 2
    torch.testing.assert_close(placeholder.mean_vector(conditioner, "slow piano"), mean)


def test_started_from_a_word_it_is_that_word(mono_folder):
    model = base(mono_folder)
    conditioner = text_conditioner(model.lm)
    new = with_word(model, placeholder.mean_vector(conditioner, "piano"))
    own, piano = TextEncoder(model.lm, new_word=new)(
        [f"slow {WORD} waltz", "slow piano waltz"], CPU
    )[0]
    assert torch.equal(own, piano)


# Training.


def test_captions_without_the_word_get_it_in_front(make_pairs, tmp_path, mono_folder):
    data, held_out = make_pairs("data"), make_pairs("held_out")
    (data / "clip1.txt").write_text(f"soft {WORD} piano")
    flags = {"placeholder": WORD, "valid_path": str(held_out)}
    tracks, valid = scan(tiny_config(mono_folder, data, tmp_path, **flags))
    assert tracks[0].caption == f"{WORD} melody number 0"
    assert tracks[1].caption == f"soft {WORD} piano"
    assert all(track.caption.startswith(f"{WORD} melody") for track in valid)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"grad_checkpointing": True, "ema_decay": 0.5},
        {"use_cfg": True, "word_dropout": 0.3, "grad_acc": 2, "optimizer": "adamw_8bit"},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_only_the_vector_is_trained(flags, model_folder, make_pairs, fit, monkeypatch):
    loaded, load_well = [], load.load_model

    def spied_load(*args: Any, **more: Any) -> Model:
        loaded.append(load_well(*args, **more))
        return loaded[-1]

    monkeypatch.setattr("musicgen.load.load_model", spied_load)
    output = fit(model_folder, make_pairs(), max_steps=3, lr=0.1, placeholder=WORD, **flags)
    model = loaded[0]
    fresh, now = base(model_folder), tensors(model)
    for name, tensor in tensors(fresh).items():
        assert torch.equal(now[name], tensor.to(now[name].dtype)), name
    start = placeholder.mean_vector(text_conditioner(fresh.lm), "music")
    moved = (vector_of(output) - start).abs()
    assert (moved > 1e-4).all()
    new = text_conditioner(model.lm).t5.get_input_embeddings()
    assert torch.equal(new.vector, vector_of(output)) == ("ema_decay" not in flags)


def test_a_step_in_which_no_caption_has_it_leaves_it(mono_folder, make_pairs, fit):
    output = fit(
        mono_folder, make_pairs(), max_steps=2, use_cfg=True, cfg_p=1, placeholder=WORD, lr=0.1
    )
    start = placeholder.mean_vector(text_conditioner(base(mono_folder).lm), "music")
    assert torch.equal(vector_of(output), start)
    assert [row["grad_norm"] for row in metrics(output)] == [0, 0]


def test_its_gradient_is_the_slope_of_the_loss(mono_folder):
    model = base(mono_folder)
    new = with_word(model)
    encoder = TextEncoder(model.lm, new_word=new)
    codes = torch.randint(0, 64, (3, 4, 20), generator=torch.Generator().manual_seed(1))

    def loss() -> torch.Tensor:
        text, mask = encoder([f"{WORD} piano", "drums", ""], CPU)
        return TokenLoss(model.lm)(codes, torch.tensor([20, 20, 9]), text, mask).double().sum()

    loss().backward()
    gradient = new.vector.grad.clone()
    step = 1e-2 * gradient / gradient.norm()
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            new.vector.add_(sign * step)
            values.append(loss())
    slope = float(values[0] - values[1]) / 2e-2
    assert slope == pytest.approx(float(gradient.norm()), rel=0.02)


def test_on_the_demo_model_held_out_music_becomes_likelier_with_the_word_alone(fit):
    """Jigs on the ocarina, which the model doesn't know."""
    data = ROOT / "demo" / "dataset"
    flags = {"duration": 2, "batch_size": 5, "max_steps": 20, "lr": 0.1, "warmup_steps": 2}
    flags |= {"cache_tokens": True}
    output = fit("demo", data / "train", **flags, placeholder=WORD, valid_path=str(data / "valid"))
    losses = [row["valid_loss"] for row in metrics(output) if "valid_loss" in row]
    assert losses[-1] < losses[0] - 0.03

    vector, codes = vector_of(output), torch.randint(0, 512, (1, 4, 100))

    def loss(model: Model, caption: str) -> torch.Tensor:
        text, mask = TextEncoder(model.lm)([caption], CPU)
        with torch.no_grad():
            return TokenLoss(model.lm)(codes, torch.tensor([100]), text, mask)

    plain, taught = base("demo"), base("demo")
    with_word(taught, vector)
    jig = "a bright Irish jig for ocarina in D major, 109 bpm"
    assert torch.equal(loss(plain, jig), loss(taught, jig))
    assert not torch.equal(loss(plain, f"{WORD} {jig}"), loss(taught, f"{WORD} {jig}"))


def test_a_resumed_run_ends_like_one_that_was_not_stopped(fit, mono_folder, make_pairs):
    data = make_pairs()
    flags = {"placeholder": WORD, "placeholder_init": "slow piano", "save_step": 2, "lr": 0.1}
    flags |= {"use_cfg": True, "lr_scheduler": "constant", "ema_decay": 0.5}
    flags |= {"valid_path": str(data), "sample_step": 2, "sample_duration": 0.2}
    whole = fit(mono_folder, data, "whole", max_steps=4, **flags)
    parts = fit(mono_folder, data, "parts", max_steps=2, **flags)
    fit(mono_folder, data, "parts", max_steps=4, resume=True, **flags)
    names = [EMBEDDING, "learned_embeds_2.safetensors", "learned_embeds_4.safetensors"]
    names += [path.relative_to(whole).as_posix() for path in whole.glob("samples/step_000004_*")]
    assert len(names) == 5
    for name in names:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    with pytest.raises(UserError, match=r"--placeholder=<other>, was <my-style>"):
        fit(mono_folder, data, "parts", resume=True, **{**flags, "placeholder": "<other>"})


def test_two_processes_train_it_as_one(mono_folder, tmp_path, processes) -> None:
    """Seven clips, four a step; many a batch of one process has no caption with the word."""
    data = write_pairs(tmp_path / "data", seconds=(1.0,) * 7)
    flags = {"model_id": mono_folder, "dataset_path": data, "device": "cpu", "duration": 1}
    flags |= {"epochs": 4, "num_workers": 0, "lr": 0.1, "use_cfg": 1, "cfg_p": 0.5}
    flags |= {"placeholder": WORD, "warmup_steps": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    shape = {"output_dir": two, "batch_size": 1, "grad_acc": 2}
    both = Started(processes, tmp_path / "logs", count=2, **flags, **shape)
    codes, _, errors = both.end()
    assert codes == {0}, errors
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in flags.items()}
    train(run.Config(**plain, output_dir=str(one), batch_size=4, grad_acc=1))
    torch.testing.assert_close(vector_of(two), vector_of(one), rtol=0, atol=1e-4)
    losses = [[row["loss"] for row in metrics(output)] for output in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# Its files.


def test_what_a_run_leaves(cli, mono_folder, make_pairs, tmp_path):
    output = tmp_path / "out"
    flags = {"model_id": mono_folder, "dataset_path": make_pairs(), "output_dir": output}
    flags |= {"device": "cpu", "duration": 1, "num_workers": 0, "placeholder": WORD}
    flags |= {"max_steps": 4, "save_step": 1, "keep_checkpoints": 2}
    result = cli(run, **flags)
    assert result.code == 0, result.err
    assert result.out.endswith(f"done: {output / EMBEDDING}\n")
    told = (
        "32 numbers trained, the vector of <my-style>; the default --lr=1e-05 suits all weights, a "
    )
    assert (
        f"{told}new word usually needs --lr=5e-02\n" in result.out
    )  # this T5's numbers are about 1 in size
    assert "usually needs" not in cli(run, **flags, overwrite=1, lr=0.1).out
    steps = {f"learned_embeds_{step}.safetensors" for step in (3, 4)}
    rest = {"metrics.jsonl", "resume.pt", "run.json", "training.png"}
    assert {path.name for path in output.iterdir()} == {EMBEDDING} | steps | rest
    assert torch.equal(vector_of(output, 4), vector_of(output))
    with safe_open(output / EMBEDDING, framework="pt") as file:
        assert list(file.keys()) == [WORD]
        assert file.metadata()["model_id"] == str(mono_folder)

    (output / "resume.pt").unlink()
    again = cli(run, **flags)
    assert again.code == 1
    assert "holds an earlier run (learned_embeds_3.safetensors, " in again.err
    (output / f".{EMBEDDING}.123.tmp").write_bytes(b"half")
    flags |= {"max_steps": 1, "save_step": 0}
    del flags["keep_checkpoints"]
    assert cli(run, **flags, overwrite=1).code == 0
    assert {path.name for path in output.iterdir()} == {EMBEDDING} | rest - {"resume.pt"}


def test_the_file_is_small(tmp_path):
    new = placeholder.NewWord(torch.nn.Embedding(1, 768), WORD, 1, torch.zeros(768))
    placeholder.save(tmp_path / "t5-base", new, "fp32", "small")
    assert (tmp_path / "t5-base").stat().st_size < 10_000
    assert placeholder.read(str(tmp_path / "t5-base")).word == WORD


# generate.py


@pytest.fixture
def play(cli, tmp_path):
    def play(name: str, prompt: str = f"{WORD} drums", **flags: object) -> bytes:
        path = tmp_path / f"{name}.wav"
        tiny = {"prompt": prompt, "duration": 0.3, "device": "cpu", "temperature": 0}
        result = cli(generate, **tiny, output_dir=path, **flags)
        assert result.code == 0, result.err
        assert ("no prompt has <my-style>" in result.err) == (
            "embedding" in flags and WORD not in prompt
        )
        return path.read_bytes()

    return play


def test_generate_knows_the_word_and_the_model_it_was_learned_with(play, learned, mono_folder):
    plain = {"model_id": mono_folder, "weights_path": None}
    assert play("on", embedding=learned) != play("off", **plain)
    assert play("other", "drums", embedding=learned) == play("none", "drums", **plain)


def test_it_goes_with_an_adapter_and_with_weights(play, learned, mono_folder, tmp_path):
    alone = play("alone", embedding=learned)
    weights = tmp_path / "lm_final.pt"
    torch.save(read_lm_state(str(mono_folder)), weights)
    assert play("weights", embedding=learned, weights_path=weights, model_id=mono_folder) == alone

    model = base(mono_folder)
    adapter = lora.attach(model.lm, rank=2, alpha=4, base=str(mono_folder))
    for name, parameter in model.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    lora.save(adapter, tmp_path / "lora_final")
    adapted = {"embedding": learned, "lora": tmp_path / "lora_final"}
    assert play("adapter", **adapted, lora_scale=0) == alone
    both = play("both", **adapted)
    assert both != alone
    assert both != play("adapter_alone", lora=tmp_path / "lora_final")


def test_two_words_at_once(play, learned, mono_folder, tmp_path):
    other = tmp_path / "other"
    save_file({"<other>": torch.full((32,), 2.0)}, other)
    both = {"embedding": json.dumps([str(learned), str(other)])}
    assert play("first", embedding=learned) == play("first_of_two", **both)
    prompts = [play(word, f"{WORD} {word}", **both) for word in ("<other>", "<another>")]
    assert prompts[0] != prompts[1]


# Errors.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"placeholder": "piano"}, "--placeholder=piano: the text encoder has the word"),
        ({"placeholder": "</s>"}, "--placeholder=</s>: the text encoder has the word"),
        ({"placeholder": "my style"}, "--placeholder=my style: must be one word"),
        ({"placeholder": " "}, "--placeholder= : must be one word"),
        ({"placeholder": ""}, "--placeholder: needs a value"),
        ({"placeholder_init": "piano"}, "--placeholder_init does nothing without --placeholder"),
        (
            {"placeholder": WORD, "placeholder_init": "夢"},
            "--placeholder_init=夢: the text encoder",
        ),
        ({"placeholder": WORD, "placeholder_init": " "}, "--placeholder_init= : the text encoder"),
        ({"placeholder": WORD, "tune_text": 1}, "--tune_text and --placeholder exclude"),
        ({"placeholder": WORD, "lora_rank": 4}, "--lora_rank and --placeholder exclude"),
        ({"placeholder": WORD, "no_label": 1}, "--no_label and --placeholder exclude"),
    ],
    ids=str,
)
def test_a_wrong_placeholder_is_told(flags, message, cli, mono_folder, make_pairs, tmp_path):
    here = {"model_id": mono_folder, "dataset_path": make_pairs(), "output_dir": tmp_path / "out"}
    result = cli(run, **here, device="cpu", duration=1, **flags)
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err


def broken(path: Path, what: str) -> None:
    if what == "damaged":
        save_file({WORD: torch.zeros(32)}, path)
        path.write_bytes(path.read_bytes()[:-8])
    elif what == "no safetensors":
        torch.save({WORD: torch.zeros(32)}, path)
    else:
        content = {
            "a matrix": {WORD: torch.zeros(2, 32)},
            "two": {WORD: torch.zeros(32), "<b>": torch.zeros(32)},
            "not finite": {WORD: torch.full((32,), float("nan"))},
            "wide": {WORD: torch.zeros(64)},
            "known": {"piano": torch.zeros(32)},
        }
        save_file(content[what], path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("damaged", "it is damaged, or is not a learned_embeds.safetensors"),
        ("no safetensors", "it is damaged, or is not a learned_embeds.safetensors"),
        ("a matrix", "is not the vector of one word"),
        ("two", "is not the vector of one word"),
        ("not finite", "is not the vector of one word"),
        (
            "wide",
            "does not fit the model: <my-style> has 64 numbers, but its text encoder needs 32",
        ),
        ("known", "the text encoder has the word piano already"),
    ],
)
def test_a_wrong_embedding_is_told(what, message, cli, mono_folder, tmp_path):
    path = tmp_path / "word"
    broken(path, what)
    flags = {"embedding": path, "model_id": mono_folder, "output_dir": tmp_path / "x.wav"}
    result = cli(generate, prompt=WORD, device="cpu", **flags)
    assert result.code == 1
    assert f"--embedding={path}: " in result.err
    assert message in result.err
    assert "Traceback" not in result.err


def test_an_embedding_that_is_not_there_or_given_twice_is_told(cli, learned, tmp_path):
    result = cli(generate, prompt=WORD, embedding="nowhere", output_dir=tmp_path / "x.wav")
    assert (result.code, "--embedding=nowhere: no such file" in result.err) == (1, True)
    twice = json.dumps([str(learned)] * 2)
    result = cli(
        generate, prompt=WORD, embedding=twice, device="cpu", output_dir=tmp_path / "x.wav"
    )
    assert (result.code, "has the word <my-style> already" in result.err) == (1, True)
