"""The objectives against their formulas written as loops, and one process against several, in float64."""
import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from helpers import in_processes
from losses import AllGather, Predictor, byol, multi_view_nt_xent, nt_xent, simsiam


def by_the_formula(views, temperature):
    """Mean over all V·N projections a, and over the V - 1 other views p of a's image, of
    -log( e^(a·p/τ) / Σ over the other V·N - 1 projections b of e^(a·b/τ) )."""
    h = [(image, row / row.norm()) for view in views for image, row in enumerate(view)]
    terms = []
    for i, (image, a) in enumerate(h):
        others = [(same, math.exp(float(a @ b) / temperature)) for j, (same, b) in enumerate(h) if j != i]
        terms += [-math.log(e / sum(e for _, e in others)) for same, e in others if same == image]
    assert len(terms) == len(h) * (len(views) - 1)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("n, temperature", ((1, 0.5), (2, 0.1), (7, 0.1), (7, 1.0)))
@pytest.mark.parametrize("count", (2, 3, 5))
def test_formula(count, n, temperature):
    torch.manual_seed(0)
    views = torch.randn(count, n, 5, dtype=torch.float64)
    expected = pytest.approx(by_the_formula(views, temperature), rel=1e-12, abs=1e-12)
    assert multi_view_nt_xent(*views, temperature=temperature).item() == expected
    if count == 2:
        assert nt_xent(*views, temperature).item() == expected


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    h1, h2 = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(nt_xent, (h1, h2))
    assert torch.autograd.gradcheck(multi_view_nt_xent, (h1, h2, (h1 + h2).detach().requires_grad_()))


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
    with pytest.raises(ValueError, match="two or more"):
        multi_view_nt_xent(torch.zeros(3, 4))


# -------------------------------------------------------------------------------------------------- without negatives

def test_simsiam_and_byol_formulas():
    """-½ mean cos - ½ mean cos; summed squared distances of unit vectors. Only predictions get a gradient."""
    torch.manual_seed(0)
    p1, p2, h1, h2 = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True).unbind()
    rows = [(a.detach(), b.detach()) for p, h in ((p1, h2), (p2, h1)) for a, b in zip(p, h)]
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in rows]
    squares = [float((a / a.norm() - b / b.norm()).square().sum()) for a, b in rows]
    assert simsiam(p1, p2, h1, h2).item() == pytest.approx(-sum(cosines) / 12, rel=1e-12)
    assert byol(p1, p2, h1, h2).item() == pytest.approx(sum(squares) / 6, rel=1e-12)
    for loss in (simsiam, byol):
        gradients = torch.autograd.grad(loss(p1, p2, h1, h2), (p1, p2, h1, h2), allow_unused=True)
        assert all(g.norm() > 0 for g in gradients[:2]) and gradients[2:] == (None, None)


def test_simsiam_is_in_float32_inside_autocast():
    torch.manual_seed(0)
    p1, p2, h1, h2 = torch.randn(4, 16, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = simsiam(p1, p2, h1, h2)
    assert loss.dtype == torch.float32 and loss.item() == simsiam(p1.float(), p2.float(), h1.float(), h2.float()).item()


def test_predictor():
    """It learns to predict a fixed linear map of its input, which it starts without."""
    torch.manual_seed(0)
    q, h = Predictor(6, 64), torch.randn(256, 6)
    target = h @ torch.randn(6, 6)
    optimizer, losses = torch.optim.Adam(q.parameters(), 0.01), []
    for _ in range(100):
        losses.append(simsiam(q(h), q(h), target, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > -0.3 and losses[-1] < -0.9


# -------------------------------------------------------------------------------------------------- several processes

def model_and_views(n=8):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4)).double()
    return model, torch.randn(3, n, 6, dtype=torch.float64)


def loss_of(model, views, count):
    h = model(views[:count].flatten(0, 1)).chunk(count)
    return nt_xent(*h) if count == 2 else multi_view_nt_xent(*h)


def one_of_several(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model, views = model_and_views()
    found = {}
    for count in (2, 3):
        ddp = DistributedDataParallel(model)
        model.zero_grad()
        loss = loss_of(ddp, views.chunk(world, dim=1)[rank], count)
        loss.backward()
        mean_loss = loss.detach().clone()
        dist.all_reduce(mean_loss)
        found[count] = mean_loss / world, [p.grad.clone() for p in model.parameters()]
    h, other = torch.ones(2, 3, requires_grad=True), torch.ones(2 * world, 3, requires_grad=True)
    (2 * (AllGather.apply(h) + other)).sum().backward()                        # both are sent the same gradient
    found["gathered"] = h.grad, other.grad
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", (2, 4))
def test_spread_over_processes(world, tmp_path):
    """The mean over processes of loss and gradient (by DDP) is that of one process with all images; 2 and 3 views."""
    in_processes(world, one_of_several, world, str(tmp_path))
    model, views = model_and_views()
    for count in (2, 3):
        model.zero_grad()
        loss = loss_of(model, views, count)
        loss.backward()
        whole = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for rank in range(world):
            mean_loss, gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[count]
            assert mean_loss.item() == pytest.approx(loss.item(), rel=1e-12)
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                assert (p.grad - gradient).norm() < 1e-12 * whole
    gathered, other = torch.load(tmp_path / "0.pt", weights_only=True)["gathered"]
    assert (gathered == 2 * world).all() and (other == 2).all()                # the sum is not put into what came in
