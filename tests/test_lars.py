"""LARS against numbers worked out by hand, with a rate that changes at every step."""
import math

import pytest
import torch
from torch import nn

from lars import LARS


def weight(values, dtype=torch.float64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def take_step(optimizer, w, gradient, lr):
    w.grad = torch.tensor(gradient, dtype=w.dtype)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()


def assert_is(w, expected):
    expected = torch.tensor(expected, dtype=w.dtype)
    torch.testing.assert_close(w.data, expected, rtol=1e-12, atol=1e-12)


def test_a_weight_by_hand():
    """μ = 0.5, λ = 0.1, η = 0.5, w = (3, 4).

    1. lr 0.4, g = (0, -0.4): d = g + λw = (0.3, 0), ‖w‖ = 5, so d becomes (2.5, 0), which is m;
       w = (2, 4)
    2. lr 0.2, g = (-0.2, 0.6): d = (0, 1), ‖w‖ = √20, so d becomes (0, √5); m = (1.25, √5);
       w = (1.75, 4 - √5/5)
    3. lr 0.1, g = -λw + (-2, 0): d = (-2, 0) becomes (-‖w‖/2, 0); m = (0.625 - ‖w‖/2, √5/2)
    """
    w = weight([[3.0, 4.0]])
    optimizer = LARS([w], lr=1.0, momentum=0.5, weight_decay=0.1, trust_coefficient=0.5)
    root5 = math.sqrt(5)
    take_step(optimizer, w, [[0.0, -0.4]], 0.4)
    assert_is(w, [[2.0, 4.0]])

    take_step(optimizer, w, [[-0.2, 0.6]], 0.2)
    a = 1.75
    b = 4 - root5 / 5
    assert_is(w, [[a, b]])

    take_step(optimizer, w, [[-0.1 * a - 2, -0.1 * b]], 0.1)
    norm = math.hypot(a, b)
    assert_is(w, [[a - 0.1 * (0.625 - norm / 2), b - 0.1 * root5 / 2]])


@pytest.mark.parametrize("shape", ((1,), ()))
def test_a_bias_by_hand(shape):
    """No decay, no adaptation: g = 0.5 twice, so m = 0.5, 0.75; w = 1 - 0.4·0.5 - 0.2·0.75."""
    w = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = LARS([w], lr=1.0, momentum=0.5, weight_decay=0.1, trust_coefficient=0.5)
    for lr, expected in ((0.4, 0.8), (0.2, 0.65)):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.full(shape, 0.5, dtype=torch.float64)
        optimizer.step()
        assert w.item() == pytest.approx(expected, rel=1e-12)


def test_adapted_also_without_weight_decay():
    """λ = 0 is not SGD: w = (3, 4), g = (6, 8), η = 0.5: d = 0.5·5/10·g = (1.5, 2), lr 0.4."""
    w = weight([[3.0, 4.0]])
    take_step(LARS([w], lr=1.0, trust_coefficient=0.5), w, [[6.0, 8.0]], 0.4)
    assert_is(w, [[2.4, 3.2]])


@pytest.mark.parametrize("before, gradient, after", (
    ([[0.0, 0.0]], [[1.0, 2.0]], [[-0.1, -0.2]]), ([[3.0, 4.0]], [[0.0, 0.0]], [[3.0, 4.0]]),
    ([[0.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]])))
def test_a_zero_norm_means_ratio_one(before, gradient, after):
    w = weight(before)
    take_step(LARS([w], lr=1.0), w, gradient, 0.1)
    assert_is(w, after)


def test_each_weight_by_its_own_norm():
    """Together, in two groups with rates of their own: as with an optimizer for each."""
    torch.manual_seed(0)
    shapes = ((3, 4), (5,), (2, 3, 4), (2, 2))
    together = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [nn.Parameter(w.detach().clone()) for w in together]
    options = dict(momentum=0.9, weight_decay=1e-2, trust_coefficient=0.1)
    groups = [dict(params=together[:3]), dict(params=together[3:], lr=0.7)]
    optimizers = [LARS(groups, lr=0.1, **options)]
    for w, lr in zip(alone, (0.1, 0.1, 0.1, 0.7)):
        optimizers.append(LARS([w], lr=lr, **options))
    for _ in range(3):
        for a, b in zip(together, alone):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone):
        assert torch.equal(a, b)


def test_closure():
    """It is called once, with gradients, before the step, and its loss is returned."""
    w = weight([[3.0, 4.0]])
    optimizer = LARS([w], lr=0.4, trust_coefficient=0.5)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        losses.append(loss)
        return loss

    assert optimizer.step(closure) is losses[0] and len(losses) == 1
    assert losses[0].item() == 25
    assert_is(w, [[2.4, 3.2]])    # g = (6, 8), as above


def test_never_waits_for_the_device():
    """On the meta device a tensor has no value, so anything that reads one (item, if) fails."""
    parameters = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((3, 4), (5,))]
    for p in parameters:
        p.grad = torch.empty_like(p)
    optimizer = LARS(parameters, lr=0.1, weight_decay=1e-4)
    optimizer.step()
    assert len(optimizer.state) == 2


def test_with_a_gradient_scaler():
    """Scaled gradients give the steps of plain ones, to the last bit, as the scale is a power of
    two. Where one overflows, weights and momentum stay, and the scale is halved."""
    torch.manual_seed(0)
    plain = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,))]
    scaled = [nn.Parameter(p.detach().clone()) for p in plain]
    options = dict(lr=0.1, weight_decay=1e-2, trust_coefficient=0.1)
    plain_optimizer = LARS(plain, **options)
    optimizer = LARS(scaled, **options)
    scaler = torch.amp.GradScaler("cpu")
    for overflow in (False, True, False):
        gradients = [torch.randn_like(p) for p in plain]
        optimizer.zero_grad()
        loss = 0
        for p, g in zip(scaled, gradients):
            loss = loss + (p * g).sum()
        scaler.scale(loss).backward()
        if overflow:
            scaled[1].grad[2] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if not overflow:
            for p, g in zip(plain, gradients):
                p.grad = g
            plain_optimizer.step()
        for p, q in zip(plain, scaled):
            assert torch.equal(p, q)
            assert torch.equal(plain_optimizer.state[p]["m"], optimizer.state[q]["m"])
    assert scaler.get_scale() == 2.0**15


def test_state_is_plain_and_continues_exactly(tmp_path):
    """The state loads with weights_only, and the next steps are those without the stop."""
    def go(parameters, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()

    torch.manual_seed(0)
    straight = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
    stopped = [nn.Parameter(p.detach().clone()) for p in straight]
    go(straight, LARS(straight, lr=0.1, weight_decay=1e-4), (1, 2, 3, 4))

    optimizer = LARS(stopped, lr=0.1, weight_decay=1e-4)
    go(stopped, optimizer, (1, 2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer = LARS(stopped, lr=99.0)
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    go(stopped, optimizer, (3, 4))
    for p, q in zip(straight, stopped):
        assert torch.equal(p, q)


@pytest.mark.parametrize("bad", (
    dict(lr=-1), dict(lr=0.1, momentum=1), dict(lr=0.1, momentum=-0.1),
    dict(lr=0.1, weight_decay=-1), dict(lr=0.1, trust_coefficient=-1), dict(lr=math.nan)))
def test_bad_input(bad):
    with pytest.raises(ValueError, match="need lr"):
        LARS([weight([1.0])], **bad)
