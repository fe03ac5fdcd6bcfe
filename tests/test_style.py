"""The size of the source: lines of at most 120 columns, and modules that can be read in one sitting."""
import pytest

from helpers import ROOT

MODULES = "hssl", "layers", "losses", "lars", "data", "run", "train", "probe"


@pytest.mark.parametrize("folder", (".", "tests", "experiments"))
def test_lines_have_at_most_120_columns(folder):
    paths = [*(ROOT / folder).glob("*.py")]
    long = [f"{path.name}:{i}" for path in paths for i, line in enumerate(path.read_text().splitlines(), 1)
            if len(line.rstrip()) > 120]
    assert paths and not long


def test_the_modules_are_short():
    """No file that is read beside the paper is longer than one sitting, 350 lines."""
    lengths = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in MODULES}
    assert max(lengths.values()) <= 350, lengths
