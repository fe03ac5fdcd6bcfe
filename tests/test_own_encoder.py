"""Encoders that are not ours: torchvision's ResNet-18 and, where it is installed, escnn. All that the objective asks is
features (B, C, G, H, W) that move as the group says; then both losses and all gradients are equal."""
import pytest
import torch
from torch import nn

import run
import train
from hssl import ProjectionHead, Rotation, Translation, a_ssl_loss, equivariance_error, h_ssl_loss
from layers import ResNet18Backbone
from losses import nt_xent

pytestmark = pytest.mark.usefixtures("float64")


def losses_and_gradients(f, group, x, g1, g2):
    """Of both methods, with the same head: two losses, and two vectors of all of the encoder's gradients."""
    h = ProjectionHead(group.base(f(x)).flatten(1).shape[1], 16, 8)
    losses = [method(f, h, nt_xent, group, x, g1, g2) for method in (a_ssl_loss, h_ssl_loss)]
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(f.parameters()))]) for loss in losses]
    return losses, gradients


@pytest.mark.parametrize("side, stride", ((32, 8), (64, 32)))
def test_resnet18_with_circular_padding(side, stride):
    """With the 3x3 stem (CIFAR-10's size) and with torchvision's own, every shift by the stride is exact."""
    f = ResNet18Backbone(side if stride == 8 else 96, padding_mode="circular")
    group = Translation(side // stride, 1, stride, circular=True)
    assert f.stride == stride and len(group.elements) == (side // stride) ** 2
    x = torch.randn(4, 3, side, side)
    errors = equivariance_error(f, group, x[:1], group.elements[1:])
    assert errors.max() < 1e-10, errors
    g1, g2 = group.elements[torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])]
    (a, b), (u, v) = losses_and_gradients(f, group, x, g1, g2)
    assert abs(a - b) < 1e-10 * a and (u - v).norm() < 1e-10 * u.norm()


def test_resnet18_is_torchvision_s():
    """The same parameters but for the stem, and for images of more than 64 pixels the same features."""
    from torchvision.models import resnet18
    ours, theirs = ResNet18Backbone(96), resnet18()
    trunk = nn.Sequential(*list(theirs.children())[:-2])
    ours.load_state_dict(trunk.state_dict())
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(ours(x), trunk(x)[:, :, None])
    small = ResNet18Backbone(32, in_channels=1)
    assert small(torch.zeros(2, 1, 32, 32)).shape == (2, 512, 1, 4, 4)
    assert small[0].weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)          # Kaiming, fan-out


@pytest.mark.parametrize("dataset, side, window", (("cifar10", 32, 2), ("tiny-imagenet", 64, 4)))
def test_the_backbone_resnet18(dataset, side, window):
    """--backbone resnet18 has a window that can move, and with circular padding moves on the whole torus."""
    args = train.parse(["--dataset", dataset, "--backbone", "resnet18", "--padding", "circular"])
    encoder, group = run.build(vars(args), 3, side)
    assert isinstance(encoder, ResNet18Backbone) and (group.window, group.stride, group.circular) == (window, 8, True)
    assert (args.epochs, args.batch_size, args.grid) == (1300, 4096, 0)


@pytest.mark.parametrize("flags, message", (
    ("--group rotation", "is for --group translation"), ("--structure none", "is for --group translation"),
    ("--dataset mnist", "28x28, but ResNet-18")))
def test_what_resnet18_refuses(flags, message):
    args = train.parse(["--dataset", "cifar10", "--backbone", "resnet18", *flags.split()])
    with pytest.raises(ValueError, match=message):
        run.build(vars(args), 3, 28 if args.dataset == "mnist" else 32)


@pytest.mark.parametrize("orientations", (4, 8))
def test_an_escnn_network(orientations):
    """Regular fields of C channels unflatten to (B, C, G, H, W). escnn's basis is float32's, so 1e-5 and not 1e-10;
    of eight orientations the quarter turns are exact."""
    escnn = pytest.importorskip("escnn.nn")
    torch.set_default_dtype(torch.float32)
    space = pytest.importorskip("escnn.gspaces").rot2dOnR2(orientations)
    image, fields = (escnn.FieldType(space, n * [r]) for n, r in ((1, space.trivial_repr), (3, space.regular_repr)))
    layers = nn.ModuleList([escnn.R2Conv(image, fields, 5, padding=2), escnn.ReLU(fields),
                            escnn.R2Conv(fields, fields, 5, padding=2)]).train()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            z = escnn.GeometricTensor(x, image)
            for layer in self.layers:
                z = layer(z)
            return z.tensor.unflatten(1, (3, orientations))

    f, group, x = Network(), Rotation(orientations), torch.randn(4, 1, 15, 15)
    quarters = group.elements[::orientations // 4]
    errors = equivariance_error(f, group, x, quarters)
    assert errors.max() < 1e-5, errors
    (a, b), (u, v) = losses_and_gradients(f, group, x, quarters[[0, 1, 2, 3]], quarters[[1, 3, 0, 2]])
    assert abs(a - b) < 1e-4 * a and (u - v).norm() < 1e-3 * u.norm()
