"""NT-Xent against its formula as a loop, in float64; of several processes: test_distributed.py."""
import math

import pytest
import torch

from losses import nt_xent

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


def test_float32_inside_autocast():
    """Half-precision projections, under autocast, are compared in float32."""
    h1, h2 = torch.randn(2, 16, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = nt_xent(h1, h2)
    assert value.dtype == torch.float32
    assert torch.equal(value, nt_xent(h1.float(), h2.float()))


def test_nothing_overflows():
    """Neither exp(1/τ), beyond float32 here, nor the norm of float16's largest numbers. With all
    projections equal, each of the 2N - 1 candidates is as likely as the partner."""
    large = torch.full((4, 8), 60_000.0).half()
    assert nt_xent(large, large, 1e-3).item() == pytest.approx(math.log(7), rel=1e-5)


@pytest.mark.parametrize("shape, other, temperature, message", (
    ((4, 8), (1, 8), 0.1, r"must both be \(N, D\)"),    # these two would broadcast
    ((8,), (8,), 0.1, r"must both be \(N, D\)"),
    ((0, 8), (0, 8), 0.1, r"must both be \(N, D\)"),
    ((4, 8), (4, 8), 0.0, "above 0"),
    ((4, 8), (4, 8), math.nan, "above 0"),
))
def test_what_is_refused(shape, other, temperature, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(torch.randn(shape), torch.randn(other), temperature)
