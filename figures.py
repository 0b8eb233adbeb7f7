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
import io
import itertools
import math
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
from scipy import stats

import common

STAGES = ("imp", "pretrain", "lmc", "warmup")
PAPER, SOURCE = common.HERE / "paper", "Paul et al. 2022"
SUBSETS = ("all", "easy", "random", "hard")
LOOK = {  # colour, line, marker; dark to light, so that they differ in grey too
    "all": ("#000000", "--", "s"),
    "easy": ("#12408f", "-", "o"),
    "random": ("#d1641b", "-.", "^"),
    "hard": ("#3fae8c", (0, (4, 1, 1, 1, 1, 1)), "v"),
    "lmc": ("#8e44ad", (0, (5, 1)), "P"),
    "forgetting": ("#b03060", (0, (1, 1)), "X"),
}
# What tells the curves of one picture apart; runs that differ in anything else get one each.
TOLD = {"subset", "size", "offset", "balance", "scores", "label_noise", "rewind", "replicate"}
TOLD |= {"track", "every", "warmup", "pretrain_lr", "prune_fraction"}
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


def summary(values: list[float]) -> Stat:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Stat(float(np.mean(values)), sd, len(values))


@dataclasses.dataclass
class Curve:
    """The replicates of one configuration, ours or the paper's, with test accuracy by level."""

    subset: str
    size: int
    rewind: int  # of warmup runs, its length
    noise: float
    metric: str
    points: dict[int, Stat]
    remaining: dict[int, float]
    runs: list[Run] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> tuple:
        return self.subset, self.size, self.rewind, self.noise, self.metric

    @property
    def label(self) -> str:
        what = self.subset if self.subset == "all" else f"{self.subset} {self.size}"
        by = f" {self.metric}" if self.metric != "el2n" else ""
        return f"{what}{by}, step {self.rewind}" + f", {self.noise:.0%} noise" * bool(self.noise)

    @property
    def legend(self) -> str:
        n = sorted({p.n for p in self.points.values()} or {len(self.runs)})
        going = "*" if any(not r.done for r in self.runs) else ""
        return f"{self.label} (n={'-'.join(map(str, n[:: max(1, len(n) - 1)]))}){going}"


def read_table(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def read_log(path: Path) -> list[dict]:
    """The rows of a log.csv, as they are written; UserError if it is not one, whole."""
    try:
        rows = read_table(path)
        for x in rows:
            _ = x["phase"].lower(), int(x["step"])
            _ = [float(v) for k, v in x.items() if k != "phase" and v]
    except (ValueError, TypeError, LookupError, AttributeError, csv.Error) as e:
        raise common.UserError(f"{path} is damaged ({common.one_line(e)})") from e
    return rows


def read_run(config: Path) -> Run:
    """The run of a config.json; KeyError, TypeError or ValueError if it is not one of ours."""
    folder = config.parent
    stage, model, name = folder.parts[-4:-1]
    done = (folder / "result.json").exists()
    value = common.read_json(folder / "result.json" if done else config)
    settings = (value["config"] if done else value)["settings"]
    if not done and stage == "imp":
        rows = [x for x in read_log(folder / "log.csv") if x["phase"].startswith("level")]
        value["levels"] = [{k: float(v) for k, v in x.items() if k != "phase" and v} for x in rows]
    for key in ("dataset", "subset", "label_noise", "steps", "replicate"):
        settings[key]
    if stage == "imp":
        numbers = ("level", "test_accuracy", "weights_remaining")
        value["levels"] = [x | {k: float(x[k]) for k in numbers} for x in value["levels"]]
    return Run(stage, model, name, folder, settings, value, done)


def read_runs(out: Path) -> list[Run]:
    """Every run below results/; damaged and foreign files are named on stderr and left out, and so
    are runs that could not go on, but for the levels of imp."""
    runs = []
    for path in sorted(p for s in STAGES for p in out.glob(f"{s}/*/*/rep*/config.json")):
        try:
            run = read_run(path)
        except common.UserError as e:
            print(f"skipped: {e}", file=sys.stderr)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as e:
            print(f"skipped: {path.parent}: not one of our runs ({e!r})", file=sys.stderr)
        else:
            if run.result.get("ended") is None or run.stage == "imp":
                runs.append(run)
    return runs


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


def metric_of(run: Run, metrics: dict[str, dict]) -> str:
    """By what a subset was chosen: "el2n" for the usual way, and whatever is unusual."""
    s = run.settings
    if s.get("init"):
        return run.name.split("-rewind")[0]
    about = metrics.get(s.get("scores")) if s["subset"] in ("easy", "hard") else None
    metric = about["metric"] if about else "el2n"
    told = [f"lmc {about['rewind']}" if metric.startswith("lmc") else metric]
    told += ["balanced"] * bool(s.get("balance")) + [f"from {o}" for o in [s.get("offset")] if o]
    return " ".join(told)


def make_curve(runs: list[Run], metrics: dict[str, dict]) -> Curve:
    """The replicates of one folder."""
    s, by_level = runs[0].settings, defaultdict(list)
    for x in itertools.chain(*(run.result.get("levels", ()) for run in runs)):
        by_level[int(x["level"])].append(x)
    points = {k: summary([x["test_accuracy"] for x in by_level[k]]) for k in sorted(by_level)}
    remaining = {k: by_level[k][0]["weights_remaining"] for k in points}
    step, metric = s.get("rewind", s.get("warmup", 0)), metric_of(runs[0], metrics)
    size, noise = s.get("size") or 0, s["label_noise"]
    return Curve(s["subset"], size, step, noise, metric, points, remaining, runs)


def pictures(runs: list[Run], stage: str, metrics: dict) -> Iterator[tuple[str, list[Curve]]]:
    """The configurations that belong in one picture, and its name: a model, and where runs of it
    differ in more than TOLD, in what."""
    folders, models = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.stage == stage:
            folders[run.model, run.name].append(run)
    for (model, _), group in folders.items():
        rest = sorted((k, str(v)) for k, v in group[0].settings.items() if k not in TOLD)
        models[model][tuple(rest)].append(make_curve(group, metrics))
    for model, variants in models.items():
        differ = {k for a, b in itertools.combinations(variants, 2) for k, _ in set(a) ^ set(b)}
        for variant, curves in variants.items():
            told = "".join(f"-{k}{v}" for k, v in variant if k in differ)
            curves.sort(key=lambda c: (SUBSETS.index(c.subset), *c.key[1:]))
            yield model + "".join(c if c.isalnum() or c in "-_." else "+" for c in told), curves


@functools.cache
def paper_rows(name: str) -> list[dict]:
    return read_table(PAPER / name)


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
            key = kind[0], size, int(r["rewind_steps"]), float(r["label_noise"]), kind[1]
            c, k = curves.setdefault(key, Curve(*key, {}, {})), int(r["level"])
            c.points[k] = paper_stat(r["accuracy_mean"], r["accuracy_std"], r["replicates"])
            c.remaining[k] = float(r["weights_remaining"])
    return curves


def paper_warmup(subset: str, size: int) -> dict[int, Stat]:
    """Figure 6: accuracy by length of warmup."""
    key = ("fig6", subset, "50000" if subset == "all" else str(size))
    rows = [
        x
        for x in paper_rows("warmup_curves.csv")
        if (x["experiment"], x["subset_type"], x["subset_size"]) == key
    ]
    stat = ("test_accuracy_mean", "test_accuracy_std", "n_replicates")
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


def verdict(a: dict[int, Stat], b: dict[int, Stat], levels: list[int]) -> str:
    """Of A over B (Definitions 3.1, 3.2); where there is no deviation no crossing is allowed."""
    if not levels:
        return "no common level"
    gap = np.array([a[k].mean - b[k].mean for k in levels])
    slack = np.nan_to_num([standard_error(a[k], b[k]) for k in levels])
    if (gap > 0).all() or (gap < 0).all():
        return "dominates" if gap[0] > 0 else "is dominated"
    match bool((gap >= -slack).all()), bool((gap <= slack).all()):
        case True, True:
            return "equal"
        case True, False:
            return "weakly dominates"
        case False, True:
            return "is weakly dominated"
    return "neither"


def ranges(levels: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for k in sorted(levels):
        if spans and spans[-1][-1] == k - 1:
            spans[-1].append(k)
        else:
            spans.append([k])
    return ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else f"{s[0]}" for s in spans) or "none"


def matching(points: dict[int, Stat], dense: Stat | None) -> str:
    """The levels that are as good as the dense network, within the standard error."""
    if dense is None:
        return "-"
    slack = {k: np.nan_to_num(standard_error(p, dense)) for k, p in points.items()}
    return ranges(k for k, p in points.items() if p.mean >= dense.mean - slack[k])


def dense_of(curves: list[Curve]) -> Stat | None:
    full = [c for c in curves if c.key[0] == "all" and c.key[3:] == (0, "el2n") and 0 in c.points]
    return max(full, key=lambda c: c.rewind).points[0] if full else None


def compare(a: Curve, b: Curve, dense: Stat | None, asked: tuple[int, ...] | None) -> dict:
    """One row of the table of verdicts."""
    levels = [k for k in a.points if k in b.points and (k in asked if asked else k > 0)]
    gaps = {k: a.points[k].mean - b.points[k].mean for k in levels}
    ends = [f"{a.remaining[k]:.1%}" for k in (levels[:1] + levels[-1:])]
    return {
        "A": a.legend,
        "verdict": verdict(a.points, b.points, levels),
        "B": b.legend,
        "levels": ranges(levels),
        "weights_remaining": " to ".join(ends),
        "A_above_at": ranges(k for k in levels if gaps[k] > 0),
        "mean_difference": float(np.mean([*gaps.values()])) if levels else math.nan,
        "smallest_difference": min(gaps.values(), default=math.nan),
        "A_matching_at": matching(a.points, dense),
        "B_matching_at": matching(b.points, dense),
    }


# ---- drawing -------------------------------------------------------------------------------------


def look(c: Curve, among: list[Curve] = ()) -> dict[str, Any]:
    """Colour, line and marker; of curves of one kind the earlier are lighter."""
    kind = c.metric.split()[0]
    color, line, marker = LOOK.get(c.subset if kind == "el2n" else kind, LOOK["easy"])
    alike = [r.key for r in among if (r.subset, r.metric) == (c.subset, c.metric)]
    if len(alike) > 1 and c.key in alike:
        k, rgb = alike.index(c.key), np.array(matplotlib.colors.to_rgb(color))
        color = tuple(rgb + (1 - rgb) * 0.65 * (1 - k / (len(alike) - 1)))
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
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, list(axes.flat[:count])


def finish(ax: Axes, xlabel: str, ylabel: str, title: str = "", legend: bool = True) -> None:
    """Names of the axes, and the legend below them, where it hides nothing."""
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if legend and ax.get_legend_handles_labels()[1]:
        ax.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.24), handlelength=4)


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


@dataclasses.dataclass
class Results:
    runs: list[Run]
    metrics: dict[str, dict]
    paper: str | None  # --paper

    def pictures(self, stage: str) -> Iterator[tuple[str, list[Curve], str]]:
        """`pictures`, and whose data set of the paper stands behind: cifar10, cifar10-jpeg."""
        for name, curves in pictures(self.runs, stage, self.metrics):
            data = curves[0].runs[0].settings["dataset"]
            names = ("cifar10", "cifar100", "cinic10")
            theirs = next((p for p in names if f"{data}-".startswith(f"{p}-")), "")
            yield name, curves, self.paper or theirs


Pictures = Iterator[tuple[str, Figure]]


def usual(curves: list[Curve], noise: bool = False) -> list[Curve]:
    """Random subsets, and easy and hard ones by EL2N, unbalanced; with or without label noise."""
    return [c for c in curves if c.metric == "el2n" and bool(c.noise) == noise]


def main_setting(curves: list[Curve]) -> tuple[int, int]:
    """Size and rewind step of Figure 2: a preset's if it is there, else the most frequent."""
    there = Counter((c.size, c.rewind) for c in curves if c.subset != "all")
    preset = [(p.size, p.rewind) for p in common.PRESETS.values() if (p.size, p.rewind) in there]
    return (preset or [x for x, _ in there.most_common(1)] or [(0, 0)])[0]


def by_size(r: Results, noisy: bool, everything: bool) -> Pictures:
    """Figures 2, 4, 11, 13: a panel for each size, rewind step and noise."""
    for name, curves, paper in r.pictures("imp"):
        mine, full = usual(curves, noisy), [c for c in usual(curves) if c.subset == "all"]
        asked = sorted({(c.noise, c.rewind, c.size) for c in mine if c.subset != "all"})
        main = [x for x in asked if x[:0:-1] == main_setting(mine)]
        asked = asked if everything else main
        if not asked and not noisy and full:
            asked = [(0.0, full[-1].rewind, 0)]
        if not asked:
            continue
        figure, axes = panels(len(asked))
        for ax, (noise, t, size) in zip(axes, asked, strict=True):
            shown = [c for c in full if not noise or c.rewind == 0]
            shown += [c for c in mine if noise and c.subset == "all" and c.noise == noise]
            shown += [c for c in mine if size and (c.noise, c.rewind, c.size) == (noise, t, size)]
            told = f"{size} examples, {t} steps" if size else "all data"
            told += f", {noise:.0%} noise" * bool(noise)
            draw_levels(ax, shown, paper_curves(paper), dense_of(curves), told)
        yield name, figure


def fig3(r: Results) -> Pictures:
    """Accuracy against subset size at three levels, a row for each rewind step."""
    for name, curves, paper in r.pictures("imp"):
        mine = [c for c in usual(curves) if c.points]
        theirs, ranked = usual([*paper_curves(paper).values()]), defaultdict(list)
        for c in mine:
            if c.subset != "all":
                ranked[c.rewind].append(c)
        ranked = {t: cs for t, cs in sorted(ranked.items()) if len({c.size for c in cs}) > 1}
        if not ranked:
            continue
        last = min(max(c.points) for cs in ranked.values() for c in cs)
        levels = sorted({last, -(-2 * last // 3), -(-last // 3)})
        figure, axes = panels(len(ranked) * len(levels), len(levels))
        for ax, (t, k) in zip(axes, itertools.product(ranked, levels), strict=True):
            for subset in SUBSETS[1:]:
                style = look(Curve(subset, 0, 0, 0, "el2n", {}, {}))
                ours, behind = (
                    {c.size: c.points[k] for c in sorted(cs, key=lambda c: c.size) if k in c.points}
                    for cs in (
                        [c for c in x if (c.subset, c.rewind) == (subset, t)]
                        for x in (mine, theirs)
                    )
                )
                draw_paper(ax, behind, style)
                if ours:
                    n = sorted({p.n for p in ours.values()})
                    draw(ax, ours, style, f"{subset} (n={'-'.join(map(str, n))})")
            full = [c for c in mine if c.subset == "all" and k in c.points]
            for c in full:
                style = {**look(c, full), "marker": None}
                ax.axhline(c.points[k].mean, lw=0.9, label=c.legend, **style)
            sizes = sorted({c.size for c in ranked[t]})
            ax.set_xscale("log", base=2)
            ax.set_xticks(sizes, [str(m) for m in sizes], rotation=40, fontsize=6)
            left = ranked[t][0].remaining.get(k, math.nan)
            title = f"{left:.1%} of weights remaining"
            finish(ax, f"examples trained on for {t} steps", "test accuracy", title)
        yield name, figure


def load(path: Path) -> np.ndarray | None:
    """An .npy of a run, or None with a line on stderr."""
    try:
        return common.read_npy(path)
    except common.UserError as e:
        print(f"skipped: {e}", file=sys.stderr)
        return None


def correlation(x: Iterable[float], y: Iterable[float]) -> str:
    x, y = list(x), list(y)
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return f"n={len(x)}"
    rank, plain = stats.spearmanr(x, y).statistic, stats.pearsonr(x, y).statistic
    return f"Pearson {plain:.2f}, Spearman {rank:.2f}, n={len(x)}"


def barriers(r: Results, curves: list[Curve]) -> list[dict]:
    """A row for each replicate of lmc: its barriers, and the accuracy that imp reached from the
    same w_tr at level 7, as in Figure 5, or at the last that every run has."""
    imps = [x for x in r.runs if x.stage == "imp" and x.result["levels"] and "pretrain" in x.result]
    level = min([7, *(len(x.result["levels"]) - 1 for x in imps)])
    final = {
        (x.result["pretrain"]["fingerprint"], x.settings["steps"]): x.result["levels"][level]
        for x in imps
    }
    rows = []
    for c, run in ((curve, run) for curve in curves for run in curve.runs if run.done):
        start = run.result["pretrain"]
        reached = final.get((start["fingerprint"], run.settings["steps"]), {})
        row = {"configuration": c.label, "replicate": run.settings["replicate"]}
        row |= {k: run.result[k] for k in ("loss_barrier", "error_barrier", "connected")}
        row |= {"pretrain_accuracy": start["test_accuracy"], "level": level}
        rows.append(row | {"final_accuracy": reached.get("test_accuracy")})
    return rows


def fig5(r: Results) -> Pictures:
    for name, curves, paper in r.pictures("lmc"):
        rows = barriers(r, curves)
        if not rows:
            continue
        figure, (left, middle, right) = panels(3)
        binned, edges = defaultdict(list), np.arange(-5, 10.5, 0.5)
        for x in paper_rows("lmc_histograms.csv"):
            if x["dataset"] == paper:
                binned[x["pretraining"]].append(int(x["count_of_1080000"]))
        chosen = (0, 25600 if paper == "cinic10" else main_setting(curves)[0])
        shown = [c for c in usual(curves) if c.size in chosen]
        for c in shown:
            pairs = [load(x.folder / "loss_barrier_pairs.npy") for x in c.runs if x.done]
            if pairs := [p for p in pairs if p is not None]:
                outline(left, pairs, edges, look(c, shown), c.legend)
            what = "all data" if c.subset == "all" else f"{c.subset} {c.size}"
            if counts := binned.get(f"{what}, {c.rewind} it"):
                style = {"color": look(c, shown)["color"], "lw": 0.5, "label": SOURCE}
                left.stairs(np.array(counts) / sum(counts), edges, **style)
        left.set_yscale("log")
        finish(left, "loss barrier of a training example", "share", "outliers in the last bins")
        rows = [x for x in rows if x["final_accuracy"] is not None]
        for ax, key, column, told in (
            (middle, "pretrain_accuracy", "pretrain_test_accuracy", "test accuracy at w_tr"),
            (right, "loss_barrier", "mean_train_loss_barrier", "mean loss barrier"),
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
                    ax.scatter(*zip(*at, strict=True), s=22, label=c.label, **style)
            found = correlation((x[key] for x in rows), (x["final_accuracy"] for x in rows))
            level = rows[0]["level"] if rows else 7
            finish(ax, told, f"test accuracy at level {level}", found)
        yield name, figure


def trained(c: Curve) -> tuple[list[float], int]:
    """Accuracies of the runs of a warmup that learned, and how many did not."""
    results = [x.result for x in c.runs if x.done]
    good = [x["test_accuracy"] for x in results if x["outcome"] == "trained"]
    return good, len(results) - len(good)


def fig6(r: Results) -> Pictures:
    """Accuracy against length of warmup; sharpness over the steps of one length, and of none."""
    for name, curves, paper in r.pictures("warmup"):
        curves = [c for c in curves if not c.noise and any(x.done for x in c.runs)]
        if not curves:
            continue
        lengths = {c.rewind for c in curves}
        typical = 1600 if 1600 in lengths else max(lengths)
        sizes = sorted({c.size for c in curves if c.subset != "all"}) or [0]
        figure, axes = panels(2 * len(sizes), max(2, len(sizes)))
        for size, top, bottom in zip(sizes, axes, axes[len(sizes) :], strict=False):
            for subset in SUBSETS:
                style = look(Curve(subset, 0, 0, 0, "el2n", {}, {}))
                mine = [c for c in curves if c.subset == subset and c.size in (0, size)]
                mine.sort(key=lambda c: c.rewind)
                if paper == "cifar10":
                    draw_paper(top, paper_warmup(subset, size), style)
                lost, n = sum(trained(c)[1] for c in mine), max([len(c.runs) for c in mine] or [0])
                points = {c.rewind: summary(trained(c)[0]) for c in mine if trained(c)[0]}
                if points:
                    told = f"{subset} (n={n}" + f", {lost} not trained" * bool(lost)
                    draw(top, points, style, told + ")")
                for c in (c for c in mine if c.rewind in (0, typical)):
                    by_step = defaultdict(list)
                    for x in itertools.chain(*(x.result["sharpness"] for x in c.runs if x.done)):
                        if x["eigenvalue"] is not None:
                            by_step[x["step"]].append(x["eigenvalue"])
                    if by_step:
                        tops = {s: summary(v) for s, v in sorted(by_step.items())}
                        grey = {} if c.rewind else {"color": "0.6"}
                        told = f"{subset}, warmup {c.rewind} (n={len(c.runs)})"
                        draw(bottom, tops, {**style, **grey}, told)
            finish(top, "steps of warmup", "test accuracy", f"subsets of {size}" if size else "")
            bottom.set_yscale("log")
            finish(bottom, "step", "top Hessian eigenvalue")
        yield name, figure


def fig7(r: Results) -> Pictures:
    kinds = {
        "test_accuracy": "test accuracy",
        "train_accuracy": "accuracy on all training data",
        "easy_accuracy": "accuracy on the easy examples",
        "coherence": "cosine of gradients with their mean",
    }
    for name, curves, _ in r.pictures("pretrain"):
        curves = [c for c in curves if c.rewind == max(c.rewind for c in curves)]
        logs = {
            c.key: [x for run in c.runs for x in read_log(run.folder / "log.csv")] for c in curves
        }
        there = [k for k in kinds if any(x.get(k) for log in logs.values() for x in log)]
        if not there:
            continue
        figure, axes = panels(len(there), 2)
        for ax, kind in zip(axes, there, strict=True):
            for c in curves:
                by_step = defaultdict(list)
                for x in logs[c.key]:
                    if x.get(kind):
                        by_step[int(x["step"])].append(float(x[kind]))
                if by_step:
                    points = {s: summary(v) for s, v in sorted(by_step.items())}
                    draw(ax, points, look(c, curves), c.legend)
            finish(ax, "step", kinds[kind])
        yield name, figure


def fig8(r: Results) -> Pictures:
    for name, curves, _ in r.pictures("pretrain"):
        norms = {}
        for c in (c for c in curves if c.rewind == min(c.rewind for c in curves)):
            found = [load(p) for x in c.runs if (p := x.folder / "gradient_norm.npy").exists()]
            if found := [x[:200] for x in found if x is not None]:
                norms[c.key] = c, found
        if not norms:
            continue
        figure, [ax] = panels(1, width=4)
        shown = [c for c, _ in norms.values()]
        edges = np.linspace(0, max(x.max() for _, found in norms.values() for x in found), 41)
        for c, found in norms.values():
            outline(ax, found, edges, look(c, shown), c.legend)
        steps = min(200, shown[0].rewind)
        finish(ax, f"norm of a minibatch gradient, first {steps} steps", "share")
        yield name, figure


def fig9(r: Results) -> Pictures:
    for name, curves, _ in r.pictures("imp"):
        size, t = main_setting(usual(curves))
        curves = [c for c in usual(curves) if c.points and c.rewind == t and c.size in (0, size)]
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
            title = f"under the mask of level {level}" if level else "dense"
            finish(ax, "||softmax - onehot|| of an example at w_tr", "share", title)
        yield name, figure


def rivals(r: Results, metric: str) -> Pictures:
    """Figures 10 and 12: other scores against EL2N, and pruning after pre-training by them."""
    for name, curves, paper in r.pictures("imp"):
        model, data = (curves[0].runs[0].model, curves[0].runs[0].settings["data"])
        clean = [m for m in r.metrics.values() if m["data"] == data and not m["label_noise"][0]]
        clean = [m for m in clean if m["folder"].parts[-2] == model]
        el2n = [m for m in clean if m["metric"] == "el2n"]
        other = [m for m in clean if m["metric"].startswith(metric)]
        other = [
            m for m in other if m["folder"].parts[-3] == "el2n" or m["folder"].name[:3] == "all"
        ]
        by = [c for c in curves if c.metric.split()[0].startswith(metric) and c.points]
        pairs, settings = list(itertools.product(other, el2n)), {(c.size, c.rewind) for c in by}
        if not pairs and not by:
            continue
        figure, axes = panels(len(pairs) + len(settings))
        for ax, (a, b) in zip(axes, pairs, strict=False):
            y, x = (load(m["folder"] / "scores.npy") for m in (a, b))
            if x is not None and y is not None:
                ax.hexbin(x, y, gridsize=40, bins="log", cmap="Greys", mincnt=1, lw=0.1)
                told = f"{metric} score" + "".join(
                    f" at step {a[k]}" for k in ("rewind",) if k in a
                )
                finish(ax, "EL2N score", told, correlation(x, y))
        for ax, (size, t) in zip(axes[len(pairs) :], sorted(settings), strict=True):
            shown = [c for c in [*usual(curves), *by] if c.subset in ("all", "easy") and c.points]
            shown = [c for c in shown if c.subset == "all" or (c.size, c.rewind) == (size, t)]
            told = f"{size} examples, {t} steps"
            draw_levels(ax, shown, paper_curves(paper), dense_of(curves), told)
        yield name, figure


FIGURES: dict[str, tuple[str, Callable[[Results], Pictures]]] = {
    "fig2": ("imp", functools.partial(by_size, noisy=False, everything=False)),
    "fig3": ("imp", fig3),
    "fig4": ("imp", functools.partial(by_size, noisy=True, everything=False)),
    "fig5": ("lmc", fig5),
    "fig6": ("warmup", fig6),
    "fig7": ("pretrain", fig7),
    "fig8": ("pretrain", fig8),
    "fig9": ("imp", fig9),
    "fig10": ("lmc", functools.partial(rivals, metric="lmc")),
    "fig11": ("imp", functools.partial(by_size, noisy=False, everything=True)),
    "fig12": ("imp", functools.partial(rivals, metric="forgetting")),
    "fig13": ("imp", functools.partial(by_size, noisy=True, everything=True)),
}

# ---- tables --------------------------------------------------------------------------------------


def against(ours: Stat, theirs: Stat | None) -> dict:
    """The columns that tables share: ours, the paper's, and how they differ."""
    missing = Stat(math.nan, math.nan, 0)
    p = theirs or missing
    told = {"ours": ours.mean, "sd": ours.sd, "n": ours.n, "paper": p.mean, "paper_sd": p.sd}
    told |= {"paper_n": p.n or None, "difference": ours.mean - p.mean}
    told["standard_error"] = standard_error(ours, p) if theirs else math.nan
    return told | {"welch_p": welch(ours, p)}


def tables(r: Results, asked: tuple[int, ...] | None) -> Iterator[tuple[str, list[dict]]]:
    for name, curves, paper in r.pictures("imp"):
        curves, dense, theirs = (
            [c for c in curves if c.points],
            dense_of(curves),
            paper_curves(paper),
        )
        yield (
            f"imp-{name}",
            [
                {"configuration": c.legend, "level": k, "weights_remaining": c.remaining[k]}
                | against(p, theirs[c.key].points.get(k) if c.key in theirs else None)
                for c in curves
                for k, p in c.points.items()
            ],
        )
        pairs = [(a, b) for a in curves for b in curves if b.subset == "all" and b.noise <= a.noise]
        pairs = [(a, b) for a, b in pairs if a.subset != "all" or a.rewind > b.rewind]
        yield f"verdicts-{name}", [compare(a, b, dense, asked) for a, b in pairs]
    for name, curves, _ in r.pictures("lmc"):
        yield f"lmc-{name}", barriers(r, curves)
    for name, curves, paper in r.pictures("warmup"):
        rows = []
        for c in curves:
            good, lost = trained(c)
            told = {"configuration": c.label, "warmup": c.rewind, "not_trained": lost}
            known = paper_warmup(c.subset, c.size).get(c.rewind) if paper == "cifar10" else None
            rows += [told | against(summary(good), known)] if good else []
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
        common.write(path.parent / f"{path.name}{suffix}", lambda f, t=text: f.write(t.encode()))


# ---- what is missing -----------------------------------------------------------------------------


def missing_curves(r: Results, dataset: str) -> list[str]:
    """Commands for the paper's curves of a data set, of others those of Figure 2, that results/
    has not."""
    p = common.PRESETS["digits"]
    wanted = [("all", 0, t, 0.0, "el2n") for t in (0, p.rewind, 2 * p.rewind)]
    wanted += [(s, p.size, p.rewind, 0.0, "el2n") for s in SUBSETS[1:]]
    wanted = [c.key for c in usual([*paper_curves(r.paper or dataset).values()])] or wanted
    mine = [x for _, curves, _ in r.pictures("imp") for x in curves]
    have = {c.key for c in mine if c.runs[0].settings["dataset"] == dataset}
    commands = []
    for subset, size, t, *_ in (k for k in wanted if k not in have):
        what = ["imp.py", "--dataset", dataset, "--subset", subset, "--rewind", str(t)]
        what += ["--size", str(size)] * (subset != "all")
        commands.append(shlex.join(["python", *what, "--replicate", "0-3"]))
    return commands


def rates(runs: list[Run]) -> dict[str, float]:
    """Network-steps per second of each model, the median over the levels of imp. Replicates of one
    folder with the same seconds trained side by side."""
    found = defaultdict(list)
    for run in runs:
        if run.stage == "imp":
            found[run.model, run.name] += run.result["levels"]
    by_model = defaultdict(list)
    for (model, _), levels in found.items():
        beside = Counter((x["level"], x["seconds"]) for x in levels)
        together = ((x["steps_per_second"], beside[x["level"], x["seconds"]]) for x in levels)
        by_model[model] += [rate * count for rate, count in together]
    return {model: float(np.median(rate)) for model, rate in by_model.items() if rate}


# ---- command line --------------------------------------------------------------------------------


def flags() -> common.Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = common.Parser(description=__doc__, formatter_class=raw)
    parser.add_argument("figure", nargs="*", help=f"of {', '.join(FIGURES)} [all]")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where results are")
    parser.add_argument("--figures", type=Path, help="where pictures go [OUT/figures]")
    parser.add_argument("--dataset", action="append", help="only of this data set")
    told = "whose curves of the paper to draw behind, of runs on other data"
    parser.add_argument("--paper", choices=("cifar10", "cifar100", "cinic10"), help=told)
    told = "the verdict of one folder of results/imp/MODEL/ over another, and nothing else"
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help=told)
    told = "at which verdicts are given, such as 3-12 [all but 0]"
    parser.add_argument("--levels", type=common.numbers, help=told)
    told = "print the measured network-steps per second of each model, and nothing else"
    parser.add_argument("--rates", action="store_true", help=told)
    return parser


def compare_two(r: Results, names: list[str], asked: tuple[int, ...] | None) -> dict:
    """--compare: folders by name, or by the end of their path where several models have it."""
    found = []
    for name in names:
        end = f"/{name.strip('/')}"
        here = [(c, cs) for _, cs, _ in r.pictures("imp") for c in cs]
        here = [x for x in here if x[0].runs[0].folder.parent.as_posix().endswith(end)]
        if len(here) != 1:
            told = ", ".join(str(c.runs[0].folder.parent) for c, _ in here) or "no such run"
            raise common.UserError(f"--compare {name}: {told}; name one below results/imp/")
        found += here
    (a, curves), (b, _) = found
    return compare(a, b, dense_of(curves), asked)


def save(figure: Figure, path: Path) -> None:
    """PNG and SVG, high enough for the legends."""
    legends = [len(x.get_texts()) for ax in figure.axes if (x := ax.get_legend())]
    rows = figure.axes[0].get_subplotspec().get_gridspec().nrows
    figure.set_figheight(rows * (2.5 + 0.14 * max(legends, default=0)))
    for kind, about in (("png", {}), ("svg", {"Date": None})):
        keep = functools.partial(figure.savefig, format=kind, dpi=160, metadata=about)
        common.write(path.parent / f"{path.name}.{kind}", keep)
    plt.close(figure)


def main(args: argparse.Namespace) -> dict:
    """Draws, writes, says what is missing; returns the paths written and what is missing."""
    if unknown := [f for f in args.figure if f not in FIGURES]:
        raise common.UserError(f"{unknown[0]}: not one of {', '.join(FIGURES)}")
    runs, written, lacking = read_runs(args.out), [], []
    if args.dataset:
        runs = [run for run in runs if run.settings["dataset"] in args.dataset]
    r, folder = (
        Results(runs, read_metrics(args.out), args.paper),
        args.figures or args.out / "figures",
    )
    if args.rates:
        print("\n".join(f"{model} {rate:.1f}" for model, rate in rates(runs).items()))
        return rates(runs)
    if args.compare:
        row = compare_two(r, args.compare, args.levels)
        print("\n".join(f"{k:20} {cell(v)}" for k, v in row.items()))
        return row
    datasets = args.dataset or sorted({run.settings["dataset"] for run in runs})
    for number in args.figure or FIGURES:
        stage, make = FIGURES[number]
        drawn = []
        for name, figure in make(r):
            figure.suptitle(f"{number}  {name}", fontsize=8, x=0.01, ha="left")
            save(figure, folder / f"{number}-{name}")
            written.append(folder / f"{number}-{name}.png")
            drawn.append(name)
        for data in datasets:
            if not any(name.startswith(f"{data}-resnet") for name in drawn):
                told = f"bash run_all.sh --only {number} --dataset {shlex.quote(data)}"
                lacking.append(f"{number} of {data}, which needs runs of {stage}.py: {told}")
    for name, rows in () if args.figure else tables(r, args.levels):
        if rows:
            write_table(folder / name, rows)
            written.append(folder / f"{name}.md")
    for data in datasets:
        commands = missing_curves(r, data)
        if commands and {"fig2", "fig3", "fig11"} & set(args.figure or FIGURES):
            lacking.append(f"{len(commands)} curves of {data}, the first: {commands[0]}")
    others = {"cifar10", "cifar100", "cinic10"} - set(datasets)
    lacking += [f"{d}: bash run_all.sh --dataset {d}" for d in sorted(others) if not args.dataset]
    for line in lacking:
        print(f"missing: {line}", file=sys.stderr)
    for path in written:
        print(path)
    if args.figure and not written:
        raise common.UserError(f"{args.out} has nothing to draw {', '.join(args.figure)} from")
    return {"written": written, "missing": lacking}


if __name__ == "__main__":
    common.run_stage(main, flags())
