"""What the number of processes must not change: loss, gradient, batches, views, and --resume."""
import json
import shutil

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import probe
import train
from helpers import SMALL, assert_equal, in_processes, log_of, start, status_of, train_here
from hssl import allowed_pairs
from losses import AllGather, nt_xent

WORLDS = (1, 2, 4)
OBJECTIVES = (
    "--method h-ssl --group translation",
    "--method a-ssl --group rotation",
    "--method h-ssl --group scale --objective simsiam",
    "--method a-ssl --group translation --crop",
    "--method a-ssl --objective byol",
)


# ------------------------------------------------------------------------------ loss and gradient

def of_nt_xent(rank=0, world=1):
    """The value and gradients of a process's share of 8 images, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    views = torch.randn(2, 8, 6, dtype=torch.float64)
    ddp = model
    if dist.is_initialized():
        ddp = DistributedDataParallel(model)
    share = views.chunk(world, dim=1)[rank]
    h1, h2 = ddp(share.flatten(0, 1)).chunk(2)
    loss = nt_xent(h1, h2)
    loss.backward()
    value = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return {"mean loss": value / world} | {name: p.grad for name, p in model.named_parameters()}


def of_train(flags, rank=0, world=1):
    """The gradients of train.py's own module, for a process's share of 32 images, in float64.

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
    if dist.is_initialized():
        model = DistributedDataParallel(objective)
    model(x, g1, g2).backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}


def one_of_several(rank, world, folder):
    dist.init_process_group("gloo")
    found = {"nt_xent": of_nt_xent(rank, world)}
    for flags in OBJECTIVES:
        found[flags] = of_train(flags, rank, world)
    h = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = AllGather.apply(h)
    other = torch.ones(2 * world, 3, requires_grad=True)
    (2 * (gathered + other)).sum().backward()    # both are sent the same gradient
    found["gathered"] = gathered.detach()
    found["gradient"] = h.grad
    found["other's gradient"] = other.grad
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What each of 1, 2 and 4 processes computed: a list for each of these numbers."""
    folder = tmp_path_factory.mktemp("gradients")
    found = {}
    for world in WORLDS:
        in_processes(world, one_of_several, world, folder)
        found[world] = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    return found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("what", ("nt_xent", *OBJECTIVES))
def test_gradients_are_those_of_one_process(what, world, computed):
    """In every process to 1e-12 of the whole gradient's norm, and the mean loss too."""
    expected = of_nt_xent() if what == "nt_xent" else of_train(what)
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert size > 0
    for found in computed[world]:
        assert found[what].keys() == expected.keys()
        for name, value in expected.items():
            assert (found[what][name] - value).norm() < 1e-12 * size, name


@pytest.mark.parametrize("world", WORLDS)
def test_all_gather(world, computed):
    """Rows in the order of the processes; a row's gradient is the sum of all processes', and what
    came in is not changed."""
    rows = torch.arange(float(world)).repeat_interleave(2)
    for found in computed[world]:
        assert torch.equal(found["gathered"], rows[:, None].expand(-1, 3))
        assert torch.equal(found["gradient"], torch.full((2, 3), 2.0 * world))
        assert torch.equal(found["other's gradient"], torch.full((2 * world, 3), 2.0))


# --------------------------------------------------------------------------------- whole trainings

def record_run(rank, folder, world):
    """Run train.py and keep what its loss was given, step by step, and its first checkpoint."""
    recorded = []
    loss = train.h_ssl_loss
    write_whole = probe.write_whole
    first = folder / f"first-{world}"

    def recording_loss(f, h, I, group, x, g1, g2):
        recorded.append((x, g1, g2))
        return loss(f, h, I, group, x, g1, g2)

    def copying_write(path, content):
        write_whole(path, content)
        if str(path).endswith("checkpoint.pt") and not first.exists():
            shutil.copytree(path.parent, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "h_ssl_loss", recording_loss)
        patch.setattr(probe, "write_whole", copying_write)
        train_here(folder / f"run-{world}")
    has_result = (folder / f"run-{world}" / "probe.json").exists()
    torch.save(dict(recorded=recorded, has_result=has_result), folder / f"{world}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folders of three runs, run-1, run-2 and run-4, and what their losses were given."""
    folder = tmp_path_factory.mktemp("runs")
    record_run(0, folder, 1)
    for world in (2, 4):
        in_processes(world, record_run, folder, world)
    return folder


def recorded(folder, world):
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("world", (2, 4))
def test_batches_and_views_do_not_depend_on_the_processes(world, folder):
    """The shares put together are one process's batch: the same images and elements, in order."""
    alone = recorded(folder, 1)[0]["recorded"]
    shares = [found["recorded"] for found in recorded(folder, world)]
    assert len(alone) == 6 and len(alone[0][0]) == 64
    for step in range(6):
        for i in range(3):
            together = torch.cat([share[step][i] for share in shares])
            assert torch.equal(alone[step][i], together)


def test_an_epoch_sees_each_image_at_most_once(folder):
    """200 images in batches of 64: 192 different ones an epoch, and other eight are left out."""
    images = torch.cat([x for x, g1, g2 in recorded(folder, 1)[0]["recorded"]]).flatten(1)
    first = images[:192].unique(dim=0)
    second = images[192:].unique(dim=0)
    assert len(images) == 384 and len(first) == len(second) == 192
    assert len(images.unique(dim=0)) > 192


@pytest.mark.parametrize("world", (2, 4))
def test_the_log_of_several_processes(world, folder):
    """The steps and rates of one; the losses differ by batch norm alone, whose batch is smaller.
    No process leaves before the classifier is done: torchrun would end the others."""
    alone = log_of(folder / "run-1")
    together = log_of(folder / f"run-{world}")
    assert len(alone) == len(together) == 6
    for a, b in zip(alone, together):
        assert (a["epoch"], a["step"], a["lr"]) == (b["epoch"], b["step"], b["lr"])
        assert a["loss"] == pytest.approx(b["loss"], rel=0.03)
    assert all(found["has_result"] for found in recorded(folder, world))
    config = json.loads((folder / f"run-{world}" / "config.json").read_text())
    assert config["processes"] == world


def test_torchrun_trains_and_resumes(folder, tmp_path):
    """Two processes: the same run, bit for bit, from the start, and from its first checkpoint."""
    expected = torch.load(folder / "run-2" / "checkpoint.pt")
    shutil.copytree(folder / "first-2", tmp_path / "resumed")
    assert len(log_of(tmp_path / "resumed")) == 3
    for name, resume in (("new", []), ("resumed", ["--resume"])):
        out = tmp_path / name
        process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                        "train.py", *SMALL, "--out", out, *resume)
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert printed.count("epoch 2/2") == 1 and ("epoch 1/2" in printed) == (name == "new")
        found = torch.load(out / "checkpoint.pt")
        for key in ("encoder", "objective", "optimizer", "step"):
            assert_equal(found[key], expected[key])
        for line, other in zip(log_of(out), log_of(folder / "run-2"), strict=True):
            assert line["loss"] == other["loss"]


@pytest.mark.parametrize("flags, world", (
    ("--batch-size 2", 2), ("--batch-size 2 --objective byol", 2), ("--batch-size 64", 3),
    ("--batch-size 64", 64)))
def test_a_process_needs_two_images(flags, world, monkeypatch, tmp_path, capsys):
    """One line and status 2, before anything is started."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert status_of(train_here, tmp_path, *flags.split()) == 2
    error = capsys.readouterr().err
    assert f"cannot be shared by {world} processes" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
