"""The groups against what they say they do, and a ValueError for all that does not fit them."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hssl import (Crops, ProjectionHead, Rotation, Scale, Translation, a_ssl_loss, allowed_pairs,
                  h_ssl_loss, make_group, readout)
from losses import nt_xent

pytestmark = pytest.mark.usefixtures("float64")

# Each group, and features that it moves.
GROUPS = {
    "window": (Translation(7, 4, 4), (2, 1, 7, 7)),
    "window, three scales": (Translation(7, 4, 4), (2, 3, 7, 7)),
    "circular window": (Translation(7, 3, 4, circular=True), (2, 1, 7, 7)),
    "turns": (Rotation(4), (2, 4, 7, 7)),
    "eighths of a turn": (Rotation(8, 3), (2, 8, 7, 7)),
    "scale": (Scale(3, 1.41), (2, 3, 7, 7)),
    "scale, two of four": (Scale(4, 1.41, 2), (2, 4, 6, 7)),
}
groups = pytest.mark.parametrize("group, shape", GROUPS.values(), ids=GROUPS)


# ------------------------------------------------------------------------------- what they do

@groups
def test_a_view_is_the_base_of_moved_features(group, shape):
    """view(g, z) = base(Γ(g, z)) for every element, and base(z) where g is the identity."""
    g = group.elements
    z = torch.randn(len(g), *shape)
    view = group.view(g, z)
    torch.testing.assert_close(view, group.base(group.Γ(g, z)), rtol=0, atol=0)
    identity = (g.reshape(len(g), -1) == 0).all(1)
    assert identity.sum() == 1
    torch.testing.assert_close(view[identity], group.base(z)[identity])


def test_images_are_turned_and_enlarged():
    """T_g turns counter-clockwise as torch.rot90 does, and enlarging by 2 doubles distances from
    the centre."""
    x = torch.randn(4, 2, 6, 6)
    turned = Rotation(4).T(torch.arange(4), x)
    eighths = Rotation(8).T(torch.tensor([0, 2, 4, 6]), x)
    for k in range(4):
        assert torch.equal(turned[k], x[k].rot90(k, (1, 2)))
        assert torch.equal(eighths[k], turned[k])
    ramp = torch.arange(-3.5, 4).expand(1, 1, 8, 8)    # each pixel's x coordinate
    enlarged = Scale(3, 2.0).T(torch.tensor([1]), ramp)
    torch.testing.assert_close(enlarged[0, 0, 3], torch.arange(-3.5, 4) / 2)


def test_shifted_images():
    """T_g moves down and right by g times the stride; zeros or the other side come in."""
    x = torch.randn(2, 3, 28, 28)
    g = torch.tensor([[1, -1], [0, 2]])
    moved = Translation(7, 4, 4, circular=True).T(g, x)
    for i, (down, right) in enumerate(4 * g):
        assert torch.equal(moved[i], x[i].roll((int(down), int(right)), (1, 2)))
    moved = Translation(7, 4, 4).T(torch.tensor([[1, -1]]), x[:1])
    expected = F.pad(x[:1, :, :-4, 4:], (0, 4, 4, 0))
    assert torch.equal(moved, expected)
    other_side = Translation(7, 4, 4).T(g[:1], torch.ones(1, 3, 20, 20))
    assert other_side.sum() == 3 * 16 * 16    # as for an encoder that does not pad


def test_beyond_the_border():
    """Features go on as at the border; around images there is nothing."""
    one = torch.tensor([1])
    image = torch.ones(1, 1, 7, 7)
    for group, g, places in ((Rotation(8), one, 8), (Scale(3, 1.5), -one, 3)):
        features = torch.ones(1, 1, places, 7, 7)
        torch.testing.assert_close(group.Γ(g, features)[:, :, 0], image)
        assert group.T(g, image)[0, 0, 0, 0] < 0.5


def test_scale_beyond_the_axis_is_zero():
    """Γ_g moves scale s to s + g; what would come from beyond the axis is zero."""
    z = torch.rand(1, 2, 3, 4, 4) + 1
    moved = Scale(3, 1.41).Γ(torch.tensor([1]), z)
    assert (moved[:, :, 0] == 0).all() and (moved[:, :, 1:] > 0).all()


def test_distances_and_pairs():
    """Pairs are all (g1, g2) with 1 <= distance <= the largest; circular axes close."""
    rotation = Rotation(8)
    assert rotation.distance(torch.tensor(1), torch.tensor(7)) == 2
    assert len(allowed_pairs(rotation, 1)) == 16
    window = Translation(7, 4, 4)
    assert len(window.elements) == 16 and len(allowed_pairs(window)) == 16 * 15
    circular = Translation(7, 4, 4, circular=True)
    assert circular.distance(torch.tensor([0, 0]), torch.tensor([6, 3])) == 3
    assert len(allowed_pairs(circular, 1)) == 49 * 8
    scale = Scale(4, 1.41)
    assert scale.elements.tolist() == [-2, -1, 0, 1] and len(allowed_pairs(scale, 1)) == 6
    for group, largest in ((Translation(7, 7, 4), None), (window, 0), (Rotation(1), None)):
        with pytest.raises(ValueError, match="make a pair"):
            allowed_pairs(group, largest)


@pytest.mark.parametrize("circular", (False, True))
def test_crops_are_the_windows_pixels(circular):
    """Crops.T cuts from the image the square whose positions Translation.view cuts from the
    features."""
    crops = Crops(7, 3, 4, circular)
    shifts = Translation(7, 3, 4, circular)

    def f(x):    # of stride 4, and sees no further
        return F.avg_pool2d(x, 4).unsqueeze(2)

    g = crops.elements
    assert torch.equal(g, shifts.elements)
    assert torch.equal(crops.distance(g, g.flip(0)), shifts.distance(g, g.flip(0)))
    x = torch.randn(len(g), 2, 28, 28)
    assert crops.T(g, x).shape[-2:] == (12, 12)
    torch.testing.assert_close(crops.base(f(crops.T(g, x))), shifts.view(g, f(x)), rtol=0, atol=0)
    assert not hasattr(crops, "Γ") and not hasattr(crops, "view")


def test_one_position_is_the_local_patch_family():
    """|G0| = 1 on translation: L_H is a loss between single fibers of one map."""
    group = Translation(7, 1, 4)
    z = torch.randn(5, 3, 1, 7, 7)
    g1, g2 = group.elements[torch.randint(49, (2, 5))]
    fibers = []
    for g in (g1, g2):
        fibers.append(torch.stack([z[i, :, 0, 3 - g[i, 0], 3 - g[i, 1]] for i in range(5)]))
    loss = h_ssl_loss(nn.Identity(), nn.Flatten(), nt_xent, group, z, g1, g2)
    torch.testing.assert_close(loss, nt_xent(*fibers), rtol=0, atol=0)


def test_readout_keeps_the_layout():
    """Group elements first, then channels, rows and columns."""
    view = torch.randn(2, 3, 2, 4, 4)
    rows = readout(view)
    assert rows.shape == (2, 96) and readout(view, 2).shape == (2, 24)
    assert torch.equal(rows.view(2, 2, 3, 4, 4)[:, 1, 2], view[:, 2, 1])
    torch.testing.assert_close(readout(view, 1), view.mean((3, 4)).transpose(1, 2).flatten(1))
    assert ProjectionHead(24, 16, 8, grid=2, norm=True)(view).shape == (2, 8)


def test_make_group():
    """The name and the arguments reach the classes."""
    assert make_group("rotation", 8, 3, 7, 4).base_size == 3
    assert make_group("scale", 3, 1, 7, 4, scale_step=1.3).step == 1.3
    window = make_group("translation", 1, 4, 7, 4, circular=True)
    assert type(window) is Translation and window.circular and window.stride == 4
    assert type(make_group("translation", 1, 4, 7, 4, crop=True)) is Crops
    with pytest.raises(ValueError, match="translation, rotation or scale"):
        make_group("shear", 1, 1, 7, 4)


# ------------------------------------------------------------------------ what does not fit them

@pytest.mark.parametrize("make, arguments, message", (
    (Translation, (7, 8, 4), "1 to 7"), (Translation, (7, 0, 4), "1 to 7"),
    (Translation, (7, 4, 0), "stride"), (Crops, (7, 8, 4), "1 to 7"), (Rotation, (4, 5), "1 to 4"),
    (Rotation, (4, 0), "1 to 4"), (Rotation, (0,), "1 to 0"), (Scale, (3, 1.41, 4), "1 to 3"),
    (Scale, (3, 0.5), "above 1"), (Scale, (3, 1), "above 1"), (Scale, (3, math.nan), "above 1"),
    (Scale, (3, math.inf), "finite")))
def test_no_such_group(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments)


@groups
@pytest.mark.parametrize("act", ("view", "Γ", "T"))
def test_elements_that_do_not_fit(act, group, shape):
    """Another number of them than of images, another shape, no integers, or none of the group's."""
    inputs = torch.randn(2, *shape)
    if act == "T":
        inputs = torch.randn(2, 1, 28, 28)
    call = getattr(group, act)
    good = group.elements[:2]
    call(good, inputs)
    for wrong in (good[:1], group.elements[[0, 1, 0]], good[0], good[..., None], good.double()):
        with pytest.raises(ValueError, match="integers"):
            call(wrong, inputs)
    if isinstance(group, Rotation) or getattr(group, "circular", False):
        call(good - 100, inputs)    # any integers name an element
        return
    for wrong in (group.elements[-2:] + 1, group.elements[:2] - 1):
        with pytest.raises(ValueError, match="elements of the group"):
            call(wrong, inputs)


@groups
@pytest.mark.parametrize("dtype", (torch.bool, torch.uint8, torch.int8, torch.complex64))
def test_elements_of_another_type(group, shape, dtype):
    """Small integers would wrap: 4 · 100 is -112 in int8."""
    g = torch.zeros_like(group.elements[:2]).to(dtype)
    with pytest.raises(ValueError, match="integers"):
        group.T(g, torch.randn(2, 1, 28, 28))
    with pytest.raises(ValueError, match="integers"):
        group.view(g, torch.randn(2, *shape))


@groups
def test_features_that_do_not_fit(group, shape):
    """No group axis, another one, or maps of another side, for Γ, view and base."""
    channels, places, height, width = shape
    g = group.elements[:2]
    wrong = [(channels, height, width), (channels * height * width,), (1, channels, places, 7, 7)]
    if not isinstance(group, Translation):
        wrong.append((channels, places + 1, height, width))
        wrong.append((channels, 1, height, width))
    if isinstance(group, Translation):
        wrong.append((channels, places, 8, 8))
        wrong.append((channels, places, 7, 8))
    for other in wrong:
        z = torch.randn(2, *other)
        with pytest.raises(ValueError, match="features must be"):
            group.base(z)
        for move in (group.Γ, group.view):
            with pytest.raises(ValueError, match="features must be"):
                move(g, z)


def test_maps_that_are_not_square():
    """They can be enlarged, but not turned."""
    g = torch.tensor([1, 0])
    z = torch.randn(2, 1, 3, 6, 7)
    assert Scale(3, 1.41).view(g, z).shape == (2, 1, 1, 6, 7)
    for move in (Rotation(3).Γ, Rotation(3).view):
        with pytest.raises(ValueError, match="features must be"):
            move(g, z)


def test_images_that_do_not_fit():
    """What has no channels, what is not square where it turns, and what Crops would wrap."""
    g = torch.zeros(2, dtype=torch.int64)
    shift = torch.zeros(2, 2, dtype=torch.int64)
    for group, element, shape in (
            (Rotation(4), g, (2, 1, 4, 5)), (Rotation(4), g, (2, 4, 4)),
            (Scale(3, 1.41), g, (2, 1, 1, 4, 4)), (Translation(7, 4, 4), shift, (2, 28, 28)),
            (Crops(7, 4, 4), shift, (2, 1, 20, 20)), (Crops(7, 4, 4), shift, (2, 1, 28, 32)),
            (Crops(7, 4, 4, circular=True), shift, (2, 1, 32, 32))):
        with pytest.raises(ValueError, match="images must be"):
            group.T(element, torch.zeros(shape))


@pytest.mark.parametrize("loss", (h_ssl_loss, a_ssl_loss))
@pytest.mark.parametrize("group, count, side", (
    (Translation(7, 4, 4), 2, 28),    # elements for 2 of 8 images
    (Translation(7, 4, 4), 8, 32),    # 8x8 positions, not 7x7
    (Rotation(4), 2, 28),
    (Rotation(4), 8, 28)))    # one orientation, not 4
def test_the_losses_refuse_too(loss, group, count, side):
    """L_A refuses what L_H refuses; and neither takes features without a group axis."""
    def f(x):
        return F.avg_pool2d(x, 4).unsqueeze(2)

    x = torch.randn(8, 2, side, side)
    g1 = group.elements[[0] * count]
    g2 = group.elements[[1] * count]
    with pytest.raises(ValueError, match="must be"):
        loss(f, readout, nt_xent, group, x, g1, g2)
    with pytest.raises(ValueError, match="must be"):
        loss(nn.AvgPool2d(4), readout, nt_xent, group, x, g1, g2)
    with pytest.raises(ValueError, match="features must be"):
        readout(nn.AvgPool2d(4)(x), 2)
