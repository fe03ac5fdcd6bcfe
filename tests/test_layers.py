"""Layers against the same sums written as loops, SESN's own numbers, and what they refuse."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hssl import Rotation, equivariance_error
from layers import (DenseBackbone, GroupConv2d, LiftingConv2d, MNISTBackbone, PerElement,
                    ResidualBackbone, Untied, make_encoder, steerable_basis)

pytestmark = pytest.mark.usefixtures("float64")


# --------------------------------------------------------------------------------------- the basis

# What SESN's own code gives, to seven digits. Each function is symmetric or antisymmetric, so its
# upper left quarter, the middle row and column being the last, says all.
SESN_SCALES = {
    (2, 1): [
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, -0.0880698, 0], [0, 0, 0.6960514, 0]],
        [[0, 0, 0, 0], [0, -0.1139608, -0.1446295, 0], [0, 0.0738825, 0.0937654, 0],
         [0, 0.265902, 0.3374606, 0]],
        [[-0.0536565, -0.0781013, -0.0623885, 0], [-0.0161317, -0.023481, -0.018757, 0],
         [0.0710632, 0.1034382, 0.082628, 0], [0.1208096, 0.1758481, 0.1404702, 0]],
    ],
}
SESN_ONE_SCALE = {
    (2, 1): [
        [[-0.0005055, -0.0073805, -0.0235128, 0], [-0.004312, -0.0629516, -0.2005515, 0],
         [-0.0016364, -0.0238901, -0.0761093, 0], [0.0129333, 0.1888136, 0.6015232, 0]],
    ],
    (2, 2): [
        [[0.0012152, 0.0103646, 0.0039334, -0.0310871],
         [0.0103646, 0.0884048, 0.0335496, -0.2651565],
         [0.0039334, 0.0335496, 0.0127321, -0.1006269],
         [-0.0310871, -0.2651565, -0.1006269, 0.7952959]],
    ],
}


def unfold_quarter(quarter, rows, columns):
    """The whole of a function (G, 7, 7) from its quarter (G, 4, 4) and its orders along the rows
    and columns: odd ones change sign."""
    half = torch.cat([quarter, (-1)**columns * quarter[..., :3].flip(-1)], -1)
    return torch.cat([half, (-1)**rows * half[:, :3].flip(1)], 1)


@pytest.mark.parametrize("group, group_size, expected", (
    ("scale", 3, SESN_SCALES), ("translation", 1, SESN_ONE_SCALE)))
def test_the_basis_is_sesn_s(group, group_size, expected):
    """To 1e-6, though the functions may come in another order."""
    basis = steerable_basis(group, group_size, kernel_size=7)
    assert basis.shape == (9, group_size, 7, 7) and basis.dtype == torch.float64
    for (rows, columns), quarter in expected.items():
        function = unfold_quarter(torch.tensor(quarter), rows, columns)
        distance = (basis - function).abs().amax((1, 2, 3))
        assert distance.min() < 1e-6, (rows, columns)


@pytest.mark.parametrize("group, effective_size, count", (
    ("translation", None, 9), ("translation", 2, 4), ("scale", None, 9), ("rotation", None, 15),
    ("rotation", 3, 6)))
def test_number_of_functions(group, effective_size, count):
    """n, m < 3; for rotation n + m < 5."""
    size = dict(translation=1, rotation=8, scale=2)[group]
    basis = steerable_basis(group, size, 7, effective_size)
    assert basis.shape == (count, size, 7, 7)
    norms = basis[:, 0].square().sum((1, 2))
    torch.testing.assert_close(norms, torch.ones(count))
    default = dict(translation=3, rotation=5, scale=3)[group]
    if effective_size is None:
        assert torch.equal(basis, steerable_basis(group, size, 7, default))


def test_quarter_turns_of_the_basis_are_exact():
    """The functions at 90 degrees are those at 0, turned, to the last bit."""
    basis = steerable_basis("rotation", 4, 7)
    for i in range(3):
        assert torch.equal(basis[:, i + 1], basis[:, i].rot90(1, (1, 2)))


def test_the_basis_turns_within_its_own_span():
    """The functions at 45 degrees are combinations of those at 0; the square of orders is not
    closed."""
    basis = steerable_basis("rotation", 8, 21, sigma=2.0).flatten(2)    # fine enough to be exact
    at_zero = basis[:, 0].T    # (k·k, K)
    turned = basis[:, 1].T
    combination = torch.linalg.lstsq(at_zero, turned).solution
    assert (at_zero @ combination - turned).norm() < 1e-10 * turned.norm()


@pytest.mark.parametrize("arguments, message", (
    (("shear", 1, 5), "translation, rotation or scale"), (("translation", 2, 5), "translation 1"),
    (("rotation", 0, 5), "at least 1"), (("rotation", 4, 4), "odd"), (("rotation", 4, -1), "odd"),
    (("rotation", 4, 5, 0), "effective_size is 0"), (("rotation", 4, 5, None, 0.0), "sigma is 0"),
    (("rotation", 4, 5, None, math.inf), "sigma is inf"),
    (("rotation", 4, 5, None, math.nan), "sigma is nan"),
    (("scale", 3, 7, None, 0.9, 1.0), "scale_step 1"),
    (("scale", 3, 7, None, 0.9, math.inf), "scale_step inf"), (("scale", 3, 3), "vanishes"),
    (("rotation", 4, 1), "vanishes"), (("rotation", 4, 7, None, 1e-300), "vanishes"),
    (("rotation", 4, 7, None, 1e100), "vanishes"),
))
def test_what_makes_no_basis(arguments, message):
    with pytest.raises(ValueError, match=message):
        steerable_basis(*arguments)


# --------------------------------------------------------------------------------- the two layers

def by_loops(layer, x, cyclic):
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


@pytest.mark.parametrize("group, group_size, extent", (
    ("rotation", 4, 1), ("rotation", 4, 3), ("rotation", 4, 4), ("scale", 3, 1), ("scale", 3, 2),
    ("scale", 3, 3), ("translation", 1, 1)))
def test_group_convolution(group, group_size, extent):
    """Against the loops, on maps that are not square."""
    cyclic = group == "rotation"
    layer = GroupConv2d(2, 3, steerable_basis(group, group_size, 5, 2), extent, cyclic)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 2, group_size, 8, 6)
    torch.testing.assert_close(layer(x), by_loops(layer, x, cyclic), rtol=1e-12, atol=1e-12)


def test_circular_padding():
    """The same as on a map that goes on, on each side, as it began."""
    basis = steerable_basis("scale", 3, 7)
    layer = GroupConv2d(2, 3, basis, extent=2, padding_mode="circular")
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 2, 3, 8, 6)
    around = by_loops(layer, x.repeat(1, 1, 1, 3, 3), False)
    torch.testing.assert_close(layer(x), around[..., 8:16, 6:12], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", (True, False))
def test_lifting_convolution(bias):
    """Lifting is the group layer on an image that is the same at every element."""
    layer = LiftingConv2d(2, 3, steerable_basis("rotation", 4, 5), bias=bias)
    x = torch.randn(2, 2, 8, 8)
    group_layer = GroupConv2d(2, 3, layer.basis)
    group_layer.weight = layer.weight
    if bias:
        nn.init.normal_(layer.bias)
        group_layer.bias = layer.bias
    expected = by_loops(group_layer, x[:, :, None].expand(-1, -1, 4, -1, -1), False)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_batch_norm_statistics_are_per_channel():
    """PerElement(BatchNorm2d) normalises each channel over (B, G, H, W)."""
    x = torch.randn(3, 2, 4, 5, 5) * 3 + 1
    y = PerElement(nn.BatchNorm2d(2))(x)
    mean = x.mean((0, 2, 3, 4), keepdim=True)
    variance = x.var((0, 2, 3, 4), keepdim=True, correction=0)
    torch.testing.assert_close(y, (x - mean) / (variance + 1e-5).sqrt())


def test_pooling_before_relu_is_sesn_s_order():
    """The same outputs and gradients as with ReLU first, bit for bit."""
    x = torch.randn(4, 3, 2, 8, 8, requires_grad=True)
    torch.manual_seed(1)
    ours = PerElement(nn.MaxPool2d(2), nn.ReLU(), nn.BatchNorm2d(3))
    sesn = PerElement(nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(3))
    y = ours(x)
    expected = sesn(x)
    assert (expected == expected.amin()).sum() > 1    # some windows have no positive value
    assert torch.equal(y, expected)
    weight = torch.randn_like(y)
    gradient, = torch.autograd.grad((y * weight).sum(), x)
    expected, = torch.autograd.grad((expected * weight).sum(), x)
    assert torch.equal(gradient, expected)
    stages = [module for module in MNISTBackbone() if isinstance(module, PerElement)]
    for stage in stages[:2]:
        assert [type(module) for module in stage] == [nn.MaxPool2d, nn.ReLU, nn.BatchNorm2d]


# ---------------------------------------------------------------------------------- the backbones

@pytest.mark.parametrize("group, group_size, extent", (
    ("translation", 1, 1), ("rotation", 4, 4), ("scale", 3, 1)))
def test_backbone_shape_and_layout(group, group_size, extent):
    """(B, 1, 28, 28) -> (B, C, G, 7, 7), with G before C in memory, so that folding it copies
    nothing."""
    for backbone, widths in ((MNISTBackbone, (2, 3, 5)), (ResidualBackbone, (2, 3, 4, 5))):
        f = backbone(group, group_size, widths, in_channels=1)
        z = f(torch.randn(2, 1, 28, 28))
        assert z.shape == (2, 5, group_size, 7, 7)
        assert z.transpose(1, 2).flatten(1, 2).data_ptr() == z.data_ptr()
        extents = {m.extent for m in f.modules() if isinstance(m, GroupConv2d)}
        assert extents == {extent} and f.stride == 4


def sesn(f, x, stride):
    """SESN's wide residual network up to its maximum over scales, one scale at a time, with 3-D
    batch norm and the weights of f. If stride, blocks halve the map by a stride, as in SESN, else
    by means."""
    def convolution(layer, x, step=1):
        outputs = []
        for s in range(layer.group_size):
            kernel = torch.einsum("oiek,khw->oihw", layer.weight, layer.basis[:, s])
            scale = x if x.ndim == 4 else x[:, :, s]
            outputs.append(F.conv2d(scale, kernel, stride=step, padding=layer.padding))
        return torch.stack(outputs, 2)

    def norm_relu(norm, x):    # (B, C, S, H, W)
        return F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True))

    x = convolution(f[0], x)
    for block in list(f)[1:-1]:
        y = norm_relu(block.activate[0], x)
        step = 1
        if len(block.activate) == 3 and stride:
            step = 2
        elif len(block.activate) == 3:
            y = F.avg_pool3d(y, (1, 2, 2))
        if block.shortcut is not None:
            weight = block.shortcut[0].weight[:, :, None]
            x = F.conv3d(y, weight, stride=(1, step, step))
        y = convolution(block.first, y, step)
        x = x + convolution(block.second, norm_relu(block.between[0], y))
    return norm_relu(f[-1][0], x)


def test_the_residual_network_is_sesn_s_but_for_the_strides():
    """Same weights, same outputs as SESN's with means in place of its strides."""
    f = ResidualBackbone("scale", 3, (2, 3, 4, 5)).train()
    for parameter in f.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(f(x), sesn(f, x, stride=False), rtol=1e-10, atol=1e-12)


def test_strides_would_break_quarter_turns():
    """At 32 pixels, where the network itself is exact."""
    def strided(x):
        return sesn(f, x, stride=True)

    f = ResidualBackbone("rotation", 4, (2, 3, 4, 5), extent=1).train()
    x = torch.randn(2, 3, 32, 32)
    group = Rotation(4)
    assert equivariance_error(f, group, x).max() < 1e-10
    assert equivariance_error(strided, group, x, group.elements[1:]).min() > 0.1


def test_number_of_parameters_is_sesn_s():
    """For scale: 9 numbers per filter, two per batch norm channel, 1x1 shortcuts."""
    widths = (16, 128, 256, 512)
    count = 9 * 3 * 16
    for a, b in zip(widths, widths[1:]):
        # Two blocks: four convolutions, a shortcut, four norms.
        count += 9 * (a * b + 3 * b * b) + a * b + 2 * (a + 3 * b)
    count += 2 * 512
    f = ResidualBackbone("scale", 3)
    assert sum(p.numel() for p in f.parameters()) == count == 10_956_240


def test_untied_names_the_channels_of_an_ordinary_network():
    """Channel c·G + g is channel c at g."""
    network = MNISTBackbone(widths=(8, 12, 20))
    f = Untied(network, 4).eval()
    x = torch.randn(2, 1, 28, 28)
    z = f(x)
    assert z.shape == (2, 5, 4, 7, 7) and f.stride == 4
    assert torch.equal(z[:, 3, 2], network(x)[:, 3 * 4 + 2, 0])


def test_dense_backbone_shares_nothing():
    """As many outputs a stage as the convolution, and a weight for each pair."""
    f = DenseBackbone(8, (2, 3, 5)).eval()
    assert f(torch.randn(2, 1, 8, 8)).shape == (2, 5, 1, 2, 2)
    sizes = [tuple(m.weight.shape) for m in f if isinstance(m, nn.Linear)]
    assert sizes == [(2 * 4 * 4, 8 * 8), (3 * 2 * 2, 2 * 4 * 4), (5 * 2 * 2, 3 * 2 * 2)]


@pytest.mark.parametrize("backbone, group, structure, kind", (
    ("mnist", "rotation", "group", MNISTBackbone), ("residual", "scale", "group", ResidualBackbone),
    ("mnist", "scale", "none", Untied), ("residual", "rotation", "none", Untied),
    ("mnist", "translation", "none", DenseBackbone)))
def test_make_encoder(backbone, group, structure, kind):
    """The activations are the same with and without structure."""
    group_size = dict(translation=1, rotation=4, scale=3)[group]
    widths = [2, 3, 4, 5][-3 - (backbone == "residual"):]
    f = make_encoder(backbone, group, group_size, widths, (3, 16), structure=structure)
    assert type(f) is kind
    assert f(torch.randn(2, 3, 16, 16)).shape == (2, 5, group_size, 4, 4)


def test_make_encoder_hands_all_its_arguments_on():
    options = dict(kernel_size=5, scale_step=1.3, extent=2)
    f = make_encoder("mnist", "scale", 2, (2, 3, 4), (1, 28), padding="circular", **options)
    expected = MNISTBackbone("scale", 2, (2, 3, 4), 1, padding_mode="circular", **options)
    expected.load_state_dict(f.state_dict())
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(f(x), expected(x))


BASIS = steerable_basis("rotation", 4, 5)


@pytest.mark.parametrize("make, arguments, message", (
    (GroupConv2d, (1, 1, BASIS, 5), "1 to 4"), (GroupConv2d, (1, 1, BASIS, 0), "1 to 4"),
    (LiftingConv2d, (1, 1, BASIS, "mirror"), "zeros or circular"),
    (LiftingConv2d, (0, 1, BASIS), "needs channels"),
    (GroupConv2d, (1, 0, BASIS), "needs channels"),
    (MNISTBackbone, ("translation", 1, (1, 2)), "3 numbers of channels"),
    (ResidualBackbone, ("rotation", 4, (1, 2, 3)), "4 numbers of channels"),
    (ResidualBackbone, ("rotation", 4, (1, 2, 3, 4), 0), "needs channels"),
    (MNISTBackbone, ("rotation", 4, (1, 2, 3), 0), "needs channels"),
    (MNISTBackbone, ("rotation", 4, (0, 2, 3)), "needs channels"),
    (DenseBackbone, (28, (1, 2)), "3 numbers of channels"),
    (make_encoder, ("mnist", "rotation", 4, (1, 2, 3), (1, 28), 29), "not below the kernel"),
    (make_encoder, ("mnist", "rotation", 4, (1, 2, 3), (1, 30)), "multiple of 4"),
    (make_encoder, ("mnist", "mirror", 4, (1, 2, 3), (1, 28)), "translation, rotation or scale"),
    (make_encoder, ("mnist", "rotation", 4, (1, 2, 3), (0, 28)), "needs channels"),
    (make_encoder, ("mnist", "scale", 3, (1, 2, 3), (1, 28), 7, "group", math.inf),
     "scale_step inf"),
    (make_encoder, ("residual", "translation", 1, (1, 2, 3, 4), (1, 28), 7, "none"), "too large"),
))
def test_what_is_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments)


@pytest.mark.parametrize("shape, padding, message", (
    ((1, 1, 30, 28), "zeros", "divisible by 4"), ((1, 1, 28, 30), "zeros", "divisible by 4"),
    ((1, 1, 8, 8), "circular", "smaller kernel")))
def test_images_that_do_not_fit(shape, padding, message):
    f = MNISTBackbone(widths=(1, 1, 1), padding_mode=padding)
    with pytest.raises(ValueError, match=message):
        f(torch.zeros(shape))
