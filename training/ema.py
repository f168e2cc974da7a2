"""An exponential moving average of the trained weights."""

from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """Averages `parameters` in float32: average = decay * average + (1 - decay) * weights.

    Update n decays by min(decay, (1 + n) / (10 + n)), so that the average of a short run isn't
    mostly the base model.
    """

    def __init__(self, parameters: list[torch.Tensor], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.updates = 0
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(self.average, self.parameters, self.updates)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their averages; a second call restores both, bitwise."""
        for average, parameter in zip(self.average, self.parameters, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)
