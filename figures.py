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
import io
import itertools
import math
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # a notebook's may not be installed here, and none is needed
    os.environ.pop("MPLBACKEND", None)

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy import stats

import common
import options
import records
import runs
import tables
from records import PUBLISHED, SOURCE, SUBSETS, Curve, Page, all_data, frame, grouped, pick, usual

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
SLANTED = {"rotation": 40, "fontsize": 6}

# ---- drawing -------------------------------------------------------------------------------------


class Picture(Figure):
    """A matplotlib figure of a page, without pyplot; notebooks show it."""

    def __init__(self, page: Page | None = None, **more: Any):
        super().__init__(layout="constrained", **more)
        FigureCanvasAgg(self)
        self.page, self.caption = page, ""
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

    def legend_entries(self) -> dict[str, Any]:
        """The handle of each text, the paper's last."""
        texts = {}
        for label in sorted(self.entries, key=lambda k: k.startswith(SOURCE)):
            handle, n, running = self.entries[label]
            texts[label + f" (n={records.span(n)})" * bool(n) + "*" * running] = handle
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
    if entries := picture.legend_entries():
        across = int(width / (0.75 + 0.062 * max(map(len, entries))))
        across = min(len(entries), max(1, across))
        picture.legend(entries.values(), entries, loc="outside lower center", ncols=across)
        height += 0.2 + 0.15 * -(-len(entries) // across)
    picture.set_size_inches(width, height)
    picture.get_layout_engine().set(w_pad=0.08, h_pad=0.08)


def style_of(c: Curve) -> str:
    """The key of LOOK."""
    by = c.metric.split()[0] if c.metric else "el2n"
    by = by if by != "el2n" else "balanced" if c.balance else c.subset
    return c.control or ("own" if c.extra or by not in LOOK else by)


def look(c: Curve, among: Iterable[Curve] = ()) -> dict[str, Any]:
    """Colour, line and marker; of curves of one kind the earlier are lighter."""
    color, line, marker = LOOK.get(style_of(c), LOOK["own"])
    alike = [x for x in among if style_of(x) == style_of(c)]
    if len(alike) > 1 and c in alike:
        k = alike.index(c)
        light = 0.65 * (1 - k / (len(alike) - 1))
        color = tuple(x + (1 - x) * light for x in matplotlib.colors.to_rgb(color))
        if c.subset == "all":
            line, marker = ("--", ":", "-.", "-")[k % 4], ("s", "D", "h", "*")[k % 4]
    return {"color": color, "linestyle": line, "marker": marker}


def percent(fraction: Any) -> Any:
    return 100 * fraction


def draw_curve(
    p: Picture,
    ax: Axes,
    points: pd.DataFrame,
    style: dict,
    label: str,
    running: bool = False,
    band: bool = True,
    scale: float = 100,
    log: bool = False,
) -> None:
    """Mean and band of one curve; `log` for a logarithmic axis: the points are of logarithms."""
    if not len(points):
        return
    x, mean, sd = points.index, scale * points["mean"], scale * points["sd"]
    mean, low, high = (np.exp(y) if log else y for y in (mean, mean - sd, mean + sd))
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
    [line] = ax.plot(points.index, percent(points["mean"]), label=SOURCE, **thin)
    p.note(f"{SOURCE}, {differs}" if differs else SOURCE, line)


def draw_dense(p: Picture, ax: Axes, among: list[Curve]) -> None:
    """The accuracy of the dense network that curves are held against, those of the first."""
    dense = tables.references(among[0], p.curves, p.paper)[0] if among else None
    if dense is not None:
        p.note("dense", ax.axhline(percent(dense["mean"]), label="dense", **DOTTED))


def ticks(ax: Axes, base: int, labels: dict[float, str], **style: Any) -> None:
    """A logarithmic axis with these texts on it."""
    ax.set_xscale("log", base=base)
    ax.set_xticks([*labels], [*labels.values()], **style)
    ax.xaxis.set_minor_locator(NullLocator())


def draw_levels(
    p: Picture, shown: list[Curve], plain: list[Curve], title: str, label: str = "short"
) -> None:
    """A panel of accuracy against weights remaining, as in Figure 2, if there is anything to show;
    `plain` curves are there to compare with, and have no band."""
    if not shown:
        return
    ax, remaining = p.panel("weights remaining (%)", "test accuracy (%)", title), {}
    everything = [] if any(c.rate for c in shown) else all_data(p.curves)
    for c in [*plain, *shown]:
        style = look(c, everything if c in everything else [*plain, *shown])
        ours = c.points.set_index("weights_remaining")
        draw_curve(p, ax, ours, style, getattr(c, label), c.running, band=c in shown)
        remaining |= c.points["weights_remaining"].to_dict()
        theirs = records.published(c, p.paper) if c in shown else None
        differs = records.differs(c, theirs)
        others = [records.published(x, p.paper) for x in shown if x is not c]
        if theirs and not (differs and theirs in others):  # it stands behind the one that is alike
            draw_behind(p, ax, theirs.points.set_index("weights_remaining"), style, differs)
            remaining |= theirs.points["weights_remaining"].to_dict()
    draw_dense(p, ax, shown)
    chosen = [remaining[k] for k in sorted(remaining)[:: max(1, -(-len(remaining) // 8))]]
    ticks(ax, 10, {v: f"{percent(v):.3g}" for v in chosen})
    ax.invert_xaxis()


# ---- the figures: each draws the panels of one picture, of one model -----------------------------


def by_size(p: Picture, noisy: bool = False, every_size: bool = False) -> None:
    """Figures 2, 4, 11, 13: all data, a panel for each size, step and noise, in Figure 2 also the
    controls and runs from starts of one's own."""
    mine, full = usual(p.curves, noisy, balanced=True), all_data(p.curves)
    fig2 = not noisy and not every_size
    if fig2:
        draw_levels(p, full, [], "all data")
    main = records.main_setting(mine)
    subsets = grouped([c for c in mine if c.subset != "all"], "noise", "step", "size")
    for (noise, t, size), shown in sorted(subsets.items()):
        if every_size or (size, t) == main:
            plain = pick(full, step=0 if noise else 2 * t if every_size else {0, t, 2 * t})
            plain += pick(mine, subset="all", noise=noise) if noise else []
            title = f"{size} examples, {t} steps" + f", {noise:.0%} label noise" * bool(noise)
            draw_levels(p, shown, plain, title)
    if fig2:
        controls = [c for c in p.curves if c.control and not c.noise]
        pruned = {(c.what, c.step) for c in controls}
        tickets = pick(p.curves, control="", noise=0.0, extra="", rate=0.0)
        tickets = [c for c in tickets if (c.what, c.step) in pruned]
        draw_levels(p, tickets + controls, [], "controls", "label")
        own = [c for c in p.curves if c.extra and not c.noise]
        draw_levels(p, own, full, "starts and variants of one's own", "label")


def fig3(p: Picture) -> None:
    """Accuracy against subset size at three levels, a row for each rewind step."""

    def by_size_at(level: int, curves: list[Curve]) -> pd.DataFrame:
        found = sorted((c for c in curves if level in c.points.index), key=lambda c: c.size)
        return pd.DataFrame([c.points.loc[level] for c in found], index=[c.size for c in found])

    ours = usual(p.curves, balanced=True)
    behind = usual(records.paper_curves(p.paper), balanced=True)
    steps = {t: alike for (t,), alike in grouped([c for c in ours if c.size], "step").items()}
    steps = {t: steps[t] for t in sorted(steps) if len({c.size for c in steps[t]}) > 1}
    for t, k in itertools.product(steps, records.three_levels([*itertools.chain(*steps.values())])):
        here = [c for c in steps[t] if k in c.points.index]
        left = next((c.points.loc[k, "weights_remaining"] for c in here), math.nan)
        title = f"level {k}, {left:.1%} of weights remaining"
        ax = p.panel(f"examples trained on for {t} steps", "test accuracy (%)", title)
        sizes = {c.size for c in here}
        for alike in grouped(here, "kind").values():
            style, running = look(alike[0]), any(c.running for c in alike)
            draw_curve(p, ax, by_size_at(k, alike), style, alike[-1].short, running)
            same = pick(behind, subset=alike[0].subset, step=t)
            differs, theirs = records.differs(alike[0], next(iter(same), None)), by_size_at(k, same)
            if len(theirs) and not (
                differs and any(x.subset == "easy" and x.balance for x in here)
            ):
                draw_behind(p, ax, theirs, style, differs)
                sizes |= {*theirs.index}
        full = [c for c in all_data(ours) if k in c.points.index]
        for c in full:
            style = {**look(c, full), "marker": None}
            line = ax.axhline(percent(c.points.loc[k, "mean"]), lw=0.9, **style)
            p.note(c.short, line, [c.points.loc[k, "n"]], c.running)
        draw_dense(p, ax, here)
        ticks(ax, 2, {m: str(m) for m in sorted(sizes)}, **SLANTED)


def prelr(p: Picture) -> None:
    """Rates of pre-training, for each step at which there are several: the paper took the best."""
    full = [c for c in pick(p.curves, subset="all", noise=0.0, control="", extra="") if c.step]
    for (t,), alike in sorted(grouped(full, "step").items()):
        if len(alike) > 1:
            rate = next((c.rows["pretrain_lr"].iloc[0] for c in alike if not c.rate), math.nan)
            title = f"all data, {t} steps" + f", at rate {rate:g} or as named" * bool(rate > 0)
            alike.sort(key=lambda c: c.rate)
            draw_levels(p, alike, pick(all_data(p.curves), step=0), title)


def draw_histogram(p: Picture, title: str, pairs: dict[Curve, list], edges: np.ndarray) -> None:
    """A histogram of Figure 5: pairs, examples and replicates pooled."""
    named = title.replace("steps", "it")
    theirs = records.paper_table("lmc_histograms.csv", dataset=p.paper, pretraining=named)
    pairs = {c: found for c, found in pairs.items() if found}
    if not pairs and not len(theirs):
        return
    ax = p.panel("loss barrier of an example", "share (%)", title)
    for c, found in pairs.items():
        values = np.concatenate([x.ravel() for x in found])
        share = percent(np.histogram(values, edges)[0]) / len(values)
        outside = f"{np.mean((values < edges[0]) | (values > edges[-1])):.1%} outside"
        bars = ax.stairs(share, edges, fill=True, color=look(c)["color"], alpha=0.55)
        said = {"xycoords": "axes fraction", "ha": "right", "fontsize": 7}
        ax.annotate(f"n={len(found)}, {outside}", (0.97, 0.93), **said)
        p.note(f"{c.subset}, all pairs and examples", bars)
    if len(theirs):
        bins, count = [*theirs["bin_lo"], theirs["bin_hi"].iloc[-1]], theirs["count_of_1080000"]
        p.note(SOURCE, ax.stairs(100 * count / count.sum(), bins, color="k", lw=0.7))


def draw_forecast(p: Picture, rows: pd.DataFrame, key: str, xlabel: str) -> None:
    """Figure 5 right: final accuracy against a forecast of it, a point for each replicate."""
    every, later = (tables.correlate(x, key) for x in (rows, rows[rows["rewind"] > 0]))
    said = [f"r = {x['pearson']:.2f}" for x in (every, later) if x["pearson"] is not None]
    if len(said) > 1:
        said = said[:1] if later["n"] == every["n"] else [said[0], f"{said[1]} without step 0"]
    level = int(rows["level"].iloc[0]) if len(rows) else tables.FINAL_LEVEL.get(p.paper, 7)
    ax = p.panel(xlabel, f"test accuracy at level {level} (%)", "; ".join(said))
    scale = 100 if "accuracy" in key else 1
    for method, group in records.paper_scatter(p.paper).groupby("subset"):
        color, _, marker = LOOK[method]
        style = {"s": 9, "facecolors": "none", "edgecolors": color, "marker": marker, "zorder": 1}
        x, y = scale * group[key], percent(group["final_accuracy"])
        p.note(SOURCE, ax.scatter(x, y, lw=0.5, alpha=0.6, **style))
    for c in p.curves:
        mine = rows[rows["configuration"] == c.label]
        if len(mine):
            style = {k: v for k, v in look(c, p.curves).items() if k != "linestyle"}
            dots = ax.scatter(scale * mine[key], percent(mine["final_accuracy"]), s=22, **style)
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
    panels = []
    for s, n, step in four:
        found = pick(mine, subset=s, size=n, step=step)
        pairs = {c: records.load_all(c.rows, "loss_barrier_pairs.npy") for c in found}
        panels.append((f"{s} {n}, {step} steps" if n else f"all data, {step} steps", pairs))
    edges = np.arange(-5, 10.5, 0.5)  # the paper's
    pooled = [x.ravel() for _, pairs in panels for found in pairs.values() for x in found]
    if pooled and not len(records.paper_table("lmc_histograms.csv", dataset=p.paper)):
        low, high = np.quantile(np.concatenate(pooled), (0.005, 0.995))
        edges = np.linspace(low, high, 31) if low < high else edges
    for k, (title, pairs) in enumerate(panels):
        if k == 2:
            draw_forecast(p, rows, "pretrain_accuracy", "test accuracy at w_tr (%)")
        draw_histogram(p, title, pairs, edges)
    draw_forecast(p, rows, "loss_barrier", "mean loss barrier")


def fig6(p: Picture) -> None:
    """A column for each kind of subset: accuracies by length of warmup, then the sharpness at a
    typical length (geometric means and deviations)."""
    curves = [c for c in p.curves if not c.noise]
    warmed = sorted((c for c in curves if c.step), key=lambda c: (c.size, c.offset, c.step))
    without, everything = pick(curves, step=0), pick(warmed, subset="all")
    lengths = sorted({c.step for c in warmed})
    typical = 1600 if 1600 in lengths else lengths[-1] if lengths else 0
    columns = {k: pick(warmed, subset=k, offset=0) for k in SUBSETS[1:]}
    sizes = {c.size for c in warmed if c.offset}
    columns["windows"] = pick(warmed, subset="easy", balance=False, size=sizes)
    columns = {k: v + everything for k, v in columns.items() if v} or {"all": everything}
    first = {k: alike[0] for k, alike in grouped(warmed, "kind", "size").items()}
    styles = {k: look(c, first.values()) for k, c in first.items()}
    if len(lengths) < 2:
        draw_outcomes(p, without + everything + pick(warmed, subset=SUBSETS[1:]))
        lengths = []
    ax = None
    for kind, shown in columns.items() if lengths else ():
        ax, here = p.panel("steps of warmup", "test accuracy (%)", kind, sharey=ax), set(lengths)
        for key, alike in grouped(shown, "kind", "size").items():
            rows = pd.concat([c.rows for c in alike])
            lost = int((rows["done"] & (rows["outcome"] != "trained")).sum())
            label = alike[0].what + f", {lost} not trained" * bool(lost)
            points = records.summarise(tables.trained(rows), "warmup")
            draw_curve(p, ax, points, styles[key], label, any(c.running for c in alike))
            theirs = records.paper_warmup(alike[0]) if p.paper == "cifar10" else ()
            if len(theirs):
                draw_behind(p, ax, theirs, styles[key])
                here |= {*theirs.index}
        for c in without:
            if len(good := tables.trained(c.rows)):
                accuracy = percent(good["test_accuracy"].mean())
                line = ax.axhline(accuracy, label="no warmup", **DOTTED)
                p.note("no warmup", line, [len(good)])
        ticks(ax, 2, {t: str(t) for t in sorted(here)}, **SLANTED)
    ax = None
    for kind, shown in columns.items():
        title = f"{kind}, warmup {typical}"
        ax = p.panel("step", "top Hessian eigenvalue", title, sharey=ax, yscale="log")
        for c in pick(shown, step=typical) + without:
            style = styles[c.kind, c.size] if c.step else look(c) | {"color": "0.6"}
            label = c.what if c.step else "no warmup"
            draw_curve(p, ax, tables.sharpness(c.rows), style, label, c.running, scale=1, log=True)


def draw_outcomes(p: Picture, curves: list[Curve]) -> None:
    """Accuracies of a single length of warmup: a row a configuration, a dot a replicate."""
    shown = [(c, percent(tables.trained(c.rows)["test_accuracy"])) for c in reversed(curves)]
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
    for folder in map(Path, rows["folder"].unique()):
        log = folder / "log.csv"
        logged = [x for x in runs.read_rows(log) if x.get(kind)] if log.exists() else []
        each = records.load(folder / f"{kind}.npy")
        if each is None or len(each) != len(logged):
            each = [[x[kind]] for x in logged]
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
    panels = [("test_accuracy", "test accuracy", curves)]
    panels += [("train_accuracy", "accuracy on all training data", curves)]
    for title in dict.fromkeys(map(watched, curves)):
        panels.append(("easy_accuracy", title, [c for c in curves if watched(c) == title]))
    panels += [("coherence", "gradients of batches against their mean", curves)]
    for kind, title, shown in panels:
        found = {c: points for c in shown if len(points := tracked(c.rows, kind))}
        ylabel, scale = ("cosine", 1) if kind == "coherence" else ("accuracy (%)", 100)
        ax = p.panel("step", ylabel, title) if found else None
        for c, points in found.items():
            points["n"] = c.rows["replicate"].nunique()
            draw_curve(p, ax, points, look(c, curves), c.label, c.running, scale=scale)


def draw_shares(p: Picture, xlabel: str, title: str, edges: np.ndarray, lines: list) -> None:
    """A panel of stepped lines, each (an array of each replicate, style, label): the shares of
    values in bins, mean and band over replicates; what is outside counts in the end bins."""
    ax = p.panel(xlabel, "share (%)", title)
    for values, style, label in lines:
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
    norms = {c: [x[:200] for x in records.load_all(c.rows, "gradient_norm.npy")] for c in curves}
    norms = {c: each for c, each in norms.items() if each}
    if norms:
        xlabel = f"norm of a minibatch gradient, first {min(200, curves[0].step)} steps"
        edges = np.linspace(0, max(x.max() for each in norms.values() for x in each), 41)
        lines = [(each, look(c, norms), c.label) for c, each in norms.items()]
        draw_shares(p, xlabel, "", edges, lines)


def fig9(p: Picture) -> None:
    """Each pre-training before and after projection; then all before, and all after."""
    size, t = records.main_setting(usual(p.curves))
    shown = [("all", 0, t), ("all", 0, 2 * t), ("easy", size, t)]
    curves = [c for c in usual(p.curves) if (c.subset, c.size, c.step) in shown]
    last = min(6, *(max(c.points.index) for c in curves)) if curves else 0
    each = {c: records.load_all(c.rows, "projected_error.npy") for c in curves}
    errors = {c: {k: [x[k] for x in each[c] if k < len(x)] for k in (0, last)} for c in curves}
    errors = {c: found for c, found in errors.items() if found[0] and found[last]}
    edges, axis = np.linspace(0, math.sqrt(2), 41), "||softmax - onehot|| of an example at w_tr"
    under = {0: "dense", last: f"under the mask of level {last}"}
    gray, red = ({"color": "0.4", "linestyle": "--"}, {"color": "#b03060", "linestyle": "-"})
    for c, found in errors.items():
        lines = [(found[k], red if k else gray, title) for k, title in under.items()]
        draw_shares(p, axis, c.label, edges, lines)
    for k, title in under.items() if errors else ():
        lines = [(found[k], look(c, errors), c.label) for c, found in errors.items()]
        draw_shares(p, axis, title, edges, lines)


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
            p.colorbar(cells, cax=ax.inset_axes([1.02, 0, 0.03, 1]), label="examples")
    curves = pick(p.curves, control="", noise=0.0, extra="")
    by = [c for c in curves if c.metric.split()[:1] == [metric]]
    for (size, t), alike in sorted(grouped(by, "size", "step").items()):
        ranked = pick(curves, size=size, step=t, offset=0, rate=0.0)
        shown = pick(ranked, subset="random") + pick(ranked, subset="easy", metric="el2n")
        rival = sorted((c for c in alike if c in ranked), key=lambda c: (len(c.metric), c.metric))
        plain = pick(all_data(curves), step={0, t, 2 * t})
        draw_levels(p, shown + rival, plain, f"{size} examples, {t} steps")


def examples(
    table: pd.DataFrame,
    outs: Iterable[Path] = (),
    data_dir: Path = Path("data"),
    folders: Iterable[str] = (),
) -> Iterator[tuple[str, Picture]]:
    """A picture of each folder of EL2N scores; `folders` are data sets of images by path."""
    found = [m for out in outs or table["out"].unique() for m in records.read_metrics(Path(out))]
    for m in (m for m in found if m["metric"] == "el2n" and not m["label_noise"][0]):
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
) -> Iterator[tuple[str, Picture]]:
    """(name, picture) of each model that has the runs of a figure; `where` is for `examples`."""
    kind = FIGURES[figure]
    for name, picture in examples(table, **where) if figure == "examples" else ():
        picture.caption = f"{figure}, {name}. {kind.caption}\n"
        yield name, picture
    for page in records.pages(table, kind.stage, paper):
        picture = Picture(page)
        kind.draw(picture)
        if picture.panels:
            arrange(picture, kind.columns)
            picture.caption = caption(figure, picture)
            yield page.name, picture


def caption(figure: str, picture: Picture) -> str:
    """What a picture shows, and the entries of its legend."""
    lines = [f"{figure}, {picture.page.name}. {FIGURES[figure].caption}"]
    lines.append("Lines: means over n replicates; bands: sample standard deviations.")
    if any(k.startswith(SOURCE) for k in picture.entries):
        lines.append(f"Thin lines or open dots: {SOURCE}, arXiv 2206.01278.")
    lines += [f"  {text}" for text in picture.legend_entries()]
    if not picture.page.rows["done"].all():
        lines.append("*: runs in progress, with the levels they have.")
    return "\n".join(lines) + "\n"


def draw(figure: str, table: pd.DataFrame | str | Path = "results") -> dict[str, Picture]:
    """The pictures of a figure by name, from `frame` or a folder; nothing is written."""
    table = table if isinstance(table, pd.DataFrame) else frame(table)
    with matplotlib.rc_context(STYLE):
        return dict(drawn(figure, table))


def missing(shown: dict[str, list[str]], datasets: Iterable[str], out: Path) -> list[str]:
    """What was not drawn of data sets with a grid, each with the command that makes it."""
    lines, where = [], [] if out == Path("results") else ["--out", str(out)]
    for figure, names in shown.items():
        for data in sorted({*FIGURES[figure].grid} & {*datasets}):
            if not any(name.startswith(f"{data}-") for name in names):
                command = ["bash", "run_all.sh", "--only", figure]
                command = ["python", "el2n.py"] if figure == "examples" else command
                command = shlex.join([*command, "--dataset", data, *where])
                lines.append(
                    f"{figure} of {data} needs runs of {FIGURES[figure].stage}.py: {command}"
                )
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


def save(picture: Picture, path: Path) -> Path:
    """PNG, SVG, PDF, and the caption; the path of the PNG."""
    for kind, about in (("png", {}), ("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
        fill = partial(picture.savefig, format=kind, dpi=160, metadata=about)
        runs.write(path.parent / f"{path.name}.{kind}", fill)
    tables.write_text(path.parent / f"{path.name}.txt", picture.caption)
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
            for name, picture in drawn(figure, table, args.paper, **where):
                written.append(save(picture, folder / f"{figure}-{name}"))
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
