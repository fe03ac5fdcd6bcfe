"""The objectives against their formulas written as loops, in float64."""
import math

import pytest
import torch
from torch import nn

from losses import Predictor, byol, move_target, nt_xent, simsiam


def by_the_formula(h1, h2, temperature):
    """Mean over all 2N projections a, with partner p, of
    -log( e^(a·p/τ) / Σ over the other 2N - 1 projections b of e^(a·b/τ) )."""
    n = len(h1)
    h = [row / row.norm() for row in torch.cat([h1, h2])]
    total = 0.0
    for i in range(2 * n):
        others = 0.0
        for j in range(2 * n):
            if j != i:
                others += math.exp(h[i] @ h[j] / temperature)
        partner = h[(i + n) % (2 * n)]
        total -= math.log(math.exp(h[i] @ partner / temperature) / others)
    return total / (2 * n)


@pytest.mark.parametrize("n, temperature", ((1, 0.5), (2, 0.1), (7, 0.1), (7, 1.0)))
def test_nt_xent(n, temperature):
    torch.manual_seed(0)
    h1, h2 = torch.randn(2, n, 5, dtype=torch.float64)
    expected = by_the_formula(h1, h2, temperature)
    assert nt_xent(h1, h2, temperature).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_paper_s_temperature_is_the_default():
    torch.manual_seed(0)
    h1, h2 = torch.randn(2, 4, 5)
    assert nt_xent(h1, h2) == nt_xent(h1, h2, 0.1) != nt_xent(h1, h2, 0.2)


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    h1, h2 = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(nt_xent, (h1, h2))


def test_there_are_2n_minus_1_candidates():
    """With all projections equal each of the 2N - 1 candidates is as likely as the partner."""
    h = torch.ones(6, 4)
    assert nt_xent(h, h).item() == pytest.approx(math.log(11), rel=1e-6)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("loss, count", ((nt_xent, 2), (simsiam, 4), (byol, 4)))
def test_float32_inside_autocast(loss, count, dtype):
    """Half-precision projections, under autocast, are compared in float32."""
    torch.manual_seed(0)
    h = torch.randn(count, 16, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*h)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(*h.float()))


def test_a_small_temperature_does_not_overflow():
    """exp(1/τ) is beyond float32 here; float16 projections as large as they get have a norm."""
    torch.manual_seed(0)
    h1, h2 = torch.randn(2, 16, 8, requires_grad=True)
    loss = nt_xent(h1, h2, 1e-3)
    loss.backward()
    assert loss.isfinite()
    large = torch.full((4, 8), 60_000.0).half()
    assert nt_xent(large, large).item() == pytest.approx(math.log(7), rel=1e-5)


@pytest.mark.parametrize("shapes, temperature, message", (
    (((3, 4), (3, 5)), 0.1, "alike"), (((3, 4), (2, 4)), 0.1, "alike"),
    (((3,), (3,)), 0.1, "alike"),
    (((3, 4, 1), (3, 4, 1)), 0.1, "alike"), (((3, 4), (3, 4)), 0.0, "above 0"),
    (((3, 4), (3, 4)), -1.0, "above 0"), (((3, 4), (3, 4)), math.nan, "above 0")))
def test_what_nt_xent_refuses(shapes, temperature, message):
    h1 = torch.zeros(shapes[0])
    h2 = torch.zeros(shapes[1])
    with pytest.raises(ValueError, match=message):
        nt_xent(h1, h2, temperature)


# ------------------------------------------------------------------------------- without negatives

def test_simsiam_and_byol():
    """-½ mean cos - ½ mean cos, and summed squared distances of unit vectors. Only predictions
    get a gradient."""
    torch.manual_seed(0)
    p1, p2, h1, h2 = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True).unbind()
    cosines = 0.0
    squares = 0.0
    for p, h in ((p1, h2), (p2, h1)):
        for i in range(6):
            a = p[i].detach() / p[i].detach().norm()
            b = h[i].detach() / h[i].detach().norm()
            cosines += float(a @ b)
            squares += float((a - b).square().sum())
    assert simsiam(p1, p2, h1, h2).item() == pytest.approx(-cosines / 12, rel=1e-12)
    assert byol(p1, p2, h1, h2).item() == pytest.approx(squares / 6, rel=1e-12)
    for loss in (simsiam, byol):
        value = loss(p1, p2, h1, h2)
        gradients = torch.autograd.grad(value, (p1, p2, h1, h2), allow_unused=True)
        assert gradients[0].norm() > 0 and gradients[1].norm() > 0
        assert gradients[2] is None and gradients[3] is None


@pytest.mark.parametrize("loss", (simsiam, byol))
@pytest.mark.parametrize("shape", ((1, 8), (2, 8), (4, 1), (4, 7), (8,), (4, 8, 1)))
def test_targets_of_another_shape_are_refused(loss, shape):
    """(1, 8) and (4, 1) would broadcast."""
    p = torch.randn(4, 8)
    wrong = torch.randn(shape)
    for h1, h2 in ((wrong, wrong), (p, wrong), (wrong, p)):
        with pytest.raises(ValueError, match="alike"):
            loss(p, p, h1, h2)


def test_the_predictor_learns_a_linear_map():
    torch.manual_seed(0)
    predictor = Predictor(6, 64)
    h = torch.randn(256, 6)
    target = h @ torch.randn(6, 6)
    optimizer = torch.optim.Adam(predictor.parameters(), 0.01)
    losses = []
    for _ in range(100):
        loss = simsiam(predictor(h), predictor(h), target, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > -0.3 and losses[-1] < -0.9


def test_move_target():
    """A copy after step 0; then decay · target + (1 - decay) · online, decay rising along a cosine
    from 0.9 to 1. Batch norm's statistics stay."""
    torch.manual_seed(0)
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
    assert decay == 1 and target[1].running_mean.abs().max() == 0


def test_move_target_never_waits_for_the_device():
    """On the meta device a tensor has no value, so a read (item, if, float) would fail."""
    target = nn.Linear(3, 4, device="meta")
    online = nn.Linear(3, 4, device="meta")
    for step in range(2):
        move_target(target, online, 0.9, step, 2)
