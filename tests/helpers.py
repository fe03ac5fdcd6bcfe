"""What several test files share: the smallest training, in this process or in several."""
import json
import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing as mp

import data
import run
import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--device cpu --train-images 200 --batch-size 64 --epochs 2 --widths 2 3 4 --kernel-size 5 "        # 3 steps
         "--probe-iterations 9 --log-every 1 --save-every 1").split()                                        # an epoch


def train_here(out, *flags):
    """`python train.py FLAGS --out OUT` at the smallest size, but in this process; returns the last checkpoint."""
    run.call(train.main, train.parse([*SMALL, "--out", str(out), *flags]))
    return torch.load(out / "checkpoint.pt", weights_only=True)


def draw_few_glyphs(patch):
    """--dataset glyphs has 200 training and 100 test images: for runs whose classifier does not matter."""
    few = data.glyphs(train=200, test=100)
    patch.setattr(data, "glyphs", lambda: few)


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def in_processes(world, function, *arguments):
    """function(rank, *arguments) in `world` processes, forked from a server that has imported torch."""
    mp.get_context("forkserver").set_forkserver_preload(["torch._dynamo", "torch.nn.parallel"])
    mp.start_processes(_alone, (function, *arguments), nprocs=world, start_method="forkserver")


def _alone(rank, function, *arguments):
    torch.set_num_threads(1)
    function(rank, *arguments)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def like_torchrun(rank, world, port):
    """Set what torchrun sets in the environment of a process."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))
