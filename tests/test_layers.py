"""Layers against the same sums written as loops, SESN's own numbers, and what they refuse."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import probe
from layers import (DenseBackbone, GroupConv2d, LiftingConv2d, MNISTBackbone,
                    ResidualBackbone, steerable_basis)

pytestmark = pytest.mark.usefixtures("float64")
WIDTHS = {MNISTBackbone: (3, 4, 5), ResidualBackbone: (2, 3, 4, 5)}

# What SESN's own code gives for the function of orders (2, 1), to seven digits, at three scales. It
# is symmetric along the rows and antisymmetric along the columns, so its upper left quarter, the
# middle row and column being the last, says all.
SESN = [
    [[0, 0, 0, 0],
     [0, 0, 0, 0],
     [0, 0, -0.0880698, 0],
     [0, 0, 0.6960514, 0]],
    [[0, 0, 0, 0],
     [0, -0.1139608, -0.1446295, 0],
     [0, 0.0738825, 0.0937654, 0],
     [0, 0.265902, 0.3374606, 0]],
    [[-0.0536565, -0.0781013, -0.0623885, 0],
     [-0.0161317, -0.023481, -0.018757, 0],
     [0.0710632, 0.1034382, 0.082628, 0],
     [0.1208096, 0.1758481, 0.1404702, 0]],
]


def test_the_basis_is_sesn_s():
    """To 1e-6, though the functions may come in another order."""
    quarter = torch.tensor(SESN)
    half = torch.cat([quarter, -quarter[..., :3].flip(2)], 2)
    function = torch.cat([half, half[:, :3].flip(1)], 1)    # (G, 7, 7)
    basis = steerable_basis("scale", 3, kernel_size=7)
    assert basis.shape == (9, 3, 7, 7)
    distance = (basis - function).abs().amax((1, 2, 3))
    assert distance.min() < 1e-6


def test_the_basis_is_closed_under_turns():
    """The functions at 45 degrees, n + m < 5, are combinations of those at 0, which have norm 1."""
    basis = steerable_basis("rotation", 8, 21, sigma=2.0).flatten(2)    # fine enough to be exact
    assert len(basis) == 15
    torch.testing.assert_close(basis[:, 0].norm(dim=1), torch.ones(15))
    at_zero = basis[:, 0].T    # (k·k, K)
    turned = basis[:, 1].T
    combination = torch.linalg.lstsq(at_zero, turned).solution
    assert (at_zero @ combination - turned).norm() < 1e-10 * turned.norm()


def by_loops(layer, x, cyclic=False):
    """y(g) = bias + Σ_e conv2d( x(g + e), Σ_k weight[:, :, e, k] basis[k, g] ), one at a time."""
    functions, group_size, side = layer.basis.shape[:3]
    outputs = []
    for g in range(group_size):
        y = layer.bias[None, :, None, None]
        for e in range(layer.extent):
            if g + e < group_size or cyclic:
                kernel = 0
                for k in range(functions):
                    kernel = kernel + layer.weight[:, :, e, k, None, None] * layer.basis[k, g]
                neighbour = x[:, :, (g + e) % group_size]
                y = y + F.conv2d(neighbour, kernel, padding=side // 2)
        outputs.append(y)
    return torch.stack(outputs, 2)


@pytest.mark.parametrize("group, group_size, extent, padding", (
    ("rotation", 4, 3, "zeros"),
    ("scale", 3, 2, "zeros"),
    ("scale", 3, 2, "circular"),
))
def test_group_convolution(group, group_size, extent, padding):
    """On maps that are not square; circular ones go on, on each side, as they began."""
    cyclic = group == "rotation"
    basis = steerable_basis(group, group_size, 7)
    layer = GroupConv2d(2, 3, basis, extent, cyclic, padding)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 2, group_size, 8, 6)
    if padding == "zeros":
        expected = by_loops(layer, x, cyclic)
    else:
        around = x.repeat(1, 1, 1, 3, 3)
        expected = by_loops(layer, around, cyclic)[..., 8:16, 6:12]
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def convolution(layer, x):
    """A layer of extent 1, one scale at a time."""
    outputs = []
    for s in range(layer.group_size):
        kernel = torch.einsum("oiek,khw->oihw", layer.weight, layer.basis[:, s])
        maps = x if x.ndim == 4 else x[:, :, s]
        outputs.append(F.conv2d(maps, kernel, layer.bias, padding="same"))
    return torch.stack(outputs, 2)


def norm(layer, x):    # (B, C, S, H, W)
    return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)


def sesn_mnist(layers, x):
    """SESN's MNIST network, without the third pooling, with these weights."""
    first, _, norm1, second, _, norm2, third, norm3 = layers
    x = F.max_pool3d(convolution(first, x).relu(), (1, 2, 2))
    x = convolution(second, norm(norm1[1], x))
    x = F.max_pool3d(x.relu(), (1, 2, 2))
    x = convolution(third, norm(norm2[1], x))
    return norm(norm3[1], x.relu())


def sesn_residual(layers, x):
    """SESN's wide residual network up to its maximum over scales, with these weights and
    2x2 means where it strides."""
    x = convolution(layers[0], x)
    for block in layers[1:-1]:
        y = norm(block.activate[0][0], x).relu()
        if len(block.activate) == 2:
            y = F.avg_pool3d(y, (1, 2, 2))
        if block.shortcut is not None:
            x = F.conv3d(y, block.shortcut[0].weight[:, :, None])
        y = norm(block.between[0], convolution(block.first, y)).relu()
        x = x + convolution(block.second, y)
    return norm(layers[-1][0], x).relu()


@pytest.mark.parametrize("backbone, sesn", (
    (MNISTBackbone, sesn_mnist),
    (ResidualBackbone, sesn_residual),
))
def test_the_networks_are_sesn_s(backbone, sesn):
    """Same weights, same outputs as SESN's, whose ReLU comes before the pooling."""
    f = backbone("scale", 3, WIDTHS[backbone], 2)
    for parameter in f.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    assert (f.layers[0].bias is None) == (backbone is ResidualBackbone)
    x = torch.randn(2, 2, 32, 32)
    torch.testing.assert_close(f(x), sesn(f.layers, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backbone", WIDTHS)
@pytest.mark.parametrize("group, group_size, options, extent", (
    ("translation", 1, {}, 1),
    ("rotation", 4, {}, 4),
    ("rotation", 4, dict(extent=1), 1),
    ("scale", 3, {}, 1),
))
def test_features_and_their_order_in_memory(backbone, group, group_size, options, extent):
    """Channels come last for translation. Unless told otherwise, filters span all orientations, or
    one scale."""
    f = backbone(group, group_size, WIDTHS[backbone], 3, **options)
    assert {m.extent for m in f.modules() if isinstance(m, GroupConv2d)} == {extent}
    z = f(torch.randn(2, 3, 16, 16))
    assert z.shape == (2, 5, group_size, 4, 4)
    if group_size == 1:
        assert z.permute(0, 3, 4, 2, 1).is_contiguous()


def test_layers_and_vmap():
    f = MNISTBackbone("rotation", 4, (3, 4, 5)).eval()
    x = torch.randn(3, 2, 1, 16, 16)
    assert f.layers[:4](x[0]).shape == (2, 4, 4, 8, 8)
    torch.testing.assert_close(torch.vmap(f)(x), torch.stack([f(images) for images in x]))


def test_weights_bring_their_basis_along():
    """Into another scale step the same features; into another group they do not fit."""
    trained = MNISTBackbone("scale", 3, (3, 4, 5), scale_step=1.2)
    other = MNISTBackbone("scale", 3, (3, 4, 5))    # whose narrowest filters are narrower
    x = torch.randn(2, 1, 16, 16)
    expected = trained(x)
    assert not torch.allclose(other(x), expected)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other(x), expected)
    with pytest.raises(RuntimeError, match="basis"):
        MNISTBackbone("translation", 1, (3, 4, 5)).load_state_dict(trained.state_dict())


@pytest.mark.parametrize("backbone", WIDTHS)
def test_make_encoder_hands_all_its_settings_on(backbone):
    widths = WIDTHS[backbone]
    settings = dict(group="scale", group_size=3, widths=widths, image_shape=[2, 28], kernel_size=7,
                    structure="group", scale_step=1.3, extent=2, padding="circular")
    f = probe.make_encoder(settings)
    expected = backbone("scale", 3, widths, 2, 7, 1.3, 2, "circular")
    expected.load_state_dict(f.state_dict())
    x = torch.randn(2, 2, 28, 28)
    assert torch.equal(f(x), expected(x))
    assert torch.equal(f.layers[0].basis, steerable_basis("scale", 3, 7, scale_step=1.3))


BASIS = steerable_basis("rotation", 4, 5)


@pytest.mark.parametrize("call, arguments, message", (
    (steerable_basis, ("shear", 1, 5), "translation, rotation or scale"),
    (steerable_basis, ("translation", 2, 5), "translation 1"),
    (steerable_basis, ("rotation", 0, 5), "at least 1"),
    (steerable_basis, ("rotation", 4, 4), "odd"),
    (steerable_basis, ("rotation", 4, 7, None, 1e-300), "vanishes"),
    (steerable_basis, ("scale", 3, 7, None, 0.9, math.inf), "got inf"),
    (GroupConv2d, (1, 1, BASIS, 5), "1 to 4"),
    (LiftingConv2d, (1, 1, BASIS, "mirror"), "zeros or circular"),
    (MNISTBackbone, ("rotation", 4, (0, 2, 3)), "needs channels"),
    (MNISTBackbone(), (torch.zeros(1, 1, 30, 28),), "divisible by 4"),
    (DenseBackbone(28), (torch.zeros(1, 28, 28),), "images must be"),
    (MNISTBackbone(padding_mode="circular"), (torch.zeros(1, 1, 8, 8),), "smaller kernel"),
    (LiftingConv2d(3, 4, BASIS), (torch.zeros(3, 28, 28),), "images must be"),
    (GroupConv2d(6, 1, BASIS), (torch.zeros(2, 4, 6, 8, 8),), "features must be"),
))
def test_arguments_that_do_not_fit(call, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(*arguments)


def test_residual_weights_are_drawn_by_their_fan_out():
    """He initialisation, as in SESN: output channels times weights per pair of channels."""
    backbone = ResidualBackbone(widths=(16, 32, 64, 64))
    weights = [weight for weight in backbone.parameters() if weight.ndim == 4]
    assert len(weights) == 1 + 6 * 2 + 3
    for weight in weights:
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.2)
    # A layer's own are uniform, as in SESN, up to one over the root of the fan-in.
    largest = LiftingConv2d(20, 50, BASIS).weight.abs().max().item()
    assert largest == pytest.approx((20 * len(BASIS)) ** -0.5, rel=0.01)
