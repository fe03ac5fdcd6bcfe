"""experiments/report.py: its statistics, its tables, and the tables in the documents."""
import json
import re
from pathlib import Path

import pytest

import benchmark
import equivariance
import report

ROOT = Path(__file__).resolve().parent.parent


# --------------------------------------------------------------------------------------- statistics

@pytest.mark.parametrize("p, freedom, expected", (
    (0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 3, 3.182), (0.975, 9, 2.262), (0.975, 29, 2.045),
    (0.95, 1, 6.314), (0.95, 2, 2.920), (0.95, 9, 1.833), (0.95, 29, 1.699), (0.975, 500, 1.965),
))
def test_quantiles_of_student_s_t(p, freedom, expected):
    """As in printed tables."""
    assert report.quantile(p, freedom) == pytest.approx(expected, abs=5e-4)


def test_paired_takes_the_seeds_that_both_have():
    """Differences 1, 2 and 3: mean 2, deviation 1, so the mean's standard error is 1 / √3."""
    a = {0: 11, 7: 99, 2: 33, 1: 22}
    b = {1: 20, 2: 30, 0: 10, 3: -99}
    assert report.paired(a, b) == (3, 2, pytest.approx(3 ** -0.5))
    assert report.paired(b, a) == (3, -2, pytest.approx(3 ** -0.5))
    assert report.paired({0: 5, 1: 9}, {0: 3, 2: 9}) == (1, 2, None)
    assert report.paired({0: 5}, {1: 5}) == (0, None, None)


@pytest.mark.parametrize("n, mean, error, expected", (
    # The 90 % interval is ±2.9200 errors for n = 3, ±1.8331 errors for n = 10.
    (3, 0.0, 0.170, True), (3, 0.0, 0.172, False),
    (10, 0.0, 0.272, True), (10, 0.0, 0.274, False),
    (3, 0.4, 0.034, True), (3, 0.4, 0.035, False), (3, -0.4, 0.034, True), (3, -0.4, 0.035, False),
    (3, 0.5, 0.0, False), (1, 0.0, None, False), (0, None, None, False),
))
def test_equivalence_within_half_a_point(n, mean, error, expected):
    assert report.MARGIN == 0.5
    assert report.equivalent(n, mean, error) is expected


# ------------------------------------------------------------------------------------------- tables

def make_run(row, seed, frozen, trained, training_seconds=60.4):
    """A record with these top-1; neighbours are 10 lower before and 20 lower afterwards."""
    before = dict(top1=frozen, neighbours=frozen - 10, effective_rank=99.8)
    after = dict(top1=trained, neighbours=trained - 20, effective_rank=50.2)
    for result in (before, after):
        result["mean_top1"] = result["top1"] - 40
        result["mean_neighbours"] = result["neighbours"] - 40
    about = dict(row=row, seed=seed, epoch=8, machine="m", torch="t", commit="c")
    return after | about | dict(frozen=before, training_seconds=training_seconds)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes files of results and makes report.py read them."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def write(name, runs):
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(runs=runs)))

    return write


def test_a_table_with_two_methods(results):
    """A-SSL has one seed more than H-SSL: each comparison takes the seeds that both sides have.

    One of H-SSL's runs was slow: the table's time is the median.
    """
    runs = []
    for seed, gain in enumerate((3, 3, 3, 9)):
        runs.append(make_run("a-ssl", seed, 50 + seed, 50 + seed + gain))
    for seed in range(3):
        runs.append(make_run("h-ssl", seed, 50 + seed, 53 + seed, training_seconds=7201))
    runs[-1]["dirty"] = True
    runs[-1]["training_seconds"] = 36000
    results("mine", runs)
    lines = report.table("mine").splitlines()
    assert lines[:3] == [
        "Table mine: m; torch t; commit c or c with changes.",
        "",
        "| encoder | n | epochs | time | linear | linear, mean | neighbours | neighbours, mean | "
        "rank |",
    ]
    assert lines[4] == (
        "| a-ssl | 4 | 8 | 60 s | 51.50 ± 1.29 → 56.00 ± 4.08 | 11.50 ± 1.29 → 16.00 ± 4.08 | "
        "41.50 ± 1.29 → 36.00 ± 4.08 | 1.50 ± 1.29 → -4.00 ± 4.08 | 100 ± 0 → 50 ± 0 |")
    assert lines[5].startswith("| h-ssl | 3 | 8 | 2.0 h | 51.00 ± 1.00 → 54.00 ± 1.00 | ")
    gain = "+4.50 [−0.27, +9.27]"
    loss = "−5.50 [−10.27, −0.73]"
    same = "+0.00 [+0.00, +0.00] ≈"
    assert lines[6:8] == [
        "", "| difference | n | linear | linear, mean | neighbours | neighbours, mean |"]
    assert lines[9] == f"| a-ssl − frozen | 4 | {gain} | {gain} | {loss} | {loss} |"
    assert lines[10].startswith("| h-ssl − frozen | 3 | +3.00 [+3.00, +3.00] | ")
    assert lines[11:] == [f"| h-ssl − a-ssl | 3 | {same} | {same} | {same} | {same} |"]
    assert report.table("mine", "means").splitlines() == lines[2:6]
    assert report.table("mine", "differences").splitlines() == lines[7:]


def test_one_seed_has_no_interval_and_none_no_difference(results):
    results("mine", [make_run("h-ssl", 0, 50, 51), make_run("a-ssl", 1, 50, 51)])
    lines = report.table("mine").splitlines()
    assert "| 50.00 → 51.00 | 10.00 → 11.00 |" in lines[4]
    assert lines[9].startswith("| h-ssl − frozen | 1 | +1.00 | +1.00 | ")
    assert lines[11] == "| h-ssl − a-ssl | 0 | – | – | – | – |"


def test_a_run_without_labels_has_a_rank_alone(results):
    run = make_run("h-ssl", 0, 50, 51)
    for result in (run, run["frozen"]):
        for measure in ("top1", "mean_top1", "neighbours", "mean_neighbours"):
            result[measure] = None
    results("mine", [run])
    lines = report.table("mine").splitlines()
    assert lines[4] == "| h-ssl | 1 | 8 | 60 s | – → – | – → – | – → – | – → – | 100 → 50 |"
    assert lines[-1] == "| h-ssl − frozen | 0 | – | – | – | – |"


def test_rows_that_are_compared():
    rows = ["scale a-ssl", "scale h-ssl", "scale h-ssl, untied", "h-ssl, 16 epochs",
            "a-ssl, 8 epochs"]
    expected = [("scale h-ssl", "scale a-ssl"), ("scale h-ssl, untied", "scale h-ssl")]
    assert report.pairs(rows, "mnist") == expected
    assert report.pairs(rows, "work") == expected + [("h-ssl, 16 epochs", "a-ssl, 8 epochs")]


def test_a_run_that_was_started_by_hand(results, tmp_path):
    """Its folder in results/NAME is a row; the time of its steps comes from the log.

    Steps 1 and 2 at 10 images a second and step 3 at 5, with 40 images each, take 16 seconds.
    """
    folder = tmp_path / "mine" / "first"
    folder.mkdir(parents=True)
    run = make_run("", 0, 50, 60)
    result = {key: run[key] for key in (*report.MEASURES.values(), "frozen")} | dict(epoch=2)
    config = dict(group="scale", method="h-ssl", seed=4, batch_size=40, torch="t")
    log = [dict(epoch=1, step=2, loss=3.0, images_per_second=10),
           dict(epoch=2, step=3, loss=2.0, images_per_second=5)]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "probe.json").write_text(json.dumps(result))
    (folder / "log.jsonl").write_text("\n".join(json.dumps(line) for line in log))
    assert report.read_run(folder)["losses"] == [[2, 3.0], [3, 2.0]]
    assert "| scale h-ssl | 1 | 2 | 16 s | 50.00 → 60.00 |" in report.table("mine")
    (folder / "run.json").write_text(json.dumps(dict(machine="other", commit="d")))
    assert "Table mine: other; torch t; commit d." in report.table("mine")


def test_two_runs_of_one_name_are_refused(results):
    run = make_run("h-ssl", 3, 50, 51)
    results("mine", [run, make_run("h-ssl", 4, 50, 51), run | dict(top1=60)])
    with pytest.raises(ValueError, match="two runs of row 'h-ssl' with seed 3"):
        report.table("mine")


def test_a_table_without_results(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report.py", "nosuch"])
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert stop.value.code == 2
    assert "there are no results of 'nosuch': tables.py nosuch" in capsys.readouterr().err


# -------------------------------------------------------------------------------- what is committed

# What a marker in a document stands for: tables that follow it, and numbers of the next paragraph.
MARKER = re.compile(r"<!-- (table|numbers) of (.+?) -->\n+")
NUMBER = re.compile(r"[+−]?\d+\.\d\d")


def printed(capsys, words):
    """What the scripts print for the words of a marker, from the committed files."""
    name, *_ = words
    path = report.RESULTS / f"{name}.json"
    if name.startswith("benchmark"):
        return "\n".join(map(benchmark.table_line, json.loads(path.read_text())["records"]))
    if name.startswith("equivariance"):
        (columns,) = json.loads(path.read_text())["tables"].values()
        equivariance.print_table(columns)
        return capsys.readouterr().out.strip()
    return report.table(**vars(report.parse(words)))


@pytest.mark.parametrize("document, least", (("README.md", 1), ("experiments/README.md", 8)))
def test_results_in_the_documents_are_those_of_the_files(document, least, capsys):
    """Marked tables are what the scripts print; marked numbers are in what they print.

    No other table and no other sentence has deviations or intervals.
    """
    text = (ROOT / document).read_text(encoding="utf-8")
    rest = text
    markers = list(MARKER.finditer(text))
    assert len(markers) >= least
    for marker in markers:
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
