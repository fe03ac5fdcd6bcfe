"""What the number of processes must not change: loss and gradient (but for batch norm, which is
synchronised on GPUs only), batches, views, and restarts."""
import json
import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import train
from helpers import ROOT, SMALL, assert_equal, in_processes, log_of, start, status_of, train_here
from hssl import allowed_pairs
from losses import AllGather

worlds = pytest.mark.parametrize("world", (2, 4))
OBJECTIVES = (
    "--method h-ssl --group translation",
    "--method a-ssl --group rotation",
    "--method h-ssl --group scale --objective simsiam",
    "--method a-ssl --objective byol",
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
    torch.manual_seed(0)
    group, objective = train.make_objective(args, images)
    objective.double().eval()
    pairs = allowed_pairs(group)
    pairs = pairs[torch.randint(len(pairs), (32,))]
    share = torch.arange(32).chunk(world)[rank]
    x = images.batch(images.train_images, share).double()
    g1, g2 = group.elements[pairs[share]].unbind(1)
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
    """All of these, and AllGather: a row's gradient is the sum of all processes', and what came in
    is not changed."""
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
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What each of 2 and 4 processes computed: a list for each of these numbers."""
    folder = tmp_path_factory.mktemp("gradients")
    found = {}
    for world in (2, 4):
        in_processes(world, one_of_several, world, folder)
        found[world] = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    return found


@worlds
@pytest.mark.parametrize("flags", OBJECTIVES)
def test_gradients_are_those_of_one_process(flags, world, computed):
    """In every process to 1e-12 of the whole gradient's norm, and the mean loss too."""
    expected = of_train(flags)
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert size > 0
    for found in computed[world]:
        assert found[flags].keys() == expected.keys()
        for name, value in expected.items():
            assert (found[flags][name] - value).norm() < 1e-12 * size, name


def record_run(rank, folder, world):
    """Run train.py and keep what its loss was given, step by step: images, elements, weights."""
    recorded = []
    loss = train.h_ssl_loss

    def recording_loss(f, h, I, group, x, g1, g2):
        weights = [parameter.detach().flatten() for parameter in (*f.parameters(), *h.parameters())]
        recorded.append((x, g1, g2, torch.cat(weights)))
        return loss(f, h, I, group, x, g1, g2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "h_ssl_loss", recording_loss)
        train_here(folder / f"run-{world}")
    # No process may leave before the classifier is done: torchrun would end the others.
    assert (folder / f"run-{world}" / "probe.json").exists()
    torch.save(recorded, folder / f"{world}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folders of three runs, run-1, run-2 and run-4, and what their losses were given."""
    folder = tmp_path_factory.mktemp("runs")
    record_run(0, folder, 1)
    for world in (2, 4):
        in_processes(world, record_run, folder, world)
    return folder


@worlds
def test_batches_and_views_do_not_depend_on_the_processes(world, folder):
    """The shares put together are one process's batch: the same images and elements, in order. An
    epoch's three batches of 64 hold 192 of the 200 images. All processes have the same weights."""
    alone = torch.load(folder / "1-0.pt")
    shares = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    assert len(alone) == 6
    for step in range(6):
        for i in range(3):
            together = torch.cat([share[step][i] for share in shares])
            assert torch.equal(alone[step][i], together)
        for share in shares:
            assert torch.equal(share[step][3], shares[0][step][3])
    epoch = torch.cat([alone[0][0], alone[1][0], alone[2][0]])
    assert len(epoch.flatten(1).unique(dim=0)) == 192
    lines = log_of(folder / f"run-{world}")
    expected = log_of(folder / "run-1")
    for name in ("step", "lr"):
        assert [line[name] for line in lines] == [line[name] for line in expected]
    assert json.loads((folder / f"run-{world}" / "config.json").read_text())["processes"] == world


# The second process dies in its fifth step, but not when torchrun has started both again.
DYING = """
import os
import signal

import train

schedule = train.schedule

def dying(step, warmup, total):
    if step == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return schedule(step, warmup, total)

train.schedule = dying
train.main(train.parse())
"""


def test_torchrun_starts_again(folder, tmp_path):
    """Two processes, of which one dies, go on from their first checkpoint, and end equal to two
    that were left alone, bit for bit."""
    program = tmp_path / "dying.py"
    program.write_text(DYING)
    out = tmp_path / "restarted"
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    "--max-restarts=1", program, *SMALL, "--out", out, "--resume",
                    env=os.environ | dict(PYTHONPATH=str(ROOT)))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert printed.count("epoch 1/2") == 1
    assert printed.count("epoch 2/2") == 1
    assert printed.count("CPU: 2 x 32 images a step") == 2
    found = torch.load(out / "checkpoint.pt")
    expected = torch.load(folder / "run-2" / "checkpoint.pt")
    for key in ("encoder", "objective", "optimizer", "step"):
        assert_equal(found[key], expected[key])


@pytest.mark.parametrize("flags, world", (
    ("--batch-size 2 --objective byol", 2),
    ("--batch-size 64", 3),
))
def test_a_process_needs_two_images(flags, world, monkeypatch, tmp_path, capsys):
    """One line and status 2, before anything is started."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert status_of(train_here, tmp_path, *flags.split()) == 2
    error = capsys.readouterr().err
    assert f"cannot be shared by {world} processes" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_one_process_without_torchrun(monkeypatch, tmp_path, few_glyphs):
    """Whatever WORLD_SIZE a shell has: a step takes the whole batch."""
    train_here(tmp_path / "alone")
    monkeypatch.setenv("WORLD_SIZE", "2")
    train_here(tmp_path / "left")
    losses = []
    for name in ("alone", "left"):
        losses.append([line["loss"] for line in log_of(tmp_path / name)])
    assert losses[0] == losses[1]
