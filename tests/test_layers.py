"""Layers against the same sums written as loops, and the sizes that they refuse."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hssl import Crops, Rotation, Scale, Translation, allowed_pairs, crop, drawn_sets, h_ssl_loss, readout
from layers import (DenseBackbone, GroupConv2d, LiftingConv2d, MNISTBackbone, PerElement, ResidualBackbone,
                    default_filters, steerable_basis)
from losses import nt_xent

pytestmark = pytest.mark.usefixtures("float64")


def by_loops(layer, x, cyclic):
    """y(g) = bias + Σ_e conv2d( x(g + e), Σ_k weight[:, :, e, k] basis[k, g] ), one element and offset at a time."""
    count, group_size, side = layer.basis.shape[:3]
    outputs = []
    for g in range(group_size):
        y = layer.bias[None, :, None, None]
        for e in range(layer.extent):
            if g + e < group_size or cyclic:
                kernel = sum(layer.weight[:, :, e, k, None, None] * layer.basis[k, g] for k in range(count))
                y = y + F.conv2d(x[:, :, (g + e) % group_size], kernel, padding=side // 2)
        outputs.append(y)
    return torch.stack(outputs, 2)


@pytest.mark.parametrize("group, group_size, extent", (
    *[("rotation", 4, e) for e in (1, 2, 3, 4)], *[("scale", 3, e) for e in (1, 2, 3)], ("translation", 1, 1)))
def test_group_convolution(group, group_size, extent):
    """Against the same sums by loops, on maps that are not square."""
    layer = GroupConv2d(2, 3, steerable_basis(group, group_size, 5, 2, 0.9), extent, cyclic=group == "rotation")
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 2, group_size, 8, 6)
    torch.testing.assert_close(layer(x), by_loops(layer, x, group == "rotation"), rtol=1e-12, atol=1e-12)


def test_circular_padding():
    """Far from zeros: the same as without padding on a map that goes on, three positions on each side, as it began."""
    layer = GroupConv2d(2, 3, steerable_basis("scale", 3, 7, 3, 0.9), extent=2, padding_mode="circular")
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 2, 3, 8, 6)
    around = by_loops(layer, torch.cat([torch.cat([x] * 3, 3)] * 3, 4), False)
    torch.testing.assert_close(layer(x), around[..., 8:16, 6:12], rtol=1e-12, atol=1e-12)


def test_lifting_convolution():
    """Lifting is the group layer on an image that is the same at every element."""
    basis = steerable_basis("scale", 3, 7, 3, 0.9)
    layer = LiftingConv2d(2, 3, basis)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 2, 8, 8)
    expected = by_loops(layer, x[:, :, None].expand(-1, -1, 3, -1, -1), False)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_batch_norm_statistics_are_per_channel():
    """PerElement(BatchNorm2d) normalises each channel over (B, G, H, W)."""
    x = torch.randn(3, 2, 4, 5, 5) * 3 + 1
    y = PerElement(nn.BatchNorm2d(2))(x)
    mean, var = x.mean((0, 2, 3, 4), keepdim=True), x.var((0, 2, 3, 4), keepdim=True, unbiased=False)
    torch.testing.assert_close(y, (x - mean) / (var + 1e-5).sqrt(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("group, group_size", (("translation", 1), ("rotation", 4), ("scale", 3)))
def test_backbone_shape_and_layout(group, group_size):
    """(B, 1, 28, 28) -> (B, C, G, 7, 7), with G before C in memory so that folding it never copies."""
    z = MNISTBackbone(group, group_size, (2, 3, 5))(torch.randn(2, 1, 28, 28))
    assert z.shape == (2, 5, group_size, 7, 7) and z.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("group, kernel_size, effective_size, sigma, count", (
    ("translation", 5, 3, 0.9, 9), ("translation", 7, 3, 0.9, 9), ("scale", 7, 3, 0.7, 9), ("scale", 9, 3, 0.9, 9),
    ("rotation", 3, 3, 0.453, 6), ("rotation", 5, 4, 0.730, 10), ("rotation", 7, 5, 0.955, 15),
    ("rotation", 9, 6, 1.150, 21)))
def test_default_filters(group, kernel_size, effective_size, sigma, count):
    """What the basis has unless said otherwise, in both backbones too; one of the two may be given alone."""
    assert default_filters(group, kernel_size) == (effective_size, pytest.approx(sigma, abs=5e-4))
    width, size = default_filters(group, kernel_size)[1], {"translation": 1, "rotation": 8, "scale": 3}[group]
    basis = steerable_basis(group, size, kernel_size)
    assert basis.shape == (count, size, kernel_size, kernel_size) and basis.dtype == torch.float64
    assert torch.equal(basis, steerable_basis(group, size, kernel_size, effective_size))
    assert torch.equal(basis, steerable_basis(group, size, kernel_size, sigma=width))
    assert not torch.allclose(basis, steerable_basis(group, size, kernel_size, sigma=1.1 * width))
    assert len(steerable_basis(group, size, kernel_size, 2)) == (3 if group == "rotation" else 4)
    for backbone, widths in ((MNISTBackbone, (1, 1, 1)), (ResidualBackbone, (1, 1, 1, 1))):
        assert torch.equal(backbone(group, size, widths, kernel_size=kernel_size)[0].basis, basis)


@pytest.mark.parametrize("make, message", (
    (lambda: steerable_basis("shear", 1, 5, 2, 1.0), "must be one of"),
    (lambda: steerable_basis("translation", 2, 5, 2, 1.0), "exactly 1"),
    (lambda: steerable_basis("rotation", 4, 4, 2, 1.0), "odd"),
    (lambda: steerable_basis("rotation", 4, 5, 0, 1.0), "effective_size >= 1"),
    (lambda: steerable_basis("rotation", 4, 5, sigma=0.0), "sigma > 0"),
    (lambda: steerable_basis("scale", 3, 5, scale_step=1.0), "scale_step > 1"),
    (lambda: steerable_basis("scale", 3, 1, 3, 1.0), "vanishes"),
    (lambda: steerable_basis("rotation", 4, 1), "vanishes"),
    (lambda: steerable_basis("translation", 1, 1), "vanishes"),
    (lambda: steerable_basis("rotation", 4, 7, sigma=1e-300), "vanishes"),
    (lambda: steerable_basis("rotation", 4, 7, sigma=1e100), "vanishes"),
    (lambda: ResidualBackbone("rotation", 4, kernel_size=6), "odd"),
    (lambda: GroupConv2d(1, 1, steerable_basis("rotation", 4, 5, 2, 1.0), extent=5), "1 to 4"),
    (lambda: LiftingConv2d(1, 1, steerable_basis("rotation", 4, 5, 2, 1.0), padding_mode="mirror"), "'circular'"),
    (lambda: MNISTBackbone(widths=(1, 2)), "3 positive"),
    (lambda: MNISTBackbone(widths=(1, 1, 1))(torch.zeros(1, 1, 30, 28)), "divisible by 4"),
    (lambda: Translation(7, 8, 4), "1 to 7"), (lambda: Rotation(4, 5), "1 to 4"), (lambda: Scale(3, 1.41, 4), "1 to 3"),
    (lambda: Rotation(4).T(torch.tensor([1]), torch.zeros(1, 1, 4, 5)), "square"),
    (lambda: Rotation(8).view(torch.tensor([2]), torch.zeros(1, 1, 4, 7, 7)), "4 places on the group axis"),
    (lambda: Scale(3, 1.41).Γ(torch.tensor([0]), torch.zeros(1, 1, 2, 7, 7)), "this group has 3"),
    (lambda: Translation(7, 4, 4).view(torch.tensor([[1, 0]]), torch.zeros(1, 1, 1, 5, 5)), "maps are 5x5"),
    (lambda: Translation(7, 4, 4, True).Γ(torch.tensor([[1, 0]]), torch.zeros(1, 1, 1, 7, 8)), "are 7x7"),
    (lambda: allowed_pairs(Translation(7, 7, 4)), "two group elements"),
    (lambda: allowed_pairs(Translation(7, 6, 4), 0), "at most 0 apart"),
    (lambda: drawn_sets(Rotation(4), 5), "fewer views"),
    (lambda: DenseBackbone(28, (1, 2)), "3 positive"),
))
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------- the groups

def test_distances_and_pairs():
    """Pairs are all (g1, g2) with 1 <= distance <= the largest; the rotation and circular axes close."""
    rotation, scale, window = Rotation(8), Scale(4, 1.41), Translation(7, 4, 4)
    circular = Translation(7, 4, 4, circular=True)
    assert rotation.distance(torch.tensor(1), torch.tensor(7)) == 2 and len(allowed_pairs(rotation, 1)) == 16
    assert len(window.elements) == 16 and len(allowed_pairs(window)) == 16 * 15
    assert circular.distance(torch.tensor([0, 0]), torch.tensor([6, 3])) == 3
    assert len(allowed_pairs(circular, 1)) == 49 * 8
    assert scale.elements.tolist() == [-2, -1, 0, 1] and len(allowed_pairs(scale, 1)) == 6


@pytest.mark.parametrize("group, views", (
    (Rotation(4), 4), (Rotation(8), 3), (Translation(7, 5, 4), 4), (Scale(4, 1.41), 3), (Translation(7, 5, 4), 2)))
def test_sets_of_views(group, views):
    """Random sets of different elements: each element is as likely as any other at each place, and sets differ."""
    count, elements = 4000, len(group.elements)
    sets = drawn_sets(group, views, count)
    assert sets.shape == (count, views) and 0 <= sets.min() and sets.max() < elements
    assert all(len(set(row)) == views for row in sets.tolist())
    for place in sets.T:
        frequency = torch.bincount(place, minlength=elements) / count
        assert (frequency - 1 / elements).abs().max() < 5 * (elements * count) ** -0.5             # 5 sigma
    assert len(drawn_sets(group, views)) == 10_000 and not torch.equal(drawn_sets(group, views, count), sets)


@pytest.mark.parametrize("circular", (False, True))
def test_crops_are_the_windows_pixels(circular):
    """Crops.T cuts from the image the square whose positions Translation.view cuts from the features."""
    crops, shifts = Crops(7, 3, 4, circular), Translation(7, 3, 4, circular)

    def f(x):                                                                      # of stride 4, and sees no further
        return F.avg_pool2d(x, 4).unsqueeze(2)
    g = crops.elements
    assert torch.equal(g, shifts.elements) and torch.equal(crops.distance(g, g.flip(0)), shifts.distance(g, g.flip(0)))
    x = torch.randn(len(g), 2, 28, 28)
    assert crops.T(g, x).shape[-2:] == (12, 12)
    torch.testing.assert_close(crops.base(f(crops.T(g, x))), shifts.view(g, f(x)), rtol=0, atol=0)


def test_crops_cannot_move_features():
    """No Γ_g acts on features of the pixels that are left, so Crops has neither Γ nor view."""
    crops = Crops(7, 3, 4)
    assert not hasattr(crops, "Γ") and not hasattr(crops, "view")


def test_one_position_is_the_local_patch_family():
    """|G0| = 1 on translation: L_H is a loss between single fibers of one map, here written from them directly."""
    group, z = Translation(7, 1, 4), torch.randn(5, 3, 1, 7, 7)
    assert len(group.elements) == 49
    g1, g2 = group.elements[torch.randint(49, (2, 5))]
    found = h_ssl_loss(lambda x: z, torch.nn.Flatten(), nt_xent, group, None, g1, g2)
    fibers = [torch.stack([z[i, :, 0, 3 - g[i, 0], 3 - g[i, 1]] for i in range(5)]) for g in (g1, g2)]         # (5, 3)
    torch.testing.assert_close(found, nt_xent(*fibers), rtol=0, atol=0)


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
    turned = Rotation(8).T(torch.tensor([2, 0, 6, 4]), x)
    assert all(torch.equal(turned[i], x[i].rot90(q, (-2, -1))) for i, q in enumerate((1, 0, 3, 2)))
    ramp = torch.arange(-3.5, 4)[None, None, None].expand(1, 1, 8, 8)                                # the x coordinate
    torch.testing.assert_close(Scale(3, 2.0).T(torch.tensor([1]), ramp)[0, 0, 3], torch.arange(-3.5, 4) / 2)


@pytest.mark.parametrize("group, group_size", (
    (Translation(7, 4, 4), 1), (Translation(7, 3, 4, circular=True), 1), (Translation(7, 4, 4), 3), (Rotation(4), 4),
    (Rotation(8, 3), 8), (Scale(3, 1.41), 3), (Scale(4, 1.41, 2), 4)))
def test_a_view_is_the_base_of_moved_features(group, group_size):
    """view(g, z) = base(Γ(g, z)) for every element, and view = base where g is the identity."""
    g = group.elements
    z = torch.randn(len(g), 2, group_size, 7, 7)
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
