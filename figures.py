"""Every figure and table of the paper from whatever results/ holds, the paper's own curves behind.

    python figures.py                               all that can be drawn, and what is missing
    python figures.py fig2 --dataset cifar10        one
    python figures.py --compare easy3200-rewind200 all-rewind400 --levels 1-15

    fig2, fig4    accuracy against weights remaining, by subset; under label noise
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

Verdicts over a range of levels (Definitions 3.1, 3.2): A dominates B if its mean accuracy is higher
at every level; weakly, if lower at none by more than the standard error of the difference; equal,
if that holds both ways. A level matches if its accuracy is not below that of the dense network
(level 0 of all data, latest rewind) by more than the standard error. A run in progress counts with
the levels it has, and is marked *.
"""

import argparse
import csv
import dataclasses
import functools
import itertools
import math
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from scipy import stats

import common

STAGES = ("imp", "pretrain", "lmc", "warmup")
PAPER = common.HERE / "paper"
SUBSETS = ("all", "easy", "random", "hard")
LOOK = {  # colour, line, marker: dark to light, so that they differ in grey too
    "all": ("#000000", "--", "s"),
    "easy": ("#12408f", "-", "o"),
    "random": ("#d1641b", "-.", "^"),
    "hard": ("#3fae8c", (0, (4, 1, 1, 1, 1, 1)), "v"),
    "lmc": ("#8e44ad", (0, (5, 1)), "P"),
    "forgetting": ("#b03060", (0, (1, 1)), "X"),
}
# What tells runs of one picture apart; runs that differ in anything else get a picture each.
TOLD = {"subset", "size", "offset", "balance", "scores", "label_noise", "rewind", "replicate"}
TOLD |= {"track", "every", "warmup", "pretrain_lr", "prune_fraction"}
plt.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.25, "legend.fontsize": 6.5})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.2})
plt.rcParams.update({"svg.hashsalt": "tickets", "svg.fonttype": "none"})

# ---- reading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    stage: str
    model: str
    name: str
    folder: Path
    settings: dict
    result: dict  # result.json; of an imp run in progress, the levels it has
    done: bool


@dataclasses.dataclass(frozen=True)
class Stat:
    """Mean, sample standard deviation (NaN for n = 1) and n."""

    mean: float
    sd: float
    n: int

    @staticmethod
    def of(values: list[float]) -> "Stat":
        n = len(values)
        return Stat(float(np.mean(values)), float(np.std(values, ddof=1)) if n > 1 else math.nan, n)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.sd:.4f}" if self.n > 1 else "")


@dataclasses.dataclass
class Curve:
    """The replicates of one configuration, ours or the paper's: accuracy by level, or by step."""

    subset: str
    size: int
    rewind: int
    noise: float
    metric: str
    points: dict[int, Stat]
    remaining: dict[int, float]
    name: str = ""
    runs: list[Run] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> tuple:
        return self.subset, self.size, self.rewind, self.noise, self.metric

    @property
    def label(self) -> str:
        what = self.subset if self.subset == "all" else f"{self.subset} {self.size}"
        by = f" by {self.metric}" if self.metric != "el2n" else ""
        noise = f", {self.noise:.0%} noise" if self.noise else ""
        return f"{what}{by}, step {self.rewind}{noise}"

    @property
    def legend(self) -> str:
        n = sorted({p.n for p in self.points.values()} or {len(self.runs)})
        going = "*" if any(not r.done for r in self.runs) else ""
        return f"{self.label} (n={'-'.join(map(str, n[:: max(1, len(n) - 1)]))}){going}"


def read_runs(out: Path) -> list[Run]:
    """Every run below results/; damaged and foreign files are named on stderr and skipped."""
    runs = []
    for path in sorted(p for s in STAGES for p in out.glob(f"{s}/*/*/rep*/config.json")):
        folder = path.parent
        done = (folder / "result.json").exists()
        try:
            value = common.read_json(folder / "result.json" if done else path)
            settings = (value["config"] if done else value)["settings"]
            stage, model, name = folder.parts[-4:-1]
            if not done:
                value = {"levels": read_log(folder / "log.csv")} if stage == "imp" else {}
            run = Run(stage, model, name, folder, settings, value, done)
            _ = settings["dataset"], settings["subset"], settings["label_noise"], settings["steps"]
            if stage == "imp":
                _ = [
                    (x["level"], x["test_accuracy"] + x["weights_remaining"])
                    for x in value["levels"]
                ]
        except (common.UserError, KeyError, TypeError, ValueError, OSError) as e:
            told = e if isinstance(e, common.UserError) else f"{folder}: not a run ({e!r})"
            print(f"skipped: {told}", file=sys.stderr)
        else:
            if not done or value.get("ended") is None or stage == "imp":
                runs.append(run)
    return runs


def read_log(path: Path) -> list[dict]:
    """The levels of an imp run in progress."""
    if not path.exists():
        return []
    with open(path, newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["phase"].startswith("level")]
    return [{k: float(v) for k, v in r.items() if k != "phase" and v} for r in rows]


def read_metrics(out: Path) -> dict[str, dict]:
    """scores.json, and where it lies, by the fingerprint of its scores."""
    found = {}
    for path in sorted([*out.glob("el2n/*/*/scores.json"), *out.glob("lmc/*/*/scores.json")]):
        try:
            told = common.read_json(path)
            found[told["sha256_of_scores"]] = {**told, "folder": path.parent}
        except (common.UserError, KeyError) as e:
            print(f"skipped: {e}", file=sys.stderr)
    return found


def curve_of(runs: list[Run], metrics: dict[str, dict]) -> Curve:
    """The replicates of one folder."""
    s, by_level = runs[0].settings, defaultdict(list)
    for run in runs:
        for x in run.result.get("levels", ()):
            by_level[int(x["level"])].append(x)
    about = metrics.get(s.get("scores"), {"metric": "el2n"})
    ranked = s["subset"] in ("easy", "hard")
    metric = about["metric"] if ranked else "el2n"
    metric += f" at {about['rewind']}" if metric == "lmc" else ""
    return Curve(
        s["subset"],
        s.get("size") or 0,
        s.get("rewind", s.get("warmup", 0)),
        s["label_noise"],
        metric,
        {k: Stat.of([x["test_accuracy"] for x in v]) for k, v in sorted(by_level.items())},
        {k: float(np.mean([x["weights_remaining"] for x in v])) for k, v in by_level.items()},
        runs[0].name,
        runs,
    )


def pictures(runs: list[Run], stage: str, metrics: dict) -> Iterator[tuple[str, list[Curve]]]:
    """The configurations that belong in one picture, and its name: a model, and where runs of it
    differ in more than TOLD, that."""
    folders = defaultdict(list)
    for run in runs:
        if run.stage == stage:
            folders[run.model, run.name].append(run)
    models = defaultdict(lambda: defaultdict(list))
    for (model, _), replicates in folders.items():
        rest = {k: str(v) for k, v in replicates[0].settings.items() if k not in TOLD}
        models[model][tuple(sorted(rest.items()))].append(curve_of(replicates, metrics))
    for model, variants in models.items():
        differ = {k for a, b in itertools.pairwise(variants) for k, _ in set(a) ^ set(b)}
        for variant, curves in variants.items():
            told = "".join(f"-{k}{v}" for k, v in variant if k in differ)
            curves.sort(
                key=lambda c: (SUBSETS.index(c.subset), c.metric, c.size, c.rewind, c.noise)
            )
            yield model + "".join(c if c.isalnum() or c in "-_." else "+" for c in told), curves


@functools.cache
def paper_rows(name: str) -> list[dict]:
    if not (PAPER / name).exists():
        return []
    with open(PAPER / name, newline="") as f:
        return list(csv.DictReader(f))


def paper_stat(mean: str, sd: str, n: str) -> Stat:
    """The paper's deviations are population ones."""
    n = int(n)
    sample = float(sd) * math.sqrt(n / (n - 1)) if sd and n > 1 else math.nan
    return Stat(float(mean), sample, n)


@functools.cache
def paper_curves(dataset: str) -> dict[tuple, Curve]:
    """imp_curves.csv of a data set, by `Curve.key`."""
    curves: dict[tuple, Curve] = {}
    for r in paper_rows("imp_curves.csv"):
        if r["dataset"] == dataset:
            easy = r["method"] == "forgetting"
            subset, metric = ("easy", "forgetting") if easy else (r["method"], "el2n")
            size = 0 if r["subset_size"] == "full" else int(r["subset_size"])
            about = subset, size, int(r["rewind_steps"]), float(r["label_noise"]), metric
            curve = curves.setdefault(about, Curve(*about, {}, {}))
            stat = paper_stat(r["accuracy_mean"], r["accuracy_std"], r["replicates"])
            curve.points[int(r["level"])] = stat
            curve.remaining[int(r["level"])] = float(r["weights_remaining"])
    return curves


# ---- comparing -----------------------------------------------------------------------------------


def standard_error(a: Stat, b: Stat) -> float:
    """Of the difference of two means; NaN where one has no deviation."""
    return math.sqrt(a.sd**2 / a.n + b.sd**2 / b.n)


def welch(a: Stat, b: Stat) -> float:
    """Two-sided p of equal means; NaN where a deviation is missing or both are zero."""
    if math.isnan(a.sd + b.sd) or a.sd == b.sd == 0:
        return math.nan
    return float(stats.ttest_ind_from_stats(a.mean, a.sd, a.n, b.mean, b.sd, b.n, False).pvalue)


def verdict(a: dict[int, Stat], b: dict[int, Stat], levels: list[int]) -> str:
    """Of A over B (Definitions 3.1, 3.2); where there is no deviation no crossing is allowed."""
    gap = np.array([a[k].mean - b[k].mean for k in levels])
    slack = np.nan_to_num([standard_error(a[k], b[k]) for k in levels])
    if not levels:
        return "no common level"
    for sign, passive in ((1, False), (-1, True)):
        if (sign * gap > 0).all():
            return "is dominated" if passive else "dominates"
    above, below = (gap >= -slack).all(), (gap <= slack).all()
    if above and below:
        return "equal"
    if above or below:
        return "weakly dominates" if above else "is weakly dominated"
    return "neither"


def ranges(levels: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs = [
        [k for _, k in group]
        for _, group in itertools.groupby(enumerate(levels), lambda x: x[1] - x[0])
    ]
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs) or "none"


def matching(a: Curve, dense: Stat | None) -> str:
    """The levels at which A is as good as the dense network, within the standard error."""
    if dense is None:
        return "-"
    slack = {k: float(np.nan_to_num(standard_error(p, dense))) for k, p in a.points.items()}
    return ranges([k for k, p in a.points.items() if p.mean >= dense.mean - slack[k]])


def dense_of(curves: list[Curve]) -> Stat | None:
    full = [c for c in curves if c.subset == "all" and not c.noise and 0 in c.points]
    return max(full, key=lambda c: c.rewind).points[0] if full else None


def compare(a: Curve, b: Curve, dense: Stat | None, asked: tuple[int, ...] | None) -> dict:
    """One row of the table of verdicts."""
    shared = [k for k in a.points if k in b.points]
    levels = [k for k in shared if (k in asked if asked else k > 0)]
    gaps = {k: a.points[k].mean - b.points[k].mean for k in levels}
    smallest = min(gaps.values(), default=math.nan)
    return {
        "A": a.legend,
        "verdict": verdict(a.points, b.points, levels),
        "B": b.legend,
        "levels": ranges(levels),
        "weights_remaining": f"{a.remaining[levels[0]]:.1%} to {a.remaining[levels[-1]]:.1%}"
        if levels
        else "-",
        "A_above_at": ranges([k for k in levels if gaps[k] > 0]),
        "mean_difference": float(np.mean(list(gaps.values()))) if levels else math.nan,
        "smallest_difference": smallest,
        "A_matching_at": matching(a, dense),
        "B_matching_at": matching(b, dense),
    }


# ---- drawing -------------------------------------------------------------------------------------


def look(c: Curve, rivals: list[Curve] = ()) -> dict[str, Any]:
    """Colour, line and marker; among rivals of one subset the later are lighter."""
    kind = c.metric.split()[0] if c.metric != "el2n" else c.subset
    color, line, marker = LOOK.get(kind, LOOK["easy"])
    alike = [r.key for r in rivals if (r.subset, r.metric) == (c.subset, c.metric)]
    if len(alike) > 1 and c.key in alike:
        place = alike.index(c.key) / (len(alike) - 1)
        rgb = np.array(matplotlib.colors.to_rgb(color))
        color = tuple(rgb + (1 - rgb) * 0.6 * (1 - place))
        line = ("--", ":", "-.", "-")[alike.index(c.key) % 4] if c.subset == "all" else line
        marker = ("s", "D", "h", "*")[alike.index(c.key) % 4] if c.subset == "all" else marker
    return {"color": color, "linestyle": line, "marker": marker}


def draw(ax: Axes, x: list[float], y: list[Stat], style: dict, label: str | None) -> None:
    """Mean and band of one curve."""
    mean, sd = (np.array([getattr(p, k) for p in y]) for k in ("mean", "sd"))
    ax.plot(x, mean, ms=3.5, label=label, zorder=3, **style)
    ax.fill_between(x, mean - sd, mean + sd, color=style["color"], alpha=0.15, lw=0)


def draw_paper(ax: Axes, x: list[float], y: list[float], style: dict) -> None:
    """A curve of the paper: thin, behind, no markers; the first of a panel is in the legend."""
    first = "paper (thin)" not in ax.get_legend_handles_labels()[1]
    style = {k: v for k, v in style.items() if k != "marker"}
    ax.plot(x, y, lw=0.6, alpha=0.8, zorder=1, label="paper (thin)" if first else None, **style)


def panels(count: int, columns: int = 3, width: float = 3.1) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (width * columns, 2.5 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, list(axes.flat[:count])


def draw_levels(ax: Axes, curves: list[Curve], paper: dict, dense: Stat | None, title: str) -> None:
    """Accuracy against weights remaining, as in Figure 2."""
    for c in curves:
        style, levels = look(c, curves), list(c.points)
        if theirs := paper.get(c.key):
            draw_paper(
                ax,
                [theirs.remaining[k] for k in theirs.points],
                [p.mean for p in theirs.points.values()],
                style,
            )
        draw(ax, [c.remaining[k] for k in levels], [c.points[k] for k in levels], style, c.legend)
    if dense:
        ax.axhline(dense.mean, color="0.5", lw=0.8, ls=(0, (1, 2)), zorder=0)
    remaining = {k: v for c in curves for k, v in c.remaining.items()}
    chosen = sorted(remaining)[:: max(1, -(-len(remaining) // 8))]
    ax.set_xscale("log")
    ax.set_xticks([remaining[k] for k in chosen], [f"{100 * remaining[k]:.3g}" for k in chosen])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.invert_xaxis()
    ax.set(xlabel="weights remaining (%)", ylabel="test accuracy", title=title)
    ax.legend(loc="lower left")


@dataclasses.dataclass
class Results:
    runs: list[Run]
    metrics: dict[str, dict]
    paper: str | None  # --paper

    def pictures(self, stage: str) -> Iterator[tuple[str, list[Curve]]]:
        return pictures(self.runs, stage, self.metrics)

    def paper_of(self, curves: list[Curve]) -> str:
        """Whose data set of the paper stands behind these runs, by name: cifar10, cifar10-jpeg."""
        data = curves[0].runs[0].settings["dataset"]
        names = ("cifar100", "cifar10", "cinic10")
        return self.paper or next((p for p in names if f"{data}-".startswith(f"{p}-")), "")


Pictures = Iterator[tuple[str, Figure]]


def main_setting(curves: list[Curve]) -> tuple[int, int]:
    """Size and rewind step of Figure 2: the preset's, if they are there, else the most frequent."""
    ranked = [(c.size, c.rewind) for c in curves if c.subset in ("easy", "random", "hard")]
    preset = [(p.size, p.rewind) for p in common.PRESETS.values() if (p.size, p.rewind) in ranked]
    return (preset or [x for x, _ in Counter(ranked).most_common(1)] or [(0, 0)])[0]


def by_size(r: Results, noisy: bool, everything: bool) -> Pictures:
    """Figures 2, 4, 11, 13: a panel for each size, rewind step and noise."""
    for name, curves in r.pictures("imp"):
        paper, dense = paper_curves(r.paper_of(curves)), dense_of(curves)
        clean = [c for c in curves if c.metric == "el2n"]
        for_all = [c for c in clean if c.subset == "all"]
        chosen = main_setting(clean)
        asked = {(c.noise, c.rewind, c.size) for c in clean if c.subset != "all"}
        asked = sorted(x for x in asked if bool(x[0]) == noisy)
        if not everything and (main := [x for x in asked if x[1:] == chosen[::-1]]):
            asked = main
        elif not everything:
            asked = asked[:1]
        if not asked and not noisy and for_all:
            asked = [(0.0, 0, 0)]
        if not asked:
            continue
        figure, axes = panels(len(asked))
        for ax, (noise, rewind, size) in zip(axes, asked, strict=True):
            there = [c for c in for_all if c.noise == noise or c.rewind == 0]
            there += [
                c for c in clean if (c.noise, c.rewind, c.size) == (noise, rewind, size) and size
            ]
            told = f"{size} examples, step {rewind}" if size else "all data"
            draw_levels(ax, there, paper, dense, told + f", {noise:.0%} noise" * bool(noise))
        yield name, figure


def fig3(r: Results) -> Pictures:
    """Accuracy against subset size at three levels, a row for each rewind step."""
    for name, curves in r.pictures("imp"):
        clean = [c for c in curves if c.metric == "el2n" and not c.noise and c.points]
        paper = paper_curves(r.paper_of(curves))
        ranked = [c for c in clean if c.subset != "all"]
        steps = [
            t
            for t in sorted({c.rewind for c in ranked})
            if len({c.size for c in ranked if c.rewind == t}) > 1
        ]
        if not steps:
            continue
        last = min(max(c.points) for c in ranked)
        levels = sorted({last, -(-2 * last // 3), -(-last // 3)})
        figure, axes = panels(len(steps) * len(levels), len(levels))
        for ax, (t, k) in zip(axes, itertools.product(steps, levels), strict=True):
            for subset in SUBSETS[1:]:
                style = look(Curve(subset, 0, 0, 0, "el2n", {}, {}))
                ours = sorted(
                    (c for c in ranked if (c.subset, c.rewind) == (subset, t)), key=lambda c: c.size
                )
                theirs = sorted(
                    (
                        c
                        for c in paper.values()
                        if (c.subset, c.rewind, c.noise, c.metric) == (subset, t, 0, "el2n")
                        and k in c.points
                    ),
                    key=lambda c: c.size,
                )
                draw_paper(
                    ax, [c.size for c in theirs], [c.points[k].mean for c in theirs], style
                ) if theirs else None
                ours = [c for c in ours if k in c.points]
                if ours:
                    n = "-".join(map(str, sorted({c.points[k].n for c in ours})))
                    draw(
                        ax,
                        [c.size for c in ours],
                        [c.points[k] for c in ours],
                        style,
                        f"{subset} (n={n})",
                    )
            full = [c for c in clean if c.subset == "all" and k in c.points]
            for c in full:
                style = look(c, full)
                ax.axhline(
                    c.points[k].mean,
                    color=style["color"],
                    ls=style["linestyle"],
                    lw=0.9,
                    label=c.legend,
                )
            sizes = sorted({c.size for c in ranked if c.rewind == t})
            ax.set_xscale("log", base=2)
            ax.set_xticks(sizes, [str(m) for m in sizes], rotation=30)
            ax.xaxis.set_minor_formatter(NullFormatter())
            remaining = next(c.remaining[k] for c in ranked if k in c.points)
            ax.set(
                xlabel=f"examples trained on for {t} steps",
                ylabel="test accuracy",
                title=f"{remaining:.1%} of weights remaining",
            )
            ax.legend()
        yield name, figure


def load(path: Path) -> np.ndarray | None:
    """An .npy of a run, or None with a line on stderr."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        print(f"skipped: {path} ({common.one_line(e)})", file=sys.stderr)
        return None


def outline(ax: Axes, values: list[np.ndarray], edges: np.ndarray, style: dict, label: str) -> None:
    """Shares of pooled values in bins, as a stepped line; outliers count in the last bins."""
    pooled = np.concatenate([v.ravel() for v in values])
    share = np.histogram(pooled.clip(edges[0], edges[-1]), edges)[0] / len(pooled)
    ax.stairs(share, edges, color=style["color"], ls=style["linestyle"], lw=1.2, label=label)


def correlation(x: list[float], y: list[float]) -> str:
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return f"n={len(x)}"
    rank, plain = stats.spearmanr(x, y).statistic, stats.pearsonr(x, y).statistic
    return f"Pearson {plain:.2f}, Spearman {rank:.2f}, n={len(x)}"


def barrier_points(r: Results, curves: list[Curve], level: int) -> list[dict]:
    """One row per replicate: barriers at w_tr, and the accuracy imp reached from that w_tr."""
    final = {}
    for run in r.runs:
        if run.stage == "imp" and "pretrain" in run.result:
            reached = [x["test_accuracy"] for x in run.result["levels"] if x["level"] == level]
            if reached:
                final[run.result["pretrain"]["fingerprint"], run.settings["steps"]] = reached[0]
    return [
        {
            "configuration": c.label,
            "replicate": run.settings["replicate"],
            "curve": c,
            "loss_barrier": run.result["loss_barrier"],
            "error_barrier": run.result["error_barrier"],
            "connected": run.result["connected"],
            "pretrain_accuracy": run.result["pretrain"]["test_accuracy"],
            "final_accuracy": final.get(
                (run.result["pretrain"]["fingerprint"], run.settings["steps"])
            ),
        }
        for c in curves
        for run in c.runs
        if run.done
    ]


def final_level(r: Results, model: str) -> int:
    """7, as in Figure 5, or the last level that the runs of this model have."""
    last = [len(x.result["levels"]) - 1 for x in r.runs if x.stage == "imp" and x.model == model]
    return min([7, *last])


def fig5(r: Results) -> Pictures:
    for name, curves in r.pictures("lmc"):
        curves = [c for c in curves if any(run.done for run in c.runs)]
        paper, rows = r.paper_of(curves) if curves else "", []
        if curves:
            level = final_level(r, curves[0].runs[0].model)
            rows = barrier_points(r, curves, level)
        if not rows:
            continue
        figure, (left, middle, right) = panels(3)
        edges = np.arange(-5, 10.5, 0.5)
        theirs = defaultdict(list)
        for x in paper_rows("lmc_histograms.csv"):
            if x["dataset"] == paper:
                theirs[x["pretraining"]].append(int(x["count_of_1080000"]))
        size = main_setting(curves)[0]
        shown = [c for c in curves if c.size in (0, size) and c.metric == "el2n"]
        for c in shown:
            pairs = [load(run.folder / "loss_barrier_pairs.npy") for run in c.runs if run.done]
            if pairs := [p for p in pairs if p is not None]:
                outline(left, pairs, edges, look(c, shown), c.legend)
            what = "all data" if c.subset == "all" else f"{c.subset} {c.size}"
            if counts := theirs.get(f"{what}, {c.rewind} it"):
                share = np.array(counts) / sum(counts)
                label = f"paper: {what}, {c.rewind}"
                left.stairs(share, edges, color=look(c, shown)["color"], lw=0.5, label=label)
        left.set(yscale="log", xlabel="loss barrier of a training example", ylabel="share")
        left.set_title("outliers in the last bins")
        joined = [x for x in rows if x["final_accuracy"] is not None]
        for ax, key, told in (
            (middle, "pretrain_accuracy", "test accuracy at w_tr"),
            (right, "loss_barrier", "mean loss barrier"),
        ):
            column = {"loss_barrier": "mean_train_loss_barrier"}.get(key, "pretrain_test_accuracy")
            known = [
                (float(x[column]), float(x["final_test_accuracy_level7"]), x["subset_method"])
                for x in paper_rows("lmc_scatter.csv")
                if x["dataset"] == paper
                and x[column]
                and not x["final_test_accuracy_level7"].startswith("<")
            ]
            for kind in sorted({k for *_, k in known}):
                at = [(a, b) for a, b, k in known if k == kind]
                told_paper = {"s": 9, "alpha": 0.6, "lw": 0.5, "facecolors": "none", "zorder": 1}
                style = {"edgecolors": LOOK[kind][0], "marker": LOOK[kind][2]}
                ax.scatter(*zip(*at, strict=True), label=f"paper: {kind}", **told_paper, **style)
            for c in curves:
                at = [(x[key], x["final_accuracy"]) for x in joined if x["curve"] is c]
                if at:
                    style = look(c, curves)
                    ax.scatter(
                        *zip(*at, strict=True),
                        s=22,
                        color=style["color"],
                        marker=style["marker"],
                        label=c.label,
                    )
            found = correlation([x[key] for x in joined], [x["final_accuracy"] for x in joined])
            ax.set(xlabel=told, ylabel=f"test accuracy at level {level}", title=found)
        right.legend(fontsize=5)
        yield name, figure


def fig6(r: Results) -> Pictures:
    for name, curves in r.pictures("warmup"):
        curves = [c for c in curves if any(run.done for run in c.runs) and not c.noise]
        sizes = sorted({c.size for c in curves if c.subset != "all"}) or [0]
        longest = max((c.rewind for c in curves), default=0)
        typical = 1600 if any(c.rewind == 1600 for c in curves) else longest
        if not curves:
            continue
        figure, axes = panels(2 * len(sizes), len(sizes))
        for i, size in enumerate(sizes):
            top, bottom = axes[i], axes[i + len(sizes)]
            for subset in SUBSETS:
                style = look(Curve(subset, 0, 0, 0, "el2n", {}, {}))
                of = [c for c in curves if c.subset == subset and c.size in (0, size)]
                of = sorted((c for c in of if c.metric == "el2n"), key=lambda c: c.rewind)
                if r.paper_of(curves) == "cifar10":
                    told = "50000" if subset == "all" else str(size)
                    rows = [
                        x
                        for x in paper_rows("warmup_curves.csv")
                        if (x["experiment"], x["subset_type"], x["subset_size"])
                        == ("fig6", subset, told)
                    ]
                    if rows:
                        draw_paper(
                            top,
                            [int(x["warmup_steps"]) for x in rows],
                            [float(x["test_accuracy_mean"]) for x in rows],
                            style,
                        )
                points, bad, total = {}, 0, 0
                for c in of:
                    results = [run.result for run in c.runs if run.done]
                    good = [x["test_accuracy"] for x in results if x["outcome"] == "trained"]
                    bad, total = bad + len(results) - len(good), max(total, len(results))
                    if good:
                        points[c.rewind] = Stat.of(good)
                lost = f", {bad} not trained" if bad else ""
                if points:
                    draw(
                        top,
                        list(points),
                        list(points.values()),
                        style,
                        f"{subset} (n={total}{lost})",
                    )
                for c in of:
                    if c.rewind not in (0, typical) or (c.rewind == 0) != (
                        subset == "all" and c.rewind == 0
                    ):
                        continue
                    draw_sharpness(bottom, c, style if c.rewind else {**style, "color": "0.6"})
            top.set(
                xlabel="steps of warmup",
                ylabel="test accuracy",
                title=f"{size} examples" if size else "all data",
            )
            bottom.set(xlabel="step", ylabel="top Hessian eigenvalue", yscale="symlog")
            top.legend()
            if bottom.lines:
                bottom.legend()
            bottom.set_title(f"warmup of {typical} steps, and none")
        yield name, figure


def draw_sharpness(ax: Axes, c: Curve, style: dict) -> None:
    by_step = defaultdict(list)
    for run in c.runs:
        for x in run.result.get("sharpness", ()):
            if x["eigenvalue"] is not None:
                by_step[x["step"]].append(x["eigenvalue"])
    if by_step:
        n = max(map(len, by_step.values()))
        label = f"{c.subset}, {c.rewind} steps (n={n})"
        draw(ax, sorted(by_step), [Stat.of(by_step[s]) for s in sorted(by_step)], style, label)


def fig7(r: Results) -> Pictures:
    kinds = {
        "test_accuracy": "test accuracy",
        "train_accuracy": "accuracy on all training data",
        "easy_accuracy": "accuracy on the easy examples",
        "coherence": "cosine of gradients with their mean",
    }
    for name, curves in r.pictures("pretrain"):
        logs = {c.label: [read_table(run.folder / "log.csv") for run in c.runs] for c in curves}
        longest = max(c.rewind for c in curves)
        curves = [c for c in curves if c.rewind == longest and any(logs[c.label])]
        there = [
            k
            for k in kinds
            if any(row.get(k) for c in curves for log in logs[c.label] for row in log)
        ]
        if not there:
            continue
        figure, axes = panels(len(there), 2)
        for ax, kind in zip(axes, there, strict=True):
            for c in curves:
                by_step = defaultdict(list)
                for row in itertools.chain(*logs[c.label]):
                    if row.get(kind):
                        by_step[int(row["step"])].append(float(row[kind]))
                if by_step:
                    style = {**look(c, curves), "markevery": max(1, len(by_step) // 8)}
                    at = sorted(by_step)
                    draw(ax, at, [Stat.of(by_step[s]) for s in at], style, c.legend)
            ax.set(xlabel="step", ylabel=kinds[kind])
        axes[0].legend()
        yield name, figure


def read_table(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def fig8(r: Results) -> Pictures:
    for name, curves in r.pictures("pretrain"):
        files = {c.label: [x.folder / "gradient_norm.npy" for x in c.runs] for c in curves}
        norms = {k: [load(p)[:200] for p in v if p.exists()] for k, v in files.items()}
        curves = [c for c in curves if norms[c.label]]
        if not curves:
            continue
        short = min(c.rewind for c in curves)
        curves = [c for c in curves if c.rewind == short]
        highest = max(x.max() for c in curves for x in norms[c.label])
        figure, [ax] = panels(1, width=4)
        for c in curves:
            edges = np.linspace(0, highest, 41)
            outline(ax, norms[c.label], edges, look(c, curves), c.legend)
        told = f"norm of a minibatch gradient, first {min(200, short)} steps"
        ax.set(xlabel=told, ylabel="share")
        ax.legend()
        yield name, figure


def fig9(r: Results) -> Pictures:
    for name, curves in r.pictures("imp"):
        size, rewind = main_setting(curves)
        curves = [c for c in curves if c.metric == "el2n" and not c.noise and c.points]
        curves = [c for c in curves if c.rewind == rewind and c.size in (0, size)]
        if not curves:
            continue
        last = min(6, *(max(c.points) for c in curves))
        figure, axes = panels(2, width=3.6)
        for ax, level in zip(axes, (0, last), strict=True):
            for c in curves:
                found = []
                for run in c.runs:
                    try:
                        state = common.read_tensors(run.folder / f"level{level:02d}.pt")
                        found.append(state["projected_error"].numpy())
                    except (common.UserError, KeyError) as e:
                        print(f"skipped: {e}", file=sys.stderr)
                if found:
                    outline(ax, found, np.linspace(0, math.sqrt(2), 41), look(c, curves), c.legend)
            told = f"under the mask of level {level}" if level else "dense"
            ax.set(xlabel="||softmax - onehot|| of an example at w_tr", ylabel="share", title=told)
            ax.legend()
        yield name, figure


def rivals(r: Results, metric: str) -> Pictures:
    """Figures 10 and 12: other scores against EL2N, and pruning after pre-training by them."""
    for name, curves in r.pictures("imp"):
        model, paper = curves[0].runs[0].model, paper_curves(r.paper_of(curves))
        mine = [m for m in r.metrics.values() if m["folder"].parts[-2] == model]
        other = [m for m in mine if m["metric"] == metric and not m["label_noise"][0]]
        el2n = [m for m in mine if m["metric"] == "el2n" and not m["label_noise"][0]]
        if metric == "lmc":  # those of all data
            other = [m for m in other if m["folder"].name.startswith("all")]
        pairs = [(a, b) for a in other for b in el2n if a["data"] == b["data"]]
        by = [c for c in curves if c.metric.split()[0] == metric and c.points]
        if not pairs and not by:
            continue
        sizes = {(c.size, c.rewind) for c in by}
        wanted = [c for c in curves if c.metric == "el2n" and not c.noise and c.points]
        wanted = [
            c
            for c in wanted
            if c.subset == "all" or (c.subset == "easy" and (c.size, c.rewind) in sizes)
        ]
        figure, axes = panels(len(pairs) + len(sizes))
        for ax, (a, b) in zip(axes, pairs, strict=False):
            x, y = load(b["folder"] / "scores.npy"), load(a["folder"] / "scores.npy")
            if x is None or y is None:
                continue
            ax.hexbin(x, y, gridsize=40, bins="log", cmap="Greys", mincnt=1, lw=0.1)
            ax.set(
                xlabel="EL2N score",
                ylabel=f"{metric} score ({a['folder'].name.split('-steps')[0]})",
            )
            ax.set_title(correlation(list(x), list(y)))
        for ax, (size, rewind) in zip(axes[len(pairs) :], sorted(sizes), strict=True):
            there = [
                c
                for c in [*wanted, *by]
                if c.subset == "all" or (c.size, c.rewind) == (size, rewind)
            ]
            draw_levels(ax, there, paper, dense_of(curves), f"{size} examples, step {rewind}")
        yield name, figure


FIGURES: dict[str, tuple[str, Callable[[Results], Pictures]]] = {
    "fig2": ("imp", lambda r: by_size(r, False, False)),
    "fig3": ("imp", fig3),
    "fig4": ("imp", lambda r: by_size(r, True, False)),
    "fig5": ("lmc", fig5),
    "fig6": ("warmup", fig6),
    "fig7": ("pretrain", fig7),
    "fig8": ("pretrain", fig8),
    "fig9": ("imp", fig9),
    "fig10": ("lmc", lambda r: rivals(r, "lmc")),
    "fig11": ("imp", lambda r: by_size(r, False, True)),
    "fig12": ("imp", lambda r: rivals(r, "forgetting")),
    "fig13": ("imp", lambda r: by_size(r, True, True)),
}

# ---- tables --------------------------------------------------------------------------------------


def against(ours: Stat, theirs: Stat | None) -> dict:
    """The columns that every table shares."""
    told = {"ours": ours.mean, "sd": ours.sd, "n": ours.n}
    if theirs is None:
        return told | dict.fromkeys(
            ("paper", "paper_sd", "paper_n", "difference", "standard_error", "welch_p"), math.nan
        )
    gap = {"difference": ours.mean - theirs.mean, "standard_error": standard_error(ours, theirs)}
    paper = {"paper": theirs.mean, "paper_sd": theirs.sd, "paper_n": theirs.n}
    return told | paper | gap | {"welch_p": welch(ours, theirs)}


def tables(r: Results, asked: tuple[int, ...] | None) -> Iterator[tuple[str, list[dict]]]:
    for name, curves in r.pictures("imp"):
        paper, dense = paper_curves(r.paper_of(curves)), dense_of(curves)
        curves = [c for c in curves if c.points]
        yield (
            f"imp-{name}",
            [
                {"configuration": c.legend, "level": k, "weights_remaining": c.remaining[k]}
                | against(p, paper[c.key].points.get(k) if c.key in paper else None)
                for c in curves
                for k, p in c.points.items()
            ],
        )
        baselines = [c for c in curves if c.subset == "all"]
        rows = [
            compare(a, b, dense, asked)
            for a in curves
            for b in baselines
            if a is not b and (a.subset != "all" or a.rewind > b.rewind)
        ]
        if rows:
            yield f"verdicts-{name}", rows
    for name, curves in r.pictures("lmc"):
        points = barrier_points(r, curves, final_level(r, curves[0].runs[0].model))
        if points:
            yield f"lmc-{name}", [{k: v for k, v in x.items() if k != "curve"} for x in points]
    for name, curves in r.pictures("warmup"):
        rows = []
        for c in curves:
            results = [x.result for x in c.runs if x.done]
            good = [x["test_accuracy"] for x in results if x["outcome"] == "trained"]
            if good:
                told = {"subset": c.subset, "size": c.size, "warmup": c.rewind}
                told["not_trained"] = len(results) - len(good)
                rows.append(told | against(Stat.of(good), paper_warmup(r, c)))
        if rows:
            yield f"warmup-{name}", rows


def paper_warmup(r: Results, c: Curve) -> Stat | None:
    if r.paper_of([c]) != "cifar10" or c.metric != "el2n":
        return None
    key = ("fig6", c.subset, "50000" if c.subset == "all" else str(c.size), str(c.rewind))
    for x in paper_rows("warmup_curves.csv"):
        if (x["experiment"], x["subset_type"], x["subset_size"], x["warmup_steps"]) == key:
            return paper_stat(x["test_accuracy_mean"], x["test_accuracy_std"], x["n_replicates"])
    return None


def cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.5g}"
    return "" if value is None else str(value)


def write_table(path: Path, rows: list[dict]) -> None:
    """The same rows as CSV and as Markdown."""
    lines = [[*rows[0]], *([cell(v) for v in row.values()] for row in rows)]
    text = ["| " + " | ".join(x) + " |" for x in lines]
    text.insert(1, "|" + "---|" * len(rows[0]))
    common.write(path.with_suffix(".md"), lambda f: f.write(("\n".join(text) + "\n").encode()))

    def fill(f) -> None:
        quoted = (",".join(f'"{v}"' if "," in v or '"' in v else v for v in x) for x in lines)
        f.write(("\n".join(quoted) + "\n").encode())

    common.write(path.with_suffix(".csv"), fill)


# ---- what is missing -----------------------------------------------------------------------------


def expected(dataset: str) -> list[tuple]:
    """Keys of the curves that the paper has of a data set; of others those of Figure 2."""
    if found := list(paper_curves(dataset)):
        return [k for k in found if k[4] == "el2n"]
    p = common.PRESETS["digits"]
    full = [("all", 0, t, 0.0, "el2n") for t in (0, p.rewind, 2 * p.rewind)]
    return full + [(s, p.size, p.rewind, 0.0, "el2n") for s in SUBSETS[1:]]


def missing_curves(r: Results, dataset: str) -> list[str]:
    """Commands that make the curves of `expected` which results/ has not, or not all levels of."""
    have = {}
    for _, curves in r.pictures("imp"):
        have |= {c.key: c for c in curves if c.runs[0].settings["dataset"] == dataset}
    commands = []
    for key in expected(r.paper or dataset):
        subset, size, rewind, noise, _ = key
        if key not in have and not (rewind == 0 and noise):
            what = ["imp.py", "--dataset", dataset, "--subset", subset, "--rewind", str(rewind)]
            what += ["--size", str(size)] * (subset != "all")
            what += ["--label-noise", f"{noise:g}"] * bool(noise)
            commands.append(shlex.join(["python", *what, "--replicate", "0-3"]))
    return commands


def rates(runs: list[Run]) -> dict[str, float]:
    """Network-steps per second of each model, the median over its levels. Replicates of one folder
    with the same seconds trained side by side."""
    found = defaultdict(list)
    for (model, _), group in itertools.groupby(runs, lambda x: (x.model, x.name)):
        levels = [x for run in group if run.stage == "imp" for x in run.result["levels"]]
        beside = Counter((x["level"], x["seconds"]) for x in levels)
        rate = [x["steps_per_second"] * beside[x["level"], x["seconds"]] for x in levels]
        found[model] += rate
    return {model: float(np.median(rate)) for model, rate in found.items() if rate}


# ---- command line --------------------------------------------------------------------------------


def flags() -> common.Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = common.Parser(description=__doc__, formatter_class=raw)
    parser.add_argument("figure", nargs="*", help=f"of {', '.join(FIGURES)} [all]")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where results are")
    parser.add_argument("--figures", type=Path, help="where pictures go [OUT/figures]")
    parser.add_argument("--dataset", action="append", help="only of this data set")
    told = "whose curves of the paper to draw behind, of runs on other data: cifar10, ..."
    parser.add_argument("--paper", choices=("cifar10", "cifar100", "cinic10"), help=told)
    told = "the verdict of one folder of results/imp/MODEL/ over another, and nothing else"
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help=told)
    told = "at which verdicts are given, such as 3-12 [all but 0]"
    parser.add_argument("--levels", type=common.numbers, help=told)
    told = "print the measured network-steps per second of each model, and nothing else"
    parser.add_argument("--rates", action="store_true", help=told)
    return parser


def compare_two(r: Results, a: str, b: str, asked: tuple[int, ...] | None) -> list[dict]:
    """--compare: folders by name, or by the end of their path where several models have it."""
    rows, named = [], defaultdict(list)
    for _, curves in r.pictures("imp"):
        for wanted in (a, b):
            for c in curves:
                if c.runs[0].folder.parent.as_posix().endswith(f"/{wanted.strip('/')}"):
                    named[wanted].append((c, curves))
    for wanted in (a, b):
        if len(named[wanted]) != 1:
            paths = [str(c.runs[0].folder.parent) for c, _ in named[wanted]]
            told = f"{len(paths)} of that name: {', '.join(paths)}" if paths else "no such run"
            raise common.UserError(f"--compare {wanted}: {told} below results/imp/")
    [(first, curves)], [(second, _)] = named[a], named[b]
    rows.append(compare(first, second, dense_of(curves), asked))
    return rows


def main(args: argparse.Namespace) -> dict:
    """Draws, writes, says what is missing; returns the paths written and the commands missing."""
    if unknown := [f for f in args.figure if f not in FIGURES]:
        raise common.UserError(f"{unknown[0]}: not one of {', '.join(FIGURES)}")
    runs, written, lacking = read_runs(args.out), [], []
    if args.dataset:
        runs = [run for run in runs if run.settings["dataset"] in args.dataset]
    r = Results(runs, read_metrics(args.out), args.paper)
    if args.rates:
        print("\n".join(f"{model} {rate:.1f}" for model, rate in rates(runs).items()))
        return rates(runs)
    if args.compare:
        rows = compare_two(r, *args.compare, args.levels)
        print("\n".join(f"{k:20} {cell(v)}" for row in rows for k, v in row.items()))
        return {"rows": rows}
    folder = args.figures or args.out / "figures"
    datasets = args.dataset or sorted({run.settings["dataset"] for run in runs})
    for number in args.figure or FIGURES:
        stage, make = FIGURES[number]
        drawn = set()
        for name, figure in make(r):
            figure.suptitle(f"{number}  {name}", fontsize=8, x=0.01, ha="left")
            for kind in ("png", "svg"):
                path = folder / f"{number}-{name}.{kind}"
                bare = {"Date": None} if kind == "svg" else {}
                save = functools.partial(figure.savefig, format=kind, dpi=160, metadata=bare)
                common.write(path, save)
            plt.close(figure)
            written.append(path.with_suffix(".png"))
            drawn.add(name)
        for dataset in datasets:
            if not any(name.startswith(f"{dataset}-resnet") for name in drawn):
                told = f"bash run_all.sh --only {number} --dataset {shlex.quote(dataset)}"
                lacking.append(f"{number} of {dataset} lacks {stage} runs: {told}")
    if not args.figure:
        for name, rows in tables(r, args.levels):
            write_table(folder / name, rows)
            written.append(folder / f"{name}.md")
    for dataset in datasets:
        commands = missing_curves(r, dataset)
        if commands and {"fig2", "fig3", "fig11"} & set(args.figure or FIGURES):
            told = f"{dataset} lacks {len(commands)} of the paper's curves, first {commands[0]}"
            lacking.append(f"{told}; all: bash run_all.sh --dataset {shlex.quote(dataset)}")
    for other in ("cifar10", "cifar100", "cinic10") if not args.dataset else ():
        if other not in datasets:
            lacking.append(f"{other}: no runs yet: bash run_all.sh --dataset {other}")
    print("\n".join(f"missing: {x}" for x in lacking), file=sys.stderr)
    print("\n".join(map(str, written)))
    if args.figure and not written:
        raise common.UserError(f"nothing to draw {', '.join(args.figure)} from in {args.out}")
    return {"written": written, "missing": lacking}


if __name__ == "__main__":
    common.run_stage(main, flags())
