"""figures.py: verdicts worked by hand and on the paper's curves, statistics against scipy on raw
samples, all figures from synthetic run folders, tables from tiny real runs."""

import csv
import functools
import io
import itertools
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import common
import figures
import runs
from figures import Stat

PICTURES = [f"fig{k}" for k in range(2, 14)]

# ---- statistics and verdicts ---------------------------------------------------------------------


def points(*means: float, sd: float = 0.02, n: int = 4) -> dict[int, Stat]:
    return {k: Stat(m, sd, n) for k, m in enumerate(means)}


# With sd = 0.02 and n = 4 on both sides the standard error of a difference is
# sqrt(2 * 0.0004 / 4) = 0.01414.
@pytest.mark.parametrize(
    "a, b, slack, expected",
    [
        ([0.90, 0.90, 0.90], [0.89, 0.80, 0.899], 1, "dominates"),
        ([0.90, 0.90, 0.90], [0.80, 0.91, 0.80], 1, "weakly dominates"),  # crosses by 0.010
        ([0.90, 0.90, 0.90], [0.80, 0.92, 0.80], 1, "neither"),  # crosses by 0.020
        ([0.90, 0.90, 0.90], [0.80, 0.92, 0.80], 1.4, "neither"),  # which is 1.414 errors
        ([0.90, 0.90, 0.90], [0.80, 0.92, 0.80], 1.5, "weakly dominates"),
        ([0.90, 0.90, 0.90], [0.80, 0.9001, 0.80], 0, "neither"),
        ([0.90, 0.90, 0.90], [0.90, 0.80, 0.80], 1, "weakly dominates"),  # a tie is not above
        ([0.90, 0.91, 0.90], [0.91, 0.90, 0.90], 1, "equal"),
        ([0.90, 0.90, 0.90], [0.901, 0.901, 0.901], 1, "equal"),  # never above, within the slack
        ([0.80, 0.91, 0.80], [0.90, 0.90, 0.90], 1, "is weakly dominated"),
        ([0.89, 0.80, 0.899], [0.90, 0.90, 0.90], 1, "is dominated"),
        ([0.95, 0.80, 0.90], [0.90, 0.90, 0.90], 1, "neither"),
    ],
)
def test_verdicts_worked_by_hand(a, b, slack, expected):
    assert figures.verdict(points(*a), points(*b), [0, 1, 2], slack) == expected


def test_verdict_over_some_levels():
    a, b = points(0.5, 0.9, 0.9, 0.1), points(0.9, 0.8, 0.8, 0.9)
    assert figures.verdict(a, b, [1, 2]) == "dominates"
    assert figures.verdict(a, b, [0, 1, 2, 3]) == "neither"
    assert figures.verdict(a, b, []) == "no common level"


def test_one_replicate_excuses_no_crossing():
    a, b = points(0.9, 0.900, n=1, sd=math.nan), points(0.8, 0.901)
    assert figures.verdict(a, b, [0, 1]) == "neither"
    assert figures.verdict(points(0.9, 0.9), b, [0, 1]) == "weakly dominates"


def curve(subset: str, rewind: int, *means: float) -> figures.Curve:
    c = figures.Curve(subset, 0 if subset == "all" else 8, rewind, 0.0, "el2n")
    c.points, c.remaining = points(*means), {k: 0.8**k for k in range(len(means))}
    return c


def test_matching_dense_and_matching_w_t_star():
    """w_t* (dense 0.91) matches dense at 0-2; at 3 it does not, so that easy's 0.50 there is no
    matter. Easy is below dense at 2 by more than 0.014, and below w_t* at 2 where that is 0.92."""
    star, early = curve("all", 4, 0.91, 0.92, 0.90, 0.80), curve("all", 0, 0.95, 0.5, 0.5, 0.5)
    easy = curve("easy", 2, 0.91, 0.91, 0.89, 0.50)
    row = figures.compare(easy, star, [early, star, easy], "cifar10", range(4))
    assert row["A_matches_w_t*"] == "yes" and row["A_matches_dense_at"] == "0-1"
    assert row["B_matches_dense_at"] == "0-2" and row["verdict"] == "is weakly dominated"
    assert row["A_below_at"] == "3" and row["A_above_at"] == "none"
    star.points[2] = Stat(0.92, 0.02, 4)
    row = figures.compare(easy, star, [early, star, easy], "cifar10")
    assert row["A_matches_w_t*"] == "no: below at 2 of 1-2" and row["levels"] == "1-3"
    assert figures.compare(easy, star, [easy], "cifar10")["A_matches_w_t*"] == "-"
    assert figures.ranges([5, 0, 1, 2]) == "0-2, 5" and figures.ranges([]) == "none"


def test_statistics_against_scipy_on_raw_samples():
    draw = np.random.default_rng(3)
    for n, m in ((4, 4), (2, 8), (8, 3)):
        x, y = draw.normal(0.91, 0.002, n), draw.normal(0.912, 0.004, m)
        a, b = figures.summary(x), figures.summary(y)
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
    first = figures.paper_curves("cifar10")["all", 0, 0, 0.0, "el2n", ""].points[0]  # in the file
    assert (first.mean, first.n) == (0.91535, 4)
    assert first.sd == pytest.approx(0.0023670 * math.sqrt(4 / 3))
    keys = {d: [*figures.paper_curves(d)] for d in figures.PUBLISHED}
    again = [k for k in keys["cifar10"] if k[4] == "el2n balanced"]  # these stand for two of ours
    assert sum(map(len, keys.values())) == 87 + 8 and len(again) == 8 and len(keys["cifar10"]) == 49


def on_paper(data: str, a: tuple, b: tuple, levels: range) -> dict:
    curves = figures.paper_curves(data)
    a, b = (curves[*x, 0.0, "el2n", ""] for x in (a, b))
    return figures.compare(a, b, [*curves.values()], data, levels)


@pytest.mark.parametrize(
    "data, size, t, failing",
    [
        ("cifar10", 3200, 200, "3, 6-8, 11-12"),
        ("cifar100", 2048, 400, "1-4, 7-8"),
        ("cinic10", 51200, 400, "2-3, 10-12"),
    ],
)
def test_easy_for_half_the_steps_is_no_match_on_the_papers_own_curves(data, size, t, failing):
    """Levels 1-12, one standard error: 6, 6 and 5 of 12 levels are below all data at t*."""
    row = on_paper(data, ("easy", size, t), ("all", 0, 2 * t), range(1, 13))
    assert row["A_below_at"] == failing and row["A_matches_w_t*"].startswith("no: below at")
    good = on_paper(data, ("all", 0, 2 * t), ("all", 0, t), range(1, 13))
    assert good["A_matches_w_t*"] == "yes"


def test_the_papers_own_conclusion():
    """Figure 2, CIFAR-10: at step 200, easy 3200 is a better start than all data, hard a worse."""
    levels = range(1, 16)
    row = on_paper("cifar10", ("easy", 3200, 200), ("all", 0, 200), levels)
    assert row["verdict"] in ("dominates", "weakly dominates")
    assert on_paper("cifar10", ("hard", 3200, 200), ("all", 0, 200), levels)["verdict"] == (
        "is dominated"
    )


# ---- figures from synthetic folders --------------------------------------------------------------

SHAPES = {"cifar10": (20, 20), "cifar100": (32, 20), "cinic10": (56, 12)}  # depth, levels
EXAMPLES = 40


class Folders:
    """Run folders of the shape that the stages leave, with made-up numbers."""

    def __init__(self, out: Path, data: str):
        self.out, self.data, self.draw = out, data, np.random.default_rng(1)
        depth, self.levels = SHAPES[data]
        self.model = f"{data}-resnet{depth}"

    def name(self, settings: dict) -> str:
        """easy3200-rewind200-controlreinit"""
        words = settings.get("subset", "all"), settings.get("size", "")
        more = [f"-{k}{v}" for k, v in settings.items() if k not in ("subset", "size")]
        return "".join(map(str, [*words, *more]))

    def put(self, stage: str, replicate: int, result: dict, arrays: dict, **settings) -> Path:
        folder = self.out / stage / self.model / self.name(settings) / f"rep{replicate}"
        folder.mkdir(parents=True)
        usual = {"dataset": self.data, "data": "pixels", "subset": "all", "label_noise": 0.0}
        usual |= {"steps": 62400, "batch_size": 128, "replicate": replicate, "scores": None}
        config = {"run": "1", "settings": usual | settings, "environments": []}
        runs.write_json(folder / "config.json", config)
        runs.write_json(folder / "result.json", {"config": config, "ended": None, **result})
        for file, array in arrays.items():
            np.save(folder / file, array)
        return folder

    def scores(self, stage: str, name: str, **about) -> str:
        folder = self.out / stage / self.model / name
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "scores.npy", self.draw.random(EXAMPLES))
        key = f"{self.data}-{name}"
        about = {"data": "pixels", "label_noise": [0, 0], "sha256_of_scores": key, **about}
        runs.write_json(folder / "scores.json", about)
        return key

    def imp(self, **settings):
        for k in range(2):
            rows = [
                {"level": i, "weights_remaining": 0.8**i, "seconds": 4.0, "steps_per_second": 9.0,
                 "test_accuracy": 0.91 - 0.004 * i + 0.01 * self.draw.random()}
                for i in range(self.levels + 1)
            ]  # fmt: skip
            start = {"fingerprint": f"{self.name(settings)}-{k}", "test_accuracy": 0.4}
            folder = self.put("imp", k, {"pretrain": start, "levels": rows}, {}, **settings)
            for i in (0, 6) if k == 0 and settings["rewind"] else ():
                error = common.torch.from_numpy(self.draw.random(EXAMPLES))
                runs.write_tensors(folder / f"level{i:02d}.pt", {"projected_error": error})

    def lmc(self, **settings):
        for k in range(2):
            start = {"fingerprint": f"{self.name(settings)}-{k}", "test_accuracy": 0.4 + 0.1 * k}
            numbers = {"loss_barrier": self.draw.random(), "error_barrier": 0.1, "connected": False}
            pairs = {"loss_barrier_pairs.npy": self.draw.normal(0, 2, (3, EXAMPLES))}
            self.put("lmc", k, {"pretrain": start, **numbers}, pairs, **settings)

    def pretrain(self, **settings):
        for k in range(2):
            each = self.draw.random((3, 16))
            arrays = {"gradient_norm.npy": self.draw.random(200), "coherence.npy": each}
            folder = self.put("pretrain", k, {"pretrain": {}}, arrays, **settings)
            names = "phase,step,test_accuracy,train_accuracy,easy_accuracy,coherence\n"
            rows = [f"pretrain,{10 * i},0.{k},0.3,0.{i},{x.mean()}\n" for i, x in enumerate(each)]
            (folder / "log.csv").write_text(names + "".join(rows))

    def warmup(self, **settings):
        for k in range(2):
            tops = [{"step": s, "eigenvalue": 1 + self.draw.random()} for s in (0, 196, 392)]
            result = {"test_accuracy": 0.9 + 0.01 * self.draw.random(), "outcome": "trained"}
            self.put("warmup", k, result | {"sharpness": tops}, {}, **settings)


def build(out: Path, data: str) -> None:
    """What the paper's panels of a data set need."""
    f, preset = Folders(out, data), common.PRESETS[data]
    size, t, cinic = preset.size, preset.rewind, data == "cinic10"
    f.scores("el2n", "el2n", metric="el2n", score_step=preset.score_step)
    by = {x: f.scores("lmc", f"all-rewind{x}", metric="lmc", rewind=x) for x in (800, 1600)}
    forgetting = f.scores("el2n", "forgetting", metric="forgetting", score_step=preset.steps)
    sizes = {"cifar10": (512, 3200, 6400), "cifar100": (512, 2048, 3200)}
    sizes["cinic10"] = 12800, 25600, 51200
    for at in sorted({0, t, 2 * t} | ({200} if cinic else set())):
        f.imp(rewind=at)
        f.lmc(rewind=at)
    for m, s in itertools.product(sizes[data], figures.SUBSETS[1:]):
        for at in {t, 200} if cinic else {t}:
            f.imp(subset=s, size=m, rewind=at)
            f.lmc(subset=s, size=m, rewind=at)
    easy = {"subset": "easy", "size": size, "rewind": t}
    for control in ("reinit", "shuffle", "one-shot"):
        f.imp(**easy, control=control)
    for scores in by.values():
        f.imp(**easy, scores=scores)
    f.imp(**easy, balance=True, scores=forgetting)
    f.imp(**easy, balance=True)
    for noise in (0.1, 0.5):
        f.imp(rewind=t, label_noise=noise)
        for m, s in itertools.product(sizes[data][:2], ("easy", "random")):
            f.imp(subset=s, size=m, rewind=t, label_noise=noise)
    f.pretrain(rewind=1600, easy_size=size, easy_balance=True)
    f.pretrain(subset="easy", size=size, rewind=1600, balance=True)
    f.warmup(warmup=0)
    for at in (100, 400, 1600):
        f.warmup(warmup=at)
        for m, s in itertools.product((5120, 10240), figures.SUBSETS[1:]):
            f.warmup(subset=s, size=m, warmup=at)
        for more in ({"balance": True}, {"offset": 25000}):
            f.warmup(subset="easy", size=10240, warmup=at, **more)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Of three data sets, for reading."""
    out = tmp_path_factory.mktemp("synthetic") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.os, "fsync", lambda number: None)  # thousands of files
        for data in SHAPES:
            build(out, data)
    return out


@pytest.fixture
def small(tmp_path) -> tuple[Path, Folders]:
    """Two configurations of CIFAR-10, for writing."""
    f = Folders(tmp_path / "results", "cifar10")
    f.imp(rewind=0)
    f.imp(subset="easy", size=3200, rewind=200)
    return f.out, f


def call(*args: object) -> Any:
    return figures.main(figures.flags().parse_args([str(a) for a in args]))


@functools.cache
def read(out: Path) -> figures.Results:
    return figures.Results(figures.read_runs(out), figures.read_metrics(out))


@functools.cache
def drawn(results: Path, figure: str) -> dict[str, list]:
    """The axes of each picture by data set, not saved."""
    axes = {name.split("-")[0]: p.axes for name, p in figures.drawn(read(results), figure)}
    figures.plt.close("all")
    return axes


def titles(axes: list) -> list[str]:
    return [ax.get_title() for ax in axes]


def labels(ax) -> list[str]:
    """Without n."""
    return [x.split(" (n=")[0] for x in ax.get_legend_handles_labels()[1]]


@pytest.mark.parametrize("figure", PICTURES)
def test_every_figure_is_drawn_for_three_data_sets(results, figure):
    pictures = drawn(results, figure)
    assert set(pictures) == set(SHAPES)
    assert all(ax.has_data() for axes in pictures.values() for ax in axes)


def test_panels_as_in_the_paper(results):
    """Levels, configurations and axes written from the paper's text and captions."""
    for axes in drawn(results, "fig3").values():
        heads = [f"level {k}, {left} of weights remaining" for k, left in
                 ((8, "16.8%"), (10, "10.7%"), (12, "6.9%"))]  # fmt: skip
        assert titles(axes) == heads * (len(axes) // 3)
    five = drawn(results, "fig5")
    assert titles(five["cifar100"])[0] == "all data, 400 steps"
    four = ["all data, 200 steps", "all data, 400 steps", "random 25600, 200 steps",
            "easy 25600, 200 steps"]  # fmt: skip
    assert [titles(five["cinic10"])[k] for k in (0, 1, 3, 4)] == four
    assert titles(five["cifar100"])[3] == "random 3200, 400 steps"
    for data, level in (("cifar100", 11), ("cinic10", 7)):
        assert five[data][2].get_ylabel() == f"test accuracy at level {level}"
    six = drawn(results, "fig6")["cifar10"]
    assert titles(six)[:4] == ["easy", "random", "hard", "windows"]
    assert six[0].get_xscale() == "log" and six[0].xaxis.get_transform().base == 2
    easy = ["easy 5120", "easy 10240", "easy 10240 balanced", "all", "no warmup"]
    assert [x for x in labels(six[0]) if x != figures.SOURCE] == easy
    assert "easy 10240 from 25000" in labels(six[3])
    nine = drawn(results, "fig9")["cinic10"]
    runs_ = ["all, step 400", "all, step 800", "easy 51200, step 400"]
    assert labels(nine[0]) == labels(nine[1]) == [f"{x}, replicate 0" for x in runs_]
    seven = drawn(results, "fig7")["cifar100"]
    assert titles(seven)[2] == "accuracy on the easiest 2048, class by class"
    both = ["all, step 1600", "easy 2048 balanced, step 1600"]
    assert len(seven) == 4 and labels(seven[2]) == both
    *_, ten = drawn(results, "fig10")["cinic10"]
    order = [x.split(",")[0] for x in labels(ten) if x.startswith(("random", "easy"))]
    kinds = ("", " balanced", " lmc 800", " lmc 1600")
    assert order == ["random 51200", *(f"easy 51200{x}" for x in kinds)]
    lmc = [x for x in ten.lines if " lmc " in x.get_label()]
    assert len({str(x.get_color()) for x in lmc}) == 2
    for figure, data, by in (("fig10", "cinic10", "lmc 800"), ("fig12", "cifar10", "forgetting")):
        shown = labels(drawn(results, figure)[data][-1])
        assert {x.split(",")[0].partition(" ")[0] for x in shown} >= {"easy", "random"}
        assert any(by in x for x in shown)
        assert any("balanced, step" in x and by not in x for x in shown)


def raw(folder: Path, level: int) -> list[float]:
    files = sorted(folder.glob("rep*/result.json"))
    return [runs.read_json(p)["levels"][level]["test_accuracy"] for p in files]


def test_the_dense_line_is_the_papers_choice(results):
    for figure, data, folder in (
        ("fig2", "cifar10", "all-rewind400"),
        ("fig2", "cinic10", "all-rewind400"),
        ("fig2", "cifar100", "all-rewind800"),
        ("fig4", "cifar10", "all-rewind200-label_noise0.1"),
    ):
        [ax, *_] = drawn(results, figure)[data]
        [dense] = [x for x in ax.lines if x.get_label() == "dense"]
        [path] = results.glob(f"imp/{data}-*/{folder}")
        assert dense.get_ydata()[0] == pytest.approx(np.mean(raw(path, 0)))


def test_controls_stand_beside_the_ticket(results):
    [ax] = drawn(results, "fig2")["cifar10"]
    ticket = "easy 3200, step 200"
    shown = [x for x in ax.lines if (x.get_label() or "").startswith(ticket)]
    assert {x.get_label().split(" (n=")[0] for x in shown} == {
        ticket, *(f"{ticket}, {c}" for c in ("reinit", "shuffle", "one-shot"))
    }  # fmt: skip
    assert len({str(x.get_color()) for x in shown}) == 4
    r = read(results)
    rows = dict(figures.tables(r, (), 1.0))["verdicts-cifar10-resnet20"]
    pairs = {(x["A"], x["B"]) for x in rows}
    assert (f"{ticket} (n=2)", f"{ticket}, reinit (n=2)") in pairs


def test_balanced_easy_subsets_stand_beside_and_the_papers_behind_both(small):
    """The paper's easy CIFAR-10 subsets were balanced. A control of another step is not drawn."""
    out, f = small
    f.imp(subset="easy", size=6400, rewind=200)
    for size in (3200, 6400):
        f.imp(subset="easy", size=size, rewind=200, balance=True)
    f.imp(subset="easy", size=3200, rewind=400, control="reinit")
    [ax] = drawn(out, "fig2")["cifar10"]
    assert "easy 3200 balanced, step 200" in labels(ax)
    assert "easy 3200, step 400, reinit" not in labels(ax)
    assert "easy balanced" in labels(drawn(out, "fig3")["cifar10"][0])
    assert "easy 6400 balanced, step 200" in labels(drawn(out, "fig11")["cifar10"][1])
    rows = dict(figures.tables(read(out), (), 1.0))["imp-cifar10-resnet20"]
    published = figures.paper_curves("cifar10")["easy", 3200, 200, 0.0, "el2n", ""].points[5].mean
    same = [x for x in rows if x["configuration"].startswith("easy 3200") and x["level"] == 5]
    assert [x["paper"] for x in same if "balanced" in x["configuration"]] == [published]


def test_the_coherence_band_is_over_batches_and_replicates(results):
    [*_, ax] = drawn(results, "fig7")["cifar100"]
    arrays = [np.load(p) for p in results.glob("pretrain/cifar100*/all*/rep*/coherence.npy")]
    pooled = np.concatenate([a[1] for a in arrays])  # of step 10
    [line] = [x for x in ax.lines if x.get_label().startswith("all")]
    assert line.get_ydata()[1] == pytest.approx(pooled.mean())
    r = read(results)
    [curve] = [p.curves[0] for p in r.pictures("pretrain") if p.paper == "cifar100"]
    stat = figures.tracked(curve, "coherence")[10]
    assert stat.sd == pytest.approx(pooled.std(ddof=1)) and stat.n == 32


def test_final_accuracy_of_this_model_alone(small):
    """A run of four levels on other data does not lower the level of CIFAR-10."""
    out, f = small
    f.lmc(subset="easy", size=3200, rewind=200)
    f.put("lmc", 0, {"loss_barrier": 1.0}, {}, between=["a", "b"])  # no w_tr
    SHAPES["digits"] = (8, 4)
    other = Folders(out, "digits")
    del SHAPES["digits"]
    other.imp(rewind=0)
    for settings in ({"rewind": 0}, {"subset": "random", "size": 256, "rewind": 20}):
        other.lmc(**settings)
    assert titles(drawn(out, "fig5")["digits"])[3] == "random 256, 20 steps"
    r = figures.Results(figures.read_runs(out), {})
    rows = dict(figures.tables(r, (), 1.0))["lmc-cifar10-resnet20"]
    assert [x["level"] for x in rows] == [7, 7]
    at_7 = raw(out / "imp/cifar10-resnet20/easy3200-rewind200", 7)
    assert [x["final_accuracy"] for x in rows] == at_7


def test_pictures_and_tables_are_written(small, capsys):
    out, _ = small
    paths = call("--out", out)["written"]
    printed = capsys.readouterr()
    for kind, head in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (out / f"figures/fig2-cifar10-resnet20.{kind}").read_bytes().startswith(head)
    picture = (out / "figures/fig2-cifar10-resnet20.svg").read_text()
    assert "easy 3200, step 200 (n=2)" in picture and "Paul et al. 2022" in picture
    assert [str(p) for p in paths] == printed.out.split()
    assert f"run_all.sh --only fig6 --dataset cifar10 --out {out}" in printed.err
    with open(out / "figures/imp-cifar10-resnet20.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    [row] = [x for x in rows if x["configuration"].startswith("all") and x["level"] == "0"]
    accuracy = raw(out / "imp/cifar10-resnet20/all-rewind0", 0)
    assert float(row["ours"]) == pytest.approx(np.mean(accuracy), abs=1e-5)
    assert float(row["sd"]) == pytest.approx(np.std(accuracy, ddof=1), abs=1e-5)
    assert row["paper"] == "0.91535" and row["paper_n"] == "4"
    published = (0.91535, 0.0023670 * math.sqrt(4 / 3), 4)
    ours = (float(row["ours"]), float(row["sd"]), 2)
    p = stats.ttest_ind_from_stats(*ours, *published, equal_var=False).pvalue
    assert float(row["welch_p"]) == pytest.approx(p, rel=1e-2)
    assert "A_matches_w_t*" in (out / "figures/verdicts-cifar10-resnet20.md").read_text()


def test_a_run_in_progress_counts_and_is_marked(small, capsys):
    out, _ = small
    folder = out / "imp/cifar10-resnet20/easy3200-rewind200/rep1"
    (folder / "result.json").unlink()
    assert len(figures.read_runs(out)) == 4, "in its first level it has no log yet"
    assert not capsys.readouterr().err
    names = "phase,step,level,test_accuracy,weights_remaining,seconds,steps_per_second"
    (folder / "log.csv").write_text(f"{names}\nlevel00,62400,0,0.9,1,4,9\n")
    [[_, curve]] = [p.curves for p in read(out).pictures("imp")]
    assert [p.n for p in curve.points.values()] == [2] + 20 * [1]
    assert curve.legend == "easy 3200, step 200 (n=1-2)*"


def test_damaged_and_foreign_files_are_named_and_skipped(small, capsys):
    out, _ = small
    path = out / "imp/cifar10-resnet20/all-rewind0/rep0/result.json"
    path.write_bytes(path.read_bytes().replace(b'"level": 1,', b'"level": 7,'))
    for name, value in (("a", {"config": {}}), ("b", {"config": {"settings": None}, "levels": 3})):
        runs.write_json(out / f"imp/cifar10-resnet20/{name}/rep0/config.json", value)
        runs.write_json(out / f"imp/cifar10-resnet20/{name}/rep0/result.json", value)
    (out / "lmc/x/y/rep0").mkdir(parents=True)
    (out / "lmc/x/y/rep0/config.json").write_text("not json")
    assert len(figures.read_runs(out)) == 3
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("skipped")]
    assert len(lines) == 4 and sum(str(path) in x for x in lines) == 1


def test_other_settings_are_another_picture(small):
    out, f = small
    f.imp(rewind=0, steps=40)
    names = {p.name for p in read(out).pictures("imp")}
    assert names == {"cifar10-resnet20-steps40", "cifar10-resnet20-steps62400"}


def test_compare_two_and_rates(small, capsys):
    out, _ = small
    flags = ["--out", out, "--levels", "1-3", "--slack", "2", "--compare"]
    row = call(*flags, "easy3200-rewind200", "cifar10-resnet20/all-rewind0")
    assert row["A"].startswith("easy 3200") and row["levels"] == "1-3"
    assert row["verdict"] in capsys.readouterr().out and row["slack_in_standard_errors"] == 2
    with pytest.raises(runs.UserError, match="no such run"):
        call("--out", out, "--compare", "nothing", "all-rewind0")
    # Two replicates with the same seconds trained side by side: 9 steps/s each.
    assert call("--out", out, "--rates") == {"cifar10-resnet20": 18.0}
    assert not (out / "figures").exists()


def test_examples_of_the_digits(tmp_path):
    data = common.load_data("digits", common.HERE / "data", common.torch.device("cpu"))
    folder = tmp_path / "el2n/digits-resnet8/el2n"
    folder.mkdir(parents=True)
    np.save(folder / "scores.npy", np.arange(len(data.train_labels), dtype=np.float32))
    about = {"metric": "el2n", "score_step": 60, "sha256_of_scores": "x", "label_noise": [0, 0]}
    runs.write_json(folder / "scores.json", {**about, "data": data.fingerprint})
    r = figures.Results([], figures.read_metrics(tmp_path), None, common.HERE / "data")
    [(_, picture)] = figures.examples(r)
    labels_, tiles = data.train_labels.numpy(), picture.axes[0].get_images()[0].get_array()
    k = min(range(10), key=lambda k: np.median(np.flatnonzero(labels_ == k)))  # the easiest class
    easiest = np.flatnonzero(labels_ == k)[0]
    assert (tiles[:8, :8] == data.train_images[easiest].numpy().squeeze()).all()
    assert len(tiles) == 10 * 9 and len(picture.axes[0].get_yticklabels()) == 10


# ---- commands ------------------------------------------------------------------------------------


def test_every_remedy_is_a_command_that_can_make_it():
    """Of results/ with nothing in it: run_all.sh has runs for it, and stages accept the rest."""
    environment = os.environ | {"PYTHON": str(common.HERE / "tests/fake_python.py")}
    shown = {figure: [] for figure in figures.FIGURES}
    lines = figures.missing(figures.Results([], {}), shown, [*figures.ALL], False)
    lines += figures.missing(figures.Results([], {}), {}, [], True)
    assert len(lines) > 40
    for _, words in lines:
        if words[0] == "bash":
            where = {"env": environment, "cwd": common.HERE}
            done = subprocess.run([*words, "--list"], **where, capture_output=True, text=True)
            stage = figures.FIGURES[words[3]].stage if words[3] in figures.FIGURES else "imp"
            assert done.returncode == 0 and f"{stage}.py" in done.stdout, shlex.join(words)
        else:
            assert __import__(Path(words[1]).stem).flags().parse_args(words[2:])


def planned(monkeypatch, capsys, out: Path, *commands: str) -> list[list[str]]:
    text = "".join(f"python {x} --out {shlex.quote(str(out))}\n" for x in commands)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    call("--plan")
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_a_plan_names_runs_as_the_runs_do(tmp_path, monkeypatch, capsys):
    """By scores that are not made yet as by those that are, and each folder of a command."""
    scores = [tmp_path / f"lmc/digits-resnet8/all-rewind{t}/scores.npy" for t in (20, 40)]
    scores.append(tmp_path / "el2n/digits-resnet8/forgetting/scores.npy")
    easy = "imp.py --subset easy --size 256 --rewind 20 --scores"
    commands = [f"{easy} {shlex.quote(str(path))}" for path in scores]
    before = planned(monkeypatch, capsys, tmp_path, *commands)
    names = [f"easy256-{x}-rewind20" for x in ("lmc20", "lmc40", "forgetting")]
    assert [row[3] for row in before] == [f"imp/digits-resnet8/{x}/rep0" for x in names]
    for path, about in zip(scores, ({"rewind": 20}, {"rewind": 40}, {}), strict=True):
        path.parent.mkdir(parents=True)
        metric = "lmc" if about else "forgetting"
        runs.write_json(path.with_suffix(".json"), {"metric": metric, **about})
    assert planned(monkeypatch, capsys, tmp_path, *commands) == before
    lmc = "lmc.py --subset all --rewind 0,20 --replicate 0-1,3"
    [row] = planned(monkeypatch, capsys, tmp_path, lmc)
    places = [f"lmc/digits-resnet8/all-rewind{t}/rep0-1,3" for t in (0, 20)]
    assert row == ["todo", str(6 * 3 * 600 + 3 * (20 - 60)), "6", *places]


def test_a_plan_of_barriers_between_networks(stage, tmp_path, monkeypatch, capsys):
    common.torch.manual_seed(0)
    files = [tmp_path / f"{x}.pt" for x in "ab"]
    for path in files:
        common.torch.save(common.ResNet(8, 4, 1, 10).state_dict(), path)
    words = ["--width", 4, "--between", *files]
    line = f"lmc.py {shlex.join(map(str, words))}"
    [before] = planned(monkeypatch, capsys, tmp_path / "results", line)
    stage("lmc", *words)
    [folder] = (tmp_path / "results").glob("lmc/*/*/rep0")
    capsys.readouterr()
    place = str(folder.relative_to(tmp_path / "results"))
    assert before == ["todo", "0", "1", place]
    assert planned(monkeypatch, capsys, tmp_path / "results", line) == [["done", *before[1:]]]


def test_cost_of_commands(small, monkeypatch, capsys):
    """CIFAR-10 is measured at 18 steps/s; ResNet-56 on 256 images is 6 times ResNet-20 on 128."""
    lines = ["/opt/python /here/imp.py --dataset=cifar10 --replicate=0-3 --out='a b'", ""]
    lines += ["python imp.py --replicate 0", "python el2n.py --dataset=cinic10", "figures.py"]
    lines += ["python warmup.py --dataset=cifar10 --warmup 0"]  # of 1024 images, 8 times 128
    lines += ["python imp.py --dataset=cifar10 --batch-size 64"]  # half of it
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    call("--cost", "--rate", "12", "--out", small[0])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    steps = 4 * (200 + 21 * 62200), 20 + 9 * 580, 10 * 8000, 7840
    more = steps[0] // 4
    hours = f"{(steps[0] + more / 2) / 18 / 3600:.1f}", "-", f"{steps[2] / 2 / 3600:.1f}"
    assert rows[1] == ["imp/cifar10-resnet20", "2", "5", str(steps[0] + more), hours[0]]
    assert rows[2] == ["imp/digits-resnet8", "1", "1", str(steps[1]), hours[1]]
    assert rows[3] == ["el2n/cinic10-resnet56", "1", "1", str(steps[2]), hours[2]]
    assert rows[4] == ["warmup/cifar10-resnet20", "1", "1", "7840", f"{7840 * 8 / 18 / 3600:.1f}"]
    assert rows[5] == ["all", "5", "8", str(sum(steps) + more), "-"] and "--rate" in rows[6]
    monkeypatch.setattr(sys, "stdin", io.StringIO("echo hello\n"))
    with pytest.raises(runs.UserError, match="not a command of a stage: echo hello"):
        call("--plan")


def test_nothing_is_drawn_from_nothing(tmp_path, capsys):
    assert call("--out", tmp_path)["written"] == [] and not (tmp_path / "figures").exists()
    assert "run_all.sh --dataset cifar10" in capsys.readouterr().err
    with pytest.raises(runs.UserError, match="nothing to draw fig2"):
        call("fig2", "--out", tmp_path, "--dataset", "cifar10")
    with pytest.raises(runs.UserError, match="fig99"):
        call("fig99", "--out", tmp_path)
