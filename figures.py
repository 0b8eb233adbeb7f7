"""Every figure and table of the paper from the runs in results/, the paper's own curves behind.

    python figures.py                           all that can be drawn
    python figures.py fig2 --dataset cifar10    one figure
    python figures.py --missing                 also the commands that make what is missing
    python figures.py --compare easy3200-rewind200 all-rewind400 --levels 1-12
    python figures.py --compare 'hard*' 'random*' --out results --out elsewhere

    fig2, fig4    accuracy against weights remaining, by subset, beside controls; under label noise
    fig3          accuracy against subset size at three levels
    fig5          loss barriers: histograms; final accuracy against barrier and pre-train accuracy
    fig6          warmup on subsets, and the sharpness (top Hessian eigenvalue)
    fig7, fig8    learning curves, coherence of gradients; norms of minibatch gradients
    fig9          error of each example at w_tr before and after projection onto a mask
    fig10, fig12  LMC scores and forgetting scores against EL2N, and pruning by them
    fig11, fig13  fig2 and fig4 at every size
    prelr         learning rates of pre-training, at the same step
    examples      easiest and hardest images of each class (not drawn unless named)

Writes OUT/figures/: each picture as PNG, SVG and PDF with its caption in a .txt, each table as CSV,
Markdown and LaTeX. Lines are means over replicates, bands sample standard deviations; thin lines
without a band are the paper's (paper/README.md). A run in progress counts with the levels it has,
and is marked *. docs/figures.md has the map to the paper; tables.py defines the verdicts.

    table = figures.frame("results")         a pandas table: a row for each level of each run
    pictures = figures.draw("fig2", table)   {name: matplotlib Figure}
"""

import argparse
import functools
import io
import itertools
import math
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # a notebook's may not be installed here, and none is needed
    os.environ.pop("MPLBACKEND", None)

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy import stats

import options
import records
import runs
import tables
from records import PUBLISHED, SOURCE, SUBSETS, Curve, Page, all_data, frame, pick, usual

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
    "own": ("#006d5b", (0, (7, 2)), "*"),  # --init, --mask, --indices, --name
}
HISTOGRAMS = {  # Figure 5: random examples, easy examples, steps
    "cifar10": (3200, 3200, 200),
    "cifar100": (3200, 2048, 400),
    "cinic10": (25600, 25600, 200),
}
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.grid": True, "grid.alpha": 0.25}
STYLE |= {"legend.fontsize": 7, "legend.frameon": False, "legend.handlelength": 4}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.2}
STYLE |= {"svg.hashsalt": "tickets", "svg.fonttype": "none", "pdf.fonttype": 42}
DOTTED = {"color": "0.5", "lw": 0.8, "ls": (0, (1, 2)), "zorder": 0}  # to compare with

# ---- drawing -------------------------------------------------------------------------------------


class Picture(Figure):
    """A matplotlib figure of a page, without pyplot; notebooks show it."""

    def __init__(self, page: Page | None = None, **more: Any):
        super().__init__(layout="constrained", **more)
        FigureCanvasAgg(self)
        self.page = page
        self.paper, self.curves = (page.paper, page.curves) if page else ("", [])
        self.panels: list[Axes] = []
        self.entries: dict[str, list] = {}  # label -> [handle, numbers of replicates, running]

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()

    def panel(self, xlabel: str, ylabel: str, title: str = "", **more: Any) -> Axes:
        self.panels.append(self.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title, **more))
        return self.panels[-1]

    def note(self, label: str, handle: Any, n: Iterable[int] = (), running: bool = False) -> None:
        """An entry of the legend; one, of panels that have the same label."""
        entry = self.entries.setdefault(label, [handle, set(), False])
        entry[1] |= {int(k) for k in n}
        entry[2] |= running

    def labels(self) -> dict[str, str]:
        """The text of each entry, the paper's last."""
        texts = {}
        for label in sorted(self.entries, key=lambda k: k.startswith(SOURCE)):
            _, n, running = self.entries[label]
            texts[label] = label + f" (n={records.span(n)})" * bool(n) + "*" * running
        return texts


def arrange(picture: Picture, most: int) -> None:
    """Panels in rows of at most `most`, the last row as wide as the others, one legend below."""
    n = len(picture.panels)
    columns = n if n <= most else min(range(most, 1, -1), key=lambda c: (-n % c, -c))
    rows, last = -(-n // columns), n % columns or columns
    parts = math.lcm(columns, last)
    grid = picture.add_gridspec(rows, parts)
    for k, ax in enumerate(picture.panels):
        row, column = divmod(k, columns)
        wide = parts // (last if row == rows - 1 else columns)
        ax.set_subplotspec(grid[row, column * wide : (column + 1) * wide])
    width, height = max(3.4 * columns, 4.2), 2.7 * rows
    if labels := picture.labels():
        across = int(width / (0.75 + 0.062 * max(map(len, labels.values()))))
        across = min(len(labels), max(1, across))
        entries = [picture.entries[k][0] for k in labels], [*labels.values()]
        picture.legend(*entries, loc="outside lower center", ncols=across)
        height += 0.2 + 0.15 * -(-len(labels) // across)
    picture.set_size_inches(width, height)
    picture.get_layout_engine().set(w_pad=0.08, h_pad=0.08)


def look(c: Curve, among: Iterable[Curve] = ()) -> dict[str, Any]:
    """Colour, line and marker; of curves of one kind the earlier are lighter."""

    def kind_of(c: Curve) -> str:
        by = c.metric.split()[0] if c.metric else "el2n"
        by = by if by != "el2n" else "balanced" if c.balance else c.subset
        return c.control or ("own" if c.extra or by not in LOOK else by)

    color, line, marker = LOOK.get(kind_of(c), LOOK["own"])
    alike = [x for x in among if kind_of(x) == kind_of(c)]
    if len(alike) > 1 and any(c is x for x in alike):
        k = next(k for k, x in enumerate(alike) if x is c)
        light = 0.65 * (1 - k / (len(alike) - 1))
        color = tuple(x + (1 - x) * light for x in matplotlib.colors.to_rgb(color))
        if c.subset == "all":
            line, marker = ("--", ":", "-.", "-")[k % 4], ("s", "D", "h", "*")[k % 4]
    return {"color": color, "linestyle": line, "marker": marker}


def draw_curve(
    p: Picture,
    ax: Axes,
    points: pd.DataFrame,
    style: dict,
    label: str,
    band: bool = True,
    running: bool = False,
    log: bool = False,
) -> None:
    """Mean and band of one curve; `log` for a logarithmic axis: the points are of logarithms."""
    if not len(points):
        return
    x, mean = points.index.to_numpy(), points["mean"].to_numpy()
    low, high = mean - points["sd"].to_numpy(), mean + points["sd"].to_numpy()
    if log:
        mean, low, high = np.exp(mean), np.exp(low), np.exp(high)
    marks = {"ms": 3.5, "markevery": max(1, len(x) // 20)}
    [line] = ax.plot(x, mean, label=label, zorder=3, **marks, **style)
    p.note(label, line, points["n"], running)
    if band and len(x) == 1:  # a band has no width
        ax.errorbar(x, mean, [mean - low, high - mean], color=style["color"], lw=0.8, capsize=2)
    elif band:
        ax.fill_between(x, low, high, color=style["color"], alpha=0.13, lw=0)


def draw_behind(p: Picture, ax: Axes, points: pd.DataFrame, style: dict, differs: str = "") -> None:
    """The paper's curve, thin; `differs` says in what it is of another experiment."""
    thin = {**style, "marker": None, "lw": 0.8, "alpha": 0.8, "zorder": 1}
    [line] = ax.plot(points.index, points["mean"], label=SOURCE, **thin)
    p.note(f"{SOURCE}, {differs}" if differs else SOURCE, line)


def percent(points: pd.DataFrame) -> pd.DataFrame:
    return points.assign(mean=100 * points["mean"], sd=100 * points["sd"])


def ticks(ax: Axes, values: Iterable[int]) -> None:
    """A log2 axis with these numbers on it."""
    values = sorted(values)
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, map(str, values), rotation=40, fontsize=6)
    ax.xaxis.set_minor_locator(NullLocator())


def draw_dense(p: Picture, ax: Axes, among: list[Curve]) -> None:
    """The accuracy of the dense network that curves are held against, those of the first."""
    dense = tables.references(among[0], p.curves, p.paper)[0] if among else None
    if dense is not None:
        p.note("dense", ax.axhline(100 * dense["mean"], label="dense", **DOTTED))


def draw_levels(
    p: Picture, shown: list[Curve], plain: list[Curve], title: str, label: str = "short"
) -> None:
    """A panel of accuracy against weights remaining, as in Figure 2; `plain` curves are there to
    compare with, and have no band."""
    ax, remaining = p.panel("weights remaining (%)", "test accuracy (%)", title), {}
    everything = [] if any(c.rate for c in shown) else all_data(p.curves)
    for c in [*plain, *shown]:
        style = look(c, everything if c in everything else [*plain, *shown])
        ours = percent(c.points).set_index("weights_remaining")
        draw_curve(p, ax, ours, style, getattr(c, label), c in shown, c.running)
        remaining |= dict(c.points["weights_remaining"].items())
        theirs = records.published(c, p.paper) if c in shown else None
        said = records.differs(c, theirs) if theirs else ""
        alike = [x for x in shown if x is not c and records.published(x, p.paper) is theirs]
        if theirs and not (said and alike):  # else it stands behind the one that is alike
            behind = percent(theirs.points).set_index("weights_remaining")
            draw_behind(p, ax, behind, style, said)
            remaining |= dict(theirs.points["weights_remaining"].items())
    draw_dense(p, ax, (shown + plain)[:1])
    chosen = [remaining[k] for k in sorted(remaining)[:: max(1, -(-len(remaining) // 8))]]
    ax.set_xscale("log")
    ax.set_xticks(chosen, [f"{100 * v:.3g}" for v in chosen])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.invert_xaxis()


# ---- the figures: each draws the panels of one picture, of one model -----------------------------


def by_size(p: Picture, noisy: bool = False, every_size: bool = False) -> None:
    """Figures 2, 4, 11, 13: all data, a panel for each size, step and noise, in Figure 2 also the
    controls and runs from starts of one's own."""
    curves = [c for c in p.curves if len(c.points)]
    mine, full = usual(curves, noisy, balanced=True), all_data(curves)
    settings = sorted({(c.noise, c.step, c.size) for c in mine if c.subset != "all"})
    if not every_size:
        size, t = records.main_setting(mine)
        settings = [x for x in settings if x[1:] == (t, size)]
    if full and not noisy and not every_size:
        draw_levels(p, full, [], "all data")
    for noise, t, size in settings:
        shown = [c for c in mine if (c.noise, c.step, c.size) == (noise, t, size)]
        steps = {0, t, 2 * t} if not every_size else {2 * t}
        plain = [c for c in full if c.step in ({0} if noise else steps)]
        plain += pick(mine, subset="all", noise=noise) if noise else []
        title = f"{size} examples, {t} steps" + f", {noise:.0%} label noise" * bool(noise)
        draw_levels(p, shown, plain, title)
    if noisy or every_size:
        return
    shown = [c for c in curves if c.control and not c.noise]
    tickets = [c for c in curves if any((c.what, c.step) == (x.what, x.step) for x in shown)]
    tickets = [c for c in tickets if not (c.control or c.noise or c.extra or c.rate)]
    own = [c for c in curves if c.extra and not c.noise]
    if shown:
        draw_levels(p, tickets + shown, [], "controls", "label")
    if own:
        draw_levels(p, own, full, "starts and variants of one's own", "label")


def fig3(p: Picture) -> None:
    """Accuracy against subset size at three levels, a row for each rewind step."""
    ours = [c for c in usual(p.curves, balanced=True) if len(c.points)]
    behind = usual(records.paper_curves(p.paper), balanced=True)
    ranked = [c for c in ours if c.size]
    steps = sorted({c.step for c in ranked})
    steps = [t for t in steps if len({c.size for c in pick(ranked, step=t)}) > 1]
    for t, k in itertools.product(steps, records.three_levels(pick(ranked, step={*steps}))):
        here = [c for c in pick(ranked, step=t) if k in c.points.index]
        left = next((c.points.loc[k, "weights_remaining"] for c in here), math.nan)
        title = f"level {k}, {left:.1%} of weights remaining"
        ax = p.panel(f"examples trained on for {t} steps", "test accuracy (%)", title)
        kinds, sizes = {c.kind: c for c in here}, {c.size for c in here}
        for kind, example in kinds.items():
            alike = sorted((c for c in here if c.kind == kind), key=lambda c: c.size)
            points = pd.DataFrame([c.points.loc[k] for c in alike], index=[c.size for c in alike])
            going = any(c.running for c in alike)
            draw_curve(p, ax, percent(points), look(example), example.short, True, going)
            same = [c for c in pick(behind, subset=example.subset, step=t) if k in c.points.index]
            said = records.differs(example, same[0]) if same else ""
            if same and not (said and any(x.subset == "easy" and x.balance for x in here)):
                same.sort(key=lambda c: c.size)
                theirs = pd.DataFrame([c.points.loc[k] for c in same], index=[c.size for c in same])
                draw_behind(p, ax, percent(theirs), look(example), said)
                sizes |= {*theirs.index}
        full = [c for c in all_data(ours) if k in c.points.index]
        for c in full:
            style = {**look(c, full), "marker": None}
            line = ax.axhline(100 * c.points.loc[k, "mean"], lw=0.9, **style)
            p.note(c.short, line, [c.points.loc[k, "n"]], c.running)
        draw_dense(p, ax, here[:1])
        ticks(ax, sizes)


def prelr(p: Picture) -> None:
    """Rates of pre-training, for each step at which there are several: the paper took the best."""
    full = [c for c in pick(p.curves, subset="all", noise=0.0, control="", extra="") if c.step]
    for t in sorted({c.step for c in full}):
        if len(shown := sorted(pick(full, step=t), key=lambda c: c.rate)) > 1:
            plain = pick(all_data(p.curves), step=0)
            rate = next((c.rows["pretrain_lr"].iloc[0] for c in shown if not c.rate), math.nan)
            title = f"all data, {t} steps" + f", at rate {rate:g} or as named" * bool(rate > 0)
            draw_levels(p, shown, plain, title)


def draw_histogram(p: Picture, curves: list[Curve], what: str, t: int, edges: np.ndarray) -> None:
    """A histogram of Figure 5: pairs, examples and replicates pooled."""
    arrays = {c: records.load_all(c.rows, "loss_barrier_pairs.npy") for c in curves}
    theirs = records.paper_table("lmc_histograms.csv").query("dataset == @p.paper")
    theirs = theirs[theirs["pretraining"] == f"{what}, {t} it"] if len(theirs) else theirs
    if not any(arrays.values()) and not len(theirs):
        return
    ax = p.panel("loss barrier of an example", "share (%)", f"{what}, {t} steps")
    for c, found in arrays.items():
        if found:
            values = np.concatenate([x.ravel() for x in found])
            share = 100 * np.histogram(values, edges)[0] / len(values)
            outside = f"{np.mean((values < edges[0]) | (values > edges[-1])):.1%} outside"
            bars = ax.stairs(share, edges, fill=True, color=look(c)["color"], alpha=0.55)
            said = {"xycoords": "axes fraction", "ha": "right", "fontsize": 7}
            ax.annotate(f"n={len(found)}, {outside}", (0.97, 0.93), **said)
            p.note(f"{c.subset}, all pairs and examples", bars)
    if len(theirs):
        bins, count = [*theirs["bin_lo"], theirs["bin_hi"].iloc[-1]], theirs["count_of_1080000"]
        p.note(SOURCE, ax.stairs(100 * count / count.sum(), bins, color="k", lw=0.7))


def draw_forecast(p: Picture, rows: pd.DataFrame, key: str, column: str, xlabel: str) -> None:
    """Figure 5 right: final accuracy against a forecast of it, a point for each replicate."""
    every, later = (tables.correlate(x, key) for x in (rows, rows[rows["rewind"] > 0]))
    said = [f"r = {x['pearson']:.2f}" for x in (every, later) if x["pearson"] is not None]
    if len(said) > 1:
        said = said[:1] if later["n"] == every["n"] else [said[0], f"{said[1]} without step 0"]
    level = int(rows["level"].iloc[0]) if len(rows) else tables.FINAL_LEVEL.get(p.paper, 7)
    ylabel = f"test accuracy at level {level} (%)"
    ax, scale = p.panel(xlabel, ylabel, "; ".join(said)), 100 if "accuracy" in key else 1
    theirs = records.paper_table("lmc_scatter.csv").query("dataset == @p.paper")
    for method, group in theirs.groupby("subset_method") if len(theirs) else ():
        y = pd.to_numeric(group["final_test_accuracy_level7"], errors="coerce")
        color, _, marker = LOOK[method]
        style = {"s": 9, "facecolors": "none", "edgecolors": color, "marker": marker}
        dots = ax.scatter(scale * group[column], 100 * y, lw=0.5, alpha=0.6, zorder=1, **style)
        p.note(SOURCE, dots)
    for c in p.curves:
        mine = rows[rows["configuration"] == c.label]
        if len(mine):
            style = {k: v for k, v in look(c, p.curves).items() if k != "linestyle"}
            dots = ax.scatter(scale * mine[key], 100 * mine["final_accuracy"], s=22, **style)
            p.note(c.label, dots, [len(mine)])


def fig5(p: Picture) -> None:
    """Four histograms of tables.barriers, and final accuracy against two forecasts of it."""
    rows, mine = tables.barriers(p.page), usual(p.curves)
    if not len(rows):
        return
    rows = rows.dropna(subset=["final_accuracy"])
    random, easy, t = HISTOGRAMS.get(p.paper, (0, 0, 0))
    if not pick(mine, subset={"random", "easy"}, size={random, easy}, step=t):
        random, t = records.main_setting(mine)
        easy = random
    four = [("all", 0, t), ("all", 0, 2 * t), ("random", random, t), ("easy", easy, t)]
    found = [pick(mine, subset=s, size=n, step=step) for s, n, step in four]
    name = "loss_barrier_pairs.npy"
    pooled = [np.ravel(x) for cs in found for c in cs for x in records.load_all(c.rows, name)]
    edges = np.arange(-5, 10.5, 0.5)  # the paper's
    if pooled and p.paper not in {*records.paper_table("lmc_histograms.csv")["dataset"]}:
        low, high = np.quantile(np.concatenate(pooled), (0.005, 0.995))
        edges = np.linspace(low, high, 31) if low < high else edges
    for k, (s, n, step) in enumerate(four):
        if k == 2:
            at_start = "test accuracy at w_tr (%)"
            draw_forecast(p, rows, "pretrain_accuracy", "pretrain_test_accuracy", at_start)
        draw_histogram(p, found[k], f"{s} {n}" if n else "all data", step, edges)
    draw_forecast(p, rows, "loss_barrier", "mean_train_loss_barrier", "mean loss barrier")


def fig6(p: Picture) -> None:
    """A column for each kind of subset: accuracies by length of warmup, then the sharpness at a
    typical length (geometric means and deviations)."""
    curves = [c for c in p.curves if not c.noise]
    warmed = sorted((c for c in curves if c.step), key=lambda c: (c.size, c.offset, c.step))
    lengths = sorted({c.step for c in warmed})
    typical = 1600 if 1600 in lengths else lengths[-1] if lengths else 0
    columns = {k: [c for c in warmed if c.subset == k and not c.offset] for k in SUBSETS[1:]}
    sizes = {c.size for c in warmed if c.offset}
    easy = pick(warmed, subset="easy", balance=False)
    columns["windows"] = [c for c in easy if c.size in sizes]
    columns = {k: v for k, v in columns.items() if v} or {"all": []}
    everything, first = pick(warmed, subset="all"), None
    family = {(c.kind, c.size): c for c in warmed}  # that share a style
    styles = {k: look(c, family.values()) for k, c in family.items()}
    if len(lengths) < 2:
        draw_outcomes(p, pick(curves, step=0) + everything + pick(warmed, subset=SUBSETS[1:]))
    for kind, shown in columns.items() if len(lengths) > 1 else ():
        ax = p.panel("steps of warmup", "test accuracy (%)", kind, sharey=first)
        first, here = first or ax, set(lengths)
        for key in dict.fromkeys((c.kind, c.size) for c in shown + everything):
            alike = [c for c in shown + everything if (c.kind, c.size) == key]
            rows = pd.concat([c.rows for c in alike])
            lost = int((rows["done"] & (rows["outcome"] != "trained")).sum())
            what = alike[0].what + f", {lost} not trained" * bool(lost)
            points = percent(records.summarise(tables.trained(rows), "warmup"))
            draw_curve(p, ax, points, styles[key], what, running=any(c.running for c in alike))
            theirs = records.paper_warmup(alike[0]) if p.paper == "cifar10" else ()
            if len(theirs):
                draw_behind(p, ax, percent(theirs), styles[key])
                here |= {*theirs.index}
        for c in pick(curves, step=0):
            if len(good := tables.trained(c.rows)):
                level = 100 * good["test_accuracy"].mean()
                line = ax.axhline(level, label="no warmup", **DOTTED)
                p.note("no warmup", line, [len(good)])
        ticks(ax, here)
    first = None
    for kind, shown in columns.items():
        ax = p.panel("step", "top Hessian eigenvalue", f"{kind}, warmup {typical}", sharey=first)
        first = first or ax
        shown = pick(shown + everything, step=typical)
        for c in shown + pick(curves, step=0):
            style = styles[c.kind, c.size] if c.step else look(c) | {"color": "0.6"}
            label = c.what if c.step else "no warmup"
            draw_curve(p, ax, tables.sharpness(c.rows), style, label, True, c.running, log=True)
        ax.set_yscale("log")


def draw_outcomes(p: Picture, curves: list[Curve]) -> None:
    """Accuracies of a single length of warmup: a row a configuration, a dot a replicate."""
    shown = [(c, 100 * tables.trained(c.rows)["test_accuracy"]) for c in reversed(curves)]
    shown = [(c, x) for c, x in shown if len(x)]
    if not shown:
        return
    length = max(c.step for c, _ in shown)
    title = f"warmup {length}; bars: means" if length else "no warmup"
    ax = p.panel("test accuracy (%)", "", title)
    for k, (c, x) in enumerate(shown):
        color = look(c)["color"] if c.step else "0.6"
        ax.scatter(x, [k] * len(x), s=14, color=color, alpha=0.7)
        ax.vlines(x.mean(), k - 0.25, k + 0.25, color=color)
    names = [f"{c.what if c.step else 'none'} (n={len(x)})" for c, x in shown]
    ax.set_yticks(range(len(shown)), names)


def tracked(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """A column of the logs by step; of coherence the band is over all batches of all replicates."""
    values = []
    for folder in rows["folder"].unique():
        log = Path(folder) / "log.csv"
        logged = [x for x in runs.read_rows(log) if x.get(kind)] if log.exists() else []
        each = records.load(Path(folder) / f"{kind}.npy")
        if each is None or len(each) != len(logged):
            each = [[float(x[kind])] for x in logged]
        for x, batches in zip(logged, each, strict=True):
            values += [(int(x["step"]), float(v)) for v in batches]
    return records.summarise(pd.DataFrame(values, columns=["step", kind]), "step", kind)


def watched(c: Curve) -> str:
    """The easy examples whose accuracy a run of pretrain.py logs: those of --easy-size and
    --easy-balance, else of the subset trained on, else of the preset."""
    first = c.rows.iloc[0]
    preset = options.PRESETS.get(first["dataset"])
    size = first["easy_size"] or c.size or (preset.size if preset else "")
    within = ", class by class" * bool(first["easy_balance"] or c.balance)
    return f"accuracy on the easiest {size}{within}"


def fig7(p: Picture) -> None:
    """Learning curves and coherence; a panel for each set of easy examples that was watched."""
    curves = pick(p.curves, step=max(c.step for c in p.curves))
    kinds = [("test_accuracy", "test accuracy", curves)]
    kinds += [("train_accuracy", "accuracy on all training data", curves)]
    for title in dict.fromkeys(watched(c) for c in curves):
        kinds.append(("easy_accuracy", title, [c for c in curves if watched(c) == title]))
    kinds += [("coherence", "gradients of batches against their mean", curves)]
    for kind, title, shown in kinds:
        found = [(c, points) for c in shown if len(points := tracked(c.rows, kind))]
        cosine = kind == "coherence"
        ax = p.panel("step", "cosine" if cosine else "accuracy (%)", title) if found else None
        for c, points in found:
            n = points.assign(n=c.rows["replicate"].nunique())
            shown = n if cosine else percent(n)
            draw_curve(p, ax, shown, look(c, curves), c.label, True, c.running)


def draw_shares(
    p: Picture, ax: Axes, values: list, edges: np.ndarray, style: dict, label: str
) -> None:
    """A stepped line of the shares of values in bins, mean and band over replicates; what is
    outside counts in the end bins."""
    inside = [x.ravel().clip(edges[0], edges[-1]) for x in values]
    share = [100 * np.histogram(x, edges)[0] / x.size for x in inside]
    mean, sd = np.mean(share, 0), np.std(share, 0, ddof=1) if len(share) > 1 else 0
    line = ax.stairs(mean, edges, color=style["color"], ls=style["linestyle"], lw=1.2)
    low = np.maximum(mean - sd, 0)
    ax.stairs(mean + sd, edges, baseline=low, fill=True, color=style["color"], alpha=0.13)
    p.note(label, line, [len(values)])


def fig8(p: Picture) -> None:
    """Norms of minibatch gradients over the first 200 steps."""
    curves = pick(p.curves, step=min(c.step for c in p.curves))
    found = [(c, [x[:200] for x in records.load_all(c.rows, "gradient_norm.npy")]) for c in curves]
    found = [(c, norms) for c, norms in found if norms]
    if not found:
        return
    steps = min(200, curves[0].step)
    ax = p.panel(f"norm of a minibatch gradient, first {steps} steps", "share (%)")
    edges = np.linspace(0, max(x.max() for _, norms in found for x in norms), 41)
    for c, norms in found:
        draw_shares(p, ax, norms, edges, look(c, [c for c, _ in found]), c.label)


def projected(c: Curve, level: int) -> list[np.ndarray]:
    """The error of w_tr on each example under the mask of a level, of each replicate."""
    each = records.load_all(c.rows, "projected_error.npy")
    return [x[level] for x in each if level < len(x)]


def fig9(p: Picture) -> None:
    """Each pre-training before and after projection; then all before, and all after."""
    size, t = records.main_setting(usual(p.curves))
    shown = [("all", 0, t), ("all", 0, 2 * t), ("easy", size, t)]
    curves = [c for c in usual(p.curves) if len(c.points) and (c.subset, c.size, c.step) in shown]
    last = min(6, *(max(c.points.index) for c in curves)) if curves else 0
    errors = {(c, k): projected(c, k) for c in curves for k in {0, last}}
    curves = [c for c in curves if errors[c, 0] and errors[c, last]]
    edges, axis = np.linspace(0, math.sqrt(2), 41), "||softmax - onehot|| of an example at w_tr"
    under = {0: "dense", last: f"under the mask of level {last}"}
    for c in curves:
        ax = p.panel(axis, "share (%)", c.label)
        for k, title in under.items():
            style = {"color": ("0.4", "#b03060")[k > 0], "linestyle": ("--", "-")[k > 0]}
            draw_shares(p, ax, errors[c, k], edges, style, title)
    for k, title in under.items() if curves else ():
        ax = p.panel(axis, "share (%)", title)
        for c in curves:
            draw_shares(p, ax, errors[c, k], edges, look(c, curves), c.label)


def rivals(p: Picture, metric: str) -> None:
    """Figures 10 and 12: other scores against EL2N; pruning after pre-training by them, by EL2N
    with and without balance, and on random subsets."""
    scores = p.page.metrics()
    other = [m for m in scores if m["metric"] == metric]
    other = [m for m in other if metric != "lmc" or m["folder"].name.startswith("all")]
    other.sort(key=lambda m: m.get("rewind", 0))
    for a, b in itertools.product(other, [m for m in scores if m["metric"] == "el2n"]):
        y, x = (records.load(m["folder"] / "scores.npy") for m in (a, b))
        if x is not None and y is not None:
            r = stats.spearmanr(x, y).statistic
            title = f"Pearson {np.corrcoef(x, y)[0, 1]:.2f}, Spearman {r:.2f}, n={len(x)}"
            ax = p.panel(f"EL2N score at step {b['score_step']}", f"{a['name']} score", title)
            cells = ax.hexbin(x, y, gridsize=40, bins="log", cmap="viridis", mincnt=1, lw=0.1)
            bar = p.colorbar(cells, cax=ax.inset_axes([1.02, 0, 0.03, 1]))
            bar.set_label("examples")
    curves = [c for c in p.curves if len(c.points) and not (c.control or c.noise or c.extra)]
    by = [c for c in curves if c.metric.split()[:1] == [metric]]
    for size, t in sorted({(c.size, c.step) for c in by}):
        ranked = pick(curves, size=size, step=t, offset=0, rate=0.0)
        kinds = [pick(ranked, subset="random"), pick(ranked, subset="easy", metric="el2n")]
        rival = sorted((c for c in ranked if c in by), key=lambda c: (len(c.metric), c.metric))
        plain = [c for c in all_data(curves) if c.step in (0, t, 2 * t)]
        draw_levels(p, [*itertools.chain(*kinds), *rival], plain, f"{size} examples, {t} steps")


def examples(
    table: pd.DataFrame,
    outs: Iterable[Path] = (),
    data_dir: Path = Path("data"),
    folders: Iterable[str] = (),
) -> Iterator[tuple[str, Picture]]:
    """A picture of each folder of EL2N scores; `folders` are data sets of images by path."""
    import torch  # here, since no other figure needs data

    import common

    outs = outs or table["out"].unique()
    found = [m for out in outs for m in records.read_metrics(Path(out)) if m["metric"] == "el2n"]
    for m in (m for m in found if not m["label_noise"][0]):
        scores, name = records.load(m["folder"] / "scores.npy"), m["dataset"]
        name = next((d for d in folders if options.data_name(d) == name), name)
        try:
            s = options.Settings.complete({"dataset": name, "data_dir": data_dir, "quiet": True})
            data = common.load_data(s, torch.device("cpu"))
        except runs.UserError as e:
            records.skipped(e)
            continue
        if scores is None or data.fingerprint != m["data"]:
            records.skipped(f"{m['folder']}: scores of other data than {data_dir} holds")
            continue
        yield f"{m['model']}-{m['folder'].name}", draw_ends(scores, data, m["score_step"])


def draw_ends(scores: np.ndarray, data: Any, step: int, each: int = 8) -> Picture:
    """The easiest and the hardest `each` training images of each class, beside the distribution of
    scores in it."""
    images, labels = np.asarray(data.train_images), np.asarray(data.train_labels)
    of_class = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    of_class.sort(key=lambda i: np.median(scores[i]))
    ranked = [i[np.argsort(scores[i], kind="stable")] for i in of_class]
    rows, (height, width, channels) = len(ranked), images.shape[1:]
    picture = Picture(figsize=(7, 1 + 0.22 * rows))
    axes = picture.subplots(1, 3, sharey=True)
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
    axes[2].set(xlabel=f"EL2N score at step {step}", title="5, 25, 50, 75, 95 %")
    axes[0].set_yticks(range(1, rows + 1), [data.classes[labels[i[0]]] for i in ranked])
    return picture


ALL, NOISY = (*PUBLISHED, "digits"), ("cifar10", "digits")
LEVELS = "Test accuracy against the weights that remain, by what pre-training saw."
NOISE = f"{LEVELS} Labels are resampled in it."
BARRIERS = "Loss barriers halfway between children of one start; accuracy after pruning from it."
WARMUP = "Warmup on a subset: final accuracy, and the top Hessian eigenvalue (geometric means)."
CURVES = "Learning curves of pre-training; cosines of minibatch gradients with their mean."


class Kind(NamedTuple):
    stage: str  # that makes its runs
    draw: Callable
    caption: str
    grid: tuple[str, ...] = ALL  # the data sets that grid.txt has it for
    columns: int = 3


partial = functools.partial
LMC, FORGETTING = partial(rivals, metric="lmc"), partial(rivals, metric="forgetting")
FIGURES = {
    "fig2": Kind("imp", by_size, LEVELS),
    "fig3": Kind("imp", fig3, "Test accuracy against the size of the subset, at three levels."),
    "fig4": Kind("imp", partial(by_size, noisy=True), NOISE, NOISY),
    "fig5": Kind("lmc", fig5, BARRIERS),
    "fig6": Kind("warmup", fig6, WARMUP, NOISY, 4),
    "fig7": Kind("pretrain", fig7, CURVES, ("cifar100", "digits"), 2),
    "fig8": Kind("pretrain", fig8, "Norms of minibatch gradients.", NOISY),
    "fig9": Kind("imp", fig9, "Error of w_tr on each example, dense and under a level's mask."),
    "fig10": Kind("imp", LMC, f"LMC scores against EL2N. {LEVELS}", ALL[1:]),
    "fig11": Kind("imp", partial(by_size, every_size=True), LEVELS),
    "fig12": Kind("imp", FORGETTING, f"Forgetting scores against EL2N. {LEVELS}", NOISY),
    "fig13": Kind("imp", partial(by_size, noisy=True, every_size=True), NOISE, NOISY),
    "prelr": Kind("imp", prelr, "Test accuracy by the learning rate of pre-training."),
    "examples": Kind("el2n", examples, "Easiest and hardest images of each class; their scores."),
}


def drawn(
    figure: str, table: pd.DataFrame, paper: str | None = None, **where: Any
) -> Iterator[tuple[str, Picture, str]]:
    """(name, picture, caption) of each model that has the runs of a figure; `where` is for
    `examples`."""
    kind = FIGURES[figure]
    if figure == "examples":
        for name, picture in examples(table, **where):
            yield name, picture, f"{figure}, {name}. {kind.caption}\n"
        return
    for page in records.pages(table, kind.stage, paper):
        picture = Picture(page)
        kind.draw(picture)
        if picture.panels:
            arrange(picture, kind.columns)
            yield page.name, picture, caption(figure, picture)


def caption(figure: str, picture: Picture) -> str:
    """What a picture shows, and the entries of its legend."""
    lines = [f"{figure}, {picture.page.name}. {FIGURES[figure].caption}"]
    lines.append("Lines: means over n replicates; bands: sample standard deviations.")
    if any(k.startswith(SOURCE) for k in picture.entries):
        lines.append(f"Thin lines or open dots: {SOURCE}, arXiv 2206.01278.")
    lines += [f"  {label}" for label in picture.labels().values()]
    if not picture.page.rows["done"].all():
        lines.append("*: runs in progress, with the levels they have.")
    return "\n".join(lines) + "\n"


def draw(figure: str, table: pd.DataFrame | str | Path = "results") -> dict[str, Picture]:
    """The pictures of a figure by name, from `frame` or a folder; nothing is written."""
    table = table if isinstance(table, pd.DataFrame) else frame(table)
    with matplotlib.rc_context(STYLE):
        return {name: picture for name, picture, _ in drawn(figure, table)}


def missing(shown: dict[str, list[str]], datasets: Iterable[str], out: Path) -> list[str]:
    """What was not drawn of data sets with a grid, each with the command that makes it."""
    lines, where = [], [] if out == Path("results") else ["--out", str(out)]
    for figure, names in shown.items():
        for data in sorted({*FIGURES[figure].grid} & {*datasets}):
            if not any(name.startswith(f"{data}-") for name in names):
                command = ["bash", "run_all.sh", "--only", figure, "--dataset", data, *where]
                if figure == "examples":
                    command = ["python", "el2n.py", "--dataset", data, *where]
                stage = FIGURES[figure].stage
                lines.append(f"{figure} of {data} needs runs of {stage}.py: {shlex.join(command)}")
    for data in sorted({*PUBLISHED} - {*datasets}):
        lines.append(f"{data}: {shlex.join(['bash', 'run_all.sh', '--dataset', data, *where])}")
    return lines


# ---- command line --------------------------------------------------------------------------------


def flags() -> options.Parser:
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("figure", nargs="*", help=f"of {', '.join(FIGURES)} [all but examples]")
    add("--out", type=options.path, action="append", help="folder of results; repeatable [results]")
    add("--figures", type=options.path, help="folder to write to [OUT/figures]")
    add("--data-dir", type=options.path, default=Path("data"), help="of data, for examples [data]")
    add("--dataset", action="append", help="only this data set, or folder of images; repeatable")
    add("--paper", choices=PUBLISHED, help="whose curves to draw behind runs on other data")
    about = "two runs, by name, end of path or pattern: differences, standard errors, p, verdict"
    add("--compare", nargs=2, action="extend", metavar=("A", "B"), help=about)
    add("--levels", type=options.numbers, default=(), help="of verdicts, such as 3-12 [all but 0]")
    fraction = options.number(float, 0, 0.5, open_low=True)
    add("--error", type=fraction, default=0.05, help="family-wise error of verdicts [0.05]")
    errors = options.number(float, 0)
    add("--slack", type=errors, default=1.0, help="standard errors a level, literal rule [1]")
    add("--missing", action="store_true", help="print the commands that make what is missing")
    return parser


def save(picture: Picture, text: str, path: Path) -> Path:
    """PNG, SVG, PDF, and the caption; the path of the PNG."""
    for kind, about in (("png", {}), ("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
        fill = functools.partial(picture.savefig, format=kind, dpi=160, metadata=about)
        runs.write(path.parent / f"{path.name}.{kind}", fill)
    tables.write_text(path.parent / f"{path.name}.txt", text)
    return path.parent / f"{path.name}.png"


def main(args: argparse.Namespace) -> Any:
    """Draws and writes, and says what is missing; returns the paths written and what is missing,
    or of --compare the comparisons."""
    for name in args.figure:
        if name not in FIGURES:
            near = options.did_you_mean(name, FIGURES)
            raise runs.UserError(f"{name}: not one of {', '.join(FIGURES)}{near}")
    if args.compare and (args.figure or len(args.compare) > 2):
        raise runs.UserError("--compare takes two names or patterns, once, and draws no figure")
    outs = args.out or [Path("results")]
    only = {options.data_name(d) for d in args.dataset or ()}
    table, rule = frame(outs, only), tables.Rule(args.levels, args.slack, args.error)
    if not len(table):
        found = f"{outs[0]} holds no runs" + f" of {', '.join(sorted(only))}" * bool(only)
        if args.compare:
            raise runs.UserError(found)
        runs.warn(found)
    if args.compare:
        return tables.print_comparisons(table, args.compare, rule)
    folder = args.figures or outs[0] / "figures"
    where = {"data_dir": args.data_dir, "folders": args.dataset or (), "outs": outs}
    written, shown = [], {}
    with matplotlib.rc_context(STYLE):
        for figure in args.figure or [x for x in FIGURES if x != "examples"]:
            shown[figure] = []
            for name, picture, text in drawn(figure, table, args.paper, **where):
                written.append(save(picture, text, folder / f"{figure}-{name}"))
                shown[figure].append(name)
    if not args.figure:
        found = ((name, rows) for name, rows in tables.tables(table, rule, args.paper) if rows)
        written += [tables.write_table(folder / name, rows) for name, rows in found]
    for path in written:
        runs.say(path)
    lacking = missing(shown, only or {*table["dataset"]}, outs[0])
    if args.missing:
        runs.warn("".join(f"missing: {line}\n" for line in lacking).rstrip())
    elif lacking:
        runs.warn(f"{len(lacking)} figures or data sets are missing: --missing lists the commands")
    if args.figure and not written:
        raise runs.UserError(f"{outs[0]} has nothing to draw {', '.join(args.figure)} from")
    return {"written": written, "missing": lacking}


if __name__ == "__main__":
    runs.run_stage(main, flags())
