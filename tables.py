"""The paper's verdicts and tables, and comparisons of any two runs.

Verdicts (Definitions 3.1 and 3.2). A is *below* B at a level where a one-sided Welch test says so,
at a family-wise error of 5 % over the levels (Sidak). A weakly dominates B if it is below at no
level, dominates if its mean is also higher at each, and equals B if neither is below. A matches
w_t*, all data for t* steps, if it is below at no level at which w_t* matches dense; t* is twice A's
own step. Beside it stand the literal rule of the footnote, one standard error a level, which
tells identical starts apart in nine of ten cases, and a test of the mean over the levels: of paired
differences where runs share replicates. With 4 replicates at 12 levels the family-wise test finds a
deficit of one standard deviation in 40 % of cases, of two in 95 % (18 % and 56 % where levels
correlate by .8): "matches" does not mean "equals".
"""

import fnmatch
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

import options
import records
import runs
from lmc import CONNECTED
from records import SOURCE, STAGES, Curve, Page, all_data, as_points, pick, span

FINAL_LEVEL = {"cifar100": 11}  # of the paper's Figure 5, else 7
DENSE = {"cinic10": 400}  # rewind of the run whose level 0 the paper calls dense, else t*
TESTED = ["difference", "standard_error", "p"]

# ---- comparing -----------------------------------------------------------------------------------


def welch(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Of two tables with mean, sd and n, row by row: the difference of the means, its standard
    error, degrees of freedom, the two-sided p, and that of a below b; NaN where a deviation is
    missing."""
    va, vb = a["sd"] ** 2 / a["n"], b["sd"] ** 2 / b["n"]
    df = (va + vb) ** 2 / (va**2 / (a["n"] - 1) + vb**2 / (b["n"] - 1))
    df = df.where(va + vb != 0, a["n"] + b["n"] - 2)
    return tested(a["mean"] - b["mean"], np.sqrt(va + vb), df)


def paired(differences: pd.DataFrame) -> pd.DataFrame:
    """As `welch`, of differences in columns, one for each replicate that two runs share."""
    d, n = differences, differences.shape[1]
    return tested(d.mean(axis=1), d.std(axis=1) / math.sqrt(n), n - 1)


def tested(difference: pd.Series, error: pd.Series, df: pd.Series | int) -> pd.DataFrame:
    """Student's two-sided p of differences with these standard errors, and that of below 0."""
    t = (difference / error).where((difference != 0) | (error != 0), 0.0)
    columns = {"difference": difference, "standard_error": error, "df": df}
    return pd.DataFrame(columns | {"p": 2 * stats.t.sf(abs(t), df), "p_below": stats.t.cdf(t, df)})


def shared_differences(a: Curve, b: Curve, levels: list[int]) -> pd.DataFrame:
    """A - B, level x replicate that both have at all the levels."""
    return (a.by_replicate.reindex(levels) - b.by_replicate.reindex(levels)).dropna(axis=1)


def replicate_means(c: Curve, levels: list[int]) -> pd.DataFrame:
    """Mean, sd and n of the means over the levels of replicates that have them all."""
    return as_points(c.by_replicate.reindex(levels).dropna(axis=1).mean())


def over_levels(a: Curve, b: Curve, levels: list[int]) -> tuple[pd.Series, str]:
    """The test of the mean over the levels, and how it was made: paired, by replicate, or, where
    only means and deviations are known (the paper's), with deviations as of levels that correlate
    fully, the worst case."""
    d = shared_differences(a, b, levels)
    if d.shape[1] > 1:
        return paired(d.mean().to_frame().T).iloc[0], f"paired, n={d.shape[1]}"
    each = [replicate_means(c, levels) for c in (a, b)]
    if min(x.loc[0, "n"] for x in each) > 1:
        return welch(*each).iloc[0], "by replicate"
    worst = []
    for x in (c.points.loc[levels] for c in (a, b)):
        row = {"mean": x["mean"].mean(), "sd": x["sd"].mean(skipna=False), "n": x["n"].min()}
        worst.append(pd.DataFrame([row]))
    return welch(*worst).iloc[0], "levels as if fully correlated"


def limit_of(error: float, tests: int) -> float:
    """The error of each of some tests that makes the family-wise one (Sidak)."""
    return 1 - (1 - error) ** (1 / max(1, tests))


class Rule(NamedTuple):
    """How verdicts are made."""

    levels: tuple[int, ...] = ()  # all but 0
    slack: float = 1.0  # standard errors of the difference, of the literal rule
    error: float = 0.05  # family-wise


USUAL = Rule()


def judge(a: pd.DataFrame, b: pd.DataFrame, levels: list[int], rule: Rule = USUAL) -> pd.DataFrame:
    """`welch` of two tables of points by level, and whether a is `below` or `above` b by the
    family-wise test, or by standard errors (`literally_below`, `literally_above`: where there is no
    deviation, by anything)."""
    found = welch(a.loc[levels], b.loc[levels])
    limit = limit_of(rule.error, int(found["p_below"].notna().sum()))
    found["below"], found["above"] = found["p_below"] < limit, 1 - found["p_below"] < limit
    far = rule.slack * found["standard_error"].fillna(0)
    found["literally_below"] = found["difference"] < -far
    found["literally_above"] = found["difference"] > far
    return found


def verdict(found: pd.DataFrame, by: str = "") -> str:
    """Of A over B (Definition 3.1); `by` is "" or "literally_"."""
    if not len(found):
        return "no common level"
    if not by and found["p_below"].isna().all():
        return "not tested: one replicate"
    under, over = found[f"{by}below"].any(), found[f"{by}above"].any()
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
    return ", ".join(map(span, spans)) or "none"


def detectable(found: pd.DataFrame | pd.Series, limit: float) -> Any:
    """The deficit that a test finds with probability .8."""
    far = stats.t.isf(limit, found["df"]) + stats.t.ppf(0.8, found["df"])
    return far * found["standard_error"]


def references(a: Curve, curves: list[Curve], data: str) -> tuple[pd.Series | None, Curve | None]:
    """The dense network, level 0 of all data at t* or as the paper chose, and w_t*, all data for
    twice the steps of A, or of the main setting; under label noise the noisy ones if there are."""
    full = all_data(curves, a.noise) or all_data(curves)
    t = a.step or records.main_setting(records.usual(curves))[1]
    star = pick(full, step=2 * t)[:1]
    dense = (pick(full, step=DENSE.get(data)) or star or full)[-1:]
    level0 = next((c.points.loc[0] for c in dense if 0 in c.points.index), None)
    return level0, next(iter(star), None)


def as_dense(c: Curve, dense: pd.Series | None, levels: list[int], rule: Rule) -> list[int]:
    """The levels at which a curve is not below the dense network."""
    if dense is None or not levels:
        return []
    found = judge(c.points, pd.DataFrame([dense] * len(levels), index=levels), levels, rule)
    return [*found.index[~found["below"]]]


def matching(
    a: Curve, star: Curve | None, dense: pd.Series | None, levels: list[int], rule: Rule
) -> str:
    """Whether A matches w_t* (Definition 3.2) over the levels where that matches dense."""
    if star is None:
        return "-: all data for twice the steps are not there"
    good = as_dense(star, dense, [k for k in levels if k in star.points.index], rule)
    good = [k for k in good if k in a.points.index]
    if not good:
        return "-: w_t* matches dense at no level"
    found = judge(a.points, star.points, good, rule)
    if found["p_below"].isna().all():
        return "-: one replicate"
    if found["below"].any():
        return f"no: below at {ranges(found.index[found['below']])} of {ranges(good)}"
    mean, _ = over_levels(a, star, good)
    if mean["p_below"] < rule.error:
        return f"yes, but the mean over {ranges(good)} is below (p {mean['p_below']:.2g})"
    return "yes"


def compare(
    a: Curve, b: Curve, curves: list[Curve], data: str, rule: Rule = USUAL
) -> dict[str, Any]:
    """One row of the table of verdicts; `curves` are those to find dense and w_t* among."""
    dense, star = references(a, curves, data)
    chosen = [k for k in a.points.index if (k in rule.levels if rule.levels else k > 0)]
    both = [k for k in chosen if k in b.points.index]
    found = judge(a.points, b.points, both, rule)
    ends = [f"{a.points.loc[k, 'weights_remaining']:.1%}" for k in both[:1] + both[-1:]]
    mean, how = over_levels(a, b, both) if both else (pd.Series(math.nan, found.columns), "-")
    sides = ("above", "below", "literally_above", "literally_below")
    at = {k: ranges(found.index[found[k]]) for k in sides}
    row = {"A": a.legend, "verdict": verdict(found), "B": b.legend, "levels": ranges(both)}
    row |= {"weights_remaining": " to ".join(ends)}
    row |= {"A_above_at": at["above"], "A_below_at": at["below"]}
    row |= {"mean_difference": mean["difference"], "standard_error": mean["standard_error"]}
    row |= {"p": mean["p"], "mean_tested": how, "smallest_difference": found["difference"].min()}
    row |= {"A_matches_w_t*": matching(a, star, dense, chosen, rule)}
    row |= {f"{k}_matches_dense_at": ranges(as_dense(c, dense, [*c.points.index], rule))
            for k, c in zip("AB", (a, b), strict=True)}  # fmt: skip
    row |= {"family_wise_error": rule.error}
    row |= {"deficit_found_at_a_level": detectable(found, limit_of(rule.error, len(both))).median()}
    row |= {"deficit_found_in_the_mean": detectable(mean, rule.error)}
    row |= {"slack_in_standard_errors": rule.slack, "by_slack": verdict(found, "literally_")}
    row |= {"A_above_by_slack": at["literally_above"]}
    return row | {"A_below_by_slack": at["literally_below"]}


# ---- tables --------------------------------------------------------------------------------------


def level_rows(page: Page) -> Iterator[dict]:
    """Test accuracy at each level, ours and the paper's, and how they differ."""
    for c in page.curves:
        theirs = records.published(c, page.paper)
        paper = (theirs.points if theirs else c.points[:0]).reindex(c.points.index)
        found = welch(c.points, paper)
        for k, x in c.points.iterrows():
            row = {"configuration": c.legend, "level": k, "ours": x["mean"], "sd": x["sd"]}
            row |= {"weights_remaining": x["weights_remaining"], "n": int(x["n"])}
            row |= {"paper": paper["mean"][k], "paper_sd": paper["sd"][k], "paper_n": paper["n"][k]}
            row |= {"paper_is_of": records.differs(c, theirs)}
            yield row | found.loc[k, TESTED].to_dict()


def verdict_rows(page: Page, rule: Rule) -> Iterator[dict]:
    """Each curve against those of all data; tickets against their controls."""
    curves = page.curves
    full = {c for noise in {c.noise for c in curves} for c in all_data(curves, noise)}
    for a, b in itertools.permutations(curves, 2):
        same = (a.what, a.step, a.noise) == (b.what, b.step, b.noise)
        control = same and b.control and not a.control
        later = a.subset != "all" or a.step > b.step
        if control or (b in full and b.noise <= a.noise and later):
            yield compare(a, b, curves, page.paper, rule)


def rewind_rows(page: Page, rule: Rule) -> list[dict]:
    """t* by the paper's rule: the first step from which sparse networks match dense ones down to
    16.8 % of the weights (level 8), for each learning rate of pre-training."""
    full = pick(page.curves, subset="all", noise=0.0, control="", extra="")
    full = [c for c in full if 0 in c.points.index and len(c.points) > 1]
    rows, starred = [], set()
    for c in sorted(full, key=lambda c: (c.rate, c.step)):
        last = min(8, max(c.points.index))
        levels = [k for k in c.points.index if 0 < k <= last]
        under = sorted({*levels} - {*as_dense(c, c.points.loc[0], levels, rule)})
        matches = "no" if under else "yes" if min(c.n) > 1 else "not tested: one replicate"
        first = matches == "yes" and c.rate not in starred
        starred |= {c.rate} if first else set()
        mean, alike = c.points["mean"], pick(full, step=c.step)
        rivals = [x.points["mean"][last] for x in alike if last in x.points.index]
        best = len(rivals) > 1 and bool(mean[last] == max(rivals))
        rate = c.rows["pretrain_lr"].iloc[0] if c.step else None
        row = {"pretrain_lr": rate, "rewind": c.step, "n": span(c.n), "level": last}
        row |= {"weights_remaining": c.points.loc[last, "weights_remaining"]}
        row |= {"accuracy": mean[last], "dense": mean[0], "below_dense_at": ranges(under)}
        row |= {"matches_dense": matches, "t*": "t*" * first}
        rows.append(row | {"best_rate": f"best of {len(rivals)}" * best})
    return rows


def size_rows(page: Page) -> Iterator[dict]:
    """Which size of each kind of subset is best, by the mean over the levels of Figure 3."""
    ranked = [c for c in page.curves if c.size and not c.control]
    levels = [*records.three_levels(ranked)]
    ranked = [c for c in ranked if {*levels} <= {*c.points.index}]
    for alike in records.grouped(ranked, "kind", "step").values():
        means = {c: c.points.loc[levels, "mean"].mean() for c in alike}
        best = max(means, key=means.get)
        for c in alike if len(alike) > 1 else ():
            row = {"configuration": c.legend, "size": c.size, "levels": ranges(levels)}
            row |= {"accuracy": means[c], "best": "best" * (c is best)}
            found, how = over_levels(c, best, levels)
            tested = found[TESTED].to_dict() | {"tested": how}
            yield row | (tested if c is not best else dict.fromkeys(tested))


def barriers(page: Page) -> pd.DataFrame:
    """A row for each replicate of lmc: its barriers, and the accuracy that imp runs of its model
    reached from the same w_tr at the level of Figure 5, or at the last that each of them has."""
    model, wanted = page.rows["model"].iloc[0], FINAL_LEVEL.get(page.paper, 7)
    rows = pd.concat([c.rows.assign(configuration=c.label) for c in page.curves])
    rows = rows[rows["done"] & rows["loss_barrier"].notna()].sort_index()
    imp = page.table[(page.table["stage"] == "imp") & (page.table["model"] == model)]
    imp = imp[(imp["control"] == "") & imp["start"].notna() & imp["level"].notna()]
    imp = imp.merge(rows[["start", "steps"]].drop_duplicates())
    reached = imp.groupby("folder")["level"].max()
    level = wanted if not len(reached) or reached.max() >= wanted else int(reached.min())
    final = imp[imp["level"] == level].drop_duplicates(["start", "steps"])
    final = final.set_index(["start", "steps"])["test_accuracy"].rename("final_accuracy")
    return rows.assign(level=level).join(final, on=["start", "steps"])


def onset_rows(page: Page) -> Iterator[dict]:
    """Barriers by spawn point for each kind of pre-training, and from where on children are
    connected: the mean error barrier is below 2 % there and at every later spawn point."""
    done = [c for c in page.curves if c.rows["loss_barrier"].notna().any()]
    start = pick(done, subset="all", step=0)[:1]
    for alike in records.grouped(done, "kind", "size").values():
        alike = start + sorted((c for c in alike if c.step), key=lambda c: c.step)
        joined = [c.rows["error_barrier"].mean() < CONNECTED for c in alike]
        onset = next((f"step {c.step}" for k, c in enumerate(alike) if all(joined[k:])), "none")
        onset = onset if len(alike) > 1 else "one spawn point"
        for c, connected in zip(alike, joined, strict=True):
            loss, error = c.rows["loss_barrier"].dropna(), c.rows["error_barrier"].dropna()
            row = {"pretraining": alike[-1].what + alike[-1].more, "spawned_at": c.step}
            row |= {"n": len(loss), "loss_barrier": loss.mean(), "sd": loss.std()}
            row |= {"error_barrier": error.mean(), "error_sd": error.std()}
            row |= {"connected": "yes" if connected else "no", "onset": onset}
            yield row | {"replicates_connected": int((error < CONNECTED).sum())}


def correlate(rows: pd.DataFrame, key: str) -> dict[str, Any]:
    """Pearson's and Spearman's coefficients of a forecast with the final accuracy, with their p;
    None where they are not defined."""
    known = rows.dropna(subset=[key, "final_accuracy"])
    row: dict[str, Any] = {"n": len(known), **dict.fromkeys(("pearson", "p", "spearman", "p_rank"))}
    x, y = known[key], known["final_accuracy"]
    if len(known) > 2 and x.nunique() > 1 and y.nunique() > 1:
        plain, rank = stats.pearsonr(x, y), stats.spearmanr(x, y)
        row |= {"pearson": plain.statistic, "p": plain.pvalue}
        row |= {"spearman": rank.statistic, "p_rank": rank.pvalue}
    return row


def correlation_rows(page: Page, rows: pd.DataFrame) -> Iterator[dict]:
    """Of Figure 5's forecasts with the final accuracy, with and without step 0."""
    of = {"ours, all starts": rows, "ours, without step 0": rows[rows["rewind"] > 0]}
    theirs = records.paper_scatter(page.paper)
    of |= {SOURCE: theirs} if len(theirs) else {}
    for key, (whose, found) in itertools.product(("pretrain_accuracy", "loss_barrier"), of.items()):
        yield {"forecast": key, "of": whose, **correlate(found, key)}


def trained(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs of warmup that neither diverged nor stayed at chance."""
    return rows[rows["outcome"] == "trained"]


def sharpness(rows: pd.DataFrame) -> pd.DataFrame:
    """The logarithm of the top eigenvalue by step: mean, sd and n, of positive values."""
    pairs = rows["sharpness"].explode().dropna()
    each = pd.DataFrame([*pairs], columns=["step", "eigenvalue"], dtype=float)
    each = each[each["eigenvalue"] > 0]
    return records.summarise(each.assign(log=np.log(each["eigenvalue"])), "step", "log")


def warmup_rows(page: Page) -> Iterator[dict]:
    """Final accuracy and sharpness of each configuration, and the paper's accuracy."""
    for c in page.curves:
        good = trained(c.rows)
        ours, lost = as_points(good["test_accuracy"]), int(c.rows["done"].sum()) - len(good)
        row = {"configuration": c.label, "warmup": c.step, "ours": ours.loc[0, "mean"]}
        row |= {"sd": ours.loc[0, "sd"], "n": len(good), "not_trained": lost}
        for k in ("warmed_eigenvalue", "largest_eigenvalue"):
            row |= {k: good[k].mean(), f"{k}_sd": good[k].std()}
        if page.paper == "cifar10":
            theirs = records.paper_warmup(c).reindex([c.step]).reset_index(drop=True)
            row |= {"paper": theirs.loc[0, "mean"]} | welch(ours, theirs).loc[0, TESTED].to_dict()
        yield row


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
            found, d = welch(as_points(x), as_points(y)).loc[0], (x - y).dropna()
            row |= {k: found["difference"], f"{k}_se": found["standard_error"]}
            row |= {f"{k}_p": found["p"], f"{k}_paired_n": len(d)}
            row |= {f"{k}_paired_p": paired(d.to_frame().T)["p"].iloc[0]}
        yield row


def tables(
    table: pd.DataFrame, rule: Rule = USUAL, paper: str | None = None
) -> Iterator[tuple[str, list[dict]]]:
    """The name and the rows of each table."""
    for page in records.pages(table, "imp", paper):
        yield f"imp-{page.name}", [*level_rows(page)]
        yield f"verdicts-{page.name}", [*verdict_rows(page, rule)]
        yield f"rewind-{page.name}", rewind_rows(page, rule)
        yield f"sizes-{page.name}", [*size_rows(page)]
        yield f"accuracy-{page.name}", wide(page.curves, rule.levels)
    for page in records.pages(table, "lmc", paper):
        rows = barriers(page)
        keys = ["configuration", "replicate", "loss_barrier", "error_barrier", "connected"]
        keys += ["pretrain_accuracy", "level", "final_accuracy"]
        yield f"lmc-{page.name}", rows[keys].to_dict("records")
        yield f"onset-{page.name}", [*onset_rows(page)]
        yield f"correlations-{page.name}", [*correlation_rows(page, rows)] if len(rows) else []
    for page in records.pages(table, "warmup", paper):
        yield f"warmup-{page.name}", [*warmup_rows(page)]
        yield f"warmup_differences-{page.name}", [*warmup_differences(page)]


def wide(curves: list[Curve], levels: Iterable[int] = ()) -> list[dict]:
    """A table for a paper: test accuracy in percent, mean ± deviation, a column a level (at most
    seven unless `levels` names them), with as many digits as the deviations have meaning."""
    remaining = {k: v for c in curves for k, v in c.points["weights_remaining"].items()}
    known = sorted(k for k in remaining if not levels or k in levels)
    if not levels and len(known) > 7:
        known = [known[round(i * (len(known) - 1) / 6)] for i in range(7)]
    digits = 2 if np.median([x for c in curves for x in c.points["sd"]] or [1]) < 0.002 else 1
    rows = []
    for c in curves:
        row = {"pre-training": c.label + "*" * c.running, "n": span(c.n)}
        for k, x in (100 * c.points.reindex(known)[["mean", "sd"]]).iterrows():
            row[f"{100 * remaining[k]:.3g} %"] = mean_sd(x["mean"], x["sd"], digits)
        rows.append(row)
    return rows


def mean_sd(mean: float, sd: float, digits: int) -> str:
    """ "91.5 ± 0.2", without the deviation of a single value; nothing of no value."""
    spread = f" ± {sd:.{digits}f}" * (not math.isnan(sd))
    return "" if math.isnan(mean) else f"{mean:.{digits}f}{spread}"


# ---- writing -------------------------------------------------------------------------------------


def cell(value: Any) -> str:
    """Five digits; nothing where there is no number."""
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{value:.5g}"
    return "" if value is None else str(value)


def write_text(path: Path, text: str) -> None:
    runs.write(path, lambda f: f.write(text.encode()))


def write_table(path: Path, rows: list[dict]) -> Path:
    """As CSV, Markdown, LaTeX (booktabs); the path of the Markdown, as which a person reads it."""
    cells = pd.DataFrame(rows, dtype=object).map(cell)
    lines = [[*cells], ["---"] * len(cells.columns), *cells.to_numpy()]
    markdown = "".join(f"| {' | '.join(x)} |\n" for x in lines)
    columns = "l" + "c" * (len(cells.columns) - 1)
    latex = cells.to_latex(index=False, escape=True, column_format=columns).replace("±", r"$\pm$")
    for suffix, text in {"csv": cells.to_csv(index=False), "md": markdown, "tex": latex}.items():
        write_text(path.parent / f"{path.name}.{suffix}", text)
    return path.parent / f"{path.name}.md"


# ---- comparing two -------------------------------------------------------------------------------

MEASURE = {"imp": "test_accuracy", "warmup": "test_accuracy", "lmc": "loss_barrier"}
MEASURE |= {"pretrain": "pretrain_accuracy"}


def configurations(table: pd.DataFrame, pattern: str) -> list[str]:
    """The folders of configurations that end with a name, or match a pattern."""
    folders = sorted({str(Path(f).parent) for f in table["folder"]})
    end = Path(pattern).as_posix().rstrip("/")
    exact = [f for f in folders if f == end or f.endswith(f"/{end}")]
    return exact or [f for f in folders if fnmatch.fnmatchcase(f, f"*/{end}")]


def find_pairs(table: pd.DataFrame, names: list[str]) -> list[tuple[str, str]]:
    """The folders that two names or patterns stand for, each with each, of one stage and, where
    there are any, of one model; UserError with what was probably meant."""
    for stage in STAGES:
        a, b = (configurations(table[table["stage"] == stage], x) for x in names)
        pairs = {frozenset((x, y)): (x, y) for x, y in itertools.product(a, b) if x != y}
        same = [p for p in pairs.values() if Path(p[0]).parts[-2] == Path(p[1]).parts[-2]]
        if pairs:
            return same or [*pairs.values()]
    for name in names:
        if not configurations(table, name):
            near = options.did_you_mean(Path(name).name, {*table["name"]})
            hint = near or f" (patterns such as '{name}*' work, too)"
            raise runs.UserError(f"--compare {name}: no such run{hint}")
    raise runs.UserError(f"--compare {' '.join(names)}: these are one run, or of different stages")


def compare_two(
    table: pd.DataFrame, pair: tuple[str, str], rule: Rule = USUAL
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Of two folders: the differences by level and in the mean over levels, and, of imp runs, the
    verdict. Paired differences are those of replicates that both have."""
    folders = table["folder"].map(lambda f: str(Path(f).parent))
    both, stage = table[folders.isin(pair)], table.loc[folders == pair[0], "stage"].iloc[0]
    scale, unit = (1, "") if stage == "lmc" else (100, " (%)")
    if stage != "imp":  # as if of one level
        both = both.assign(level=0.0, weights_remaining=1.0, test_accuracy=both[MEASURE[stage]])
    a, b = (records.make_curves(both[folders[both.index] == f])[0] for f in pair)
    if stage == "imp":
        mine = table[(table["stage"] == "imp") & (table["model"] == both["model"].iloc[0])]
        page = next(p for p in records.pages(mine, "imp") if pair[0] in {*folders[p.rows.index]})
        summary = compare(a, b, page.curves, page.paper, rule)
    else:
        summary = {"A": a.legend, "B": b.legend, "measure": MEASURE[stage].replace("_", " ") + unit}
    other = [c.rows["variant"].iloc[0].strip("-") for c in (a, b)]
    if other[0] != other[1]:
        summary |= {f"other_settings_of_{x}": value for x, value in zip("AB", other, strict=True)}
    chosen = rule.levels or [*a.points.index]
    levels = [k for k in a.points.index if k in b.points.index and k in chosen]
    x, y = (c.points.loc[levels] for c in (a, b))
    plain, d = welch(x, y), shared_differences(a, b, levels)
    rows = {"level": [*map(str, levels)]}
    for name, z in (("A", scale * x), ("B", scale * y)):
        rows[name] = [mean_sd(*row, 2) for row in z[["mean", "sd"]].to_numpy()]
    pairs = paired(d)
    if len(sparse := [k for k in levels if k]) > 1:
        rows["level"].append(f"mean of {ranges(sparse)}")
        means = [replicate_means(c, sparse) for c in (a, b)]
        for name, z in zip("AB", means, strict=True):
            rows[name].append(f"{scale * z['mean'].iloc[0]:.2f}")
        plain = pd.concat([plain, welch(*means)])
        pairs = pd.concat([pairs, paired(d.loc[sparse].mean().to_frame().T)])
    for prefix, found in (("", plain), ("paired ", pairs)):
        numbers = {"A - B": scale * found["difference"], "s.e.": scale * found["standard_error"]}
        for key, values in (numbers | {"p": found["p"]}).items():
            if prefix + key != "paired A - B":
                form = "{:.2g}" if key == "p" else "{:.2f}"
                rows[prefix + key] = ["" if math.isnan(v) else form.format(v) for v in values]
    rows["pairs"] = [str(d.shape[1]) * (d.shape[1] > 1)] * len(plain)
    return pd.DataFrame(rows).to_dict("records"), summary


def aligned(rows: list[dict[str, str]]) -> str:
    """As text, columns to the right."""
    cells = [[*rows[0]], *([*row.values()] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{x:>{w}}" for x, w in zip(r, widths, strict=True)) for r in cells)


def print_comparisons(table: pd.DataFrame, names: list[str], rule: Rule) -> list[dict]:
    """What --compare prints, of each pair of runs; the same, as (rows, verdict) in dicts."""
    results = []
    for pair in find_pairs(table, names):
        rows, summary = compare_two(table, pair, rule)
        for name, folder in zip("AB", pair, strict=True):
            runs.say(f"{name}: {summary[name]}, {folder}")
        runs.say(f"\n{aligned(rows)}\n")
        for k, value in summary.items():
            if k not in ("A", "B"):
                runs.say(f"{k:28}{cell(value)}")
        results.append(summary | {"rows": rows, "folders": pair})
    return results
