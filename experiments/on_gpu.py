"""Everything that only a GPU can show, in one list: what someone with a GPU runs first.

    python experiments/on_gpu.py                                the list
    python experiments/on_gpu.py --device cpu --smallest        the same list at toy size, to see that it works
    python experiments/on_gpu.py --steps memory benchmark       some of it

Each step writes OUT/STEP.json when it is done and is then not done again: started once more, the list goes on where it
stopped, a training from its last checkpoint. A step that fails is a row that says so, and is tried again next time. In
the end OUT/on_gpu.json holds all steps, and a table is printed. Exit status 1 if a step failed.
"""
import argparse
import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from runs import ROOT, commit, machine                                         # first: it finds the project's modules
import data as datasets
import measure
import run
import train
from hssl import allowed_pairs
from layers import GroupConv2d, ResidualBlock, steerable_basis

METHODS = ("h-ssl", "a-ssl", "supervised")                                     # that train
# Of every training in the list, and of the short ones that are compared.
TOY = "--train-images 200 --batch-size 64 --widths 2 3 4 --probe-iterations 9"
TINY = f"{TOY} --epochs 1 --train-images 48 --batch-size 16"                    # 3 steps
SHORT = "--dataset mnist --epochs 3 --batch-size 1024 --warmup-epochs 1 --log-every 1 --probe-iterations 50"
SMALLEST_SHORT = f"--dataset glyphs --epochs 3 --warmup-epochs 1 --log-every 1 {TOY}"


# -------------------------------------------------------------------------------------------------------- what steps do
def command(args, flags, out):
    return ["train.py", *shlex.split(flags), "--device", args.device, "--data-dir", args.data_dir, "--out", str(out)]


def train_here(args, flags, name):
    """Train in this process, or go on with it: seconds, losses by step, images/s, and what probe.json holds."""
    out, began, before = args.out / "trainings" / name, time.perf_counter(), torch.backends.fp32_precision
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(train.parse([*command(args, flags, out)[1:], "--resume"]))
    finally:
        torch.backends.fp32_precision = before                                 # which --amp off changes
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return dict(flags=flags, seconds=round(time.perf_counter() - began, 1), losses=[line["loss"] for line in log],
                images_per_second=[line["images_per_second"] for line in log], overflows=log[-1]["overflows"],
                **json.loads((out / "probe.json").read_text()))


def last_loss(out):
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["loss"]


def wait_for_steps(out, steps, process):
    """Until a training has logged so many steps and saved."""
    def logged():
        path = out / "log.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() and (out / "checkpoint.pt").exists() else 0
    while logged() < steps:
        if process.poll() is not None:
            raise RuntimeError(f"the training ended too early, with status {process.returncode}")
        time.sleep(0.01)


def new_folder(args, name):
    return args.out / "trainings" / f"{name}-{time.time():.0f}"                # an earlier try's may be there


def start(words):
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def finish(process, status=0):
    """Wait for a process, and return what it printed; its exit status must be this."""
    printed = process.communicate()[0]
    if process.returncode != status:
        raise RuntimeError(f"status {process.returncode} in place of {status}:\n{printed[-2000:]}")
    return printed


# ------------------------------------------------------------------------------------------------------------ the steps
def tests(args):
    """all tests of the project"""
    what = ["tests/test_style.py"] if args.smallest else ["test_equivariance.py", "tests"]
    return finish(start(["-m", "pytest", "-q", *what])).splitlines()[-1], {}


def waits(args):
    """how often a training step waits for the GPU, for every method, group, objective and precision"""
    found = {}
    kinds = [f"--method {method} --group {group}" for method in METHODS for group in train.GROUPS]
    kinds += ["--objective simsiam", "--objective byol", "--views 4", "--group translation --method a-ssl --crop"]
    for flags in kinds:
        for amp in ("float16",) if args.smallest else ("float16", "bfloat16", "off"):
            found[f"{flags} --amp {amp}"] = max(measure.waits(f"{flags} --amp {amp} {TINY}", args.device))
    return f"at most {max(found.values())} in a step, {len(found)} settings", found


def precisions(args):
    """three epochs in float16, bfloat16 and float32: largest difference of a loss from float32's"""
    found, worst = {}, dict(float16=0.0, bfloat16=0.0)
    for method in METHODS[:1] if args.smallest else METHODS:
        for group in ("rotation",) if args.smallest else train.GROUPS:
            losses = {}
            for amp in ("off", *worst):
                flags = f"{args.short} --method {method} --group {group} --amp {amp}"
                losses[amp] = train_here(args, flags, f"precision-{method}-{group}-{amp}")["losses"]
            found[f"{method} {group}"] = losses
            for amp in worst:
                differences = [abs(a / b - 1) for a, b in zip(losses[amp], losses["off"], strict=True)]
                worst[amp] = max(worst[amp], *differences)
    return ", ".join(f"{amp} {difference:.1e}" for amp, difference in worst.items()), found


def paper(args, group, method):
    """the paper's MNIST run, 500 epochs of batch 4096: minutes, top-1 before and after"""
    flags = f"--dataset mnist --method {method} --group {group}"
    found = train_here(args, f"{args.short} --method {method} --group {group}" if args.smallest else flags,
                       f"paper-{group}-{method}")
    rate = sorted(found["images_per_second"])[len(found["images_per_second"]) // 2]
    return (f"{found['seconds'] / 60:.1f} min in this session, {rate:,.0f} images/s, frozen {found['frozen_top1']:.2f} "
            f"%, trained {found['top1']:.2f} %, {found['overflows']} overflows"), found


def interrupted(args):
    """SIGTERM and --resume: the last loss, and that of an undisturbed training"""
    flags = f"{args.short} --epochs 12 --save-every 1"
    out, straight = new_folder(args, "interrupted"), new_folder(args, "straight")
    process, other = start(command(args, flags, out)), start(command(args, flags, straight))
    wait_for_steps(out, 5, process)
    process.terminate()
    (said,) = re.findall(r"saved after step \d+", finish(process, 128 + signal.SIGTERM))
    finish(start([*command(args, flags, out), "--resume"]))
    finish(other)
    return f"{said}, then {last_loss(out):.7g}; undisturbed {last_loss(straight):.7g}", {}


def torchrun(args):
    """one process under torchrun (nccl on a GPU): SIGTERM, then SIGKILL with --max-restarts=1"""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "--max-restarts=1"]

    def begin(name):
        out = new_folder(args, name)
        process = start([*launcher, *command(args, f"{args.short} --epochs 12 --save-every 1", out)])
        wait_for_steps(out, 5, process)
        return process

    killed = begin("killed")
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    (worker,) = (int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    terminated = begin("terminated")
    terminated.terminate()
    (said,) = re.findall(r"saved after step \d+", finish(terminated, 1))
    (top1,) = re.findall(r"top-1 on .*", finish(killed))
    return f"SIGTERM: {said}; SIGKILL: restarted, {top1}", {}


def synchronised_gradient(rank, world, folder, port):
    """A step's gradient in float32, of encoder and head in training mode, for this process's share of 64 images."""
    torch.cuda.set_device(0)
    torch.backends.fp32_precision = "ieee"
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    args = train.parse("--device cuda --amp off --widths 8 16 32".split())
    torch.manual_seed(0)
    images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8, device="cuda")
    some = datasets.Dataset(images, None, images, None, 10, 0.0, 0.3)
    encoder, group = run.build(vars(args), 1, 28)
    objective = train.make_objective(args, encoder, group, some).cuda()
    model = objective
    if world > 1:
        model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(objective), device_ids=[0])
    mine = torch.arange(64, device="cuda").chunk(world)[rank]
    pairs = allowed_pairs(group)
    g = group.elements[pairs[torch.randint(len(pairs), (64,))]].to("cuda")[mine].unbind(1)
    model(some.batch(images, mine), *g).backward()
    gradient = torch.cat([p.grad.flatten() for p in objective.parameters()]).cpu()
    torch.save(gradient, Path(folder) / f"gradient-{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def sync_batch_norm(args):
    """SyncBatchNorm: the gradient of two processes on one GPU (gloo), against one process's"""
    if args.device == "cpu":
        return "not run: SyncBatchNorm needs a GPU", {}
    for world, port in ((1, 29511), (2, 29512)):
        mp.spawn(synchronised_gradient, (world, str(args.out), port), nprocs=world)
    one, *two = (torch.load(args.out / f"gradient-{world}-{rank}.pt") for world, rank in ((1, 0), (2, 0), (2, 1)))
    errors = [((gradient - one).norm() / one.norm()).item() for gradient in two]
    if max(errors) > 1e-4:
        raise RuntimeError(f"relative errors {errors}")
    return f"relative error {max(errors):.1e}", dict(errors=errors)


def huge(args):
    """two residual blocks whose tensors have 2**31 elements, forward and backward, against halves of the batch"""
    side, images = (8, 4) if args.smallest or args.device == "cpu" else (64, 1024)
    torch.manual_seed(0)
    basis = steerable_basis("rotation", 4, 7)
    blocks = nn.Sequential(*(
        ResidualBlock(128, channels, down, lambda c_in, c_out: GroupConv2d(c_in, c_out, basis, 4, True, bias=False))
        for channels, down in ((128, False), (8, True))))
    blocks = blocks.to(args.device).eval()                                     # so that halves are independent
    x = torch.randn(images, 4, 128, side, side, dtype=torch.float16 if args.device == "cuda" else torch.float32,
                    device=args.device)

    def both_ways(x):
        x = x.detach().requires_grad_()
        with run.precision(args.device, "float16" if args.device == "cuda" else "off"):
            y = blocks(x.transpose(1, 2))
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return y.detach(), gradient

    whole, error = both_ways(x), 0.0
    for k, half in enumerate(x.chunk(2)):
        for a, b in zip(whole, both_ways(half)):
            error = max(error, ((a.chunk(2)[k] - b).float().norm() / b.float().norm()).item())
    if error > 1e-2:                                                           # a wrong index gives some 1
        raise RuntimeError(f"relative error {error}")
    return f"{x.numel() / 2**31:.3g} x 2**31 elements, relative error {error:.1e}", {}


def memory(args):
    """most memory of a step with 512 images a GPU (batch 4096 on 8): H-SSL, A-SSL, and with recomputed activations"""
    found = {}
    for dataset in ("mnist",) if args.smallest else ("mnist", "cifar10", "tiny-imagenet"):
        for group in train.GROUPS:
            for method in ("h-ssl", "a-ssl"):
                for extra in ("",) if dataset == "mnist" else ("", " --checkpoint-activations"):
                    flags = f"--dataset {dataset} --group {group} --method {method}{extra}"
                    found[flags] = round(step_peak(args, flags) / 2**30, 2)
    return f"at most {max(found.values()):.3g} GiB", found


def step_peak(args, flags):
    if args.device == "cpu":
        return measure.step_memory(flags, 512)[0]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step, _, _ = measure.training_step(f"{flags} --batch-size 512", args.device)
    step()
    return torch.cuda.max_memory_reserved()                                    # with what convolutions work in


def benchmark(args):
    """all parts of benchmark.py, into OUT/benchmark.md"""
    options = ["--device", args.device, *(["--parts", "c", "--rounds", "1"] if args.smallest else [])]
    printed = finish(start(["experiments/benchmark.py", *options]))
    (args.out / "benchmark.md").write_text(printed)
    return f"{printed.count('| --- |')} tables in {args.out / 'benchmark.md'}", dict(printed=printed)


STEPS = dict(tests=tests, waits=waits, precisions=precisions)
for method in ("h-ssl", "a-ssl"):
    for group in train.GROUPS:
        STEPS[f"paper-{group}-{method}"] = lambda args, g=group, m=method: paper(args, g, m)
STEPS |= dict(interrupted=interrupted, torchrun=torchrun, sync_batch_norm=sync_batch_norm, huge=huge, memory=memory,
              benchmark=benchmark)


def take(name, args):
    """Do a step, unless it is done; returns its record."""
    path = args.out / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    print(f"{name} ...", file=sys.stderr, flush=True)
    began = time.perf_counter()
    try:
        result, details = STEPS[name](args)
    except (Exception, SystemExit):
        return dict(result="FAILED", details=traceback.format_exc())
    record = dict(result=result, seconds=round(time.perf_counter() - began, 1), details=details)
    path.write_text(json.dumps(record) + "\n")
    return record


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    p.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is a GPU)")
    p.add_argument("--smallest", action="store_true", help="toy size: shows that the list works, and nothing else")
    p.add_argument("--out", type=Path, default=Path("runs/on_gpu"), help="folder of all that is written (%(default)s)")
    p.add_argument("--data-dir", default="datasets", help="where data sets are, or are downloaded to (%(default)s)")
    args = p.parse_args()
    args.device = run.choose_device(args.device)
    args.out, args.data_dir = args.out.resolve(), str(Path(args.data_dir).resolve())
    args.short = SMALLEST_SHORT if args.smallest else SHORT
    args.out.mkdir(parents=True, exist_ok=True)
    few = datasets.glyphs(200, 100) if args.smallest else None
    with mock.patch.object(datasets, "glyphs", lambda: few) if few else contextlib.nullcontext():
        records = {name: take(name, args) for name in args.steps}
    where = dict(machine=machine(), torch=torch.__version__, commit=commit(), smallest=args.smallest)
    (args.out / "on_gpu.json").write_text(json.dumps(where | dict(steps=records), indent=1) + "\n")
    print(f"\n{where['machine']}, torch {where['torch']}, commit {where['commit']}")
    measure.header("step", "result", "seconds")
    for name, record in records.items():
        measure.row(name, record["result"], record.get("seconds", ""))
    failed = {name: record["details"] for name, record in records.items() if record["result"] == "FAILED"}
    for name, details in failed.items():
        print(f"\n{name} failed:\n{details}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
