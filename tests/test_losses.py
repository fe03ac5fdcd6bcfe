"""NT-Xent against the formula written as a loop, and one process against several, in float64."""
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from losses import nt_xent


def by_the_formula(h1, h2, temperature):
    """Mean over all 2N projections a of -log( e^(a·partner/τ) / Σ over the other 2N - 1 of e^(a·b/τ) )."""
    h = [v / v.norm() for v in [*h1, *h2]]
    n, total = len(h1), 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = sum(math.exp(float(h[i] @ h[j]) / temperature) for j in range(2 * n) if j != i)
        total -= math.log(math.exp(float(h[i] @ h[partner]) / temperature) / others)
    return total / (2 * n)


@pytest.mark.parametrize("n, temperature", ((1, 0.5), (2, 0.1), (7, 0.1), (7, 1.0)))
def test_formula(n, temperature):
    torch.manual_seed(0)
    h1, h2 = torch.randn(2, n, 5, dtype=torch.float64)
    assert nt_xent(h1, h2, temperature).item() == pytest.approx(by_the_formula(h1, h2, temperature), rel=1e-12, abs=1e-12)


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    h1, h2 = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(nt_xent, (h1, h2))


def test_there_are_2n_minus_1_candidates():
    """With all projections equal each of the 2N - 1 candidates is as likely as the partner."""
    h = torch.ones(6, 4)
    assert nt_xent(h, h).item() == pytest.approx(math.log(2 * 6 - 1), rel=1e-6)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_float32_inside_autocast(dtype):
    """Half-precision projections, under autocast, are compared in float32: the same loss as without autocast."""
    torch.manual_seed(0)
    h1, h2 = torch.randn(2, 16, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(h1, h2, 0.01)
    assert loss.dtype == torch.float32
    assert loss.item() == nt_xent(h1.float(), h2.float(), 0.01).item()


@pytest.mark.parametrize("shapes, temperature, message", (
    (((3, 4), (3, 5)), 0.1, "must all be"), (((3,), (3,)), 0.1, "must all be"), (((3, 4), (3, 4)), 0.0, "above 0"),
    (((3, 4), (3, 4)), float("nan"), "above 0")))
def test_bad_input(shapes, temperature, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(torch.zeros(shapes[0]), torch.zeros(shapes[1]), temperature)


# ---------------------------------------------------------------------------------------------------- several processes

def model_and_pairs(n=8):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4)).double()
    return model, torch.randn(2, n, 6, dtype=torch.float64)


def one_of_several(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model, pairs = model_and_pairs()
    pairs = pairs.chunk(world, dim=1)[rank]
    x1, x2 = pairs.clone().requires_grad_()
    ddp = DistributedDataParallel(model)
    h1, h2 = ddp(torch.cat([x1, x2])).chunk(2)
    loss = nt_xent(h1, h2)
    loss.backward()
    mean_loss = loss.detach().clone()
    dist.all_reduce(mean_loss)
    torch.save((mean_loss / world, [p.grad for p in model.parameters()]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", (2, 4))
def test_spread_over_processes(world, tmp_path):
    """Mean loss and DDP's mean gradient over processes are those of one process that holds the whole batch."""
    mp.spawn(one_of_several, args=(world, str(tmp_path)), nprocs=world)
    model, (x1, x2) = model_and_pairs()
    loss = nt_xent(model(x1), model(x2))
    loss.backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    for rank in range(world):
        mean_loss, gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert mean_loss.item() == pytest.approx(loss.item(), rel=1e-12)
        for p, gradient in zip(model.parameters(), gradients):
            assert (p.grad - gradient).norm() < 1e-12 * whole
