"""The size of the source: lines of at most 120 columns, and eight modules that can be read in one sitting."""
import pytest

from helpers import ROOT

MODULES = "hssl", "layers", "losses", "lars", "data", "run", "train", "probe"


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("experiments/*.py")]),
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_have_at_most_120_columns(path):
    lines = path.read_text().splitlines()
    assert [f"line {i}: {len(line.rstrip())}" for i, line in enumerate(lines, 1) if len(line.rstrip()) > 120] == []


def test_the_modules_are_short():
    assert {f"{name}.py" for name in MODULES} <= {path.name for path in ROOT.glob("*.py")}
    assert sum(len((ROOT / f"{name}.py").read_text().splitlines()) for name in MODULES) <= 1750
