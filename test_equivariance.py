"""The theory, to rounding error: f(T_g x) = Γ_g f(x) (Eq. 1), and from it L_A = L_H with equal gradients (Eqs. 2, 3).

    pytest test_equivariance.py

Everything is in float64 with random weights and batch norm in training mode. Exact groups, shifts and quarter turns,
are held to 1e-10 for every element; turns by 45 degrees and scalings are approximate on a grid, and their error is
held against an ordinary convolution network's and must shrink as the resolution doubles.
"""
import functools

import numpy as np
import pytest
import torch
from numpy.polynomial import hermite_e
from torch import nn

from hssl import Product, ProjectionHead, Rotation, Scale, Translation, a_ssl_loss, allowed_pairs, allowed_sets, h_ssl_loss, readout
from layers import DenseBackbone, MNISTBackbone, ResidualBackbone, Untied, hermite_gaussian, hermite_orders, steerable_basis
from losses import Predictor, multi_view_nt_xent, nt_xent, simsiam

WIDTHS, SIDE, BATCH = (3, 5, 6), 28, 4
TOLERANCE = 1e-10

# Every exact group: its backbone's arguments, and the group that moves its features.
EXACT = {
    "shifts, circular": (dict(group="translation", padding_mode="circular"), Translation(7, 4, 4, circular=True)),
    **{f"quarter turns, extent {e}, {padding}": (dict(group="rotation", elements=4, extent=e, padding_mode=padding), Rotation(4, side))
       for e, padding, side in ((1, "zeros", 1), (2, "zeros", 1), (3, "zeros", 2), (4, "zeros", 1), (4, "circular", 4))},
    "quarter turns and shifts": (dict(group="rotation", elements=4, padding_mode="circular"), Product(Translation(7, 4, 4, circular=True), Rotation(4))),
}
# The residual network at its full depth, for every group that is exact.
EXACT |= {f"residual network, {name}": (dict(depth=16, **EXACT[name][0]), EXACT[name][1])
          for name in ("shifts, circular", "quarter turns, extent 1, zeros", "quarter turns, extent 4, zeros")}
exact = pytest.mark.parametrize("backbone, group", EXACT.values(), ids=EXACT)


@pytest.fixture(autouse=True)
def float64():
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


def same(g, batch):
    """One element for a whole batch."""
    return g.expand(batch, *g.shape)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------------------ exact groups

@exact
def test_equivariance_for_every_element(backbone, group):
    """f(T_g x) = Γ_g f(x), Eq. (1)."""
    f, x = make(backbone), torch.randn(BATCH, 1, SIDE, SIDE)
    z = f(x)
    for g in group.elements:
        error = relative(f(group.T(same(g, BATCH), x)), group.Γ(same(g, BATCH), z))
        assert error < TOLERANCE, f"g = {g.tolist()}: relative error {error:.1e}"


@exact
def test_elements_may_differ_within_a_batch(backbone, group):
    """T_g, Γ_g and view act on each image by its own g: the same as one image at a time."""
    x, z = torch.randn(8, 1, SIDE, SIDE), make(backbone)(torch.randn(8, 1, SIDE, SIDE))
    g = group.elements[torch.randint(len(group.elements), (8,))]
    for act, on in ((group.T, x), (group.Γ, z), (group.view, z)):
        torch.testing.assert_close(act(g, on), torch.cat([act(g[i:i + 1], on[i:i + 1]) for i in range(8)]), rtol=0, atol=0)


def losses_and_gradients(f, h, group, x, g1, g2):
    """L_A and L_H with every parameter's gradient, on the same weights, images and elements."""
    parameters = [*f.parameters(), *h.parameters()]
    for loss in (a_ssl_loss, h_ssl_loss):
        value = loss(f, h, nt_xent, group, x, g1, g2)
        yield value.item(), torch.autograd.grad(value, parameters)


class Head(nn.Sequential):
    """h: a view's readout through two linear layers."""

    def __init__(self, group, f, grid):
        width = readout(group.base(f(torch.randn(2, 1, SIDE, SIDE))), grid).shape[1]
        super().__init__(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 8))
        self.grid = grid

    def forward(self, view):
        return super().forward(readout(view, self.grid))


@exact
@pytest.mark.parametrize("grid", (0, 2))
def test_losses_and_gradients_are_equal_for_every_pair(backbone, group, grid):
    """L_A = L_H, and so is each parameter's gradient, for every relative element g1⁻¹ g2 (and mixed ones in a batch)."""
    f = make(backbone)
    h, x = Head(group, f, grid), torch.randn(BATCH, 1, SIDE, SIDE)
    pairs = allowed_pairs(group)
    identity = (group.elements.reshape(len(group.elements), -1) == 0).all(1).nonzero().item()
    from_identity = pairs[pairs[:, 0] == identity]
    assert len(from_identity) == len(group.elements) - 1                        # every element but the identity itself
    mixed = pairs[torch.randint(len(pairs), (BATCH,))]
    for pair in [*(p.expand(BATCH, 2) for p in from_identity), mixed]:
        g1, g2 = group.elements[pair].unbind(1)
        (loss_a, gradients_a), (loss_h, gradients_h) = losses_and_gradients(f, h, group, x, g1, g2)
        assert abs(loss_a - loss_h) < TOLERANCE * abs(loss_a), (g1.tolist(), g2.tolist(), loss_a, loss_h)
        whole = torch.cat([g.flatten() for g in gradients_a]).norm()
        for a, b in zip(gradients_a, gradients_h):
            assert (a - b).norm() < TOLERANCE * whole, (g1.tolist(), g2.tolist(), ((a - b).norm() / whole).item())


@pytest.mark.parametrize("objective", ("four views", "simsiam"))
@exact
def test_other_objectives_agree_too(backbone, group, objective):
    """L_A = L_H with equal gradients for four views of each image, and for SimSiam, whose head and predictor have batch norm."""
    f, x = make(backbone), torch.randn(BATCH, 1, SIDE, SIDE)
    four = objective == "four views"
    width = readout(group.base(f(x))).shape[1]
    h, q = ProjectionHead(width, 16, 8, 0, norm=not four), Predictor(8, 16)
    sets = allowed_sets(group, 4) if four and len(group.elements) < 10 else torch.randint(len(group.elements), (100, 4 if four else 2))
    g = group.elements[sets[torch.randint(len(sets), (BATCH,))]].unbind(1)
    I = (lambda *views: multi_view_nt_xent(views)) if four else (lambda h1, h2: simsiam(q(h1), q(h2), h1, h2))
    parameters = [*f.parameters(), *h.parameters()]
    (loss_a, gradients_a), (loss_h, gradients_h) = ((loss.item(), torch.autograd.grad(loss, parameters)) for loss in (
        fn(f, h, I, group, x, *g) for fn in (a_ssl_loss, h_ssl_loss)))
    assert abs(loss_a - loss_h) < TOLERANCE * abs(loss_a), (loss_a, loss_h)
    whole = torch.cat([gradient.flatten() for gradient in gradients_a]).norm()
    assert whole > 0
    for a, b in zip(gradients_a, gradients_h):
        assert (a - b).norm() < TOLERANCE * whole


@pytest.mark.parametrize("make_untied, group", (
    (lambda: DenseBackbone(SIDE, WIDTHS), Translation(7, 4, 4, circular=True)),
    (lambda: Untied(MNISTBackbone(widths=[4 * w for w in WIDTHS], kernel_size=5), 4), Rotation(4)),
    (lambda: Untied(MNISTBackbone(widths=[3 * w for w in WIDTHS], kernel_size=5), 3), Scale(3, 1.41))))
def test_untied_networks_have_the_shape_but_not_the_structure(make_untied, group):
    """The activations of the lifted network, (B, C, G, 7, 7), but f(T_g x) is far from Γ_g f(x) for every g but the identity."""
    f, x = randomise(make_untied()), torch.randn(BATCH, 1, SIDE, SIDE)
    z = f(x)
    assert z.shape == (BATCH, WIDTHS[2], {Rotation: 4, Scale: 3}.get(type(group), 1), 7, 7)
    errors = [relative(f(group.T(same(g, BATCH), x)), group.Γ(same(g, BATCH), z)) for g in group.elements if g.any()]
    assert min(errors) > 0.5, errors


class Ordinary(nn.Module):
    """An ordinary convolution network with the backbone's activation shapes: its channels are merely called (C, G)."""

    def __init__(self, elements, widths=WIDTHS, kernel_size=5):
        super().__init__()
        layers, channels = [], 1
        for stage, width in enumerate(widths):
            layers += [nn.Conv2d(channels, width * elements, kernel_size, padding=kernel_size // 2, padding_mode="circular"),
                       nn.ReLU(), nn.MaxPool2d(2) if stage < 2 else nn.Identity(), nn.BatchNorm2d(width * elements)]
            channels = width * elements
        self.layers, self.elements = nn.Sequential(*layers), elements

    def forward(self, x):
        return self.layers(x).unflatten(1, (-1, self.elements))


@pytest.mark.parametrize("elements", (1, 4))
def test_an_ordinary_convolution_fails(elements):
    """Without turned filters nothing above holds: not Eq. (1), not L_A = L_H. (elements = 1: only the map turns.)"""
    group, f, x = Rotation(4), Ordinary(elements), torch.randn(BATCH, 1, SIDE, SIDE)
    z = f(x).expand(-1, -1, 4, -1, -1)
    errors = [relative(f(group.T(same(g, BATCH), x)).expand_as(z), group.Γ(same(g, BATCH), z)) for g in group.elements[1:]]
    assert min(errors) > 0.5, errors
    network = (lambda images: f(images).expand(-1, -1, 4, -1, -1))
    h = Head(group, network, 0)
    g1, g2 = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 3, 0, 2])
    loss_a, loss_h = (loss(network, h, nt_xent, group, x, g1, g2).item() for loss in (a_ssl_loss, h_ssl_loss))
    assert abs(loss_a - loss_h) > 1e-3 * loss_a, (loss_a, loss_h)


# ------------------------------------------------------------------------------------------------------ approximate groups

def band_limited(side, batch=4, waves=12):
    """Smooth images that vanish at the border: the same sums of plane waves, sampled on side x side pixels."""
    generator = torch.Generator().manual_seed(1)
    r = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(r, r, indexing="ij")
    k, phase, height = (torch.randn(batch, waves, n, 1, 1, generator=generator) for n in (2, 1, 1))
    image = (height * torch.cos(3 * (k[:, :, :1] * x + k[:, :, 1:] * y) + 3 * phase)).sum(1)
    return image * torch.exp(-(x**2 + y**2) / (2 * 0.2**2))                                      # (batch, 1, side, side)


def mean_error(make_network, group, elements, side):
    """Relative error of base(f(T_g x)) against view(g, f(x)), mean over elements and three random networks."""
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        f, x = make_network().train(), band_limited(side)
        with torch.no_grad():
            errors += [relative(group.base(f(group.T(same(g, len(x)), x))), group.view(same(g, len(x)), f(x))) for g in elements]
    return sum(errors) / len(errors)


APPROXIMATE = {
    # Circular padding meets the empty background without an edge, so that what is measured is the sampling. For scale, a
    # kernel wide enough for the widest functions (SESN's 7 cuts them off at twice their width).
    "45 degrees": (dict(group="rotation", elements=8, kernel_size=7), Rotation(8), torch.tensor([1, 3, 5, 7])),
    "scale": (dict(group="scale", elements=3, kernel_size=11), Scale(3, 1.41), torch.tensor([-1, 1])),
}


@pytest.mark.parametrize("backbone, group, elements", APPROXIMATE.values(), ids=APPROXIMATE)
def test_approximate_groups(backbone, group, elements):
    """The error is below half of an ordinary network's at 56 pixels, and shrinks each time the resolution doubles."""
    steerable = functools.partial(MNISTBackbone, widths=WIDTHS, padding_mode="circular", **backbone)
    errors = {side: mean_error(steerable, group, elements, side) for side in (28, 56, 112)}
    ordinary = mean_error(lambda: Ordinary(backbone["elements"], kernel_size=backbone["kernel_size"]), group, elements, 56)
    message = f"relative error {errors}, ordinary network {ordinary:.3f} at 56 pixels"
    print(message)
    assert errors[56] < 0.5 * ordinary, message
    assert errors[112] < 0.8 * errors[56] < 0.8 * 0.8 * errors[28], message


# --------------------------------------------------------------------------------------------------------------- the basis

def sesn_basis(size, scales, effective_size):
    """SESN's basis "A" restated one function and one pixel row at a time, with NumPy's own Hermite polynomials."""
    basis = torch.zeros(effective_size**2, len(scales), size, size)
    for s, scale in enumerate(scales):
        window = int(size * scale / max(scales)) // 2 * 2 + 1
        t = np.arange(window) - window // 2

        def one_axis(order):
            return torch.from_numpy(np.exp(-t**2 / (2 * scale**2)) / scale * hermite_e.hermeval(t / scale, [0] * order + [1]))

        pad = (size - window) // 2
        for f in range(effective_size**2):
            basis[f, s, pad:pad + window, pad:pad + window] = torch.outer(one_axis(f % effective_size), one_axis(f // effective_size))
    return basis / basis[:, :1].square().sum((2, 3), keepdim=True).sqrt()


@pytest.mark.parametrize("size, effective_size", ((7, 3), (11, 3), (15, 7)))
def test_scale_basis_is_sesn_s(size, effective_size):
    ours = steerable_basis("scale", 3, size, effective_size, 0.9, 1.41)
    theirs = sesn_basis(size, [0.9 * 1.41**i for i in range(3)], effective_size)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elements", (4, 8, 5))
def test_turned_basis_is_the_linear_combination_that_steering_gives(elements):
    """ψ_θ = Σ_j A_j(θ) ψ_j: a turned He_n(x) He_m(y) e^(-r²/2) mixes those of the same n + m, as ∂ⁿ_x ∂ᵐ_y does.

    That function is (-1)^(n+m) ∂ⁿ_x ∂ᵐ_y e^(-r²/2), and turning the derivatives expands (c ∂_x + s ∂_y)ⁿ (c ∂_y - s ∂_x)ᵐ.
    """
    orders, sigma = hermite_orders("rotation", 3), 0.9
    basis = steerable_basis("rotation", elements, 7, 3, sigma)
    y, x = torch.meshgrid(torch.arange(-3.0, 4.0), torch.arange(-3.0, 4.0), indexing="ij")
    norm = torch.stack([(hermite_gaussian(x, n, sigma) * hermite_gaussian(y, m, sigma)).norm() for n, m in orders])
    for k in range(elements):
        angle = torch.tensor(2 * torch.pi * k / elements)
        c, s = angle.cos().item(), angle.sin().item()
        # In image coordinates (rows down), u = c x - s y and v = s x + c y, so that ∂_u = c ∂_x - s ∂_y, ∂_v = s ∂_x + c ∂_y.
        for j, (n, m) in enumerate(orders):
            polynomial = {(0, 0): 1.0}
            for factor in [{(1, 0): c, (0, 1): -s}] * n + [{(1, 0): s, (0, 1): c}] * m:
                product = {}
                for (a, b), left in polynomial.items():
                    for (da, db), right in factor.items():
                        product[a + da, b + db] = product.get((a + da, b + db), 0) + left * right
                polynomial = product
            steered = sum(weight * norm[orders.index(order)] * basis[orders.index(order), 0] for order, weight in polynomial.items())
            torch.testing.assert_close(basis[j, k], steered / norm[j], rtol=0, atol=1e-12)


def test_the_tensor_product_set_is_not_closed_under_turning():
    """Why rotation takes n + m <= N: SESN's set n, m < 3 cannot express its own functions turned by 45 degrees."""
    y, x = torch.meshgrid(torch.arange(-3.0, 4.0), torch.arange(-3.0, 4.0), indexing="ij")
    c = 0.5**0.5

    def both(x, y, n, m):
        return hermite_gaussian(x, n, 0.9) * hermite_gaussian(y, m, 0.9)

    def residual(orders):
        flat = torch.stack([both(x, y, n, m).flatten() for n, m in orders], 1)
        turned = torch.stack([both(c * x - c * y, c * x + c * y, n, m).flatten() for n, m in orders], 1)
        return relative(flat @ torch.linalg.lstsq(flat, turned).solution, turned)

    assert residual(hermite_orders("rotation", 3)) < 1e-12
    assert residual(hermite_orders("scale", 3)) > 1e-2
