"""What the README promises about the files: its example runs, its flags exist, and components stand alone."""
import ast
import re
from pathlib import Path

import pytest
import torch

import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    scope = dict(torch=torch, x=torch.randn(4, 1, 28, 28))
    exec(example, scope)
    scope["loss"].backward()
    assert scope["loss"].item() > 0 and all(p.grad is not None for p in scope["f"].parameters())


def test_every_flag_exists():
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", README))
    known = set(re.findall(r'add(?:_argument)?\("(--[a-z0-9-]+)"', "".join(p.read_text() for p in [ROOT / "train.py", ROOT / "probe.py",
                                                                                     *(ROOT / "experiments").glob("*.py")])))
    torchrun = {"--standalone", "--nproc_per_node", "--nnodes", "--max-restarts", "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint"}
    slurm = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--signal"}
    assert flags - known - torchrun - slurm - {"--help"} == set()


@pytest.mark.parametrize("name", ("hssl", "layers", "losses", "lars", "data"))
def test_a_component_imports_none_of_its_neighbours(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported and not imported & {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("dataset, epochs", (("mnist", 500), ("cifar10", 1300), ("tiny-imagenet", 1300)))
def test_defaults_are_the_paper_s(dataset, epochs):
    """paper.md section 3: what `torchrun --nproc_per_node=8 train.py --dataset mnist` and the others run."""
    args = train.parse(["--dataset", dataset])
    assert (args.method, args.epochs, args.batch_size, args.lr, args.lr_per_256) == ("h-ssl", epochs, 4096, 0.1, False)
    assert (args.temperature, args.warmup_epochs, args.weight_decay, args.momentum, args.trust_coefficient) == (0.1, 10, 1e-4, 0.9, 0.001)
