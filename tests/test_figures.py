"""figures.py: verdicts worked by hand and on the paper's curves, statistics against scipy on raw
samples, all figures from synthetic run folders, tables from tiny real runs."""

import csv
import io
import itertools
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
    "a, b, expected",
    [
        ([0.90, 0.90, 0.90], [0.89, 0.80, 0.899], "dominates"),
        ([0.90, 0.90, 0.90], [0.80, 0.91, 0.80], "weakly dominates"),  # crosses by 0.010
        ([0.90, 0.90, 0.90], [0.80, 0.92, 0.80], "neither"),  # crosses by 0.020
        ([0.90, 0.90, 0.90], [0.90, 0.80, 0.80], "weakly dominates"),  # a tie is not above
        ([0.90, 0.91, 0.90], [0.91, 0.90, 0.90], "equal"),
        ([0.90, 0.90, 0.90], [0.901, 0.901, 0.901], "equal"),  # never above, within the slack
        ([0.80, 0.91, 0.80], [0.90, 0.90, 0.90], "is weakly dominated"),
        ([0.89, 0.80, 0.899], [0.90, 0.90, 0.90], "is dominated"),
        ([0.95, 0.80, 0.90], [0.90, 0.90, 0.90], "neither"),
    ],
)
def test_verdicts_worked_by_hand(a, b, expected):
    assert figures.verdict(points(*a), points(*b), [0, 1, 2]) == expected


def test_verdict_depends_on_levels_and_slack():
    a, b = points(0.5, 0.9, 0.9, 0.1), points(0.9, 0.8, 0.8, 0.9)
    assert figures.verdict(a, b, [1, 2]) == "dominates"
    assert figures.verdict(a, b, [0, 1, 2, 3]) == "neither"
    assert figures.verdict(a, b, []) == "no common level"
    a, b = points(0.90, 0.90), points(0.80, 0.92)  # 1.41 standard errors below at level 1
    assert figures.verdict(a, b, [0, 1], slack=1.4) == "neither"
    assert figures.verdict(a, b, [0, 1], slack=1.5) == "weakly dominates"
    assert figures.verdict(a, points(0.8, 0.9001), [0, 1], slack=0) == "neither"


def test_one_replicate_excuses_no_crossing():
    a, b = points(0.9, 0.900, n=1, sd=math.nan), points(0.8, 0.901)
    assert figures.verdict(a, b, [0, 1]) == "neither"
    assert figures.verdict(points(0.9, 0.9), points(0.8, 0.901), [0, 1]) == "weakly dominates"


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
    counted = {d: len(figures.paper_curves(d)) for d in figures.PUBLISHED}
    assert sum(counted.values()) == 87 and counted["cifar10"] == 41


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

    def put(self, stage: str, name: str, replicate: int, result: dict, arrays: dict, **settings):
        folder = self.out / stage / self.model / name / f"rep{replicate}"
        folder.mkdir(parents=True)
        usual = {"dataset": self.data, "data": "pixels", "subset": "all", "label_noise": 0.0}
        usual |= {"steps": 62400, "replicate": replicate, "scores": None}
        config = {"run": "1", "settings": usual | settings, "environments": []}
        runs.write_json(folder / "config.json", config)
        if result:
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

    def imp(self, name: str, reps: int = 2, **settings):
        for k in range(reps):
            rows = [
                {"level": i, "weights_remaining": 0.8**i, "seconds": 4.0, "steps_per_second": 9.0,
                 "test_accuracy": 0.91 - 0.004 * i + 0.01 * self.draw.random()}
                for i in range(self.levels + 1)
            ]  # fmt: skip
            pretrain = {"fingerprint": f"{name}-{k}", "test_accuracy": 0.4}
            folder = self.put("imp", name, k, {"pretrain": pretrain, "levels": rows}, {}, **settings)
            for i in (0, 6) if k == 0 and settings["rewind"] else ():
                error = common.torch.from_numpy(self.draw.random(EXAMPLES))
                runs.write_tensors(folder / f"level{i:02d}.pt", {"projected_error": error})

    def lmc(self, name: str, **settings):
        for k in range(2):
            pretrain = {"fingerprint": f"{name}-{k}", "test_accuracy": 0.4 + 0.1 * self.draw.random()}
            numbers = {"loss_barrier": self.draw.random(), "error_barrier": 0.1, "connected": False}
            pairs = {"loss_barrier_pairs.npy": self.draw.normal(0, 2, (3, EXAMPLES))}
            self.put("lmc", name, k, {"pretrain": pretrain, **numbers}, pairs, **settings)

    def pretrain(self, name: str, **settings):
        for k in range(2):
            arrays = {"gradient_norm.npy": self.draw.random(200), "coherence.npy": self.draw.random((3, 16))}
            folder = self.put("pretrain", name, k, {"pretrain": {}}, arrays, **settings)
            rows = [f"pretrain,{s},0.3,0.3,0.{s},{arrays['coherence.npy'][i].mean()}\n" for i, s in enumerate((0, 10, 20))]
            (folder / "log.csv").write_text("phase,step,test_accuracy,train_accuracy,easy_accuracy,coherence\n" + "".join(rows))

    def warmup(self, name: str, **settings):
        for k in range(2):
            tops = [{"step": s, "eigenvalue": 1 + self.draw.random()} for s in (0, 196, 392)]
            result = {"test_accuracy": 0.9 + 0.01 * self.draw.random(), "outcome": "trained"}
            self.put("warmup", name, k, result | {"sharpness": tops}, {}, **settings)


def build(out: Path, data: str) -> None:
    """What the paper's panels of a data set need."""
    f = Folders(out, data)
    preset = common.PRESETS[data]
    size, t = preset.size, preset.rewind
    f.scores("el2n", "el2n", metric="el2n", score_step=preset.score_step)
    sizes = {"cifar10": (512, 3200, 6400), "cifar100": (512, 2048, 3200), "cinic10": (12800, 25600, 51200)}
    for at in sorted({0, t, 2 * t, 200 if data == "cinic10" else 0}):
        f.imp(f"all-rewind{at}", rewind=at)
        f.lmc(f"all-rewind{at}", rewind=at)
    f.scores("lmc", f"all-rewind{2 * t}", metric="lmc", rewind=2 * t)
    for m, s in itertools.product(sizes[data], figures.SUBSETS[1:]):
        for at in {t, 200} if data == "cinic10" else {t}:
            f.imp(f"{s}{m}-rewind{at}", subset=s, size=m, rewind=at)
            f.lmc(f"{s}{m}-rewind{at}", subset=s, size=m, rewind=at)
    easy = {"subset": "easy", "size": size, "rewind": t}
    by_lmc = f"{data}-all-rewind{2 * t}"
    f.imp(f"easy{size}-lmc{2 * t}-rewind{t}", **easy, scores=by_lmc)
    for control in ("reinit", "shuffle", "one-shot"):
        f.imp(f"easy{size}-rewind{t}-{control}", **easy, control=control)
    forgetting = f.scores("el2n", "forgetting", metric="forgetting", score_step=preset.steps)
    f.imp(f"easy{size}balanced-forgetting-rewind{t}", **easy, balance=True, scores=forgetting)
    f.imp(f"easy{size}balanced-rewind{t}", **easy, balance=True)
    for m, noise in itertools.product(sizes[data][:2], (0.1, 0.5)):
        for s in ("all", "easy", "random"):
            more = {"subset": s, "size": m} if s != "all" else {}
            if s != "all" or m == sizes[data][0]:
                f.imp(f"{s}{m}-rewind{t}-noise{noise}", **more, rewind=t, label_noise=noise)
    f.pretrain("all-rewind1600", rewind=1600)
    f.pretrain(f"easy{size}-rewind1600", subset="easy", size=size, rewind=1600)
    f.warmup("all-warmup0", warmup=0)
    for at in (100, 400, 1600):
        f.warmup(f"all-warmup{at}", warmup=at)
        for m, s in itertools.product((5120, 10240), figures.SUBSETS[1:]):
            f.warmup(f"{s}{m}-warmup{at}", subset=s, size=m, warmup=at)
        f.warmup(f"easy10240balanced-warmup{at}", subset="easy", size=10240, balance=True, warmup=at)
        f.warmup(f"easy10240+25000-warmup{at}", subset="easy", size=10240, offset=25000, warmup=at)
