"""train.py at the smallest size, on the CPU: settings, what a step does, what a run leaves."""
import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import probe
import train
from helpers import assert_equal, log_of, one_line, status_of, train_here
from hssl import ProjectionHead, Translation, a_ssl_loss, allowed_pairs, h_ssl_loss, readout
from lars import LARS
from layers import MNISTBackbone
from losses import nt_xent

pytestmark = pytest.mark.usefixtures("few_glyphs")

# What the paper states, and our choices where it does not.
PAPER = dict(lr=0.1, batch_size=4096, temperature=0.1, warmup_epochs=10, weight_decay=1e-4,
             momentum=0.9, trust_coefficient=0.001, kernel_size=7, max_distance=None)
MNIST = dict(epochs=500, widths=[32, 63, 95])
RESIDUAL = dict(epochs=1300, widths=[16, 128, 256, 512])


@pytest.mark.parametrize("dataset, shape, settings, window", (
    ("mnist", [1, 28], MNIST, 4),
    ("cifar10", [3, 32], RESIDUAL, 4),
    ("tiny-imagenet", [3, 64], RESIDUAL, 8),
))
@pytest.mark.parametrize("group, group_size", (("translation", 1), ("rotation", 4), ("scale", 3)))
def test_the_defaults_are_the_paper_s(dataset, shape, settings, window, group, group_size, capsys):
    """A base space is half the map's side, rounded up, one orientation, or the middle scale. Any
    console can print the help."""
    flags = ["--dataset", dataset, "--group", group]
    args = train.parse(flags)
    expected = PAPER | settings | dict(group_size=group_size, method="h-ssl")
    assert expected.items() <= vars(args).items()
    args.image_shape = shape
    moved = train.make_group(args, 4)
    assert moved.base_size == (window if group == "translation" else 1)

    assert status_of(train.parse, [*flags, "--help"]) == 0
    assert capsys.readouterr().out.isascii()


def test_schedule():
    """A linear warm-up over 10 steps, then a cosine to 0."""
    factors = [train.schedule(step, 10, 30) for step in range(31)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10] == 1
    assert factors[20] == pytest.approx(0.5)
    assert factors[30] == pytest.approx(0)


def test_each_process_has_the_gpu_of_its_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", [0, 1].__len__)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert train.choose_device("cuda", 1) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(ValueError, match="sees 2: start fewer"):
        train.choose_device("cuda", 2)
    assert train.choose_device("cpu", 2) == torch.device("cpu")


@pytest.mark.parametrize("rank, local_rank, turn", ((0, 0, 0), (4, 0, 1), (1, 1, 2)))
def test_processes_load_in_three_turns(rank, local_rank, turn, monkeypatch):
    """The first of all, the first of each machine, the others; after each turn all wait."""
    events = []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(train, "rank_and_world", lambda: (rank, 8))
    monkeypatch.setattr(train, "wait", events.append)
    monkeypatch.setattr(probe, "load_data", lambda *arguments: events.append("load"))
    train.load_in_turn(train.parse([]), torch.device("cpu"), "wait")
    assert events.index("load") == turn and events.count("wait") == 3


def test_batch_norm_is_synchronised_on_gpus():
    """All of it, with the parameters that the optimizer has; on CPUs none."""
    args = train.parse(["--widths", "2", "3", "4", "5"])
    args.image_shape = [1, 28]
    objective, _ = train.make_objective(args, 10)
    parameters = list(objective.parameters())
    for device, kind in (("cpu", nn.BatchNorm2d), ("cuda", nn.SyncBatchNorm)):
        model = train.synchronise_batch_norm(objective, torch.device(device))
        kinds = [type(module) for module in model.modules()]
        assert kinds.count(kind) == 13
        assert kinds.count(nn.BatchNorm2d) + kinds.count(nn.SyncBatchNorm) == 13
    for parameter, expected in zip(model.parameters(), parameters, strict=True):
        assert parameter is expected


def test_float32_is_float32_while_training(tmp_path, monkeypatch):
    """Not TF32. That it is taken back is tested in test_probe.py."""
    during = []

    def recording(*arguments):
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
            during.append(backend.fp32_precision)
        return h_ssl_loss(*arguments)

    monkeypatch.setattr(train, "h_ssl_loss", recording)
    train_here(tmp_path)
    assert during == ["ieee"] * 12


def test_what_a_run_prints_and_writes(tmp_path, capsys):
    """probe.py repeats the numbers."""
    train_here(tmp_path, "--probe-grid", "2")
    starts = [line[:9] for line in capsys.readouterr().out.splitlines()]
    assert starts == ["cpu: 1 x ", "frozen en", "epoch 1/2", "epoch 2/2", "trained e"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "log.jsonl", "checkpoint.pt", "probe.json"}
    config = json.loads((tmp_path / "config.json").read_text())
    expected = dict(widths=[2, 3, 4], mean=0.0, std=0.3)
    assert expected.items() <= config.items()
    assert config["starts"] == [dict(step=0, torch=torch.__version__, processes=1)]
    log = log_of(tmp_path)
    steps = [(line["epoch"], line["step"]) for line in log]
    assert steps == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    assert max(line["lr"] for line in log) == pytest.approx(0.1)
    assert all(line["images_per_second"] > 0 for line in log)

    path = tmp_path / "probe.json"
    written = path.read_text()
    path.unlink()
    probe.main([str(tmp_path), "--device", "cpu"])
    assert path.read_text() == written
    result = json.loads(written)
    assert result["epoch"] == 2
    assert result["frozen"]["effective_rank"] != result["effective_rank"]


def test_frozen_is_measured_once(tmp_path, monkeypatch, capsys):
    """Also when the run, here in the home folder, is continued, which changes nothing."""
    measured = []
    evaluate = probe.evaluate

    def counting(*arguments, **options):
        measured.append(evaluate(*arguments, **options))
        return measured[-1]

    monkeypatch.setattr(probe, "evaluate", counting)
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--method", "frozen", "--out=~/run"]
    first = train_here(tmp_path / "run", *flags)
    printed = capsys.readouterr().out
    assert "frozen encoder: " in printed and "trained encoder" not in printed
    result = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert result.items() >= measured[0].items() and result["frozen"] == measured[0]
    again = train_here(tmp_path / "run", *flags, "--resume")
    assert_equal(again["encoder"], first["encoder"])
    assert len(measured) == 1


def steps_by_hand(objective, loss_of, pairs):
    """Losses of six steps with every setting written out. loss_of(x, labels, g1, g2) is the loss of
    images x with these labels, whose views are drawn."""
    glyphs = data.load("glyphs", train_images=200)
    optimizer = LARS(objective.parameters(), 0.0, 0.5, 0.01, 0.02)
    losses = []
    for step in range(6):
        order, choice = data.epoch_plan(200, len(pairs), 7, epoch=step // 3)
        first = 64 * (step % 3)
        index = order[first:first + 64]
        x = glyphs.batch(glyphs.train_images, index)
        loss = loss_of(x, glyphs.train_labels[index], *pairs[choice[index]].unbind(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 5 * train.schedule(step, 3, 6)
        optimizer.step()
        losses.append(loss.item())
    return losses


SETTINGS = ("--lr 5 --momentum 0.5 --weight-decay 0.01 --trust-coefficient 0.02 --temperature 0.3 "
            "--warmup-epochs 1 --seed 7 --method")


@pytest.mark.parametrize("flags, group, ssl_loss, max_distance", (
    ("h-ssl", Translation(7, 5, 4), h_ssl_loss, None),
    ("h-ssl --max-distance 1", Translation(7, 5, 4), h_ssl_loss, 1),
    ("a-ssl", Translation(7, 5, 4), a_ssl_loss, None),
    ("a-ssl --padding circular", Translation(7, 5, 4, True), a_ssl_loss, None),
    ("supervised", Translation(7, 5, 4), None, None),
))
def test_every_step_is_that_of_a_plain_loop(flags, group, ssl_loss, max_distance, tmp_path):
    """Losses and the last weights, for what the flags name."""
    checkpoint = train_here(tmp_path, *SETTINGS.split(), *flags.split())
    torch.manual_seed(7)
    padding = "circular" if group.circular else "zeros"
    f = MNISTBackbone(widths=(2, 3, 4), kernel_size=3, padding_mode=padding)
    if ssl_loss is None:
        h = nn.Linear(4, 10)    # on the mean over positions, as --probe-grid 1 says
    else:
        h = ProjectionHead(4 * 2 * 2, 16, 8, grid=2)
    I = functools.partial(nt_xent, temperature=0.3)

    def loss_of(x, labels, g1, g2):
        if ssl_loss is None:
            return F.cross_entropy(h(readout(f(x), 1)), labels)
        return ssl_loss(f, h, I, group, x, g1, g2)

    pairs = group.elements[allowed_pairs(group, max_distance)]
    expected = steps_by_hand(nn.ModuleList([f, h]), loss_of, pairs)
    assert [line["loss"] for line in log_of(tmp_path)] == pytest.approx(expected, rel=1e-5)
    for name, parameter in f.named_parameters():
        torch.testing.assert_close(checkpoint["encoder"][name], parameter.data)


@pytest.mark.parametrize("flags", (
    "--method a-ssl --group scale --structure none",
    "--structure none",
    "--group rotation --group-size 8 --extent 2 --padding circular",
    "--group scale --scale-step 1.3 --max-distance 1",
    "--widths 2 3 4 5 --grid 4",
    "--padding circular --base-space 3 --grid 0 --probe-grid 0",
))
def test_every_network_trains(flags, tmp_path):
    """One step changes every weight of the encoder, and all is finite."""
    checkpoint = train_here(
        tmp_path, *flags.split(), "--epochs", "1", "--batch-size", "200", "--lr", "10")
    torch.manual_seed(0)
    untrained = probe.make_encoder(checkpoint["settings"]).state_dict()
    for name, value in checkpoint["encoder"].items():
        assert value.isfinite().all()
        assert not name.endswith("weight") or not torch.equal(value, untrained[name]), name
    [line] = log_of(tmp_path)
    assert math.isfinite(line["loss"])


@pytest.mark.parametrize("bad_step, message", (
    (4, "the loss is nan at step 5"),
    (6, "the weights are not finite after step 6"),
))
def test_numbers_that_are_not_finite_end_the_run(bad_step, message, tmp_path, monkeypatch, capsys):
    """The last good checkpoint is not overwritten. A step before a save may spoil the weights while
    its own loss is still fine."""
    original = train.LARS.step
    steps = []

    def spoiling_step(self, closure=None):
        original(self, closure)
        steps.append(self)
        if len(steps) == bad_step:
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(train.LARS, "step", spoiling_step)
    assert message in one_line(capsys, 1, train_here, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 3
    assert not (tmp_path / "probe.json").exists()


def overflowing(h1, h2, temperature):
    """NT-Xent whose gradient is too large for float16."""
    h1.register_hook(torch.tensor(math.inf).mul)
    return nt_xent(h1, h2, temperature)


@pytest.mark.parametrize("scale, message", ((2.0**16, 6), (2.0**-58, 1)))
def test_float16_that_overflows_all_the_time(scale, message, tmp_path, monkeypatch, capsys):
    """Nothing is trained, or the scale is as good as zero: that is no success."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=scale)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(train, "nt_xent", overflowing)
    line = one_line(capsys, 1, train_here, tmp_path, amp="float16")
    assert f"float16 still overflows after {message} steps" in line
    assert not (tmp_path / "probe.json").exists()


def test_half_precision_follows_float32(tmp_path):
    """The losses stay within the rounding of the number format times a few layers."""
    losses = {}
    for amp in ("off", "bfloat16", "float16"):
        train_here(tmp_path / amp, amp=amp)
        losses[amp] = [line["loss"] for line in log_of(tmp_path / amp)]
    for amp, tolerance in (("bfloat16", 0.02), ("float16", 0.005)):
        assert losses[amp] != losses["off"]
        assert losses[amp] == pytest.approx(losses["off"], rel=tolerance)


@pytest.mark.parametrize("error", (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
))
def test_out_of_memory(error, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise error

    monkeypatch.setattr(train, "h_ssl_loss", full)
    assert "--batch-size" in one_line(capsys, 2, train_here, tmp_path)
