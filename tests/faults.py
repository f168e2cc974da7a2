"""Faults that other trainers had. Each test here is worth as much as it notices them."""

import pytest
import torch

from musicgen.loss import TokenLoss
from training import plan
from training.session import Session


def loss_on_the_first_clip_only(patch: pytest.MonkeyPatch) -> None:
    right = TokenLoss.forward

    def only_first(self, *inputs):
        losses = right(self, *inputs)
        return losses * (torch.arange(len(losses)) == 0)[:, None]

    patch.setattr(TokenLoss, "forward", only_first)


def shuffled_captions(patch: pytest.MonkeyPatch) -> None:
    right = plan.collate

    def shuffled(clips):
        batch = right(clips)
        return batch._replace(captions=[*batch.captions[1:], batch.captions[0]])

    patch.setattr("training.plan.collate", shuffled)


def padding_that_is_trained_on(patch: pytest.MonkeyPatch) -> None:
    def lengths(run, batch):
        return torch.full_like(batch.lengths, run.frames)

    patch.setattr(Session, "lengths", lengths)


FAULTS = [loss_on_the_first_clip_only, shuffled_captions, padding_that_is_trained_on]
