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

Writes OUT/figures/: each picture as PNG, SVG and PDF with its caption in a .txt, each table as CSV
and Markdown, test accuracies as LaTeX, too. Lines are means over replicates, bands sample standard
deviations; thin lines without a band are the paper's (paper/README.md). A run in progress counts
with the levels it has, and is marked *.

    table = figures.frame("results")         a pandas table: a row for each level of each run
    pictures = figures.draw("fig2", table)   {name: matplotlib Figure}

Verdicts (Definitions 3.1 and 3.2). A is *below* B at a level where a one-sided Welch test says so,
at a family-wise error of 5 % over the levels (Sidak). A weakly dominates B if it is below at no
level, dominates if its mean is also higher at each, and equals B if neither is below. A matches
w_t*, all data for t* steps, if it is below at no level at which w_t* matches dense; t* is twice A's
own step. Beside it stand the literal rule of the paper's footnote, --slack standard errors a level,
which tells identical starts apart in nine of ten cases, and a test of the mean over the levels: by
replicate and, where replicates are shared, paired. For 4 replicates and 12 levels the family-wise
test finds a deficit of one standard deviation in 40 % of cases, of two in 95 % (of independent
levels; 18 % and 56 % where levels correlate by .8), so that "matches" is not "equals".
"""

import argparse
import csv
import dataclasses
import difflib
import fnmatch
import functools
import io
import itertools
import math
import os
import re
import shlex
import sys
from collections import Counter
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

import common as options
import runs

STAGES = ("imp", "pretrain", "lmc", "warmup")
PAPER, SOURCE = options.HERE / "paper", "Paul et al. 2022"
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
    "own": ("#006d5b", (0, (7, 2)), "*"),  # --init, --mask, --indices, --name
}
# What the paper does differently by data set.
FINAL_LEVEL = {"cifar100": 11}  # of Figure 5, else 7
HISTOGRAMS = {  # Figure 5: random examples, easy examples, steps
    "cifar10": (3200, 3200, 200),
    "cifar100": (3200, 2048, 400),
    "cinic10": (25600, 25600, 200),
}
DENSE = {"cinic10": 400}  # rewind of the run whose level 0 is called dense, else t*
BALANCED = {"cifar10": True, "cinic10": False}  # the paper's easy subsets; of CIFAR-100 unknown
CONNECTED = 0.02  # error barrier
# Settings that tell curves of one picture apart; runs that differ in others get a picture each.
IDENTITY = {"subset", "size", "offset", "balance", "scores", "indices", "label_noise", "rewind"}
IDENTITY |= {"replicate", "track", "every", "easy_size", "easy_balance", "warmup", "pretrain_lr"}
IDENTITY |= {"control", "init", "mask", "name"}
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.grid": True, "grid.alpha": 0.25}
STYLE |= {"legend.fontsize": 7, "legend.frameon": False, "legend.handlelength": 4}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.2}
STYLE |= {"svg.hashsalt": "tickets", "svg.fonttype": "none", "pdf.fonttype": 42}
DOTTED = {"color": "0.5", "lw": 0.8, "ls": (0, (1, 2)), "zorder": 0}  # to compare with

# ---- reading -------------------------------------------------------------------------------------

# Of each run, then of each level (imp) or of the whole run (the other stages).
TEXT = ["out", "stage", "dataset", "model", "name", "variant", "folder", "run", "data", "subset"]
TEXT += ["metric", "control", "extra", "start", "outcome"]
COUNTS = ["size", "offset", "rewind", "warmup", "replicate", "steps", "batch_size"]
VALUES = ["noise", "pretrain_lr", "level", "weights_remaining", "test_accuracy", "test_loss"]
VALUES += ["train_loss", "projected_test_accuracy", "seconds", "steps_per_second"]
VALUES += ["pretrain_accuracy", "loss_barrier", "error_barrier", "connected"]
VALUES += ["warmed_eigenvalue", "largest_eigenvalue"]
COLUMNS = [*TEXT, *COUNTS, "balance", "done", *VALUES, "sharpness", "settings"]


def skipped(reason: Any) -> None:
    print(f"skipped: {reason}", file=sys.stderr)


def frame(
    out: str | Path | Iterable[str | Path] = "results", datasets: Iterable[str] = ()
) -> pd.DataFrame:
    """Every run below the folder or folders `out` as a tidy table with the columns COLUMNS: a row
    for each level of an imp run, one row for a run of another stage. `name` is the folder of a
    configuration, `folder` that of the run, `done` is False for a run in progress; accuracies and
    `weights_remaining` are fractions. Damaged and foreign files are named on stderr and left out,
    and so are copies of runs, barriers between any two networks, and runs that diverged."""
    rows, seen = [], {}
    for top in [out] if isinstance(out, str | Path) else out:
        top = Path(top)
        if not top.is_dir():
            raise runs.UserError(f"{top} is not a folder: --out names one that holds results")
        metrics = {m["sha256_of_scores"]: m["name"] for m in read_metrics(top)}
        for path in sorted(p for s in STAGES for p in top.glob(f"{s}/*/*/rep*/config.json")):
            if not re.fullmatch(r"rep\d+", path.parent.name):
                continue
            try:
                found = read_run(top, path, metrics)
            except runs.UserError as e:
                skipped(e)
            except (KeyError, TypeError, ValueError, AttributeError, OSError) as e:
                skipped(f"{path.parent}: not one of our runs ({e!r})")
            else:
                first = seen.setdefault(found[0]["run"], path.parent) if found else path.parent
                if first != path.parent:
                    skipped(f"{path.parent} is a copy of {first}")
                elif not datasets or (found and found[0]["dataset"] in datasets):
                    rows += found
    table = pd.DataFrame(rows, columns=COLUMNS)
    table[VALUES] = table[VALUES].apply(pd.to_numeric)
    table["variant"] = ""
    for _, same in table.groupby(["stage", "model"]):
        table.loc[same.index, "variant"] = variants(same["settings"])
    return table.drop(columns="settings")


def variants(settings: pd.Series) -> list[str]:
    """For each row "-steps150" and the like, the settings in which rows of a model differ."""
    kept = [{k: v for k, v in s.items() if k not in IDENTITY | {"model"}} for s in settings]
    shared = functools.reduce(lambda a, b: a & b, (set(k) for k in kept))  # formats 2 and 3
    differ = [k for k in kept[0] if k in shared and len({str(x[k]) for x in kept}) > 1]
    words = ["".join(f"-{k}{x[k]}" for k in differ) for x in kept]
    return ["".join(c if c.isalnum() or c in "-_." else "+" for c in word) for word in words]


def read_run(out: Path, config: Path, metrics: dict[str, str]) -> list[dict]:
    """The rows of the run of a config.json; KeyError, TypeError or ValueError if it is no run."""
    folder, stage, done = config.parent, config.parts[-5], config.with_name("result.json").exists()
    result = runs.read_json(folder / "result.json") if done else {}
    about = result["config"] if done else runs.read_json(config)
    s = about["settings"]
    if "between" in s or (result.get("ended") is not None and stage != "imp"):
        return []
    if folder.name != f"rep{s['replicate']}":
        raise runs.UserError(f"{folder} holds replicate {s['replicate']}")
    log = folder / "log.csv"  # begun with the first level that is done
    logged = runs.read_rows(log) if not done and log.exists() else []
    ranked, name = s["subset"] in ("easy", "hard"), folder.parent.name
    by = re.match(r"(?:easy|hard)[^-]*-(.+?)-(?:rewind|warmup)\d", name)  # where scores are gone
    by = re.sub(r"^lmc(?=\d)", "lmc ", by[1]) if by else "el2n"
    extra = [name.split("-rewind")[0]] if s.get("init") or s.get("indices") else []
    extra += [k for k in ("mask" * bool(s.get("mask")), s.get("name")) if k]
    row = {"out": str(out), "stage": stage, "model": folder.parts[-3], "name": name}
    row |= {"folder": str(folder), "run": about["run"], "done": done, "settings": s}
    row |= {k: s[k] for k in ("dataset", "subset", "replicate", "steps", "batch_size")}
    row |= {k: s.get(k) for k in ("data", "pretrain_lr")} | {"noise": s["label_noise"]}
    row |= {k: s.get(k) or 0 for k in ("size", "offset", "rewind", "warmup")}
    row |= {"metric": metrics.get(s.get("scores"), by) if ranked else ""}
    row |= {"balance": bool(s.get("balance")), "control": s.get("control") or ""}
    row |= {"extra": ", ".join(extra)}
    if "pretrain" in result:
        row["start"] = result["pretrain"].get("fingerprint")
        row["pretrain_accuracy"] = result["pretrain"].get("test_accuracy")
    if stage == "imp":
        levels = result["levels"] if done else [x for x in logged if x["phase"][:5] == "level"]
        keys = [k for k in VALUES if any(k in x for x in levels)]
        each = [row | {k: float(x[k]) for k in keys if x.get(k) not in (None, "")} for x in levels]
        if not all(x.keys() >= {"level", "weights_remaining", "test_accuracy"} for x in each):
            raise KeyError("levels")
        return each or [row]
    row |= {k: result.get(k) for k in ("loss_barrier", "error_barrier", "connected", "outcome")}
    row |= {k: result.get(k) for k in ("test_accuracy", "train_loss") if stage == "warmup"}
    tops = result.get("sharpness") or [x for x in logged if x.get("eigenvalue")]
    tops = [(int(x["step"]), float(x["eigenvalue"])) for x in tops if x["eigenvalue"] is not None]
    later = [x for step, x in tops if step >= row["warmup"]]
    row |= {"sharpness": tops} | dict.fromkeys(("warmed_eigenvalue", "largest_eigenvalue"))
    return [
        row | {"warmed_eigenvalue": later[0], "largest_eigenvalue": max(later)} if later else row
    ]


def read_metrics(out: Path) -> list[dict]:
    """Every scores.json with `folder`, `model`, `dataset` and `name`: el2n, el2n 1600 (steps other
    than the preset's), lmc 800, forgetting."""
    found = []
    for path in sorted([*out.glob("el2n/*/*/scores.json"), *out.glob("lmc/*/*/scores.json")]):
        try:
            about = runs.read_json(path, "metric", "sha256_of_scores", "label_noise")
        except runs.UserError as e:
            skipped(e)
            continue
        name, step, model = about["metric"], about.get("score_step"), path.parts[-3]
        data = model.rpartition("-")[0]
        if name == "lmc":
            name = f"lmc {about.get('rewind')}"
        elif name == "el2n" and data in options.PRESETS:
            name += f" {step}" * (step != options.PRESETS[data].score_step)
        found.append(about | {"folder": path.parent, "model": model, "dataset": data, "name": name})
    return found


def load(path: Path) -> Any:
    """An .npy or .pt of a run; None where there is none, or, with a line on stderr, if damaged."""
    if not path.exists():
        return None
    try:
        return (runs.read_npy if path.suffix == ".npy" else runs.read_tensors)(path)
    except runs.UserError as e:
        return skipped(e)


def load_all(rows: pd.DataFrame, name: str) -> list[np.ndarray]:
    """An array of each finished run that has it."""
    folders = rows.loc[rows["done"], "folder"].drop_duplicates()
    return [x for f in folders if (x := load(Path(f) / name)) is not None]


# ---- curves --------------------------------------------------------------------------------------


def summarise(rows: pd.DataFrame, by: str, value: str = "test_accuracy") -> pd.DataFrame:
    """Mean, sample standard deviation (NaN for n = 1) and n of a column, indexed by `by`."""
    groups = rows.dropna(subset=[value]).groupby(by)[value]
    return groups.agg(mean="mean", sd="std", n="count")


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """The replicates of one configuration, ours or the paper's, with test accuracy by level."""

    subset: str
    size: int
    step: int  # rewind; of warmup runs, its length
    noise: float = 0.0
    metric: str = ""  # what easy and hard examples are chosen by: el2n, lmc 800
    balance: bool | None = False  # None: not known
    offset: int = 0
    control: str = ""
    extra: str = ""  # a start, a mask, indices or a name of one's own
    rate: float = 0.0  # of pre-training, where it is not the usual one
    points: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)  # by level
    rows: pd.DataFrame | None = None  # of ours
    mark: str = ""  # where labels are alike otherwise

    @property
    def kind(self) -> tuple:
        """All but size and step."""
        key = (self.subset, self.noise, self.metric, self.balance, self.offset)
        return *key, self.control, self.extra, self.rate

    @property
    def ranking(self) -> str:
        by = f" by {self.metric}" if self.metric not in ("", "el2n") else ""
        start = f" from {self.offset}" if self.offset else ""
        return " balanced" * bool(self.balance) + by + start

    @property
    def what(self) -> str:
        """The examples: easy 3200 balanced."""
        size = f" {self.size}" if self.size else ""
        return (self.extra if "indices" in self.subset else f"{self.subset}{size}") + self.ranking

    @property
    def more(self) -> str:
        extra = self.extra if "indices" not in self.subset else ""
        rate = f"rate {self.rate:g}" if self.rate else ""
        words = [x for x in (self.control, extra, rate, self.mark) if x]
        return "".join(f", {x}" for x in words)

    @property
    def label(self) -> str:
        noise = f", {self.noise:.0%} noise" if self.noise else ""
        return f"{self.what}, step {self.step}{noise}{self.more}"

    @property
    def short(self) -> str:
        """For panels whose title says size, step and noise."""
        step = f", step {self.step}" if self.subset == "all" else ""
        return f"{self.subset}{self.ranking}{step}{self.more}"

    @property
    def running(self) -> bool:
        return self.rows is not None and not self.rows["done"].all()

    @property
    def n(self) -> list[int]:
        return sorted(
            {*self.points["n"]} if len(self.points) else {self.rows["replicate"].nunique()}
        )

    @property
    def legend(self) -> str:
        return f"{self.label} (n={span(self.n)})" + "*" * self.running

    @functools.cached_property
    def by_replicate(self) -> pd.DataFrame:
        """Test accuracy, level x replicate; empty for the paper's."""
        if self.rows is None:
            return pd.DataFrame()
        known = self.rows.dropna(subset=["level"])
        return known.pivot_table(index="level", columns="replicate", values="test_accuracy")


def span(numbers: Iterable[int]) -> str:
    """ "4", or "2-4"."""
    n = sorted({*numbers})
    return "-".join(str(int(x)) for x in n[:: max(1, len(n) - 1)])


def make_curve(rows: pd.DataFrame, usual_rate: float) -> Curve:
    """Of the rows of one folder."""
    first = rows.iloc[0]
    points = summarise(rows, "level").join(rows.groupby("level")["weights_remaining"].mean())
    points.index = points.index.astype(int)
    keys = {k: first[k] for k in ("noise", "metric", "control", "extra")}
    keys |= {"balance": bool(first["balance"]), "offset": int(first["offset"])}
    rate = first["pretrain_lr"]
    other = first["rewind"] and not math.isnan(rate) and rate != usual_rate
    keys |= {"rate": float(rate) if other else 0.0}
    step = int(first["warmup"] if first["stage"] == "warmup" else first["rewind"])
    return Curve(first["subset"], int(first["size"]), step, **keys, points=points, rows=rows)


def make_curves(rows: pd.DataFrame) -> list[Curve]:
    """The configurations of one picture, in the order of its legend."""
    preset = options.PRESETS.get(rows["dataset"].iloc[0])
    frequent = rows.loc[rows["rewind"] > 0, "pretrain_lr"].mode()
    usual = preset.pretrain_lr if preset else frequent[0] if len(frequent) else math.nan
    curves = [make_curve(part, usual) for _, part in rows.groupby(["out", "name"])]
    often = Counter(c.label for c in curves)
    for k, c in enumerate(curves):
        if often[c.label] > 1:
            first = c.rows.iloc[0]
            elsewhere = rows["out"].nunique() > 1
            curves[k] = dataclasses.replace(c, mark=first["out" if elsewhere else "name"])
    order = {s: k for k, s in enumerate(SUBSETS)}
    curves.sort(key=lambda c: (order.get(c.subset, 9), c.size, c.step, c.label))
    return curves


def pick(curves: Iterable[Curve], **wanted: Any) -> list[Curve]:
    """Those with these attributes; a set or tuple stands for any of its values."""
    choices = {k: v if isinstance(v, set | tuple) else (v,) for k, v in wanted.items()}
    return [c for c in curves if all(getattr(c, k) in v for k, v in choices.items())]


def usual(curves: Iterable[Curve], noise: bool = False, ranked: bool = False) -> list[Curve]:
    """Those of the paper's main figures, by EL2N; unbalanced, or with `ranked` balanced too."""
    found = pick(curves, metric=("", "el2n"), offset=0, control="", extra="", rate=0.0)
    return [c for c in found if bool(c.noise) == noise and (ranked or not c.balance)]


def all_data(curves: Iterable[Curve], noise: float = 0.0) -> list[Curve]:
    """By rewind step."""
    full = pick(usual(curves, bool(noise)), subset="all", noise=noise)
    return sorted((c for c in full if len(c.points)), key=lambda c: c.step)


def main_setting(curves: list[Curve]) -> tuple[int, int]:
    """Size and step of Figure 2: a preset's if it is there, else the most frequent."""
    found = Counter((c.size, c.step) for c in curves if c.subset != "all")
    preset = [(p.size, p.rewind) for p in options.PRESETS.values() if (p.size, p.rewind) in found]
    return (preset or [x for x, _ in found.most_common(1)] or [(0, 0)])[0]


@dataclasses.dataclass
class Page:
    """What one picture is drawn from, the runs of a model, and its panels so far."""

    name: str  # the model, and the settings in which its runs differ
    rows: pd.DataFrame  # of one stage
    table: pd.DataFrame  # of all stages
    paper: str = ""  # whose curves of the paper stand behind: cifar10, or ""

    def __post_init__(self):
        self.figure = Picture(layout="constrained")
        self.panels: list[Axes] = []
        self.entries: dict[str, list] = {}  # label -> [handle, numbers of replicates, running]

    @functools.cached_property
    def curves(self) -> list[Curve]:
        return make_curves(self.rows)

    @property
    def dataset(self) -> str:
        return self.rows["dataset"].iloc[0]

    def metrics(self) -> list[dict]:
        """Scores of this model and data, made without label noise."""
        found = [m for out in self.table["out"].unique() for m in read_metrics(Path(out))]
        mine = self.rows["model"].iloc[0], self.rows["data"].iloc[0]
        return [m for m in found if (m["model"], m["data"]) == mine and not m["label_noise"][0]]

    def panel(self, xlabel: str, ylabel: str, title: str = "", **more: Any) -> Axes:
        ax = self.figure.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title, **more)
        self.panels.append(ax)
        return ax

    def note(self, label: str, handle: Any, n: Iterable[int] = (), running: bool = False) -> None:
        """An entry of the legend; of panels with the same label, one."""
        entry = self.entries.setdefault(label, [handle, set(), False])
        entry[1] |= {int(k) for k in n}
        entry[2] |= running

    def labels(self) -> list[str]:
        numbers = [
            (k, f" (n={span(n)})" if n else "", going) for k, (_, n, going) in self.entries.items()
        ]
        return [f"{k}{n}" + "*" * going for k, n, going in numbers]


class Picture(Figure):
    """A matplotlib figure that neither needs pyplot nor knows of it; notebooks show it."""

    def __init__(self, **more: Any):
        super().__init__(**more)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def pages(table: pd.DataFrame, stage: str, paper: str | None = None) -> Iterator[Page]:
    """The configurations of a stage that belong in one picture each."""
    here = table[table["stage"] == stage]
    for (model, variant), rows in here.groupby(["model", "variant"]):
        data = rows["dataset"].iloc[0]  # cifar10-jpeg is cifar10, too
        behind = next((p for p in PUBLISHED if f"{data}-".startswith(f"{p}-")), "")
        yield Page(model + variant, rows, table, paper or behind)


# ---- the paper's numbers -------------------------------------------------------------------------


@functools.cache
def paper_table(name: str) -> pd.DataFrame:
    path = PAPER / name
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def paper_points(rows: pd.DataFrame, by: str, mean: str, sd: str, n: str) -> pd.DataFrame:
    """Their population deviations as sample ones."""
    count = rows[n].to_numpy()
    deviation = rows[sd].to_numpy() * np.sqrt(count / np.maximum(count - 1, 1))
    columns = {"mean": rows[mean].to_numpy(), "sd": deviation, "n": count}
    return pd.DataFrame(columns, index=pd.Index(rows[by], name=by)).dropna(subset=["mean"])


@functools.cache
def paper_curves(dataset: str) -> list[Curve]:
    """imp_curves.csv of a data set."""
    table, curves = paper_table("imp_curves.csv"), []
    by = ["method", "subset_size", "rewind_steps", "label_noise"]
    table = table[table["dataset"] == dataset] if len(table) else table
    for (method, size, step, noise), rows in table.groupby(by) if len(table) else ():
        forgetting = method == "forgetting"
        subset = "easy" if forgetting else method
        points = paper_points(rows, "level", "accuracy_mean", "accuracy_std", "replicates")
        points["weights_remaining"] = rows["weights_remaining"].to_numpy()
        keys = {"metric": "forgetting" if forgetting else "el2n" * (subset in ("easy", "hard"))}
        balance = (True if forgetting else BALANCED.get(dataset)) if subset == "easy" else False
        size = 0 if size == "full" else int(size)
        curves.append(
            Curve(subset, size, int(step), float(noise), **keys, balance=balance, points=points)
        )
    return curves


def published(c: Curve, paper: str) -> Curve | None:
    """The paper's curve of a configuration, whether or not its easy subset is balanced alike."""
    if c.control or c.extra or c.rate or c.offset:
        return None
    key = {k: getattr(c, k) for k in ("subset", "size", "step", "noise", "metric")}
    return next(iter(pick(paper_curves(paper), **key)), None)


def differs(c: Curve, theirs: Curve) -> str:
    """ "balanced" or "not balanced" where the paper's easy subset is and ours is not so."""
    if c.subset != "easy" or theirs.balance in (None, c.balance):
        return ""
    return "balanced" if theirs.balance else "not balanced"


def paper_warmup(c: Curve) -> pd.DataFrame:
    """Figure 6 and its windows of the ranking: accuracy by length of warmup."""
    table, windows = paper_table("warmup_curves.csv"), c.subset == "easy" and not c.balance
    if not len(table) or c.subset == "hard" or c.metric not in ("", "el2n"):
        return pd.DataFrame(columns=["mean", "sd", "n"])
    kind = ("rolling", "score_window") if windows else ("fig6", c.subset)
    rows = table[(table["experiment"] == kind[0]) & (table["subset_type"] == kind[1])]
    rows = rows[rows["subset_size"] == (c.size or 50000)]
    rows = rows[rows["left_offset"] == c.offset] if windows else rows
    names = ("test_accuracy_mean", "test_accuracy_std", "n_replicates")
    return paper_points(rows, "warmup_steps", *names)


# ---- comparing -----------------------------------------------------------------------------------


def welch(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Of two tables with mean, sd and n: the difference of the means, its standard error and degrees
    of freedom, the two-sided p, and that of a below b; NaN where a deviation is missing."""
    va, vb = a["sd"] ** 2 / a["n"], b["sd"] ** 2 / b["n"]
    found = pd.DataFrame({"difference": a["mean"] - b["mean"], "standard_error": np.sqrt(va + vb)})
    with np.errstate(divide="ignore", invalid="ignore"):
        df = (va + vb) ** 2 / (va**2 / (a["n"] - 1) + vb**2 / (b["n"] - 1))
        t = found["difference"] / found["standard_error"]
    t = t.mask((found["difference"] == 0) & (found["standard_error"] == 0), 0.0)
    found["df"] = df.mask((found["standard_error"] == 0), a["n"] + b["n"] - 2)
    found["p"] = 2 * stats.t.sf(t.abs(), found["df"])
    found["p_below"] = stats.t.cdf(t, found["df"])
    return found


def paired(differences: pd.DataFrame) -> pd.DataFrame:
    """As `welch`, of differences in columns, one for each replicate that two runs share."""
    n = differences.shape[1]
    found = pd.DataFrame({"difference": differences.mean(axis=1)})
    found["standard_error"] = differences.std(axis=1, ddof=1) / math.sqrt(max(n, 1))
    found["df"] = n - 1
    t = found["difference"] / found["standard_error"]
    found["p"], found["p_below"] = 2 * stats.t.sf(t.abs(), n - 1), stats.t.cdf(t, n - 1)
    return found


def as_points(values: Iterable[float]) -> pd.DataFrame:
    """One row of mean, sd and n."""
    x = pd.Series(list(values), dtype=float).dropna()
    return pd.DataFrame({"mean": [x.mean()], "sd": [x.std()], "n": [len(x)]})


def shared_differences(a: Curve, b: Curve, levels: list[int]) -> pd.DataFrame:
    """A - B, level x replicate that both have at all the levels."""
    if a.rows is None or b.rows is None:
        return pd.DataFrame()
    d = a.by_replicate.reindex(levels) - b.by_replicate.reindex(levels)
    return d.dropna(axis=1)


def over_levels(a: Curve, b: Curve, levels: list[int]) -> tuple[pd.Series, str]:
    """The test of the mean over the levels, and how it was made: paired, by replicate, or, where
    only means and deviations are known (the paper's), with deviations as of levels that correlate
    fully, the worst case."""
    d = shared_differences(a, b, levels)
    if d.shape[1] > 1:
        return paired(d.mean().to_frame().T).iloc[0], f"paired, n={d.shape[1]}"
    each = [c.by_replicate.reindex(levels).dropna(axis=1).mean() for c in (a, b)]
    if min(map(len, each)) > 1:
        return welch(*map(as_points, each)).iloc[0], "by replicate"
    both = (c.points.loc[levels] for c in (a, b))
    worst = [pd.DataFrame({"mean": [x["mean"].mean()], "sd": [x["sd"].mean(skipna=False)],
                           "n": [x["n"].min()]}) for x in both]  # fmt: skip
    return welch(*worst).iloc[0], "levels as if fully correlated"


def limit_of(error: float, tests: int) -> float:
    """The error of each of some tests that makes the family-wise one (Sidak)."""
    return 1 - (1 - error) ** (1 / max(1, tests))


def judge(
    a: pd.DataFrame, b: pd.DataFrame, levels: list[int], slack: float = 1.0, error: float = 0.05
) -> pd.DataFrame:
    """`welch` of two tables of points by level, and whether a is `below` or `above` b by the
    family-wise test, or by `slack` standard errors (`literally_below`, `literally_above`: where
    there is no deviation, by anything)."""
    found = welch(a.loc[levels], b.loc[levels])
    limit = limit_of(error, int(found["p_below"].notna().sum()))
    found["below"], found["above"] = found["p_below"] < limit, 1 - found["p_below"] < limit
    far = slack * found["standard_error"].fillna(0)
    found["literally_below"] = found["difference"] < -far
    found["literally_above"] = found["difference"] > far
    return found


def verdict(found: pd.DataFrame, rule: str = "") -> str:
    """Of A over B (Definition 3.1); `rule` is "" or "literally_"."""
    if not len(found):
        return "no common level"
    if not rule and found["p_below"].isna().all():
        return "not tested: one replicate"
    under, over = found[f"{rule}below"].any(), found[f"{rule}above"].any()
    if under and over:
        return "neither"
    if not under and not over:
        return "equal"
    if over:
        return "dominates" if (found["difference"] > 0).all() else "weakly dominates"
    return "is dominated" if (found["difference"] < 0).all() else "is weakly dominated"


def ranges(levels: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for k in sorted(levels):
        if spans and spans[-1][-1] == k - 1:
            spans[-1].append(k)
        else:
            spans.append([k])
    return ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else f"{s[0]}" for s in spans) or "none"


def detectable(found: pd.DataFrame | pd.Series, limit: float) -> Any:
    """The deficit that a test finds with probability .8."""
    far = stats.t.isf(limit, found["df"]) + stats.t.ppf(0.8, found["df"])
    return far * found["standard_error"]


def references(a: Curve, curves: list[Curve], data: str) -> tuple[pd.Series | None, Curve | None]:
    """The dense network, level 0 of all data at t* or as the paper chose, and w_t*, all data for
    twice the steps of A, or of the main setting; under label noise the noisy ones if there are."""
    full = all_data(curves, a.noise) or all_data(curves)
    star = next(iter(pick(full, step=2 * (a.step or main_setting(usual(curves))[1]))), None)
    dense = (pick(full, step=DENSE.get(data)) or ([star] if star else full))[-1:]
    known = bool(dense) and 0 in dense[0].points.index
    return dense[0].points.loc[0] if known else None, star


def as_dense(c: Curve, dense: pd.Series | None, levels: list[int], error: float) -> list[int]:
    """The levels at which a curve is not below the dense network."""
    if dense is None or not levels:
        return []
    same = pd.DataFrame([dense] * len(levels), index=levels)
    found = judge(c.points, same, levels, error=error)
    return [k for k in levels if not found.loc[k, "below"]]


def matching(
    a: Curve, star: Curve | None, dense: pd.Series | None, levels: list[int], error: float
) -> str:
    """Whether A matches w_t* (Definition 3.2) over the levels where that matches dense."""
    if star is None:
        return "-: all data for twice the steps are not there"
    good = as_dense(star, dense, [k for k in levels if k in star.points.index], error)
    good = [k for k in good if k in a.points.index]
    if not good:
        return "-: w_t* matches dense at no level"
    found = judge(a.points, star.points, good, error=error)
    if found["p_below"].isna().all():
        return "-: one replicate"
    if found["below"].any():
        return f"no: below at {ranges(found.index[found['below']])} of {ranges(good)}"
    mean, _ = over_levels(a, star, good)
    if mean["p_below"] < error:
        return f"yes, but the mean over {ranges(good)} is below (p {mean['p_below']:.2g})"
    return "yes"


def compare(
    a: Curve,
    b: Curve,
    curves: list[Curve],
    data: str,
    levels: Iterable[int] = (),
    slack: float = 1.0,
    error: float = 0.05,
) -> dict[str, Any]:
    """One row of the table of verdicts, over `levels`, or all but 0."""
    dense, star = references(a, curves, data)
    chosen = [k for k in a.points.index if (k in levels if levels else k > 0)]
    both = [k for k in chosen if k in b.points.index]
    found = judge(a.points, b.points, both, slack, error)
    ends = [f"{a.points.loc[k, 'weights_remaining']:.1%}" for k in both[:1] + both[-1:]]
    mean, how = over_levels(a, b, both) if both else (pd.Series(dtype=float), "-")
    seen = detectable(found, limit_of(error, len(both))).median() if both else math.nan

    def where(column: str) -> str:
        return ranges(found.index[found[column]])

    return {
        "A": a.legend,
        "verdict": verdict(found),
        "B": b.legend,
        "levels": ranges(both),
        "weights_remaining": " to ".join(ends),
        "A_above_at": where("above"),
        "A_below_at": where("below"),
        "mean_difference": mean.get("difference", math.nan),
        "standard_error": mean.get("standard_error", math.nan),
        "p": mean.get("p", math.nan),
        "mean_tested": how,
        "smallest_difference": found["difference"].min(),
        "A_matches_w_t*": matching(a, star, dense, chosen, error),
        "A_matches_dense_at": ranges(as_dense(a, dense, [*a.points.index], error)),
        "B_matches_dense_at": ranges(as_dense(b, dense, [*b.points.index], error)),
        "family_wise_error": error,
        "found_at_one_level": seen,  # deficits seen with probability .8
        "found_in_the_mean": detectable(mean, error) if both else math.nan,
        "slack_in_standard_errors": slack,
        "by_slack": verdict(found, "literally_"),
        "A_above_by_slack": where("literally_above"),
        "A_below_by_slack": where("literally_below"),
    }


# ---- drawing -------------------------------------------------------------------------------------


def arrange(page: Page, most: int) -> None:
    """Panels in rows of at most `most`, the last row as wide as the others, one legend below."""
    n = len(page.panels)
    columns = n if n <= most else min(range(most, 1, -1), key=lambda c: (-n % c, -c))
    last = n % columns or columns
    parts, rows = math.lcm(columns, last), -(-n // columns)
    grid = page.figure.add_gridspec(rows, parts)
    for k, ax in enumerate(page.panels):
        row, column = divmod(k, columns)
        wide = parts // (last if row == rows - 1 else columns)
        ax.set_subplotspec(grid[row, column * wide : (column + 1) * wide])
    width, height = max(3.4 * columns, 4.2), 2.7 * rows
    if page.entries:
        handles = {k: h for k, (h, *_) in page.entries.items()}
        labels = dict(zip(page.entries, page.labels(), strict=True))
        order = sorted(handles, key=lambda k: k.startswith(SOURCE))  # the paper's last
        longest = max(map(len, labels.values()))
        across = min(len(order), max(1, int(width / (0.75 + 0.062 * longest))))
        entries = [handles[k] for k in order], [labels[k] for k in order]
        page.figure.legend(*entries, loc="outside lower center", ncols=across)
        height += 0.2 + 0.15 * -(-len(order) // across)
    page.figure.set_size_inches(width, height)
    page.figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)


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
    page: Page,
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
    [line] = ax.plot(
        x, mean, ms=3.5, markevery=max(1, len(x) // 20), label=label, zorder=3, **style
    )
    page.note(label, line, points["n"], running)
    if band and len(x) == 1:  # a band has no width
        ax.errorbar(x, mean, [mean - low, high - mean], color=style["color"], lw=0.8, capsize=2)
    elif band:
        ax.fill_between(x, low, high, color=style["color"], alpha=0.13, lw=0)


def draw_behind(page: Page, ax: Axes, points: pd.DataFrame, style: dict, differs: str = "") -> None:
    """The paper's curve, thin; `differs` says in what it is of another experiment."""
    thin = {**style, "marker": None, "lw": 0.8, "alpha": 0.8, "zorder": 1}
    [line] = ax.plot(points.index, points["mean"], label=SOURCE, **thin)
    page.note(f"{SOURCE}, {differs}" if differs else SOURCE, line)


def percent(points: pd.DataFrame) -> pd.DataFrame:
    return points.assign(mean=100 * points["mean"], sd=100 * points["sd"])


def ticks(ax: Axes, values: Iterable[int]) -> None:
    """A log2 axis with these numbers on it."""
    values = sorted(values)
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, map(str, values), rotation=40, fontsize=6)
    ax.xaxis.set_minor_locator(NullLocator())


def draw_levels(
    page: Page, shown: list[Curve], plain: list[Curve], title: str, label: str = "short"
) -> None:
    """A panel of accuracy against weights remaining, as in Figure 2; `plain` curves are there to
    compare with, and have no band."""
    ax, remaining = page.panel("weights remaining (%)", "test accuracy (%)", title), {}
    everything = all_data(page.curves)
    for c in [*plain, *shown]:
        style = look(c, everything if c in everything else shown)
        theirs = published(c, page.paper) if c in shown else None
        said = differs(c, theirs) if theirs else ""
        twin = said and any(published(x, page.paper) is theirs for x in shown if x is not c)
        for x in (c, theirs) if theirs and not twin else (c,):
            remaining |= dict(x.points["weights_remaining"].items())
        ours = percent(c.points).set_index("weights_remaining")
        draw_curve(page, ax, ours, style, getattr(c, label), c in shown, c.running)
        if theirs and not twin:
            behind = percent(theirs.points).set_index("weights_remaining")
            draw_behind(page, ax, behind, style, said)
    dense = references((shown or plain)[0], page.curves, page.paper)[0] if shown or plain else None
    if dense is not None:
        page.note("dense", ax.axhline(100 * dense["mean"], label="dense", **DOTTED))
    chosen = [remaining[k] for k in sorted(remaining)[:: max(1, -(-len(remaining) // 8))]]
    ax.set_xscale("log")
    ax.set_xticks(chosen, [f"{100 * v:.3g}" for v in chosen])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.invert_xaxis()


# ---- the figures: each draws the panels of one picture, of one model -----------------------------


def by_size(page: Page, noisy: bool = False, every_size: bool = False) -> None:
    """Figures 2, 4, 11, 13: all data, a panel for each size, step and noise, in Figure 2 also the
    controls and runs from starts of one's own."""
    curves = [c for c in page.curves if len(c.points)]
    mine, full = usual(curves, noisy, ranked=True), all_data(curves)
    settings = sorted({(c.noise, c.step, c.size) for c in mine if c.subset != "all"})
    if not every_size:
        size, t = main_setting(mine)
        settings = [x for x in settings if x[1:] == (t, size)]
    if full and not noisy and not every_size:
        draw_levels(page, full, [], "all data")
    for noise, t, size in settings:
        shown = [c for c in mine if (c.noise, c.step, c.size) == (noise, t, size)]
        steps = {0, t, 2 * t} if not every_size else {2 * t}
        plain = [c for c in full if c.step in ({0} if noise else steps)]
        plain += pick(mine, subset="all", noise=noise) if noise else []
        title = f"{size} examples, {t} steps" + f", {noise:.0%} label noise" * bool(noise)
        draw_levels(page, shown, plain, title)
    if noisy or every_size:
        return
    shown = [c for c in curves if c.control and not c.noise]
    tickets = [c for c in curves if any((c.what, c.step) == (x.what, x.step) for x in shown)]
    tickets = [c for c in tickets if not (c.control or c.noise or c.extra or c.rate)]
    own = [c for c in curves if c.extra and not c.noise]
    if shown:
        draw_levels(page, tickets + shown, [], "controls", "label")
    if own:
        draw_levels(page, own, full, "starts and variants of one's own", "label")


def three_levels(curves: list[Curve]) -> tuple[int, ...]:
    """The paper's 8, 10 and 12, or thirds of what there is."""
    last = max((max(c.points.index) for c in curves if len(c.points)), default=0)
    return (8, 10, 12) if last >= 12 else tuple(sorted({last, -(-2 * last // 3), -(-last // 3)}))


def fig3(page: Page) -> None:
    """Accuracy against subset size at three levels, a row for each rewind step."""
    ours = [c for c in usual(page.curves, ranked=True) if len(c.points)]
    behind, ranked = usual(paper_curves(page.paper), ranked=True), [c for c in ours if c.size]
    steps = sorted({c.step for c in ranked})
    steps = [t for t in steps if len({c.size for c in pick(ranked, step=t)}) > 1]
    for t, k in itertools.product(steps, three_levels(pick(ranked, step={*steps}))):
        here = [c for c in pick(ranked, step=t) if k in c.points.index]
        left = next((c.points.loc[k, "weights_remaining"] for c in here), math.nan)
        title = f"level {k}, {left:.1%} of weights remaining"
        ax = page.panel(f"examples trained on for {t} steps", "test accuracy (%)", title)
        kinds, sizes = {c.kind: c for c in here}, {c.size for c in here}
        for kind, example in kinds.items():
            alike = sorted((c for c in here if c.kind == kind), key=lambda c: c.size)
            points = pd.DataFrame([c.points.loc[k] for c in alike], index=[c.size for c in alike])
            going = any(c.running for c in alike)
            draw_curve(page, ax, percent(points), look(example), example.short, True, going)
            same = [c for c in pick(behind, subset=example.subset, step=t) if k in c.points.index]
            said = differs(example, same[0]) if same else ""
            if same and not (said and any(x.subset == "easy" and x.balance for x in here)):
                same.sort(key=lambda c: c.size)
                theirs = pd.DataFrame([c.points.loc[k] for c in same], index=[c.size for c in same])
                draw_behind(page, ax, percent(theirs), look(example), said)
                sizes |= {*theirs.index}
        full = [c for c in all_data(ours) if k in c.points.index]
        for c in full:
            style = {**look(c, full), "marker": None}
            line = ax.axhline(100 * c.points.loc[k, "mean"], lw=0.9, **style)
            page.note(c.short, line, [c.points.loc[k, "n"]], c.running)
        if (dense := references(here[0], ours, page.paper)[0] if here else None) is not None:
            page.note("dense", ax.axhline(100 * dense["mean"], **DOTTED))
        ticks(ax, sizes)


def prelr(page: Page) -> None:
    """Rates of pre-training, for each step at which there are several: the paper took the best."""
    full = [c for c in pick(page.curves, subset="all", noise=0.0, control="", extra="") if c.step]
    for t in sorted({c.step for c in full}):
        if len(shown := sorted(pick(full, step=t), key=lambda c: c.rate)) > 1:
            draw_levels(page, shown, pick(all_data(page.curves), step=0), f"all data, {t} steps")


def barriers(page: Page) -> pd.DataFrame:
    """A row for each replicate of lmc: its barriers, and the accuracy that imp runs of its model
    reached from the same w_tr at the level of Figure 5, or at the last that each of them has."""
    model, wanted = page.rows["model"].iloc[0], FINAL_LEVEL.get(page.paper, 7)
    imp = page.table[(page.table["stage"] == "imp") & (page.table["model"] == model)]
    imp = imp[(imp["control"] == "") & imp["start"].notna() & imp["level"].notna()]
    reached = imp.groupby("folder")["level"].max()
    level = wanted if not len(reached) or reached.max() >= wanted else int(reached.min())
    final = imp[imp["level"] == level].drop_duplicates(["start", "steps"])
    final = final.set_index(["start", "steps"])["test_accuracy"]
    rows = page.rows[page.rows["done"] & page.rows["loss_barrier"].notna()].copy()
    rows["configuration"] = ""
    for c in page.curves:
        rows.loc[rows.index.intersection(c.rows.index), "configuration"] = c.label
    rows["level"] = level
    keys = zip(rows["start"], rows["steps"], strict=True)
    rows["final_accuracy"] = [final.get(key, math.nan) for key in keys]
    return rows


def draw_histogram(page: Page, curves: list[Curve], what: str, t: int, edges: np.ndarray) -> None:
    """A histogram of Figure 5: pairs, examples and replicates pooled."""
    ax = page.panel("loss barrier of an example", "share (%)", f"{what}, {t} steps")
    for c in curves:
        values = np.concatenate([[], *map(np.ravel, load_all(c.rows, "loss_barrier_pairs.npy"))])
        if len(values):
            share = 100 * np.histogram(values, edges)[0] / len(values)
            outside = f"{np.mean((values < edges[0]) | (values > edges[-1])):.1%} outside"
            bars = ax.stairs(share, edges, fill=True, color=look(c)["color"], alpha=0.55)
            ax.annotate(f"n={c.rows['replicate'].nunique()}, {outside}", (0.97, 0.93),
                        xycoords="axes fraction", ha="right", fontsize=7)  # fmt: skip
            page.note(f"{c.subset}, all pairs and examples", bars)
    rows = paper_table("lmc_histograms.csv")
    rows = rows[rows["dataset"] == page.paper] if len(rows) else rows
    rows = rows[rows["pretraining"] == f"{what}, {t} it"] if len(rows) else rows
    if len(rows):
        bins, count = [*rows["bin_lo"], rows["bin_hi"].iloc[-1]], rows["count_of_1080000"]
        page.note(SOURCE, ax.stairs(100 * count / count.sum(), bins, color="k", lw=0.7))


def correlate(rows: pd.DataFrame, key: str, value: str = "final_accuracy") -> dict[str, Any]:
    known = rows.dropna(subset=[key, value])
    row: dict[str, Any] = {"n": len(known), **dict.fromkeys(("pearson", "p", "spearman", "p_rank"))}
    if len(known) > 2 and known[key].nunique() > 1 and known[value].nunique() > 1:
        plain, rank = (f(known[key], known[value]) for f in (stats.pearsonr, stats.spearmanr))
        row |= {"pearson": plain.statistic, "p": plain.pvalue}
        row |= {"spearman": rank.statistic, "p_rank": rank.pvalue}
    return row


def draw_forecast(page: Page, rows: pd.DataFrame, key: str, column: str, xlabel: str) -> None:
    """Figure 5 right: final accuracy against a forecast of it, a point for each replicate."""
    every, later = (correlate(x, key) for x in (rows, rows[rows["rewind"] > 0]))
    said = [f"r = {x['pearson']:.2f}{what} (n={x['n']})" for x, what in ((every, ""), (later, " without step 0"))
            if x["pearson"] is not None and (what == "" or x["n"] < every["n"])]  # fmt: skip
    level = int(rows["level"].iloc[0]) if len(rows) else FINAL_LEVEL.get(page.paper, 7)
    ylabel = f"test accuracy at level {level} (%)"
    ax, scale = page.panel(xlabel, ylabel, "; ".join(said)), 100 if "accuracy" in key else 1
    theirs = paper_table("lmc_scatter.csv")
    theirs = theirs[theirs["dataset"] == page.paper] if len(theirs) else theirs
    for method, group in theirs.groupby("subset_method") if len(theirs) else ():
        y = pd.to_numeric(group["final_test_accuracy_level7"], errors="coerce")
        color, _, marker = LOOK[method]
        style = {"s": 9, "facecolors": "none", "edgecolors": color, "marker": marker}
        dots = ax.scatter(scale * group[column], 100 * y, lw=0.5, alpha=0.6, zorder=1, **style)
        page.note(SOURCE, dots)
    for c in page.curves:
        mine = rows[rows["configuration"] == c.label]
        if len(mine):
            style = {k: v for k, v in look(c, page.curves).items() if k != "linestyle"}
            dots = ax.scatter(scale * mine[key], 100 * mine["final_accuracy"], s=22, **style)
            page.note(c.label, dots, [len(mine)])


def fig5(page: Page) -> None:
    """Four histograms of barriers, and final accuracy against two forecasts of it."""
    rows, mine = barriers(page), usual(page.curves)
    if not len(rows):
        return
    rows = rows.dropna(subset=["final_accuracy"])
    random, easy, t = HISTOGRAMS.get(page.paper, (0, 0, 0))
    if not pick(mine, subset={"random", "easy"}, size={random, easy}, step=t):
        random, t = main_setting(mine)
        easy = random
    four = [("all", 0, t), ("all", 0, 2 * t), ("random", random, t), ("easy", easy, t)]
    found = [pick(mine, subset=s, size=n, step=step) for s, n, step in four]
    pooled = [
        np.ravel(x) for c in sum(found, []) for x in load_all(c.rows, "loss_barrier_pairs.npy")
    ]
    edges = np.arange(-5, 10.5, 0.5)  # the paper's
    if pooled and not len(paper_table("lmc_histograms.csv").query("dataset == @page.paper")):
        low, high = np.quantile(np.concatenate(pooled), (0.005, 0.995))
        edges = np.linspace(low, high, 31) if low < high else edges
    for k, (s, n, step) in enumerate(four):
        if k == 2:
            at_start = "test accuracy at w_tr (%)"
            draw_forecast(page, rows, "pretrain_accuracy", "pretrain_test_accuracy", at_start)
        draw_histogram(page, found[k], f"{s} {n}" if n else "all data", step, edges)
    draw_forecast(page, rows, "loss_barrier", "mean_train_loss_barrier", "mean loss barrier")


def trained(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["outcome"] == "trained"]


def sharpness(rows: pd.DataFrame) -> pd.DataFrame:
    """The logarithm of the top eigenvalue by step: mean, sd and n, of positive values."""
    pairs = rows["sharpness"].explode().dropna()
    each = pd.DataFrame([*pairs], columns=["step", "eigenvalue"], dtype=float)
    each = each[each["eigenvalue"] > 0]
    return summarise(each.assign(log=np.log(each["eigenvalue"])), "step", "log")


def fig6(page: Page) -> None:
    """A column for each kind of subset: accuracies by length of warmup, then the sharpness at a
    typical length (geometric means and deviations)."""
    curves = [c for c in page.curves if not c.noise]
    warmed = sorted((c for c in curves if c.step), key=lambda c: (c.size, c.offset, c.step))
    lengths = sorted({c.step for c in warmed})
    typical = 1600 if 1600 in lengths else lengths[-1] if lengths else 0
    columns = {k: [c for c in warmed if c.subset == k and not c.offset] for k in SUBSETS[1:]}
    sizes = {c.size for c in warmed if c.offset}
    columns["windows"] = [
        c for c in warmed if c.subset == "easy" and c.size in sizes and not c.balance
    ]
    columns = {k: v for k, v in columns.items() if v} or {"all": []}
    everything, first = pick(warmed, subset="all"), None
    if len(lengths) < 2:
        draw_outcomes(page, pick(curves, step=0) + everything + pick(warmed, subset=SUBSETS[1:]))
    for kind, shown in columns.items() if len(lengths) > 1 else ():
        ax = page.panel("steps of warmup", "test accuracy (%)", kind, sharey=first)
        first, here = first or ax, set(lengths)
        for key in dict.fromkeys((c.kind, c.size) for c in shown + everything):
            alike = [c for c in shown + everything if (c.kind, c.size) == key]
            style = look(alike[0], [*{(c.kind, c.size): c for c in shown}.values()])
            rows = pd.concat([c.rows for c in alike])
            lost = int((rows["done"] & (rows["outcome"] != "trained")).sum())
            what = alike[0].what + f", {lost} not trained" * bool(lost)
            points = percent(summarise(trained(rows), "warmup"))
            draw_curve(page, ax, points, style, what, running=any(c.running for c in alike))
            theirs = paper_warmup(alike[0]) if page.paper == "cifar10" else ()
            if len(theirs):
                draw_behind(page, ax, percent(theirs), style)
                here |= {*theirs.index}
        for c in pick(curves, step=0):
            if len(good := trained(c.rows)):
                level = 100 * good["test_accuracy"].mean()
                page.note("no warmup", ax.axhline(level, **DOTTED), [len(good)])
        ticks(ax, here)
    first = None
    for kind, shown in columns.items():
        ax = page.panel("step", "top Hessian eigenvalue", f"{kind}, warmup {typical}", sharey=first)
        first = first or ax
        shown = pick(shown + everything, step=typical)
        for c in shown + pick(curves, step=0):
            style = look(c, [x for x in shown if x.subset != "all"])
            style |= {"color": "0.6"} if not c.step else {}
            label = c.what if c.step else "no warmup"
            draw_curve(page, ax, sharpness(c.rows), style, label, True, c.running, log=True)
        ax.set_yscale("log")


def draw_outcomes(page: Page, curves: list[Curve]) -> None:
    """Accuracies of a single length of warmup: a column a configuration, a dot a replicate."""
    shown = [(c, trained(c.rows)["test_accuracy"]) for c in curves]
    shown = [(c, 100 * x) for c, x in shown if len(x)]
    if not shown:
        return
    length = max(c.step for c, _ in shown)
    ax = page.panel(
        "", "test accuracy (%)", f"warmup {length}; bars: means" if length else "no warmup"
    )
    for k, (c, x) in enumerate(shown):
        color = look(c)["color"] if c.step else "0.6"
        ax.scatter([k] * len(x), x, s=14, color=color, alpha=0.7)
        ax.hlines(x.mean(), k - 0.25, k + 0.25, color=color)
    names = [(c.what if c.step else "none") + f"\n(n={len(x)})" for c, x in shown]
    ax.set_xticks(range(len(shown)), names, fontsize=6.5)


def tracked(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """A column of the logs by step; of coherence the band is over all batches of all replicates."""
    values = []
    for folder in rows["folder"].unique():
        log = Path(folder) / "log.csv"
        logged = [x for x in runs.read_rows(log) if x.get(kind)] if log.exists() else []
        each = load(Path(folder) / f"{kind}.npy")
        if each is None or len(each) != len(logged):
            each = [[float(x[kind])] for x in logged]
        for x, batches in zip(logged, each, strict=True):
            values += [(int(x["step"]), float(v)) for v in batches]
    return summarise(pd.DataFrame(values, columns=["step", kind]), "step", kind)


def watched(page: Page, c: Curve) -> str:
    """The easy examples whose accuracy a run of pretrain.py logs: those of --easy-size and
    --easy-balance, else of the subset trained on, else of the preset."""
    found = re.search(r"-rewind\d+-easy(\d+)(balanced)?", c.rows["name"].iloc[0])
    preset = options.PRESETS.get(page.dataset)
    size = found[1] if found else c.size or (preset.size if preset else "")
    within = ", class by class" * bool(found[2] if found else c.balance)
    return f"accuracy on the easiest {size}{within}"


def fig7(page: Page) -> None:
    """Learning curves and coherence; a panel for each set of easy examples that was watched."""
    curves = pick(page.curves, step=max(c.step for c in page.curves))
    kinds = [("test_accuracy", "test accuracy", curves)]
    kinds += [("train_accuracy", "accuracy on all training data", curves)]
    for title in dict.fromkeys(watched(page, c) for c in curves):
        kinds.append(("easy_accuracy", title, [c for c in curves if watched(page, c) == title]))
    kinds += [("coherence", "gradients of batches against their mean", curves)]
    for kind, title, shown in kinds:
        found = [(c, points) for c in shown if len(points := tracked(c.rows, kind))]
        cosine = kind == "coherence"
        ax = page.panel("step", "cosine" if cosine else "accuracy (%)", title) if found else None
        for c, points in found:
            n = points.assign(n=c.rows["replicate"].nunique())
            draw_curve(
                page, ax, n if cosine else percent(n), look(c, curves), c.label, True, c.running
            )


def draw_shares(
    page: Page, ax: Axes, values: list, edges: np.ndarray, style: dict, label: str
) -> None:
    """A stepped line of the shares of values in bins, mean and band over replicates; what is
    outside counts in the end bins."""
    share = [
        100 * np.histogram(x.ravel().clip(edges[0], edges[-1]), edges)[0] / x.size for x in values
    ]
    mean, sd = np.mean(share, 0), np.std(share, 0, ddof=1) if len(share) > 1 else 0
    line = ax.stairs(mean, edges, color=style["color"], ls=style["linestyle"], lw=1.2)
    ax.stairs(mean + sd, edges, baseline=mean - sd, fill=True, color=style["color"], alpha=0.13)
    page.note(label, line, [len(values)])


def fig8(page: Page) -> None:
    """Norms of minibatch gradients over the first 200 steps."""
    curves = pick(page.curves, step=min(c.step for c in page.curves))
    found = [(c, [x[:200] for x in load_all(c.rows, "gradient_norm.npy")]) for c in curves]
    found = [(c, norms) for c, norms in found if norms]
    if not found:
        return
    steps = min(200, curves[0].step)
    ax = page.panel(f"norm of a minibatch gradient, first {steps} steps", "share (%)")
    edges = np.linspace(0, max(x.max() for _, norms in found for x in norms), 41)
    for c, norms in found:
        draw_shares(page, ax, norms, edges, look(c, [c for c, _ in found]), c.label)


def projected(c: Curve, level: int) -> list[np.ndarray]:
    """The error of w_tr on each example under the mask of a level, of each replicate."""
    each = [x[level] for x in load_all(c.rows, "projected_error.npy") if level < len(x)]
    if not each:  # format 2
        states = load_all(c.rows, f"level{level:02d}.pt")
        each = [x["projected_error"].numpy() for x in states if "projected_error" in x]
    return each


def fig9(page: Page) -> None:
    """Each pre-training before and after projection; then all before, and all after."""
    size, t = main_setting(usual(page.curves))
    shown = [("all", 0, t), ("all", 0, 2 * t), ("easy", size, t)]
    curves = [
        c for c in usual(page.curves) if len(c.points) and (c.subset, c.size, c.step) in shown
    ]
    last = min(6, *(max(c.points.index) for c in curves)) if curves else 0
    errors = {(c, k): projected(c, k) for c in curves for k in {0, last}}
    curves = [c for c in curves if errors[c, 0] and errors[c, last]]
    edges, axis = np.linspace(0, math.sqrt(2), 41), "||softmax - onehot|| of an example at w_tr"
    under = {0: "dense", last: f"under the mask of level {last}"}
    for c in curves:
        ax = page.panel(axis, "share (%)", c.label)
        for k, title in under.items():
            style = {"color": ("0.4", "#b03060")[k > 0], "linestyle": ("--", "-")[k > 0]}
            draw_shares(page, ax, errors[c, k], edges, style, title)
    for k, title in under.items() if curves else ():
        ax = page.panel(axis, "share (%)", title)
        for c in curves:
            draw_shares(page, ax, errors[c, k], edges, look(c, curves), c.label)


def rivals(page: Page, metric: str) -> None:
    """Figures 10 and 12: other scores against EL2N; pruning after pre-training by them, by EL2N
    with and without balance, and on random subsets."""
    scores = page.metrics()
    other = [m for m in scores if m["metric"] == metric]
    other = [m for m in other if metric != "lmc" or m["folder"].name.startswith("all")]
    other.sort(key=lambda m: m.get("rewind", 0))
    for a, b in itertools.product(other, [m for m in scores if m["metric"] == "el2n"]):
        y, x = (load(m["folder"] / "scores.npy") for m in (a, b))
        if x is not None and y is not None:
            r = stats.spearmanr(x, y).statistic
            title = f"Pearson {np.corrcoef(x, y)[0, 1]:.2f}, Spearman {r:.2f}, n={len(x)}"
            ax = page.panel(f"EL2N score at step {b['score_step']}", f"{a['name']} score", title)
            cells = ax.hexbin(x, y, gridsize=40, bins="log", cmap="viridis", mincnt=1, lw=0.1)
            bar = page.figure.colorbar(cells, cax=ax.inset_axes([1.02, 0, 0.03, 1]))
            bar.set_label("examples")
    curves = [c for c in page.curves if len(c.points) and not (c.control or c.noise or c.extra)]
    by = [c for c in curves if c.metric.split()[:1] == [metric]]
    for size, t in sorted({(c.size, c.step) for c in by}):
        ranked = [
            c for c in curves if (c.size, c.step) == (size, t) and not c.offset and not c.rate
        ]
        kinds = [pick(ranked, subset="random"), pick(ranked, subset="easy", metric="el2n")]
        rival = sorted((c for c in ranked if c in by), key=lambda c: (len(c.metric), c.metric))
        plain = [c for c in all_data(curves) if c.step in (0, t, 2 * t)]
        draw_levels(page, [*itertools.chain(*kinds), *rival], plain, f"{size} examples, {t} steps")


def examples(
    table: pd.DataFrame, outs: Iterable[Path], data_dir: Path, folders: Iterable[str] = ()
) -> Iterator[tuple[str, Picture]]:
    """The easiest and the hardest training images of each class by EL2N, beside the distribution
    of scores in it; `folders` of images by their paths."""
    each = 8  # images at either end
    found = [m for out in outs for m in read_metrics(Path(out)) if m["metric"] == "el2n"]
    for m in [m for m in found if not m["label_noise"][0]]:
        scores, name = load(m["folder"] / "scores.npy"), m["dataset"]
        name = next((d for d in folders if Path(d).stem == name), name)
        try:
            data = load_images(name, data_dir)
        except runs.UserError as e:
            skipped(e)
            continue
        images, labels = np.asarray(data.train_images), np.asarray(data.train_labels)
        known = getattr(data, "fingerprint", m["data"])
        if scores is None or known != m["data"] or len(scores) != len(labels):
            skipped(f"{m['folder']}: scores of other data than {data_dir} holds")
            continue
        of_class = [np.flatnonzero(labels == k) for k in np.unique(labels)]
        of_class.sort(key=lambda i: np.median(scores[i]))
        ranked = [i[np.argsort(scores[i], kind="stable")] for i in of_class]
        rows, (height, width, channels) = len(ranked), images.shape[1:]
        figure = Picture(figsize=(7, 1 + 0.22 * rows), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
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


def load_images(name: str, data_dir: Path) -> Any:
    """Training images and labels; imported late, since no other figure needs data."""
    import torch

    import common

    return common.load_data(name, data_dir, torch.device("cpu"))


ALL, NOISY = (*PUBLISHED, "digits"), ("cifar10", "digits")
LEVELS = "Test accuracy against the weights that remain, by what pre-training saw."


class Kind(NamedTuple):
    stage: str  # that makes its runs
    draw: Callable
    caption: str
    grid: tuple[str, ...] = ALL  # the data sets whose grid in run_all.sh has it
    columns: int = 3


partial = functools.partial
FIGURES = {
    "fig2": Kind("imp", by_size, LEVELS),
    "fig3": Kind("imp", fig3, "Test accuracy against the size of the subset, at three levels."),
    "fig4": Kind("imp", partial(by_size, noisy=True), f"{LEVELS} Labels are resampled in it.", NOISY),
    "fig5": Kind("lmc", fig5, "Loss barriers between children of one start, halfway, and the final "
                 "accuracy of pruning from it; a dot is a replicate."),
    "fig6": Kind("warmup", fig6, "Warmup of the learning rate on a subset: final accuracy, and the "
                 "top Hessian eigenvalue (geometric mean and deviation).", NOISY, 4),
    "fig7": Kind("pretrain", fig7, "Learning curves of pre-training, and the cosine of minibatch "
                 "gradients with their mean.", ("cifar100", "digits"), 2),
    "fig8": Kind("pretrain", fig8, "Norms of minibatch gradients.", NOISY),
    "fig9": Kind("imp", fig9, "Error of w_tr on each training example, dense and under the mask of a "
                 "level."),
    "fig10": Kind("imp", partial(rivals, metric="lmc"), f"LMC scores against EL2N. {LEVELS}",
                  ("cifar100", "cinic10", "digits")),
    "fig11": Kind("imp", partial(by_size, every_size=True), LEVELS),
    "fig12": Kind("imp", partial(rivals, metric="forgetting"),
                  f"Forgetting scores against EL2N. {LEVELS}", NOISY),
    "fig13": Kind("imp", partial(by_size, noisy=True, every_size=True),
                  f"{LEVELS} Labels are resampled in it.", NOISY),
    "prelr": Kind("imp", prelr, "Test accuracy against the weights that remain, by the learning rate "
                  "of pre-training."),
    "examples": Kind("el2n", examples, "Easiest and hardest training images of each class, and the "
                     "distribution of scores in it."),
}  # fmt: skip


def drawn(
    figure: str, table: pd.DataFrame, paper: str | None = None, **where: Any
) -> Iterator[tuple[str, Picture, str]]:
    """(name, picture, caption) of each model that has the runs of a figure."""
    kind = FIGURES[figure]
    if figure == "examples":
        yield from ((name, picture, kind.caption) for name, picture in examples(table, **where))
    for page in pages(table, kind.stage, paper) if figure != "examples" else ():
        kind.draw(page)
        if page.panels:
            arrange(page, kind.columns)
            lines = [f"{figure}, {page.name}. {kind.caption}"]
            lines.append("Lines: means over n replicates; bands: sample standard deviations.")
            thin = f"Thin lines or open dots: {SOURCE}, arXiv 2206.01278."
            lines += [thin] * any(k.startswith(SOURCE) for k in page.entries)
            lines += [f"  {label}" for label in page.labels()]
            if not page.rows["done"].all():
                lines.append("*: runs in progress, with the levels they have.")
            yield page.name, page.figure, "\n".join(lines)


def draw(figure: str, table: pd.DataFrame | str | Path = "results") -> dict[str, Picture]:
    """The pictures of a figure by name, from `frame` or a folder; nothing is written."""
    table = table if isinstance(table, pd.DataFrame) else frame(table)
    where = {"outs": table["out"].unique(), "data_dir": Path("data")}
    with matplotlib.rc_context(STYLE):
        found = drawn(figure, table, **(where if figure == "examples" else {}))
        return {name: picture for name, picture, _ in found}


# ---- tables --------------------------------------------------------------------------------------


def level_rows(page: Page) -> Iterator[dict]:
    """Test accuracy at each level, ours and the paper's, and how they differ."""
    for c in page.curves:
        theirs = published(c, page.paper)
        points = theirs.points if theirs else c.points.iloc[:0]
        found = welch(c.points, points.reindex(c.points.index))
        for k, x in c.points.iterrows():
            p = points.loc[k] if k in points.index else {}
            row = {"configuration": c.legend, "level": k, "ours": x["mean"], "sd": x["sd"]}
            row |= {"weights_remaining": x["weights_remaining"], "n": int(x["n"])}
            row |= {"paper": p.get("mean"), "paper_sd": p.get("sd"), "paper_n": p.get("n")}
            row |= {"paper_is_of": differs(c, theirs) if theirs else ""}
            yield (
                row
                | found.loc[k, ["difference", "standard_error"]].to_dict()
                | {"welch_p": found.loc[k, "p"]}
            )


def compared(curves: list[Curve]) -> Iterator[tuple[Curve, Curve]]:
    """Each curve with those of all data; tickets with their controls."""
    for a, b in itertools.product(curves, curves):
        later = a.subset != "all" or a.step > b.step
        control = (
            b.control and not a.control and (a.what, a.step, a.noise) == (b.what, b.step, b.noise)
        )
        full = b in all_data(curves, b.noise) and b.noise <= a.noise
        if a is not b and (control or (full and later)):
            yield a, b


def rewind_rows(page: Page, error: float) -> list[dict]:
    """t* by the paper's rule: the first step from which sparse networks match dense ones down to
    16.8 % of the weights (level 8), for each learning rate of pre-training."""
    full = pick(page.curves, subset="all", noise=0.0, control="", extra="")
    full = [c for c in full if 0 in c.points.index and len(c.points) > 1]
    rows = []
    for rate in dict.fromkeys(c.rate for c in full):
        starred = False
        for c in sorted(pick(full, rate={rate} | {0.0}), key=lambda c: c.step):
            if c.step == 0 and rate:
                continue
            last = min(8, max(c.points.index))
            levels = [k for k in c.points.index if 0 < k <= last]
            under = sorted({*levels} - {*as_dense(c, c.points.loc[0], levels, error)})
            matches = "no" if under else "yes" if min(c.n) > 1 else "not tested: one replicate"
            star, starred = matches == "yes" and not starred, starred or matches == "yes"
            row = {"pretrain_lr": c.rows["pretrain_lr"].iloc[0], "rewind": c.step, "n": span(c.n)}
            row |= {"level": last, "weights_remaining": c.points.loc[last, "weights_remaining"]}
            row |= {"accuracy": c.points.loc[last, "mean"], "dense": c.points.loc[0, "mean"]}
            row |= {"below_dense_at": ranges(under), "matches_dense": matches}
            rows.append(row | {"t*": "t*" * star, "best_rate": ""})
    for same in pd.DataFrame(rows).groupby("rewind").groups.values() if rows else ():
        if len(same) > 1 and rows[same[0]]["rewind"]:
            best = max(same, key=lambda k: rows[k]["accuracy"])
            rows[best]["best_rate"] = f"best of {len(same)}"
    return rows


def size_rows(page: Page) -> list[dict]:
    """Which size of each kind of subset is best, by the mean over the levels of Figure 3."""
    ranked = [c for c in page.curves if c.size and not c.control and len(c.points)]
    rows, levels = [], [*three_levels(ranked)]
    ranked = [c for c in ranked if {*levels} <= {*c.points.index}]
    for kind, step in dict.fromkeys((c.kind, c.step) for c in ranked):
        alike = [c for c in ranked if (c.kind, c.step) == (kind, step)]
        best = max(alike, key=lambda c: c.points.loc[levels, "mean"].mean())
        for c in alike if len(alike) > 1 else ():
            row = {"configuration": c.legend, "size": c.size, "levels": ranges(levels)}
            row |= {"accuracy": c.points.loc[levels, "mean"].mean(), "best": "best" * (c is best)}
            found, how = over_levels(c, best, levels)
            row |= {k: found[k] for k in ("difference", "standard_error", "p")} | {"tested": how}
            rows.append(row if c is not best else row | dict.fromkeys([*row][-4:]))
    return rows


def onset_rows(page: Page) -> list[dict]:
    """Barriers by spawn point for each kind of pre-training, and from where on children are
    connected: the mean error barrier is below 2 % there and at every later spawn point."""
    done = [c for c in page.curves if c.rows["loss_barrier"].notna().any()]
    rows, start = (
        [],
        pick(all_at_zero := pick(done, subset="all", step=0), noise=0.0) or all_at_zero,
    )
    for kind, size in dict.fromkeys((c.kind, c.size) for c in done):
        alike = [c for c in done if (c.kind, c.size) == (kind, size) and c.step]
        alike = sorted(start + alike, key=lambda c: c.step)
        means = [c.rows["error_barrier"].mean() for c in alike]
        joined = [m < CONNECTED for m in means]
        late = next((k for k in range(len(alike)) if all(joined[k:])), None)
        onset = "none" if late is None else f"step {alike[late].step}"
        for c, mean, connected in zip(alike, means, joined, strict=True):
            loss, error = (c.rows[k].dropna() for k in ("loss_barrier", "error_barrier"))
            row = {"pretraining": alike[-1].what + alike[-1].more, "spawned_at": c.step}
            row |= {"n": len(loss), "loss_barrier": loss.mean(), "sd": loss.std()}
            row |= {"error_barrier": mean, "error_sd": error.std()}
            row |= {
                "connected": "yes" if connected else "no",
                "replicates_connected": int((error < CONNECTED).sum()),
            }
            rows.append(row | {"onset": onset if len(alike) > 1 else "one spawn point"})
    return rows


def correlation_rows(page: Page, rows: pd.DataFrame) -> Iterator[dict]:
    """Of Figure 5's forecasts with the final accuracy, with and without step 0."""
    theirs = paper_table("lmc_scatter.csv")
    theirs = theirs[theirs["dataset"] == page.paper] if len(theirs) else theirs
    names = {
        "pretrain_accuracy": "pretrain_test_accuracy",
        "loss_barrier": "mean_train_loss_barrier",
    }
    for key, column in names.items():
        every, later = correlate(rows, key), correlate(rows[rows["rewind"] > 0], key)
        yield {"forecast": key, "of": "ours, all starts", **every}
        yield {"forecast": key, "of": "ours, without step 0", **later}
        if len(theirs):
            y = pd.to_numeric(theirs["final_test_accuracy_level7"], errors="coerce")
            yield {
                "forecast": key,
                "of": SOURCE,
                **correlate(theirs.assign(final=y), column, "final"),
            }


def warmup_rows(page: Page) -> Iterator[dict]:
    """Final accuracy and sharpness of each configuration, and the paper's accuracy."""
    for c in page.curves:
        good = trained(c.rows)
        theirs = paper_warmup(c) if page.paper == "cifar10" else pd.DataFrame()
        theirs = theirs.loc[[c.step]].reset_index(drop=True) if c.step in theirs.index else None
        ours, lost = as_points(good["test_accuracy"]), int((c.rows["done"]).sum()) - len(good)
        row = {"configuration": c.label, "warmup": c.step, "ours": ours.loc[0, "mean"]}
        row |= {"sd": ours.loc[0, "sd"], "n": len(good), "not_trained": lost}
        for k in ("warmed_eigenvalue", "largest_eigenvalue"):
            row |= {k: good[k].mean(), f"{k}_sd": good[k].std()}
        found = welch(ours, theirs).iloc[0] if theirs is not None else {}
        row |= {"paper": theirs.loc[0, "mean"] if theirs is not None else None}
        yield row | {k: found.get(k) for k in ("difference", "standard_error", "p")}


def warmup_differences(page: Page) -> Iterator[dict]:
    """Between easy, random, hard and all, at each size and length of warmup; paired, too, over
    the replicates that both have."""
    warmed = [c for c in page.curves if c.step and not c.noise and len(trained(c.rows)) > 1]
    for a, b in itertools.combinations(warmed, 2):
        if a.step != b.step or (a.size and b.size and a.size != b.size):
            continue
        row = {"A": a.what, "B": b.what, "warmup": a.step}
        for k in ("test_accuracy", "warmed_eigenvalue", "largest_eigenvalue"):
            x, y = (trained(c.rows).set_index("replicate")[k].dropna() for c in (a, b))
            found, d = welch(as_points(x), as_points(y)).iloc[0], (x - y).dropna()
            row |= {k: found["difference"], f"{k}_se": found["standard_error"]}
            row |= {f"{k}_p": found["p"], f"{k}_paired_n": len(d)}
            p = paired(d.to_frame().T)["p"].iloc[0] if len(d) > 1 else math.nan
            row |= {f"{k}_paired_p": p}
        yield row


def tables(
    table: pd.DataFrame, levels: Iterable[int], slack: float, error: float, paper: str | None = None
) -> Iterator[tuple[str, list[dict]]]:
    for page in pages(table, "imp", paper):
        curves = [c for c in page.curves if len(c.points)]
        yield f"imp-{page.name}", [*level_rows(page)]
        more = curves, page.paper, levels, slack, error
        yield f"verdicts-{page.name}", [compare(a, b, *more) for a, b in compared(curves)]
        yield f"rewind-{page.name}", rewind_rows(page, error)
        yield f"sizes-{page.name}", size_rows(page)
    for page in pages(table, "lmc", paper):
        rows = barriers(page)
        keys = ["configuration", "replicate", "loss_barrier", "error_barrier", "connected"]
        shown = rows[[*keys, "pretrain_accuracy", "level", "final_accuracy"]]
        yield f"lmc-{page.name}", shown.to_dict("records")
        yield f"onset-{page.name}", onset_rows(page)
        yield f"correlations-{page.name}", [*correlation_rows(page, rows)] if len(rows) else []
    for page in pages(table, "warmup", paper):
        yield f"warmup-{page.name}", [*warmup_rows(page)]
        yield f"warmup_differences-{page.name}", [*warmup_differences(page)]


def cell(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{value:.5g}"
    return "" if value is None else str(value)


def wide(page: Page, levels: Iterable[int] = ()) -> list[list[str]]:
    """Rows of a table for a paper: test accuracy in percent, mean ± deviation, a column a level
    (at most seven unless `levels` names them), with as many digits as deviations have meaning."""
    curves = [c for c in page.curves if len(c.points)]
    remaining = {k: v for c in curves for k, v in c.points["weights_remaining"].items()}
    known = sorted(k for k in remaining if not levels or k in levels)
    if not levels and len(known) > 7:
        known = [known[round(i * (len(known) - 1) / 6)] for i in range(7)]
    sd = np.nanmedian([x for c in curves for x in c.points["sd"]] + [math.nan] * 0 or [math.nan])
    digits = 2 if sd < 0.002 else 1
    rows = [["pre-training", "n", *(f"{100 * remaining[k]:.3g} %" for k in known)]]
    for c in curves:
        cells = []
        for k in known:
            x = c.points.loc[k] if k in c.points.index else None
            spread = "" if x is None or math.isnan(x["sd"]) else f" ± {100 * x['sd']:.{digits}f}"
            cells.append("" if x is None else f"{100 * x['mean']:.{digits}f}{spread}")
        rows.append([c.label + "*" * c.running, span(c.n), *cells])
    return rows


def as_csv(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def as_markdown(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(x)} |\n" for x in lines)


def as_latex(rows: list[list[str]]) -> str:
    """A tabular with booktabs' rules."""
    escaped = [
        [re.sub(r"([%&_#$])", r"\\\1", x).replace("±", r"$\pm$") for x in row] for row in rows
    ]
    lines = [" & ".join(x) + r" \\" for x in escaped]
    head = [rf"\begin{{tabular}}{{lr{'c' * (len(rows[0]) - 2)}}}", r"\toprule", lines[0]]
    return "\n".join([*head, r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def write_text(path: Path, text: str) -> None:
    runs.write(path, lambda f: f.write(text.encode()))


def write_table(path: Path, rows: list[list[str]], **more: Callable) -> list[Path]:
    """The same rows as CSV, Markdown and what else is asked for; a Path's suffix is not cut."""
    written = []
    for suffix, form in {"csv": as_csv, "md": as_markdown, **more}.items():
        written.append(path.parent / f"{path.name}.{suffix}")
        write_text(written[-1], form(rows))
    return written


def write_tables(
    folder: Path,
    table: pd.DataFrame,
    levels: Iterable[int],
    slack: float,
    error: float,
    paper: str | None,
) -> Iterator[Path]:
    for name, rows in tables(table, levels, slack, error, paper):
        if rows:
            cells = [[*rows[0]], *([cell(v) for v in row.values()] for row in rows)]
            yield write_table(folder / name, cells)[-1]
    for page in pages(table, "imp", paper):
        if any(len(c.points) for c in page.curves):
            yield write_table(folder / f"accuracy-{page.name}", wide(page, levels), tex=as_latex)[1]


# ---- what is missing -----------------------------------------------------------------------------


def missing(
    table: pd.DataFrame, shown: dict[str, list[str]], datasets: list[str], others: bool
) -> list[tuple[str, list[str]]]:
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
    made = usual(c for p in pages(table, "imp") for c in p.curves)
    for data in datasets if {"fig2", "fig3", "fig11"} & set(shown) else ():
        have = {(c.subset, c.size, c.step) for c in made if c.rows["dataset"].iloc[0] == data}
        wanted = usual(dataclasses.replace(c, balance=False) for c in paper_curves(data))
        wanted = [(c.subset, c.size, c.step) for c in wanted]
        if data == "digits":  # not in the paper: its Figure 2
            p = options.PRESETS[data]
            wanted = [("all", 0, t) for t in (0, p.rewind, 2 * p.rewind)]
            wanted += [(subset, p.size, p.rewind) for subset in SUBSETS[1:]]
        lacking = [x for x in wanted if x not in have]
        for subset, size, t in lacking[:1]:
            command = ["python", "imp.py", "--dataset", data, "--subset", subset]
            command += ["--size", str(size)] * bool(size) + ["--rewind", str(t)]
            more = f"{len(lacking)} curves of {data}, the first"
            lines.append((more, [*command, "--replicate", "0-3"]))
    for data in sorted({*PUBLISHED} - {*datasets}) if others else ():
        lines.append((data, ["bash", "run_all.sh", "--dataset", data]))
    return lines


# ---- comparing two -------------------------------------------------------------------------------

MEASURE = {"imp": "test_accuracy", "warmup": "test_accuracy", "lmc": "loss_barrier"}
MEASURE |= {"pretrain": "pretrain_accuracy"}


def matches(table: pd.DataFrame, pattern: str) -> list[str]:
    """The folders of configurations that end with a name, or match a pattern."""
    folders = sorted({str(Path(f).parent) for f in table["folder"]})
    end = Path(pattern).as_posix().rstrip("/")
    exact = [f for f in folders if f == end or f.endswith(f"/{end.removeprefix('./')}")]
    return exact or [f for f in folders if fnmatch.fnmatchcase(f, f"*/{end}")]


def find_pairs(table: pd.DataFrame, names: list[str]) -> list[tuple[str, str]]:
    """The folders that two names or patterns stand for, each with each, of one stage and, where
    there are any, of one model; UserError with what was probably meant."""
    for stage in STAGES:
        a, b = (matches(table[table["stage"] == stage], x) for x in names)
        pairs = [(x, y) for x, y in itertools.product(a, b) if x != y]
        pairs = [p for p in pairs if p[::-1] not in pairs or p < p[::-1] or a != b]
        same = [p for p in pairs if Path(p[0]).parts[-2] == Path(p[1]).parts[-2]]
        if pairs:
            return same or pairs
    for name in names:
        if not matches(table, name):
            near = difflib.get_close_matches(Path(name).name, {*table["name"]}, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "name one below OUT/imp/"
            raise runs.UserError(f"--compare {name}: no such run; {hint}")
    raise runs.UserError(f"--compare {' '.join(names)}: these are one run, or of different stages")


def compare_two(
    table: pd.DataFrame, pair: tuple[str, str], levels: tuple[int, ...], slack: float, error: float
) -> tuple[list[list[str]], dict]:
    """The rows of a table by level and over levels, and the verdict, of two folders."""
    folders = table["folder"].map(lambda f: str(Path(f).parent))
    both = table[folders.isin(pair)].copy()
    stage = both["stage"].iloc[0]
    measure, scale = MEASURE[stage], 1 if stage == "lmc" else 100
    if stage != "imp":  # one row a run
        both["level"], both["weights_remaining"] = 0, 1.0
        both["test_accuracy"] = both[measure]
    curves = [make_curves(both[folders[both.index] == f])[0] for f in pair]
    a, b = curves
    if stage == "imp":
        model = table[(table["stage"] == "imp") & (table["model"] == both["model"].iloc[0])]
        page = next(p for p in pages(model, "imp") if pair[0] in {*folders[p.rows.index]})
        context = page.curves, page.paper
    else:
        levels, context = (0,), (curves, "")
    summary = compare(a, b, *context, levels, slack, error)
    chosen = [
        k for k in a.points.index if k in b.points.index and (k in levels if levels else True)
    ]
    found = welch(a.points.loc[chosen], b.points.loc[chosen])
    d = shared_differences(a, b, chosen)
    pairs = paired(d) if d.shape[1] > 1 else found.assign(standard_error=math.nan, p=math.nan)

    def shown(x: pd.Series) -> str:
        spread = "" if math.isnan(x["sd"]) else f" ± {scale * x['sd']:.2f}"
        return f"{scale * x['mean']:.2f}{spread}"

    def tested(x: pd.Series, y: pd.Series) -> list[str]:
        numbers = scale * x["difference"], scale * x["standard_error"]
        cells = [f"{v:.2f}" for v in numbers] + [f"{x['p']:.2g}"]
        cells += [f"{scale * y['standard_error']:.2f}", f"{y['p']:.2g}"]
        return ["" if "nan" in v else v for v in cells]

    unit = measure.replace("_", " ") + " (%)" * (scale == 100)
    n = f"paired s.e., n={d.shape[1]}" if d.shape[1] > 1 else "paired s.e."
    rows = [["level", "weights", "A", "B", f"A - B, {unit}", "s.e.", "p", n, "paired p"]]
    for k in chosen:
        x, y = a.points.loc[k], b.points.loc[k]
        left = f"{x['weights_remaining']:.1%}"
        rows.append([str(k), left, shown(x), shown(y), *tested(found.loc[k], pairs.loc[k])])
    sparse = [k for k in chosen if k or len(chosen) == 1]
    means = [c.points.loc[sparse, "mean"].mean() * scale for c in curves]
    each = [c.by_replicate.reindex(sparse).dropna(axis=1).mean() for c in curves]
    x = welch(*map(as_points, each)).iloc[0] if len(sparse) else pd.Series()
    y = over_levels(a, b, sparse)
    y = (
        y[0]
        if y[1].startswith("paired")
        else pd.Series({"standard_error": math.nan, "p": math.nan})
    )
    label = f"mean of {ranges(sparse)}"
    rows.append([label, "", *(f"{m:.2f}" for m in means), *tested(x, y)])
    if stage != "imp":
        rows, summary = [rows[0][2:], rows[1][2:]], {k: summary[k] for k in ("A", "B")}
    return rows, {**summary, "folders": pair}


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{x:>{w}}" for x, w in zip(r, widths, strict=True)) for r in rows)


# ---- command line --------------------------------------------------------------------------------


def flags() -> options.Parser:
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("figure", nargs="*", help=f"of {', '.join(FIGURES)} [all but examples]")
    about = "folder of results; several for --compare and to draw together [results]"
    add("--out", type=Path, action="append", help=about)
    add("--figures", type=Path, help="folder to write to [OUT/figures]")
    add("--data-dir", type=Path, default=Path("data"), help="folder of data, for examples [data]")
    add("--dataset", action="append", help="only this data set, or folder of images")
    add("--paper", choices=PUBLISHED, help="whose curves to draw behind runs on other data")
    about = "two runs, by name, end of path or pattern: differences, standard errors, p, verdict"
    add("--compare", nargs=2, metavar=("A", "B"), help=about)
    add("--levels", type=options.numbers, default=(), help="of verdicts, such as 3-12 [all but 0]")
    fraction = options.number(float, 0, 0.5, open_low=True)
    add("--error", type=fraction, default=0.05, help="family-wise error of verdicts [0.05]")
    about = "standard errors a level of the literal rule, beside the family-wise test [1]"
    add("--slack", type=options.number(float, 0), default=1.0, help=about)
    add("--missing", action="store_true", help="print the commands that make what is missing")
    return parser


def save(picture: Picture, caption: str, path: Path) -> None:
    """PNG, SVG, PDF, and the caption."""
    for kind, about in (("png", {}), ("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
        keep = functools.partial(picture.savefig, format=kind, dpi=160, metadata=about)
        runs.write(path.parent / f"{path.name}.{kind}", keep)
    write_text(path.parent / f"{path.name}.txt", caption + "\n")


def main(args: argparse.Namespace) -> Any:
    """Draws, writes, says what is missing; returns the paths written and what is missing."""
    for name in args.figure:
        if name not in FIGURES:
            near = difflib.get_close_matches(name, FIGURES, 1)
            hint = f"did you mean {near[0]}?" if near else f"not one of {', '.join(FIGURES)}"
            raise runs.UserError(f"{name} is no figure: {hint}")
    outs = [p.expanduser() for p in args.out or [Path("results")]]
    only = {Path(d).stem for d in args.dataset or ()}
    table = frame(outs, only)
    if args.compare:
        pairs = find_pairs(table, args.compare)
        results = []
        for pair in pairs:
            rows, summary = compare_two(table, pair, args.levels, args.slack, args.error)
            heads = (f"{x}: {f}  {summary[x]}" for x, f in zip("AB", pair, strict=True))
            print("\n".join([*heads, "", aligned(rows), ""]))
            lines = {k: v for k, v in summary.items() if k not in ("A", "B", "folders")}
            print("\n".join(f"{k:24} {cell(v)}" for k, v in lines.items()) + "\n" * bool(lines))
            results.append({**summary, "rows": rows})
        return results
    folder = args.figures or outs[0] / "figures"
    where = {"outs": outs, "data_dir": args.data_dir, "folders": args.dataset or ()}
    written, shown = [], {}
    with matplotlib.rc_context(STYLE):
        for figure in args.figure or [x for x in FIGURES if x != "examples"]:
            shown[figure] = []
            more = where if figure == "examples" else {}
            for name, picture, caption in drawn(figure, table, args.paper, **more):
                save(picture, caption, folder / f"{figure}-{name}")
                written.append(folder / f"{figure}-{name}.png")
                shown[figure].append(name)
    if not args.figure:
        written += write_tables(folder, table, args.levels, args.slack, args.error, args.paper)
    datasets = sorted(only) or sorted({*table["dataset"]})
    out = [] if outs == [Path("results")] else ["--out", str(outs[0])]
    lacking = missing(table, shown, datasets, not args.dataset)
    lacking = [f"{what}: {shlex.join(command + out)}" for what, command in lacking]
    for path in written:
        print(path)
    if args.missing:
        print("".join(f"missing: {line}\n" for line in lacking), end="", file=sys.stderr)
    elif lacking:
        print(
            f"missing: {len(lacking)} figures or sets of runs; --missing lists their commands",
            file=sys.stderr,
        )
    if args.figure and not written:
        raise runs.UserError(f"{outs[0]} has nothing to draw {', '.join(args.figure)} from")
    return {"written": written, "missing": lacking}


if __name__ == "__main__":
    runs.run_stage(main, flags())
