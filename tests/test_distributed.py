"""What the number of processes must not change: loss and gradient (but for batch norm, which is
synchronised on GPUs only), batches, views, and what is printed."""
import contextlib
import io
import json

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import train
from helpers import (SMALL, assert_equal, draw_few_glyphs, in_processes, log_of, one_line,
                     train_here)
from losses import AllGather, nt_xent

worlds = pytest.mark.parametrize("world", (2, 4))
OBJECTIVES = (
    "--method h-ssl --group translation",
    "--method a-ssl --group rotation",
    "--method h-ssl --group scale",
)


def of_train(flags, rank=0, world=1):
    """The mean loss and the gradients of train.py's own module, for a process's share of 32
    images, in float64.

    Batch norm uses its running statistics: to use the batch's it would have to be SyncBatchNorm,
    which needs a GPU.
    """
    args = train.parse([*SMALL, *flags.split()])
    images = data.glyphs(train=32, test=1)
    args.image_shape = [1, 28]
    objective, pairs = train.make_objective(args, 10)
    objective.double().eval()
    pairs = pairs[torch.randint(len(pairs), (32,))]
    share = torch.arange(32).chunk(world)[rank]
    x = images.batch(images.train_images, share).double()
    g1, g2 = pairs[share].unbind(1)
    model = objective
    if world > 1:
        model = DistributedDataParallel(objective)
    loss = model(x, g1, g2)
    loss.backward()
    mean = train.mean_over_processes(loss)
    found = {"mean loss": torch.tensor(mean, dtype=torch.float64)}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.grad
    return found


def one_of_several(rank, world, folder):
    """All of these, and AllGather: a row's gradient is the sum of all processes', what came in is
    not changed, and there are no second derivatives."""
    dist.init_process_group("gloo")
    found = {}
    for flags in OBJECTIVES:
        found[flags] = of_train(flags, rank, world)
    h = torch.full((2, 3), float(rank), requires_grad=True)
    other = torch.ones(2 * world, 3, requires_grad=True)
    # Made before the gathering, so its backward comes after, with the same gradient of 2.
    earlier = 3 * other
    (2 * (AllGather.apply(h) + earlier)).sum().backward()
    assert (h.grad == 2 * world).all()
    assert (other.grad == 6).all()
    first, = torch.autograd.grad(nt_xent(h + 1, h), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@worlds
def test_gradients_are_those_of_one_process(world, tmp_path):
    """In every process to 1e-12 of the whole gradient's norm, and the mean loss too."""
    in_processes(world, one_of_several, world, tmp_path)
    for flags in OBJECTIVES:
        expected = of_train(flags)
        size = torch.cat([g.flatten() for g in expected.values()]).norm()
        assert size > 0
        for rank in range(world):
            found = torch.load(tmp_path / f"{world}-{rank}.pt")[flags]
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert (found[name] - value).norm() < 1e-12 * size, (flags, name)


def record_run(rank, folder, world):
    """Run train.py and keep what its loss was given, step by step: images, elements, weights; and
    what was printed."""
    recorded = []
    resumed = []
    printed = io.StringIO()
    loss = train.h_ssl_loss

    def recording_fit(args, data, model, pairs, plain_encoder, states, progress, patient):
        resumed.append([progress["step"], states["optimizer"].state_dict()])

    def recording_loss(f, h, I, group, x, g1, g2):
        weights = [parameter.detach().flatten() for parameter in (*f.parameters(), *h.parameters())]
        recorded.append((x, g1, g2, torch.cat(weights)))
        return loss(f, h, I, group, x, g1, g2)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        draw_few_glyphs(patch)
        patch.setattr(train, "h_ssl_loss", recording_loss)
        train_here(folder / f"run-{world}", "--eval-every", "2")
        # No process may leave before the classifier is done: torchrun would end the others.
        assert (folder / f"run-{world}" / "probe.json").exists()
        # Once more, the training is over: all processes go on from the first one's checkpoint.
        patch.setattr(train, "fit", recording_fit)
        train_here(folder / f"run-{world}", "--eval-every", "2", "--resume")
    torch.save((recorded, resumed, printed.getvalue()), folder / f"{world}-{rank}.pt")


@worlds
def test_batches_and_views_do_not_depend_on_the_processes(world, tmp_path):
    """The shares put together are one process's batch: the same images and elements, in order. An
    epoch's three batches of 64 hold 192 of the 200 images. All processes have the same weights, and
    only the first prints."""
    record_run(0, tmp_path, 1)
    in_processes(world, record_run, tmp_path, world)
    alone, _, printed_alone = torch.load(tmp_path / "1-0.pt")
    found = [torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world)]
    shares = [recorded for recorded, _, _ in found]
    checkpoint = torch.load(tmp_path / f"run-{world}" / "checkpoint.pt")
    for rank, (_, resumed, printed) in enumerate(found):
        assert_equal(resumed, [[6, checkpoint["optimizer"]]])
        assert printed.count("\n") == (printed_alone.count("\n") if rank == 0 else 0)
    assert len(alone) == 6
    for step in range(6):
        for i in range(3):
            together = torch.cat([share[step][i] for share in shares])
            assert torch.equal(alone[step][i], together)
        for share in shares:
            assert torch.equal(share[step][3], shares[0][step][3])
    epoch = torch.cat([alone[0][0], alone[1][0], alone[2][0]])
    assert len(epoch.flatten(1).unique(dim=0)) == 192
    lines = log_of(tmp_path / f"run-{world}")
    expected = log_of(tmp_path / "run-1")
    for name in ("step", "lr"):
        assert [line[name] for line in lines] == [line[name] for line in expected]
    assert ["held_out" in line for line in lines] == [False] * 5 + [True]
    starts = json.loads((tmp_path / f"run-{world}" / "config.json").read_text())["starts"]
    assert [(start["step"], start["processes"]) for start in starts] == [(0, world), (6, world)]


@pytest.mark.parametrize("flags, world", (("--batch-size 2", 2), ("--batch-size 64", 3)))
def test_a_process_needs_two_images(flags, world, monkeypatch, tmp_path, capsys, few_glyphs):
    def numbers():
        return 0, world

    monkeypatch.setattr(train, "rank_and_world", numbers)
    line = one_line(capsys, 2, train_here, tmp_path, *flags.split())
    assert f"cannot be shared by {world} processes" in line
    assert not list(tmp_path.iterdir())


def test_one_process_without_torchrun(monkeypatch):
    """Whatever WORLD_SIZE a shell has."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.start_processes(train.parse(["--device", "cpu"])) == (torch.device("cpu"), None)
    assert train.rank_and_world() == (0, 1)
