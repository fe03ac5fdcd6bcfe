"""train.py at the smallest size, on the CPU: what it prints and writes, methods, defaults."""
import contextlib
import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import probe
import train
from helpers import assert_equal, draw_few_glyphs, log_of, status_of, train_here
from hssl import (Crops, ProjectionHead, Translation, a_ssl_loss, allowed_pairs, h_ssl_loss,
                  readout)
from lars import LARS
from layers import MNISTBackbone
from losses import byol, nt_xent

pytestmark = pytest.mark.usefixtures("few_glyphs")


# ----------------------------------------------------------------------------------------- settings

PAPER = dict(batch_size=4096, lr=0.1, temperature=0.1, warmup_epochs=10, weight_decay=1e-4,
             momentum=0.9, trust_coefficient=0.001, kernel_size=7, method="h-ssl")
MNIST = dict(backbone="mnist", widths=[32, 63, 95], epochs=500)
RESIDUAL = dict(backbone="residual", widths=[16, 128, 256, 512], epochs=1300)


@pytest.mark.parametrize("flags, settings", (
    ("mnist", MNIST | dict(group="translation", base_space=4, out="runs/mnist-h-ssl-translation-0")),
    ("mnist --group rotation", MNIST | dict(group_size=4, base_space=1)),
    ("mnist --group scale --base-space 2", MNIST | dict(group_size=3, base_space=2)),
    ("cifar10", RESIDUAL),
    ("tiny-imagenet", RESIDUAL),
))
def test_the_defaults_are_the_paper_s(flags, settings):
    """What the paper states, SESN's networks, and what a group needs."""
    found = vars(train.parse(["--dataset", *flags.split()]))
    expected = PAPER | settings
    assert expected.items() <= found.items()


def test_the_group_s_settings_reach_it():
    def group(*flags):
        args = train.parse(["--dataset", "mnist", *flags])
        args.image_shape = [1, 28]
        _, group = train.make_encoder_and_group(args)
        return group

    assert group("--group", "rotation", "--group-size", "8", "--base-space", "3").base_size == 3
    assert group("--group", "scale", "--scale-step", "1.3").step == 1.3
    window = group("--padding", "circular")
    assert type(window) is Translation and window.circular and window.stride == 4
    crops = group("--method", "a-ssl", "--crop")
    assert type(crops) is Crops and not crops.circular


def test_schedule():
    """A linear warm-up over 10 steps, then a cosine to 0."""
    factors = [train.schedule(step, 10, 30) for step in range(31)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10] == 1
    assert factors[20] == pytest.approx(0.5)
    assert factors[30] == pytest.approx(0)


def test_a_warm_up_that_is_too_long(tmp_path, capsys):
    train_here(tmp_path, "--warmup-epochs", "10")
    assert "never reaches 0.1" in capsys.readouterr().out.split("epoch 1/2")[0]
    rates = [line["lr"] for line in log_of(tmp_path)]
    assert rates == pytest.approx([0.1 * k / 30 for k in range(1, 7)])


# -------------------------------------------------------------------------------- what a run leaves

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of 6 steps, and what it printed."""
    folder = tmp_path_factory.mktemp("train") / "run"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        draw_few_glyphs(patch)
        train_here(folder, "--probe-grid", "2")
    return folder, printed.getvalue()


def test_what_a_run_prints_and_writes(run):
    folder, printed = run
    starts = [line[:9] for line in printed.splitlines()]
    assert starts == ["CPU: 1 x ", "frozen en", "epoch 1/2", "epoch 2/2", "trained e"]
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "log.jsonl", "checkpoint.pt", "probe.json"}
    config = json.loads((folder / "config.json").read_text())
    expected = dict(group="translation", widths=[2, 3, 4], torch=torch.__version__, processes=1)
    assert expected.items() <= config.items()
    log = log_of(folder)
    steps = [(line["epoch"], line["step"]) for line in log]
    assert steps == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    assert max(line["lr"] for line in log) == pytest.approx(0.1)
    for line in log:
        assert line["loss"] > 0
        assert line["images_per_second"] > 0


def test_the_saved_encoder_is_the_one_that_was_measured(run):
    """It comes with batch norm's statistics, and the measures need no more."""
    folder, _ = run
    encoder, settings = probe.load_encoder(folder)
    images = data.load("glyphs", train_images=200)
    found = probe.evaluate(encoder, images, settings["probe_grid"])
    written = json.loads((folder / "probe.json").read_text())
    for name, value in found.items():
        assert written[name] == pytest.approx(value), name
    assert written["epoch"] == 2
    assert (settings["mean"], settings["std"]) == (images.mean, images.std)
    assert written["frozen"]["effective_rank"] != written["effective_rank"]


# --------------------------------------------------------------------------------- what a step does

def nt_xent_of_the_flags(h1, h2):
    return nt_xent(h1, h2, temperature=0.3)


def steps_by_hand(objective, loss_of, pairs):
    """Losses of six steps with every setting written out. loss_of(x, index, drawn) is the loss of
    images x with these indices, for whom these pairs were drawn."""
    glyphs = data.load("glyphs", train_images=200)
    optimizer = LARS(objective.parameters(), 0.0, 0.5, 0.01, 0.02)
    losses = []
    for step in range(6):
        epoch = step // 3
        first = 64 * (step % 3)
        order, choice = data.epoch_plan(200, len(pairs), 7, epoch)
        index = order[first:first + 64]
        x = glyphs.batch(glyphs.train_images, index)
        loss = loss_of(x, index, pairs[choice[index]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 5 * train.schedule(step, 3, 6)
        optimizer.step()
        losses.append(loss.item())
    return losses


SETTINGS = ("--lr 5 --momentum 0.5 --weight-decay 0.01 --trust-coefficient 0.02 --temperature 0.3 "
            "--warmup-epochs 1 --seed 7")


@pytest.mark.parametrize("flags, padding, group, ssl_loss, max_distance", (
    ("--method h-ssl", "zeros", Translation(7, 5, 4), h_ssl_loss, None),
    ("--method h-ssl --max-distance 1", "zeros", Translation(7, 5, 4), h_ssl_loss, 1),
    ("--method a-ssl", "zeros", Translation(7, 5, 4), a_ssl_loss, None),
    ("--method a-ssl --crop", "zeros", Crops(7, 5, 4), a_ssl_loss, None),
    ("--method a-ssl --padding circular", "circular", Translation(7, 5, 4, True), a_ssl_loss, None),
))
def test_self_supervised_steps(flags, padding, group, ssl_loss, max_distance, tmp_path):
    """Each loss and the last weights are those of a plain loop over what the flags name."""
    checkpoint = train_here(tmp_path, *SETTINGS.split(), *flags.split())
    torch.manual_seed(7)
    f = MNISTBackbone(widths=(2, 3, 4), kernel_size=3, padding_mode=padding)
    h = ProjectionHead(4 * 2 * 2, 16, 8, grid=2)

    def loss_of(x, index, drawn):
        g1, g2 = group.elements[drawn].unbind(1)
        return ssl_loss(f, h, nt_xent_of_the_flags, group, x, g1, g2)

    expected = steps_by_hand(nn.ModuleList([f, h]), loss_of, allowed_pairs(group, max_distance))
    assert [line["loss"] for line in log_of(tmp_path)] == pytest.approx(expected, rel=1e-5)
    for name, parameter in f.named_parameters():
        torch.testing.assert_close(checkpoint["encoder"][name], parameter.data)


def test_supervised_steps(tmp_path):
    checkpoint = train_here(tmp_path, *SETTINGS.split(), "--method", "supervised")
    labels = data.load("glyphs", train_images=200).train_labels
    torch.manual_seed(7)
    f = MNISTBackbone(widths=(2, 3, 4), kernel_size=3)
    classifier = nn.Linear(4, 10)    # on the mean over positions, as --probe-grid 1 says

    def loss_of(x, index, drawn):
        return F.cross_entropy(classifier(readout(f(x), 1)), labels[index])

    expected = steps_by_hand(nn.ModuleList([f, classifier]), loss_of, torch.zeros(1, 2))
    assert [line["loss"] for line in log_of(tmp_path)] == pytest.approx(expected, rel=1e-5)
    for name, parameter in f.named_parameters():
        torch.testing.assert_close(checkpoint["encoder"][name], parameter.data)


def test_images_that_are_held_out(tmp_path):
    """They are measured in place of the test images; the seed draws those that are used."""
    flags = "--train-images 64 --validate 30 --seed 3".split()
    settings = train_here(tmp_path, *flags)["settings"]
    result = json.loads((tmp_path / "probe.json").read_text())
    assert (result["train_images"], result["test_images"]) == (64, 30)
    found = probe.load_data(settings, "cpu")
    expected = data.load("glyphs", train_images=64, validate=30, seed=3)
    for split in ("train_files", "test_files"):
        assert (getattr(found, split) == getattr(expected, split)).all()


def test_who_loads_first(monkeypatch):
    """The first of all processes, then the first of each machine, then the others."""
    events = []

    def load_data(settings, device):
        events.append("load")

    def wait(patient):
        events.append("wait")

    monkeypatch.setattr(probe, "load_data", load_data)
    monkeypatch.setattr(train, "wait", wait)
    for rank, local_rank, turn in ((0, 0, 0), (8, 0, 1), (1, 1, 2), (9, 1, 2)):
        events.clear()
        train.load_in_turn(train.parse([]), rank, local_rank, "cpu", None)
        assert events.index("load") == turn
        assert events.count("wait") == 3


# ------------------------------------------------------------------------------------- every method

@pytest.mark.parametrize("flags", (
    "--method a-ssl",
    "--method supervised",
    "--method frozen",
    "--method a-ssl --group rotation --objective byol",
    "--method a-ssl --crop",
    "--method a-ssl --group scale --structure none",
    "--group rotation --group-size 8 --extent 2 --padding circular",
    "--structure none --objective simsiam",
    "--group scale --scale-step 1.3 --max-distance 1",
    "--backbone residual --widths 2 3 4 5 --grid 4",
    "--padding circular --base-space 3 --grid 0 --probe-grid 0",
))
def test_every_method_trains(flags, tmp_path):
    """One step changes every weight of the encoder, or none where it is frozen; all is finite."""
    one_step = "--epochs 1 --batch-size 200 --lr 10".split()
    checkpoint = train_here(tmp_path, *one_step, *flags.split())
    torch.manual_seed(0)
    untrained = probe.make_encoder(checkpoint["settings"]).state_dict()
    for name, value in checkpoint["encoder"].items():
        assert value.isfinite().all()
        if name.endswith("weight"):
            assert torch.equal(value, untrained[name]) == ("frozen" in flags), name
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert len(losses) == ("frozen" not in flags)
    assert all(math.isfinite(loss) for loss in losses)


def test_byol_compares_with_the_target():
    """Predictions by the online networks, targets by the others, which get no gradient."""
    args = train.parse("--objective byol --group rotation --widths 2 3 4".split())
    args.image_shape = [1, 28]
    images = data.glyphs()
    group, objective = train.make_objective(args, images)
    objective.eval()
    for parameter in objective.target_encoder.parameters():
        nn.init.normal_(parameter)
    x = images.batch(images.train_images, torch.arange(8))
    g1 = torch.arange(8) % 4
    g2 = (g1 + 1) % 4

    def projections(encoder, head):
        return h_ssl_loss(encoder, head, train.pair, group, x, g1, g2)

    h1, h2 = projections(objective.encoder, objective.head)
    targets = projections(objective.target_encoder, objective.target_head)
    loss = objective(x, g1, g2)
    expected = byol(objective.predictor(h1), objective.predictor(h2), *targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is None) == name.startswith("target"), name


def test_byol_s_target_follows_after_every_step(tmp_path, monkeypatch):
    moves = []

    def record(target, online, decay, step, total):
        moves.append((type(target), type(online), decay, step, total))

    monkeypatch.setattr(train, "move_target", record)
    train_here(tmp_path, "--objective", "byol")
    for kind, of_kind in ((MNISTBackbone, moves[::2]), (ProjectionHead, moves[1::2])):
        assert of_kind == [(kind, kind, 0.99, step, 6) for step in range(6)]


def test_a_look_changes_nothing(tmp_path):
    """With --eval-every 1 and without: the same losses and weights, bit for bit. The looks are
    taken on training images only."""
    byol = ("--group", "rotation", "--objective", "byol")
    without = train_here(tmp_path / "without", *byol)
    with_looks = train_here(tmp_path / "with", *byol, "--eval-every", "1")
    for key in ("encoder", "objective", "optimizer"):
        assert_equal(with_looks[key], without[key])
    looks = {}
    for line, other in zip(log_of(tmp_path / "with"), log_of(tmp_path / "without"), strict=True):
        assert line["loss"] == other["loss"]
        if "held_out" in line:
            looks[line["step"]] = line["held_out"]
    assert list(looks) == [3, 6]
    assert looks[3]["train_images"] == 40
    assert looks[3]["test_images"] == 10


def test_a_smaller_loss_after_training(tmp_path):
    """H-SSL learns: the last epoch's mean loss is well below the first's."""
    train_here(tmp_path, "--epochs", "20", "--widths", "4", "8", "8", "--lr", "1")
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


# ---------------------------------------------------------------------------- numbers that go wrong

@pytest.mark.parametrize("bad_step, message", (
    (4, "the loss is nan at step 5"),
    (6, "the weights are not finite after step 6"),
))
def test_numbers_that_are_not_finite_end_the_run(bad_step, message, tmp_path, monkeypatch, capsys):
    """The step and the last good checkpoint are named, and that checkpoint is not overwritten. A
    step before a save may spoil the weights while its own loss is still fine."""
    original = train.LARS.step
    steps = []

    def spoiling_step(self, closure=None):
        original(self, closure)
        steps.append(self)
        if len(steps) == bad_step:
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(train.LARS, "step", spoiling_step)
    assert status_of(train_here, tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert "is of step 3" in error
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 3
    assert not (tmp_path / "probe.json").exists()


def test_float16_that_skips_every_step(tmp_path, capsys):
    """At this temperature scaled gradients overflow: nothing is trained, which is no success."""
    flags = ["--amp", "float16", "--temperature", "1e-6"]
    assert status_of(train_here, tmp_path, *flags) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "float16 overflowed at every step" in error
    assert not (tmp_path / "probe.json").exists()


def test_float16_that_skips_some_steps(tmp_path, capsys):
    """They are counted in the log and in the epoch's line, and training goes on."""
    checkpoint = train_here(tmp_path, "--amp", "float16", "--temperature", "0.01", "--epochs", "8")
    skipped = [line["skipped"] for line in log_of(tmp_path)]
    assert 1 <= skipped[0] <= skipped[-1] < 24
    assert checkpoint["scaler"]["scale"] == 2.0 ** (16 - skipped[-1])
    assert f"{skipped[-1]} steps skipped" in capsys.readouterr().out.split("epoch 8/8")[1]


@pytest.mark.parametrize("amp, tolerance", (("bfloat16", 0.02), ("float16", 0.005)))
def test_half_precision_follows_float32(amp, tolerance, tmp_path):
    """Over 12 steps the loss stays within the rounding of the number format times a few layers."""
    losses = {}
    for name in ("off", amp):
        train_here(tmp_path / name, "--epochs", "4", "--amp", name)
        losses[name] = [line["loss"] for line in log_of(tmp_path / name)]
    assert len(losses["off"]) == 12
    assert losses["off"] != losses[amp]
    assert losses[amp] == pytest.approx(losses["off"], rel=tolerance)
