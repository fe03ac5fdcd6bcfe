"""TOUR.md: every block runs, pasted into Python's prompt in order, and prints what stands below it.

Words must be the same. Numbers may differ by 1e-4; in steps that train by 2 %, and accuracies by
3 points, for processors round differently and training magnifies that; errors below 1e-6 by
anything that stays there. The number after "about" is a ratio of times, which no test holds.
"""
import code
import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

TOUR = Path(__file__).resolve().parent.parent / "TOUR.md"
BLOCK = re.compile(r"```python\n(.*?)```\n```text\n(.*?)```", re.S)
NUMBER = re.compile(r"(about |top-1 )?(-?\d+(?:\.\d+)?(?:e-?\d+)?)")
HEADING = re.compile(r"^## (\d+)\.", re.M)
STEPS_THAT_TRAIN = (8, 9, 10)


def run():
    """Run all blocks in one session: a list of (step, what stands below it, what was printed)."""
    text = TOUR.read_text(encoding="utf-8")
    prompt = code.InteractiveConsole()
    outputs = []
    for block in BLOCK.finditer(text):
        step = int(HEADING.findall(text[:block.start()])[-1])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            # An empty line ends an indented block.
            for line in [*block[1].splitlines(), ""]:
                prompt.push(line)
        outputs.append((step, block[2], printed.getvalue()))
    return outputs


def close(kind, expected, printed, tolerance):
    if kind == "about ":
        return printed > 0
    if kind == "top-1 ":
        return abs(expected - printed) <= 3
    both_are_rounding = max(abs(expected), abs(printed)) < 1e-6
    return both_are_rounding or abs(expected - printed) <= tolerance * abs(expected)


def test_every_step_prints_what_it_says():
    outputs = run()
    assert {step for step, *_ in outputs} == set(range(1, 13))
    for step, expected, printed in outputs:
        message = f"step {step}\n{expected}\n{printed}"
        assert printed and NUMBER.sub("#", printed) == NUMBER.sub("#", expected), message
        tolerance = 0.02 if step in STEPS_THAT_TRAIN else 1e-4
        pairs = zip(NUMBER.findall(expected), NUMBER.findall(printed), strict=True)
        for (kind, a), (_, b) in pairs:
            assert close(kind, float(a), float(b), tolerance), f"{a}, {b} in {message}"


def test_the_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    figures = importlib.import_module("figures")
    figures.main(["tour", "--results", str(tmp_path)])
    sizes = [path.stat().st_size for path in tmp_path.glob("*.png")]
    assert len(sizes) == 3 and min(sizes) > 5000
