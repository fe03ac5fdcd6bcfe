"""What the documents promise: commands parse, examples run and print what stands beside them, names
and links exist, files stand alone."""
import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import data
import probe
import report
import simclr
import tables
import train

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {}
for name in ("README.md", "TOUR.md", "experiments/README.md"):
    TEXTS[name] = (ROOT / name).read_text(encoding="utf-8")
README = TEXTS["README.md"]


# ----------------------------------------------------------------------------------------- commands

def commands(text):
    """(script, its arguments) of each command in a document's blocks and in its inline code."""
    found = re.findall(r"```sh\n(.*?)```", text, re.S)
    found += re.findall(r"`(python [^`]+)`", text)
    for block in found:
        block = block.replace("\\\n", " ")
        # Inline code may be wrapped.
        if block.startswith("python "):
            block = block.replace("\n--", " --")
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words):
                if word.endswith(".py") and "pytest" not in words:
                    yield word, words[place + 1:]
                    break


COMMANDS = [command for text in TEXTS.values() for command in commands(text)]


PARSERS = {
    "train.py": train.parse,
    "experiments/report.py": report.parse,
    "experiments/simclr.py": simclr.parse,
    "experiments/tables.py": tables.parse,
}


def test_commands_are_found():
    scripts = [script for script, _ in COMMANDS]
    assert scripts.count("train.py") >= 10
    for script in ("probe.py", "experiments/tables.py", "experiments/report.py"):
        assert script in scripts


@pytest.mark.parametrize("script, arguments", COMMANDS, ids=lambda value: str(value))
def test_commands_parse(script, arguments, capsys):
    """By the program's own parser, or else each flag is in its source."""
    if script == "train.py" and "--help" in arguments:
        with pytest.raises(SystemExit) as stop:
            train.parse(arguments)
        assert stop.value.code == 0
        assert "defaults by data set" in capsys.readouterr().out
        return
    if script in PARSERS:
        PARSERS[script](["mnist" if word == "NAME" else word for word in arguments])
        return
    source = (ROOT / script).read_text(encoding="utf-8")
    flags = [word for word in arguments if word.startswith("--")]
    for flag in flags:
        assert f'"{flag}"' in source, f"{script} has no {flag}"


def test_flags_in_tables_exist():
    """Every --flag in the documents' inline code is one of train.py or of another program here."""
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("**/*.py")]
    numbers_and_choices = {f"--{name}" for name in [*train.NUMBERS, *train.CHOICES]}
    checked = 0
    for text in TEXTS.values():
        text = re.sub(r"```.*?```", "", text, flags=re.S)
        for code in re.findall(r"`([^`]+)`", text):
            for flag in re.findall(r"(?<!\S)--[a-z-]+", code):
                exists = flag in numbers_and_choices
                exists = exists or any(f'"{flag}"' in source for source in sources)
                assert exists or flag in ("--max-restarts", "--nproc"), flag    # torchrun's
                checked += 1
    assert checked > 25


# ----------------------------------------------------------------------------------------- examples

def test_examples_run_as_pasted_and_print_what_they_say(monkeypatch, capsys):
    """The first prints four errors, of rounding; the second what stands behind its last line."""
    copied, loaded = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    scope = {}
    exec(copied, scope)
    printed = capsys.readouterr().out
    errors = [float(number) for number in re.findall(r"\d\.\d+(?:e-\d+)?", printed)]
    assert len(errors) == 4 and max(errors) < 1e-5
    assert all(parameter.grad is not None for parameter in scope["f"].parameters())
    assert "below 1e-5" in copied

    exec(loaded, {})
    assert capsys.readouterr().out.strip() == loaded.strip().rpartition("  # ")[2]


def test_the_first_run_is_that_of_the_encoder_that_comes_along():
    """Its printed measures stand in the README, and its neighbours can be measured again."""
    folder = ROOT / "experiments/results/glyphs-encoder"
    result = json.loads((folder / "probe.json").read_text())
    assert f"frozen encoder: {probe.in_words(result['frozen'])}\n" in README
    assert f"trained encoder: {probe.in_words(result)}\n" in README

    encoder, settings = probe.load_encoder(folder)
    assert settings["dataset"] == "glyphs"
    glyphs = data.load("glyphs")
    features, _ = probe.extract(encoder, glyphs, glyphs.train_images, settings["probe_grid"])
    test_features, _ = probe.extract(encoder, glyphs, glyphs.test_images, settings["probe_grid"])
    voted = probe.neighbours(
        features, glyphs.train_labels, test_features, glyphs.test_labels, glyphs.classes)
    assert voted == pytest.approx(result["neighbours"], abs=0.5)


# ---------------------------------------------------------------------------------- names and links

def test_the_map_names_what_exists():
    """Each `symbol` in a row of "Read in this order" is in that row's file."""
    table = README.split("## Read in this order")[1].split("\n\n")[1]
    checked = 0
    for row in table.splitlines():
        names = re.findall(r"`([^`]+)`", row)
        for name in names[1:]:
            source = (ROOT / names[0]).read_text(encoding="utf-8")
            assert re.search(rf"(def|class) {name}\b", source), f"{name} is not in {names[0]}"
            checked += 1
    assert checked > 12


@pytest.mark.parametrize("document", TEXTS)
def test_links_lead_somewhere(document):
    text = re.sub(r"<!--.*?-->", "", TEXTS[document])
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]
            assert anchor in anchors, target


@pytest.mark.parametrize("name", ("hssl", "layers", "losses", "lars", "data"))
def test_a_component_imports_none_of_its_neighbours(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported and not imported & {path.stem for path in ROOT.glob("*.py")}


def test_each_equation_is_named_at_one_line():
    """`Eq. (n)` stands behind exactly one line of code of the project, for n = 1, 2, 3."""
    lines = []
    for path in ROOT.glob("*.py"):
        if not path.stem.startswith("test_"):
            lines += path.read_text(encoding="utf-8").splitlines()
    for n in (1, 2, 3):
        assert len([line for line in lines if re.search(rf"#.*Eq\. \({n}\)$", line)]) == 1
