"""A run leaves the model that it should: it learned, it loads, and only what was asked moved.

Letters: K codebooks, T token frames.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from audiocraft.models import MusicGen
from audiocraft.modules import conditioners
from audiocraft.modules.conditioners import ConditioningAttributes
from conftest import metrics, weights

from dataset import Clips, Pick
from musicgen import codec, generation, load, sampling
from musicgen.text import TextEncoder
from musicgen.weights import DTYPES, load_weights
from recordings.scan import scan

CPU = torch.device("cpu")
GREEDY = sampling.Sampling(temperature=0, cfg_coef=1.0)


def base(folder: Path) -> MusicGen:
    return load.load_model(str(folder), CPU)


def changed(output: Path, folder: Path, step: int | str = "final") -> set[str]:
    """Names of the tensors that a run changed by as much as a bit."""
    before, after = base(folder).lm.state_dict(), weights(output, step)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# It learns.


def test_a_clip_learned_by_heart_is_continued_from_its_first_second(
    model_folder, make_pairs, fit, monkeypatch
):
    data = make_pairs(seconds=(2.0,))
    flags = {"epochs": 80, "batch_size": 1, "lr": 7e-3, "warmup_steps": 5, "duration": 2}
    output = fit(model_folder, data, **flags)
    losses = [row["loss"] for row in metrics(output)]
    assert losses[-1] < 0.1 * losses[0]

    model = base(model_folder)
    wav = torch.from_numpy(sf.read(data / "clip0.wav", dtype="float32")[0])
    codes = codec.encode_audio(model, wav.expand(1, model.audio_channels, -1))  # [1, K, T]
    first = codes[..., : codes.shape[-1] // 2]
    monkeypatch.setattr("musicgen.generation.decode", lambda model, codes: codes)

    def share_remembered() -> float:
        said = generation.generate(
            model,
            ["melody number 0"],
            duration_sec=1.0,
            overlap_sec=2.0,
            seed=0,
            opening=first,
            sampling=GREEDY,
        )
        new = slice(first.shape[-1], None)
        return float((said == codes)[..., new].float().mean())

    assert share_remembered() < 0.1
    load_weights(model.lm, str(output / "lm_final.pt"))
    assert share_remembered() > 0.9


def test_the_loss_on_several_clips_falls_by_half(mono_folder, make_pairs, fit):
    flags = {"epochs": 25, "lr": 5e-3, "use_cfg": True, "valid_split": 0.2}
    rows = metrics(fit(mono_folder, make_pairs(seconds=(1.0,) * 5), **flags))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]


def test_bf16_learns_like_fp32(mono_folder, make_pairs, fit):
    data = make_pairs(seconds=(1.0,) * 3)
    exact, rounded = (
        fit(mono_folder, data, precision, epochs=8, use_cfg=True, cfg_p=0.5, precision=precision)
        for precision in ("fp32", "bf16")
    )
    losses = [[row["loss"] for row in metrics(output)] for output in (exact, rounded)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    assert {tensor.dtype for tensor in weights(rounded).values()} == {torch.float32}


# It loads.


def audiocrafts_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> MusicGen:
    """`MusicGen.get_pretrained`, with the folder's T5 where audiocraft asks the hub for t5-base."""
    for name in ("T5Tokenizer", "T5EncoderModel"):
        load = getattr(conditioners, name).from_pretrained
        here = SimpleNamespace(from_pretrained=lambda _, load=load: load(folder / "t5"))
        monkeypatch.setattr(conditioners, name, here)
    monkeypatch.setitem(conditioners.T5Conditioner.MODELS_DIMS, "t5-base", 32)
    return MusicGen.get_pretrained(str(folder), device="cpu")


def test_lm_final_loads_in_plain_audiocraft_and_changes_the_music(
    model_folder, make_pairs, fit, monkeypatch
):
    output = fit(model_folder, make_pairs(), epochs=2, lr=1e-2, save_step=3)
    model = audiocrafts_own(model_folder, monkeypatch)
    prompt = [ConditioningAttributes(text={"description": "a slow piano"})]
    played = []
    for step in (None, 3, "final"):
        if step:
            state = weights(output, step)  # weights_only=True
            assert type(state) is dict
            assert list(state) == list(model.lm.state_dict())
            assert {(type(t), t.device, t.dtype) for t in state.values()} == {
                (torch.Tensor, CPU, torch.float32)
            }
            model.lm.load_state_dict(state)
        played.append(model.lm.generate(None, prompt, max_gen_len=20, use_sampling=False))
    assert not any(torch.equal(played[0], tuned) for tuned in played[1:])


@pytest.mark.parametrize("save_dtype", ["bf16", "fp16"])
def test_save_dtype_rounds_the_same_weights(save_dtype, mono_folder, make_pairs, fit):
    data = make_pairs()
    exact = weights(fit(mono_folder, data, "exact", epochs=1))
    output = fit(mono_folder, data, "rounded", epochs=1, save_dtype=save_dtype, save_step=1)
    dtype = DTYPES[save_dtype]
    for step in (2, "final"):
        rounded = weights(output, step)
        assert rounded.keys() == exact.keys()
        assert all(torch.equal(rounded[name], exact[name].to(dtype)) for name in exact)
    load_weights(base(mono_folder).lm, str(output / "lm_final.pt"))


# Only what was asked for moved.


def test_a_full_run_trains_everything(model_folder, make_pairs, fit):
    output = fit(model_folder, make_pairs(), epochs=1)
    assert changed(output, model_folder) == set(base(model_folder).lm.state_dict())


ALONE = [{}, {"use_cfg": True}, {"ema_decay": 0.5}, {"precision": "bf16"}]


@pytest.mark.parametrize("flags", ALONE, ids=str)
def test_tune_text_trains_the_text_conditioning_alone(flags, stereo_folder, make_pairs, fit):
    output = fit(stereo_folder, make_pairs(), epochs=2, tune_text=True, save_step=1, **flags)
    names = {n for n in base(stereo_folder).lm.state_dict() if n.startswith("condition_provider.")}
    assert changed(output, stereo_folder) == names
    assert changed(output, stereo_folder, 1) == names


def test_tune_texts_step_is_that_of_a_full_run(mono_folder, make_pairs, fit):
    """No gradient of the frozen rest enters the norm, and the trained part has its own."""
    data = make_pairs()
    name = "condition_provider.conditioners.description.output_proj.weight"
    start = base(mono_folder).lm.state_dict()[name]
    outputs = [
        fit(
            mono_folder, data, f"{text}", max_steps=1, batch_size=4, tune_text=text, max_grad_norm=0
        )
        for text in (False, True)
    ]
    full, text = (weights(output)[name] - start for output in outputs)
    torch.testing.assert_close(text, full, rtol=0, atol=1e-6)
    norms = [metrics(output)[0]["grad_norm"] for output in outputs]
    assert norms[1] < norms[0]


def test_weight_decay_spares_biases_and_norms(mono_folder, make_pairs, fit):
    data, start = make_pairs(), base(mono_folder).lm.state_dict()
    none, some = (
        weights(fit(mono_folder, data, f"{decay}", max_steps=1, lr=0.1, weight_decay=decay))
        for decay in (0.0, 0.5)
    )
    for name, tensor in start.items():
        decayed = 0.1 * 0.5 * tensor if tensor.ndim >= 2 else torch.zeros_like(tensor)
        torch.testing.assert_close(none[name] - some[name], decayed, rtol=1e-4, atol=1e-6)
    assert {t.ndim for t in start.values()} == {1, 2}


def test_ema_saves_the_average_and_trains_on_as_without(mono_folder, make_pairs, fit):
    data, decay = make_pairs(), 0.4
    flags = {"epochs": 4, "lr": 1e-2, "save_step": 1, "valid_path": str(data), "valid_step": 1}
    plain = fit(mono_folder, data, "plain", **flags)
    averaged = fit(mono_folder, data, "averaged", **flags, ema_decay=decay)

    losses = [[row for row in metrics(run) if "loss" in row] for run in (plain, averaged)]
    assert losses[0] == losses[1]
    total = len(losses[0])
    average = base(mono_folder).lm.state_dict()
    for step in range(1, total + 1):
        rate = min(decay, (1 + step) / (10 + step))
        new = weights(plain, step)
        average = {name: rate * t + (1 - rate) * new[name] for name, t in average.items()}
        torch.testing.assert_close(weights(averaged, step), average, rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(averaged), average, rtol=0, atol=1e-6)
    assert rate == decay  # the run was long enough to get there
    held_out = [
        [r["valid_loss"] for r in metrics(run) if "valid_loss" in r] for run in (plain, averaged)
    ]
    assert held_out[0][0] == held_out[1][0]  # before training
    assert held_out[0][1:] != held_out[1][1:]  # of the average


# Captions.


def numbered_clips(folder: Path, count: int) -> Path:
    """Clips that can be told apart by their level: 0.05, 0.10, ... of full scale."""
    folder.mkdir()
    for i in range(1, count + 1):
        sf.write(folder / f"{i}.wav", np.full(32_000, i / 20), 32_000, subtype="FLOAT")
        (folder / f"{i}.txt").write_text(f"{i} calm piano with drums")
    return folder


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, str]]:
    """Will hold (clip's number by its sound, caption) of everything that is trained on."""
    numbers: list[int] = []
    pairs: list[tuple[int, str]] = []
    encode, embed = codec.encode_audio, TextEncoder.__call__

    def spied_encode(model, wav):
        numbers.extend((wav.mean((1, 2)) * 20).round().int().tolist())
        return encode(model, wav)

    def spied_embed(self, captions, device):
        pairs.extend(zip(numbers[-len(captions) :], captions, strict=True))
        return embed(self, captions, device)

    monkeypatch.setattr("musicgen.codec.encode_audio", spied_encode)
    monkeypatch.setattr(TextEncoder, "__call__", spied_embed)
    return pairs


@pytest.mark.parametrize(
    ("flags", "dropped_captions", "dropped_words"),
    [
        ({}, 0, 0),
        ({"use_cfg": True}, 0.2, 0),
        ({"use_cfg": True, "cfg_p": 0.5}, 0.5, 0),
        ({"use_cfg": True, "cfg_p": 1}, 1, 0),
        ({"use_cfg": False, "word_dropout": 0.3}, 0, 0.3),
        ({"no_label": True}, 1, 0),
    ],
    ids=str,
)
def test_captions_are_dropped_as_asked_and_never_mixed_up(
    flags, dropped_captions, dropped_words, seen, mono_folder, fit, tmp_path
):
    data = numbered_clips(tmp_path / "data", 8)
    fit(mono_folder, data, epochs=16, batch_size=3, grad_acc=2, **flags)
    assert len(seen) == 8 * 16
    kept = [(number, caption) for number, caption in seen if caption]
    assert 1 - len(kept) / len(seen) == pytest.approx(dropped_captions, abs=0.12)
    words = 0
    for number, caption in kept:
        own = iter(f"{number} calm piano with drums".split())
        assert all(word in own for word in caption.split())  # its own words, in their order
        words += len(caption.split())
    if kept:
        assert 1 - words / (5 * len(kept)) == pytest.approx(dropped_words, abs=0.05)
    if 0 < dropped_captions < 1:
        with_both = {number for number, caption in seen if not caption} & {n for n, _ in kept}
        assert with_both == set(range(1, 9))  # another choice in each epoch


def test_the_share_of_dropped_captions_over_many_crops(make_pairs):
    tracks = scan(str(make_pairs(seconds=(0.5,) * 5)))
    for probability in (0.0, 0.1, 0.2, 0.7):
        clips = Clips(
            tracks, sample_rate=32_000, channels=1, samples=1, seed=5, drop_caption=probability
        )
        picks = [Pick(epoch, index, is_filler=True) for epoch in range(1000) for index in range(5)]
        share = np.mean([not clips[pick].caption for pick in picks])
        assert share == pytest.approx(probability, abs=0.02)


def test_no_label_needs_no_captions_and_ignores_those_there(mono_folder, make_pairs, fit):
    data = make_pairs()
    labelled = fit(mono_folder, data, "labelled", epochs=1, no_label=True)
    for path in data.glob("*.txt"):
        path.unlink()
    bare = fit(mono_folder, data, "bare", epochs=1, no_label=True)
    assert metrics(labelled) == metrics(bare)


def test_a_held_out_caption_is_never_dropped(mono_folder, make_pairs, fit):
    data = make_pairs()
    flags = {"epochs": 1, "valid_path": str(data), "valid_step": 100}
    first = [
        metrics(fit(mono_folder, data, f"{i}", **flags, **more))[0]["valid_loss"]
        for i, more in enumerate([{}, {"use_cfg": True, "cfg_p": 1, "word_dropout": 0.9}])
    ]
    assert first[0] == first[1]
