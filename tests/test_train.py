"""train.py and probe.py at the smallest size, on the CPU: what they print and write, every method, every default."""
import copy
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import layers
import losses
import probe
import run
import train
from helpers import ROOT, log_of, train_here


def test_train_then_probe(tmp_path, capsys):
    """A short run on glyphs writes its folder and prints frozen and trained; probe.py alone gives the same result."""
    folder = tmp_path / "run"
    train_here(folder)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "CPU: 1 x 64 images a step, half precision off"
    assert lines[1].startswith("frozen encoder: top-1 ") and lines[2].startswith("epoch 1/2 ") and "left" in lines[2]
    assert "\r" not in printed and lines[4].startswith("top-1 on 2000 test images: frozen ") and "h-ssl" in lines[4]
    assert [line.split(":")[0] for line in lines[5:]] == ["20 nearest neighbours", "effective rank of 64", "spread"]
    config = json.loads((folder / "config.json").read_text())
    assert config["group"] == "rotation" and config["torch"] == torch.__version__
    log = log_of(folder)
    assert [(entry["epoch"], entry["step"]) for entry in log] == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    assert all(entry["loss"] > 0 and entry["images_per_second"] > 0 and 0 < entry["lr"] <= 0.1 for entry in log)

    first = json.loads((folder / "probe.json").read_text())
    again = subprocess.run([sys.executable, "probe.py", folder, "--device", "cpu"], cwd=ROOT, capture_output=True,
                           text=True, check=True)
    assert json.loads(again.stdout) == json.loads((folder / "probe.json").read_text()) == first
    assert first["test_images"] == 2000 and 0 <= first["top1"] <= 100 and first["frozen_top1"] is not None


@pytest.mark.parametrize("flags", (
    "--method a-ssl --group scale", "--method supervised --group-size 1", "--method frozen",
    "--group translation --amp bfloat16",
    "--group-size 8 --extent 2 --padding circular",
    "--backbone residual --widths 2 3 4 5 --depth 10 --grid 4 --checkpoint-activations",
    "--objective simsiam", "--objective byol --method a-ssl", "--views 4",
    "--group translation --views 3 --padding circular", "--group translation --method a-ssl --crop",
    "--group translation --structure none", "--group scale --structure none --method a-ssl",
    "--lr-per-256 --max-distance 1 --grid 2 --probe-grid 0"))
def test_every_method_and_group_runs(flags, few_glyphs, tmp_path, capsys):
    train_here(tmp_path, *flags.split(), "--epochs", "1")
    assert "top-1 on 100" in capsys.readouterr().out
    assert len(log_of(tmp_path)) == (0 if "frozen" in flags else 3)


def test_1001_images(tmp_path):
    """The batch-norm pass before training takes about 1,000 images at a time, and never a single one."""
    flags = "--train-images 1001 --structure none --group translation --widths 1 1 1 --epochs 1 --batch-size 1000"
    train_here(tmp_path, *flags.split())
    assert len(log_of(tmp_path)) == 1


def test_an_untied_translation_builds_no_convolution(monkeypatch):
    """--structure none makes the dense network and nothing else: it has the weights that the seed gives it alone."""
    args = train.parse("--group translation --structure none --widths 2 3 4".split())
    torch.manual_seed(5)
    expected = layers.DenseBackbone(28, (2, 3, 4)).state_dict()
    torch.manual_seed(5)
    encoder, _ = run.build(vars(args), 1, 28)
    assert encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("flags, defaults", (
    ("--dataset mnist", dict(group="translation", epochs=500, batch_size=4096, group_size=1, base_space=4,
                             widths=[32, 63, 95], temperature=0.1)),
    ("--dataset cifar10 --group rotation", dict(epochs=1300, batch_size=4096, group_size=4, base_space=1,
                                                widths=[16, 128, 256, 512], backbone="residual")),
    ("--group scale", dict(epochs=8, batch_size=256, group_size=3, base_space=1, warmup_epochs=1, lr=0.1))))
def test_help_shows_the_defaults_in_force(flags, defaults, capsys, monkeypatch):
    """The defaults depend on the data set and the group, and --help shows those for the ones given with it."""
    monkeypatch.setenv("COLUMNS", "200")                                       # so that no default is wrapped
    with pytest.raises(SystemExit) as stop:
        train.parse([*flags.split(), "--help"])
    assert stop.value.code == 0
    shown, args = capsys.readouterr().out, vars(train.parse(flags.split()))
    for name, value in defaults.items():
        flag = name.replace("_", "-")
        assert args[name] == value
        assert re.search(rf"\n  --{flag} .*?\(default: (.*?)\)", shown, re.S)[1] == str(value), name


def test_schedule():
    """Warm-up by step to 1 over 10 steps, then a cosine that starts at 1 and would reach 0 one step after the last."""
    factors = [train.schedule(step, 10, 30) for step in range(31)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10] == 1 and factors[20] == pytest.approx(0.5) and factors[30] == pytest.approx(0)
    assert train.schedule(0, 0, 30) == 1


def test_byol_s_target_is_the_average_of_the_weights(few_glyphs):
    """A copy after the first step; then decay · target + (1 - decay) · online. Along a cosine the decay rises from
    --target-decay to 1."""
    args = train.parse("--objective byol --widths 2 3 4 --target-decay 0.9".split())
    encoder, group = run.build(vars(args), 1, 28)
    objective = train.make_objective(args, encoder, group, data.load("glyphs", "unused", train_images=8), total=5)
    online, target = nn.ModuleList([encoder, objective.head]), objective.others["target"]
    assert not any(p.requires_grad for p in target.parameters())
    for step in range(5):
        before = [p.clone() for p in target.parameters()]
        with torch.no_grad():
            for p in online.parameters():
                p.add_(torch.randn_like(p))
        objective.after_step(step)
        decay = 1 - (1 - 0.9) * (math.cos(math.pi * step / 5) + 1) / 2 if step else 0
        for old, average, p in zip(before, target.parameters(), online.parameters(), strict=True):
            torch.testing.assert_close(average, decay * old + (1 - decay) * p.data)


def test_byol_s_target_never_waits_for_the_device():
    """On the meta device a tensor has no value, so a read (item, if, float) would fail."""
    online, target = (nn.Linear(3, 4, device="meta") for _ in range(2))
    for step in range(3):
        losses.move_target(target, online, 0.9, step, total=3)


@pytest.mark.parametrize("flags", ("", "--group translation --method a-ssl --crop", "--method supervised"))
def test_the_head_s_width_comes_from_shapes_alone(flags, few_glyphs):
    """Nothing is computed: a copy of the encoder without values is called, and the encoder itself stays as it was."""
    args, seen = train.parse(f"--widths 2 3 4 {flags}".split()), []
    encoder, group = run.build(vars(args), 1, 28)
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].device.type))
    objective = train.make_objective(args, encoder, group, data.load("glyphs", "unused", train_images=8))
    assert seen == ["meta"] and objective.encoder is encoder and encoder.training
    assert not any(p.is_meta for p in objective.parameters())


def test_without_a_gpu_several_processes_say_so(monkeypatch, capsys):
    """Once, by the first process, unless --device says that the CPU is meant."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for world, rank, given, expected in (("8", "0", None, True), ("8", "1", None, False), ("8", "0", "cpu", False),
                                         ("1", "0", None, False)):
        monkeypatch.setenv("WORLD_SIZE", world), monkeypatch.setenv("RANK", rank)
        assert run.choose_device(given) == "cpu"
        assert ("NO GPU FOUND: 8 processes" in capsys.readouterr().out) is expected


@pytest.mark.parametrize("amp, precision", (("off", "ieee"), ("bfloat16", "none")))
def test_amp_off_means_float32(amp, precision, monkeypatch):
    """Not TF32, in which PyTorch lets GPUs convolve."""
    monkeypatch.setattr(torch.backends, "fp32_precision", "none")
    train.join_processes(train.parse(["--device", "cpu", "--amp", amp]))
    assert torch.backends.fp32_precision == precision


def test_the_probe_of_a_float32_run_is_in_float32(few_glyphs, tmp_path, monkeypatch):
    train_here(tmp_path)
    monkeypatch.setattr(torch.backends, "fp32_precision", "none")
    probe.main(probe.parse([str(tmp_path), "--device", "cpu"]))
    assert torch.backends.fp32_precision == "ieee"


def test_byol_resumes_exactly(few_glyphs, tmp_path, monkeypatch):
    """From the first epoch's checkpoint on, with predictor and target: the undisturbed run's end, bit for bit."""
    write = run.write_whole

    def keep_first(path, content):
        write(path, content)
        if path.name == "checkpoint.pt" and not (tmp_path / "resumed").exists():
            (tmp_path / "resumed").mkdir()
            write(tmp_path / "resumed" / "checkpoint.pt", bytes(content))
    monkeypatch.setattr(run, "write_whole", keep_first)
    straight = train_here(tmp_path / "straight", "--objective", "byol")
    resumed = train_here(tmp_path / "resumed", "--objective", "byol", "--resume")
    assert len(log_of(tmp_path / "resumed")) == 3 and straight["step"] == resumed["step"] == 6
    assert "target.1.0.weight" in straight["others"] and "predictor.0.weight" in straight["others"]
    for part in ("encoder", "head", "others"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in straight[part].items())


@pytest.mark.parametrize("flags", ("--amp bfloat16 --probe-grid 1", "--group translation --crop --method a-ssl"))
def test_the_encoder_of_a_run(flags, few_glyphs, tmp_path):
    """load_encoder gives the network that train.py saved, in evaluation mode, and its flags."""
    checkpoint = train_here(tmp_path, *flags.split(), "--epochs", "1")
    before = torch.get_rng_state()
    f, settings = run.load_encoder(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    state = f.state_dict()
    assert settings == checkpoint["settings"] and not f.training
    assert state.keys() == checkpoint["encoder"].keys()
    assert all(torch.equal(value, state[name]) for name, value in checkpoint["encoder"].items())
    assert f(torch.zeros(2, 1, 28, 28)).shape == (2, 4, settings["group_size"], 7, 7)


def test_the_encoder_alone_is_enough(few_glyphs, tmp_path):
    """Head and momentum may be missing from the file, and are not read; what is needed and missing is a ValueError."""
    checkpoint = train_here(tmp_path, "--epochs", "1")
    torch.save({key: checkpoint[key] for key in ("encoder", "settings")}, tmp_path / "checkpoint.pt")
    assert run.load_encoder(str(tmp_path))[1]["widths"] == [2, 3, 4]
    with pytest.raises(ValueError, match="is not a checkpoint of train.py"):
        run.load_checkpoint(tmp_path / "checkpoint.pt")
    for spoil, message in ((lambda c: c.pop("settings"), "not a checkpoint"),
                           (lambda c: c["encoder"].popitem(), "not fit"),
                           (lambda c: c["settings"].pop("sigma"), "not fit")):
        wrong = copy.deepcopy({key: checkpoint[key] for key in ("encoder", "settings")})
        spoil(wrong)
        torch.save(wrong, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match=message):
            run.load_encoder(tmp_path)
    with pytest.raises(ValueError, match="is missing"):
        run.load_encoder(tmp_path / "nothing")


@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_features_for_use_elsewhere(dtype, few_glyphs, tmp_path, capsys):
    """Both splits in order: the 2x2 means of the maps, group elements first, then channels, rows and columns."""
    train_here(tmp_path / "run", "--epochs", "1")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    capsys.readouterr()
    flags = ["--device", "cpu", "--features", f"{tmp_path}/f.npz", "--dtype", dtype]
    run.call(probe.main, probe.parse([str(tmp_path / "run"), *flags]))
    assert json.loads(capsys.readouterr().out)["test_features"] == [100, 64]
    arrays, some = np.load(tmp_path / "f.npz"), data.load("glyphs", "unused", train_images=200)
    f, _ = run.load_encoder(tmp_path / "run")
    for split, images, labels in (("train", some.train_images, some.train_labels),
                                  ("test", some.test_images, some.test_labels)):
        z = f(some.batch(images, torch.arange(len(images))))                                         # (N, C, G, H, W)
        expected = F.adaptive_avg_pool2d(z.transpose(1, 2).flatten(1, 2), 2).flatten(1).detach().numpy()
        assert arrays[f"{split}_features"].dtype == dtype
        np.testing.assert_allclose(arrays[f"{split}_features"], expected, atol=1e-5 if dtype == "float32" else 1e-2)
        assert (arrays[f"{split}_labels"] == labels.numpy()).all()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_probe_notices_a_moving_encoder(few_glyphs):
    """The guard fires when a forward pass changes a buffer of the encoder."""
    some = data.load("glyphs", "unused", train_images=50)
    encoder, _ = run.build(vars(train.parse(["--widths", "2", "2", "2"])), 1, 28)
    norm = next(m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))

    def move(module, inputs, output):
        module.running_mean.add_(1)
    norm.register_forward_hook(move)
    with pytest.raises(AssertionError, match="running_mean"):
        probe.probe(encoder, some, iterations=9)


@pytest.mark.parametrize("flags, size, base_space", (
    ("", 64, 8), ("--image-size 32", 32, 4), ("--image-size 4", 4, 1), ("--group rotation", 64, 1),
    ("--group scale", 64, 1), ("--backbone resnet18", 64, 4), ("--backbone resnet18 --image-size 224", 224, 3),
    ("--base-space 2", 64, 2)))
def test_windows_for_your_own_images(flags, size, base_space):
    """Half the feature map's side, unless the views do not differ by shifts."""
    args = train.parse(["--dataset", "folder", *flags.split()])
    assert (args.image_size, args.base_space) == (size, base_space)


@pytest.mark.parametrize("labels", (True, False))
def test_your_own_images(labels, tmp_path, capsys):
    """From a folder to a trained encoder and its features, read back without the images."""
    for i in range(44):
        folder = tmp_path / "photos" / (f"train/{'ab'[i % 2]}" if labels else "all")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + i, 50), (5 * i, 255 * (i % 2), 0)).save(folder / f"{i}.png")
    few = "--dataset folder --image-size 16 --train-images 40 --batch-size 8 --widths 4 4 4 --epochs 1 --eval-every 1"
    train_here(tmp_path / "run", "--data-dir", f"{tmp_path}/photos", *few.split())
    result = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert (result["train_images"], result["test_images"]) == (40, 4)
    assert (result["top1"] is not None) == labels and result["effective_rank"] > 1
    assert ("no top-1" in capsys.readouterr().out) != labels
    run.call(probe.main, probe.parse([f"{tmp_path}/run", "--device", "cpu", "--features", f"{tmp_path}/f.npz"]))
    arrays = np.load(tmp_path / "f.npz")
    assert arrays["train_features"].shape == (40, result["dimensions"]) and ("train_labels" in arrays) == labels
    encoder, settings = run.load_encoder(tmp_path / "run")
    assert settings["image_shape"] == [3, 16]
    assert encoder(torch.zeros(2, 3, 16, 16)).shape == (2, 4, 1, 4, 4)
