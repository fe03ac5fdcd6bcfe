"""LARS against numbers worked out by hand, with a rate that changes at every step."""
import math

import pytest
import torch
from torch import nn

from lars import LARS

pytestmark = pytest.mark.usefixtures("float64")


def take_step(optimizer, w, gradient, lr):
    w.grad = torch.tensor(gradient)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()


def assert_is(w, expected):
    torch.testing.assert_close(w.data, torch.tensor(expected), rtol=1e-12, atol=1e-12)


def test_a_weight_by_hand():
    """μ = 0.5, λ = 0.1, η = 0.5, w = (3, 4).

    1. lr 0.4, g = (0, -0.4): d = g + λw = (0.3, 0), ‖w‖ = 5, so d becomes (2.5, 0), which is m;
       w = (2, 4)
    2. lr 0.2, g = (-0.2, 0.6): d = (0, 1), ‖w‖ = √20, so d becomes (0, √5); m = (1.25, √5);
       w = (1.75, 4 - √5/5)
    3. lr 0.1, g = -λw + (-2, 0): d = (-2, 0) becomes (-‖w‖/2, 0); m = (0.625 - ‖w‖/2, √5/2)
    """
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = LARS([w], lr=1.0, momentum=0.5, weight_decay=0.1, trust_coefficient=0.5)
    take_step(optimizer, w, [[0.0, -0.4]], 0.4)
    assert_is(w, [[2.0, 4.0]])

    take_step(optimizer, w, [[-0.2, 0.6]], 0.2)
    root5 = math.sqrt(5)
    a = 1.75
    b = 4 - root5 / 5
    assert_is(w, [[a, b]])

    take_step(optimizer, w, [[-0.1 * a - 2, -0.1 * b]], 0.1)
    norm = math.hypot(a, b)
    assert_is(w, [[a - 0.1 * (0.625 - norm / 2), b - 0.1 * root5 / 2]])


def test_a_bias_by_hand():
    """No decay, no adaptation: g = 0.5 twice, so m = 0.5, 0.75; w = 1 - 0.4·0.5 - 0.2·0.75."""
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS([w], lr=1.0, momentum=0.5, weight_decay=0.1, trust_coefficient=0.5)
    take_step(optimizer, w, [0.5], 0.4)
    take_step(optimizer, w, [0.5], 0.2)
    assert_is(w, [0.65])


@pytest.mark.parametrize("before, gradient, after", (
    ([[3.0, 4.0]], [[6.0, 8.0]], [[2.4, 3.2]]),    # d = 0.5 · 5/10 · g = (1.5, 2)
    ([[0.0, 0.0]], [[1.0, 2.0]], [[-0.4, -0.8]]),
    ([[3.0, 4.0]], [[0.0, 0.0]], [[3.0, 4.0]]),
))
def test_without_weight_decay(before, gradient, after):
    """Adapted too, by each weight's own norm; where a norm is 0, the ratio is 1."""
    w = nn.Parameter(torch.tensor(before))
    other = nn.Parameter(torch.tensor([[30.0, 40.0]]))
    other.grad = torch.tensor([[6.0, 8.0]])    # d = 0.5 · 50/10 · g = (15, 20)
    groups = [dict(params=[w]), dict(params=[other], lr=0.8)]
    take_step(LARS(groups, lr=1.0, trust_coefficient=0.5), w, gradient, 0.4)
    assert_is(w, after)
    assert_is(other, [[18.0, 24.0]])


@pytest.mark.parametrize("options", (
    dict(lr=math.nan), dict(momentum=1), dict(momentum=-0.1), dict(weight_decay=-1),
    dict(trust_coefficient=-1)))
def test_bad_input(options):
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="need lr"):
        LARS([w], **dict(lr=0.1) | options)
