"""The groups against what they say they do, and a ValueError for all that does not fit them."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hssl import (ProjectionHead, Rotation, Scale, Translation, a_ssl_loss, allowed_pairs,
                  h_ssl_loss, readout)
from layers import MNISTBackbone
from losses import nt_xent

pytestmark = pytest.mark.usefixtures("float64")

# Each group, and features that it moves.
groups = pytest.mark.parametrize("group, shape", (
    (Translation(7, 4, 4), (2, 3, 7, 7)),
    (Translation(7, 3, 4, circular=True), (2, 1, 7, 7)),
    (Rotation(8, 3), (2, 8, 7, 7)),
    (Scale(4, 1.41, 2), (2, 4, 6, 7)),
))


@groups
def test_a_view_is_the_base_of_moved_features(group, shape):
    """view(g, z) = base(Γ(g, z)) for every element, as for each alone, and base(z) where g is the
    identity."""
    g = group.elements
    z = torch.randn(len(g), *shape)
    view = group.view(g, z)
    assert torch.equal(view, group.base(group.Γ(g, z)))
    alone = [group.view(g[i:i + 1], z[i:i + 1]) for i in range(len(g))]
    assert torch.equal(view, torch.cat(alone))
    identity = (g.reshape(len(g), -1) == 0).all(1)
    assert identity.sum() == 1
    torch.testing.assert_close(view[identity], group.base(z)[identity])


def test_the_window_is_in_the_middle_and_views_keep_the_layout():
    """View and gradient are channels-last if the features are: batch norm is slow otherwise."""
    maps = torch.randn(2, 3, 7, 7).to(memory_format=torch.channels_last).requires_grad_()
    group = Translation(7, 4, 4)
    z = maps.unsqueeze(2)
    assert torch.equal(group.base(z), z[..., 1:5, 1:5])
    view = group.view(torch.ones(2, 2, dtype=torch.int64), z)
    gradient, = torch.autograd.grad(view.sum(), maps)
    for tensor in (view.squeeze(2), gradient):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_images_are_turned_and_enlarged():
    """Counter-clockwise, as torch.rot90 does; by a step of 2, distances from the centre double."""
    x = torch.randn(4, 2, 6, 6)
    quarters = Rotation(4).T(torch.arange(4), x)
    eighths = Rotation(8).T(2 * torch.arange(4), x)
    for k in range(4):
        assert torch.equal(quarters[k], x[k].rot90(k, (1, 2)))
        assert torch.equal(eighths[k], quarters[k])
    column = torch.arange(-3.5, 4)    # each pixel's place, seen from the centre
    enlarged = Scale(3, 2.0).T(torch.tensor([1]), column.expand(1, 1, 8, 8))
    torch.testing.assert_close(enlarged[0, 0, 3], column / 2)


@pytest.mark.parametrize("group", (Rotation(8), Scale(3, 1.41)))
def test_positions_are_not_of_half_precision(group):
    """In bfloat16 they would be off by a tenth of a pixel."""
    x = torch.randn(1, 1, 28, 28)
    g = torch.ones(1, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        moved = group.T(g, x.bfloat16())
    assert (moved - group.T(g, x)).abs().max() < 0.03


def test_images_are_shifted():
    """Down and right by g times the stride; zeros or the other side come in."""
    x = torch.randn(2, 3, 28, 28)
    g = torch.tensor([[1, -1], [0, 2]])
    moved = Translation(7, 4, 4, circular=True).T(g, x)
    assert torch.equal(moved[0], x[0].roll((4, -4), (1, 2)))
    moved = Translation(7, 4, 4).T(g[:1], x[:1])
    assert torch.equal(moved, F.pad(x[:1, :, :-4, 4:], (0, 4, 4, 0)))
    # Other sides are for encoders that do not pad.
    assert Translation(7, 4, 4).T(g[:1], torch.ones(1, 3, 20, 20)).sum() == 3 * 16 * 16


@pytest.mark.parametrize("group, element", ((Rotation(8), 1), (Scale(3, 1.5), -1)))
def test_beyond_the_border(group, element):
    """Features go on as at the border; around images there is nothing."""
    g = torch.tensor([element])
    image = torch.ones(1, 1, 7, 7)
    features = torch.ones(1, 1, 8, 7, 7)
    if isinstance(group, Scale):
        features = features[:, :, :3]
    torch.testing.assert_close(group.Γ(g, features)[:, :, 0], image)
    assert group.T(g, image)[0, 0, 0, 0] < 0.5
    if isinstance(group, Scale):    # whose axis ends
        assert not group.Γ(g, features)[:, :, 2].any()


@pytest.mark.parametrize("group, largest, count, a, b, between", (
    (Rotation(8), 1, 8 * 2, 1, 7, 2),
    (Translation(7, 4, 4), None, 16 * 15, [0, 0], [2, -3], 3),
    (Translation(7, 4, 4, circular=True), 1, 49 * 8, [0, 0], [6, 3], 3),
    (Scale(4, 1.41), 1, 3 * 2, -2, 1, 3),
))
def test_distances_and_pairs(group, largest, count, a, b, between):
    """Pairs are all of different elements up to the largest distance."""
    assert group.distance(torch.tensor(a), torch.tensor(b)) == between
    pairs = allowed_pairs(group, largest)
    assert len(pairs.unique(dim=0)) == len(pairs) == count
    g1, g2 = group.elements[pairs].unbind(1)
    distance = group.distance(g1, g2)
    assert distance.min() == 1 and distance.max() <= (largest or 3)


def test_readout_keeps_the_layout():
    """Group elements first, then channels, rows and columns."""
    view = torch.randn(2, 3, 2, 4, 4)
    rows = readout(view)
    assert rows.shape == (2, 96)
    assert torch.equal(rows.view(2, 2, 3, 4, 4)[:, 1, 2], view[:, 2, 1])
    torch.testing.assert_close(readout(view, 1), view.mean((3, 4)).transpose(1, 2).flatten(1))
    assert ProjectionHead(24, 16, 8, grid=2)(view).shape == (2, 8)


@groups
def test_an_empty_batch(group, shape):
    g = group.elements[:0]
    z = torch.zeros(0, *shape)
    assert group.T(g, torch.zeros(0, 1, 28, 28)).shape == (0, 1, 28, 28)
    assert group.Γ(g, z).shape == z.shape
    assert group.view(g, z).shape == group.base(z).shape


class NoFloat64(TorchDispatchMode):
    """A device that has none, as Apple's."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        assert getattr(result, "dtype", None) != torch.float64, function
        return result


@pytest.mark.parametrize("name, group", (("rotation", Rotation(8)), ("scale", Scale(3, 1.41))))
def test_float32_needs_no_float64(name, group):
    torch.set_default_dtype(torch.float32)
    f = MNISTBackbone(name, len(group.elements), (2, 3, 4))
    h = ProjectionHead(4 * 7 * 7, 8, 4)
    with NoFloat64():
        for loss in (a_ssl_loss, h_ssl_loss):
            g1, g2 = group.elements[torch.tensor([[0, 1], [1, 2]])]
            loss(f, h, nt_xent, group, torch.randn(2, 1, 28, 28), g1, g2).backward()


@groups
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_compile(group, shape):
    """The values of g cannot be checked there, but are again outside."""
    g = group.elements[torch.tensor([[0, 1], [1, 2], [2, 0]])]
    z = torch.randn(3, 2, *shape)
    x = torch.randn(3, 2, 1, 28, 28)
    for act, inputs in ((group.T, x), (group.Γ, z), (group.view, z)):
        alone = torch.stack([act(g[i], inputs[i]) for i in range(3)])
        assert torch.equal(torch.vmap(act)(g, inputs), alone)
    compiled = torch.compile(group.view, fullgraph=True, backend="eager")
    assert torch.equal(compiled(g[0], z[0]), group.view(g[0], z[0]))
    if isinstance(group, Scale):
        with pytest.raises(ValueError, match="elements of the group"):
            group.view(g[0] + 9, z[0])


@pytest.mark.parametrize("call, arguments, message", (
    (Translation, (7, 8, 4), "1 to 7"),
    (Translation, (7, 4, 0), "stride"),
    (Rotation, (4, 0), "1 to 4"),
    (Scale, (3, 1.41, 4), "1 to 3"),
    (Scale, (3, 1), "above 1"),
    (Scale, (3, math.inf), "finite"),
    (allowed_pairs, (Translation(7, 7, 4),), "make a pair"),
    (allowed_pairs, (Translation(7, 4, 4), 0), "make a pair"),
    (readout, (torch.zeros(2, 3, 4, 4), 2), "a view must be"),
    (Rotation(3).Γ, (torch.tensor([1]), torch.zeros(1, 1, 3, 6, 7)), "features must be"),
    (readout, (torch.zeros(2, 3, 1, 4, 5), 5), "5x5 cells .* 4x5 positions"),
    (Rotation(8).T, (torch.tensor([1]), torch.zeros(1, 1, 8, 8).byte()), "floating-point"),
    (Rotation(8).T, (torch.tensor([1]), "an image"), "images must be"),
))
def test_arguments_that_do_not_fit(call, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(*arguments)


@groups
def test_elements_that_do_not_fit(group, shape):
    """As many as images, in one shape, int64, since 4 · 100 is -112 in int8; and of the group."""
    z = torch.randn(2, *shape)
    x = torch.randn(2, 1, 28, 28)
    good = group.elements[:2]
    for call, inputs in ((group.T, x), (group.Γ, z), (group.view, z)):
        for wrong in (good[:1], good[0], good[..., None], good.double(), good.to(torch.int8)):
            with pytest.raises(ValueError, match="must be torch.int64"):
                call(wrong, inputs)
        if group.elements.min() == 0:
            call(good - 100, inputs)    # any integers name an element of a circle
            continue
        for wrong in (group.elements[-2:] + 1, good - 1):
            with pytest.raises(ValueError, match="elements of the group"):
                call(wrong, inputs)


@pytest.mark.parametrize("group, images, features", (
    (Rotation(4), (1, 4, 5), (1, 5, 4, 4)),
    (Rotation(4), (4, 4), (4, 4, 4)),
    (Scale(3, 1.41), (4, 4), (1, 2, 4, 4)),
    (Translation(7, 4, 4), (28, 28), (1, 1, 7, 8)),
    (Translation(7, 4, 4, circular=True), (1, 28, 32), (1, 1, 8, 7)),
))
def test_images_and_features_that_do_not_fit(group, images, features):
    """Other axes, or lengths that are not the group's or not equal where they turn."""
    g = group.elements[:2]
    x = torch.zeros(2, *images)
    z = torch.zeros(2, *features)
    with pytest.raises(ValueError, match="images must be"):
        group.T(g, x)
    for move in (group.Γ, group.view):
        with pytest.raises(ValueError, match="features must be"):
            move(g, z)
    with pytest.raises(ValueError, match="features must be"):
        group.base(z)
