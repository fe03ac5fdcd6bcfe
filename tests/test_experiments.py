"""experiments/: train.py takes every run that is listed, finished runs are kept, layers' errors are measured right."""
import argparse
import functools
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

import data
import equivariance
import filters
import measure
import on_gpu
import probe
import report
import run
import runs
import tables
import train
import understand
from hssl import Crops, Rotation, Translation
from helpers import train_here
from kill_and_resume import start
from layers import MNISTBackbone, Untied, steerable_basis

SMALL = "--train-images 100 --batch-size 50 --epochs 1 --warmup-epochs 0 --probe-iterations 9 --widths 2 2 2"


def settings(flags):
    return train.parse([*shlex.split(flags), "--device", "cpu"])


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_listed_run_is_one_that_train_takes(name, capsys):
    for budget in tables.BUDGETS:
        rows = tables.TABLES[name](budget)
        if name in data.SHAPES and name not in tables.TRIALS and budget != "cpu":
            assert len(rows) == 12                                             # 3 groups x 4 methods
        if not rows:
            assert (name in tables.TRIALS) == (budget != "cpu")                # natural images need more than a CPU
            with pytest.raises(SystemExit):
                tables.parse([name, "--budget", budget])
            assert f"{name} has no settings for --budget {budget}" in capsys.readouterr().err
        for row, flags in rows.items():
            args = settings(flags)
            if budget == "paper":
                epochs = {"mnist": 500}.get(args.dataset, 1300)
                assert (args.epochs, args.batch_size, args.temperature) == (epochs, 4096, 0.1), row
            args.widths = [1] * len(args.widths)               # whether the settings fit is not a matter of width
            channels, side = data.SHAPES[args.dataset]
            encoder, group = run.build(vars(args), channels, 40 if args.nuisance == "translation" else side)
            if args.views == 2:
                equal = args.augment and args.method == "a-ssl"
                assert len(train.allowed_pairs(group, args.max_distance, equal)) > 0, row
            else:
                assert train.drawn_sets(group, args.views, count=10).shape == (10, args.views), row


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*-*.json")), ids=lambda path: path.stem)
def test_committed_results_are_of_the_listed_rows(path):
    """Same settings, however written."""
    record = json.loads(path.read_text())
    rows = tables.TABLES[record["name"]](record["budget"])
    for r in record["runs"]:
        assert settings(r["flags"]) == settings(rows[r["row"]]), r["row"]


def test_finished_runs_are_kept(tmp_path, monkeypatch, capsys, few_glyphs):
    """A table is trained, written with what identifies its runs, and not trained again; other flags are refused."""
    monkeypatch.setitem(tables.TABLES, "glyphs", lambda budget: {"h-ssl, small": "--device cpu"})

    def call(extra, results=tmp_path):
        tables.main(tables.parse(["glyphs", "--seeds", "0", "--jobs", "2", "--runs", str(tmp_path / "runs"),
                                  "--results", str(results), "--extra", f"{extra} --eval-every 1"]))
        return capsys.readouterr()

    first = call(SMALL)
    assert first.err.startswith("glyphs-cpu-h-ssl--small-0: frozen ") and "| h-ssl, small | " in first.out
    (found,) = json.loads((tmp_path / "glyphs-cpu.json").read_text())["runs"]
    assert {"commit", "machine", "torch", "seconds", "top1", "frozen_top1"} <= found.keys() and len(found["looks"]) == 1
    flags = f"--device cpu {SMALL} --eval-every 1"
    assert (found["row"], found["flags"], found["seed"]) == ("h-ssl, small", flags, 0)
    assert [step for step, loss in found["losses"]] == [2]

    monkeypatch.setattr(subprocess, "run", None)                               # nothing may be started from here on
    second = call(SMALL)
    assert second.err == "" and second.out == first.out
    results = tmp_path / "glyphs-cpu.json"
    with pytest.raises(SystemExit):                                            # the results would lose their runs
        call(SMALL + " --lr 0.2")
    assert "holds runs with other flags" in capsys.readouterr().err
    assert len(json.loads(results.read_text())["runs"]) == 1
    with pytest.raises(SystemExit, match="was made with other flags"):
        call(SMALL + " --lr 0.2", tmp_path / "other")

    other = tmp_path / "runs" / "glyphs-cpu-h-ssl--small-7"                    # another seed, finished earlier, stays
    other.mkdir()
    (other / "run.json").write_text(json.dumps({key: found[key] for key in found if key != "row"} | dict(seed=7)))
    call(SMALL)
    assert [r["seed"] for r in json.loads(results.read_text())["runs"]] == [0, 7]
    (other / "run.json").unlink()                                              # nor does a fresh clone lose results
    call(SMALL)
    assert [r["seed"] for r in json.loads(results.read_text())["runs"]] == [0, 7]


@pytest.mark.parametrize("flags, words", (
    ("glyphs --only typo", "no row has any of these words"), ("glyphs --seeds 100", "below 100"),
    ("glyphs --jobs 0", "at least 1"), ("glyphs --launcher nosuch", "no program"), ("typo", "invalid choice")))
def test_tables_that_cannot_be_trained_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        tables.parse(flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_only_some_rows_are_trained(tmp_path, monkeypatch, few_glyphs):
    """--only: rows that have one of these words; a word is not a part of one."""
    monkeypatch.setitem(tables.TABLES, "glyphs", lambda budget: dict.fromkeys(("h-ssl", "h-ssl, longer", "a-ssl"), ""))
    started = []
    monkeypatch.setattr(runs, "train_row", lambda flags, seed, out, args: started.append(out.name) or {})
    for words in (["h-ssl", "longer"], ["longer"]):
        runs.train_table(tables.parse(["glyphs", "--seeds", "5", "--results", str(tmp_path), "--runs", str(tmp_path),
                                       "--only", *words]))
    assert started == ["glyphs-cpu-h-ssl-5", "glyphs-cpu-h-ssl--longer-5", "glyphs-cpu-h-ssl--longer-5"]


def test_a_failed_run_ends_the_table_with_its_message(tmp_path):
    launcher = f"""{sys.executable} -c 'import sys; sys.exit("no room for " + sys.argv[1])'"""
    with pytest.raises(SystemExit, match="(?s)--method h-ssl --seed 0 .*failed:\nno room for .*train.py"):
        tables.main(tables.parse(["glyphs", "--launcher", launcher, "--runs", str(tmp_path / "runs"), "--results",
                                  str(tmp_path)]))
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("flags", ("--method a-ssl", "--objective byol", "--views 3"))
def test_the_benchmark_s_step_trains(flags, monkeypatch):
    """Each of its two forms moves the encoder's weights."""
    made, make = [], train.make_objective
    monkeypatch.setattr(train, "make_objective", lambda *arguments: made.append(make(*arguments)) or made[0])
    *steps, images = measure.training_step(f"--batch-size 8 --widths 2 3 4 {flags}", "cpu")
    assert images == 8
    for step in steps:
        before = [p.clone() for p in made[0].encoder.parameters()]
        step()
        assert not all(torch.equal(a, b) for a, b in zip(before, made[0].encoder.parameters(), strict=True))


def toy_list(folder):
    """on_gpu.py at toy size on the CPU, with one step that is done already; returns its status and what it printed."""
    (folder / "sync_batch_norm.json").write_text(json.dumps(dict(result="done before", seconds=1, details={})))
    process = start("experiments/on_gpu.py", "--device", "cpu", "--smallest", "--out", folder, stdout=subprocess.PIPE)
    return process.communicate()[0], process.returncode


@pytest.mark.background(toy_list, [])
def test_the_list_for_a_gpu(job):
    """Each step is a row and a file; no training step waits for the device, whatever the method and objective."""
    folder, (printed, status) = job
    record = json.loads((folder / "on_gpu.json").read_text())
    assert status == 0, printed
    assert record["smallest"] and list(record["steps"]) == list(on_gpu.STEPS)
    assert all(f"| {name} | {step['result']} | " in printed for name, step in record["steps"].items())
    assert record["steps"]["sync_batch_norm"]["result"] == "done before"
    waits = record["steps"]["waits"]["details"]
    assert len(waits) == 13 and set(waits.values()) == {0}
    resumed, undisturbed = re.findall(r"then (.*); undisturbed (.*)", record["steps"]["interrupted"]["result"])[0]
    assert resumed == undisturbed


def test_a_failed_step_is_a_row_and_tried_again(tmp_path, monkeypatch, capsys):
    """Its message is printed, the status is 1, the steps after it are done, and only it is done again."""
    called = []

    def first(args):
        called.append("first")
        raise RuntimeError("no such kernel")

    def second(args):
        called.append("second")
        return "ok", {}
    monkeypatch.setattr(on_gpu, "STEPS", dict(first=first, second=second))
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--device", "cpu", "--out", str(tmp_path)])
    for expected in (["first", "second"], ["first", "second", "first"]):
        with pytest.raises(SystemExit) as stop:
            on_gpu.main()
        printed = capsys.readouterr()
        assert stop.value.code == 1 and called == expected
        assert "| first | FAILED |" in printed.out and "| second | ok |" in printed.out
        assert "no such kernel" in printed.err


def test_recomputed_activations_take_less_memory():
    """For the paper's network, by shapes alone: less than half of what a step holds at a time."""
    flags = "--dataset tiny-imagenet --group rotation --method a-ssl"
    plain, largest = measure.step_memory(flags, 512)
    checkpointed, _ = measure.step_memory(f"{flags} --checkpoint-activations", 512)
    assert largest == 2**31 and checkpointed < plain / 2 < 40 * 2**30


def test_waits_and_memory_are_counted():
    """Every way of reading a tensor's values counts, plain arithmetic does not; of memory, what is alive at a time."""
    x = torch.arange(4.0)
    with measure.Reads() as reads:
        x[torch.tensor([3, 1, 2, 0])] + x.where(x > 1, 0)
        assert reads.count == 0
        x[0].item(), x.tolist(), x.nonzero(), x[x > 1], bool(x[0] > 1), torch.equal(x, x)
        assert reads.count == 6
    with measure.Held() as held:
        for _ in range(3):
            a = torch.empty(1000)
            b = torch.empty(500)[:100]
            del a, b
        torch.empty(10)
    assert (held.peak, held.alive, held.largest) == (6000, 0, 1000)


def test_load_run_gives_the_encoder_before_and_after_training(tmp_path, few_glyphs):
    """Both are classified as well as train.py found them."""
    run.call(train.main, settings(f"{SMALL} --seed 3 --out {tmp_path}/run"))
    loaded = runs.load_run(tmp_path / "run")
    found = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert loaded.settings["seed"] == 3 and isinstance(loaded.group, Rotation)
    for objective, top1 in ((loaded.before, "frozen_top1"), (loaded.after, "top1")):
        assert probe.probe_as_set(loaded.settings, objective.encoder, loaded.data)["top1"] == found[top1]
    assert not any(torch.equal(p, q) for p, q in zip(loaded.before.head.parameters(), loaded.after.head.parameters()))


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(10, 1, 28, 28)


CIRCULAR = dict(widths=(3, 5, 6), kernel_size=5, padding_mode="circular")


@pytest.mark.parametrize("group, f", (
    (Rotation(4), MNISTBackbone("rotation", 4, **CIRCULAR)),
    (Translation(7, 4, 4, circular=True), MNISTBackbone(**CIRCULAR)),
    (Crops(7, 4, 4, circular=True), MNISTBackbone(**CIRCULAR))), ids=lambda v: type(v).__name__)
def test_no_layer_errs_where_equivariance_is_exact(group, f, x):
    errors = equivariance.layer_errors(f, group, x)
    assert len(errors) == 6 and max(error.max() for error in errors.values()) < 1e-5, errors


def test_shifts_err_by_the_border_alone(x):
    """With zero padding, what leaves the map is lost."""
    errors = equivariance.layer_errors(MNISTBackbone(**CIRCULAR | dict(padding_mode="zeros")), Translation(7, 4, 4), x)
    assert len(errors) == 6 and all(0.01 < error.mean() < 1 for error in errors.values()), errors


def test_every_layer_of_an_untied_network_errs(x):
    errors = equivariance.layer_errors(Untied(MNISTBackbone(widths=(12, 20, 24), kernel_size=5), 4), Rotation(4), x)
    assert len(errors) == 6 and min(error.mean() for error in errors.values()) > 0.7, errors


@pytest.mark.usefixtures("float64")
def test_errors_of_filters(tmp_path, monkeypatch, capsys):
    """Quarter turns of images are those of pixels; filters that do not turn have an error; all rows are kept."""
    x, turned = (filters.waves(3, 9, 1.0, matrix) for matrix in (torch.eye(2), filters.turn(2)))
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)), rtol=0, atol=1e-10)
    args = argparse.Namespace(networks=2, images=10)
    basis = steerable_basis("rotation", 8, 5)
    assert filters.errors(basis, "rotation", args, 1.0, steps=2).max() < 1e-12
    assert filters.errors(basis[:, :1].expand_as(basis), "rotation", args, 1.0).min() > 0.5
    words = f"filters.py --networks 2 --images 10 --kernels 5 --results {tmp_path}"
    monkeypatch.setattr("sys.argv", words.split())
    filters.main()
    found = json.loads((tmp_path / "filters.json").read_text())
    assert [row["K"] for row in found["rotation"]][-3:] == [15, 10, 15] and len(found["scale"]) == 5
    assert all(len(errors) == 2 for row in found["rotation"] + found["scale"] for errors in row["errors"])
    assert capsys.readouterr().out.count("| now: ") == 2


def test_averages_over_the_group_do_not_change_with_the_image_s_turn():
    """Where Eq. (1) is exact; what is read at one element does. The views' projections come in another order."""
    torch.manual_seed(0)
    encoder, x = MNISTBackbone("rotation", 4, widths=[2, 3, 4], kernel_size=5).eval(), torch.rand(6, 1, 28, 28)
    head = train.ProjectionHead(4 * 49, 16, 8)
    objective, turned = argparse.Namespace(encoder=encoder, head=head), x.rot90(1, (2, 3))
    with torch.no_grad():
        (found, p), (after, q) = (understand.representations(objective, Rotation(4), a) for a in (x, turned))
    for name in found:
        same = torch.allclose(found[name], after[name], atol=1e-5)
        assert same == name.endswith(", G"), name
        assert found[name].shape == (6, {"2x2": 64, "mean": 16, "projection, G": 8}.get(name, 16)), name
    torch.testing.assert_close(q, p.roll(-1, 0))                               # T_h x seen from g is x seen from gh
    torch.testing.assert_close(found["projection, G"], p.mean(0))
    # Four passes over turned images are one pass here, and make a network invariant that has no such structure.
    plain = argparse.Namespace(encoder=MNISTBackbone("translation", 1, widths=[2, 3, 4]).eval(),
                               head=train.ProjectionHead(4 * 49, 16, 8))
    with torch.no_grad():
        (found, _), (after, _) = (understand.representations(plain, Translation(7, 7, 4), a, Rotation(4))
                                  for a in (x, turned))
        lifted, _ = understand.representations(objective, Rotation(4), x, Rotation(4))
    for name in ("2x2, T", "hidden, T"):
        torch.testing.assert_close(found[name], after[name], atol=1e-5, rtol=0)
        assert not torch.allclose(found[name[:-3]], after[name[:-3]], atol=1e-5)
    torch.testing.assert_close(lifted["hidden, T"], lifted["hidden, G"], atol=1e-5, rtol=0)


def test_alignment_and_uniformity_are_those_of_a_loop():
    p = torch.nn.functional.normalize(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)), dim=2)
    aligned = [(p[a, i] - p[b, i]).square().sum() for i in range(5) for a in range(3) for b in range(3) if a != b]
    apart = [(-2 * (p[0, i] - p[0, k]).square().sum()).exp() for i in range(5) for k in range(i)]
    found = understand.alignment_and_uniformity(p)
    assert found == pytest.approx([torch.stack(aligned).mean().item(), torch.stack(apart).mean().log().item()])


def test_what_encoder_and_head_know(tmp_path, monkeypatch, capsys, few_glyphs):
    """understand.py on a table's finished run: a line for each readout, of the encoder as it was and as it is."""
    train_here(tmp_path / "why-cpu-h-ssl-0")
    (tmp_path / "why-cpu-h-ssl-0" / "run.json").write_text(json.dumps(dict(method="h-ssl", seed=0, commit="c")))
    monkeypatch.setattr(understand, "assess", functools.partial(probe.assess, iterations=9))        # as the run did
    monkeypatch.setattr(sys, "argv", ["understand.py", "why", "--runs", str(tmp_path), "--results", str(tmp_path)])
    understand.main()
    (found,) = json.loads((tmp_path / "understand_why.json").read_text())["h-ssl"]
    assert found["before"]["2x2"] != found["after"]["2x2"] and set(found["before"]) == set(found["after"])
    assert found["after"]["2x2"]["top1"] == json.loads((tmp_path / "why-cpu-h-ssl-0/probe.json").read_text())["top1"]
    printed = capsys.readouterr().out
    assert printed.count("| h-ssl | ") == 7 and "| h-ssl | hidden, G | " in printed
