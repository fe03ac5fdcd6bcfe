"""train.py at the smallest size, on the CPU: what it prints and writes, methods, defaults."""
import contextlib
import io
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import data
import probe
import train
from helpers import ROOT, assert_equal, draw_few_glyphs, log_of, status_of, train_here
from losses import byol, move_target

pytestmark = pytest.mark.usefixtures("few_glyphs")
ONE_STEP = "--epochs 1 --batch-size 200".split()


# -------------------------------------------------------------------------------------- settings

PAPER = dict(batch_size=4096, lr=0.1, temperature=0.1, warmup_epochs=10, weight_decay=1e-4,
             momentum=0.9, trust_coefficient=0.001)


@pytest.mark.parametrize("dataset, backbone, widths, epochs", (
    ("mnist", "mnist", [32, 63, 95], 500),
    ("cifar10", "residual", [16, 128, 256, 512], 1300),
    ("tiny-imagenet", "residual", [16, 128, 256, 512], 1300)))
def test_the_defaults_are_the_paper_s(dataset, backbone, widths, epochs):
    """What the paper states, and SESN's networks."""
    settings = vars(train.parse(["--dataset", dataset]))
    assert PAPER.items() <= settings.items()
    assert settings["group"] == "translation" and settings["method"] == "h-ssl"
    assert settings["backbone"] == backbone and settings["widths"] == widths
    assert settings["epochs"] == epochs and settings["kernel_size"] == 7


@pytest.mark.parametrize("group, group_size, base_space", (
    ("translation", 1, 4), ("rotation", 4, 1), ("scale", 3, 1)))
def test_defaults_by_group(group, group_size, base_space):
    args = train.parse(["--dataset", "mnist", "--group", group])
    assert args.group_size == group_size and args.base_space == base_space
    assert args.out == f"runs/mnist-h-ssl-{group}-0"
    args = train.parse(["--group", group, "--base-space", "2", "--group-size", "9"])
    assert args.group_size == 9 and args.base_space == 2


def test_help(capsys):
    """At most 42 flags, each with a line of help, and the table of defaults at the end."""
    assert status_of(train.parse, ["--help"]) == 0
    printed = capsys.readouterr().out
    options, table = printed.split("defaults by data set")
    flags = re.findall(r"^  (?:-h, )?--([a-z-]+)", options, re.M)
    assert len(flags) == len(set(flags)) and 20 < len(flags) - 1 <= 42
    for name in ("mnist", "cifar10", "tiny-imagenet", "folder", "scale", "1300", "4096"):
        assert name in table


def test_schedule():
    """Warm-up by step to 1 over 10 steps, then a cosine that starts at 1 and would reach 0 one
    step after the last."""
    factors = [train.schedule(step, 10, 30) for step in range(31)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10] == 1 and factors[20] == pytest.approx(0.5)
    assert factors[30] == pytest.approx(0)
    assert train.schedule(0, 0, 30) == 1 and train.schedule(19, 100, 20) == 0.2


def test_a_warm_up_that_is_too_long(tmp_path, capsys):
    """It is said in one line at the start; otherwise there is no such line."""
    train_here(tmp_path / "long", "--epochs", "2", "--warmup-epochs", "10")
    printed = capsys.readouterr().out
    assert "never reaches" in printed.split("epoch 1/2")[0]
    assert max(line["lr"] for line in log_of(tmp_path / "long")) == pytest.approx(0.1 * 6 / 30)


def test_no_such_line_otherwise(run):
    assert "never reaches" not in run[1]
    assert max(line["lr"] for line in log_of(run[0])) == pytest.approx(0.1)


# ----------------------------------------------------------------------------- what a run leaves

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of 6 steps, and what it printed."""
    folder = tmp_path_factory.mktemp("train") / "run"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        draw_few_glyphs(patch)
        train_here(folder)
    return folder, printed.getvalue()


def test_the_files_of_a_run(run):
    run, printed = run
    assert {path.name for path in run.iterdir()} == {
        "config.json", "log.jsonl", "checkpoint.pt", "probe.json"}
    config = json.loads((run / "config.json").read_text())
    assert config["group"] == "translation" and config["widths"] == [2, 3, 4]
    assert config["torch"] == torch.__version__ and config["processes"] == 1

    log = log_of(run)
    steps = [(line["epoch"], line["step"]) for line in log]
    assert steps == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    for line in log:
        assert {"epoch", "step", "loss", "lr", "images_per_second"} <= line.keys()
        assert line["loss"] > 0 and line["images_per_second"] > 0 and 0 < line["lr"] <= 0.1

    result = json.loads((run / "probe.json").read_text())
    assert result["method"] == "h-ssl" and result["epoch"] == 2
    for measures in (result, result["frozen"]):
        assert 0 <= measures["top1"] <= 100 and 0 <= measures["neighbours"] <= 100
        assert 1 <= measures["effective_rank"] <= measures["dimensions"] == 4
        assert measures["train_images"] == 200


def test_what_is_printed(run):
    lines = run[1].splitlines()
    assert lines[0].startswith("CPU: 1 x 64 images a step") and "off" in lines[0]
    assert sum(line.startswith("epoch 1/2") for line in lines) == 1
    assert sum(line.startswith("epoch 2/2") for line in lines) == 1
    assert lines[1].startswith("frozen encoder: top1")
    assert lines[-1].startswith("trained encoder: top1")


def test_the_saved_encoder_is_the_one_that_was_measured(few_glyphs, tmp_path):
    """It comes with batch norm's statistics, and the measures need no more."""
    train_here(tmp_path, "--probe-grid", "2")
    encoder, settings = probe.load_encoder(tmp_path)
    images = data.load("glyphs", train_images=200)
    found = probe.evaluate(encoder, images, settings["probe_grid"])
    written = json.loads((tmp_path / "probe.json").read_text())
    for name, value in found.items():
        assert written[name] == pytest.approx(value), name


@pytest.mark.parametrize("flags", (
    "--method a-ssl",
    "--method supervised --group-size 1",
    "--method frozen",
    "--method a-ssl --group rotation --objective byol",
    "--method a-ssl --crop",
    "--method a-ssl --group scale --structure none",
    "--group rotation --group-size 8 --extent 2 --padding circular",
    "--group rotation --structure none --objective simsiam",
    "--group scale --kernel-size 7 --scale-step 1.3 --max-distance 1",
    "--group scale",
    "--structure none --objective byol",
    "--backbone residual --widths 2 3 4 5 --grid 4",
    "--padding circular --base-space 3 --grid 0 --probe-grid 0",
    "--amp bfloat16",
))
def test_every_method_trains(flags, tmp_path):
    """One step changes every weight of the encoder, or none where it is frozen; all is finite."""
    checkpoint = train_here(tmp_path, *ONE_STEP, *flags.split(), "--lr", "10")
    torch.manual_seed(0)
    untrained = probe.make_encoder(checkpoint["settings"]).state_dict()
    for name, value in checkpoint["encoder"].items():
        assert value.isfinite().all()
        if name.endswith("weight"):
            assert torch.equal(value, untrained[name]) == ("frozen" in flags), name
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert len(losses) == (0 if "frozen" in flags else 1)
    assert all(math.isfinite(loss) for loss in losses)


def test_byol_compares_with_the_target():
    """Predictions by the online networks, targets by the others, which get no gradient."""
    args = train.parse("--objective byol --group rotation --widths 2 3 4".split())
    args.image_shape = [1, 28]
    images = data.glyphs()
    group, objective = train.make_objective(args, images)
    encoder = objective.eval().encoder
    for parameter in objective.target_encoder.parameters():
        nn.init.normal_(parameter)
    x = images.batch(images.train_images, torch.arange(8))
    g1 = torch.arange(8) % 4
    g2 = (g1 + 1) % 4
    z = encoder(x)
    target_z = objective.target_encoder(x)
    predictions = []
    targets = []
    for g in (g1, g2):
        predictions.append(objective.predictor(objective.head(group.view(g, z))))
        targets.append(objective.target_head(group.view(g, target_z)))
    loss = objective(x, g1, g2)
    torch.testing.assert_close(loss, byol(*predictions, *targets))
    loss.backward()
    assert all(p.grad is None for p in objective.target_encoder.parameters())
    assert all(p.grad is None for p in objective.target_head.parameters())


def test_byol_s_target_follows_after_every_step(tmp_path, monkeypatch):
    moves = []

    def recording_move(target, online, decay, step, total):
        moves.append((type(target).__name__, step, total))
        move_target(target, online, decay, step, total)

    monkeypatch.setattr(train, "move_target", recording_move)
    train_here(tmp_path, "--objective", "byol")
    encoders = [("MNISTBackbone", step, 6) for step in range(6)]
    heads = [("ProjectionHead", step, 6) for step in range(6)]
    assert moves[::2] == encoders and moves[1::2] == heads


@pytest.mark.parametrize("flags", ("--method h-ssl", "--group rotation --objective byol"))
def test_a_look_changes_nothing(flags, tmp_path):
    """With --eval-every 1 and without: the same losses and weights, bit for bit. The looks are
    taken on training images only."""
    without = train_here(tmp_path / "without", *flags.split())
    with_looks = train_here(tmp_path / "with", *flags.split(), "--eval-every", "1")
    for key in ("encoder", "objective", "optimizer"):
        assert_equal(with_looks[key], without[key])
    log = log_of(tmp_path / "with")
    assert [line["loss"] for line in log] == [line["loss"] for line in log_of(tmp_path / "without")]
    looks = [line["held_out"] for line in log if "held_out" in line]
    assert len(looks) == 2 and looks[0]["test_images"] == 10 and looks[0]["train_images"] == 40
    assert len(log) == 6 and "held_out" in log[2] and "held_out" in log[5]


def test_a_smaller_loss_after_training(tmp_path):
    """H-SSL learns: the last epoch's mean loss is well below the first's."""
    train_here(tmp_path, "--epochs", "20", "--widths", "4", "8", "8", "--lr", "1")
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


# --------------------------------------------------------------------------- numbers that go wrong

def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys):
    """The step and the last good checkpoint are named, and that checkpoint is not overwritten."""
    loss = train.nt_xent
    calls = []

    def spoilt(h1, h2, temperature):
        calls.append(1)
        if len(calls) == 5:
            return loss(h1, h2, temperature) * math.nan
        return loss(h1, h2, temperature)

    monkeypatch.setattr(train, "nt_xent", spoilt)
    assert status_of(train_here, tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step 5" in error and "is of step 3" in error
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    assert checkpoint["step"] == 3
    for value in checkpoint["encoder"].values():
        assert value.isfinite().all()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capsys):
    """The last step before a save may spoil the weights while its own loss is still fine."""
    step = train.LARS.step

    def spoil(self, closure=None):
        step(self, closure)
        if self.param_groups[0]["lr"] < 0.03:    # the sixth and last step
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(train.LARS, "step", spoil)
    assert status_of(train_here, tmp_path) == 1
    error = capsys.readouterr().err
    assert "weights are not finite" in error and "step 6" in error and "is of step 3" in error
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 3


def test_divergence(tmp_path, capsys):
    """A rate that is far too large: status 1, one line, the step, and no checkpoint that is not
    finite."""
    flags = "--lr 1e38 --trust-coefficient 1 --warmup-epochs 0 --save-every 1".split()
    assert status_of(train_here, tmp_path, *flags) == 1
    error = capsys.readouterr().err
    assert re.search(r"(not finite|nan|inf) .*step \d", error) and error.count("\n") == 1
    assert not (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "probe.json").exists()


def test_float16_that_skips_every_step(tmp_path, capsys):
    """At this temperature scaled gradients overflow: nothing is trained, which is no success."""
    flags = ["--amp", "float16", "--temperature", "1e-6"]
    assert status_of(train_here, tmp_path, *flags) == 1
    error = capsys.readouterr().err
    assert "float16" in error and "every step" in error and error.count("\n") == 1
    assert not (tmp_path / "probe.json").exists()


def test_float16_that_skips_some_steps(tmp_path, capsys):
    """They are counted in the log and in the epoch's line, and training goes on."""
    checkpoint = train_here(tmp_path, "--amp", "float16", "--temperature", "0.01", "--epochs", "8")
    skipped = [line["skipped"] for line in log_of(tmp_path)]
    assert 1 <= skipped[0] <= skipped[-1] < 24 and skipped == sorted(skipped)
    assert checkpoint["scaler"]["scale"] == 2.0 ** (16 - skipped[-1])
    printed = capsys.readouterr().out
    assert f"{skipped[-1]} steps skipped" in printed.split("epoch 8/8")[1]


@pytest.mark.parametrize("amp, tolerance", (("bfloat16", 0.02), ("float16", 0.005)))
def test_half_precision_follows_float32(amp, tolerance, tmp_path):
    """Over 12 steps the loss stays within the rounding of the number format times a few layers."""
    losses = {}
    for name in ("off", amp):
        train_here(tmp_path / name, "--epochs", "4", "--amp", name)
        losses[name] = [line["loss"] for line in log_of(tmp_path / name)]
    assert len(losses["off"]) == 12 and losses["off"] != losses[amp]
    assert losses[amp] == pytest.approx(losses["off"], rel=tolerance)


# ---------------------------------------------------------------------------- each file on its own

ALONE = """
import os, sys, torch

for name in sys.argv[1:]:
    sys.path.insert(0, os.path.abspath(name))
    others = set(sys.modules)
    module = __import__(name)
    sys.path.pop(0)
    if name == "hssl":
        rotation = module.Rotation(4)
        assert rotation.view(torch.tensor([1]), torch.ones(1, 2, 4, 6, 6)).shape == (1, 2, 1, 6, 6)
    if name == "layers":
        f = module.MNISTBackbone("rotation", 4)
        assert f(torch.ones(2, 1, 28, 28)).shape == (2, 95, 4, 7, 7)
    if name == "losses":
        assert module.nt_xent(torch.eye(3), torch.eye(3)).isfinite()
    if name == "lars":
        module.LARS([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1).step()
    if name == "data":
        assert module.load("glyphs", train_images=10).train_images.shape == (10, 1, 28, 28)
    del sys.modules[name]
"""


def test_five_files_work_alone(tmp_path):
    """hssl, layers, losses, lars and data, each copied into an empty folder."""
    names = ["hssl", "layers", "losses", "lars", "data"]
    for name in names:
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, *names], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
