"""What any number of processes must leave unchanged: the batches, the views, and the gradient."""
import contextlib
import io
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import data
import train
from hssl import allowed_sets
from probe import build

SMALL = "--device cpu --train-images 200 --batch-size 64 --epochs 2 --widths 2 3 4 --probe-epochs 1".split()      # 3 steps an epoch


GRADIENTS = [f"--method {m} --group {g}" for m in ("h-ssl", "a-ssl") for g in ("translation", "rotation", "scale")] + [
    "--group rotation --window 5 --views 3", "--group translation --method a-ssl --crop", "--objective simsiam", "--objective byol --method a-ssl"]


def record_run(folder, rank, world, method):
    """Run train.main and keep what its loss was given: a list of (x, g1, g2), one per step."""
    seen, name = [], method.replace("-", "_") + "_loss"
    loss = getattr(train, name)

    def watched(f, h, I, group, x, g1, g2):
        seen.append((x, g1, g2))
        return loss(f, h, I, group, x, g1, g2)

    setattr(train, name, watched)
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(train.parse([*SMALL, "--method", method, "--out", f"{folder}/{method}-{world}"]))
    setattr(train, name, loss)
    torch.save(seen, f"{folder}/{method}-{world}-{rank}.pt")


def gradient(flags, rank=0, world=1):
    """A step's gradient in float64, batch norm at its running statistics (in training mode it would need SyncBatchNorm,
    which is for CUDA alone), for this process's share of 32 images; under DistributedDataParallel if there are several."""
    args = train.parse([*SMALL, *flags.split()])
    torch.manual_seed(0)
    images, labels = torch.randint(256, (32, 1, 28, 28), dtype=torch.uint8), torch.zeros(32, dtype=torch.int64)
    some = data.Dataset(images, labels, images, labels, classes=10, mean=0.0, std=0.3)
    encoder, moves = build(vars(args), 1, 28)
    objective = train.make_objective(args, encoder, moves, some).double().eval()
    sets = moves.elements[allowed_sets(moves, args.views)]                                          # (P, views, ...)
    mine = torch.arange(32).chunk(world)[rank]
    g = sets[torch.randint(len(sets), (32,))[mine]].unbind(1)
    model = DistributedDataParallel(objective) if world > 1 else objective
    model(some.batch(some.train_images, mine).double(), *g).backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}


def one_of_several(rank, world, folder, ports):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    for method, port in zip(("h-ssl", "a-ssl"), ports):
        os.environ["MASTER_PORT"] = str(port)
        record_run(folder, rank, world, method)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world)
    torch.save({flags: gradient(flags, rank, world) for flags in GRADIENTS}, f"{folder}/gradients-{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What is compared below, made by 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("h-ssl", "a-ssl"):
        record_run(folder, 0, 1, method)
    for world in (2, 4):
        with socket.socket() as a, socket.socket() as b:       # two ports that are free
            ports = [s.bind(("127.0.0.1", 0)) or s.getsockname()[1] for s in (a, b)]
        mp.spawn(one_of_several, args=(world, str(folder), ports), nprocs=world)
    return folder


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("method", ("h-ssl", "a-ssl"))
def test_batches_and_views_do_not_depend_on_the_processes(method, world, folder):
    """Step by step, the shares put together are one process's batch: the same images, in order, with the same g1 and g2."""
    alone = torch.load(folder / f"{method}-1-0.pt", weights_only=True)
    shares = [torch.load(folder / f"{method}-{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    assert len(alone) == 6 and all(len(share) == 6 for share in shares)
    for whole, *parts in zip(alone, *shares):
        for expected, *pieces in zip(whole, *parts):
            assert len(expected) == 64 and torch.equal(expected, torch.cat(pieces))


def test_the_last_incomplete_batch_is_left_out(folder):
    """200 images in batches of 64: 3 steps an epoch see 192 different images, and other 8 are left out in each epoch."""
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
