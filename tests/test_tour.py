"""TOUR.md: every block runs, in order, and prints what stands below it.

    python tests/test_tour.py        writes what the blocks print into TOUR.md

Words must be the same. Numbers may differ by 1e-4, in steps that train by 2 % and in accuracies by 3 points (processors
round differently, and training magnifies that); errors below 1e-6 by anything that stays there. The number after
"about" is a ratio of times, which no test holds.
"""
import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kill_and_resume import start

TOUR = Path(__file__).resolve().parent.parent / "TOUR.md"
BLOCK = re.compile(r"```python\n(.*?)```\n```text\n(.*?)```", re.S)
NUMBER = re.compile(r"(about |top-1 )?(-?\d+(?:\.\d+)?(?:e-?\d+)?)")
TRAINS = (8, 9, 10)


def run():
    """Run all blocks in one session: a list of (what stands in TOUR.md, what was printed)."""
    scope, found = {}, []
    for code, expected in BLOCK.findall(TOUR.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"TOUR.md, step {len(found) + 1}", "exec"), scope)
        found.append((expected, printed.getvalue()))
    return found


def close(kind, a, b, tolerance):
    if kind == "about ":
        return b > 0
    if kind == "top-1 ":
        return abs(a - b) <= 3
    return abs(a - b) <= tolerance * abs(a) or max(abs(a), abs(b)) < 1e-6


def run_alone(folder):
    """`run` in a process of its own."""
    code = "import json, sys; sys.path.insert(0, 'tests'); import test_tour; print(json.dumps(test_tour.run()))"
    return json.loads(start("-c", code, stdout=subprocess.PIPE).communicate()[0])


@pytest.mark.background(run_alone, [])
def test_every_step_prints_what_it_says(job):
    _, found = job
    assert len(found) == 12
    for step, (expected, printed) in enumerate(found, 1):
        assert printed and NUMBER.sub("#", printed) == NUMBER.sub("#", expected), f"step {step}\n{expected}\n{printed}"
        for (kind, a), (_, b) in zip(NUMBER.findall(expected), NUMBER.findall(printed), strict=True):
            tolerance = 0.02 if step in TRAINS else 1e-4
            message = f"step {step}: {a} in TOUR.md, {b} here\n{expected}\n{printed}"
            assert close(kind, float(a), float(b), tolerance), message


def test_blocks_can_be_pasted():
    """Python's prompt ends an indented block at an empty line only."""
    for code, _ in BLOCK.findall(TOUR.read_text()):
        block = code.replace("\n\n", "\n#\n").splitlines()
        for line, following in zip(block, block[1:]):
            assert not (line.startswith("    ") and re.match(r"[a-z]", following)), f"{line}\n{following}"


def test_the_comparison_can_fail():
    assert close("", 2.0, 2.0001, 1e-4) and not close("", 2.0, 2.001, 1e-4)
    assert close("", 3e-16, 8e-15, 1e-4) and not close("", 3e-16, 2e-6, 1e-4)
    assert close("top-1 ", 80, 78, 1e-4) and not close("top-1 ", 80, 76, 1e-4)


if __name__ == "__main__":
    sys.path.insert(0, str(TOUR.parent))
    outputs = iter(printed for _, printed in run())
    text = BLOCK.sub(lambda match: f"```python\n{match[1]}```\n```text\n{next(outputs)}```", TOUR.read_text())
    TOUR.write_text(text)
