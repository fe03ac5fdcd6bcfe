"""The theory, to rounding error: f(T_g x) = Γ_g f(x) (Eq. 1), and from it L_A = L_H with equal gradients (Eqs. 2, 3).

    pytest test_equivariance.py

Everything is in float64, with random weights and batch norm in training mode. For the exact groups, shifts and quarter
turns, every element must agree to 1e-10. Turns by 45 degrees and scalings are only approximate on a grid: their error
must be well below an ordinary convolution network's and shrink as the resolution doubles.
"""
import functools

import pytest
import torch
from torch import nn

from hssl import (ProjectionHead, Rotation, Scale, Translation, a_ssl_loss, allowed_pairs, drawn_sets,
                  equivariance_error, h_ssl_loss, readout)
from layers import DenseBackbone, MNISTBackbone, ResidualBackbone, Untied
from losses import Predictor, multi_view_nt_xent, nt_xent, simsiam

pytestmark = pytest.mark.usefixtures("float64")
torch.set_num_threads(1)                                                       # these networks are too small for more
WIDTHS, SIDE, BATCH = (3, 5, 6), 28, 4
TOLERANCE = 1e-10

# Every exact group: its backbone's arguments, and the group that moves its features.
EXACT = {
    "shifts, circular": (dict(group="translation", padding_mode="circular"), Translation(7, 4, 4, circular=True)),
    **{f"quarter turns, extent {extent}, {padding}":
       (dict(group="rotation", group_size=4, extent=extent, padding_mode=padding), Rotation(4, base_size))
       for extent, padding, base_size in ((1, "zeros", 1), (2, "zeros", 1), (3, "zeros", 2), (4, "zeros", 1),
                                          (4, "circular", 4))},
}
# The residual network at its full depth, for every group that is exact.
EXACT |= {f"residual network, {name}": (dict(depth=16, **EXACT[name][0]), EXACT[name][1])
          for name in ("shifts, circular", "quarter turns, extent 1, zeros", "quarter turns, extent 4, zeros")}
exact = pytest.mark.parametrize("backbone, group", EXACT.values(), ids=EXACT)


@pytest.fixture
def float64():
    """All that a test makes is float64 and comes from seed 0."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomise(f):
    """Give biases and batch-norm scales random values too, so that nothing holds only because they are 0 or 1."""
    for parameter in f.parameters():
        if parameter.ndim <= 1:
            nn.init.normal_(parameter, mean=0.3, std=0.5)
    return f.train()


def make(backbone):
    if "depth" in backbone:
        return randomise(ResidualBackbone(widths=(2, *WIDTHS), in_channels=1, kernel_size=5, **backbone))
    return randomise(MNISTBackbone(widths=WIDTHS, kernel_size=5, **backbone))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# -------------------------------------------------------------------------------------------------------- exact groups

@exact
def test_equivariance_for_every_element(backbone, group):
    """f(T_g x) = Γ_g f(x), Eq. (1)."""
    errors = equivariance_error(make(backbone), group, torch.randn(BATCH, 1, SIDE, SIDE))
    worst = errors.argmax()
    assert len(errors) == len(group.elements)
    assert errors[worst] < TOLERANCE, f"g = {group.elements[worst].tolist()}: relative error {errors[worst]:.1e}"


@exact
def test_elements_may_differ_within_a_batch(backbone, group):
    """T_g, Γ_g and view act on each image by its own g: the same as one image at a time."""
    x, z = torch.randn(8, 1, SIDE, SIDE), make(backbone)(torch.randn(8, 1, SIDE, SIDE))
    g = group.elements[torch.randint(len(group.elements), (8,))]
    for act, on in ((group.T, x), (group.Γ, z), (group.view, z)):
        one_by_one = torch.cat([act(g[i:i + 1], on[i:i + 1]) for i in range(8)])
        torch.testing.assert_close(act(g, on), one_by_one, rtol=0, atol=0)


def losses_and_gradients(f, h, I, group, x, *g):
    """L_A and L_H with every parameter's gradient, on the same weights, images and elements."""
    parameters = [*f.parameters(), *h.parameters()]
    for loss in (a_ssl_loss, h_ssl_loss):
        value = loss(f, h, I, group, x, *g)
        yield value.item(), torch.autograd.grad(value, parameters)


def assert_same_loss_and_gradients(f, h, I, group, x, *g):
    (loss_a, gradients_a), (loss_h, gradients_h) = losses_and_gradients(f, h, I, group, x, *g)
    elements = [one.tolist() for one in g]
    assert abs(loss_a - loss_h) < TOLERANCE * abs(loss_a), (elements, loss_a, loss_h)
    whole = torch.cat([gradient.flatten() for gradient in gradients_a]).norm()
    assert whole > 0
    for a, b in zip(gradients_a, gradients_h):
        assert (a - b).norm() < TOLERANCE * whole, (elements, ((a - b).norm() / whole).item())


def head_for(group, f, grid):
    """A small h for the views of f."""
    width = readout(group.base(f(torch.randn(2, 1, SIDE, SIDE))), grid).shape[1]
    return ProjectionHead(width, 16, 8, grid)


@exact
@pytest.mark.parametrize("grid", (0, 2))
def test_losses_and_gradients_are_equal_for_every_pair(backbone, group, grid):
    """L_A = L_H with equal gradients, for every relative element g1⁻¹ g2, and for different ones within a batch."""
    f = make(backbone)
    h, x = head_for(group, f, grid), torch.randn(BATCH, 1, SIDE, SIDE)
    pairs = allowed_pairs(group)
    identity = (group.elements.reshape(len(group.elements), -1) == 0).all(1).nonzero().item()
    from_identity = pairs[pairs[:, 0] == identity]
    assert len(from_identity) == len(group.elements) - 1                       # every element but the identity itself
    mixed = pairs[torch.randint(len(pairs), (BATCH,))]
    for pair in [*(p.expand(BATCH, 2) for p in from_identity), mixed]:
        assert_same_loss_and_gradients(f, h, nt_xent, group, x, *group.elements[pair].unbind(1))


@pytest.mark.parametrize("objective", ("four views", "simsiam"))
@exact
def test_other_objectives_agree_too(backbone, group, objective):
    """L_A = L_H with equal gradients for four views, and for SimSiam, with batch norm in head and predictor."""
    f, x = make(backbone), torch.randn(BATCH, 1, SIDE, SIDE)
    four = objective == "four views"
    h = ProjectionHead(readout(group.base(f(x))).shape[1], 16, 8, 0, norm=not four)
    q = Predictor(8, 16)
    I = multi_view_nt_xent if four else lambda h1, h2: simsiam(q(h1), q(h2), h1, h2)
    g = group.elements[drawn_sets(group, 4 if four else 2, count=BATCH)]                             # (B, V, ...)
    assert_same_loss_and_gradients(f, h, I, group, x, *g.unbind(1))


@pytest.mark.parametrize("make_untied, group", (
    (lambda: DenseBackbone(SIDE, WIDTHS), Translation(7, 4, 4, circular=True)),
    (lambda: Untied(MNISTBackbone(widths=[4 * w for w in WIDTHS], kernel_size=5), 4), Rotation(4)),
    (lambda: Untied(MNISTBackbone(widths=[3 * w for w in WIDTHS], kernel_size=5), 3), Scale(3, 1.41))))
def test_untied_networks_have_the_shape_but_not_the_structure(make_untied, group):
    """(B, C, G, 7, 7) as in the lifted network, but f(T_g x) is far from Γ_g f(x) for every g except the identity."""
    f, x = randomise(make_untied()), torch.randn(BATCH, 1, SIDE, SIDE)
    assert f(x).shape == (BATCH, WIDTHS[2], {Rotation: 4, Scale: 3}.get(type(group), 1), 7, 7)
    errors = equivariance_error(f, group, x, [g for g in group.elements if g.any()])
    assert errors.min() > 0.5, errors


class Ordinary(nn.Module):
    """An ordinary convolution network with the backbone's activation shapes: its channels are merely called (C, G)."""

    def __init__(self, group_size, widths=WIDTHS, kernel_size=5):
        super().__init__()
        layers, channels = [], 1
        for stage, width in enumerate(widths):
            out = width * group_size
            layers += [nn.Conv2d(channels, out, kernel_size, padding=kernel_size // 2, padding_mode="circular"),
                       nn.ReLU(), nn.MaxPool2d(2) if stage < 2 else nn.Identity(), nn.BatchNorm2d(out)]
            channels = out
        self.layers, self.group_size = nn.Sequential(*layers), group_size

    def forward(self, x):
        return self.layers(x).unflatten(1, (-1, self.group_size))


@pytest.mark.parametrize("group_size", (1, 4))
def test_an_ordinary_convolution_fails(group_size):
    """Without turned filters neither Eq. (1) nor L_A = L_H holds. (group_size = 1: only the map turns.)"""
    group, ordinary, x = Rotation(4), Ordinary(group_size), torch.randn(BATCH, 1, SIDE, SIDE)

    def f(x):
        return ordinary(x).expand(-1, -1, 4, -1, -1)

    errors = equivariance_error(f, group, x, group.elements[1:])
    assert errors.min() > 0.5, errors
    h = head_for(group, f, 0)
    g1, g2 = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 3, 0, 2])
    loss_a, loss_h = (loss(f, h, nt_xent, group, x, g1, g2).item() for loss in (a_ssl_loss, h_ssl_loss))
    assert abs(loss_a - loss_h) > 1e-3 * loss_a, (loss_a, loss_h)


@pytest.mark.parametrize("on_base", (False, True))
def test_equivariance_error_by_hand(on_base):
    """For one g at a time: the norm of f(T_g x) - Γ_g f(x) over that of Γ_g f(x), everywhere or on the base space."""
    group, f, x = Rotation(4, 2), Ordinary(4).eval(), torch.randn(BATCH, 1, SIDE, SIDE)
    z, expected = f(x), []
    for k in range(4):
        left, right = f(x.rot90(k, (2, 3))), z.roll(k, 2).rot90(k, (3, 4))
        if on_base:
            left, right = left[:, :, :2], right[:, :, :2]
        expected.append(((left - right).square().sum() / right.square().sum()).sqrt())
    errors = equivariance_error(f, group, x, on_base=on_base)
    torch.testing.assert_close(errors, torch.stack(expected))
    assert errors[0] == 0 and errors[1:].min() > 0.1 and not errors.requires_grad
    assert equivariance_error(f, group, x, group.elements[[3, 1]], on_base).tolist() == errors[[3, 1]].tolist()
    half = equivariance_error(lambda x: (1000 * f(x)).half(), group, x, on_base=on_base)     # squares beyond float16
    torch.testing.assert_close(half, errors, rtol=1e-2, atol=1e-12)


# -------------------------------------------------------------------------------------------------- approximate groups

def band_limited(side, batch=4, waves=12):
    """Smooth images that vanish at the border: the same sums of plane waves, sampled on side x side pixels."""
    generator = torch.Generator().manual_seed(1)
    r = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(r, r, indexing="ij")
    k, phase, height = (torch.randn(batch, waves, n, 1, 1, generator=generator) for n in (2, 1, 1))
    image = (height * torch.cos(3 * (k[:, :, :1] * x + k[:, :, 1:] * y) + 3 * phase)).sum(1)
    return image * torch.exp(-(x**2 + y**2) / (2 * 0.2**2))                                # (batch, 1, side, side)


def mean_error(make_network, group, elements, side):
    """Relative error of Eq. (1) on the base space, mean over elements and three random networks.

    Batch norm takes its statistics from the images once: an enlarged image fills more of the map, so its own differ."""
    errors, x = [], band_limited(side)
    for seed in range(3):
        torch.manual_seed(seed)
        f = make_network().train()
        for module in f.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None                                         # all of the statistics, not a tenth
        f(x)
        errors += equivariance_error(f.eval(), group, x, elements, on_base=True).tolist()
    return sum(errors) / len(errors)


APPROXIMATE = {
    # Circular padding meets the empty background without an edge, so only the sampling is measured.
    "45 degrees": (dict(group="rotation", group_size=8, kernel_size=7), Rotation(8), torch.tensor([1, 3, 5, 7])),
    "scale": (dict(group="scale", group_size=3, kernel_size=7), Scale(3, 1.41), torch.tensor([-1, 1])),
}


@pytest.mark.parametrize("backbone, group, elements", APPROXIMATE.values(), ids=APPROXIMATE)
def test_approximate_groups(backbone, group, elements):
    """The error is below half of an ordinary network's at 56 pixels, and shrinks each time the resolution doubles."""
    steerable = functools.partial(MNISTBackbone, widths=WIDTHS, padding_mode="circular", **backbone)
    errors = {side: mean_error(steerable, group, elements, side) for side in (28, 56, 112)}
    ordinary = functools.partial(Ordinary, backbone["group_size"], kernel_size=backbone["kernel_size"])
    ordinary = mean_error(ordinary, group, elements, 56)
    message = f"relative error {errors}, ordinary network {ordinary:.3f} at 56 pixels"
    print(message)
    assert errors[56] < 0.5 * ordinary, message
    assert errors[112] < 0.8 * errors[56] < 0.8 * 0.8 * errors[28], message
