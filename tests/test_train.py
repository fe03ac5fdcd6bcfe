"""train.py and probe.py through their command lines, at the smallest size, on the CPU."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import probe
import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--device cpu --train-images 200 --batch-size 64 --epochs 2 --widths 2 3 4 --probe-epochs 5 --log-every 1".split()


def call(*arguments, launcher=()):
    done = subprocess.run([sys.executable, *launcher, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_train_then_probe(tmp_path):
    """One short run on glyphs writes its folder and prints frozen and trained; the probe alone gives the same number."""
    done = call("train.py", *SMALL, "--out", tmp_path / "run")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("frozen encoder: top-1 ") and lines[1].startswith("epoch 1/2 ") and "left" in lines[1]
    assert "\r" not in done.stdout and lines[-1].startswith("top-1 on 2000 test images: frozen ") and "h-ssl" in lines[-1]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["group"] == "rotation" and config["torch"] == torch.__version__
    log = log_of(tmp_path / "run")
    assert [(entry["epoch"], entry["step"]) for entry in log] == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    assert all(entry["loss"] > 0 and entry["images_per_second"] > 0 and 0 < entry["lr"] <= 0.1 for entry in log)

    first = json.loads((tmp_path / "run" / "probe.json").read_text())
    again = call("probe.py", tmp_path / "run", "--device", "cpu")
    assert json.loads(again.stdout) == json.loads((tmp_path / "run" / "probe.json").read_text()) == first
    assert first["test_images"] == 2000 and 0 <= first["top1"] <= 100 and first["frozen_top1"] is not None


@pytest.mark.parametrize("flags", ("--method a-ssl --group scale", "--method supervised", "--method frozen",
                                   "--group translation --amp bfloat16", "--elements 8 --extent 2 --padding circular",
                                   "--backbone residual --widths 2 3 4 5 --depth 10 --grid 4", "--objective simsiam", "--objective byol --method a-ssl",
                                   "--views 4", "--group scale --window 4 --views 3", "--group translation --method a-ssl --crop",
                                   "--group translation --structure none", "--group scale --structure none --method a-ssl"))
def test_every_method_and_group_runs(flags, tmp_path, capsys):
    args = train.parse([*SMALL, *flags.split(), "--out", str(tmp_path / "run")])
    train.main(args)
    assert "top-1 on 2000" in capsys.readouterr().out
    steps = len(log_of(tmp_path / "run"))
    assert steps == (0 if args.method == "frozen" else 6)


def test_two_processes_see_one_process_s_batches(tmp_path):
    """Under torchrun the log has the same steps and rates, and a first loss that differs by the batch norms alone.

    Each process normalises its own 32 of the 64 images; nothing else differs, and that moves the loss by less than 2%
    of ln(127) (0.1 to 0.5% was seen). The learning rate is too small to matter.
    """
    flags = [*SMALL, "--lr", "1e-9"]
    call("train.py", *flags, "--out", tmp_path / "one")
    call("train.py", *flags, "--out", tmp_path / "two", launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert (a["epoch"], a["step"], a["lr"]) == (b["epoch"], b["step"], b["lr"])
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_schedule():
    """Warm-up by step to 1 over 10 steps, then a cosine that starts at 1 and would reach 0 one step after the last."""
    factors = [train.schedule(step, 10, 30) for step in range(31)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10] == 1 and factors[20] == pytest.approx(0.5) and factors[30] == pytest.approx(0)
    assert train.schedule(0, 0, 30) == 1


def test_byol_s_target_is_the_average_of_the_weights():
    """After its first step, a copy; then decay · target + (1 - decay) · online, the decay rising from --target-decay to 1 along a cosine."""
    args = train.parse("--objective byol --widths 2 3 4 --target-decay 0.9".split())
    encoder, group = probe.build(vars(args), 1, 28)
    objective = train.make_objective(args, encoder, group, data.load("glyphs", "unused", train_images=8), total=5)
    online, target = nn.ModuleList([encoder, objective.head]), objective.others["target"]
    assert not any(p.requires_grad for p in target.parameters())
    for step in range(5):
        expected = None if step == 0 else [p.clone() for p in target.parameters()]
        with torch.no_grad():
            for p in online.parameters():
                p.add_(torch.randn_like(p))
        target.update_parameters(online)
        decay = 1 - (1 - 0.9) * (math.cos(math.pi * step / 5) + 1) / 2
        for i, (average, p) in enumerate(zip(target.parameters(), online.parameters(), strict=True)):
            torch.testing.assert_close(average, decay * expected[i] + (1 - decay) * p.data if step else p.data)


def test_byol_resumes_exactly(tmp_path, monkeypatch):
    """From the first epoch's checkpoint on, predictor and target too: the undisturbed run's end, bit for bit."""
    flags, write = [*SMALL, "--objective", "byol", "--save-every", "1"], train.write_whole

    def keep_first(path, content):
        write(path, content)
        if path.name == "checkpoint.pt" and not (tmp_path / "resumed").exists():
            (tmp_path / "resumed").mkdir()
            write(tmp_path / "resumed" / "checkpoint.pt", bytes(content))
    monkeypatch.setattr(train, "write_whole", keep_first)
    for name, extra in (("straight", []), ("resumed", ["--resume"])):
        train.main(train.parse([*flags, "--out", str(tmp_path / name), *extra]))
    straight, resumed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("straight", "resumed"))
    assert len(log_of(tmp_path / "resumed")) == 3 and straight["step"] == resumed["step"] == 6 and straight["others"].keys() >= {"target.n_averaged"}
    for part in ("encoder", "head", "others"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in straight[part].items())


def test_probe_notices_a_moving_encoder():
    """The guard fires when a forward pass changes a buffer of the encoder."""
    some = data.load("glyphs", "unused", train_images=50)
    encoder, _ = probe.build(vars(train.parse(["--widths", "2", "2", "2"])), 1, 28)
    norm = next(m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))
    def move(module, inputs, output):
        module.running_mean.add_(1)
    norm.register_forward_hook(move)
    with pytest.raises(AssertionError, match="running_mean"):
        probe.probe(encoder, some, epochs=1)
