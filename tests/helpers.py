"""What several test files share: the smallest training, in this process or in several."""
import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import data
import train

ROOT = Path(__file__).resolve().parent.parent
# Three steps an epoch.
SMALL = ("--device cpu --train-images 200 --batch-size 64 --epochs 2 --widths 2 3 4 "
         "--head-widths 16 8 --probe-grid 1 --log-every 1 --save-every 1").split()

# Processes are forked from a server that has imported torch, once.
FORKS = mp.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "torch.nn.parallel"])


def train_here(out, *flags, **settings):
    """`python train.py FLAGS --out OUT` at the smallest size, but in this process; returns the
    last checkpoint. settings: such as no flag can make."""
    args = train.parse([*SMALL, "--out", str(out), *flags])
    vars(args).update(settings)
    train.main(args)
    return torch.load(out / "checkpoint.pt", weights_only=True)


def status_of(program, *arguments, **options):
    """The status with which a function ends the program."""
    with pytest.raises(SystemExit) as stop:
        program(*arguments, **options)
    return stop.value.code


def one_line(capsys, status, program, *arguments, **options):
    """The one line with which a function ends the program, with this status; argparse's usage may
    stand before it."""
    capsys.readouterr()
    assert status_of(program, *arguments, **options) == status
    *usage, line = capsys.readouterr().err.splitlines()
    assert usage == [] or usage[0].startswith("usage: ") and len(usage) < 3
    return line


def refusal(capsys, program, *arguments):
    return one_line(capsys, 2, program, *arguments)


def draw_few_glyphs(patch, seed=0, draw=data.glyphs):
    """--dataset glyphs has 200 training and 100 test images: where the numbers do not matter."""
    few = draw(train=200, test=100, seed=seed)

    def glyphs():
        return few

    patch.setattr(data, "glyphs", glyphs)


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_equal(a, b):
    """Two nests of dicts, lists, tensors and numbers are equal, bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def in_processes(world, function, *arguments):
    """function(rank, *arguments) in `world` processes, which see what torchrun would set."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_one_process, (world, port, function, *arguments), nprocs=world,
                       start_method="forkserver")


def exit_code(function, *arguments):
    """function(*arguments) in a process of its own; returns how that ended."""
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def _one_process(rank, world, port, function, *arguments):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    function(rank, *arguments)
