"""The theory, to rounding error: f(T_g x) = Γ_g f(x) (Eq. 1), and from it L_A = L_H with equal
gradients (Eqs. 2, 3).

    pytest test_equivariance.py

Everything is in float64, with random weights. For the exact groups, shifts and quarter turns, every
element must agree to 1e-10, with batch norm in training mode. Turns by 45 degrees and scalings are
approximate on a grid: their error must be below half of an ordinary network's.
"""
import pytest
import torch
from torch import nn

from hssl import (ProjectionHead, Rotation, Scale, Translation, a_ssl_loss, allowed_pairs,
                  equivariance_error, h_ssl_loss, readout)
from layers import DenseBackbone, MNISTBackbone, ResidualBackbone, Untied
from losses import nt_xent

pytestmark = pytest.mark.usefixtures("float64")
torch.set_num_threads(1)    # these networks are too small for more
WIDTHS = (3, 5, 6)
SIDE = 20
BATCH = 4
TOLERANCE = 1e-10

SHIFTS = dict(group="translation", padding_mode="circular")
TURNS = dict(group="rotation", group_size=4)
# Every exact group: the backbone, its arguments, and the group that moves its features.
EXACT = (
    (MNISTBackbone, SHIFTS, Translation(5, 3, 4, circular=True)),
    (MNISTBackbone, TURNS, Rotation(4)),
    (MNISTBackbone, TURNS | dict(extent=1), Rotation(4)),
    (MNISTBackbone, TURNS | dict(extent=3), Rotation(4, 2)),
    (MNISTBackbone, TURNS | dict(padding_mode="circular"), Rotation(4, 4)),
    (ResidualBackbone, SHIFTS, Translation(5, 3, 4, circular=True)),
    (ResidualBackbone, TURNS, Rotation(4)),
    (ResidualBackbone, TURNS | dict(extent=1), Rotation(4)),
)
exact = pytest.mark.parametrize("backbone, options, group", EXACT)


@pytest.fixture
def float64():
    """All that a test makes is float64 and comes from seed 0."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomise(f):
    """Give biases and batch norm's scales random values too, so that nothing holds only because
    they are 0 or 1."""
    for parameter in f.parameters():
        if parameter.ndim <= 1:
            nn.init.normal_(parameter, mean=0.3, std=0.5)
    return f.train()


def make(backbone, options):
    widths = WIDTHS
    if backbone is ResidualBackbone:
        widths = (2, *WIDTHS)
    return randomise(backbone(widths=widths, in_channels=1, kernel_size=5, **options))


def images():
    return torch.randn(BATCH, 1, SIDE, SIDE)


def draw_pairs(group):
    pairs = allowed_pairs(group)
    pairs = pairs[torch.randint(len(pairs), (BATCH,))]
    return group.elements[pairs].unbind(1)


def head_for(group, f, grid=0):
    """A small h for the views of f."""
    width = readout(group.base(f(images())), grid).shape[1]
    return ProjectionHead(width, 16, 8, grid)


def assert_same_loss_and_gradients(f, h, I, group, x, g1, g2):
    """L_A = L_H, and for every parameter of f and h the same gradient."""
    parameters = [*f.parameters(), *h.parameters()]
    loss_a = a_ssl_loss(f, h, I, group, x, g1, g2)
    loss_h = h_ssl_loss(f, h, I, group, x, g1, g2)
    assert abs(loss_a - loss_h) < TOLERANCE * abs(loss_a)
    gradients_a = torch.autograd.grad(loss_a, parameters)
    gradients_h = torch.autograd.grad(loss_h, parameters)
    whole = torch.cat([gradient.flatten() for gradient in gradients_a]).norm()
    assert whole > 0
    for a, b in zip(gradients_a, gradients_h):
        assert (a - b).norm() < TOLERANCE * whole


# ------------------------------------------------------------------------------------- exact groups

@exact
def test_equivariance_for_every_element(backbone, options, group):
    """f(T_g x) = Γ_g f(x), Eq. (1)."""
    errors = equivariance_error(make(backbone, options), group, images())
    assert len(errors) == len(group.elements)
    assert errors.max() < TOLERANCE, errors


def cosines(h1, h2):
    """Another objective: that of SimSiam, without its predictor."""
    return -nn.functional.cosine_similarity(h1, h2.detach()).mean()


@exact
@pytest.mark.parametrize("I", (nt_xent, cosines))
def test_losses_and_gradients_are_equal(backbone, options, group, I):
    """L_A = L_H with equal gradients, for every relative element g1⁻¹ g2, and for different ones
    within a batch. The head of the second objective reads means, and has batch norm."""
    f = make(backbone, options)
    h = head_for(group, f)
    if I is cosines:
        h = nn.Sequential(head_for(group, f, grid=2), nn.BatchNorm1d(8))
    x = images()
    identity = torch.zeros_like(group.elements[0])
    for element in group.elements:
        if element.any():
            g1 = identity.expand(BATCH, *identity.shape)
            g2 = element.expand(BATCH, *identity.shape)
            assert_same_loss_and_gradients(f, h, I, group, x, g1, g2)
    g1, g2 = draw_pairs(group)
    assert_same_loss_and_gradients(f, h, I, group, x, g1, g2)


# ---------------------------------------------------------------------- what has no structure fails

def ordinary(group_size, kernel_size=5):
    """An ordinary convolution network with the backbone's activations, its channels merely called
    (C, G)."""
    def convolution(channels, out_channels):
        return nn.Conv2d(
            channels, out_channels, kernel_size, padding="same", padding_mode="circular")

    one, two, three = [width * group_size for width in WIDTHS]
    return nn.Sequential(
        convolution(1, one), nn.MaxPool2d(2), nn.ReLU(), nn.BatchNorm2d(one),
        convolution(one, two), nn.MaxPool2d(2), nn.ReLU(), nn.BatchNorm2d(two),
        convolution(two, three), nn.ReLU(), nn.BatchNorm2d(three),
        nn.Unflatten(1, (WIDTHS[2], group_size)),
    )


def untied(group_size):
    widths = [group_size * width for width in WIDTHS]
    return Untied(MNISTBackbone(widths=widths, kernel_size=5), group_size)


def dense(group_size):
    return DenseBackbone(SIDE, WIDTHS)


@pytest.mark.parametrize("make_network, group, group_size", (
    (ordinary, Rotation(4), 4),
    (untied, Rotation(4), 4),
    (untied, Scale(3, 1.41), 3),
    (dense, Translation(5, 3, 4, circular=True), 1),
))
def test_without_structure_it_fails(make_network, group, group_size):
    """The features have the lifted network's shape, but for no g but the identity does Eq. (1)
    hold, and L_A is not L_H."""
    f = make_network(group_size)
    randomise(f)
    x = images()
    assert f(x).shape == (BATCH, WIDTHS[2], group_size, 5, 5)
    others = [g for g in group.elements if g.any()]
    errors = equivariance_error(f, group, x, others)
    assert errors.min() > 0.5, errors
    h = head_for(group, f)
    g1, g2 = draw_pairs(group)
    loss_a = a_ssl_loss(f, h, nt_xent, group, x, g1, g2)
    loss_h = h_ssl_loss(f, h, nt_xent, group, x, g1, g2)
    assert abs(loss_a - loss_h) > 1e-3 * loss_a


def test_the_order_of_an_encoder_s_channels():
    """Eq. (1) shows which axis comes first in the maps of somebody else's C4 network."""
    group = Rotation(4)
    filters = torch.randn(5, 1, 3, 3)
    turned = torch.cat([filters.rot90(k, (2, 3)) for k in range(4)])

    def maps(x):    # (B, G·C, H, W)
        return nn.functional.conv2d(x, turned, padding=1).relu()

    def right(x):
        return maps(x).unflatten(1, (4, -1)).transpose(1, 2)

    def wrong(x):
        return maps(x).unflatten(1, (-1, 4))

    x = images()
    assert equivariance_error(right, group, x).max() < 1e-6
    assert equivariance_error(wrong, group, x, group.elements[1:]).min() > 0.5


@pytest.mark.parametrize("on_base", (False, True))
def test_equivariance_error_by_hand(on_base):
    """For one g at a time: the norm of f(T_g x) - Γ_g f(x) over that of Γ_g f(x)."""
    group = Rotation(4, 2)
    f = ordinary(4).eval()
    x = images()
    g = torch.tensor([3, 1])
    for k, error in zip(g, equivariance_error(f, group, x, g, on_base)):
        left = f(x.rot90(k, (2, 3)))
        right = f(x).roll(k.item(), 2).rot90(k, (3, 4))
        if on_base:
            left = left[:, :, :2]
            right = right[:, :, :2]
        torch.testing.assert_close(error, (left - right).norm() / right.norm())


# ------------------------------------------------------------------------------- approximate groups

def band_limited(side, batch=2, waves=12):
    """Smooth images that vanish at the border: the same sums of plane waves at every side."""
    generator = torch.Generator().manual_seed(1)
    r = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(r, r, indexing="ij")
    k = torch.randn(batch, waves, 2, 1, 1, generator=generator)
    phase = torch.randn(batch, waves, 1, 1, 1, generator=generator)
    height = torch.randn(batch, waves, 1, 1, 1, generator=generator)
    angle = 3 * (k[:, :, :1] * x + k[:, :, 1:] * y) + 3 * phase
    image = (height * torch.cos(angle)).sum(1)
    return image * torch.exp(-(x**2 + y**2) / (2 * 0.2**2))    # (batch, 1, side, side)


def mean_error(make_network, group, elements, side):
    """Relative error of Eq. (1) on the base space, mean over elements and three random networks.

    Batch norm takes its statistics from the images once: an enlarged image fills more of the map,
    so its own differ.
    """
    x = band_limited(side)
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        f = make_network().train()
        for module in f.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None    # all of the statistics, not a tenth
        f(x)
        errors.append(equivariance_error(f.eval(), group, x, elements, on_base=True))
    return torch.cat(errors).mean().item()


@pytest.mark.parametrize("name, group, elements", (
    ("rotation", Rotation(8), [1, 3, 5, 7]),    # odd multiples of 45 degrees
    ("scale", Scale(3, 1.41), [-1, 1]),
))
def test_approximate_groups(name, group, elements):
    """The error is below half of an ordinary network's at 56 pixels, and shrinks each time the
    resolution doubles.

    Circular padding meets the empty background without an edge, so that only sampling is measured.
    """
    elements = torch.tensor(elements)
    size = len(group.elements)

    def steerable():
        return MNISTBackbone(name, size, WIDTHS, padding_mode="circular")

    def without_structure():
        return ordinary(size, kernel_size=7)

    coarse, middle, fine = [mean_error(steerable, group, elements, side) for side in (28, 56, 112)]
    other = mean_error(without_structure, group, elements, 56)
    assert middle < 0.5 * other
    assert middle < 0.9 * coarse
    assert fine < 0.9 * middle
