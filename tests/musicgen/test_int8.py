"""Products with weights of 8 bits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from musicgen.int8 import int8, is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="torch has no quantized engine here")


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(256, 512)
    layer.weight.data *= torch.logspace(-3, 0, 512)[:, None]  # each output has its own scale
    return layer.requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(16, 1, 256) * torch.logspace(-3, 3, 16)[:, None, None]


def test_it_is_close_to_float32(layer, x):
    exact = layer(x) - layer.bias
    error = int8(layer)(x) - layer.bias - exact
    assert (error.norm(dim=-1) / exact.norm(dim=-1)).max() < 0.02
    by_output = error[4:, 0].norm(dim=0) / exact[4:, 0].norm(dim=0)
    assert by_output.median() < 0.02


def test_a_row_does_not_depend_on_the_others(layer, x):
    project = int8(layer)
    whole = project(x)
    for size in (1, 2, 8):
        assert torch.equal(torch.cat([project(part) for part in x.split(size)]), whole)


def test_bias_activation_and_several_layers(layer, x):
    zeros = torch.zeros(2, 1, 256)
    assert torch.equal(int8(layer)(zeros), layer.bias.expand(2, 1, -1))
    assert torch.equal(int8(layer, activation=F.gelu)(x), F.gelu(int8(layer)(x)))
    assert torch.equal(int8(layer, slice(8, 24))(x), int8(layer)(x)[..., 8:24])
    both = int8(nn.ModuleList([layer, layer]))(x)
    assert torch.equal(both, int8(layer)(x).repeat(1, 1, 2))
