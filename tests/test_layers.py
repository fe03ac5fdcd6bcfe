"""Layers against the same sums written as loops, and the sizes that they refuse."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hssl import Crops, Product, Rotation, Scale, Translation, allowed_pairs, allowed_sets, crop, h_ssl_loss, readout
from layers import DenseBackbone, GroupConv2d, LiftingConv2d, MNISTBackbone, PerElement, ResidualBackbone, steerable_basis, steerable_taps

from losses import nt_xent

pytestmark = pytest.mark.usefixtures("float64")


def by_loops(layer, x, cyclic):
    """y(g) = bias + Σ_e conv2d( x(g + e), Σ_k weight[:, :, e, k] basis[k, g] ), one element and offset at a time."""
    elements, side = layer.basis.shape[1], layer.basis.shape[2]
    outputs = []
    for g in range(elements):
        y = layer.bias[None, :, None, None]
        for e in range(layer.extent):
            if g + e < elements or cyclic:
                kernel = sum(layer.weight[:, :, e, k, None, None] * layer.basis[k, g] for k in range(layer.basis.shape[0]))
                y = y + F.conv2d(x[:, :, (g + e) % elements], kernel, padding=side // 2)
        outputs.append(y)
    return torch.stack(outputs, 2)


@pytest.mark.parametrize("group, elements, extent", [("rotation", 4, e) for e in (1, 2, 3, 4)] + [("scale", 3, e) for e in (1, 2, 3)]
                         + [("translation", 1, 1)])
def test_group_convolution(group, elements, extent):
    layer = GroupConv2d(2, 3, steerable_basis(group, elements, 5, 2, 0.9), extent, cyclic=group == "rotation")
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 2, elements, 8, 8)
    torch.testing.assert_close(layer(x), by_loops(layer, x, group == "rotation"), rtol=1e-12, atol=1e-12)


def test_lifting_convolution():
    """Lifting is the group layer on an image that is the same at every element."""
    basis = steerable_basis("scale", 3, 7, 3, 0.9)
    layer = LiftingConv2d(2, 3, basis)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(layer(x), by_loops(layer, x[:, :, None].expand(-1, -1, 3, -1, -1), False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", ("zeros", "circular"))
@pytest.mark.parametrize("group, elements", (("scale", 3), ("translation", 1)))
def test_separable_convolution(group, elements, padding):
    """Line by line or with whole filters: the same outputs and gradients, on maps that are not square."""
    size = dict(elements=elements, kernel_size=7, effective_size=3, sigma=0.9)
    layer, separable = (GroupConv2d(2, 3, steerable_basis(group, **size), padding_mode=padding, taps=taps) for taps in (None, steerable_taps(**size)))
    nn.init.normal_(layer.bias)
    separable.load_state_dict(layer.state_dict())
    x = torch.randn(2, 2, elements, 8, 6, requires_grad=True)
    y, y_separable = layer(x), separable(x)
    direction = torch.randn_like(y)
    torch.testing.assert_close(y_separable, y, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad((out * direction).sum(), (x, *f.parameters())) for out, f in ((y_separable, separable), (y, layer)))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_separable_from():
    """Only layers with so many channels on both sides are separable, and the network computes the same."""
    one, two = (ResidualBackbone("scale", 3, (2, 3, 4, 5), separable_from=n) for n in (0, 4))
    two.load_state_dict(one.state_dict())
    assert [m.taps is not None for m in two.modules() if isinstance(m, GroupConv2d)] == 5 * [False] + 7 * [True]
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(two(x), one(x), rtol=1e-10, atol=1e-10)


def test_batch_norm_statistics_are_per_channel():
    """PerElement(BatchNorm2d) normalises each channel over (B, G, H, W)."""
    x = torch.randn(3, 2, 4, 5, 5) * 3 + 1
    y = PerElement(nn.BatchNorm2d(2))(x)
    mean, var = x.mean((0, 2, 3, 4), keepdim=True), x.var((0, 2, 3, 4), keepdim=True, unbiased=False)
    torch.testing.assert_close(y, (x - mean) / (var + 1e-5).sqrt(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("group, elements", (("translation", 1), ("rotation", 4), ("scale", 3)))
def test_backbone_shape_and_layout(group, elements):
    """(B, 1, 28, 28) -> (B, C, G, 7, 7), with G before C in memory so that folding it never copies."""
    z = MNISTBackbone(group, elements, (2, 3, 5))(torch.randn(2, 1, 28, 28))
    assert z.shape == (2, 5, elements, 7, 7) and z.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("make, message", (
    (lambda: steerable_basis("shear", 1, 5, 2, 1.0), "must be one of"),
    (lambda: steerable_basis("translation", 2, 5, 2, 1.0), "exactly 1"),
    (lambda: steerable_basis("rotation", 4, 4, 2, 1.0), "odd"),
    (lambda: steerable_basis("rotation", 4, 5, 0, 1.0), "effective_size >= 1"),
    (lambda: steerable_basis("scale", 3, 1, 3, 1.0), "vanishes"),
    (lambda: GroupConv2d(1, 1, steerable_basis("rotation", 4, 5, 2, 1.0), extent=5), "1 to 4"),
    (lambda: LiftingConv2d(1, 1, steerable_basis("rotation", 4, 5, 2, 1.0), padding_mode="mirror"), "'circular'"),
    (lambda: GroupConv2d(1, 1, steerable_basis("scale", 3, 5, 2, 1.0), extent=2, taps=steerable_taps(3, 5, 2, 1.0)), "leave taps out"),
    (lambda: GroupConv2d(1, 1, steerable_basis("rotation", 4, 5, 2, 1.0), 1, cyclic=True, taps=steerable_taps(1, 5, 2, 1.0)), "leave taps out"),
    (lambda: MNISTBackbone(widths=(1, 2)), "three positive"),
    (lambda: MNISTBackbone(widths=(1, 1, 1))(torch.zeros(1, 1, 30, 28)), "divisible by 4"),
    (lambda: Translation(7, 8, 4), "1 to 7"), (lambda: Rotation(4, 5), "1 to 4"), (lambda: Scale(3, 1.41, 2, first=2), "from index 2"),
    (lambda: Rotation(4).T(torch.tensor([1]), torch.zeros(1, 1, 4, 5)), "square"),
    (lambda: allowed_pairs(Translation(7, 7, 4)), "two group elements"),
    (lambda: allowed_sets(Rotation(4), 5), "fewer views"),
    (lambda: DenseBackbone(28, (1, 2)), "three positive"),
))
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -------------------------------------------------------------------------------------------------------------- the groups

def test_distances_and_pairs():
    """Pairs are all (g1, g2) with 1 <= distance <= the largest; the rotation and circular axes close."""
    rotation, window, circular, scale = Rotation(8), Translation(7, 4, 4), Translation(7, 4, 4, circular=True), Scale(4, 1.41)
    assert rotation.distance(torch.tensor(1), torch.tensor(7)) == 2 and len(allowed_pairs(rotation, 1)) == 16
    assert len(window.elements) == 16 and len(allowed_pairs(window)) == 16 * 15
    assert circular.distance(torch.tensor([0, 0]), torch.tensor([6, 3])) == 3 and len(allowed_pairs(circular, 1)) == 49 * 8
    assert scale.elements.tolist() == [-2, -1, 0, 1] and len(allowed_pairs(scale, 1)) == 6


@pytest.mark.parametrize("group, views, most", (
    (Rotation(4), 4, None), (Rotation(8), 3, 2), (Translation(7, 5, 4), 4, 1), (Scale(4, 1.41), 3, None), (Translation(7, 5, 4), 2, None),
    (Product(Translation(7, 6, 4), Scale(3, 1.41)), 3, 1)))
def test_sets_of_views(group, views, most):
    """Each set once, any two of its elements within the largest distance."""
    elements = range(len(group.elements))
    near = {(a, b) for a, b in allowed_pairs(group, most).tolist()}
    expected = [list(c) for c in itertools.combinations(elements, views) if all(pair in near for pair in itertools.combinations(c, 2))]
    assert sorted(allowed_sets(group, views, most).tolist()) == expected and expected


def test_products_hold_every_pair_of_parts():
    """Elements are all (shift, turn), each once; a product's distance is the larger of its parts'."""
    shifts, turns = Translation(7, 5, 4), Rotation(8)
    product = Product(shifts, turns)
    assert len({tuple(g) for g in product.elements.tolist()}) == len(product.elements) == 9 * 8
    assert product.distance(torch.tensor([1, 0, 7]), torch.tensor([-1, 1, 0])) == 2
    assert product.distance(torch.tensor([1, 0, 2]), torch.tensor([1, 1, 7])) == 3


@pytest.mark.parametrize("circular", (False, True))
def test_crops_are_the_windows_pixels(circular):
    """Crops.T cuts from the image the square whose positions Translation.view cuts from the features."""
    crops, shifts = Crops(7, 3, 4, circular), Translation(7, 3, 4, circular)
    x = torch.randn(len(crops.elements), 2, 28, 28)
    cells = torch.nn.functional.avg_pool2d(x, 4).unsqueeze(2)                                        # an encoder of stride 4 that sees no further
    g = crops.elements
    assert crops.T(g, x).shape[-2:] == (12, 12)
    torch.testing.assert_close(crops.base(torch.nn.functional.avg_pool2d(crops.T(g, x), 4).unsqueeze(2)), shifts.view(g, cells), rtol=0, atol=0)


def test_one_position_is_the_local_patch_family():
    """|G0| = 1 on translation: L_H is a loss between single fibers of one map, here written from them directly."""
    group, z = Translation(7, 1, 4), torch.randn(5, 3, 1, 7, 7)
    assert len(group.elements) == 49
    g1, g2 = group.elements[torch.randint(49, (2, 5))]
    found = h_ssl_loss(lambda x: z, torch.nn.Flatten(), nt_xent, group, None, g1, g2)
    patch1, patch2 = (torch.stack([z[i, :, 0, 3 - g[i, 0], 3 - g[i, 1]] for i in range(5)]) for g in (g1, g2))     # (5, 3): fibers
    torch.testing.assert_close(found, nt_xent(patch1, patch2), rtol=0, atol=0)


@pytest.mark.parametrize("circular", (False, True))
def test_crop(circular):
    """Against one padded or rolled image at a time."""
    x, corner = torch.randn(6, 2, 5, 7), torch.randint(-4, 5, (6, 2))
    for image, (top, left), window in zip(x, corner.tolist(), crop(x, corner, (3, 4), 4, circular)):
        if circular:
            expected = image.roll((-top, -left), (1, 2))[:, :3, :4]
        else:
            expected = F.pad(image, (10, 10, 10, 10))[:, top + 10:top + 13, left + 10:left + 14]
        assert torch.equal(window, expected)


def test_quarter_turns_and_enlargements_of_images():
    """T_g turns counter-clockwise as torch.rot90 does, and enlarging by 2 doubles distances from the centre."""
    x = torch.randn(4, 2, 6, 6)
    turned = Rotation(4).T(torch.arange(4), x)
    assert all(torch.equal(turned[q], x[q].rot90(q, (-2, -1))) for q in range(4))
    assert torch.equal(Rotation(8).T(torch.tensor([2, 0, 6, 4]), x), torch.stack([x[0].rot90(1, (-2, -1)), x[1], x[2].rot90(3, (-2, -1)),
                                                                              x[3].rot90(2, (-2, -1))]))
    ramp = torch.arange(-3.5, 4)[None, None, None].expand(1, 1, 8, 8)                              # value = x coordinate
    torch.testing.assert_close(Scale(3, 2.0).T(torch.tensor([1]), ramp)[0, 0, 3], torch.arange(-3.5, 4) / 2)


@pytest.mark.parametrize("group, elements", (
    (Translation(7, 4, 4), 1), (Translation(7, 3, 4, circular=True), 1), (Rotation(4), 4), (Rotation(8, 3), 8), (Scale(3, 1.41), 3),
    (Scale(4, 1.41, 2), 4), (Scale(3, 1.41, first=0), 3), (Translation(7, 4, 4), 3),
    (Product(Translation(7, 4, 4, circular=True), Rotation(4)), 4), (Product(Translation(7, 5, 4), Scale(3, 1.41, 2)), 3)))
def test_a_view_is_the_base_of_moved_features(group, elements):
    """view(g, z) = base(Γ(g, z)) for every element, and view = base where g is the identity."""
    g = group.elements
    z = torch.randn(len(g), 2, elements, 7, 7)
    torch.testing.assert_close(group.view(g, z), group.base(group.Γ(g, z)), rtol=0, atol=0)
    identity = (g.reshape(len(g), -1) == 0).all(1)
    assert identity.sum() == 1
    torch.testing.assert_close(group.view(g, z)[identity], group.base(z)[identity], rtol=1e-12, atol=1e-12)


def test_scale_beyond_the_axis_is_zero():
    """Γ_g moves scale s to s + g; scales that would come from beyond the axis are zero."""
    z = torch.rand(1, 2, 3, 4, 4) + 1
    moved = Scale(3, 1.41).Γ(torch.tensor([1]), z)
    assert (moved[:, :, 0] == 0).all() and (moved[:, :, 1:] > 0).all()


def test_readout_keeps_the_layout():
    view = torch.randn(2, 3, 2, 4, 4)
    assert readout(view).shape == (2, 96) and readout(view, 2).shape == (2, 24)
    torch.testing.assert_close(readout(view, 1), view.mean((3, 4)).transpose(1, 2).flatten(1))
