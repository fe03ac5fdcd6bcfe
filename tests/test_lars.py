"""LARS against numbers worked out by hand, with a rate that changes at every step."""
import math

import pytest
import torch

from lars import LARS
from measure import Reads


def steps(optimizer, w, gradients_and_rates):
    for gradient, lr in gradients_and_rates:
        w.grad = torch.tensor(gradient, dtype=w.dtype)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        yield w.detach().clone()


def test_a_weight_by_hand():
    """μ = 0.5, λ = 0.1, η = 0.5, w = (3, 4).

    1. lr 0.4, g = (0, -0.4):  d = g + λw = (0.3, 0), ‖w‖ = 5, so d becomes (2.5, 0); m = (2.5, 0); w = (2, 4)
    2. lr 0.2, g = (-0.2, 0.6): d = (0, 1), ‖w‖ = √20, so d becomes (0, √5); m = (1.25, √5); w = (1.75, 4 - √5/5)
    3. lr 0.1, g = -λw + (-2, 0): d = (-2, 0) becomes (-‖w‖/2, 0); m = (0.625 - ‖w‖/2, √5/2)
    """
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = LARS([w], lr=1.0, momentum=0.5, weight_decay=0.1, trust_coefficient=0.5)
    root5 = math.sqrt(5)
    second = (1.75, 4 - root5 / 5)
    norm = math.hypot(*second)
    third = (second[0] - 0.1 * (0.625 - norm / 2), second[1] - 0.1 * root5 / 2)
    rates = [([[0.0, -0.4]], 0.4), ([[-0.2, 0.6]], 0.2), ([[-0.1 * second[0] - 2, -0.1 * second[1]]], 0.1)]
    for got, expected in zip(steps(optimizer, w, rates), [(2, 4), second, third], strict=True):
        torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_bias_by_hand():
    """No decay, no adaptation for one dimension: g = 0.5 twice, μ = 0.5, m = 0.5, 0.75; w = 1 - 0.4·0.5 - 0.2·0.75."""
    w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = LARS([w], lr=1.0, momentum=0.5, weight_decay=0.1, trust_coefficient=0.5)
    got = list(steps(optimizer, w, [([0.5], 0.4), ([0.5], 0.2)]))
    torch.testing.assert_close(torch.cat(got), torch.tensor([0.8, 0.65], dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_adapted_also_without_weight_decay():
    """λ = 0 is not SGD: w = (3, 4), g = (6, 8), η = 0.5, so d = 0.5·5/10·g = (1.5, 2); lr 0.4 gives (2.4, 3.2)."""
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    (got,) = steps(LARS([w], lr=1.0, trust_coefficient=0.5), w, [([[6.0, 8.0]], 0.4)])
    torch.testing.assert_close(got, torch.tensor([[2.4, 3.2]]))


@pytest.mark.parametrize("w, g, expected", (
    ([[0.0, 0.0]], [[1.0, 2.0]], [[-0.1, -0.2]]), ([[3.0, 4.0]], [[0.0, 0.0]], [[3.0, 4.0]])))
def test_a_zero_norm_means_ratio_one(w, g, expected):
    w = torch.nn.Parameter(torch.tensor(w))
    (got,) = steps(LARS([w], lr=1.0), w, [(g, 0.1)])
    torch.testing.assert_close(got, torch.tensor(expected))


def test_many_weights_together_or_each_alone():
    """A step takes all weights and biases together, each adapted by its own norm: as with an optimizer for each."""
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(s)) for s in ((3, 4), (5,), (2, 3, 4), (1,), (2, 2))]
    alone = [torch.nn.Parameter(w.detach().clone()) for w in together]
    options = dict(lr=0.1, momentum=0.9, weight_decay=1e-2, trust_coefficient=0.1)
    optimizers = [LARS(together, **options), *(LARS([w], **options) for w in alone)]
    for _ in range(3):
        for a, b in zip(together, alone):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b)


def test_never_waits_for_the_device():
    """On the meta device a tensor has no value, so that anything that reads one (item, if, float) fails."""
    parameters = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in ((3, 4), (5,), (2, 3, 4))]
    optimizer = LARS(parameters, lr=0.1, weight_decay=1e-4)
    for p in parameters:
        p.grad = torch.empty_like(p)
    optimizer.step()
    assert len(optimizer.state) == 3


def test_with_a_gradient_scaler():
    """Scaled gradients give the steps of plain ones, to the last bit, as the scale is a power of two. Where one
    overflows, weights and momentum stay, and the scaler halves its scale. Nobody reads a value."""
    torch.manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2, 3, 4))]
    scaled = [torch.nn.Parameter(p.detach().clone()) for p in plain]
    one, other = (LARS(p, lr=0.1, weight_decay=1e-2, trust_coefficient=0.1) for p in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu")

    def state():
        return [t.clone() for p in scaled for t in (p, other.state[p]["momentum"])]

    def scaled_step(gradients, infinite=False):
        other.zero_grad()
        scaler.scale(sum((p * g).sum() for p, g in zip(scaled, gradients))).backward()
        scaled[1].grad[2] += float("inf") if infinite else 0
        with Reads() as reads:
            scaler.step(other)
            scaler.update()
        assert reads.count == 0

    for _ in range(2):
        gradients = [torch.randn_like(p) for p in plain]
        for p, g in zip(plain, gradients):
            p.grad = g
        one.step()
        scaled_step(gradients)
        assert all(torch.equal(p, q) for p, q in zip(plain, scaled)) and scaler.get_scale() == 2.0**16
    before = state()
    scaled_step(gradients, infinite=True)
    assert all(torch.equal(a, b) for a, b in zip(before, state())) and scaler.get_scale() == 2.0**15
    scaled_step(gradients)
    assert not any(torch.equal(a, b) for a, b in zip(before, state()))


def test_state_is_plain_and_continues_exactly(tmp_path):
    """The state is numbers and tensors, loads with weights_only, and the next step is the same as without the stop."""
    def start():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(4))]
        return parameters, LARS(parameters, lr=0.1, weight_decay=1e-4)

    def go(parameters, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()

    straight, optimizer = start()
    go(straight, optimizer, (1, 2, 3, 4))
    stopped, optimizer = start()
    go(stopped, optimizer, (1, 2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    _, optimizer = start()
    optimizer = LARS(stopped, lr=99.0)
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    go(stopped, optimizer, (3, 4))
    for a, b in zip(straight, stopped):
        assert torch.equal(a, b)


def test_parameters_without_a_gradient_stay():
    used, unused = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = LARS([used, unused], lr=0.1, weight_decay=0.1)
    used.grad = torch.ones(2, 2)
    optimizer.step()
    assert not torch.equal(used, torch.ones(2, 2)) and torch.equal(unused, torch.ones(2, 2))


@pytest.mark.parametrize("bad", (
    dict(lr=-1), dict(lr=0.1, momentum=1), dict(lr=0.1, weight_decay=-1), dict(lr=0.1, trust_coefficient=-1),
    dict(lr=float("nan"))))
def test_bad_input(bad):
    with pytest.raises(ValueError, match="need lr"):
        LARS([torch.nn.Parameter(torch.ones(1))], **bad)
