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
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation

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
CURVE |= {"track", "every", "easy_size", "easy_balance", "warmup", "pretrain_lr"}
CURVE |= {"prune_fraction", "control", "init"}
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.grid": True, "grid.alpha": 0.25}
STYLE |= {"legend.fontsize": 6.5, "legend.frameon": False, "legend.handlelength": 4}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.2}
DOTTED = {"color": "0.5", "lw": 0.8, "ls": (0, (1, 2)), "zorder": 0}  # to compare with
STYLE |= {"svg.hashsalt": "tickets", "svg.fonttype": "none"}
plt.rcParams.update(STYLE)

# ---- reading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    folder: Path  # results/STAGE/MODEL/NAME/rep<k>
    settings: dict
    result: dict  # result.json; of an imp run in progress the levels it has
    done: bool

    @property
    def place(self) -> tuple[str, ...]:
        """(stage, model, name)"""
        return self.folder.parts[-4:-1]


@dataclasses.dataclass(frozen=True)
class Stat:
    """Mean, sample standard deviation (NaN for n = 1) and n."""

    mean: float
    sd: float
    n: int


def summary(values: Iterable[float]) -> Stat:
    x = np.asarray(list(values), float)
    return Stat(float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else math.nan, len(x))


def grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list]:
    """(key, value) -> the values of each key."""
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def summaries(pairs: Iterable[tuple[int, float]]) -> dict[int, Stat]:
    """(key, value) -> a summary of each key, in the order of the keys."""
    return {key: summary(values) for key, values in sorted(grouped(pairs).items())}


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
    def what(self) -> str:
        """The examples: easy 3200 balanced."""
        by = self.metric.removeprefix("el2n").strip()
        return f"{self.subset} {self.size or ''}".strip() + f" {by}" * bool(by)

    @property
    def label(self) -> str:
        noise = f", {self.noise:.0%} noise" if self.noise else ""
        return f"{self.what}, step {self.rewind}{noise}" + f", {self.control}" * bool(self.control)

    @property
    def legend(self) -> str:
        n = counts(self.points.values()) if self.points else len(self.runs)
        going = "*" if any(not r.done for r in self.runs) else ""
        return f"{self.label} (n={n}){going}"


def counts(points: Iterable[Stat]) -> str:
    """n of some points, "4" or "2-4"."""
    n = sorted({p.n for p in points})
    return "-".join(map(str, n[:: max(1, len(n) - 1)]))


def pick(curves: Iterable[Curve], **wanted: Any) -> list[Curve]:
    """Those with these attributes; a set or tuple stands for any of its values."""
    choices = {k: v if isinstance(v, set | tuple) else (v,) for k, v in wanted.items()}
    return [c for c in curves if all(getattr(c, k) in v for k, v in choices.items())]


def read_run(config: Path) -> Run:
    """The run of a config.json; KeyError, TypeError or ValueError if it is not one of ours."""
    folder, imp = config.parent, config.parts[-5] == "imp"
    done = (folder / "result.json").exists()
    value = runs.read_json(folder / "result.json" if done else config)
    settings = (value["config"] if done else value)["settings"]
    if not done and imp:
        log = folder / "log.csv"  # begun with the first level that is done
        rows = runs.read_rows(log) if log.exists() else []
        rows = [x for x in rows if x["phase"].startswith("level")]
        value["levels"] = [{k: float(v) for k, v in x.items() if k != "phase" and v} for x in rows]
    for key in ("dataset", "subset", "label_noise", "steps", "batch_size", "replicate"):
        settings[key]
    for x in value["levels"] if imp else ():
        x |= {k: float(x[k]) for k in ("level", "test_accuracy", "weights_remaining")}
    return Run(folder, settings, value, done)


def skipped(reason: Any) -> None:
    print(f"skipped: {reason}", file=sys.stderr)


def read_runs(out: Path) -> list[Run]:
    """Every run below results/; damaged and foreign files are named on stderr and left out, and so
    are barriers between any two networks, and runs that could not go on, but for imp's levels."""
    found = []
    for path in sorted(p for s in STAGES for p in out.glob(f"{s}/*/*/rep*/config.json")):
        try:
            run = read_run(path)
            usable = run.result.get("ended") is None or run.place[0] == "imp"
            found += [run] if usable and "between" not in run.settings else []
        except runs.UserError as e:
            skipped(e)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as e:
            skipped(f"{path.parent}: not one of our runs ({e!r})")
    return found


def read_metrics(out: Path) -> dict[str, dict]:
    """scores.json by the fingerprint of its scores, with `folder`, `model`, `dataset` and `name`:
    el2n, el2n 1600 (steps other than the preset's), lmc 800, forgetting."""
    found = {}
    for path in sorted([*out.glob("el2n/*/*/scores.json"), *out.glob("lmc/*/*/scores.json")]):
        try:
            about = runs.read_json(path)
            name, step, model = about["metric"], about.get("score_step"), path.parts[-3]
            data = model.rsplit("-", 1)[0]
            if name.startswith("lmc"):
                name = f"lmc {about['rewind']}"
            elif name == "el2n" and data in common.PRESETS:
                name += f" {step}" * (step != common.PRESETS[data].score_step)
            about |= {"folder": path.parent, "model": model, "dataset": data, "name": name}
            found[about["sha256_of_scores"]] = about
        except (runs.UserError, KeyError) as e:
            skipped(e)
    return found


def load(path: Path) -> Any:
    """An .npy or .pt of a run, or None with a line on stderr."""
    try:
        return (runs.read_npy if path.suffix == ".npy" else runs.read_tensors)(path)
    except runs.UserError as e:
        return skipped(e)


def load_all(curve: Curve, name: str) -> list[np.ndarray]:
    """An array of each finished replicate that has it."""
    paths = (x.folder / name for x in curve.runs if x.done)
    return [x for p in paths if p.exists() and (x := load(p)) is not None]


def make_curve(found: list[Run], metrics: dict[str, dict]) -> Curve:
    """The replicates of one folder."""
    s = found[0].settings
    about = metrics.get(s.get("scores")) if s["subset"] in ("easy", "hard") else None
    metric = (about["name"] if about else "el2n") + " balanced" * bool(s.get("balance"))
    metric += f" from {s['offset']}" if s.get("offset") else ""
    if s.get("init"):
        metric = found[0].place[-1].split("-rewind")[0]
    step = s.get("rewind", s.get("warmup", 0))
    key = s["subset"], s.get("size") or 0, step, s["label_noise"], metric, s.get("control") or ""
    levels = [x for run in found for x in run.result.get("levels", ())]
    points = summaries((int(x["level"]), x["test_accuracy"]) for x in levels)
    return Curve(*key, points, {int(x["level"]): x["weights_remaining"] for x in levels}, found)


@dataclasses.dataclass
class Picture:
    """What one picture is drawn from, and its panels so far."""

    name: str  # a model, and where runs of it differ in more than CURVE, in what
    curves: list[Curve]
    paper: str  # whose curves of the paper stand behind: cifar10, or ""
    results: "Results"

    @functools.cached_property
    def figure(self) -> Figure:
        return plt.figure(layout="constrained")

    def panel(self, xlabel: str, ylabel: str, title: str = "") -> Axes:
        return self.figure.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title)


@dataclasses.dataclass
class Results:
    runs: list[Run]
    metrics: dict[str, dict]
    paper: str | None = None  # --paper
    data_dir: Path = Path("data")
    datasets: tuple[str, ...] = ()  # --dataset, names or folders of images

    def pictures(self, stage: str) -> Iterator[Picture]:
        """The configurations of a stage that belong in one picture each."""
        folders = grouped((run.place, run) for run in self.runs if run.place[0] == stage)
        models = defaultdict(lambda: defaultdict(list))
        for (_, model, _), group in folders.items():
            rest = sorted((k, str(v)) for k, v in group[0].settings.items() if k not in CURVE)
            models[model][tuple(rest)].append(make_curve(group, self.metrics))
        for model, variants in models.items():
            differ = {k for a, b in itertools.combinations(variants, 2) for k, _ in set(a) ^ set(b)}
            for variant, curves in variants.items():
                more = "".join(f"-{k}{v}" for k, v in variant if k in differ)
                more = "".join(c if c.isalnum() or c in "-_." else "+" for c in more)
                curves.sort(key=lambda c: (SUBSETS.index(c.subset), *c.key[1:]))
                data = curves[0].runs[0].settings["dataset"]  # cifar10-jpeg is cifar10, too
                behind = next((p for p in PUBLISHED if f"{data}-".startswith(f"{p}-")), "")
                yield Picture(model + more, curves, self.paper or behind, self)


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
        easy = pick(curves.values(), subset="easy", noise=0, metric="el2n")
        curves |= {(*c.key[:4], "el2n balanced", ""): c for c in easy}
    return curves


def paper_warmup(c: Curve) -> dict[int, Stat]:
    """Figure 6 and its windows of the ranking: accuracy by length of warmup. The paper's easy
    subsets are balanced, its windows are not."""
    start = re.fullmatch(r"el2n(?: from (\d+))?", c.metric)
    wanted = {"all": ("fig6", "all", "50000", ""), "random": ("fig6", "random", str(c.size), "")}
    if c.metric == "el2n balanced":
        wanted["easy"] = "fig6", "easy", str(c.size), ""
    elif start:
        wanted["easy"] = "rolling", "score_window", str(c.size), start[1] or "0"
    keys = ("experiment", "subset_type", "subset_size", "left_offset")
    stat = ("test_accuracy_mean", "test_accuracy_std", "n_replicates")
    return {
        int(x["warmup_steps"]): paper_stat(*(x[k] for k in stat))
        for x in paper_rows("warmup_curves.csv")
        if tuple(x[k] for k in keys) == wanted.get(c.subset)
        and x[stat[0]]  # a few points of the windows could not be read
    }


# ---- comparing -----------------------------------------------------------------------------------


def standard_error(a: Stat, b: Stat) -> float:
    """Of the difference of two means; NaN where one has no deviation."""
    return math.sqrt(a.sd**2 / a.n + b.sd**2 / b.n)


def welch(a: Stat, b: Stat) -> float:
    """Two-sided p of equal means; NaN where a deviation is missing or both are zero."""
    if math.isnan(a.sd + b.sd) or a.sd == b.sd == 0:
        return math.nan
    from scipy import stats  # slow to import, and plans need none

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


def all_data(curves: Iterable[Curve], noise: float = 0.0) -> list[Curve]:
    """By rewind step."""
    full = pick(curves, subset="all", noise=noise, metric="el2n", control="")
    return sorted((c for c in full if c.points), key=lambda c: c.rewind)


def references(curves: list[Curve], data: str, noise: float) -> tuple[Stat | None, Curve | None]:
    """The dense network, level 0 of all data at t* or as the paper chose, and w_t*, the latest
    rewind of all data; under label noise the noisy ones, where they are there."""
    full = all_data(curves, noise) or all_data(curves)
    chosen = pick(full, rewind=DENSE.get(data)) or full
    return (chosen[-1].points.get(0), full[-1]) if full else (None, None)


def compare(
    a: Curve, b: Curve, curves: list[Curve], data: str, levels: Iterable[int] = (), slack=1.0
) -> dict:
    """One row of the table of verdicts, over `levels`, or all but 0."""
    dense, star = references(curves, data, a.noise)
    chosen = [k for k in a.points if (k in levels if levels else k > 0)]
    common_levels = [k for k in chosen if k in b.points]
    gaps = {k: a.points[k].mean - b.points[k].mean for k in common_levels}
    ends = [f"{a.remaining[k]:.1%}" for k in (common_levels[:1] + common_levels[-1:])]

    def as_dense(c: Curve) -> list[int]:
        return [k for k, p in c.points.items() if dense and not is_below(p, dense, slack)]

    matches = "-"
    if good := [k for k in as_dense(star) if k in chosen] if star else []:
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
        "A_matches_dense_at": ranges(as_dense(a)),
        "B_matches_dense_at": ranges(as_dense(b)),
    }


# ---- drawing -------------------------------------------------------------------------------------


def arrange(figure: Figure, columns: int, shared: bool) -> None:
    """Panels in rows; the legends below them, where they hide nothing: one of the picture where
    they are `shared`, else one of each panel. As high as legends need."""
    columns = min(columns, len(figure.axes))
    grid = figure.add_gridspec(-(-len(figure.axes) // columns), columns)
    entries, most = {}, 0
    for ax, place in zip(figure.axes, grid, strict=False):
        ax.set_subplotspec(place)
        handles, labels = ax.get_legend_handles_labels()
        own = {} if ax.get_legend() else dict(zip(labels, handles, strict=True))
        own |= {SOURCE: own.pop(SOURCE)} if SOURCE in own else {}  # once, and last
        entries, most = entries | own, max(most, len(own) * (not shared))
        if own and not shared:
            under = ax.transAxes + ScaledTranslation(0, -0.5, figure.dpi_scale_trans)
            place = {"bbox_to_anchor": (-0.1, 0), "bbox_transform": under}
            ax.legend(own.values(), own, loc="upper left", **place)
    width = columns * max(3.1, 4 / columns)
    height = grid.nrows * (2.6 + 0.15 * most)
    if entries and shared:
        per_row = max(1, int(width / 1.9))
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=per_row)
        height += 0.3 + 0.15 * -(-len(entries) // per_row)
    figure.set_size_inches(width, height)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)


def kind_of(c: Curve) -> str:
    """Its name in LOOK."""
    by = c.metric.split()[0]
    by = "balanced" if c.metric == "el2n balanced" else c.subset if by == "el2n" else by
    return c.control or (by if by in LOOK else "own")


def look(c: Curve, among: Iterable[Curve] = ()) -> dict[str, Any]:
    """Colour, line and marker; of curves of one kind the earlier are lighter."""
    color, line, marker = LOOK[kind_of(c)]
    alike = [x.key for x in among if kind_of(x) == kind_of(c)]
    if c.key in alike and len(alike) > 1:
        k = alike.index(c.key)
        light = 0.65 * (1 - k / (len(alike) - 1))
        color = tuple(x + (1 - x) * light for x in matplotlib.colors.to_rgb(color))
        if c.subset == "all":
            line, marker = ("--", ":", "-.", "-")[k % 4], ("s", "D", "h", "*")[k % 4]
    return {"color": color, "linestyle": line, "marker": marker}


def draw(
    ax: Axes, points: dict[float, Stat], style: dict, label: str, behind: dict[float, Stat]
) -> None:
    """Mean and band of one curve, and the paper's `behind` it, thin and without markers."""
    thin = {**style, "marker": None, "lw": 0.8, "alpha": 0.8, "zorder": 1}
    if behind:
        ax.plot([*behind], [x.mean for x in behind.values()], label=SOURCE, **thin)
    if points:
        x, every = [*points], max(1, len(points) // 20)
        mean, sd = (np.array([getattr(y, k) for y in points.values()]) for k in ("mean", "sd"))
        ax.plot(x, mean, ms=3.5, markevery=every, label=label, zorder=3, **style)
        if len(x) == 1:  # a band has no width
            ax.errorbar(x, mean, sd, color=style["color"], lw=0.8, capsize=2)
        ax.fill_between(x, mean - sd, mean + sd, color=style["color"], alpha=0.15, lw=0)


def outline(ax: Axes, values: list[np.ndarray], edges: np.ndarray, style: dict, label: str) -> None:
    """Shares of pooled values in bins, as a stepped line; outliers count in the last bins."""
    pooled = np.concatenate([v.ravel() for v in values]).clip(edges[0], edges[-1])
    share = np.histogram(pooled, edges)[0] / len(pooled)
    ax.stairs(share, edges, color=style["color"], ls=style["linestyle"], lw=1.2, label=label)


def ticks(ax: Axes, values: list[int]) -> None:
    """A log2 axis with these numbers on it."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, map(str, values), rotation=40, fontsize=6)
    ax.xaxis.set_minor_locator(NullLocator())


def draw_levels(p: Picture, curves: list[Curve], title: str, noise: float = 0.0) -> None:
    """A panel of accuracy against weights remaining, as in Figure 2."""
    ax, remaining = p.panel("weights remaining (%)", "test accuracy", title), {}
    for c in curves:
        published = paper_curves(p.paper).get(c.key, Curve(*c.key))
        ours, behind = ({x.remaining[k]: y for k, y in x.points.items()} for x in (c, published))
        remaining |= published.remaining | c.remaining
        draw(ax, ours, look(c, curves), c.legend, behind)
    if dense := references(p.curves, p.paper, noise)[0]:
        ax.axhline(dense.mean, label="dense", **DOTTED)
    chosen = [remaining[k] for k in sorted(remaining)[:: max(1, -(-len(remaining) // 8))]]
    ax.set_xscale("log")
    ax.set_xticks(chosen, [f"{100 * v:.3g}" for v in chosen])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.invert_xaxis()


# ---- the figures: each draws the panels of one picture, of one model -----------------------------


def usual(curves: Iterable[Curve], noise: bool = False) -> list[Curve]:
    """Random subsets, and easy and hard ones by EL2N, unbalanced; with or without label noise."""
    return [c for c in pick(curves, metric="el2n", control="") if bool(c.noise) == noise]


def main_setting(curves: list[Curve]) -> tuple[int, int]:
    """Size and rewind step of Figure 2: a preset's if it is there, else the most frequent."""
    found = Counter((c.size, c.rewind) for c in curves if c.subset != "all")
    preset = [(p.size, p.rewind) for p in common.PRESETS.values() if (p.size, p.rewind) in found]
    return (preset or [x for x, _ in found.most_common(1)] or [(0, 0)])[0]


def by_size(p: Picture, noisy: bool = False, every_size: bool = False) -> None:
    """Figures 2, 4, 11, 13: a panel for each size, rewind step and noise; in Figure 2 the controls,
    and runs from other initialisations, too."""
    curves = [c for c in p.curves if c.points]
    mine, full = usual(curves, noisy), all_data(curves)
    settings = sorted({(c.noise, c.rewind, c.size) for c in mine if c.subset != "all"})
    if not every_size:
        size, t = main_setting(mine)
        settings = [x for x in settings if x[1:] == (t, size)]
    if not settings and not noisy and full:
        settings = [(0.0, full[-1].rewind, 0)]
    for noise, t, size in settings:
        shown = pick(full, rewind=0) + pick(mine, subset="all", noise=noise) if noise else full[:]
        if size:
            ranked = mine + pick(curves, metric="el2n balanced", control="")
            shown += pick(ranked, noise=noise, rewind=t, size=size)
        if not (noisy or every_size):
            tickets = {c.key for c in shown}
            shown += [c for c in curves if c.control and (*c.key[:-1], "") in tickets]
            shown += [c for c in curves if c.runs[0].settings.get("init")]
        title = f"{size} examples, {t} steps" if size else "all data"
        draw_levels(p, shown, title + f", {noise:.0%} noise" * bool(noise), noise)


def at_level(curves: list[Curve], level: int) -> dict[int, Stat]:
    """Their accuracies at a level by size."""
    have = sorted((c for c in curves if level in c.points), key=lambda c: c.size)
    return {c.size: c.points[level] for c in have}


def fig3(p: Picture) -> None:
    """Accuracy against subset size at three levels, a row for each rewind step."""
    ours = pick(p.curves, metric={"el2n", "el2n balanced"}, control="", noise=0)
    behind = [dataclasses.replace(c, metric=key[4]) for key, c in paper_curves(p.paper).items()]
    ranked = [c for c in usual(ours) if c.subset != "all" and c.points]
    steps = sorted({c.rewind for c in ranked})
    steps = [t for t in steps if len({c.size for c in pick(ranked, rewind=t)}) > 1]
    last = max((max(c.points) for c in pick(ranked, rewind={*steps})), default=0)
    levels = (8, 10, 12) if last >= 12 else sorted({last, -(-2 * last // 3), -(-last // 3)})
    for t, k in itertools.product(steps, levels):
        left = next((c.remaining[k] for c in ranked if k in c.points), math.nan)
        title = f"level {k}, {left:.1%} of weights remaining"
        ax, sizes = p.panel(f"examples trained on for {t} steps", "test accuracy", title), set()
        for subset, metric in [(x, "el2n") for x in SUBSETS[1:]] + [("easy", "el2n balanced")]:
            kind = Curve(subset, 0, t, 0, metric)
            same = {"subset": subset, "metric": metric, "rewind": t, "noise": 0}
            mine, published = at_level(pick(ours, **same), k), at_level(pick(behind, **same), k)
            draw(ax, mine, look(kind), f"{kind.what} (n={counts(mine.values())})", published)
            sizes |= {*mine, *published}
        full = [c for c in all_data(ours) if k in c.points]
        for c in full:
            style = {**look(c, full), "marker": None}
            ax.axhline(c.points[k].mean, lw=0.9, label=c.legend, **style)
        ticks(ax, sorted(sizes))


def correlation(x: Iterable[float], y: Iterable[float]) -> str:
    x, y = list(x), list(y)
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return f"n={len(x)}"
    from scipy import stats

    rank, plain = stats.spearmanr(x, y).statistic, stats.pearsonr(x, y).statistic
    return f"Pearson {plain:.2f}, Spearman {rank:.2f}, n={len(x)}"


def barriers(p: Picture) -> list[dict]:
    """A row for each replicate of lmc: its barriers, and the accuracy that imp runs of its model
    reached from the same w_tr at the level of Figure 5, or at the last that each of them has."""
    model, wanted = p.curves[0].runs[0].place[1], FINAL_LEVEL.get(p.paper, 7)
    imps = [x for x in p.results.runs if x.place[:2] == ("imp", model) and "pretrain" in x.result]
    imps = [x for x in imps if x.result["levels"] and not x.settings.get("control")]
    reached = [len(x.result["levels"]) - 1 for x in imps]
    level = wanted if not reached or max(reached) >= wanted else min(reached)
    final = {
        (x.result["pretrain"]["fingerprint"], x.settings["steps"]): x.result["levels"][level]
        for x in imps
        if len(x.result["levels"]) > level
    }
    rows = []
    for c, run in ((curve, run) for curve in p.curves for run in curve.runs if run.done):
        start = run.result["pretrain"]
        end = final.get((start["fingerprint"], run.settings["steps"]), {})
        row = {"configuration": c.label, "replicate": run.settings["replicate"]}
        row |= {k: run.result[k] for k in ("loss_barrier", "error_barrier", "connected")}
        row |= {"pretrain_accuracy": start["test_accuracy"], "level": level}
        rows.append(row | {"final_accuracy": end.get("test_accuracy")})
    return rows


def draw_barriers(p: Picture, subset: str, size: int, t: int) -> None:
    """A histogram of Figure 5: pairs, examples and replicates pooled; the paper's scaled to our
    count."""
    what, edges = "all data" if subset == "all" else f"{subset} {size}", np.arange(-5, 10.5, 0.5)
    ax = p.panel("loss barrier of an example", "count", f"{what}, {t} steps")
    for c in pick(usual(p.curves), subset=subset, size=size, rewind=t):
        pooled = np.concatenate([[], *map(np.ravel, load_all(c, "loss_barrier_pairs.npy"))])
        outside = np.mean((pooled < edges[0]) | (pooled > edges[-1])) if len(pooled) else 0
        label = f"n={len(c.runs)}, {outside:.1%} outside"
        ax.hist(pooled, edges, color=look(c)["color"], alpha=0.55, label=label)
        rows = [x for x in paper_rows("lmc_histograms.csv") if x["dataset"] == p.paper]
        rows = [x for x in rows if x["pretraining"] == f"{what}, {t} it"]
        if rows:
            published = np.array([int(x["count_of_1080000"]) for x in rows])
            scaled = published / published.sum() * len(pooled)
            ax.stairs(scaled, edges, color="k", lw=0.7, label=SOURCE)
        ax.legend(loc="upper right", handlelength=2)


def draw_forecast(p: Picture, rows: list[dict], key: str, column: str, xlabel: str) -> None:
    """Figure 5 right: final accuracy against a forecast of it, a point for each replicate."""
    level = rows[0]["level"] if rows else FINAL_LEVEL.get(p.paper, 7)
    found = correlation((x[key] for x in rows), (x["final_accuracy"] for x in rows))
    ax = p.panel(xlabel, f"test accuracy at level {level}", found)
    for x in paper_rows("lmc_scatter.csv"):
        y = x["final_test_accuracy_level7"]
        if x["dataset"] == p.paper and x[column] and y[0] != "<":
            color, _, marker = LOOK[x["subset_method"]]
            kind = {"s": 9, "facecolors": "none", "edgecolors": color, "marker": marker}
            ax.scatter(float(x[column]), float(y), lw=0.5, alpha=0.6, zorder=1, **kind)
    for c in p.curves:
        if mine := [x for x in rows if x["configuration"] == c.label]:
            x, y = ([row[k] for row in mine] for k in (key, "final_accuracy"))
            style = {k: v for k, v in look(c, p.curves).items() if k != "linestyle"}
            ax.scatter(x, y, s=22, label=c.label, **style)


def fig5(p: Picture) -> None:
    """Four histograms of barriers, and final accuracy against two forecasts of it."""
    rows = barriers(p)
    if not rows:
        return
    rows = [x for x in rows if x["final_accuracy"] is not None]
    size, t = HISTOGRAMS.get(p.paper, (0, 0))
    if not pick(usual(p.curves), subset={"random", "easy"}, size=size, rewind=t):
        size, t = main_setting(usual(p.curves))
    draw_barriers(p, "all", 0, t)
    draw_barriers(p, "all", 0, 2 * t)
    at_start = "test accuracy at w_tr"
    draw_forecast(p, rows, "pretrain_accuracy", "pretrain_test_accuracy", at_start)
    draw_barriers(p, "random", size, t)
    draw_barriers(p, "easy", size, t)
    draw_forecast(p, rows, "loss_barrier", "mean_train_loss_barrier", "mean loss barrier")


def trained(c: Curve) -> tuple[list[float], int]:
    """Accuracies of the runs of a warmup that learned, and how many did not."""
    results = [x.result for x in c.runs if x.done]
    good = [x["test_accuracy"] for x in results if x["outcome"] == "trained"]
    return good, len(results) - len(good)


def draw_sharpness(ax: Axes, c: Curve, style: dict, label: str) -> None:
    found = itertools.chain(*(x.result["sharpness"] for x in c.runs if x.done))
    found = [(x["step"], x["eigenvalue"]) for x in found if x["eigenvalue"] is not None]
    draw(ax, summaries(found), style, f"{label} (n={len(c.runs)})", {})


def fig6(p: Picture) -> None:
    """A column for each kind of subset, with a curve for each size, balance and offset: accuracies
    by length of warmup in the first row, sharpness at a typical length in the second."""
    curves = [c for c in p.curves if not c.noise and any(x.done for x in c.runs)]
    warmed = sorted((c for c in curves if c.rewind), key=lambda c: (c.size, c.metric, c.rewind))
    groups = [*grouped(((c.subset, c.size, c.metric), c) for c in warmed).values()]
    windows = {g[0].size for g in groups if " from " in g[0].metric}
    columns = {kind: [g for g in groups if g[0].subset == kind] for kind in SUBSETS[1:]}
    columns["windows"] = [g for g in columns["easy"] if g[0].size in windows]
    columns["windows"] = [g for g in columns["windows"] if "balanced" not in g[0].metric]
    columns["easy"] = [g for g in columns["easy"] if " from " not in g[0].metric]
    everything = [g for g in groups if g[0].subset == "all"]
    columns = {kind: shown for kind, shown in columns.items() if shown} or {"all": []}
    tops = [p.panel("steps of warmup", "test accuracy", kind) for kind in columns if groups]
    for top, shown in zip(tops, columns.values(), strict=False):
        bottom, lengths = p.panel("step", "top Hessian eigenvalue"), set()
        for g in shown + everything:
            style, c = look(g[0], [x[0] for x in shown]), (pick(g, rewind=1600) or g)[-1]
            published = paper_warmup(c) if p.paper == "cifar10" else {}
            points = {x.rewind: summary(trained(x)[0]) for x in g if trained(x)[0]}
            n, lost = max(len(x.runs) for x in g), sum(trained(x)[1] for x in g)
            about = f"{c.what} (n={n}" + f", {lost} not trained" * bool(lost) + ")"
            draw(top, points, style, about, published)
            draw_sharpness(bottom, c, style, f"{c.what}, warmup {c.rewind}")
            lengths |= {*points, *published}
        for c in pick(curves, rewind=0):
            draw_sharpness(bottom, c, {**look(c), "color": "0.6"}, "no warmup")
            if good := trained(c)[0]:
                top.axhline(np.mean(good), label="no warmup", **DOTTED)
        ticks(top, sorted(lengths))
        bottom.set_yscale("log")


def tracked(c: Curve, kind: str) -> dict[int, Stat]:
    """A column of the logs by step; of coherence the band is over all batches of all replicates."""
    values = []
    for run in c.runs:
        rows = [x for x in runs.read_rows(run.folder / "log.csv") if x.get(kind)]
        path = run.folder / f"{kind}.npy"
        each = load(path) if path.exists() else None
        if each is None or len(each) != len(rows):
            each = [[float(x[kind])] for x in rows]
        for x, batches in zip(rows, each, strict=True):
            values += [(int(x["step"]), float(v)) for v in batches]
    return summaries(values)


def fig7(p: Picture) -> None:
    """Learning curves and coherence; a panel for each set of easy examples that was watched, those
    of --easy-size and --easy-balance, else of the subset trained on, else of the preset."""
    curves, easy = pick(p.curves, rewind=max(c.rewind for c in p.curves)), defaultdict(list)
    for c in curves:
        s = c.runs[0].settings
        preset = common.PRESETS.get(s["dataset"])
        size = s.get("easy_size") or s.get("size") or (preset.size if preset else "")
        within = ", class by class" * bool(s.get("easy_balance") or s.get("balance"))
        easy[f"accuracy on the easiest {size}{within}"].append(c)
    kinds = [("test_accuracy", "test accuracy", curves)]
    kinds += [("train_accuracy", "accuracy on all training data", curves)]
    kinds += [("easy_accuracy", title, shown) for title, shown in easy.items()]
    kinds += [("coherence", "gradients of batches against their mean", curves)]
    for kind, title, shown in kinds:
        found = [(c, points) for c in shown if (points := tracked(c, kind))]
        ylabel = "cosine" if kind == "coherence" else "accuracy"
        ax = p.panel("step", ylabel, title) if found else None
        for c, points in found:
            draw(ax, points, look(c, curves), c.legend, {})


def fig8(p: Picture) -> None:
    """Norms of minibatch gradients, pooled over the first 200 steps."""
    curves = pick(p.curves, rewind=min(c.rewind for c in p.curves))
    found = [(c, [x[:200] for x in load_all(c, "gradient_norm.npy")]) for c in curves]
    found = [(c, norms) for c, norms in found if norms]
    if not found:
        return
    steps = min(200, curves[0].rewind)
    ax = p.panel(f"norm of a minibatch gradient, first {steps} steps", "share")
    edges = np.linspace(0, max(x.max() for _, norms in found for x in norms), 41)
    for c, norms in found:
        outline(ax, norms, edges, look(c, [c for c, _ in found]), c.legend)


def fig9(p: Picture) -> None:
    """One replicate, not averaged: all data at t and 2t, and the easy subset at t."""
    size, t = main_setting(usual(p.curves))
    shown = [("all", 0, t), ("all", 0, 2 * t), ("easy", size, t)]
    curves = [c for c in usual(p.curves) if c.points and c.key[:3] in shown]
    last = min(6, *(max(c.points) for c in curves)) if curves else 0
    edges = np.linspace(0, math.sqrt(2), 41)
    for level in (0, last) if curves else ():
        title = f"under the mask of level {level}" if level else "dense"
        ax = p.panel("||softmax - onehot|| of an example at w_tr", "share", title)
        for c in curves:
            run = min(c.runs, key=lambda x: x.settings["replicate"])
            state = load(run.folder / f"level{level:02d}.pt") or {}
            label = f"{c.label}, replicate {run.settings['replicate']}"
            if "projected_error" in state:
                outline(ax, [state["projected_error"].numpy()], edges, look(c, curves), label)


def rivals(p: Picture, metric: str) -> None:
    """Figures 10 and 12: other scores against EL2N; pruning after pre-training by them, by EL2N
    with and without balance, and on random subsets."""
    model, data = p.curves[0].runs[0].place[1], p.curves[0].runs[0].settings["data"]
    clean = [m for m in p.results.metrics.values() if (m["model"], m["data"]) == (model, data)]
    clean = [m for m in clean if not m["label_noise"][0]]
    el2n = [m for m in clean if m["metric"] == "el2n"]
    other = [m for m in clean if m["metric"].startswith(metric)]
    other = [m for m in other if m["metric"] != "lmc" or m["folder"].name.startswith("all")]
    other.sort(key=lambda m: m.get("rewind", 0))
    for a, b in itertools.product(other, el2n):
        y, x = (load(m["folder"] / "scores.npy") for m in (a, b))
        if x is not None and y is not None:
            xlabel = f"EL2N score at step {b['score_step']}; darker: more"
            ax = p.panel(xlabel, f"{a['name']} score", correlation(x, y))
            ax.hexbin(x, y, gridsize=40, bins="log", cmap="viridis_r", mincnt=1, lw=0.1)
    curves = [c for c in p.curves if c.points and not c.control and not c.noise]
    by = [c for c in curves if c.metric.split()[0] == metric]
    rival = sorted({c.metric for c in by}, key=lambda x: (len(x), x))  # lmc 800, lmc 1600
    order = [("random", "el2n")] + [("easy", x) for x in ("el2n", "el2n balanced", *rival)]
    for size, t in sorted({(c.size, c.rewind) for c in by}):
        ranked = pick(curves, size=size, rewind=t)
        shown = [c for subset, x in order for c in pick(ranked, subset=subset, metric=x)]
        draw_levels(p, all_data(curves) + shown, f"{size} examples, {t} steps")


def examples(r: Results) -> Iterator[tuple[str, Figure]]:
    """The easiest and the hardest training images of each class by EL2N, beside the distribution
    of scores in it."""
    each = 8  # images at either end
    for m in [m for m in r.metrics.values() if m["metric"] == "el2n" and not m["label_noise"][0]]:
        scores, name = load(m["folder"] / "scores.npy"), m["dataset"]
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
        of_class = [np.flatnonzero(labels == k) for k in np.unique(labels)]
        of_class.sort(key=lambda i: np.median(scores[i]))
        ranked = [i[np.argsort(scores[i], kind="stable")] for i in of_class]
        rows, (height, width, channels) = len(ranked), images.shape[1:]
        size = (7, 1 + 0.22 * rows)
        figure, axes = plt.subplots(1, 3, sharey=True, figsize=size, layout="constrained")
        ends = (("easiest", slice(each)), ("hardest", slice(-each, None)))
        for ax, (title, chosen) in zip(axes, ends, strict=False):
            tiles = np.full((rows, height + 1, each, width + 1, channels), images.max())
            for row, i in enumerate(ranked):
                tiles[row, :-1, : len(i[chosen]), :-1] = images[i[chosen]].swapaxes(0, 1)
            tiles = tiles.reshape(rows * (height + 1), each * (width + 1), channels).squeeze()
            ax.imshow(tiles, cmap="gray", extent=(0, each, rows + 0.5, 0.5), aspect="auto")
            ax.set(title=title, xticks=[])
            ax.grid(visible=False)
        values = [scores[i] for i in ranked]
        axes[2].boxplot(values, orientation="horizontal", sym="", whis=(5, 95), widths=0.6)
        axes[2].set(xlabel=f"EL2N score at step {m['score_step']}", title="5, 25, 50, 75, 95 %")
        axes[0].set_yticks(range(1, rows + 1), [data.classes[labels[i[0]]] for i in ranked])
        yield f"{m['model']}-{m['folder'].name}", figure


ALL, NOISY = (*PUBLISHED, "digits"), ("cifar10", "digits")


class Kind(NamedTuple):
    stage: str  # that makes its runs
    draw: Callable
    grid: tuple[str, ...] = ALL  # the data sets whose grid in run_all.sh has it
    columns: int = 3
    shared: bool = False  # one legend for all panels


partial = functools.partial
FIGURES = {
    "fig2": Kind("imp", by_size),
    "fig3": Kind("imp", fig3, shared=True),
    "fig4": Kind("imp", partial(by_size, noisy=True), NOISY),
    "fig5": Kind("lmc", fig5, shared=True),
    "fig6": Kind("warmup", fig6, ("cifar10", "digits"), columns=4),
    "fig7": Kind("pretrain", fig7, ("cifar100", "digits"), columns=2, shared=True),
    "fig8": Kind("pretrain", fig8, ("cifar10", "digits")),
    "fig9": Kind("imp", fig9, shared=True),
    "fig10": Kind("imp", partial(rivals, metric="lmc"), ("cifar100", "cinic10", "digits")),
    "fig11": Kind("imp", partial(by_size, every_size=True)),
    "fig12": Kind("imp", partial(rivals, metric="forgetting"), ("cifar10", "digits")),
    "fig13": Kind("imp", partial(by_size, noisy=True, every_size=True), NOISY),
    "examples": Kind("el2n", examples),
}


def drawn(r: Results, figure: str) -> Iterator[tuple[str, Figure]]:
    """(name, picture) of each model that has the runs of a figure."""
    stage, draw_panels, _, columns, shared = FIGURES[figure]
    if figure == "examples":
        yield from examples(r)
    for p in r.pictures(stage):
        draw_panels(p)
        if p.figure.axes:
            arrange(p.figure, columns, shared)
            yield p.name, p.figure


# ---- tables --------------------------------------------------------------------------------------


def against(ours: Stat, published: Stat | None) -> dict:
    """The columns that tables share: ours, the paper's, and how they differ."""
    p = published or Stat(math.nan, math.nan, 0)
    row = {"ours": ours.mean, "sd": ours.sd, "n": ours.n, "paper": p.mean, "paper_sd": p.sd}
    row |= {"paper_n": p.n or None, "difference": ours.mean - p.mean}
    row["standard_error"] = standard_error(ours, p) if published else math.nan
    return row | {"welch_p": welch(ours, p)}


def compared(curves: list[Curve]) -> Iterator[tuple[Curve, Curve]]:
    """Each curve with those of all data; tickets with their controls."""
    for a, b in itertools.product(curves, curves):
        later = a.subset != "all" or a.rewind > b.rewind
        control = b.control and not a.control and a.key[:-1] == b.key[:-1]
        full = (b.subset, b.metric, b.control) == ("all", "el2n", "") and b.noise <= a.noise
        if control or (full and later):
            yield a, b


def tables(r: Results, levels: Iterable[int], slack: float) -> Iterator[tuple[str, list[dict]]]:
    for p in r.pictures("imp"):
        curves, published = [c for c in p.curves if c.points], paper_curves(p.paper)
        rows = [
            {"configuration": c.legend, "level": k, "weights_remaining": c.remaining[k]}
            | against(x, published[c.key].points.get(k) if c.key in published else None)
            for c in curves
            for k, x in c.points.items()
        ]
        yield f"imp-{p.name}", rows
        rows = [compare(a, b, curves, p.paper, levels, slack) for a, b in compared(curves)]
        yield f"verdicts-{p.name}", rows
    for p in r.pictures("lmc"):
        yield f"lmc-{p.name}", barriers(p)
    for p in r.pictures("warmup"):
        rows = []
        for c in p.curves:
            good, lost = trained(c)
            row = {"configuration": c.label, "warmup": c.rewind, "not_trained": lost}
            published = paper_warmup(c).get(c.rewind) if p.paper == "cifar10" else None
            rows += [row | against(summary(good), published)] if good else []
        yield f"warmup-{p.name}", rows


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


def missing(r: Results, shown: dict[str, list[str]], datasets: list[str], others: bool) -> list:
    """What was not drawn, as (what, command that makes it): of data sets with a grid."""
    lines = []
    for figure, names in shown.items():
        for data in FIGURES[figure].grid:
            if data in datasets and not any(name.startswith(f"{data}-") for name in names):
                command = ["bash", "run_all.sh", "--only", figure, "--dataset", data]
                if figure == "examples":
                    command = ["python", "el2n.py", "--dataset", data]
                stage = FIGURES[figure].stage
                lines.append((f"{figure} of {data}, which needs runs of {stage}.py", command))
    made = usual(c for p in r.pictures("imp") for c in p.curves)
    for data in datasets if {"fig2", "fig3", "fig11"} & set(shown) else ():
        have = {c.key[:3] for c in made if c.runs[0].settings["dataset"] == data}
        wanted = [c.key[:3] for c in usual(paper_curves(data).values())]
        if data == "digits":  # not in the paper: its Figure 2
            p = common.PRESETS[data]
            wanted = [("all", 0, t) for t in (0, p.rewind, 2 * p.rewind)]
            wanted += [(subset, p.size, p.rewind) for subset in SUBSETS[1:]]
        lacking = [x for x in wanted if x not in have]
        for subset, size, t in lacking[:1]:
            command = ["python", "imp.py", "--dataset", data, "--subset", subset]
            command += ["--size", str(size)] * bool(size) + ["--rewind", str(t)]
            more = f"{len(lacking)} curves of {data}, the first"
            lines.append((more, [*command, "--replicate", "0-3"]))
    for data in sorted(set(PUBLISHED) - set(datasets)) if others else ():
        lines.append((data, ["bash", "run_all.sh", "--dataset", data]))
    return lines


# ---- plans and costs -----------------------------------------------------------------------------


class Job(NamedTuple):
    """A command of a stage."""

    folders: tuple[str, ...]  # below --out: imp/cifar10-resnet20/easy3200-rewind200/rep0-3
    runs: int
    steps: int  # network-steps
    done: bool  # all runs
    images: int  # over all network-steps
    depth: int


def folded(places: Iterable[Path]) -> tuple[str, ...]:
    """Run folders, the replicates of one configuration in one: rep0, rep1, rep2 -> rep0-2."""
    parts = ((re.fullmatch(r"(.+)/rep(\d+)", str(place)), place) for place in places)
    replicates = grouped((x[1], int(x[2])) if x else (str(place), None) for x, place in parts)
    return tuple(
        folder if None in numbers else f"{folder}/rep{ranges(numbers).replace(' ', '')}"
        for folder, numbers in replicates.items()
    )


def read_jobs(lines: Iterable[str]) -> Iterator[Job]:
    """Of shell command lines of the stages; those of figures.py and empty ones are left out."""
    parser_of = functools.cache(lambda stage: importlib.import_module(stage).flags())
    for line in filter(str.strip, lines):
        try:
            words = shlex.split(line)
            at = next(k for k, word in enumerate(words) if word.endswith(".py"))
            stage = Path(words[at]).stem
            if stage == "figures":
                continue
            if stage not in (*STAGES, "el2n"):
                raise runs.UserError(f"{stage}.py is no stage")
            args = parser_of(stage).parse_args(words[at + 1 :])
            found = importlib.import_module(stage).plan(args)
        except (ValueError, StopIteration, runs.UserError) as e:
            reason = f"{line.strip()} ({runs.one_line(e)})"
            raise runs.UserError(f"not a command of a stage: {reason}") from e
        folders = folded(place.relative_to(args.out) for place, *_ in found)
        steps, done = sum(steps for _, steps, _ in found), all(done for *_, done in found)
        yield Job(folders, len(found), steps, done, steps * args.batch_size, args.depth)


def rates(found: list[Run], images: bool = False) -> dict[str, float]:
    """Network-steps per second of each model, or images, the median over the levels of imp.
    Replicates of one folder with the same seconds trained side by side."""
    runs_of_imp = [run for run in found if run.place[0] == "imp"]
    levels = [(run, x) for run in runs_of_imp for x in run.result["levels"]]
    beside = Counter((run.place, x["level"], x["seconds"]) for run, x in levels)
    by_model = defaultdict(list)
    for run, x in levels:
        rate = x["steps_per_second"] * beside[run.place, x["level"], x["seconds"]]
        by_model[run.place[1]].append(rate * (run.settings["batch_size"] if images else 1))
    return {model: float(np.median(rate)) for model, rate in by_model.items()}


def cost(jobs: Iterable[Job], measured: dict[str, float], rate: float | None) -> str:
    """A table of jobs, runs, network-steps and hours by stage and model: by the images per second
    that were measured of the model, else by `rate`, the steps of ResNet-20 on 128 images."""
    rows: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for job in jobs:
        stage, model = Path(job.folders[0]).parts[:2]
        speed = measured.get(model, math.nan)
        if math.isnan(speed) and rate and not model.startswith("digits"):  # of smaller images
            speed = 128 * rate * 18 / (job.depth - 2)
        hours = job.images / speed / 3600
        rows[f"{stage}/{model}"] += (1, job.runs, job.steps, hours)
    rows["all"] = sum(rows.values(), np.zeros(4))
    form = "{:<30} {:>6} {:>6} {:>16} {:>10}".format
    lines = [form("stage/model", "jobs", "runs", "network-steps", "hours")]
    for name, (*numbers, hours) in rows.items():
        lines.append(form(name, *map(int, numbers), "-" if math.isnan(hours) else f"{hours:.1f}"))
    if math.isnan(hours):
        lines.append("hours: no measured rate for some of these; run one, or give --rate")
    return "\n".join(lines)


# ---- command line --------------------------------------------------------------------------------


def flags() -> runs.Parser:
    parser = runs.Parser(description=__doc__)
    add = parser.add_argument
    add("figure", nargs="*", help=f"of {', '.join(FIGURES)} [all but examples]")
    add("--out", type=Path, default=Path("results"), help="where results are")
    add("--figures", type=Path, help="where pictures go [OUT/figures]")
    add("--data-dir", type=Path, default=Path("data"), help="examples: of data")
    add("--dataset", action="append", help="only of this data set, or folder of images")
    add("--paper", choices=PUBLISHED, help="whose curves to draw behind, of runs on other data")
    add("--compare", nargs=2, metavar=("A", "B"), help="verdict of one imp folder over another")
    add("--levels", type=runs.numbers, default=(), help="of verdicts, such as 3-12 [all but 0]")
    about = "standard errors by which a curve may be lower without being below [1]"
    add("--slack", type=runs.number(float, 0), default=1.0, help=about)
    add("--rates", action="store_true", help="print measured network-steps per second by model")
    about = "for each command on stdin: done or todo, network-steps, runs, folders below --out"
    add("--plan", action="store_true", help=about)
    about = "jobs, runs, network-steps and hours of the commands on stdin"
    add("--cost", action="store_true", help=about)
    about = "--cost: network-steps per second of ResNet-20 on 128 images, where none are measured"
    add("--rate", type=runs.number(float, 0, open_low=True), help=about)
    return parser


def compare_two(r: Results, names: list[str], levels: Iterable[int], slack: float) -> dict:
    """--compare: folders by name, or by the end of their path where several models have it."""
    found = []
    for name in names:
        end = f"/{name.strip('/')}"
        here = {c.runs[0].folder.parent: (c, p) for p in r.pictures("imp") for c in p.curves}
        here = {folder: x for folder, x in here.items() if folder.as_posix().endswith(end)}
        if len(here) != 1:
            which = ", ".join(map(str, here)) or "no such run"
            raise runs.UserError(f"--compare {name}: {which}; name one below results/imp/")
        found += here.values()
    (a, p), (b, _) = found
    return compare(a, b, p.curves, p.paper, levels, slack)


def save(figure: Figure, path: Path) -> None:
    """PNG and SVG."""
    for kind, about in (("png", {}), ("svg", {"Date": None})):
        keep = functools.partial(figure.savefig, format=kind, dpi=160, metadata=about)
        runs.write(path.parent / f"{path.name}.{kind}", keep)
    plt.close(figure)


def main(args: argparse.Namespace) -> Any:
    """Draws, writes, says what is missing; returns the paths written and what is missing."""
    if unknown := [f for f in args.figure if f not in FIGURES]:
        raise runs.UserError(f"{unknown[0]}: not one of {', '.join(FIGURES)}")
    if args.plan:
        for job in read_jobs(sys.stdin):
            state = "done" if job.done else "todo"
            print(state, job.steps, job.runs, *job.folders, sep="\t")
        return None
    only = {Path(d).name for d in args.dataset or ()}
    found = [x for x in read_runs(args.out) if not only or x.settings["dataset"] in only]
    if args.cost:
        return print(cost(read_jobs(sys.stdin), rates(found, images=True), args.rate))
    if args.rates:
        print("\n".join(f"{model} {rate:.1f}" for model, rate in rates(found).items()))
        return rates(found)
    metrics = read_metrics(args.out).items()
    metrics = {k: m for k, m in metrics if not only or m["dataset"] in only}
    r = Results(found, metrics, args.paper, args.data_dir, tuple(args.dataset or ()))
    if args.compare:
        row = compare_two(r, args.compare, args.levels, args.slack)
        print("\n".join(f"{k:24} {cell(v)}" for k, v in row.items()))
        return row
    folder = args.figures or args.out / "figures"
    written, shown = [], {}
    for figure in args.figure or [x for x in FIGURES if x != "examples"]:
        shown[figure] = []
        for name, picture in drawn(r, figure):
            picture.suptitle(f"{figure}  {name}", fontsize=8, x=0.01, ha="left")
            save(picture, folder / f"{figure}-{name}")
            written.append(folder / f"{figure}-{name}.png")
            shown[figure].append(name)
    for name, rows in () if args.figure else tables(r, args.levels, args.slack):
        if rows:
            write_table(folder / name, rows)
            written.append(folder / f"{name}.md")
    datasets = sorted(only) or sorted({run.settings["dataset"] for run in found})
    out = [] if args.out == Path("results") else ["--out", str(args.out)]
    lacking = missing(r, shown, datasets, not args.dataset)
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
