"""experiments/report.py: intervals and verdicts are right, and files with and without the measures become tables."""
import json

import pytest

import report


@pytest.mark.parametrize("p, df, expected", (
    (0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 3, 3.182), (0.975, 9, 2.262), (0.975, 29, 2.045),
    (0.95, 1, 6.314), (0.95, 2, 2.920), (0.95, 9, 1.833), (0.95, 29, 1.699), (0.975, 500, 1.965)))
def test_quantiles_of_student_s_t(p, df, expected):
    assert report.quantile(p, df) == pytest.approx(expected, abs=5e-4)


def test_paired_takes_the_seeds_that_both_have():
    """Differences 1, 2 and 3: mean 2, deviation 1, so ±4.3027 / √3."""
    a, b = {0: 11, 7: 99, 2: 33, 1: 22}, {1: 20, 2: 30, 0: 10, 3: -99}
    n, mean, half_width = report.paired(a, b)
    assert (n, mean) == (3, 2) and half_width == pytest.approx(2.4841, abs=1e-4)
    assert report.paired(b, a) == (3, -2, half_width)
    assert report.paired({0: 5, 1: 9}, {0: 3, 2: 9}) == (1, 2, None)
    assert report.paired({0: 5}, {1: 5}) == (0, None, None)


@pytest.mark.parametrize("mean, half_width, n, expected", (
    (0.6, 0.5, 3, "higher"), (-0.6, 0.5, 3, "lower"), (0.5, 0.5, 3, "open"), (0.3, 0.4, 3, "open"),
    (0.1, 0.3, 3, "equivalent within ±0.5"), (-0.1, 0.3, 3, "equivalent within ±0.5"),
    (0.2, 0.1, 3, "higher, but equivalent within ±0.5"), (-0.2, 0.1, 3, "lower, but equivalent within ±0.5"),
    # ±0.5 is for the 90 % interval: 0.5 · 2.2622 / 1.8331 = 0.617 at n = 10, and 0.5 · 4.3027 / 2.9200 = 0.737 at 3
    (0.0, 0.61, 10, "equivalent within ±0.5"), (0.0, 0.625, 10, "open"),
    (0.0, 0.73, 3, "equivalent within ±0.5"), (0.0, 0.745, 3, "open"),
    (0.0, 0.0, 3, "equivalent within ±0.5"), (3.0, None, 1, "open"), (0.0, None, 1, "open"), (None, None, 0, "open")))
def test_verdicts(mean, half_width, n, expected):
    assert report.verdict(mean, half_width, n, margin=0.5) == expected


def test_the_margin_is_the_verdict_s():
    assert report.MARGIN == 0.5 and report.verdict(0.4, 0.0, 3) == "higher, but equivalent within ±0.5"
    assert report.verdict(0.4, 0.0, 3, margin=0.25) == "higher"


def run(row, seed, frozen_top1, top1, method="h-ssl", **held):
    return dict(row=row, flags=f"--dataset mnist --method {method}", seed=seed, frozen_top1=frozen_top1, top1=top1,
                machine="m", torch="t", commit="c", **held)


def held(neighbours, few, rank):
    return dict(neighbours=neighbours, few_labels={"1": [0, 9], "10": [few, 9], "100": [0, 9]}, effective_rank=rank,
                spread=0.5)


def lines(record, capsys):
    report.show(json.loads(json.dumps(record)))
    return capsys.readouterr().out.splitlines()


def test_table_1_with_measures(capsys):
    """Both methods start from the same encoder of a seed; A-SSL has one seed more, and frozen rows are compared with
    nothing."""
    runs = []
    for seed in range(4):
        frozen = held(80 + seed, 40 + seed, 20 + seed)
        for method, rises in (("frozen", (0, 0, 0, 0)), ("a-ssl", (3, 3, 3, 9)), ("h-ssl", (1, 2, 3))):
            for rise in rises[seed:seed + 1]:
                trained = held(80 + seed + rise / 2, 40 + seed - rise, 20 + seed - 2 * rise)
                runs.append(run(f"rotation {method}", seed, 50 + seed, 50 + seed + rise, method, **trained,
                                frozen=dict(top1=50 + seed, **frozen)))
    printed = lines(dict(name="mnist", budget="cpu", runs=runs), capsys)
    start = printed.index("| frozen → trained | n | linear top-1 | neighbours | 10 labels a class | effective rank |")
    assert printed[start + 1:] == [
        "| --- | --- | --- | --- | --- | --- |",
        "| rotation a-ssl | 4 | 51.50 → 56.00, +4.50 [−0.27, +9.27] | 81.50 → 83.75, +2.25 [−0.14, +4.64] | "
        "41.50 → 37.00, −4.50 [−9.27, +0.27] | 22 → 12 |",
        "| rotation h-ssl | 3 | 51.00 → 53.00, +2.00 [−0.48, +4.48] | 81.00 → 82.00, +1.00 [−0.24, +2.24] | "
        "41.00 → 39.00, −2.00 [−4.48, +0.48] | 21 → 17 |",
        "",
        "| comparison | n | linear top-1 | neighbours | 10 labels a class | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
        "| rotation h-ssl − rotation a-ssl | 3 | −1.00 [−3.48, +1.48] | −0.50 [−1.74, +0.74] | +1.00 [−1.48, +3.48] | "
        "open |"]
    assert printed[start - 2].startswith("| rotation | ") and printed[start - 1] == ""


def test_part_of_table_1(capsys):
    """Whatever is not there yet says so; each cell has its own n."""
    runs = [run("scale supervised", seed, 50 + seed, 60, "supervised") for seed in (0, 2)]
    runs.append(run("scale a-ssl", 2, 52, 55))
    assert lines(dict(name="mnist", budget="cpu", runs=runs), capsys)[6] == (
        "| scale |  | 51.00 ± 1.41 (2) | 55.00 (1) | not run | 60.00 ± 0.00 (2) |")


def test_untied_rows_stand_beside_the_tied_ones_of_their_seeds():
    untied, tied = [run("scale h-ssl", 1, 50, 60)], [run("scale h-ssl", s, 50, 70 + s) for s in (0, 1)]
    found = report.by_measure(report.measured(report.beside_tied(untied, tied + [run("scale supervised", 1, 50, 90)])))
    assert found[-1] == "| scale h-ssl, untied − scale h-ssl | 1 | −11.00 | open |" and "supervised" not in str(found)


def test_an_old_file_holds_top_1_alone(capsys):
    runs = [run(row, seed, 50, top1) for row, rises in (("h-ssl", (51.0, 51.1, 51.2)), ("other", (50.2,)))
            for seed, top1 in enumerate(rises)]
    printed = lines(dict(name="glyphs", budget="cpu", runs=runs), capsys)
    assert printed[-7:] == [
        "| h-ssl |  | 50.00 ± 0.00 | 51.10 ± 0.10 | 3 |",
        "| other |  | 50.00 | 50.20 | 1 |",
        "",
        "| frozen → trained | n | linear top-1 |",
        "| --- | --- | --- |",
        "| h-ssl | 3 | 50.00 → 51.10, +1.10 [+0.85, +1.35] |",
        "| other | 1 | 50.00 → 50.20, +0.20 |"]


def test_a_changed_row_is_compared_with_the_plain_one_and_with_one_that_is_named(capsys):
    runs = [run(row, 0, 50, top1) for row, top1 in (("h-ssl", 51), ("h-ssl, longer", 53), ("simclr", 52.5))]
    report.show(dict(name="why", budget="cpu", runs=runs), against="simclr")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-4:] == [
        "| --- | --- | --- | --- |", "| h-ssl − simclr | 1 | −1.50 | open |",
        "| h-ssl, longer − h-ssl | 1 | +2.00 | open |", "| h-ssl, longer − simclr | 1 | +0.50 | open |"]


def test_looks_in_training_are_printed_after_the_frozen_encoder_s():
    looks = [dict(epoch=e, linear=90.0 + e, neighbours=80.0, effective_rank=9.5, frozen_linear=89.0,
                  frozen_neighbours=79.0, frozen_effective_rank=12.0) for e in (2, 4)]
    lines = report.by_epoch([dict(row="h-ssl", seed=3, looks=looks), dict(row="a-ssl", seed=0)])
    assert lines[3:] == ["| h-ssl | 3 | frozen | 89.0 | 79.0 | 12.0 |", "| h-ssl | 3 | 2 | 92.0 | 80.0 | 9.5 |",
                         "| h-ssl | 3 | 4 | 94.0 | 80.0 | 9.5 |"]


def test_a_file_whose_runs_hold_the_measures_in_part(capsys):
    """A column is there if one run holds it; what is missing is a dash, and a cell with fewer seeds says so."""
    full = dict(neighbours=81.0, frozen=dict(neighbours=80.0))
    runs = [run("a-ssl", 0, 50, 51), run("h-ssl", 0, 50, 51, **full), run("h-ssl", 1, 50, 51)]
    printed = lines(dict(name="glyphs", budget="cpu", runs=runs), capsys)
    start = printed.index("| frozen → trained | n | linear top-1 | neighbours |")
    assert printed[start + 2:] == [
        "| a-ssl | 1 | 50.00 → 51.00, +1.00 | – |",
        "| h-ssl | 2 | 50.00 → 51.00, +1.00 [+1.00, +1.00] | 80.00 → 81.00, +1.00, n 1 |",
        "",
        "| comparison | n | linear top-1 | neighbours | verdict |",
        "| --- | --- | --- | --- | --- |",
        "| h-ssl − a-ssl | 1 | +0.00 | – | open |"]


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*-*.json")), ids=lambda path: path.stem)
def test_committed_results_are_printed(path, capsys):
    """Every row but frozen ones stands beside its frozen encoder, and all lines of a table have as many cells."""
    record = json.loads(path.read_text())
    printed = lines(record, capsys)
    for row in {r["row"] for r in record["runs"] if "--method frozen" not in r["flags"]}:
        assert sum(line.startswith(f"| {row} | ") and " → " in line for line in printed) == 1
    for table in "\n".join(printed).split("\n\n"):
        assert len({line.count(" | ") for line in table.splitlines() if line.startswith("|")}) <= 1
