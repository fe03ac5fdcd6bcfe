"""What the documents promise: commands parse, examples run and print what stands beside them, links
lead somewhere, files stand alone."""
import ast
import inspect
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch

import crops
import hssl
import report
import simclr
import tables
import train

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {}
for name in ("README.md", "TOUR.md", "experiments/README.md"):
    TEXTS[name] = (ROOT / name).read_text(encoding="utf-8")
README = TEXTS["README.md"]
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def commands(text):
    """(script, its arguments) of each command in a document's blocks and in its inline code."""
    lines = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        lines += block.replace("\\\n", " ").splitlines()
    for code in re.findall(r"`((?:python|torchrun) [^`]+)`", text):
        lines.append(code.replace("\n", " "))    # inline code may be wrapped
    for line in lines:
        words = shlex.split(line, comments=True)
        scripts = [word for word in words if word.endswith(".py")]
        if scripts and "pytest" not in words:
            yield scripts[0], words[words.index(scripts[0]) + 1:]


COMMANDS = [command for text in TEXTS.values() for command in commands(text)]
assert len(COMMANDS) > 10
PARSERS = {
    "train.py": train.parse,
    "experiments/crops.py": crops.parse,
    "experiments/report.py": report.parse,
    "experiments/simclr.py": simclr.parse,
    "experiments/tables.py": tables.parse,
}


@pytest.mark.parametrize("script, arguments", COMMANDS, ids=str)
def test_commands_parse(script, arguments):
    """By the program's own parser, or else each flag is in its source."""
    source = (ROOT / script).read_text(encoding="utf-8")
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            PARSERS[script](arguments)
    elif script in PARSERS:
        PARSERS[script](["mnist" if word == "NAME" else word for word in arguments])
    else:
        for flag in arguments:
            assert not flag.startswith("--") or f'"{flag}"' in source, f"{script} has no {flag}"


def test_the_losses_stand_there_as_in_hssl():
    """But for docstrings and comments."""
    [losses] = [example for example in EXAMPLES if example.startswith("def a_ssl_loss")]
    shown = ast.parse(losses).body
    assert [node.name for node in shown] == ["a_ssl_loss", "h_ssl_loss"]
    for node in shown:
        source = ast.parse(inspect.getsource(getattr(hssl, node.name))).body[0]
        del source.body[0]
        assert ast.dump(node) == ast.dump(source)


def test_examples_run_as_pasted_and_print_what_they_say(monkeypatch, capsys):
    """One prints four errors, of rounding; the other what stands behind its last line."""
    [copied] = [example for example in EXAMPLES if "equivariance_error(" in example]
    [loaded] = [example for example in EXAMPLES if "load_encoder(" in example]
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    scope = {}
    exec(copied, scope)
    printed = capsys.readouterr().out
    errors = [float(number) for number in re.findall(r"\d\.\d+(?:e-\d+)?", printed)]
    assert len(errors) == 4 and max(errors) < 1e-5
    assert all(parameter.grad is not None for parameter in scope["f"].parameters())

    exec(loaded, {})
    assert capsys.readouterr().out.strip() == loaded.strip().rpartition("  # ")[2]


@pytest.mark.parametrize("title, name, group, seeds, supervised_seeds", (
    ("translation, 20 epochs", "digits", "", range(5), range(3)),
    ("rotation, glyphs, 20 epochs", "other-groups", "rotation ", range(5), range(3)),
    ("scale, 40 epochs", "other-groups", "scale ", range(5), range(3)),
    ("translation, CIFAR-10, 10 epochs", "cifar10", "", range(3), range(3)),
    ("translation, the paper's 500 epochs", "paper-mnist", "translation ", range(2), range(1)),
))
def test_the_table_has_the_means_of_the_committed_runs(title, name, group, seeds, supervised_seeds):
    runs = report.read_runs(name)
    cells = []
    for method in ("frozen", "a-ssl", "h-ssl", "supervised"):
        row = group + method.replace("frozen", "h-ssl")
        chosen = supervised_seeds if method == "supervised" else seeds
        means = []
        for measure in ("top1", "neighbours"):
            found = report.values(runs, row, measure, frozen=method == "frozen")
            means.append(f"{statistics.mean(found[seed] for seed in chosen):.2f}")
        cells.append(" / ".join(means))
    assert report.line(title, *cells) in README.replace(" †", "")


@pytest.mark.parametrize("document", TEXTS)
def test_links_lead_somewhere(document):
    text = re.sub(r"<!--.*?-->", "", TEXTS[document])
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = ROOT / document if path == "" else (ROOT / document).parent / path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]
            assert anchor in anchors, target


@pytest.mark.parametrize("name", ("hssl", "layers", "losses", "lars", "data"))
def test_a_module_works_when_copied_alone(name):
    """It imports none of its neighbours."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported and not imported & {path.stem for path in ROOT.glob("*.py")}
