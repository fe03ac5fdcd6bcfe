"""What the number of processes must not change: the batches, the views, the log, and the gradient."""
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import probe
import run
import train
from helpers import SMALL, draw_few_glyphs, free_port, in_processes, like_torchrun, log_of, train_here
from hssl import allowed_pairs, drawn_sets

GRADIENTS = [f"--method {m} --group {g}" for m in ("h-ssl", "a-ssl") for g in ("translation", "rotation", "scale")] + [
    "--group rotation --views 3", "--group translation --method a-ssl --crop", "--objective simsiam",
    "--objective byol --method a-ssl"]


def record_run(folder, rank, world, method):
    """Run train.main and keep what its loss was given: a list of (x, g1, g2), one per step.

    The learning rate is too small to change any weight.
    """
    seen, name = [], method.replace("-", "_") + "_loss"
    loss = getattr(train, name)

    def watched(f, h, I, group, x, g1, g2):
        seen.append((x, g1, g2))
        return loss(f, h, I, group, x, g1, g2)

    with pytest.MonkeyPatch.context() as patch:
        draw_few_glyphs(patch)
        patch.setattr(train, name, watched)
        classify = probe.write_result
        patch.setattr(probe, "write_result", lambda *arguments: time.sleep(world > 1) or classify(*arguments))
        train_here(folder / f"{method}-{world}", "--method", method, "--lr", "1e-9")
    torch.save(seen, folder / f"{method}-{world}-{rank}.pt")
    (folder / f"{method}-{world}-{rank}.left").write_text(str((folder / f"{method}-{world}" / "probe.json").exists()))


def gradient(flags, rank=0, world=1):
    """A step's gradient in float64 for this process's share of 32 images, through DistributedDataParallel if there are
    several.

    Batch norm uses its running statistics: to use the batch's it would have to be SyncBatchNorm, which needs CUDA.
    """
    args = train.parse([*SMALL, *flags.split()])
    torch.manual_seed(0)
    images, labels = torch.randint(256, (32, 1, 28, 28), dtype=torch.uint8), torch.zeros(32, dtype=torch.int64)
    some = data.Dataset(images, labels, images, labels, classes=10, mean=0.0, std=0.3)
    encoder, group = run.build(vars(args), 1, 28)
    objective = train.make_objective(args, encoder, group, some).double().eval()
    sets = group.elements[allowed_pairs(group) if args.views == 2 else drawn_sets(group, args.views)]    # (P, V, ...)
    mine = torch.arange(32).chunk(world)[rank]
    g = sets[torch.randint(len(sets), (32,))[mine]].unbind(1)
    model = DistributedDataParallel(objective) if world > 1 else objective
    model(some.batch(some.train_images, mine).double(), *g).backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}


def frozen():
    """What train.py measures before the first step, of 2,500 glyphs in three chunks: top-1, and batch norm's state."""
    args = train.parse(SMALL)
    torch.manual_seed(0)
    some = data.glyphs(train=2500, test=500)
    encoder, _ = run.build(vars(args), 1, 28)
    result = probe.probe_frozen(vars(args), encoder, some)
    features = probe.extract(encoder.eval(), some, some.test_images, grid=2)
    return dict(result=result, state=encoder.state_dict(), features=features)


def one_of_several(rank, world, folder, ports):
    for method, port in zip(("h-ssl", "a-ssl"), ports):
        like_torchrun(rank, world, port)
        record_run(folder, rank, world, method)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world)
    torch.save({flags: gradient(flags, rank, world) for flags in GRADIENTS}, folder / f"gradients-{world}-{rank}.pt")
    torch.save(frozen(), folder / f"frozen-{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What is compared below, made by 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("h-ssl", "a-ssl"):
        record_run(folder, 0, 1, method)
    for world in (2, 4):
        in_processes(world, one_of_several, world, folder, (free_port(), free_port()))
    return folder


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("method", ("h-ssl", "a-ssl"))
def test_batches_and_views_do_not_depend_on_the_processes(method, world, folder):
    """Step by step, the shares put together are one process's batch: the same images, in order, with the same g's."""
    alone = torch.load(folder / f"{method}-1-0.pt", weights_only=True)
    shares = [torch.load(folder / f"{method}-{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    assert len(alone) == 6 and all(len(share) == 6 for share in shares)
    for whole, *parts in zip(alone, *shares):
        for expected, *pieces in zip(whole, *parts):
            assert len(expected) == 64 and torch.equal(expected, torch.cat(pieces))


@pytest.mark.parametrize("method", ("h-ssl", "a-ssl"))
def test_two_processes_log_what_one_does(method, folder):
    """The same steps and rates, and losses that differ by the batch norms alone.

    Each process normalises its own 32 of the 64 images; nothing else differs, and that moves the loss by less than 2%
    of ln(127) (0.1 to 0.5% was seen).
    """
    for a, b in zip(log_of(folder / f"{method}-1"), log_of(folder / f"{method}-2"), strict=True):
        assert (a["epoch"], a["step"], a["lr"]) == (b["epoch"], b["step"], b["lr"])
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_the_last_incomplete_batch_is_left_out(folder):
    """200 images in batches of 64: an epoch's 3 steps see 192 different images, and each epoch leaves out other 8."""
    x = torch.cat([x for x, g1, g2 in torch.load(folder / "h-ssl-1-0.pt", weights_only=True)]).flatten(1)
    epochs = [{tuple(row.tolist()) for row in part} for part in x.split(192)]
    assert [len(epoch) for epoch in epochs] == [192, 192] and len(epochs[0] | epochs[1]) > 192


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("flags", GRADIENTS)
def test_gradients_are_those_of_one_process(flags, world, folder):
    """In every process, encoder, head and predictor: 1e-12 of the whole gradient's norm."""
    expected = gradient(flags)
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert size > 0
    for rank in range(world):
        found = torch.load(folder / f"gradients-{world}-{rank}.pt", weights_only=True)[flags]
        assert found.keys() == expected.keys()
        for name in expected:
            assert (found[name] - expected[name]).norm() < 1e-12 * size, name


@pytest.mark.parametrize("world", (2, 4))
def test_the_frozen_encoder_is_measured_together(world, folder):
    """Each process takes a share of the images, and all have one process's statistics, features and accuracy."""
    alone = frozen()
    shares = [torch.load(folder / f"frozen-{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    for share in shares:
        assert share["features"].shape == (500, 64) and abs(share["result"]["top1"] - alone["result"]["top1"]) < 0.5
        assert abs(share["result"]["neighbours"] - alone["result"]["neighbours"]) < 0.5
        torch.testing.assert_close(share["features"], alone["features"], rtol=1e-4, atol=1e-5)
        for name, value in alone["state"].items():
            if "num_batches" not in name:
                torch.testing.assert_close(share["state"][name], value, rtol=1e-5, atol=1e-6)
    chunks = [share["state"]["1.2.num_batches_tracked"].item() for share in shares]
    assert sum(chunks) == 3 and max(chunks) < 3


@pytest.mark.parametrize("world", (2, 4))
def test_no_process_leaves_before_the_classifier_is_done(world, folder):
    """torchrun ends a job some minutes after its first process has left: main returns once probe.json is there."""
    for method in ("h-ssl", "a-ssl"):
        left = [(folder / f"{method}-{world}-{rank}.left").read_text() for rank in range(world)]
        assert left == ["True"] * world
