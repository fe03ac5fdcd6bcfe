"""experiments/report.py: its statistics, its tables, and the tables in the documents."""
import json
import re
from pathlib import Path

import pytest

import benchmark
import equivariance
import report
from helpers import status_of

ROOT = Path(__file__).resolve().parent.parent


def test_paired_takes_the_seeds_that_both_have():
    """Differences 1, 2 and 3: mean 2, deviation 1, so the mean's standard error is 1 / √3."""
    a = {0: 11, 7: 99, 2: 33, 1: 22}
    b = {1: 20, 2: 30, 0: 10, 3: -99}
    assert report.paired(a, b) == (3, 2, pytest.approx(3 ** -0.5))
    assert report.paired(b, a) == (3, -2, pytest.approx(3 ** -0.5))
    assert report.paired({0: 5}, {1: 5}) == (0, None, None)


@pytest.mark.parametrize("n, mean, error, expected", (
    # The 90 % interval is ±2.9200 errors for n = 3, ±1.8331 errors for n = 10.
    (3, 0.0, 0.170, True), (3, 0.0, 0.172, False), (10, 0.0, 0.272, True), (10, 0.0, 0.274, False),
    (3, 0.4, 0.034, True), (3, 0.4, 0.035, False), (3, -0.4, 0.034, True), (3, -0.4, 0.035, False),
    (2, 0.0, 0.0, False), (1, 0.0, None, False), (0, None, None, False),
))
def test_equivalence_within_half_a_point_needs_three_seeds(n, mean, error, expected):
    assert report.equivalent(n, mean, error) is expected


def make_run(row, seed, frozen, trained, training_seconds=60.4):
    """A record with these top-1; neighbours are 10 lower before and 20 lower afterwards."""
    before = dict(top1=frozen, neighbours=frozen - 10, effective_rank=99.8)
    after = dict(top1=trained, neighbours=trained - 20, effective_rank=50.2)
    for result in (before, after):
        result["mean_top1"] = result["top1"] - 40
        result["mean_neighbours"] = result["neighbours"] - 40
    about = dict(row=row, seed=seed, epoch=8, torch="t", training_seconds=training_seconds)
    return after | about | dict(frozen=before)


def test_a_table_with_two_methods(tmp_path, monkeypatch):
    """A-SSL has one seed more than H-SSL: each comparison takes the seeds that both sides have.

    One of H-SSL's runs was slow: the table's time is the median.
    """
    runs = []
    for seed, gain in enumerate((3, 3, 3, 9)):
        runs.append(make_run("a-ssl", seed, 50 + seed, 50 + seed + gain))
    for seed, time in enumerate((7201, 7201, 36000)):
        runs.append(make_run("h-ssl", seed, 50 + seed, 53 + seed, time))
    runs += [make_run("one", 7, 50, 51), make_run("two", 7, 50, 51), make_run("two", 8, 50, 53)]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps(dict(runs=runs)))
    means = report.table("mine", "means").splitlines()
    assert means[2] == (
        "| a-ssl | 4 | 8 | 60 s | 51.50 ± 1.29 → 56.00 ± 4.08 | 11.50 ± 1.29 → 16.00 ± 4.08 | "
        "41.50 ± 1.29 → 36.00 ± 4.08 | 1.50 ± 1.29 → -4.00 ± 4.08 | 100 ± 0 → 50 ± 0 |")
    assert means[3].startswith("| h-ssl | 3 | 8 | 2.0 h | 51.00 ± 1.00 → 54.00 ± 1.00 | ")
    # Gains of 3, 3, 3 and 9: 4.5 ± 3.1824 · 3 / √4. The neighbours' are 10 lower.
    gain = "+4.50 [−0.27, +9.27]"
    loss = "−5.50 [−10.27, −0.73]"
    same = "+0.00 [+0.00, +0.00] ≈"
    differences = report.table("mine", "differences").splitlines()
    assert differences[2] == f"| a-ssl − frozen | 4 | {gain} | {gain} | {loss} | {loss} |"
    assert differences[3].startswith("| h-ssl − frozen | 3 | +3.00 [+3.00, +3.00] | ")
    # No interval from one or two seeds.
    assert differences[4] == "| one − frozen | 1 | +1.00 | +1.00 | −9.00 | −9.00 |"
    assert differences[5].startswith("| two − frozen | 2 | +2.00 | +2.00 | ")
    assert differences[6:] == [f"| h-ssl − a-ssl | 3 | {same} | {same} | {same} | {same} |"]


@pytest.mark.parametrize("name, content", (
    ("nosuch", None), ("/nosuch/table", None), ("empty", ""), ("other", '{"records": []}'),
))
def test_a_table_that_is_not_there_is_named(name, content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    if content is not None:
        (tmp_path / f"{name}.json").write_text(content)
    assert status_of(report.run, report.main, [name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name}.json" in line


# What a marker in a document stands for: tables that follow it, and numbers of the next paragraph.
MARKER = re.compile(r"<!-- (table|numbers) of (.+?) -->\n+")
NUMBER = re.compile(r"[+−]?\d+\.\d\d")


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
            found = set(NUMBER.findall(known))
            found |= {number.lstrip("+−") for number in found}
            assert set(NUMBER.findall(block)) <= found
    assert not re.search(r"\d ± \d|\[[+−]\d", rest)
