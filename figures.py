"""Every figure and table of the paper from whatever results/ holds, the paper's own curves behind.

    python figures.py                               all that can be drawn, and what is missing
    python figures.py fig2 --dataset cifar10        one
    python figures.py examples --data-dir data      easiest and hardest images of each class
    python figures.py --compare easy3200-rewind200 all-rewind400 --levels 1-12 --slack 1
    bash run_all.sh --list | python figures.py --plan      what is done, and network-steps

    fig2, fig4    accuracy against weights remaining, by subset, beside controls; under label noise
    fig3          accuracy against subset size at three levels
    fig5          loss barriers: histograms; final accuracy against barrier and pre-train accuracy
    fig6          warmup on subsets, and the sharpness (top Hessian eigenvalue)
    fig7, fig8    learning curves, coherence of gradients; norms of minibatch gradients
    fig9          error per example at w_tr before and after projection onto a mask
    fig10, fig12  LMC scores and forgetting scores against EL2N, and pruning by them
    fig11, fig13  fig2 and fig4 at every size

Pictures (PNG, SVG) and tables (CSV, Markdown) go to results/figures/. Lines are means over
replicates, bands sample standard deviations, n in the legend; thin lines without band are the
paper's (paper/README.md). Tables hold difference, standard error and Welch's p.

Verdicts over a range of levels, where "below" is by more than --slack standard errors of the
difference: A weakly dominates B if it is below at none (Definition 3.1 with its footnote),
dominates if its mean is also higher at each, equals B if neither is below. A matches w_t*, the
latest rewind of all data, if it weakly dominates it over the levels where w_t* matches dense
(Definition 3.2); dense is level 0 of all data at t* (CINIC-10: at 400, as in the paper). A run in
progress counts with the levels it has, and is marked *.
"""

import argparse
import csv
import dataclasses
import functools
import importlib
import io
import itertools
import math
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation
from scipy import stats

import common
import runs

STAGES = ("imp", "pretrain", "lmc", "warmup")
PAPER, SOURCE = common.HERE / "paper", "Paul et al. 2022"
PUBLISHED = ("cifar10", "cifar100", "cinic10")
SUBSETS = ("all", "easy", "random", "hard")
LOOK = {  # colour, line, marker; dark to light, so that they differ in grey too
    "all": ("#000000", "--", "s"),
    "easy": ("#12408f", "-", "o"),
    "random": ("#d1641b", "-.", "^"),
    "hard": ("#3fae8c", (0, (4, 1, 1, 1, 1, 1)), "v"),
    "balanced": ("#4b9cd3", (0, (6, 1)), "p"),
    "lmc": ("#8e44ad", (0, (5, 1)), "P"),
    "forgetting": ("#b03060", (0, (1, 1)), "X"),
    "reinit": ("#c0392b", (0, (3, 1, 1, 1)), "x"),
    "shuffle": ("#7f8c8d", (0, (3, 2)), "+"),
    "one-shot": ("#b8860b", (0, (2, 1)), "d"),
    "own": ("#006d5b", (0, (7, 2)), "*"),  # --init
}
# What the paper does differently by data set.
FINAL_LEVEL = {"cifar100": 11}  # of Figure 5, else 7
HISTOGRAMS = {"cifar10": (3200, 200), "cifar100": (3200, 400), "cinic10": (25600, 200)}  # Figure 5
DENSE = {"cinic10": 400}  # rewind of the run whose level 0 is called dense, else t*
# What tells the curves of one picture apart; runs that differ in anything else get one each.
CURVE = {"subset", "size", "offset", "balance", "scores", "label_noise", "rewind", "replicate"}
CURVE |= {"track", "every", "warmup", "pretrain_lr", "prune_fraction", "control", "init"}
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.grid": True, "grid.alpha": 0.25}
STYLE |= {"legend.fontsize": 6.5, "legend.frameon": False, "lines.linewidth": 1.2}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"svg.hashsalt": "tickets", "svg.fonttype": "none"}
plt.rcParams.update(STYLE)

# ---- reading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    stage: str
    model: str
    name: str
    folder: Path
    settings: dict
    result: dict  # result.json; of an imp run in progress the levels it has
    done: bool


@dataclasses.dataclass(frozen=True)
class Stat:
    """Mean, sample standard deviation (NaN for n = 1) and n."""

    mean: float
    sd: float
    n: int


def summary(values: Iterable[float]) -> Stat:
    x = np.asarray(list(values), float)
    return Stat(float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else math.nan, len(x))


@dataclasses.dataclass
class Curve:
    """The replicates of one configuration, ours or the paper's, with test accuracy by level."""

    subset: str
    size: int
    rewind: int  # of warmup runs, its length
    noise: float
    metric: str  # what subsets are chosen by: "el2n", "el2n balanced", "lmc 800", or --init
    control: str = ""
    points: dict[int, Stat] = dataclasses.field(default_factory=dict)
    remaining: dict[int, float] = dataclasses.field(default_factory=dict)
    runs: list[Run] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> tuple:
        return self.subset, self.size, self.rewind, self.noise, self.metric, self.control

    @property
    def label(self) -> str:
        what = self.subset if self.subset == "all" else f"{self.subset} {self.size}"
        by = self.metric.removeprefix("el2n").strip()
        noise = f", {self.noise:.0%} noise" if self.noise else ""
        control = f", {self.control}" if self.control else ""
        return f"{what} {by}".strip() + f", step {self.rewind}{noise}{control}"

    @property
    def legend(self) -> str:
        n = sorted({p.n for p in self.points.values()} or {len(self.runs)})
        going = "*" if any(not r.done for r in self.runs) else ""
        return f"{self.label} (n={'-'.join(map(str, n[:: max(1, len(n) - 1)]))}){going}"


def read_run(config: Path) -> Run:
    """The run of a config.json; KeyError, TypeError or ValueError if it is not one of ours."""
    folder = config.parent
    stage, model, name = folder.parts[-4:-1]
    done = (folder / "result.json").exists()
    value = runs.read_json(folder / "result.json" if done else config)
    settings = (value["config"] if done else value)["settings"]
    if not done and stage == "imp":
        rows = [x for x in runs.read_rows(folder / "log.csv") if x["phase"].startswith("level")]
        value["levels"] = [{k: float(v) for k, v in x.items() if k != "phase" and v} for x in rows]
    for key in ("dataset", "subset", "label_noise", "steps", "replicate"):
        settings[key]
    if stage == "imp":
        keys = ("level", "test_accuracy", "weights_remaining")
        value["levels"] = [x | {k: float(x[k]) for k in keys} for x in value["levels"]]
    return Run(stage, model, name, folder, settings, value, done)


def skipped(reason: Any) -> None:
    print(f"skipped: {reason}", file=sys.stderr)


def read_runs(out: Path) -> list[Run]:
    """Every run below results/; damaged and foreign files are named on stderr and left out, and so
    are barriers between any two networks, and runs that could not go on, but for imp's levels."""
    found = []
    for path in sorted(p for s in STAGES for p in out.glob(f"{s}/*/*/rep*/config.json")):
        if path.parts[-3].startswith("between-"):
            continue
        try:
            run = read_run(path)
        except runs.UserError as e:
            skipped(e)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as e:
            skipped(f"{path.parent}: not one of our runs ({e!r})")
        else:
            if run.result.get("ended") is None or run.stage == "imp":
                found.append(run)
    return found


def read_metrics(out: Path) -> dict[str, dict]:
    """scores.json, and where it lies, by the fingerprint of its scores."""
    found = {}
    for path in sorted([*out.glob("el2n/*/*/scores.json"), *out.glob("lmc/*/*/scores.json")]):
        try:
            about = runs.read_json(path)
            found[about["sha256_of_scores"]] = {**about, "folder": path.parent}
        except (runs.UserError, KeyError) as e:
            skipped(e)
    return found


def load(path: Path) -> np.ndarray | None:
    """An .npy of a run, or None with a line on stderr."""
    try:
        return runs.read_npy(path)
    except runs.UserError as e:
        return skipped(e)


def score_name(about: dict) -> str:
    """Of scores.json: el2n, el2n 1600 (steps other than the preset's), lmc 800, forgetting."""
    metric, step = about["metric"], about.get("score_step")
    if metric.startswith("lmc"):
        return f"lmc {about['rewind']}"
    preset = common.PRESETS.get(about["folder"].parts[-2].rsplit("-", 1)[0])
    return f"el2n {step}" if metric == "el2n" and preset and step != preset.score_step else metric


def metric_of(run: Run, metrics: dict[str, dict]) -> str:
    """By what a subset was chosen: "el2n" for the usual way, and whatever is unusual."""
    s = run.settings
    if s.get("init"):
        return run.name.split("-rewind")[0]
    about = metrics.get(s.get("scores")) if s["subset"] in ("easy", "hard") else None
    words = [score_name(about) if about else "el2n"] + ["balanced"] * bool(s.get("balance"))
    return " ".join(words + [f"from {o}" for o in [s.get("offset")] if o])


def make_curve(found: list[Run], metrics: dict[str, dict]) -> Curve:
    """The replicates of one folder."""
    s, by_level = found[0].settings, defaultdict(list)
    for x in itertools.chain(*(run.result.get("levels", ()) for run in found)):
        by_level[int(x["level"])].append(x)
    points = {k: summary(x["test_accuracy"] for x in by_level[k]) for k in sorted(by_level)}
    remaining = {k: by_level[k][0]["weights_remaining"] for k in points}
    step, metric = s.get("rewind", s.get("warmup", 0)), metric_of(found[0], metrics)
    key = s["subset"], s.get("size") or 0, step, s["label_noise"], metric, s.get("control") or ""
    return Curve(*key, points, remaining, found)


def pictures(found: list[Run], stage: str, metrics: dict) -> Iterator[tuple[str, list[Curve]]]:
    """The configurations that belong in one picture, and its name: a model, and where runs of it
    differ in more than CURVE, in what."""
    folders, models = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for run in found:
        if run.stage == stage:
            folders[run.model, run.name].append(run)
    for (model, _), group in folders.items():
        rest = sorted((k, str(v)) for k, v in group[0].settings.items() if k not in CURVE)
        models[model][tuple(rest)].append(make_curve(group, metrics))
    for model, variants in models.items():
        differ = {k for a, b in itertools.combinations(variants, 2) for k, _ in set(a) ^ set(b)}
        for variant, curves in variants.items():
            more = "".join(f"-{k}{v}" for k, v in variant if k in differ)
            curves.sort(key=lambda c: (SUBSETS.index(c.subset), *c.key[1:]))
            yield model + "".join(c if c.isalnum() or c in "-_." else "+" for c in more), curves


@dataclasses.dataclass
class Results:
    runs: list[Run]
    metrics: dict[str, dict]
    paper: str | None = None  # --paper
    data_dir: Path = Path("data")
    datasets: tuple[str, ...] = ()  # --dataset, names or folders of images

    def pictures(self, stage: str) -> Iterator[tuple[str, list[Curve], str]]:
        """`pictures`, and whose data set of the paper stands behind: cifar10, cifar10-jpeg."""
        for name, curves in pictures(self.runs, stage, self.metrics):
            data = curves[0].runs[0].settings["dataset"]
            theirs = next((p for p in PUBLISHED if f"{data}-".startswith(f"{p}-")), "")
            yield name, curves, self.paper or theirs


# ---- the paper's numbers -------------------------------------------------------------------------


@functools.cache
def paper_rows(name: str) -> list[dict]:
    path = PAPER / name
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def paper_stat(mean: str, sd: str, n: str) -> Stat:
    """The paper's deviations are population ones."""
    sample = float(sd) * math.sqrt(int(n) / (int(n) - 1)) if sd and int(n) > 1 else math.nan
    return Stat(float(mean), sample, int(n))


@functools.cache
def paper_curves(dataset: str) -> dict[tuple, Curve]:
    """imp_curves.csv of a data set, by `Curve.key`."""
    curves: dict[tuple, Curve] = {}
    for r in paper_rows("imp_curves.csv"):
        if r["dataset"] == dataset:
            forgetting = r["method"] == "forgetting"
            kind = ("easy", "forgetting balanced") if forgetting else (r["method"], "el2n")
            size = 0 if r["subset_size"] == "full" else int(r["subset_size"])
            key = kind[0], size, int(r["rewind_steps"]), float(r["label_noise"]), kind[1], ""
            c, k = curves.setdefault(key, Curve(*key)), int(r["level"])
            c.points[k] = paper_stat(r["accuracy_mean"], r["accuracy_std"], r["replicates"])
            c.remaining[k] = float(r["weights_remaining"])
    if dataset == "cifar10":  # the easy subsets of these curves were class-balanced: README.md
        easy = [c for key, c in curves.items() if key[0] == "easy" and key[3:] == (0, "el2n", "")]
        curves |= {(*c.key[:4], "el2n balanced", ""): c for c in easy}
    return curves


def paper_warmup(c: Curve) -> dict[int, Stat]:
    """Figure 6 and its windows of the ranking: accuracy by length of warmup. The paper's easy
    subsets are balanced, its windows are not."""
    start = re.fullmatch(r"el2n(?: from (\d+))?", c.metric)
    wanted = {"all": ("fig6", "all", "50000", ""), "random": ("fig6", "random", str(c.size), "")}
    if c.subset == "easy" and c.metric == "el2n balanced":
        wanted["easy"] = "fig6", "easy", str(c.size), ""
    elif c.subset == "easy" and start:
        wanted["easy"] = "rolling", "score_window", str(c.size), start[1] or "0"
    keys = ("experiment", "subset_type", "subset_size", "left_offset")
    rows = paper_rows("warmup_curves.csv")
    rows = [x for x in rows if tuple(x[k] for k in keys) == wanted.get(c.subset)]
    stat = ("test_accuracy_mean", "test_accuracy_std", "n_replicates")
    rows = [x for x in rows if x[stat[0]]]  # a few points of the windows could not be read
    return {int(x["warmup_steps"]): paper_stat(*(x[k] for k in stat)) for x in rows}


# ---- comparing -----------------------------------------------------------------------------------


def standard_error(a: Stat, b: Stat) -> float:
    """Of the difference of two means; NaN where one has no deviation."""
    return math.sqrt(a.sd**2 / a.n + b.sd**2 / b.n)


def welch(a: Stat, b: Stat) -> float:
    """Two-sided p of equal means; NaN where a deviation is missing or both are zero."""
    if math.isnan(a.sd + b.sd) or a.sd == b.sd == 0:
        return math.nan
    return float(stats.ttest_ind_from_stats(a.mean, a.sd, a.n, b.mean, b.sd, b.n, False).pvalue)


def is_below(a: Stat, b: Stat, slack: float) -> bool:
    """By more than `slack` standard errors; where there is no deviation, by anything."""
    return bool(a.mean - b.mean < -slack * np.nan_to_num(standard_error(a, b)))


def below(a: dict[int, Stat], b: dict[int, Stat], levels: Iterable[int], slack: float) -> list[int]:
    return [k for k in levels if is_below(a[k], b[k], slack)]


def verdict(a: dict[int, Stat], b: dict[int, Stat], levels: list[int], slack: float = 1.0) -> str:
    """Of A over B (Definition 3.1 and its footnote)."""
    if not levels:
        return "no common level"
    under, over = below(a, b, levels, slack), below(b, a, levels, slack)
    if under and over:
        return "neither"
    if not under and not over:
        return "equal"
    above = [a[k].mean > b[k].mean if over else a[k].mean < b[k].mean for k in levels]
    if over:
        return "dominates" if all(above) else "weakly dominates"
    return "is dominated" if all(above) else "is weakly dominated"


def ranges(levels: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for k in sorted(levels):
        if spans and spans[-1][-1] == k - 1:
            spans[-1].append(k)
        else:
            spans.append([k])
    return ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else f"{s[0]}" for s in spans) or "none"


def matching_dense(points: dict[int, Stat], dense: Stat | None, slack: float) -> list[int]:
    """The levels that are as good as the dense network."""
    return [k for k, p in points.items() if dense and not is_below(p, dense, slack)]


def all_data(curves: Iterable[Curve], noise: float = 0.0) -> list[Curve]:
    """By rewind step."""
    wanted = "all", noise, "el2n", ""
    full = [c for c in curves if (c.subset, *c.key[3:]) == wanted and c.points]
    return sorted(full, key=lambda c: c.rewind)


def star_of(curves: list[Curve], noise: float = 0.0) -> Curve | None:
    """w_t*: the latest rewind of all data; under label noise the noisy one, where it is there."""
    full = all_data(curves, noise) or all_data(curves)
    return full[-1] if full else None


def dense_of(curves: list[Curve], data: str, noise: float = 0.0) -> Stat | None:
    """Level 0 of all data at t*, or as the paper chose."""
    full = [c for c in all_data(curves, noise) or all_data(curves) if 0 in c.points]
    chosen = [c for c in full if c.rewind == DENSE.get(data)] or full
    return chosen[-1].points[0] if chosen else None


def compare(
    a: Curve, b: Curve, curves: list[Curve], data: str, levels: Iterable[int] = (), slack=1.0
) -> dict:
    """One row of the table of verdicts, over `levels`, or all but 0."""
    dense, star = dense_of(curves, data, a.noise), star_of(curves, a.noise)
    chosen = [k for k in a.points if (k in levels if levels else k > 0)]
    common_levels = [k for k in chosen if k in b.points]
    gaps = {k: a.points[k].mean - b.points[k].mean for k in common_levels}
    ends = [f"{a.remaining[k]:.1%}" for k in (common_levels[:1] + common_levels[-1:])]
    matches, good = "-", matching_dense(star.points, dense, slack) if star else []
    if good := [k for k in good if k in chosen]:
        bad = below(a.points, star.points, good, slack)
        matches = f"no: below at {ranges(bad)} of {ranges(good)}" if bad else "yes"
    return {
        "A": a.legend,
        "verdict": verdict(a.points, b.points, common_levels, slack),
        "B": b.legend,
        "levels": ranges(common_levels),
        "weights_remaining": " to ".join(ends),
        "slack_in_standard_errors": slack,
        "A_above_at": ranges(below(b.points, a.points, common_levels, slack)),
        "A_below_at": ranges(below(a.points, b.points, common_levels, slack)),
        "mean_difference": float(np.mean([*gaps.values()])) if gaps else math.nan,
        "smallest_difference": min(gaps.values(), default=math.nan),
        "A_matches_w_t*": matches,
        "A_matches_dense_at": ranges(matching_dense(a.points, dense, slack)),
        "B_matches_dense_at": ranges(matching_dense(b.points, dense, slack)),
    }


# ---- drawing -------------------------------------------------------------------------------------


def shade(color: str, k: int, n: int) -> tuple:
    """The k-th of n shades of a colour; the last is the colour."""
    rgb = np.array(matplotlib.colors.to_rgb(color))
    return tuple(rgb + (1 - rgb) * 0.65 * (n - 1 - k) / max(n - 1, 1))


def look(c: Curve, among: Iterable[Curve] = ()) -> dict[str, Any]:
    """Colour, line and marker; of curves of one kind the earlier are lighter."""
    kind = c.metric.split()[0]
    kind = "balanced" if c.metric == "el2n balanced" else c.subset if kind == "el2n" else kind
    kind = c.control or kind
    color, line, marker = LOOK.get(kind, LOOK["own"])
    group = (c.subset, c.metric, c.control)
    alike = [r.key for r in among if (r.subset, r.metric, r.control) == group]
    if len(alike) > 1 and c.key in alike:
        k = alike.index(c.key)
        color = shade(color, k, len(alike))
        if c.subset == "all":
            line, marker = ("--", ":", "-.", "-")[k % 4], ("s", "D", "h", "*")[k % 4]
    return {"color": color, "linestyle": line, "marker": marker}


def draw(ax: Axes, points: dict[float, Stat], style: dict, label: str) -> None:
    """Mean and band of one curve."""
    x = list(points)
    mean, sd = (np.array([getattr(p, k) for p in points.values()]) for k in ("mean", "sd"))
    every = max(1, len(x) // 20)
    ax.plot(x, mean, ms=3.5, markevery=every, label=label, zorder=3, **style)
    if len(x) == 1:  # a band has no width
        ax.errorbar(x, mean, sd, color=style["color"], lw=0.8, capsize=2)
    ax.fill_between(x, mean - sd, mean + sd, color=style["color"], alpha=0.15, lw=0)


def draw_paper(ax: Axes, points: dict[float, Stat], style: dict) -> None:
    """A curve of the paper: thin, behind, no markers; the first of a panel is in the legend."""
    label = None if SOURCE in ax.get_legend_handles_labels()[1] else SOURCE
    style, y = {**style, "marker": None}, [p.mean for p in points.values()]
    if points:
        ax.plot([*points], y, lw=0.8, alpha=0.8, zorder=1, label=label, **style)


def outline(ax: Axes, values: list[np.ndarray], edges: np.ndarray, style: dict, label: str) -> None:
    """Shares of pooled values in bins, as a stepped line; outliers count in the last bins."""
    pooled = np.concatenate([v.ravel() for v in values]).clip(edges[0], edges[-1])
    share = np.histogram(pooled, edges)[0] / len(pooled)
    ax.stairs(share, edges, color=style["color"], ls=style["linestyle"], lw=1.2, label=label)


def panels(count: int, columns: int = 3, width: float = 3.1) -> tuple[Figure, list[Axes]]:
    columns, width = min(columns, count), max(width, 4.0 / count)
    rows = -(-count // columns)
    size = (width * columns, 2.5 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, list(axes.flat[:count])


def finish(ax: Axes, xlabel: str, ylabel: str, title: str = "") -> None:
    """Names of the axes, and the legend below them, where it hides nothing."""
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if ax.get_legend_handles_labels()[1]:
        below_labels = ax.transAxes + ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)
        place = {"bbox_to_anchor": (-0.1, 0), "bbox_transform": below_labels}
        ax.legend(loc="upper left", handlelength=4, **place)


def ticks(ax: Axes, values: Iterable[int]) -> None:
    """A log2 axis with these numbers on it."""
    ax.set_xscale("log", base=2)
    ax.set_xticks([*values], [str(v) for v in values], rotation=40, fontsize=6)
    ax.xaxis.set_minor_locator(NullLocator())


def draw_levels(ax: Axes, curves: list[Curve], paper: dict, dense: Stat | None, title: str) -> None:
    """Accuracy against weights remaining, as in Figure 2."""
    remaining: dict[int, float] = {}
    for c in curves:
        if theirs := paper.get(c.key):
            points = {theirs.remaining[k]: p for k, p in theirs.points.items()}
            draw_paper(ax, points, look(c, curves))
            remaining |= theirs.remaining
        remaining |= c.remaining
        draw(ax, {c.remaining[k]: p for k, p in c.points.items()}, look(c, curves), c.legend)
    if dense:
        ax.axhline(dense.mean, color="0.5", lw=0.8, ls=(0, (1, 2)), zorder=0, label="dense")
    chosen = [remaining[k] for k in sorted(remaining)[:: max(1, -(-len(remaining) // 8))]]
    ax.set_xscale("log")
    ax.set_xticks(chosen, [f"{100 * v:.3g}" for v in chosen])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.invert_xaxis()
    finish(ax, "weights remaining (%)", "test accuracy", title)


# ---- the figures: each yields (name, picture), one for each model --------------------------------

Pictures = Iterator[tuple[str, Figure]]


def usual(curves: Iterable[Curve], noise: bool = False) -> list[Curve]:
    """Random subsets, and easy and hard ones by EL2N, unbalanced; with or without label noise."""
    alike = [c for c in curves if c.metric == "el2n" and not c.control]
    return [c for c in alike if bool(c.noise) == noise]


def balanced(curves: Iterable[Curve]) -> list[Curve]:
    """Easy and hard subsets by EL2N within each class."""
    return [c for c in curves if (c.noise, c.metric, c.control) == (0, "el2n balanced", "")]


def main_setting(curves: list[Curve]) -> tuple[int, int]:
    """Size and rewind step of Figure 2: a preset's if it is there, else the most frequent."""
    found = Counter((c.size, c.rewind) for c in curves if c.subset != "all")
    preset = [(p.size, p.rewind) for p in common.PRESETS.values() if (p.size, p.rewind) in found]
    return (preset or [x for x, _ in found.most_common(1)] or [(0, 0)])[0]


def by_size(r: Results, noisy: bool, everything: bool) -> Pictures:
    """Figures 2, 4, 11, 13: a panel for each size, rewind step and noise; in Figure 2 the controls,
    and runs from other initialisations, too."""
    for name, curves, paper in r.pictures("imp"):
        curves = [c for c in curves if c.points]
        mine, full = usual(curves, noisy), all_data(curves)
        settings = sorted({(c.noise, c.rewind, c.size) for c in mine if c.subset != "all"})
        if not everything:
            size, t = main_setting(mine)
            settings = [x for x in settings if x[1:] == (t, size)]
        if not settings and not noisy and full:
            settings = [(0.0, full[-1].rewind, 0)]
        if not settings:
            continue
        init = [c for c in curves if c.runs[0].settings.get("init")]
        figure, axes = panels(len(settings))
        for ax, (noise, t, size) in zip(axes, settings, strict=True):
            shown = [c for c in full if not noise or c.rewind == 0]
            shown += [c for c in mine if noise and c.subset == "all" and c.noise == noise]
            ranked = mine + balanced(curves) * bool(size)
            shown += [c for c in ranked if size and (c.noise, c.rewind, c.size) == (noise, t, size)]
            title = f"{size} examples, {t} steps" if size else "all data"
            title += f", {noise:.0%} noise" * bool(noise)
            if not (noisy or everything):
                tickets = {c.key for c in shown}
                shown += [c for c in curves if c.control and (*c.key[:-1], "") in tickets] + init
            dense = dense_of(curves, paper, noise)
            draw_levels(ax, shown, paper_curves(paper), dense, title)
        yield name, figure


def fig3(r: Results) -> Pictures:
    """Accuracy against subset size at three levels, a row for each rewind step."""
    for name, curves, paper in r.pictures("imp"):
        mine, theirs = usual(curves), usual(paper_curves(paper).values())
        mine, ranked = [c for c in mine if c.points], defaultdict(list)
        for c in mine:
            if c.subset != "all":
                ranked[c.rewind].append(c)
        ranked = {t: cs for t, cs in sorted(ranked.items()) if len({c.size for c in cs}) > 1}
        if not ranked:
            continue
        last = max(max(c.points) for cs in ranked.values() for c in cs)
        levels = (8, 10, 12) if last >= 12 else sorted({last, -(-2 * last // 3), -(-last // 3)})
        figure, axes = panels(len(ranked) * len(levels), len(levels))
        for ax, (t, k) in zip(axes, itertools.product(ranked, levels), strict=True):
            for subset, metric in [(x, "el2n") for x in SUBSETS[1:]] + [("easy", "el2n balanced")]:
                behind, ours = (
                    {c.size: c.points[k] for c in sorted(cs, key=lambda c: c.size)
                     if (c.subset, c.rewind, c.metric) == (subset, t, metric) and k in c.points}
                    for cs in (theirs, mine + balanced(curves))
                )  # fmt: skip
                kind = Curve(subset, 0, 0, 0, metric)
                draw_paper(ax, behind, look(kind))
                if ours:
                    n = sorted({p.n for p in ours.values()})
                    label = subset + metric.removeprefix("el2n")
                    draw(ax, ours, look(kind), f"{label} (n={'-'.join(map(str, n))})")
            full = [c for c in all_data(mine) if k in c.points]
            for c in full:
                style = {**look(c, full), "marker": None}
                ax.axhline(c.points[k].mean, lw=0.9, label=c.legend, **style)
            ticks(ax, sorted({c.size for c in ranked[t]}))
            left = next((c.remaining[k] for c in ranked[t] if k in c.remaining), math.nan)
            title = f"level {k}, {left:.1%} of weights remaining"
            finish(ax, f"examples trained on for {t} steps", "test accuracy", title)
        yield name, figure


def correlation(x: Iterable[float], y: Iterable[float]) -> str:
    x, y = list(x), list(y)
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return f"n={len(x)}"
    rank, plain = stats.spearmanr(x, y).statistic, stats.pearsonr(x, y).statistic
    return f"Pearson {plain:.2f}, Spearman {rank:.2f}, n={len(x)}"


def barriers(r: Results, curves: list[Curve], data: str) -> list[dict]:
    """A row for each replicate of lmc: its barriers, and the accuracy that imp runs of its model
    reached from the same w_tr at the level of Figure 5, or at the last that each of them has."""
    model, wanted = curves[0].runs[0].model, FINAL_LEVEL.get(data, 7)
    imps = [x for x in r.runs if x.stage == "imp" and x.model == model and "pretrain" in x.result]
    imps = [x for x in imps if x.result["levels"] and not x.settings.get("control")]
    reached = [len(x.result["levels"]) - 1 for x in imps]
    level = wanted if not reached or max(reached) >= wanted else min(reached)
    final = {
        (x.result["pretrain"]["fingerprint"], x.settings["steps"]): x.result["levels"][level]
        for x in imps
        if len(x.result["levels"]) > level
    }
    rows = []
    for c, run in ((curve, run) for curve in curves for run in curve.runs if run.done):
        start = run.result["pretrain"]
        end = final.get((start["fingerprint"], run.settings["steps"]), {})
        row = {"configuration": c.label, "replicate": run.settings["replicate"]}
        row |= {k: run.result[k] for k in ("loss_barrier", "error_barrier", "connected")}
        row |= {"pretrain_accuracy": start["test_accuracy"], "level": level}
        rows.append(row | {"final_accuracy": end.get("test_accuracy")})
    return rows


def fig5(r: Results) -> Pictures:
    """Four histograms of barriers (pairs, examples and replicates pooled; the paper's scaled to our
    count), and final accuracy against two forecasts of it."""
    edges, theirs = np.arange(-5, 10.5, 0.5), defaultdict(list)
    for x in paper_rows("lmc_histograms.csv"):
        theirs[x["dataset"], x["pretraining"]].append(int(x["count_of_1080000"]))
    for name, curves, paper in r.pictures("lmc"):
        rows = barriers(r, curves, paper)
        if not rows:
            continue
        mine = {c.key[:3]: c for c in usual(curves)}
        size, t = HISTOGRAMS.get(paper, (0, 0))
        if not any(k[1:] == (size, t) for k in mine):
            size, t = main_setting(usual(curves))
        four = [("all", 0, t), ("all", 0, 2 * t), ("random", size, t), ("easy", size, t)]
        (figure, axes), handles = panels(6), {}
        for ax, key in zip((axes[0], axes[1], axes[3], axes[4]), four, strict=True):
            what = "all data" if key[0] == "all" else f"{key[0]} {key[1]}"
            found = [load(x.folder / "loss_barrier_pairs.npy") for x in mine[key].runs if x.done] \
                if key in mine else []  # fmt: skip
            if found := [x.ravel() for x in found if x is not None]:
                pooled, style = np.concatenate(found), look(mine[key])
                outside = ((pooled < edges[0]) | (pooled > edges[-1])).mean()
                label = f"{mine[key].legend}, {outside:.1%} outside"
                ax.hist(pooled, edges, color=style["color"], alpha=0.55, label=label)
                if counts := theirs.get((paper, f"{what}, {key[2]} it")):
                    scaled = np.array(counts) / sum(counts) * len(pooled)
                    ax.stairs(scaled, edges, color="k", lw=0.7, label=SOURCE)
            finish(ax, "loss barrier of an example", "count", f"{what}, {key[2]} steps")
        rows = [x for x in rows if x["final_accuracy"] is not None]
        for ax, key, column, xlabel in (
            (axes[2], "pretrain_accuracy", "pretrain_test_accuracy", "test accuracy at w_tr"),
            (axes[5], "loss_barrier", "mean_train_loss_barrier", "mean loss barrier"),
        ):
            for x in paper_rows("lmc_scatter.csv"):
                y = x["final_test_accuracy_level7"]
                if x["dataset"] == paper and x[column] and y[0] != "<":
                    color, _, marker = LOOK[x["subset_method"]]
                    kind = {"s": 9, "facecolors": "none", "edgecolors": color, "marker": marker}
                    ax.scatter(float(x[column]), float(y), lw=0.5, alpha=0.6, zorder=1, **kind)
            for c in curves:
                at = [(x[key], x["final_accuracy"]) for x in rows if x["configuration"] == c.label]
                if at:
                    style = {k: v for k, v in look(c, curves).items() if k != "linestyle"}
                    points = ax.scatter(*zip(*at, strict=True), s=22, **style)
                    handles[c.label] = points
            found = correlation((x[key] for x in rows), (x["final_accuracy"] for x in rows))
            level = rows[0]["level"] if rows else FINAL_LEVEL.get(paper, 7)
            finish(ax, xlabel, f"test accuracy at level {level}", found)
        if handles:
            figure.legend(handles.values(), handles, loc="outside lower center", ncols=5)
        yield name, figure


def trained(c: Curve) -> tuple[list[float], int]:
    """Accuracies of the runs of a warmup that learned, and how many did not."""
    results = [x.result for x in c.runs if x.done]
    good = [x["test_accuracy"] for x in results if x["outcome"] == "trained"]
    return good, len(results) - len(good)


def draw_sharpness(ax: Axes, c: Curve, style: dict, label: str) -> None:
    by_step = defaultdict(list)
    for x in itertools.chain(*(x.result["sharpness"] for x in c.runs if x.done)):
        if x["eigenvalue"] is not None:
            by_step[x["step"]].append(x["eigenvalue"])
    if by_step:
        tops = {s: summary(v) for s, v in sorted(by_step.items())}
        draw(ax, tops, style, f"{label} (n={len(c.runs)})")


def draw_warmups(top: Axes, bottom: Axes, curves: list[Curve], style: dict, paper: str) -> None:
    """One configuration of Figure 6: accuracy by length; sharpness at a typical length."""
    what, lost = curves[0].label.split(", step")[0], sum(trained(c)[1] for c in curves)
    if paper == "cifar10":
        draw_paper(top, paper_warmup(curves[0]), style)
    if points := {c.rewind: summary(trained(c)[0]) for c in curves if trained(c)[0]}:
        n = max(len(c.runs) for c in curves)
        draw(top, points, style, f"{what} (n={n}" + f", {lost} not trained" * bool(lost) + ")")
    c = next((c for c in curves if c.rewind == 1600), curves[-1])
    draw_sharpness(bottom, c, style, f"{what}, warmup {c.rewind}")


def fig6(r: Results) -> Pictures:
    """A column for each kind of subset, with a curve for each size, balance and offset."""
    for name, curves, paper in r.pictures("warmup"):
        curves = [c for c in curves if not c.noise and any(x.done for x in c.runs)]
        kinds: dict[str, dict] = defaultdict(lambda: defaultdict(list))
        for c in sorted(curves, key=lambda c: (c.size, c.rewind)):
            kind = "windows" if " from " in c.metric else c.subset
            kinds[kind if c.rewind else "none"][c.size, c.metric].append(c)
        for size in {size for size, _ in kinds["windows"]}:
            if first := kinds["easy"].get((size, "el2n")):
                kinds["windows"][size, "el2n"] = first
        lengths = sorted({c.rewind for c in curves if c.rewind})
        columns = [k for k in ("easy", "random", "hard", "windows") if kinds[k]] or ["all"]
        if not lengths:
            continue
        figure, axes = panels(2 * len(columns), len(columns))
        for kind, top, bottom in zip(columns, axes, axes[len(columns) :], strict=False):
            groups = [cs for _, cs in sorted(kinds[kind].items())] * (kind != "all")
            for k, cs in enumerate(groups):
                style = look(Curve(cs[0].subset, 0, 0, 0, "el2n"))
                style |= {"color": shade(style["color"], k, len(groups)), "marker": "ovsD^P"[k % 6]}
                draw_warmups(top, bottom, cs, style, paper)
            for cs in kinds["all"].values():
                draw_warmups(top, bottom, cs, look(cs[0]), paper)
            for [c] in kinds["none"].values():
                draw_sharpness(bottom, c, {**look(c), "color": "0.6"}, "no warmup")
                if good := trained(c)[0]:
                    line = {"color": "0.5", "lw": 0.8, "ls": (0, (1, 2))}
                    top.axhline(summary(good).mean, label="no warmup", **line)
            ticks(top, lengths)
            finish(top, "steps of warmup", "test accuracy", kind)
            bottom.set_yscale("log")
            finish(bottom, "step", "top Hessian eigenvalue")
        yield name, figure


def tracked(c: Curve, kind: str) -> dict[int, Stat]:
    """A column of the logs by step; of coherence the band is over all batches of all replicates."""
    by_step = defaultdict(list)
    for run in c.runs:
        rows = [x for x in runs.read_rows(run.folder / "log.csv") if x.get(kind)]
        path = run.folder / f"{kind}.npy"
        each = load(path) if path.exists() else None
        for k, x in enumerate(rows):
            batches = each[k] if each is not None and len(each) == len(rows) else [float(x[kind])]
            by_step[int(x["step"])] += [float(v) for v in batches]
    return {s: summary(v) for s, v in sorted(by_step.items())}


def fig7(r: Results) -> Pictures:
    kinds = {
        "test_accuracy": "test accuracy",
        "train_accuracy": "accuracy on all training data",
        "easy_accuracy": "accuracy on the easy examples",
        "coherence": "cosine of gradients with their mean",
    }
    for name, curves, _ in r.pictures("pretrain"):
        curves = [c for c in curves if c.rewind == max(c.rewind for c in curves)]
        found = {kind: [(c, x) for c in curves if (x := tracked(c, kind))] for kind in kinds}
        shown = [kind for kind in kinds if found[kind]]
        if not shown:
            continue
        figure, axes = panels(len(shown), 2)
        for ax, kind in zip(axes, shown, strict=True):
            for c, points in found[kind]:
                draw(ax, points, look(c, curves), c.legend)
            finish(ax, "step", kinds[kind])
        yield name, figure


def fig8(r: Results) -> Pictures:
    for name, curves, _ in r.pictures("pretrain"):
        norms = []
        for c in (c for c in curves if c.rewind == min(c.rewind for c in curves)):
            found = [load(p) for x in c.runs if (p := x.folder / "gradient_norm.npy").exists()]
            if found := [x[:200] for x in found if x is not None]:
                norms.append((c, found))
        if not norms:
            continue
        figure, [ax] = panels(1, width=4)
        shown = [c for c, _ in norms]
        edges = np.linspace(0, max(x.max() for _, found in norms for x in found), 41)
        for c, found in norms:
            outline(ax, found, edges, look(c, shown), c.legend)
        steps = min(200, shown[0].rewind)
        finish(ax, f"norm of a minibatch gradient, first {steps} steps", "share")
        yield name, figure


def fig9(r: Results) -> Pictures:
    """One replicate, not averaged: all data at t and 2t, and the easy subset at t."""
    for name, curves, _ in r.pictures("imp"):
        size, t = main_setting(usual(curves))
        four = [("all", 0, t), ("all", 0, 2 * t), ("easy", size, t)]
        curves = [c for c in usual(curves) if c.points and c.key[:3] in four]
        if not curves:
            continue
        last = min(6, *(max(c.points) for c in curves))
        figure, axes = panels(2, width=3.6)
        for ax, level in zip(axes, (0, last), strict=True):
            for c in curves:
                run = min(c.runs, key=lambda x: x.settings["replicate"])
                try:
                    state = runs.read_tensors(run.folder / f"level{level:02d}.pt")
                    errors = [state["projected_error"].numpy()]
                except (runs.UserError, KeyError) as e:
                    skipped(e)
                    continue
                label = f"{c.label}, replicate {run.settings['replicate']}"
                outline(ax, errors, np.linspace(0, math.sqrt(2), 41), look(c, curves), label)
            title = f"under the mask of level {level}" if level else "dense"
            finish(ax, "||softmax - onehot|| of an example at w_tr", "share", title)
        yield name, figure


def rivals(r: Results, metric: str) -> Pictures:
    """Figures 10 and 12: other scores against EL2N; pruning after pre-training by them, by EL2N
    with and without balance, and on random subsets."""
    for name, curves, paper in r.pictures("imp"):
        model, data = curves[0].runs[0].model, curves[0].runs[0].settings["data"]
        clean = [m for m in r.metrics.values() if m["data"] == data and not m["label_noise"][0]]
        clean = [m for m in clean if m["folder"].parts[-2] == model]
        el2n = [m for m in clean if m["metric"] == "el2n"]
        other = [m for m in clean if m["metric"].startswith(metric)]
        other = [m for m in other if m["metric"] != "lmc" or m["folder"].name.startswith("all")]
        other.sort(key=lambda m: m.get("rewind", 0))
        curves = [c for c in curves if c.points and not c.control and not c.noise]
        by = [c for c in curves if c.metric.split()[0] == metric]
        pairs, settings = list(itertools.product(other, el2n)), {(c.size, c.rewind) for c in by}
        if not pairs and not by:
            continue
        figure, axes = panels(len(pairs) + len(settings))
        for ax, (a, b) in zip(axes, pairs, strict=False):
            y, x = (load(m["folder"] / "scores.npy") for m in (a, b))
            if x is not None and y is not None:
                ax.hexbin(x, y, gridsize=40, bins="log", cmap="viridis_r", mincnt=1, lw=0.1)
                xlabel = f"EL2N score at step {b['score_step']}"
                finish(ax, xlabel, f"{score_name(a)} score", correlation(x, y))
        for ax, (size, t) in zip(axes[len(pairs) :], sorted(settings), strict=True):
            kinds = {"el2n", "el2n balanced"} | {c.metric for c in by}
            shown = [c for c in curves if c.subset in ("easy", "random") and c.metric in kinds]
            shown = [c for c in shown if (c.size, c.rewind) == (size, t)]
            shown = all_data(curves) + shown
            title = f"{size} examples, {t} steps"
            draw_levels(ax, shown, paper_curves(paper), dense_of(curves, paper), title)
        yield name, figure


def examples(r: Results) -> Pictures:
    """The easiest and the hardest training images of each class by EL2N, and its distribution."""
    each, most = 8, 20  # images of a class, classes
    for m in [m for m in r.metrics.values() if m["metric"] == "el2n" and not m["label_noise"][0]]:
        model, scores = m["folder"].parts[-2], load(m["folder"] / "scores.npy")
        name = model.rsplit("-", 1)[0]
        name = next((d for d in r.datasets if Path(d).name == name), name)
        try:
            data = common.load_data(name, r.data_dir, common.torch.device("cpu"))
        except runs.UserError as e:
            skipped(e)
            continue
        labels, images = data.train_labels.numpy(), data.train_images.numpy()
        if scores is None or data.fingerprint != m["data"] or len(scores) != len(labels):
            skipped(f"{m['folder']}: scores of other data than {r.data_dir} holds")
            continue
        order = sorted(range(len(data.classes)), key=lambda k: np.median(scores[labels == k]))
        rows = order[:: -(-len(order) // most)]
        figure, grid = plt.subplots(len(rows), 2 * each + 1, figsize=(9, 0.55 * len(rows)))
        for line, k in zip(np.atleast_2d(grid), rows, strict=True):
            ranked = np.flatnonzero(labels == k)
            ranked = ranked[np.argsort(scores[ranked], kind="stable")]
            for ax, i in zip(line, [*ranked[:each], None, *ranked[-each:]], strict=False):
                ax.axis("off")
                if i is not None:
                    ax.imshow(images[i].squeeze(), cmap="gray")
            line[0].text(-0.2, 0.5, data.classes[k], ha="right", va="center",
                         transform=line[0].transAxes)  # fmt: skip
        grid[0][0].set_title("easiest", loc="left")
        grid[0][each + 1].set_title("hardest", loc="left")
        yield f"{model}-{m['folder'].name}", figure
        figure, [ax] = panels(1, width=max(4, 0.16 * len(order)))
        ax.boxplot([scores[labels == k] for k in order], sym="", whis=(5, 95), widths=0.6)
        ax.set_xticklabels([data.classes[k] for k in order], rotation=90)
        finish(ax, "", f"EL2N score at step {m['score_step']}", "5, 25, 50, 75, 95 % by class")
        yield f"{model}-{m['folder'].name}-scores", figure


ALL, NOISY = (*PUBLISHED, "digits"), ("cifar10", "digits")
FIGURES: dict[str, tuple[str, Callable[[Results], Pictures], tuple[str, ...]]] = {
    # what makes its runs, what draws it, the data sets whose grid in run_all.sh has it
    "fig2": ("imp", functools.partial(by_size, noisy=False, everything=False), ALL),
    "fig3": ("imp", fig3, ALL),
    "fig4": ("imp", functools.partial(by_size, noisy=True, everything=False), NOISY),
    "fig5": ("lmc", fig5, ALL),
    "fig6": ("warmup", fig6, ("cifar10", "digits")),
    "fig7": ("pretrain", fig7, ("cifar100", "digits")),
    "fig8": ("pretrain", fig8, ("cifar10", "digits")),
    "fig9": ("imp", fig9, ALL),
    "fig10": ("lmc", functools.partial(rivals, metric="lmc"), ("cifar100", "cinic10", "digits")),
    "fig11": ("imp", functools.partial(by_size, noisy=False, everything=True), ALL),
    "fig12": ("imp", functools.partial(rivals, metric="forgetting"), ("cifar10", "digits")),
    "fig13": ("imp", functools.partial(by_size, noisy=True, everything=True), NOISY),
    "examples": ("el2n", examples, ALL),
}

# ---- tables --------------------------------------------------------------------------------------


def against(ours: Stat, theirs: Stat | None) -> dict:
    """The columns that tables share: ours, the paper's, and how they differ."""
    p = theirs or Stat(math.nan, math.nan, 0)
    row = {"ours": ours.mean, "sd": ours.sd, "n": ours.n, "paper": p.mean, "paper_sd": p.sd}
    row |= {"paper_n": p.n or None, "difference": ours.mean - p.mean}
    row["standard_error"] = standard_error(ours, p) if theirs else math.nan
    return row | {"welch_p": welch(ours, p)}


def accuracies(curves: list[Curve], paper: dict[tuple, Curve]) -> list[dict]:
    return [
        {"configuration": c.legend, "level": k, "weights_remaining": c.remaining[k]}
        | against(p, paper[c.key].points.get(k) if c.key in paper else None)
        for c in curves
        for k, p in c.points.items()
    ]


def compared(curves: list[Curve]) -> Iterator[tuple[Curve, Curve]]:
    """Each curve with those of all data; tickets with their controls."""
    for a, b in itertools.product(curves, curves):
        later = a.subset != "all" or a.rewind > b.rewind
        control = b.control and not a.control and a.key[:-1] == b.key[:-1]
        full = (b.subset, b.metric, b.control) == ("all", "el2n", "") and b.noise <= a.noise
        if control or (full and later):
            yield a, b


def tables(r: Results, levels: Iterable[int], slack: float) -> Iterator[tuple[str, list[dict]]]:
    for name, curves, paper in r.pictures("imp"):
        curves = [c for c in curves if c.points]
        yield f"imp-{name}", accuracies(curves, paper_curves(paper))
        rows = [compare(a, b, curves, paper, levels, slack) for a, b in compared(curves)]
        yield f"verdicts-{name}", rows
    for name, curves, paper in r.pictures("lmc"):
        yield f"lmc-{name}", barriers(r, curves, paper)
    for name, curves, paper in r.pictures("warmup"):
        rows = []
        for c in curves:
            good, lost = trained(c)
            row = {"configuration": c.label, "warmup": c.rewind, "not_trained": lost}
            known = paper_warmup(c).get(c.rewind) if paper == "cifar10" else None
            rows += [row | against(summary(good), known)] if good else []
        yield f"warmup-{name}", rows


def cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.5g}"
    return "" if value is None else str(value)


def write_table(path: Path, rows: list[dict]) -> None:
    """The same rows as CSV and as Markdown."""
    lines = [[*rows[0]], *([cell(v) for v in row.values()] for row in rows)]
    comma = io.StringIO()
    csv.writer(comma, lineterminator="\n").writerows(lines)
    lines.insert(1, ["---"] * len(rows[0]))
    marked = "".join(f"| {' | '.join(x)} |\n" for x in lines)
    for suffix, text in ((".csv", comma.getvalue()), (".md", marked)):
        runs.write(path.parent / f"{path.name}{suffix}", lambda f, t=text: f.write(t.encode()))


# ---- what is missing -----------------------------------------------------------------------------


def missing_curves(r: Results, data: str) -> list[list[str]]:
    """Commands for the paper's curves of a data set, of the digits those of Figure 2, that results/
    has not."""
    p = common.PRESETS[data]
    wanted = [("all", 0, t, 0.0, "el2n", "") for t in (0, p.rewind, 2 * p.rewind)]
    wanted += [(s, p.size, p.rewind, 0.0, "el2n", "") for s in SUBSETS[1:]]
    wanted = [c.key for c in usual(paper_curves(data).values())] or wanted
    mine = [x for _, curves, _ in r.pictures("imp") for x in curves]
    have = {c.key for c in mine if c.runs[0].settings["dataset"] == data}
    commands = []
    for subset, size, t, *_ in (k for k in wanted if k not in have):
        words = ["python", "imp.py", "--dataset", data, "--subset", subset, "--rewind", str(t)]
        words += ["--size", str(size)] * (subset != "all")
        commands.append([*words, "--replicate", "0-3"])
    return commands


def missing(r: Results, drawn: dict[str, list[str]], datasets: list[str], others: bool) -> list:
    """What was not drawn, as (what, command that makes it): of data sets with a grid."""
    lines = []
    for figure, names in drawn.items():
        stage, _, grid = FIGURES[figure]
        for data in datasets:
            if data in grid and not any(name.startswith(f"{data}-") for name in names):
                only = ["--only", figure] if figure in list(FIGURES)[:-1] else []
                command = ["bash", "run_all.sh", *only, "--dataset", data]
                if not only:
                    command = ["python", "el2n.py", "--dataset", data]
                lines.append((f"{figure} of {data}, which needs runs of {stage}.py", command))
    for data in datasets:
        if data in ALL and {"fig2", "fig3", "fig11"} & set(drawn):
            commands = missing_curves(r, data)
            more = f"{len(commands)} curves of {data}, the first"
            lines += [(more, command) for command in commands[:1]]
    for data in sorted(set(PUBLISHED) - set(datasets)) if others else ():
        lines.append((data, ["bash", "run_all.sh", "--dataset", data]))
    return lines


# ---- plans and costs -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """A command of a stage: its first folder below --out, runs, network-steps, whether all done."""

    folder: Path
    runs: int
    steps: int
    done: bool


def read_jobs(lines: Iterable[str]) -> Iterator[Job]:
    """Of shell command lines of the stages; those of figures.py and empty ones are left out."""
    parsers: dict[str, tuple] = {}
    for line in filter(str.strip, lines):
        try:
            words = shlex.split(line)
            at = next(k for k, word in enumerate(words) if word.endswith(".py"))
            stage = Path(words[at]).stem
            if stage == "figures":
                continue
            if stage not in parsers:
                if stage not in (*STAGES, "el2n"):
                    raise runs.UserError(f"{stage}.py is no stage")
                module = importlib.import_module(stage)
                parsers[stage] = module.flags(), module.plan
            parser, plan = parsers[stage]
            args = parser.parse_args(words[at + 1 :])
            found = plan(args)
        except (ValueError, StopIteration, runs.UserError) as e:
            reason = f"{line.strip()} ({runs.one_line(e)})"
            raise runs.UserError(f"not a command of a stage: {reason}") from e
        folder = found[0][0].relative_to(args.out)
        folder = folder.parent if re.fullmatch(r"rep\d+", folder.name) else folder
        steps = sum(steps for _, steps, _ in found)
        yield Job(folder, len(found), steps, all(done for *_, done in found))


def rates(found: list[Run]) -> dict[str, float]:
    """Network-steps per second of each model, the median over the levels of imp. Replicates of one
    folder with the same seconds trained side by side."""
    by_folder = defaultdict(list)
    for run in found:
        if run.stage == "imp":
            by_folder[run.model, run.name] += run.result["levels"]
    by_model = defaultdict(list)
    for (model, _), levels in by_folder.items():
        beside = Counter((x["level"], x["seconds"]) for x in levels)
        together = ((x["steps_per_second"], beside[x["level"], x["seconds"]]) for x in levels)
        by_model[model] += [rate * count for rate, count in together]
    return {model: float(np.median(rate)) for model, rate in by_model.items() if rate}


def rate_of(stage: str, model: str, measured: dict[str, float], rate: float | None) -> float | None:
    """Network-steps per second: measured, else from that of ResNet-20 on 128 images by depth and
    batch size (warmup 1024, CINIC-10 256); None where there is neither."""
    digits, depth = model.startswith("digits"), re.search(r"-resnet(\d+)", model)
    if model in measured:
        return measured[model] / (8 if stage == "warmup" and not digits else 1)
    if rate is None or digits or not depth:
        return None
    batches = 8 if stage == "warmup" else 2 if model.startswith("cinic10") else 1
    return rate * 18 / ((int(depth[1]) - 2) * batches)


def cost(jobs: Iterable[Job], measured: dict[str, float], rate: float | None) -> str:
    """A table of jobs, runs, network-steps and hours by stage and model."""
    groups: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        groups["/".join(job.folder.parts[:2])].append(job)
    head = ("stage/model", "jobs", "runs", "network-steps", "hours")
    rows, hours = [], []
    for name, group in groups.items():
        steps, speed = sum(j.steps for j in group), rate_of(*name.split("/"), measured, rate)
        hours.append(steps / speed / 3600 if speed else math.nan)
        rows.append((name, len(group), sum(j.runs for j in group), steps, hours[-1]))
    rows.append(("all", *(sum(row[k] for row in rows) for k in (1, 2, 3)), sum(hours)))
    form = "{:<30} {:>6} {:>6} {:>16} {:>10}".format
    lines = [form(*head)]
    lines += [form(*row[:4], "-" if math.isnan(row[4]) else f"{row[4]:.1f}") for row in rows]
    if math.isnan(sum(hours)):
        lines.append("hours: no measured rate for some of these; run one, or give --rate")
    return "\n".join(lines)


# ---- command line --------------------------------------------------------------------------------


def flags() -> runs.Parser:
    parser = runs.Parser(description=__doc__)
    some = f"of {', '.join(FIGURES)} [all but examples]"
    parser.add_argument("figure", nargs="*", help=some)
    parser.add_argument("--out", type=Path, default=Path("results"), help="where results are")
    parser.add_argument("--figures", type=Path, help="where pictures go [OUT/figures]")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="examples: of data")
    parser.add_argument(
        "--dataset", action="append", help="only of this data set, or folder of images"
    )
    about = "whose curves of the paper to draw behind, of runs on other data"
    parser.add_argument("--paper", choices=PUBLISHED, help=about)
    about = "the verdict of one folder of results/imp/MODEL/ over another, and nothing else"
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help=about)
    about = "at which verdicts are given, such as 3-12 [all but 0]"
    parser.add_argument("--levels", type=runs.numbers, default=(), help=about)
    about = "standard errors by which a curve may be lower without being below [1]"
    parser.add_argument("--slack", type=runs.number(float, 0), default=1.0, help=about)
    about = "print the measured network-steps per second of each model, and nothing else"
    parser.add_argument("--rates", action="store_true", help=about)
    about = "for each command on stdin: done or todo, network-steps, runs, folder below --out"
    parser.add_argument("--plan", action="store_true", help=about)
    about = "jobs, runs, network-steps and hours of the commands on stdin"
    parser.add_argument("--cost", action="store_true", help=about)
    about = "--cost: network-steps per second of ResNet-20 on 128 images, where none are measured"
    parser.add_argument("--rate", type=runs.number(float, 0, open_low=True), help=about)
    return parser


def compare_two(r: Results, names: list[str], levels: Iterable[int], slack: float) -> dict:
    """--compare: folders by name, or by the end of their path where several models have it."""
    found = []
    for name in names:
        end = f"/{name.strip('/')}"
        here = [(c, cs, paper) for _, cs, paper in r.pictures("imp") for c in cs]
        here = [x for x in here if x[0].runs[0].folder.parent.as_posix().endswith(end)]
        if len(here) != 1:
            which = ", ".join(str(c.runs[0].folder.parent) for c, *_ in here) or "no such run"
            raise runs.UserError(f"--compare {name}: {which}; name one below results/imp/")
        found += here
    (a, curves, paper), (b, *_) = found
    return compare(a, b, curves, paper, levels, slack)


def save(figure: Figure, path: Path) -> None:
    """PNG and SVG, high enough for the legends."""
    if figure.get_layout_engine():
        legends = [len(x.get_texts()) for ax in figure.axes if (x := ax.get_legend())]
        rows = figure.axes[0].get_subplotspec().get_gridspec().nrows
        shared = sum(0.4 + 0.14 * len(x.get_texts()) / 5 for x in figure.legends)
        figure.set_figheight(rows * (2.6 + 0.15 * max(legends, default=0)) + shared)
    for kind, about in (("png", {}), ("svg", {"Date": None})):
        keep = functools.partial(figure.savefig, format=kind, dpi=160, metadata=about)
        runs.write(path.parent / f"{path.name}.{kind}", keep)
    plt.close(figure)


def main(args: argparse.Namespace) -> Any:
    """Draws, writes, says what is missing; returns the paths written and what is missing."""
    if unknown := [f for f in args.figure if f not in FIGURES]:
        raise runs.UserError(f"{unknown[0]}: not one of {', '.join(FIGURES)}")
    if args.plan:
        jobs = []
        for job in read_jobs(sys.stdin):
            jobs.append(job)
            print("done" if job.done else "todo", job.steps, job.runs, job.folder, sep="\t")
        return jobs
    found = read_runs(args.out)
    only = {Path(d).name for d in args.dataset or ()}
    if only:
        found = [run for run in found if run.settings["dataset"] in only]
    if args.cost:
        return print(cost(read_jobs(sys.stdin), rates(found), args.rate))
    if args.rates:
        print("\n".join(f"{model} {rate:.1f}" for model, rate in rates(found).items()))
        return rates(found)
    metrics = read_metrics(args.out)
    if only:
        of = {k: m["folder"].parts[-2].rsplit("-", 1)[0] for k, m in metrics.items()}
        metrics = {k: m for k, m in metrics.items() if of[k] in only}
    r = Results(found, metrics, args.paper, args.data_dir, tuple(args.dataset or ()))
    if args.compare:
        row = compare_two(r, args.compare, args.levels, args.slack)
        print("\n".join(f"{k:24} {cell(v)}" for k, v in row.items()))
        return row
    folder = args.figures or args.out / "figures"
    datasets = sorted(only) or sorted({run.settings["dataset"] for run in found})
    written, drawn = [], {}
    for figure in args.figure or [*FIGURES][:-1]:
        drawn[figure] = []
        for name, picture in FIGURES[figure][1](r):
            picture.suptitle(f"{figure}  {name}", fontsize=8, x=0.01, ha="left")
            save(picture, folder / f"{figure}-{name}")
            written.append(folder / f"{figure}-{name}.png")
            drawn[figure].append(name)
    for name, rows in () if args.figure else tables(r, args.levels, args.slack):
        if rows:
            write_table(folder / name, rows)
            written.append(folder / f"{name}.md")
    out = [] if args.out == Path("results") else ["--out", str(args.out)]
    lacking = missing(r, drawn, datasets, not args.dataset)
    lacking = [f"{what}: {shlex.join(command + out)}" for what, command in lacking]
    for line in lacking:
        print(f"missing: {line}", file=sys.stderr)
    for path in written:
        print(path)
    if args.figure and not written:
        raise runs.UserError(f"{args.out} has nothing to draw {', '.join(args.figure)} from")
    return {"written": written, "missing": lacking}


if __name__ == "__main__":
    runs.run_stage(main, flags())
