"""figures.py, tables.py, records.py: every figure and table from synthetic run folders, read as a
user would see them, with statistics from the raw files."""

import csv
import functools
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import common
import figures
import options
import records
import runs
import tables

PICTURES = [f"fig{k}" for k in range(2, 14)] + ["prelr"]

# ---- figures from synthetic folders --------------------------------------------------------------

SHAPES = {"cifar10": (20, 20), "cifar100": (32, 20), "cinic10": (56, 12)}  # depth, levels
SIZES = {"cifar10": (512, 3200, 6400), "cifar100": (512, 2048, 3200)}
SIZES |= {"cinic10": (12800, 25600, 51200)}
EXAMPLES = 40


class Folders:
    """Run folders of the shape that the stages leave, with made-up numbers."""

    def __init__(self, out: Path, data: str):
        self.out, self.data, self.draw = out, data, np.random.default_rng(1)
        depth, self.levels = SHAPES[data]
        self.model = f"{data}-resnet{depth}"

    def name(self, settings: dict) -> str:
        """easy3200-rewind200-controlreinit"""
        words = settings.get("subset", "all"), settings.get("size", "")
        more = [f"-{k}{v}" for k, v in settings.items() if k not in ("subset", "size")]
        return "".join(map(str, [*words, *more]))

    def put(self, stage: str, replicate: int, result: dict, arrays: dict, **settings) -> Path:
        folder = self.out / stage / self.model / self.name(settings) / f"rep{replicate}"
        folder.mkdir(parents=True)
        usual = {"dataset": self.data, "data": "pixels", "subset": "all", "label_noise": 0.0}
        usual |= {"steps": 62400, "batch_size": 128, "replicate": replicate, "scores": None}
        usual |= {"pretrain_lr": options.PRESETS[self.data].pretrain_lr}
        run = "-".join((stage, self.model, folder.parent.name, str(replicate)))
        config = {"run": run, "settings": usual | settings, "environments": []}
        runs.write_json(folder / "config.json", config)
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

    def imp(self, **settings):
        for k in range(2):
            rows = [
                {"level": i, "weights_remaining": 0.8**i, "seconds": 4.0, "steps_per_second": 9.0,
                 "test_accuracy": 0.91 - 0.004 * i + 0.01 * self.draw.random()}
                for i in range(self.levels + 1)
            ]  # fmt: skip
            start = {"fingerprint": f"{self.name(settings)}-{k}", "test_accuracy": 0.4}
            errors = {"projected_error.npy": self.draw.random((self.levels + 1, EXAMPLES))}
            arrays = errors if settings["rewind"] else {}
            self.put("imp", k, {"pretrain": start, "levels": rows}, arrays, **settings)

    def lmc(self, **settings):
        for k in range(2):
            start = {"fingerprint": f"{self.name(settings)}-{k}", "test_accuracy": 0.4 + 0.1 * k}
            numbers = {"loss_barrier": self.draw.random(), "connected": False}
            numbers["error_barrier"] = 0.01 if settings["rewind"] >= 400 else 0.1
            pairs = {"loss_barrier_pairs.npy": self.draw.normal(0, 2, (3, EXAMPLES))}
            self.put("lmc", k, {"pretrain": start, **numbers}, pairs, **settings)

    def pretrain(self, **settings):
        for k in range(2):
            each = self.draw.random((3, 16))
            arrays = {"gradient_norm.npy": self.draw.random(200), "coherence.npy": each}
            folder = self.put("pretrain", k, {"pretrain": {}}, arrays, **settings)
            names = "phase,step,test_accuracy,train_accuracy,easy_accuracy,coherence\n"
            rows = [f"pretrain,{10 * i},0.{k},0.3,0.{i},{x.mean()}\n" for i, x in enumerate(each)]
            (folder / "log.csv").write_text(names + "".join(rows))

    def warmup(self, **settings):
        for k in range(2):
            tops = [{"step": s, "eigenvalue": 1 + self.draw.random()} for s in (0, 196, 392)]
            result = {"test_accuracy": 0.9 + 0.01 * self.draw.random(), "outcome": "trained"}
            self.put("warmup", k, result | {"sharpness": tops}, {}, **settings)


def build(out: Path, data: str) -> None:
    """What the paper's panels of a data set need."""
    f, preset = Folders(out, data), options.PRESETS[data]
    size, t, cinic = preset.size, preset.rewind, data == "cinic10"
    f.scores("el2n", "el2n", metric="el2n", score_step=preset.score_step)
    by = {x: f.scores("lmc", f"all-rewind{x}", metric="lmc", rewind=x) for x in (800, 1600)}
    forgetting = f.scores("el2n", "forgetting", metric="forgetting", score_step=preset.steps)
    sizes = SIZES[data]
    steps = {t, 200} if cinic else {t}
    for at in sorted({0, 2 * t} | steps):
        f.imp(rewind=at), f.lmc(rewind=at)
    for m, s, at in itertools.product(sizes, records.SUBSETS[1:], steps):
        f.imp(subset=s, size=m, rewind=at), f.lmc(subset=s, size=m, rewind=at)
    easy = {"subset": "easy", "size": size, "rewind": t}
    for control in ("reinit", "shuffle", "one-shot"):
        f.imp(**easy, control=control)
    for scores in by.values():
        f.imp(**easy, scores=scores)
    f.imp(**easy, balance=True, scores=forgetting)
    f.imp(**easy, balance=True)
    f.imp(rewind=2 * t, pretrain_lr=0.2)
    for noise in (0.1, 0.5):
        f.imp(rewind=t, label_noise=noise)
        for m, s in itertools.product(sizes[:2], ("easy", "random")):
            f.imp(subset=s, size=m, rewind=t, label_noise=noise)
    f.pretrain(rewind=1600, easy_size=size, easy_balance=True)
    f.pretrain(subset="easy", size=size, rewind=1600, balance=True)
    f.warmup(warmup=0)
    for at in (100, 400, 1600):
        f.warmup(warmup=at)
        for m, s in itertools.product((5120, 10240), records.SUBSETS[1:]):
            f.warmup(subset=s, size=m, warmup=at)
        for more in ({"balance": True}, {"offset": 25000}):
            f.warmup(subset="easy", size=10240, warmup=at, **more)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Of three data sets, for reading."""
    out = tmp_path_factory.mktemp("synthetic") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.os, "fsync", lambda number: None)  # thousands of files
        for data in SHAPES:
            build(out, data)
    return out


@pytest.fixture
def small(tmp_path) -> tuple[Path, Folders]:
    """Two configurations of CIFAR-10, for writing."""
    f = Folders(tmp_path / "results", "cifar10")
    f.imp(rewind=0)
    f.imp(subset="easy", size=3200, rewind=200)
    return f.out, f


def call(*args: object) -> Any:
    return figures.main(figures.flags().parse_args([str(a) for a in args]))


@functools.cache
def read(out: Path) -> pd.DataFrame:
    return records.frame(out)


@functools.cache
def drawn(results: Path, figure: str) -> dict[str, list]:
    """The panels of each picture by data set, not saved."""
    found = figures.draw(figure, read(results))
    return {name.split("-")[0]: picture.panels for name, picture in found.items()}


@functools.cache
def tables_of(out: Path) -> dict[str, list[dict]]:
    return dict(tables.tables(read(out)))


def clear() -> None:
    """Forgets what was read of a folder that has changed."""
    for cached in (read, drawn, tables_of):
        cached.cache_clear()


def titles(axes: list) -> list[str]:
    return [ax.get_title() for ax in axes]


def labels(ax) -> list[str]:
    """Without n."""
    return [x.split(" (n=")[0] for x in ax.get_legend_handles_labels()[1]]


@pytest.mark.parametrize("figure", PICTURES)
def test_every_figure_is_drawn_for_three_data_sets(results, figure):
    pictures = drawn(results, figure)
    assert set(pictures) == set(SHAPES)
    assert all(ax.has_data() for axes in pictures.values() for ax in axes)


def test_panels_as_in_the_paper(results):
    """Levels, configurations and axes written from the paper's text and captions."""
    for axes in drawn(results, "fig3").values():
        heads = [f"level {k}, {left} of weights remaining" for k, left in
                 ((8, "16.8%"), (10, "10.7%"), (12, "6.9%"))]  # fmt: skip
        assert titles(axes) == heads * (len(axes) // 3)
    five = drawn(results, "fig5")
    assert titles(five["cifar100"])[0] == "all data, 400 steps"
    four = ["all data, 200 steps", "all data, 400 steps", "random 25600, 200 steps",
            "easy 25600, 200 steps"]  # fmt: skip
    assert [titles(five["cinic10"])[k] for k in (0, 1, 3, 4)] == four
    assert titles(five["cifar100"])[3:5] == ["random 3200, 400 steps", "easy 2048, 400 steps"]
    for data, level in (("cifar100", 11), ("cinic10", 7)):
        assert five[data][2].get_ylabel() == f"test accuracy at level {level} (%)"
    six = drawn(results, "fig6")["cifar10"]
    assert titles(six)[:4] == ["easy", "random", "hard", "windows"]
    assert six[0].get_xscale() == "log" and six[0].xaxis.get_transform().base == 2
    easy = ["easy 5120", "easy 10240", "easy 10240 balanced", "all", "no warmup"]
    assert [x for x in labels(six[0]) if x != figures.SOURCE] == easy
    assert "easy 10240 from 25000" in labels(six[3])
    nine = drawn(results, "fig9")["cinic10"]
    each = ["all, step 400", "all, step 800", "easy 51200, step 400"]
    assert titles(nine) == [*each, "dense", "under the mask of level 6"]
    seven = drawn(results, "fig7")["cifar100"]
    assert titles(seven)[2] == "accuracy on the easiest 2048, class by class"
    both = ["all, step 1600", "easy 2048 balanced, step 1600"]
    assert len(seven) == 4 and labels(seven[2]) == both
    [rates] = drawn(results, "prelr")["cifar10"]
    assert rates.get_title() == "all data, 400 steps, at rate 0.4 or as named"
    *_, ten = drawn(results, "fig10")["cinic10"]
    order = [x.split(",")[0] for x in labels(ten) if x.startswith(("random", "easy"))]
    kinds = ("", " balanced", " by lmc 800", " by lmc 1600")
    assert order == ["random", *(f"easy{x}" for x in kinds)]
    lmc = [x for x in ten.lines if " lmc " in x.get_label()]
    assert len({str(x.get_color()) for x in lmc}) == 2


def raw(folder: Path, level: int) -> list[float]:
    files = sorted(folder.glob("rep*/result.json"))
    return [runs.read_json(p)["levels"][level]["test_accuracy"] for p in files]


def test_the_dense_line_is_the_papers_choice(results):
    for figure, path in (
        ("fig2", "cifar10-resnet20/all-rewind400"),
        ("fig2", "cinic10-resnet56/all-rewind400"),
        ("fig2", "cifar100-resnet32/all-rewind800"),
        ("fig4", "cifar10-resnet20/all-rewind200-label_noise0.1"),
    ):
        [ax, *_] = drawn(results, figure)[path.split("-")[0]]
        [dense] = [x for x in ax.lines if x.get_label() == "dense"]
        accuracy = np.mean(raw(results / "imp" / path, 0))
        assert dense.get_ydata()[0] == pytest.approx(100 * accuracy)


def test_controls_stand_beside_the_ticket(results):
    [ax] = [x for x in drawn(results, "fig2")["cifar10"] if x.get_title() == "controls"]
    ticket = "easy 3200, step 200"
    shown = {ticket, *(f"{ticket}, {c}" for c in ("reinit", "shuffle", "one-shot"))}
    lines = {x.get_label(): str(x.get_color()) for x in ax.lines if x.get_label() in shown}
    assert lines.keys() == shown and len({*lines.values()}) == 4
    pairs = {(x["A"], x["B"]) for x in tables_of(results)["verdicts-cifar10-resnet20"]}
    assert (f"{ticket} (n=2)", f"{ticket}, reinit (n=2)") in pairs


def test_balanced_easy_subsets_stand_beside_and_the_papers_behind_one(small):
    """The paper's easy CIFAR-10 subsets were balanced: its curve is behind the balanced one, and
    where there is none a mark says so. A control of another step has no ticket."""
    out, f = small
    [_, ax] = drawn(out, "fig2")["cifar10"]
    assert "Paul et al. 2022" in labels(ax)
    caption = figures.draw("fig2", out)["cifar10-resnet20"].caption
    assert "Paul et al. 2022, balanced" in caption
    f.imp(subset="easy", size=6400, rewind=200)
    for size in (3200, 6400):
        f.imp(subset="easy", size=size, rewind=200, balance=True)
    clear()
    for figure, k in (("fig2", 1), ("fig3", 0), ("fig11", 1)):
        assert "easy balanced" in labels(drawn(out, figure)["cifar10"][k])
    rows = tables_of(out)["imp-cifar10-resnet20"]
    same = [x for x in rows if x["configuration"].startswith("easy 3200") and x["level"] == 5]
    assert [x["paper_is_of"] for x in same] == ["balanced", ""]
    assert same[0]["paper"] == same[1]["paper"] > 0.9
    caption = figures.draw("fig2", out)["cifar10-resnet20"].caption
    assert "Paul et al. 2022, balanced" not in caption


# ---- what is read --------------------------------------------------------------------------------


def test_the_frame_is_tidy(small):
    out, f = small
    table = records.frame(out)
    assert [*table.columns] == records.COLUMNS and len(table) == 4 * 21
    one = table[(table["name"] == "easy3200-rewind200") & (table["level"] == 3)]
    folder = out / "imp/cifar10-resnet20/easy3200-rewind200"
    assert one["test_accuracy"].tolist() == raw(folder, 3)
    assert (one["subset"] == "easy").all() and one["replicate"].tolist() == [0, 1]
    assert one["weights_remaining"].tolist() == pytest.approx([0.512, 0.512])
    f.imp(rewind=0, steps=40)  # another picture
    names = {p.name for p in records.pages(records.frame(out), "imp")}
    assert names == {"cifar10-resnet20-steps40", "cifar10-resnet20-steps62400"}


def test_a_run_in_progress_counts_and_is_marked(small, capsys):
    out, _ = small
    folder = out / "imp/cifar10-resnet20/easy3200-rewind200/rep1"
    (folder / "result.json").unlink()
    assert records.frame(out)["folder"].nunique() == 4, "in its first level it has no log yet"
    assert not capsys.readouterr().err
    names = "phase,step,level,test_accuracy,weights_remaining,seconds,steps_per_second"
    (folder / "log.csv").write_text(f"{names}\nlevel00,62400,0,0.9,1,4,9\nlevel01,624")
    [page] = records.pages(records.frame(out), "imp")
    [_, curve] = page.curves
    assert curve.points["n"].tolist() == [2] + 20 * [1]
    assert curve.legend == "easy 3200, step 200 (n=1-2)*"
    [caption] = [x.caption for x in figures.draw("fig2", out).values()]
    assert "easy (n=1-2)*" in caption and "*: runs in progress" in caption


def test_the_level_of_figure_5_is_of_the_runs_that_barriers_are_of(tmp_path):
    f = Folders(tmp_path / "results", "cifar10")
    f.levels = 3
    for settings in ({"rewind": 0}, {"rewind": 200}):
        f.imp(**settings)
        f.lmc(**settings)
    f.levels = 20
    f.imp(rewind=400)  # deeper, and of no network that has barriers
    [page] = records.pages(records.frame(f.out), "lmc")
    rows = tables.barriers(page)
    assert rows["level"].tolist() == 4 * [3] and rows["final_accuracy"].notna().all()


def test_each_replicate_counts_once(small, capsys):
    """A backup beside it, a copy under another number, and a copy of all the results."""
    out, _ = small
    folder = out / "imp/cifar10-resnet20/all-rewind0"
    for name in ("rep0 (copy)", "rep0.bak", "rep7"):
        shutil.copytree(folder / "rep0", folder / name)
    assert records.frame(out)["folder"].nunique() == 4
    assert capsys.readouterr().err == f"skipped: {folder}/rep7 holds replicate 0\n"
    shutil.rmtree(folder / "rep7")
    shutil.copytree(out, out.parent / "copied")
    assert records.frame([out, out.parent / "copied"])["folder"].nunique() == 4
    assert capsys.readouterr().err.count("is a copy of") == 4


def change(folder: Path, of=lambda config: config["settings"], **values) -> None:
    result = runs.read_json(folder / "result.json")
    of(result["config"]).update(values)
    runs.write_json(folder / "result.json", result)


def test_replicates_of_other_data_or_models_are_not_averaged(small, capsys):
    out, f = small
    f.imp(rewind=400)
    kept = sorted(out.glob("imp/*/all-rewind400/rep*"))
    for key in ("data", "scores"):
        change(kept[1], **{key: "other"})
        assert {*records.frame(out)["folder"]} & {*map(str, kept)} == {str(kept[0])}
        assert f"rep1 is unlike the other replicates ({key} " in capsys.readouterr().err
        change(kept[1], **{key: runs.read_json(kept[0] / "config.json")["settings"].get(key)})
    for k, folder in enumerate(kept):
        change(folder, mask=f"ticket {k}", track=f"{k}")
    assert {*map(str, kept)} <= {*records.frame(out)["folder"]}
    for folder, structure in zip(kept, "ab", strict=True):
        origin = {"model": {"structure": structure}, "code": {"stage": structure}}
        change(folder, lambda config: config, made_from=origin)
    assert (records.frame(out)["name"] == "all-rewind400").sum() == f.levels + 1
    assert "rep1 is unlike the other replicates (structure a, now b)" in capsys.readouterr().err
    change(kept[1], lambda config: config["made_from"], model={"structure": "a"})
    assert (records.frame(out)["name"] == "all-rewind400").sum() == 2 * (f.levels + 1)
    assert "replicates were made by different code (stage)" in capsys.readouterr().err
    for folder in kept:
        change(folder, data="other")
    [found] = call("--out", out, "--compare", "all-rewind400", "all-rewind0")
    assert found["other_settings_of_A"] != found["other_settings_of_B"]


def test_damaged_and_foreign_files_are_named_and_skipped(small, capsys):
    out, _ = small
    path = out / "imp/cifar10-resnet20/all-rewind0/rep0/result.json"
    path.write_bytes(path.read_bytes().replace(b'"level": 1,', b'"level": 7,'))
    for name, value in (("a", {"config": {}}), ("b", {"config": {"settings": None}, "levels": 3})):
        runs.write_json(out / f"imp/cifar10-resnet20/{name}/rep0/config.json", value)
        runs.write_json(out / f"imp/cifar10-resnet20/{name}/rep0/result.json", value)
    (out / "lmc/x/y/rep0").mkdir(parents=True)
    (out / "lmc/x/y/rep0/config.json").write_text("not json")
    assert records.frame(out)["folder"].nunique() == 3
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("skipped")]
    assert len(lines) == 4 and sum(str(path) in x for x in lines) == 1


# ---- what is written -----------------------------------------------------------------------------


def test_pictures_and_tables_are_written(small, capsys):
    out, _ = small
    paths = call("--out", out)["written"]
    printed = capsys.readouterr()
    heads = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "txt": b"fig2, cifar10-resnet20. "}
    for kind, head in heads.items():
        assert (out / f"figures/fig2-cifar10-resnet20.{kind}").read_bytes().startswith(head)
    picture = (out / "figures/fig2-cifar10-resnet20.svg").read_text()
    assert "easy (n=2)" in picture and "Paul et al. 2022" in picture
    assert [str(p) for p in paths] == printed.out.split()
    assert printed.err.count("\n") == 1 and "--missing" in printed.err
    with open(out / "figures/imp-cifar10-resnet20.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    [row] = [x for x in rows if x["configuration"].startswith("all") and x["level"] == "0"]
    accuracy = raw(out / "imp/cifar10-resnet20/all-rewind0", 0)
    assert float(row["ours"]) == pytest.approx(np.mean(accuracy), abs=1e-5)
    assert float(row["sd"]) == pytest.approx(np.std(accuracy, ddof=1), abs=1e-5)
    assert row["paper"] == "0.91535" and row["paper_n"] == "4"
    assert "A_matches_w_t*" in (out / "figures/verdicts-cifar10-resnet20.md").read_text()


def test_a_table_for_a_paper(small):
    """In percent, with the digits that the deviations have, in three forms."""
    out, _ = small
    call("--out", out, "--levels", "0,8")
    table = out / "figures/accuracy-cifar10-resnet20"
    x = np.array(raw(out / "imp/cifar10-resnet20/all-rewind0", 8)) * 100
    cell = f"{x.mean():.1f} ± {x.std(ddof=1):.1f}"
    head, _, first, _ = Path(f"{table}.md").read_text().splitlines()
    assert head == "| pre-training | n | 100 % | 16.8 % |"
    assert first.startswith("| all, step 0 | 2 | ") and first.endswith(f" | {cell} |")
    assert cell in Path(f"{table}.csv").read_text()
    latex = Path(f"{table}.tex").read_text()
    assert r"100 \%" in latex and cell.replace("±", r"$\pm$") in latex
    assert latex.startswith(r"\begin{tabular}{lccc}") and r"\midrule" in latex


def test_tables_of_the_papers_claims(results):
    """t* by the 16.8 % rule, onset of connectivity, correlations, sizes, warmup: each worked out
    here from the files."""
    rows = tables_of(results)["onset-cifar10-resnet20"]
    found = {(x["pretraining"], x["spawned_at"]): (x["connected"], x["onset"]) for x in rows}
    assert found["all", 200] == ("no", "step 400") and found["all", 400] == ("yes", "step 400")
    assert {x["onset"] for x in rows if x["pretraining"] != "all"} == {"none"}
    found = tables_of(results)["correlations-cinic10-resnet56"]
    ours = [x["n"] for x in found if x["of"] != records.SOURCE]
    assert ours[1] == ours[0] - 2, "without both replicates of step 0"
    scatter = pd.read_csv(records.PAPER / "lmc_scatter.csv")
    final = pd.to_numeric(scatter["final_test_accuracy_level7"], errors="coerce")
    r = scatter["mean_train_loss_barrier"].corr(final)
    assert found[-1]["pearson"] == pytest.approx(r) and found[-1]["n"] == final.notna().sum()
    best = [x for x in tables_of(results)["sizes-cifar10-resnet20"] if x["best"]]
    one = next(x for x in best if x["configuration"].startswith("random"))
    folder = "imp/cifar10-resnet20/random{}-rewind200"
    means = {m: np.mean([raw(results / folder.format(m), k) for k in (8, 10, 12)])
             for m in (512, 3200, 6400)}  # fmt: skip
    assert one["size"] == max(means, key=means.get)
    assert one["accuracy"] == pytest.approx(max(means.values()))
    rows = tables_of(results)["warmup_differences-cifar10-resnet20"]
    [row] = [x for x in rows if (x["A"], x["B"], x["warmup"]) == ("easy 5120", "hard 5120", 400)]
    each = [np.array([runs.read_json(p)["test_accuracy"] for p in
                      sorted(results.glob(f"warmup/cifar10-*/{s}5120-warmup400/rep*/result.json"))])
            for s in ("easy", "hard")]  # fmt: skip
    assert row["test_accuracy_p"] == pytest.approx(stats.ttest_ind(*each, equal_var=False).pvalue)
    assert row["test_accuracy_paired_p"] == pytest.approx(stats.ttest_rel(*each).pvalue)


def test_t_star_is_the_first_step_that_matches_dense(tmp_path):
    """Below dense at levels 3 to 8 from step 0, nowhere from 200 and 400 on."""
    f = Folders(tmp_path, "cifar10")
    for rewind, drop in ((0, 0.02), (200, 0.0), (400, 0.0)):
        for k in range(4):
            levels = [(i, 0.8**i, 0.9 - drop * (i > 2) + 0.001 * k) for i in range(9)]
            keys = ("level", "weights_remaining", "test_accuracy")
            rows = [dict(zip(keys, x, strict=True)) for x in levels]
            f.put("imp", k, {"levels": rows}, {}, rewind=rewind)
    rows = tables_of(tmp_path)["rewind-cifar10-resnet20"]
    assert [x["below_dense_at"] for x in rows] == ["3-8", "none", "none"]
    assert [x["t*"] for x in rows] == ["", "t*", ""] and {x["level"] for x in rows} == {8}


# ---- commands ------------------------------------------------------------------------------------


def test_comparing_two_runs(small, capsys):
    """By name; paired over the replicates that both have."""
    out, _ = small
    words = ["--out", out, "--levels", "1-3", "--slack", "2", "--compare"]
    [found] = call(*words, "easy3200-rewind200", "cifar10-resnet20/all-rewind0")
    printed = capsys.readouterr().out
    assert found["A"].startswith("easy 3200") and found["slack_in_standard_errors"] == 2
    assert found["verdict"] in printed and not (out / "figures").exists()
    a, b = (np.array([raw(out / f"imp/cifar10-resnet20/{x}", k) for k in (1, 2, 3)])
            for x in ("easy3200-rewind200", "all-rewind0"))  # fmt: skip
    assert [x["level"] for x in found["rows"]] == ["1", "2", "3", "mean of 1-3"]
    for row, x, y in zip(found["rows"], [*a, a.mean(0)], [*b, b.mean(0)], strict=True):
        assert row["A - B"] == f"{100 * (x.mean() - y.mean()):.2f}"
        assert row["p"] == f"{stats.ttest_ind(x, y, equal_var=False).pvalue:.2g}"
        assert row["paired p"] == f"{stats.ttest_rel(x, y).pvalue:.2g}" and row["pairs"] == "2"
        assert row["A - B"] in printed


def test_the_mean_over_levels_is_of_replicates_that_have_them_all(small):
    out, _ = small
    path = out / "imp/cifar10-resnet20/all-rewind0/rep1/result.json"
    result = runs.read_json(path)
    del result["levels"][2:]
    runs.write_json(path, result)
    mean = call("--out", out, "--compare", "all-rewind0", "easy3200-rewind200")[0]["rows"][-1]
    assert math.isclose(float(mean["A"]) - float(mean["B"]), float(mean["A - B"]), abs_tol=0.011)


def test_comparing_by_pattern_and_across_folders(small, capsys):
    out, f = small
    f.imp(subset="random", size=3200, rewind=200)
    assert len(call("--out", out, "--compare", "*3200*", "all*")) == 2
    other = Folders(out.parent / "other", "cifar10")
    other.draw = np.random.default_rng(7)
    other.imp(rewind=0, lr=0.2)
    theirs = other.out / "imp/cifar10-resnet20/all-rewind0-lr0.2"
    [found] = call("--out", out, "--out", other.out, "--compare", "all-rewind0", theirs)
    assert found["folders"] == (str(out / "imp/cifar10-resnet20/all-rewind0"), str(theirs))
    f.lmc(rewind=0), f.lmc(rewind=200)
    f.warmup(warmup=0), f.warmup(warmup=100)
    [found] = call("--out", out, "--compare", "lmc/*/*rewind0", "lmc/*/*rewind200")
    assert len(found["rows"]) == 1 and found["measure"] == "loss barrier"
    [found] = call("--out", out, "--compare", "all-warmup0", "all-warmup100")
    assert found["measure"] == "test accuracy (%)"
    with pytest.raises(runs.UserError, match=r"no such run \(did you mean easy3200-rewind200\?\)"):
        call("--out", out, "--compare", "easy320-rewind200", "all-rewind0")
    with pytest.raises(runs.UserError, match="one run, or of different stages"):
        call("--out", out, "--compare", "all-warmup0", "easy3200-rewind200")


def test_nothing_is_drawn_from_nothing(tmp_path, capsys):
    assert call("--out", tmp_path, "--missing")["written"] == []
    assert not (tmp_path / "figures").exists()
    assert f"run_all.sh --dataset cifar10 --out {tmp_path}" in capsys.readouterr().err
    for words, problem in (
        (["fig2", "--out", tmp_path, "--dataset", "cifar10"], "nothing to draw fig2"),
        (["fig22", "--out", tmp_path], "fig22: not one of fig2, .*did you mean fig2"),
        (["--out", tmp_path / "nothing"], "nothing is not a folder"),
        (["--levles", "3"], "did you mean --levels"),
    ):
        with pytest.raises(runs.UserError, match=problem):
            call(*words)


def test_a_notebooks_backend_and_an_ascii_terminal_break_nothing(small):
    """As a program: MPLBACKEND of a notebook that is not installed here; a name with an umlaut."""
    out, _ = small
    here = out.rename(out.parent / "größe")
    environment = os.environ | {"MPLBACKEND": "module://no_such.backend", "PYTHONUTF8": "0"}
    environment |= {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    words = [sys.executable, options.HERE / "figures.py", "fig2", "--out", here]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "fig2-cifar10-resnet20.png" in done.stdout, done.stderr
    assert (here / "figures/fig2-cifar10-resnet20.pdf").exists()
    words[-1] = here / "none"
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout


def test_examples_of_the_digits(tmp_path):
    """Scores are positions: the first row begins with the first image of its class."""
    where = {"data_dir": options.HERE / "data"}
    data = common.load_data(options.Settings.complete(where), common.torch.device("cpu"))
    f = Folders(tmp_path, "cifar10")
    f.model = "digits-resnet8"
    f.scores("el2n", "el2n", metric="el2n", score_step=60, data=data.fingerprint)
    scores = np.arange(len(data.train_labels), dtype=np.float32)
    np.save(tmp_path / "el2n/digits-resnet8/el2n/scores.npy", scores)
    [(_, picture)] = figures.examples(records.frame(tmp_path), outs=[tmp_path], **where)
    labels_, tiles = data.train_labels.numpy(), picture.axes[0].get_images()[0].get_array()
    k = min(range(10), key=lambda k: np.median(np.flatnonzero(labels_ == k)))  # the easiest class
    easiest = data.train_images[np.flatnonzero(labels_ == k)[0]]
    assert len(tiles) == 10 * 9 and (tiles[:8, :8] == easiest.numpy().squeeze()).all()
