"""The residual backbone against a restatement of SESN's network, and what its one change, means for strides, is for."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hssl import Rotation, equivariance_error
from layers import CheckpointedBlock, PerElement, ResidualBackbone, ResidualBlock

pytestmark = pytest.mark.usefixtures("float64")
WIDTHS = (2, 3, 4, 5)


def randomised(group, group_size, **options):
    f = ResidualBackbone(group, group_size, WIDTHS, in_channels=3, **options).train()
    for parameter in f.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    return f


def halves(block):
    return isinstance(block.activate[2], nn.AvgPool2d)


def strided(block, x):
    """A halving block as in SESN: no means, both branches with stride 2, so that each 2x2 cell leaves one corner."""
    y = PerElement(block.activate[0], block.activate[1])(x)
    kept = block.first(y)[..., ::2, ::2]
    return block.shortcut(y)[..., ::2, ::2] + block.second(block.between(kept))


@pytest.fixture
def with_strides(monkeypatch):
    """Replace means by strides in every ResidualBlock."""
    usual = ResidualBlock.forward

    def forward(block, x):
        return strided(block, x) if halves(block) else usual(block, x)
    monkeypatch.setattr(ResidualBlock, "forward", forward)


def sesn(f, x, stride):
    """SESN's wide residual network up to its maximum over scales, one scale at a time, with 3-D batch norm.

    f gives the weights. Halving blocks stride their first convolution and their shortcut if `stride`; else they average
    the activated map before these.
    """
    def convolution(layer, x, step=1):
        def kernel(s):
            return torch.einsum("oiek,khw->oihw", layer.weight, layer.basis[:, s])
        inputs = [x] * layer.group_size if x.ndim == 4 else x.unbind(2)
        outputs = [F.conv2d(y, kernel(s), stride=step, padding=layer.padding) for s, y in enumerate(inputs)]
        return torch.stack(outputs, 2)

    def norm_relu(norm, x):                                                                          # (B, C, S, H, W)
        return F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True))

    x = convolution(f[0], x)
    for block in list(f)[1:-1]:
        y, step = norm_relu(block.activate[0], x), 1
        if halves(block):
            y, step = (y, 2) if stride else (F.avg_pool3d(y, (1, 2, 2)), 1)
        if block.shortcut is not None:
            x = torch.stack([F.conv2d(one, block.shortcut[0].weight, stride=step) for one in y.unbind(2)], 2)
        out = convolution(block.second, norm_relu(block.between[0], convolution(block.first, y, step)))
        x = x + out
    return norm_relu(f[-1][0], x)


@pytest.mark.parametrize("depth", (10, 16))
def test_scale_is_sesn_s_but_for_the_strides(depth):
    """Same weights, same outputs as SESN's network with means in place of its strides."""
    f, x = randomised("scale", 3, depth=depth), torch.randn(2, 3, 32, 32)
    z = f(x)
    assert z.shape == (2, 5, 3, 8, 8) and z.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(z, sesn(f, x, stride=False), rtol=1e-10, atol=1e-12)


def test_scale_with_strides_is_sesn_s(with_strides):
    """Nothing else departs: with strides put back, the outputs are SESN's."""
    f, x = randomised("scale", 3), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(f(x), sesn(f, x, stride=True), rtol=1e-10, atol=1e-12)


def quarter_turn_errors():
    """Relative error of f(T_g x) = Γ_g f(x) for the whole residual network and each quarter turn, at 32 pixels."""
    f, group, x = randomised("rotation", 4), Rotation(4), torch.randn(2, 3, 32, 32)
    return equivariance_error(f, group, x, group.elements[1:])


def test_means_keep_quarter_turns_exact():
    errors = quarter_turn_errors()
    print(f"relative error of quarter turns with means: {', '.join(f'{e:.0e}' for e in errors)}")
    assert errors.max() < 1e-10, errors


def test_strides_break_quarter_turns(with_strides):
    errors = quarter_turn_errors()
    print(f"relative error of quarter turns with SESN's strides: {', '.join(f'{e:.2f}' for e in errors)}")
    assert errors.min() > 0.1, errors


def test_number_of_parameters_is_sesn_s():
    """For scale: 9 numbers per filter, two per batch-norm channel, 1x1 shortcuts where channels change."""
    widths, count = (16, 128, 256, 512), 9 * 3 * 16
    for a, b in zip(widths, widths[1:]):
        # Two blocks: four convolutions, a shortcut, four norms.
        count += 9 * (a * b + 3 * b * b) + a * b + 2 * (a + 3 * b)
    count += 2 * 512
    assert sum(p.numel() for p in ResidualBackbone("scale", 3).parameters()) == count == 10_956_240


def test_recomputed_activations_change_nothing():
    """Outputs, gradients, and running statistics after two steps are those of the plain network, bit for bit."""
    torch.manual_seed(0)
    plain = ResidualBackbone("rotation", 4, WIDTHS, kernel_size=5, depth=10)
    checkpointed = ResidualBackbone("rotation", 4, WIDTHS, kernel_size=5, depth=10, checkpoint_activations=True)
    checkpointed.load_state_dict(plain.state_dict())
    assert any(isinstance(block, CheckpointedBlock) for block in checkpointed)
    for _ in range(2):
        x = torch.randn(2, 3, 16, 16)
        outputs = [f(x) for f in (plain, checkpointed)]
        for z in outputs:
            z.square().sum().backward()
        assert torch.equal(*outputs)
    for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    state, other = plain.state_dict(), checkpointed.state_dict()
    assert state.keys() == other.keys() and state["1.activate.0.num_batches_tracked"] == 2
    assert all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize("options, message", (
    (dict(depth=12), "6n"), (dict(widths=(1, 2, 3)), "4 positive"), (dict(widths=(0, 1, 2, 3)), "4 positive")))
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ResidualBackbone(**options)
    with pytest.raises(ValueError, match="divisible by 4"):
        ResidualBackbone(widths=WIDTHS)(torch.zeros(1, 3, 30, 30))
