"""experiments/report.py: its statistics, its tables, and the tables in the documents."""
import json
import re
from pathlib import Path

import pytest

import benchmark
import equivariance
import report

ROOT = Path(__file__).resolve().parent.parent


def make_run(row, seed, frozen, trained, training_seconds=60.4):
    """A record in which all measures are equal."""
    about = dict(row=row, seed=seed, epoch=8, training_seconds=training_seconds)
    before = dict.fromkeys(report.MEASURES.values(), frozen)
    return about | dict.fromkeys(report.MEASURES.values(), trained) | dict(frozen=before)


def test_a_table_with_two_methods(tmp_path, monkeypatch):
    """A-SSL has one seed more than H-SSL: each comparison takes the seeds that both sides have. Two
    seeds have no interval. One of H-SSL's runs was slow: the table's time is the median."""
    runs = [make_run("two", 7, 50, 51), make_run("two", 8, 50, 53)]
    for seed, gain in enumerate((3, 3, 3, 9)):
        runs.append(make_run("a-ssl", seed, 50 + seed, 50 + seed + gain))
    for seed, time in enumerate((7201, 7201, 36000)):
        runs.append(make_run("h-ssl", seed, 50 + seed, 53 + seed, time))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps(dict(runs=runs)))
    printed = report.table("mine").splitlines()
    assert "| a-ssl | 4 | 8 | 60 s | 51.50 ± 1.29 → 56.00 ± 4.08 | " in printed[3]
    assert "| h-ssl | 3 | 8 | 2.0 h | 51.00 ± 1.00 → 54.00 ± 1.00 | " in printed[4]
    assert "| two − frozen | 2 | +2.00 | " in printed[8]
    # Gains of 3, 3, 3 and 9: 4.5 ± 3.1824 · 3 / √4.
    assert "| a-ssl − frozen | 4 | +4.50 [−0.27, +9.27] | " in printed[9]
    assert "| h-ssl − a-ssl | 3 | +0.00 [+0.00, +0.00] | " in printed[11]


# What a marker in a document stands for: tables that follow it, and numbers of the next paragraph.
MARKER = re.compile(r"<!-- (table|numbers) of (.+?) -->\n+")
NUMBER = re.compile(r"[+−]?\d+\.\d\d")


def numbers_of_columns(text):
    """{title of a column: the numbers in it}, of all tables of a text."""
    found = {}
    titles = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if line.startswith("| ---"):
            titles = heading
        for title, cell in zip(titles, cells):
            found.setdefault(title, set()).update(NUMBER.findall(cell))
        heading = cells
    return found


def printed(capsys, words):
    """What the scripts print for the words of a marker, from the committed files."""
    name, *_ = words
    path = report.RESULTS / f"{name}.json"
    if name.startswith("benchmark"):
        return "\n".join(map(benchmark.table_line, report.read_json(path)["records"]))
    if name.startswith("equivariance"):
        (columns,) = report.read_json(path)["tables"].values()
        equivariance.print_table(columns)
        return capsys.readouterr().out.strip()
    return report.table(*words)


@pytest.mark.parametrize("document", ("README.md", "experiments/README.md"))
def test_results_in_the_documents_are_those_of_the_files(document, capsys):
    """Marked tables are what the scripts print; marked numbers are in what they print.

    No other table and no other sentence has deviations or intervals.
    """
    text = (ROOT / document).read_text(encoding="utf-8")
    rest = text
    for marker in MARKER.finditer(text):
        kind, words = marker.groups()
        block = text[marker.end():].partition("\n\n")[0]
        rest = rest.replace(block, "")
        if kind == "table":
            assert block == printed(capsys, words.split())
        else:
            known = "\n".join(printed(capsys, [name]) for name in words.split())
            of_column = numbers_of_columns(known)
            for title, numbers in numbers_of_columns(block).items():
                expected = of_column.get(title, set(NUMBER.findall(known)))
                assert numbers <= expected | {number.lstrip("+−") for number in expected}
    assert not re.search(r"\d ± \d|\[[+−]\d", rest)
