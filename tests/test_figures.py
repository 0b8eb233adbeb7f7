"""figures.py: verdicts worked by hand, statistics against scipy on raw samples, tiny real runs."""

import argparse
import csv
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import common
import figures
import imp
from figures import Stat

# ---- statistics and verdicts ---------------------------------------------------------------------


def points(*means: float, sd: float = 0.02, n: int = 4) -> dict[int, Stat]:
    return {k: Stat(m, sd, n) for k, m in enumerate(means)}


# With sd = 0.02 and n = 4 on both sides the standard error of a difference is
# sqrt(2 * 0.0004 / 4) = 0.01414.
@pytest.mark.parametrize(
    "a, b, told",
    [
        ([0.90, 0.90, 0.90], [0.89, 0.80, 0.899], "dominates"),
        ([0.90, 0.90, 0.90], [0.80, 0.91, 0.80], "weakly dominates"),  # crosses by 0.010
        ([0.90, 0.90, 0.90], [0.80, 0.92, 0.80], "neither"),  # crosses by 0.020
        ([0.90, 0.90, 0.90], [0.90, 0.80, 0.80], "weakly dominates"),  # a tie is not above
        ([0.90, 0.91, 0.90], [0.91, 0.90, 0.90], "equal"),
        ([0.80, 0.91, 0.80], [0.90, 0.90, 0.90], "is weakly dominated"),
        ([0.89, 0.80, 0.899], [0.90, 0.90, 0.90], "is dominated"),
        ([0.95, 0.80, 0.90], [0.90, 0.90, 0.90], "neither"),
    ],
)
def test_verdicts_worked_by_hand(a, b, told):
    assert figures.verdict(points(*a), points(*b), [0, 1, 2]) == told


def test_verdict_is_of_the_levels_asked():
    a, b = points(0.5, 0.9, 0.9, 0.1), points(0.9, 0.8, 0.8, 0.9)
    assert figures.verdict(a, b, [1, 2]) == "dominates"
    assert figures.verdict(a, b, [0, 1, 2, 3]) == "neither"
    assert figures.verdict(a, b, []) == "no common level"


def test_one_replicate_excuses_no_crossing():
    a, b = points(0.9, 0.900, n=1, sd=math.nan), points(0.8, 0.901)
    assert figures.verdict(a, b, [0, 1]) == "neither"
    assert figures.verdict(points(0.9, 0.9), points(0.8, 0.901), [0, 1]) == "weakly dominates"


def test_matching_and_ranges():
    dense = Stat(0.91, 0.02, 4)
    told = figures.matching(points(0.91, 0.90, 0.89, 0.92, 0.80), dense)
    assert told == "0-1, 3"  # 0.89 is 0.020 below, the standard error 0.014
    assert figures.matching(points(0.91), None) == "-"
    assert figures.ranges([5, 0, 1, 2]) == "0-2, 5" and figures.ranges([]) == "none"


def test_statistics_against_scipy_on_raw_samples():
    draw = np.random.default_rng(3)
    for n, m in ((4, 4), (2, 8), (8, 3)):
        x, y = draw.normal(0.91, 0.002, n), draw.normal(0.912, 0.004, m)
        a, b = figures.summary(list(x)), figures.summary(list(y))
        test = stats.ttest_ind(x, y, equal_var=False)
        assert figures.welch(a, b) == pytest.approx(test.pvalue, rel=1e-12)
        # t = difference / standard error
        assert (a.mean - b.mean) / figures.standard_error(a, b) == pytest.approx(test.statistic)
    assert math.isnan(figures.welch(figures.summary([0.9]), figures.summary([0.9, 0.8])))


def test_the_papers_deviations_become_sample_ones():
    """x has these mean and population deviation, as imp_curves.csv would hold them."""
    x = [0.9123, 0.9187, 0.9140, 0.9164]
    stat = figures.paper_stat(str(np.mean(x)), str(np.std(x)), "4")
    assert stat.sd == pytest.approx(np.std(x, ddof=1)) and stat.n == 4
    curves = figures.paper_curves("cifar10")
    first = curves["all", 0, 0, 0.0, "el2n"].points[0]  # read off the file
    assert (first.mean, first.n) == (0.91535, 4)
    assert first.sd == pytest.approx(0.0023670 * math.sqrt(4 / 3))
    counted = {d: len(figures.paper_curves(d)) for d in ("cifar10", "cifar100", "cinic10")}
    assert sum(counted.values()) == 87 and counted["cifar10"] == 41


def test_the_papers_own_conclusion():
    """Figure 2, CIFAR-10: at step 200, easy 3200 is a better start than all data, hard a worse."""
    c = {
        k[:3]: x.points
        for k, x in figures.paper_curves("cifar10").items()
        if k[3:] == (0.0, "el2n")
    }
    levels = range(1, 16)
    told = figures.verdict(c["easy", 3200, 200], c["all", 0, 200], levels)
    assert told in ("dominates", "weakly dominates")
    assert figures.verdict(c["hard", 3200, 200], c["all", 0, 200], levels) == "is dominated"


# ---- from real runs ------------------------------------------------------------------------------


def search(out: Path, *flags: str) -> None:
    args = ["--steps", "30", "--levels", "1", "--batch-size", "32", "--quiet", "--device", "cpu"]
    imp.main(imp.flags().parse_args([*args, "--out", str(out), *flags]))


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Two configurations of two replicates, on the digits; a second each."""
    out = tmp_path_factory.mktemp("real") / "results"
    search(out, "--subset", "all", "--rewind", "0", "--replicate", "0-1")
    search(out, "--subset", "random", "--size", "256", "--rewind", "20", "--replicate", "0-1")
    return out


@pytest.fixture
def results(real, tmp_path) -> Path:
    shutil.copytree(real, tmp_path / "results")
    return tmp_path / "results"


def call(*args: object) -> dict:
    return figures.main(figures.flags().parse_args([str(a) for a in args]))


def test_pictures_and_tables_of_real_runs(results, capsys):
    call("--out", results)
    told = capsys.readouterr()
    for kind, head in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        [path] = results.glob(f"figures/fig2-digits-resnet8.{kind}")
        assert path.read_bytes().startswith(head)
    drawn = (results / "figures/fig2-digits-resnet8.svg").read_text()
    assert "random 256, step 20 (n=2)" in drawn and "all, step 0 (n=2)" in drawn
    assert "Paul et al." not in drawn  # which has no digits
    assert str(results / "figures/fig2-digits-resnet8.png") in told.out
    assert "run_all.sh --only fig6 --dataset digits" in told.err
    assert "imp.py --dataset digits --subset easy --rewind 20 --size 256" in told.err or (
        "imp.py --dataset digits --subset all --rewind 20" in told.err
    )
    with open(results / "figures/imp-digits-resnet8.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 4
    folder = next(results.glob("imp/*/random*"))
    accuracy = [
        common.read_json(folder / f"rep{k}/result.json")["levels"][1]["test_accuracy"]
        for k in (0, 1)
    ]
    [row] = [x for x in rows if x["configuration"].startswith("random") and x["level"] == "1"]
    assert float(row["ours"]) == pytest.approx(np.mean(accuracy), abs=1e-5)
    assert float(row["sd"]) == pytest.approx(np.std(accuracy, ddof=1), abs=1e-5)
    assert "| verdict |" in (results / "figures/verdicts-digits-resnet8.md").read_text()


def test_the_paper_stands_behind(results):
    """--paper puts CIFAR-10's curve of the same key behind, and compares: level 0 from step 0."""
    call("--out", results, "--paper", "cifar10")
    assert "Paul et al. 2022" in (results / "figures/fig2-digits-resnet8.svg").read_text()
    with open(results / "figures/imp-digits-resnet8.csv", newline="") as f:
        row = next(x for x in csv.DictReader(f) if x["configuration"].startswith("all"))
    assert row["paper"] == "0.91535" and row["paper_n"] == "4"
    ours = Stat(float(row["ours"]), float(row["sd"]), 2)
    p = stats.ttest_ind_from_stats(
        ours.mean, ours.sd, 2, 0.91535, 0.0023670 * math.sqrt(4 / 3), 4, equal_var=False
    ).pvalue
    assert float(row["welch_p"]) == pytest.approx(p, rel=1e-3)
    assert float(row["difference"]) == pytest.approx(ours.mean - 0.91535, abs=1e-5)


def test_a_run_in_progress_counts_and_is_marked(results):
    folder = next(results.glob("imp/*/random*"))
    (folder / "rep1/result.json").unlink()
    log = (folder / "rep1/log.csv").read_text().splitlines()
    (folder / "rep1/log.csv").write_text("\n".join(log[:-1]) + "\n")  # level 0 alone
    call("fig2", "--out", results)
    assert (
        "random 256, step 20 (n=1-2)*" in (results / "figures/fig2-digits-resnet8.svg").read_text()
    )
    [curve] = [
        c
        for _, curves in figures.pictures(figures.read_runs(results), "imp", {})
        for c in curves
        if c.subset == "random"
    ]
    assert [p.n for p in curve.points.values()] == [2, 1]


def test_damaged_and_foreign_files_are_named_and_skipped(results, capsys):
    folder = next(results.glob("imp/*/random*"))
    path = folder / "rep0/result.json"
    path.write_bytes(path.read_bytes().replace(b'"level": 1', b'"level": 7'))
    for name, value in (("a", {"config": {}}), ("b", {"config": {"settings": None}, "levels": 3})):
        common.write_json(results / f"imp/digits-resnet8/{name}/rep0/config.json", value)
        common.write_json(results / f"imp/digits-resnet8/{name}/rep0/result.json", value)
    (results / "lmc/x/y/rep0").mkdir(parents=True)
    (results / "lmc/x/y/rep0/config.json").write_text("not json")
    call("fig2", "--out", results)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("skipped")]
    assert len(lines) == 4 and sum(str(path) in x for x in lines) == 1
    drawn = (results / "figures/fig2-digits-resnet8.svg").read_text()
    assert "random 256, step 20 (n=1)" in drawn and "all, step 0 (n=2)" in drawn


def test_nothing_is_drawn_from_nothing(tmp_path, capsys):
    told = call("--out", tmp_path)
    assert told["written"] == [] and not (tmp_path / "figures").exists()
    assert "run_all.sh --dataset cifar10" in capsys.readouterr().err
    with pytest.raises(common.UserError, match="nothing to draw fig2"):
        call("fig2", "--out", tmp_path, "--dataset", "cifar10")
    with pytest.raises(common.UserError, match="fig99"):
        call("fig99", "--out", tmp_path)


def test_compare_two(results, capsys):
    row = call("--out", results, "--compare", "random256-rewind20-steps30-batch32",
               "digits-resnet8/all-rewind0-steps30-batch32")  # fmt: skip
    assert row["A"].startswith("random 256") and row["levels"] == "1"
    assert row["verdict"] in capsys.readouterr().out
    with pytest.raises(common.UserError, match="no such run"):
        call("--out", results, "--compare", "nothing", "all-rewind0-steps30-batch32")
    assert not (results / "figures").exists()


def test_other_settings_are_another_picture(results):
    """Runs of 30 and of 40 steps are never one curve or one picture."""
    flags = ["--subset", "random", "--size", "256", "--rewind", "20", "--levels", "0"]
    args = [
        "--steps",
        "40",
        "--batch-size",
        "32",
        "--quiet",
        "--device",
        "cpu",
        "--out",
        str(results),
    ]
    imp.main(imp.flags().parse_args([*args, *flags]))
    call("fig2", "--out", results)
    names = {p.stem for p in results.glob("figures/*.png")}
    assert names == {"fig2-digits-resnet8-steps30", "fig2-digits-resnet8-steps40"}


def test_rates_count_what_trains_side_by_side():
    def run(rep: int, seconds: float) -> figures.Run:
        level = {"level": 0, "seconds": seconds, "steps_per_second": 100 / seconds}
        return figures.Run("imp", "m", "a", Path(f"rep{rep}"), {}, {"levels": [level]}, True)

    assert figures.rates([run(0, 4.0), run(1, 4.0)]) == {"m": 50.0}  # 200 network-steps in 4 s
    assert figures.rates([run(0, 4.0), run(1, 5.0)]) == {"m": 22.5}  # alone: 25 and 20


def test_command_line_one_line_for_a_mistake(tmp_path):
    command = [sys.executable, figures.__file__, "fig2", "--out", tmp_path / "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert isinstance(figures.flags().parse_args([]), argparse.Namespace)
