"""Every optimizer step is the planned one: its clips, its gradient, its learning rate, its files.

Letters: B batch, K codebooks.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from audiocraft.modules.conditioners import ConditioningAttributes
from conftest import metrics, weights
from faults import FAULTS
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dataset import Clips, collate
from musicgen import codec, load
from musicgen.loss import TokenLoss
from musicgen.text import TextEncoder
from recordings.scan import scan
from training.plan import Plan

CPU = torch.device("cpu")
SECONDS = (1.0, 0.8, 0.55, 0.9)  # shorter than a crop: the crop is the whole file


# One step.


def sgd(config, trained):
    """In AdamW's place: shows a gradient's size, where AdamW's first step shows its sign alone."""
    return torch.optim.SGD(trained.values(), lr=config.lr)


def tune_by_audiocraft(model_folder: Path, data: Path, steps: int, lr: float) -> dict:
    """The weights after SGD steps on all files of a folder at once, by audiocraft's own loss."""
    model = load.load_model(str(model_folder), CPU)
    lm, hop = model.lm, round(model.sample_rate / model.frame_rate)
    tracks = scan(str(data))
    conditions = [ConditioningAttributes(text={"description": track.caption}) for track in tracks]
    wavs = [torch.from_numpy(sf.read(track.path, dtype="float32")[0]) for track in tracks]
    padded = torch.stack([F.pad(wav, (0, model.sample_rate - len(wav))) for wav in wavs])
    codes = codec.encode_audio(model, padded[:, None].expand(-1, model.audio_channels, -1))
    valid = torch.tensor([len(wav) // hop for wav in wavs])[:, None]
    is_padding = torch.arange(codes.shape[-1]) >= valid  # [B, T]
    codes = codes.masked_fill(is_padding[:, None], lm.special_token_id)  # [B, K, T]

    optimizer = torch.optim.SGD(lm.parameters(), lr)
    for _ in range(steps):
        outputs = [  # a clip at a time, as audiocraft attends to the padding of captions
            lm.compute_predictions(clip[None], [condition])
            for clip, condition in zip(codes, conditions, strict=True)
        ]
        logits = torch.cat([output.logits for output in outputs])  # [B, K, T, card]
        counted = torch.cat([output.mask for output in outputs]) & ~is_padding[:, None]
        losses = [
            F.cross_entropy(logits[:, k][counted[:, k]], codes[:, k][counted[:, k]])
            for k in range(lm.num_codebooks)
        ]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return lm.state_dict()


def test_steps_are_audiocrafts_however_they_are_cut(model_folder, make_pairs, fit, monkeypatch):
    data = make_pairs(seconds=SECONDS)
    expected = tune_by_audiocraft(model_folder, data, steps=3, lr=0.2)
    monkeypatch.setattr("training.start.make_optimizer", sgd)
    flags = {"epochs": 3, "lr": 0.2, "lr_scheduler": "constant", "max_grad_norm": 0}
    for number, cut in enumerate(
        [
            {"batch_size": 4, "grad_acc": 1},
            {"batch_size": 1, "grad_acc": 4},
            {"batch_size": 2, "grad_acc": 2},
            {"batch_size": 3, "grad_acc": 2},  # micro-batches of 3 clips and 1
            {"batch_size": 1, "grad_acc": 4, "grad_checkpointing": True},
            {"batch_size": 2, "grad_acc": 2, "num_workers": 2},
        ]
    ):
        output = fit(model_folder, data, f"run{number}", **flags, **cut)
        torch.testing.assert_close(weights(output), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_step_is_told_from_audiocrafts(fault, mono_folder, make_pairs, fit, monkeypatch):
    """See in the weights of a few steps what test_demo.py hears after training with it."""
    data = make_pairs(seconds=SECONDS)
    expected = tune_by_audiocraft(mono_folder, data, steps=3, lr=0.2)
    monkeypatch.setattr("training.start.make_optimizer", sgd)
    fault(monkeypatch)
    flags = {"epochs": 3, "lr": 0.2, "lr_scheduler": "constant", "max_grad_norm": 0}
    wrong = weights(fit(mono_folder, data, **flags, batch_size=4, grad_acc=1))
    assert max((wrong[name] - expected[name]).abs().max() for name in expected) > 1e-4


def test_accumulation_equals_the_big_batch_in_adamw_too(model_folder, make_pairs, fit):
    data = make_pairs(seconds=SECONDS)
    big = fit(model_folder, data, "big", epochs=3, batch_size=4)
    small = fit(model_folder, data, "small", epochs=3, batch_size=1, grad_acc=4)
    torch.testing.assert_close(weights(small), weights(big), rtol=0, atol=1e-4)
    for a, b in zip(metrics(small), metrics(big), strict=True):
        assert a["loss_codebooks"] == pytest.approx(b["loss_codebooks"], rel=1e-5)


def test_the_gradient_is_clipped_to_its_limit(mono_folder, make_pairs, fit, monkeypatch):
    data = make_pairs(seconds=SECONDS)
    monkeypatch.setattr("training.start.make_optimizer", sgd)
    base = load.load_model(str(mono_folder), CPU).lm.state_dict()
    for limit in (0.1, 0.01):
        flags = {"epochs": 1, "batch_size": 4, "lr": 1.0, "max_grad_norm": limit}
        tuned = weights(fit(mono_folder, data, f"limit{limit}", **flags))
        moved = sum((tuned[name] - base[name]).square().sum() for name in base).sqrt()
        assert float(moved) == pytest.approx(limit, rel=1e-3)


# The run's steps.


def learning_rate(done: int, total: int, warmup: int, schedule: str) -> float:
    """The closed form, as a share of --lr, of the step after `done` steps."""
    if done < warmup:
        return (done + 1) / warmup
    part = (done - warmup) / (total - warmup)
    return {"constant": 1, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[
        schedule
    ]


RUNS = [  # files, batch_size, grad_acc, epochs, max_steps, warmup_steps, lr_scheduler -> steps
    (1, 1, 1, 1, None, 0, "cosine", 1),
    (1, 4, 8, 3, None, 1, "cosine", 3),  # fewer clips than a batch, fewer batches than grad_acc
    (3, 2, 2, 4, None, 2, "cosine", 4),
    (4, 2, 2, 5, None, 0, "cosine", 5),
    (5, 2, 2, 3, None, 3, "cosine", 6),  # the last step of an epoch has one clip
    (5, 1, 1, 2, None, 4, "constant", 10),
    (5, 1, 2, 2, 4, 1, "constant", 4),  # stops in the middle of an epoch
    (5, 5, 1, 4, 0, 3, "cosine", 4),  # 0 = by epochs
    (2, 1, 3, 7, 100, 2, "cosine", 7),  # max_steps beyond the epochs
    (5, 3, 1, 3, None, 5, "constant", 6),
    (4, 1, 4, 12, None, 16, "cosine", 12),  # warm-up longer than the run
    (1, 1, 1, 2, None, 2, "cosine", 2),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_steps_and_learning_rates_are_those_planned(
    run, mono_folder, make_pairs, fit, monkeypatch, capsys
):
    files, batch_size, grad_acc, epochs, max_steps, warmup, schedule, total = run
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *args: steps.append({g["lr"] for g in self.param_groups}) or step(self, *args),
    )
    output = fit(
        mono_folder,
        make_pairs(seconds=(1.0,) * files),
        batch_size=batch_size,
        grad_acc=grad_acc,
        epochs=epochs,
        max_steps=max_steps,
        warmup_steps=warmup,
        lr_scheduler=schedule,
        lr=1e-4,
    )
    used = warmup if warmup < total else total // 10
    expected = [1e-4 * learning_rate(done, total, used, schedule) for done in range(total)]
    rows = metrics(output)
    assert [row["step"] for row in rows] == [*range(1, total + 1)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)
    assert [lr for lrs in steps for lr in lrs] == pytest.approx(expected)
    told = capsys.readouterr().out
    assert f"steps      {total}: {math.ceil(files / batch_size / grad_acc)} an epoch" in told
    shortened = f"warm-up {used} (shortened from {warmup}: the run has {total} steps)"
    assert (shortened in told) == (used != warmup)


ALWAYS = {"lm_final.pt", "metrics.jsonl", "run.json", "training.png"}


@pytest.mark.parametrize(
    ("flags", "saved"),
    [
        ({}, []),
        ({"save_step": 0}, []),
        ({"save_step": 1}, [1, 2, 3, 4, 5, 6, 7]),
        ({"save_step": 3}, [3, 6]),
        ({"save_step": 7}, [7]),
        ({"save_step": 100}, []),
        ({"save_step": 2, "keep_checkpoints": 2}, [4, 6]),
        ({"save_step": 1, "keep_checkpoints": 1}, [7]),
    ],
)
def test_checkpoints_are_at_the_steps_asked_for(flags, saved, mono_folder, make_pairs, fit):
    data = make_pairs(seconds=(0.5,))
    output = fit(mono_folder, data, epochs=7, **flags)
    resume = {"resume.pt"} if flags.get("save_step") else set()
    expected = ALWAYS | resume | {f"lm_{step}.pt" for step in saved}
    assert {path.name for path in output.iterdir()} == expected


# What a step is made of.


def spied_clips(monkeypatch) -> list[str]:
    """Will hold the captions of all clips trained on, in order."""
    seen: list[str] = []
    call = TextEncoder.__call__
    monkeypatch.setattr(
        TextEncoder,
        "__call__",
        lambda self, captions, device: seen.extend(captions) or call(self, captions, device),
    )
    return seen


@pytest.mark.parametrize(("batch_size", "grad_acc"), [(1, 1), (2, 1), (2, 2), (8, 1), (3, 4)])
def test_an_epoch_trains_on_each_clip_once(
    batch_size, grad_acc, mono_folder, make_pairs, fit, monkeypatch
):
    data, seen = make_pairs(seconds=(0.5,) * 5), spied_clips(monkeypatch)
    fit(mono_folder, data, epochs=3, batch_size=batch_size, grad_acc=grad_acc)
    epochs = [seen[i : i + 5] for i in range(0, 15, 5)]
    assert [len(set(epoch)) for epoch in epochs] == [5, 5, 5]
    assert len(seen) == 15
    assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled


TRAINING, JUDGING = (True, True), (False, False)  # with dropout, with gradients
WATCHED = {"valid_step": 1, "sample_step": 1, "sample_duration": 0.1}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [TRAINING, TRAINING]),
        ({"save_step": 1}, [TRAINING, TRAINING]),
        (WATCHED, [JUDGING, TRAINING, JUDGING, TRAINING, JUDGING]),
    ],
)
def test_dropout_acts_in_training_alone(flags, expected, mono_folder, make_pairs, fit, monkeypatch):
    forward, modes = TokenLoss.forward, []

    def spied(self, *args):
        modes.append((self.lm.training, torch.is_grad_enabled()))
        return forward(self, *args)

    monkeypatch.setattr(TokenLoss, "forward", spied)
    data = make_pairs(seconds=(0.5,))
    held_out = {"valid_path": str(data)} if "valid_step" in flags else {}
    fit(mono_folder, data, epochs=2, **flags, **held_out)
    assert modes == expected


@pytest.mark.parametrize(
    ("seconds", "how"), [(SECONDS, {}), ((0.8, 3.0, 1.2), {"crops_by_length": True})]
)
def test_held_out_loss_is_the_training_loss_of_the_same_clips(
    seconds, how, model_folder, make_pairs, fit
):
    data = make_pairs(seconds=seconds)
    flags = how | {"valid_path": str(data), "valid_step": 5, "batch_size": 3, "grad_acc": 2}
    held_out, trained, _ = metrics(fit(model_folder, data, epochs=1, **flags))
    assert held_out["valid_loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert held_out["valid_loss_codebooks"] == pytest.approx(trained["loss_codebooks"], rel=1e-5)
    assert held_out["valid_perplexity"] == pytest.approx(math.exp(trained["loss"]), rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("files", [1, 2, 5, 8, 13])
@pytest.mark.parametrize(("batch_size", "grad_acc"), [(1, 1), (2, 2), (3, 1), (1, 4), (8, 2)])
def test_processes_share_every_epochs_clips(files, processes, batch_size, grad_acc):
    plan = Plan(files, batch_size, grad_acc, epochs=3, max_steps=None, seed=1, processes=processes)
    seen = Counter()
    for step in range(plan.total_steps):
        shares = [plan.batches(step, rank) for rank in range(processes)]
        assert len({tuple(map(len, share)) for share in shares}) == 1  # none waits for another
        assert 1 <= len(shares[0]) <= grad_acc
        assert all(1 <= len(batch) <= batch_size for share in shares for batch in share)
        picks = [
            pick for share in shares for batch in share for pick in batch if not pick.is_filler
        ]
        assert sorted(picks, key=str) == sorted(plan.step(step), key=str)
        seen.update((pick.epoch, pick.index) for pick in picks)
    assert seen == Counter((epoch, index) for epoch in range(3) for index in range(files))
    sizes = [len(plan.step(step)) for step in range(plan.total_steps)]
    assert max(sizes) <= min(plan.clips_per_step, min(sizes) + 1)
    assert plan.total_steps == 3 * math.ceil(files / plan.clips_per_step)


def test_an_epoch_is_cut_into_steps_of_one_size_and_the_old_way_for_old_runs():
    plan = Plan(9, batch_size=4, grad_acc=2, epochs=1, max_steps=None, seed=1)
    old = replace(plan, is_even=False)
    assert [len(plan.step(step)) for step in range(2)] == [5, 4]
    assert [len(old.step(step)) for step in range(2)] == [8, 1]
    assert [*plan.step(0), *plan.step(1)] == [*old.step(0), *old.step(1)]
    assert plan.sizes == "5 or 4"


def crops(data: Path, plan: Plan, workers: int = 0, seed: int = 3) -> dict[tuple, bytes]:
    """(epoch, file) -> the crop's samples, of every clip of a plan."""
    clips = Clips(scan(str(data)), sample_rate=32_000, channels=1, samples=16_000, seed=seed)
    picks = [batch for step in range(plan.total_steps) for batch in plan.batches(step)]
    loader = DataLoader(clips, batch_sampler=picks, collate_fn=collate, num_workers=workers)
    return {
        (pick.epoch, name): wav.numpy().tobytes()
        for batch, batch_picks in zip(loader, picks, strict=True)
        for pick, name, wav in zip(batch_picks, batch.names, batch.wav, strict=True)
    }


def test_a_crop_follows_from_seed_epoch_and_file_alone(make_pairs, tmp_path):
    data = make_pairs(seconds=(3.0, 2.0, 1.5, 4.0))
    plan = Plan(clips=4, batch_size=2, grad_acc=1, epochs=3, max_steps=None, seed=0)
    reordered = Plan(clips=4, batch_size=3, grad_acc=2, epochs=3, max_steps=None, seed=9)
    expected = crops(data, plan)
    assert len(expected) == 12
    assert len(set(expected.values())) == 12  # another crop in each epoch
    assert crops(data, plan, workers=2) == expected
    assert crops(data, reordered) == expected
    assert crops(data, plan, seed=4).keys() == expected.keys()
    assert not set(crops(data, plan, seed=4).values()) & set(expected.values())

    sf.write(data / "a new one.wav", np.zeros(32_000), 32_000)  # sorts before all others
    (data / "a new one.txt").write_text("silence")
    more = crops(data, Plan(clips=5, batch_size=2, grad_acc=1, epochs=3, max_steps=None, seed=0))
    assert {key: more[key] for key in expected} == expected


def test_workers_and_batches_in_flight_change_nothing(mono_folder, make_pairs, fit):
    data = make_pairs(seconds=(2.0, 1.5, 3.0))
    outputs = [fit(mono_folder, data, f"{n}", epochs=2, num_workers=n) for n in (0, 2)]
    assert metrics(outputs[0]) == metrics(outputs[1])
    for name, tensor in weights(outputs[0]).items():
        assert torch.equal(tensor, weights(outputs[1])[name])
