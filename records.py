"""The runs in results/ as one tidy table, and as curves; the paper's curves.

table = records.frame("results")          a row for each level of each run; also `figures.frame`
for page in records.pages(table, "imp"):  the runs of a model, as curves with mean, sd and n
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import options
import runs

STAGES = ("imp", "pretrain", "lmc", "warmup")
PAPER, SOURCE = options.HERE / "paper", "Paul et al. 2022"
PUBLISHED = ("cifar10", "cifar100", "cinic10")
SUBSETS = ("all", "easy", "random", "hard")
BALANCED = {"cifar10": True, "cinic10": False}  # the paper's easy subsets; of CIFAR-100 unknown
# Settings that tell curves of one picture apart; runs that differ in others get a picture each.
IDENTITY = {"subset", "size", "offset", "balance", "scores", "indices", "label_noise", "rewind"}
IDENTITY |= {"replicate", "track", "every", "easy_size", "easy_balance", "warmup", "pretrain_lr"}
IDENTITY |= {"control", "init", "parent", "mask", "name", "model"}
OPTIONAL = {"data": None, "pretrain_lr": None, "size": 0, "offset": 0, "rewind": 0, "warmup": 0}
OPTIONAL |= {"easy_size": 0, "balance": False, "easy_balance": False, "control": ""}
# Settings that replicates of one configuration may differ in.
OWN = {"replicate", "init", "parent", "mask", "track"}

# ---- reading -------------------------------------------------------------------------------------

VALUES = ["noise", "pretrain_lr", "level", "weights_remaining", "test_accuracy", "test_loss"]
VALUES += ["train_loss", "projected_test_accuracy", "seconds", "steps_per_second"]
VALUES += ["pretrain_accuracy", "loss_barrier", "error_barrier"]
VALUES += ["warmed_eigenvalue", "largest_eigenvalue"]  # at the end of warmup; from there on
COLUMNS = ["out", "stage", "dataset", "model", "name", "variant", "folder", "run", "data", "subset"]
COLUMNS += ["metric", "control", "extra", "start", "outcome", "size", "offset", "rewind", "warmup"]
COLUMNS += ["replicate", "steps", "batch_size", "easy_size", "balance", "easy_balance"]
COLUMNS += ["connected", "done", *VALUES, "sharpness"]


def skipped(reason: Any) -> None:
    """Says on stderr what is left out."""
    runs.warn(f"skipped: {reason}")


def frame(
    out: str | Path | Iterable[str | Path] = "results", datasets: Iterable[str] = ()
) -> pd.DataFrame:
    """Every run below the folder or folders `out` as a tidy table with the columns COLUMNS: a row
    for each level of an imp run, one row for a run of another stage. `name` is the folder of a
    configuration, `folder` that of the run, `done` is False for a run in progress; accuracies and
    `weights_remaining` are fractions. Damaged and foreign files are named on stderr and left out,
    as are copies of runs, barriers between any two networks, runs that diverged, and replicates of
    other settings, data or models than the others of their folder."""
    tops = [Path(top) for top in ([out] if isinstance(out, str | Path) else out)]
    for top in tops:
        if not top.is_dir():
            raise runs.UserError(f"{top} is not a folder: --out names one that holds results")
    metrics = {m["sha256_of_scores"]: m["name"] for top in tops for m in read_metrics(top)}
    rows, first = [], {}
    paths = [(top, path) for top in tops for path in sorted(top.glob("*/*/*/rep*/config.json"))]
    for top, path in paths:
        folder = path.parent
        if path.parts[-5] not in STAGES or not re.fullmatch(r"rep\d+", folder.name):
            continue
        try:
            found = read_run(top, path, metrics)
        except runs.UserError as e:
            found = skipped(e)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as e:
            found = skipped(f"{folder}: not one of our runs ({e!r})")
        if not found:
            continue
        if (original := first.setdefault(found[0]["run"], folder)) != folder:
            skipped(f"{folder} is a copy of {original}")
        elif not datasets or found[0]["dataset"] in datasets:
            rows += found
    odd = dict(unlike_others(rows))
    for folder, why in odd.items():
        skipped(f"{folder} is unlike the other replicates ({why})")
    rows = [row for row in rows if row["folder"] not in odd]
    table = pd.DataFrame(rows, columns=[*COLUMNS, "settings"])
    table[VALUES] = table[VALUES].apply(pd.to_numeric)
    table["variant"] = ""
    for _, same in table.groupby(["stage", "model"]):
        table.loc[same.index, "variant"] = variants(same["settings"])
    return table.drop(columns="settings")


def unlike_others(rows: Iterable[dict]) -> Iterator[tuple[str, str]]:
    """Of each configuration the run folders whose settings are not those of most replicates, and
    what differs. A line on stderr names replicates of different code."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("out", "stage", "model", "name"))
        groups.setdefault(key, {})[row["folder"]] = row
    for group in groups.values():
        shared = set.intersection(*({*row["settings"]} for row in group.values())) - OWN
        kept = {f: {k: str(row["settings"][k]) for k in shared} for f, row in group.items()}
        usual = dict(Counter(tuple(x.items()) for x in kept.values()).most_common(1)[0][0])
        odd = {f: runs.differences(usual, x) for f, x in kept.items() if x != usual}
        yield from odd.items()
        codes = [row["code"] for f, row in group.items() if f not in odd]
        if roles := edited(codes):
            folder = Path(next(iter(group))).parent
            runs.warn(f"{folder}: replicates were made by different code ({', '.join(roles)})")


def edited(codes: list[dict[str, str | None]]) -> list[str]:
    """The files in which runs differ by more than a release, of hashes by role."""
    roles, known = {*itertools.chain(*codes)}, options.released()
    found = {role: {code.get(role) for code in codes} - {None} for role in roles}
    return sorted(role for role, x in found.items() if len(x) > 1 and x - known)


def variants(settings: pd.Series) -> list[str]:
    """For each row "-steps150" and the like, the settings in which rows of a model differ."""
    shared = set.intersection(*({*s} for s in settings)) - IDENTITY  # of formats 2 and 3
    text = {k: [words(s[k]) for s in settings] for k in settings.iloc[0] if k in shared}
    kept = pd.DataFrame(text, index=settings.index)
    differ = [k for k in kept if kept[k].nunique() > 1]
    if "milestones" in differ and kept.groupby("steps")["milestones"].nunique().max() == 1:
        differ.remove("milestones")  # they follow from the steps
    names = ["".join(f"-{k}{row[k]}" for k in differ) for _, row in kept.iterrows()]
    return ["".join(c if c.isalnum() or c in "-_.+" else "+" for c in name) for name in names]


def words(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


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
    row = {"out": str(out), "stage": stage, "model": folder.parts[-3], "name": folder.parent.name}
    made_from = about.get("made_from", {})  # format 2 has none
    model = made_from.get("model", {})
    identity = s | ({"structure": model["structure"]} if "structure" in model else {})
    if stage == "lmc":  # how barriers were measured
        identity |= {k: result[k] for k in ("alphas", "batchnorm") if k in result}
    code = made_from.get("code", {}) | {"model": model.get("code")}
    row |= {"folder": str(folder), "run": about["run"], "done": done}
    row |= {"settings": identity, "code": code}
    row |= {k: s[k] for k in ("dataset", "subset", "replicate", "steps", "batch_size")}
    row |= {"noise": s["label_noise"], "metric": metric_of(s, folder.parent.name, metrics)}
    row |= {k: s.get(k) or usual for k, usual in OPTIONAL.items()}
    own = any(s.get(k) for k in ("init", "parent", "indices"))
    extra = [re.split(r"-(?:rewind|warmup)\d", folder.parent.name)[0]] * own
    extra += [k for k in ("mask" * bool(s.get("mask")), s.get("name")) if k]
    row |= {"extra": ", ".join(extra)}
    if "pretrain" in result:
        row["start"] = result["pretrain"].get("fingerprint")
        row["pretrain_accuracy"] = result["pretrain"].get("test_accuracy")
    log = folder / "log.csv"  # begun with the first level or evaluation
    logged = runs.read_rows(log) if not done and log.exists() else []
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
    if later := [x for step, x in tops if step >= row["warmup"]]:
        row |= {"warmed_eigenvalue": later[0], "largest_eigenvalue": max(later)}
    return [row | {"sharpness": tops}]


def metric_of(settings: dict, name: str, metrics: dict[str, str]) -> str:
    """What a subset was ranked by: of the scores that are there, else by the folder's name."""
    if settings["subset"] not in ("easy", "hard"):
        return ""
    by = re.match(r"(?:easy|hard)[^-]*-(.+?)-(?:rewind|warmup)\d", name)
    by = re.sub(r"^lmc(?=\d)", "lmc ", by[1]) if by else "el2n"
    return metrics.get(settings.get("scores"), by)


def read_metrics(out: Path) -> list[dict]:
    """Every scores.json with `folder`, `model`, `dataset` and `name`: el2n, el2n 1600 (steps other
    than the preset's), lmc 800, forgetting."""
    found = []
    for path in sorted([*out.glob("el2n/*/*/scores.json"), *out.glob("lmc/*/*/scores.json")]):
        try:
            about = runs.read_json(path, "metric", "sha256_of_scores", "label_noise", "data")
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


def load(path: Path) -> np.ndarray | None:
    """An array of a run; None where there is none, or, with a line on stderr, if it is damaged."""
    if not path.exists():
        return None
    try:
        return runs.read_npy(path)
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


def as_points(values: Iterable[float]) -> pd.DataFrame:
    """One row of mean, sd and n."""
    x = pd.Series(list(values), dtype=float).dropna()
    return pd.DataFrame({"mean": [x.mean()], "sd": [x.std()], "n": [len(x)]})


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
        by = f" by {self.metric}" * (self.metric not in ("", "el2n"))
        return " balanced" * bool(self.balance) + by + f" from {self.offset}" * bool(self.offset)

    @property
    def what(self) -> str:
        """The examples: easy 3200 balanced."""
        named = self.subset + f" {self.size}" * bool(self.size)
        return (self.extra if "indices" in self.subset else named) + self.ranking

    @property
    def more(self) -> str:
        extra = self.extra * ("indices" not in self.subset)
        words = self.control, extra, f"rate {self.rate:g}" * bool(self.rate), self.mark
        return "".join(f", {x}" for x in words if x)

    @property
    def label(self) -> str:
        noise = f", {self.noise:.0%} noise" * bool(self.noise)
        return f"{self.what}, step {self.step}{noise}{self.more}"

    @property
    def short(self) -> str:
        """For panels whose title says size, step and noise."""
        step = f", step {self.step}" * (self.subset == "all")
        return f"{self.subset}{self.ranking}{step}{self.more}"

    @property
    def running(self) -> bool:
        return self.rows is not None and not self.rows["done"].all()

    @property
    def n(self) -> list[int]:
        """The numbers of replicates of its points."""
        known = {*self.points["n"]} if len(self.points) else {self.rows["replicate"].nunique()}
        return sorted(known)

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
    n = sorted({int(x) for x in numbers})
    return f"{n[0]}-{n[-1]}" if len(n) > 1 else str(*n)


def make_curve(rows: pd.DataFrame, usual_rate: float) -> Curve:
    """Of the rows of one folder."""
    first = rows.iloc[0]
    points = summarise(rows, "level").join(rows.groupby("level")["weights_remaining"].mean())
    points.index = points.index.astype(int)
    step, rate = first["warmup" if first["stage"] == "warmup" else "rewind"], first["pretrain_lr"]
    other = first["rewind"] and not math.isnan(rate) and rate != usual_rate
    keys = {k: first[k] for k in ("noise", "metric", "control", "extra")}
    keys |= {"balance": bool(first["balance"]), "offset": int(first["offset"])}
    keys |= {"rate": float(rate) if other else 0.0, "points": points, "rows": rows}
    return Curve(first["subset"], int(first["size"]), int(step), **keys)


def make_curves(rows: pd.DataFrame) -> list[Curve]:
    """The configurations of one picture, in the order of its legend."""
    preset = options.PRESETS.get(rows["dataset"].iloc[0])
    frequent = rows.loc[rows["rewind"] > 0, "pretrain_lr"].mode()
    usual_rate = preset.pretrain_lr if preset else frequent[0] if len(frequent) else math.nan
    curves = [make_curve(part, usual_rate) for _, part in rows.groupby(["out", "name"])]
    mark = "out" if rows["out"].nunique() > 1 else "name"
    for alike in grouped(curves, "label").values():
        for c in alike if len(alike) > 1 else ():
            curves[curves.index(c)] = dataclasses.replace(c, mark=c.rows[mark].iloc[0])

    def position(c: Curve) -> tuple:
        rank = [*SUBSETS, c.subset].index(c.subset)
        return rank, c.size, c.step, bool(c.balance), c.label

    return sorted(curves, key=position)


def grouped(curves: Iterable[Curve], *keys: str) -> dict[tuple, list[Curve]]:
    """Those that have these attributes in common, in the order of the first of each."""
    groups: dict[tuple, list[Curve]] = {}
    for c in curves:
        groups.setdefault(tuple(getattr(c, k) for k in keys), []).append(c)
    return groups


def pick(curves: Iterable[Curve], **wanted: Any) -> list[Curve]:
    """Those with these attributes; a set or tuple stands for any of its values."""
    choices = {k: v if isinstance(v, set | tuple) else (v,) for k, v in wanted.items()}
    return [c for c in curves if all(getattr(c, k) in v for k, v in choices.items())]


def usual(curves: Iterable[Curve], noise: bool = False, balanced: bool = False) -> list[Curve]:
    """Those of the paper's main figures, by EL2N; with `balanced` those, too."""
    found = pick(curves, metric=("", "el2n"), offset=0, control="", extra="", rate=0.0)
    return [c for c in found if bool(c.noise) == noise and (balanced or not c.balance)]


def all_data(curves: Iterable[Curve], noise: float = 0.0) -> list[Curve]:
    """By rewind step."""
    full = pick(usual(curves, bool(noise)), subset="all", noise=noise)
    return sorted((c for c in full if len(c.points)), key=lambda c: c.step)


def main_setting(curves: list[Curve]) -> tuple[int, int]:
    """Size and step of Figure 2: a preset's if it is there, else the most frequent."""
    found = Counter((c.size, c.step) for c in curves if c.subset != "all")
    preset = [(p.size, p.rewind) for p in options.PRESETS.values() if (p.size, p.rewind) in found]
    return (preset or [x for x, _ in found.most_common(1)] or [(0, 0)])[0]


def three_levels(curves: list[Curve]) -> tuple[int, ...]:
    """The paper's 8, 10 and 12, or thirds of what there is."""
    last = max((max(c.points.index) for c in curves if len(c.points)), default=0)
    return (8, 10, 12) if last >= 12 else tuple(sorted({last, -(-2 * last // 3), -(-last // 3)}))


@dataclasses.dataclass
class Page:
    """What one picture or table is made from: the runs of a stage and a model."""

    name: str  # the model, and the settings in which its runs differ
    rows: pd.DataFrame  # of one stage
    table: pd.DataFrame  # of all stages
    paper: str = ""  # the data set whose curves of the paper stand behind, or ""

    @functools.cached_property
    def curves(self) -> list[Curve]:
        """Those of imp have a level at least."""
        curves = make_curves(self.rows)
        return [c for c in curves if len(c.points) or c.rows["stage"].iloc[0] != "imp"]

    def metrics(self) -> list[dict]:
        """Scores of this model and data, made without label noise."""
        found = [m for out in self.table["out"].unique() for m in read_metrics(Path(out))]
        mine = self.rows["model"].iloc[0], self.rows["data"].iloc[0]
        return [m for m in found if (m["model"], m["data"]) == mine and not m["label_noise"][0]]


def pages(table: pd.DataFrame, stage: str, paper: str | None = None) -> Iterator[Page]:
    """The configurations of a stage that belong in one picture each."""
    here = table[table["stage"] == stage]
    for (model, variant), rows in here.groupby(["model", "variant"]):
        data = rows["dataset"].iloc[0]  # cifar10-jpeg is cifar10, too
        behind = next((p for p in PUBLISHED if f"{data}-".startswith(f"{p}-")), "")
        yield Page(model + variant, rows, table, paper or behind)


# ---- the paper's numbers -------------------------------------------------------------------------


@functools.cache
def paper_table(name: str, **wanted: Any) -> pd.DataFrame:
    """The rows of a file of paper/ that have these values; none where there is no such file."""
    table = (
        pd.read_csv(PAPER / name) if (PAPER / name).exists() else pd.DataFrame(columns=[*wanted])
    )
    return table[(table[[*wanted]] == pd.Series(wanted)).all(axis=1)]


def paper_scatter(dataset: str) -> pd.DataFrame:
    """lmc_scatter.csv of a data set, in the columns of `tables.barriers`."""
    names = {"subset_method": "subset", "pretrain_test_accuracy": "pretrain_accuracy"}
    names |= {"mean_train_loss_barrier": "loss_barrier"}
    names |= {"final_test_accuracy_level7": "final_accuracy"}
    rows = paper_table("lmc_scatter.csv", dataset=dataset).rename(columns=names)
    rows = rows.reindex(columns=[*names.values()])
    return rows.assign(final_accuracy=pd.to_numeric(rows["final_accuracy"], errors="coerce"))


def paper_points(rows: pd.DataFrame, by: str, *names: str) -> pd.DataFrame:
    """Points from columns of mean, deviation and n, the population deviations as sample ones."""
    mean, sd, n = (rows[k].to_numpy() for k in names)
    columns = {"mean": mean, "sd": sd * np.sqrt(n / np.maximum(n - 1, 1)), "n": n}
    return pd.DataFrame(columns, index=pd.Index(rows[by], name=by)).dropna(subset=["mean"])


@functools.cache
def paper_curves(dataset: str) -> list[Curve]:
    """imp_curves.csv of a data set."""
    table, curves = paper_table("imp_curves.csv", dataset=dataset), []
    by = ["method", "subset_size", "rewind_steps", "label_noise"]
    for (method, size, step, noise), rows in table.groupby(by) if len(table) else ():
        points = paper_points(rows, "level", "accuracy_mean", "accuracy_std", "replicates")
        points["weights_remaining"] = rows["weights_remaining"].to_numpy()
        forgetting = method == "forgetting"
        subset, number = "easy" if forgetting else method, 0 if size == "full" else int(size)
        metric = "forgetting" if forgetting else "el2n" * (method in ("easy", "hard"))
        balance = forgetting or (method == "easy" and BALANCED.get(dataset))
        keys = {"metric": metric, "balance": balance, "points": points}
        curves.append(Curve(subset, number, int(step), float(noise), **keys))
    return curves


def published(c: Curve, paper: str) -> Curve | None:
    """The paper's curve of a configuration, whether or not its easy subset is balanced alike."""
    keys = ("subset", "size", "step", "noise", "metric", "control", "extra", "rate", "offset")
    return next(iter(pick(paper_curves(paper), **{k: getattr(c, k) for k in keys})), None)


def differs(c: Curve, theirs: Curve | None) -> str:
    """ "balanced" or "not balanced" where the paper's easy subset is and ours is not so."""
    if theirs is None or c.subset != "easy" or theirs.balance in (None, c.balance):
        return ""
    return "balanced" if theirs.balance else "not balanced"


def paper_warmup(c: Curve) -> pd.DataFrame:
    """Figure 6 and its windows of the ranking: accuracy by length of warmup."""
    windows = c.subset == "easy" and not c.balance
    kind = ("rolling", "score_window") if windows else ("fig6", c.subset)
    wanted = {"experiment": kind[0], "subset_type": kind[1], "subset_size": c.size or 50000}
    wanted |= {"left_offset": c.offset} if windows else {}
    rows = paper_table("warmup_curves.csv", **wanted)
    if c.subset == "hard" or c.metric not in ("", "el2n") or not len(rows):
        return pd.DataFrame(columns=["mean", "sd", "n"], dtype=float)
    names = ("test_accuracy_mean", "test_accuracy_std", "n_replicates")
    return paper_points(rows, "warmup_steps", *names)
