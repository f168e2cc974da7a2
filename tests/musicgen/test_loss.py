"""The token loss is audiocraft's own, clip by clip, whatever the batch around it.

Letters: B batch, K codebooks, T token frames.
"""

from pathlib import Path

import pytest
import torch
from audiocraft.modules.conditioners import ConditioningAttributes
from torch.nn import functional as F

from musicgen import load
from musicgen.load import Model
from musicgen.loss import TokenLoss, token_counts
from musicgen.text import TextEncoder

CPU = torch.device("cpu")
T = 24
CAPTIONS = ["", "a slow piano", "a lively flute tune with brushed drums and a soft bass"]
PADDING = [[T, T, T], [T, 5, 1], [T, T - 1, T - 2], [3, 3, 3]]  # valid frames of three clips


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Model:
    model = load.load_model(str(model_folder), CPU)
    model.lm.train()  # as in training: its dropouts must have no say
    return model


def random_codes(model: Model, clips: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (clips, model.lm.num_codebooks, T)
    return torch.randint(model.lm.card, shape, generator=generator)


def token_loss(model: Model, codes: torch.Tensor, valid: list[int], captions: list[str]):
    text, mask = TextEncoder(model.lm)(captions, CPU)
    return TokenLoss(model.lm)(codes, torch.tensor(valid), text, mask)


def audiocraft_tokens(model: Model, codes: torch.Tensor, valid: int, caption: str):
    """One clip's cross entropies as in audiocraft's solver [K, T], and which of them count."""
    codes = codes[None].clone()
    codes[..., valid:] = model.lm.special_token_id
    model.lm.eval()
    output = model.lm.compute_predictions(
        codes, [ConditioningAttributes(text={"description": caption})]
    )
    model.lm.train()
    counted = output.mask[0] & (torch.arange(T) < valid)
    loss = F.cross_entropy(
        output.logits[0].transpose(1, 2), codes[0].clamp(max=model.lm.card - 1), reduction="none"
    )
    return loss.where(counted, 0.0), counted


@pytest.mark.parametrize("valid", PADDING)
def test_loss_counts_and_gradient_are_those_of_audiocraft(model, valid):
    codes = random_codes(model, 3)
    parameters = [p for p in model.lm.parameters() if p.requires_grad]

    losses = token_loss(model, codes, valid, CAPTIONS)  # [B, K]
    counts = token_counts(model.lm, torch.tensor(valid), T)  # [K]
    mean = (losses.sum(0) / counts).mean()

    theirs = [audiocraft_tokens(model, *clip) for clip in zip(codes, valid, CAPTIONS, strict=True)]
    their_losses = torch.stack([loss.sum(-1) for loss, _ in theirs])
    their_counts = sum(counted.sum(-1) for _, counted in theirs)
    their_mean = (their_losses.sum(0) / their_counts).mean()

    torch.testing.assert_close(losses, their_losses, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == their_counts.tolist()
    torch.testing.assert_close(mean, their_mean, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(m, parameters) for m in (mean, their_mean)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_codes_in_the_padding_change_nothing(model):
    codes, valid = random_codes(model, 3), [T, 7, 1]
    other = random_codes(model, 3, seed=1)
    for clip, frames in enumerate(valid):
        other[clip, :, :frames] = codes[clip, :, :frames]
    assert not torch.equal(codes, other)
    assert torch.equal(*(token_loss(model, c, valid, CAPTIONS) for c in (codes, other)))


def test_a_clip_has_the_same_loss_alone_as_beside_longer_captions(model):
    codes, valid = random_codes(model, 3), [T, 9, T]
    together = token_loss(model, codes, valid, CAPTIONS)
    alone = [
        token_loss(model, codes[i : i + 1], valid[i : i + 1], CAPTIONS[i : i + 1]) for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_each_clip_has_gradient_from_its_own_caption_and_no_other(model):
    text, mask = TextEncoder(model.lm)(CAPTIONS[1:] * 2, CPU)
    text.requires_grad_()
    losses = TokenLoss(model.lm)(random_codes(model, 4), torch.tensor([T, T, 5, 5]), text, mask)
    has_gradient = (
        torch.stack(
            [
                torch.autograd.grad(loss, text, retain_graph=True)[0].abs().sum((1, 2))
                for loss in losses.sum(1)
            ]
        )
        > 0
    )
    assert torch.equal(has_gradient, torch.eye(4, dtype=torch.bool))


@pytest.mark.parametrize("caption", CAPTIONS)
def test_the_condition_is_audiocrafts_own(model, caption):
    seen = []
    hook = model.lm.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["cross_attention_src"]), with_kwargs=True
    )
    codes = random_codes(model, 1)
    token_loss(model, codes, [T], [caption])
    audiocraft_tokens(model, codes[0], T, caption)
    hook.remove()
    (ours, mask), theirs = seen
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert mask.all() or caption == ""


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("captions", [[""], ["", "a slow piano"]])
def test_the_null_caption_is_finite_and_right_in_every_precision(model, captions, precision):
    codes, valid = random_codes(model, len(captions)), [T] * len(captions)
    exact = token_loss(model, codes, valid, captions)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        losses = token_loss(model, codes, valid, captions)
    losses.mean().backward()
    gradients = [p.grad for p in model.lm.parameters() if p.grad is not None]
    model.lm.zero_grad()
    assert gradients
    assert all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close(losses.float(), exact, rtol=2e-3, atol=0)


def test_no_caption_is_left_without_a_key_to_attend_to(model, monkeypatch):
    """Attention over nothing is NaN on some devices."""
    attend, masks = F.scaled_dot_product_attention, []

    def spied(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    text, mask = TextEncoder(model.lm)(CAPTIONS, CPU)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    TokenLoss(model.lm)(random_codes(model, 3), torch.tensor([T] * 3), text, mask)
    of_captions = [mask for mask in masks if mask is not None]
    assert len(of_captions) == len(model.lm.transformer.layers)
    assert all(mask.any(-1).all() for mask in of_captions)
