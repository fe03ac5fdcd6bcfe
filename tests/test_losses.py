"""The objectives against their formulas written as loops, in float64."""
import math

import pytest
import torch
from torch import nn

from losses import byol, move_target, nt_xent, simsiam

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("n, temperature", ((1, 0.5), (7, 0.1)))
def test_nt_xent(n, temperature):
    """Mean over all 2N projections a, with partner p, of
    -log( e^(a·p/τ) / Σ over the other 2N - 1 projections b of e^(a·b/τ) ); the paper's τ is the
    default."""
    h1, h2 = torch.randn(2, n, 5)
    h = torch.cat([h1, h2])
    h = h / h.norm(dim=1, keepdim=True)
    expected = 0.0
    for i in range(2 * n):
        others = 0.0
        for j in range(2 * n):
            if j != i:
                others += math.exp(h[i] @ h[j] / temperature)
        partner = h[(i + n) % (2 * n)]
        expected -= math.log(math.exp(h[i] @ partner / temperature) / others) / (2 * n)
    loss = nt_xent(h1, h2, temperature).item()
    assert loss == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert nt_xent(h1, h2) == nt_xent(h1, h2, 0.1)


def test_gradient_by_finite_differences():
    h1, h2 = torch.randn(2, 4, 3, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(nt_xent, (h1, h2))


@pytest.mark.parametrize("loss, count", ((nt_xent, 2), (simsiam, 4), (byol, 4)))
def test_float32_inside_autocast(loss, count):
    """Half-precision projections, under autocast, are compared in float32."""
    h = torch.randn(count, 16, 8).half()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*h)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(*h.float()))


def test_nothing_overflows():
    """Neither exp(1/τ), beyond float32 here, nor the norm of float16's largest numbers. With all
    projections equal, each of the 2N - 1 candidates is as likely as the partner."""
    large = torch.full((4, 8), 60_000.0).half()
    assert nt_xent(large, large, 1e-3).item() == pytest.approx(math.log(7), rel=1e-5)


@pytest.mark.parametrize("temperature", (0.0, math.nan))
def test_temperatures_that_are_refused(temperature):
    h = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="above 0"):
        nt_xent(h, h, temperature)


@pytest.mark.parametrize("shape", ((1, 8), (4, 1), (8,), (4, 8, 1)))
def test_other_shapes_are_refused(shape):
    """(1, 8) and (4, 1) would broadcast."""
    h = torch.randn(4, 8)
    wrong = torch.randn(shape)
    for arguments in ((h, wrong), (wrong, h)):
        with pytest.raises(ValueError, match="alike"):
            nt_xent(*arguments)
        with pytest.raises(ValueError, match="alike"):
            simsiam(h, h, *arguments)
    with pytest.raises(ValueError, match="alike"):
        nt_xent(h[0], h[0])


def test_simsiam_and_byol():
    """-½ mean cos - ½ mean cos, and summed squared distances of unit vectors, in which only
    predictions get a gradient."""
    leaves = torch.randn(4, 6, 5).unbind()
    p1, p2, h1, h2 = [leaf.requires_grad_() for leaf in leaves]
    cosines = 0.0
    squares = 0.0
    for p, h in ((p1, h2), (p2, h1)):
        a = (p / p.norm(dim=1, keepdim=True)).detach()
        b = (h / h.norm(dim=1, keepdim=True)).detach()
        cosines += (a * b).sum().item()
        squares += (a - b).square().sum().item()
    assert simsiam(p1, p2, h1, h2).item() == pytest.approx(-cosines / 12, rel=1e-12)
    loss = byol(p1, p2, h1, h2)
    assert loss.item() == pytest.approx(squares / 6, rel=1e-12)
    loss.backward()
    assert p1.grad.norm() > 0 and p2.grad.norm() > 0
    assert h1.grad is None and h2.grad is None


def test_move_target():
    """A copy after step 0; then decay · target + (1 - decay) · online, decay rising along a cosine
    from 0.9 to 1. Batch norm's statistics stay."""
    target = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    online = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    online[1].running_mean.fill_(5)
    for step in range(6):
        for p in online.parameters():
            nn.init.normal_(p)
        before = [p.clone() for p in target.parameters()]
        move_target(target, online, 0.9, step, 5)
        decay = 1 - 0.1 * (math.cos(math.pi * step / 5) + 1) / 2
        if step == 0:
            decay = 0
        for old, slow, fast in zip(before, target.parameters(), online.parameters(), strict=True):
            torch.testing.assert_close(slow.data, decay * old + (1 - decay) * fast.data)
    assert target[1].running_mean.abs().max() == 0
