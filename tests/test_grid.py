"""grid.txt against the curves and points in paper/*.csv, and what grid.py makes of a table."""

import contextlib
import csv
import functools
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import common
import grid
import imp

PAPER = ("cifar10", "cifar100", "cinic10")
REPLICATES = {"imp": "0-3", "pretrain": "0-3", "lmc": "0-1", "warmup": "0-7", "el2n": None}


@functools.cache
def listed(*flags: str) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        grid.main([*flags])
    return printed.getvalue().splitlines()


Run = tuple[str, str, str, int, int, float]  # stage, data set, subset, size, step, label noise


def runs_of(*flags: str) -> list[tuple[Run, dict[str, str]]]:
    """Of each command the part that identifies a curve of the paper, and all of its flags."""
    found = []
    for line in listed(*flags)[:-1]:
        _, script, *words = shlex.split(line)
        given = dict(w[2:].split("=", 1) if "=" in w else (w[2:], "") for w in words)
        step = int(given.get("rewind", given.get("warmup", 0)))
        size, noise = int(given.get("size", 0)), float(given.get("label-noise", 0))
        run = (Path(script).stem, given["dataset"], given.get("subset", ""), size, step, noise)
        found.append((run, given))
    return found


def rows(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((ROOT / "paper" / name).read_text().splitlines()))


# ---- the paper's curves and points ---------------------------------------------------------------


def test_the_curves_of_pruning():
    """imp_curves.csv: figures 2, 3, 11 have exactly its curves of clean labels, 4 and 13 those of
    10 % noise and the same of 50 %, 12 those of forgetting scores; all with four replicates."""
    published = set()
    for r in rows("imp_curves.csv"):
        size, step = int(r["subset_size"].replace("full", "0")), int(r["rewind_steps"])
        published.add(("imp", r["dataset"], r["method"], size, step, float(r["label_noise"])))
    assert len(published) == 87
    forgetting = {x for x in published if x[2] == "forgetting"}
    noisy = {x for x in published if x[-1] and x[-2]}  # at step 0 noise has had no effect
    clean = {x for x in published - forgetting if not x[-1]}

    def pruned(*figures: str) -> list[tuple[Run, dict[str, str]]]:
        found = [x for f in figures for x in runs_of("--only", f) if x[0][0] == "imp"]
        assert {given["replicate"] for _, given in found} == {"0-3"}
        return found

    assert {run for run, _ in pruned("fig2", "fig3", "fig11")} == clean
    wanted = noisy | {(*x[:-1], 0.5) for x in noisy}
    assert {run for run, _ in pruned("fig4", "fig13") if run[4]} == wanted
    found = [x for x in pruned("fig12") if "forgetting" in x[1].get("scores", "")]
    assert {(*run[:2], "forgetting", *run[3:]) for run, _ in found} == forgetting
    assert all("balance" in given for _, given in found)


def test_balanced_and_unbalanced():
    """Where the authors' curves are of balanced easy subsets, CIFAR-10's except for those that
    skip part of the ranking, and Figure 7, both are run; elsewhere the text's alone."""
    for figure in ("fig2", "fig3", "fig4", "fig6", "fig7", "fig8", "fig11", "fig13"):
        for dataset in PAPER:
            if figure == "fig7" or dataset == "cifar10":
                with contextlib.suppress(grid.GridError):
                    found = runs_of("--only", figure, "--dataset", dataset)
                    easy = [x for x in found if x[0][2] == "easy" and "offset" not in x[1]]
                    plain = [run for run, given in easy if "balance" not in given]
                    assert sorted(plain) == sorted(run for run, g in easy if "balance" in g)
                    assert plain
    found = [g for run, g in runs_of() if run[1] != "cifar10" and run[0] != "pretrain"]
    assert not [g for g in found if "balance" in g]


def test_the_curves_of_warmup():
    """warmup_curves.csv, but for the search for the peak rate."""
    wanted = set()
    for r in rows("warmup_curves.csv"):
        if r["experiment"] == "lr_sweep":
            continue
        assert r["n_replicates"] == "8"
        subset = r["subset_type"].replace("score_window", "easy")
        size = 0 if subset == "all" else int(r["subset_size"])
        balanced = subset == "easy" and r["class_balanced"] == "True"
        offset = int(r["left_offset"] or 0)
        wanted.add((subset, size, int(r["warmup_steps"]), balanced, offset))
    found = {
        (run[2], run[3], run[4], "balance" in given, int(given.get("offset", 0)))
        for run, given in runs_of("--only", "fig6")
        if run[0] == "warmup" and given["replicate"] == "0-7"
    }
    extra = {x for x in found - wanted if x[0] not in ("easy", "hard")}
    assert not wanted - found and {x[2] for x in extra} == {0}  # no warmup, to compare with


def test_the_points_of_barriers():
    """lmc_scatter.csv, two replicates a point and step, and the four histograms of CINIC-10;
    NeurIPS Figure 5a names those of CIFAR-100."""
    found = runs_of("--only", "fig5", "--dataset", "cinic10")
    pruned = [(run[1:], given.get("scores")) for run, given in found if run[0] == "imp"]
    points = []
    for run, given in found:
        if run[0] == "lmc" and (run[1:], given.get("scores")) in pruned:
            assert given["replicate"] == "0-1"
            kind = "lmc" if "/lmc/" in given.get("scores", "") else run[2]
            points += [kind] * 2
    assert sorted(points) == sorted(r["subset_method"] for r in rows("lmc_scatter.csv"))
    histograms = {(r["dataset"], r["pretraining"]) for r in rows("lmc_histograms.csv")}
    histograms |= {("cifar100", f"all data, {t} it") for t in (400, 800)}
    histograms |= {("cifar100", "random 3200, 400 it"), ("cifar100", "easy 2048, 400 it")}
    commands = {run for run, _ in runs_of("--only", "fig5")}
    for dataset, what in histograms:
        (subset, size), step = what.split(", ")[0].split(), int(what.split(", ")[1].split()[0])
        size = int(size.replace("data", "0"))
        assert ("lmc", dataset, subset, size, step, 0.0) in commands


def test_the_rate_of_pretraining():
    """0.1, 0.2 and 0.4 at t*, of which the presets have the one that the paper chose."""
    for dataset in PAPER:
        preset = common.PRESETS[dataset]
        found = runs_of("--only", "prelr", "--dataset", dataset)
        rates = sorted(float(g.get("pretrain-lr", preset.pretrain_lr)) for _, g in found)
        assert rates == [0.1, 0.2, 0.4]
        assert {run[2:] for run, _ in found} == {("all", 0, 2 * preset.rewind, 0.0)}


def test_replicates_and_spread():
    assert all(REPLICATES[run[0]] == given.get("replicate") for run, given in runs_of())
    alone = {
        (run[0], run[2] == "all", given["replicate"])
        for run, given in runs_of("--spread", "--only", "fig5", "--dataset", "cinic10")
        if run[0] != "el2n"
    }
    singles = {("imp", x, str(k)) for x in (True, False) for k in range(4)}
    singles |= {("lmc", False, str(k)) for k in range(2)}
    assert alone == singles | {("lmc", True, "0-1")}  # these make scores: a mean over replicates


# ---- what the stages say about the commands ------------------------------------------------------


@functools.cache
def planned(*flags: str) -> list[tuple[str, str, str]]:
    """(wave, folder, folder of the command that makes its scores)."""
    lines = [line.split("\t") for line in listed("--plan", "--out", "nowhere", *flags)][:-1]
    return [(x[0], x[2], "" if x[3] == "-" else lines[int(x[3])][2]) for x in lines]


def test_scores_are_made_first():
    """In an earlier wave and for the same --only, wherever examples are ranked; no folder is made
    by two commands; every stage accepts its flags."""
    for flags in ((), ("--quick",), ("--dataset", "digits")):
        tasks, commands = planned(*flags), runs_of(*flags)
        waves = {folder: wave for wave, folder, _ in tasks}
        assert len(waves) == len(tasks) == len(commands)
        for (wave, _, maker), (run, given) in zip(tasks, commands, strict=True):
            ranked = run[2] in ("easy", "hard") or run[0] == "pretrain"
            assert bool(maker) == ranked and (not maker or waves[maker] < wave)
            assert f"{maker}/".startswith(str(Path(given.get("scores", "/")).parent)[8:])
    figures = [f"fig{n}" for n in range(2, 14)] + ["prelr"]
    for figure in figures:
        assert planned("--quick", "--only", figure)
        assert len(planned("--only", figure)) == len(runs_of("--only", figure))
        for _, folder, maker in planned("--only", figure):
            known = {f: m for _, f, m in planned()}
            assert known[folder] == maker


def test_fig9_alone_needs_errors_after_projection():
    """And no run is listed with and without --projected."""
    found = [(run, given) for run, given in runs_of() if "projected" in given]
    assert {run for run, _ in found} == {x for x, _ in runs_of("--only", "fig9") if x[0] == "imp"}
    assert all(given.get("balance") is None for _, given in found)


def test_cost(tmp_path, monkeypatch):
    """Steps of pruning in closed form; hours by the median of measured rates; gigabytes of
    real networks."""
    monkeypatch.chdir(tmp_path)
    lines = {x.split()[0]: x.split()[1:] for x in listed("--cost", "--rate", "10")}
    preset = common.PRESETS["cifar100"]
    steps = 0
    for run, _ in runs_of("--dataset", "cifar100"):
        if run[0] == "imp":
            steps += 4 * (run[4] + (preset.levels + 1) * (preset.steps - run[4]))
    count = len([run for run, _ in runs_of("--dataset", "cifar100") if run[0] == "imp"])
    hours = f"{steps / (10 * 18 / 30) / 3600:.1f}"
    assert lines["imp/cifar100-resnet32"][:4] == [str(count), str(4 * count), str(steps), hours]
    for k, (seconds, rate) in enumerate([(5, 9), (5, 18), (8, 30)]):
        folder = tmp_path / f"results/imp/cifar100-resnet32/all/rep{k}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"settings": {"batch_size": 64}}))
        level = {"level": 0, "seconds": seconds, "steps_per_second": rate}
        (folder / "result.json").write_text(json.dumps({"levels": [level]}))
    (tmp_path / "results/imp/cifar100-resnet32/all/rep9").mkdir()
    assert grid.rates(tmp_path / "results") == {"cifar100-resnet32": 64 * 18}
    listed.cache_clear()
    lines = {x.split()[0]: x.split()[1:] for x in listed("--cost")}
    assert lines["imp/cifar100-resnet32"][3] == f"{steps * 128 / (64 * 18) / 3600:.1f}"
    assert lines["all"][3] == "-"
    for depth, width, channels, classes in ((20, 16, 3, 10), (8, 4, 1, 7)):
        state = common.ResNet(depth, width, channels, classes).state_dict()
        size = sum(x.numel() * x.element_size() for x in state.values())
        size += sum(x.numel() for x in state.values() if x.ndim > 1)  # the mask
        assert grid.bytes_of_network(depth, width, channels, classes) == size


# ---- the format ----------------------------------------------------------------------------------


def expand(tmp_path: Path, text: str, *flags: str) -> list[str]:
    path = tmp_path / "grid.txt"
    path.write_text(text)
    listed.cache_clear()
    lines = listed("--grid", str(path), "--python", "py", *flags)
    return [x.replace(" --out=results --data-dir=data", "") for x in lines]


def test_alternatives_additions_and_merging(tmp_path):
    text = """
    + * *            --width=4
    + imp b          --levels=3 --width=8
    2 fig2 imp a|b   --subset=easy --size=1|2 |--balance   # a comment
    1 fig3 el2n a
    1 fig3 el2n a    --label-noise=0.5
    3 fig4 imp a     --subset=easy --size=1 --projected
    2 fig5 lmc a     --subset=all
    """
    a = ["--size=1 --projected", "--size=1 --balance", "--size=2", "--size=2 --balance"]
    b = ["--size=1", *a[1:]]
    lines = expand(tmp_path, text)
    assert lines == [
        "py el2n.py --dataset=a --width=4",
        "py el2n.py --dataset=a --label-noise=0.5 --width=4",
        *(f"py imp.py --dataset=a --subset=easy {x} --width=4" for x in a),
        "py lmc.py --dataset=a --subset=all --width=4",
        *(f"py imp.py --dataset=b --subset=easy {x} --width=8 --levels=3" for x in b),
        "py figures.py --out=results",
    ]
    only = expand(tmp_path, text, "--only", "fig4")
    assert only == [lines[0], lines[2], "py figures.py fig4 --out=results"]
    assert expand(tmp_path, text, "--wave", "4") == lines[-1:]
    assert len(expand(tmp_path, text, "--wave", "2", "--dataset", "b")) == 4


def test_a_folder_of_images_takes_the_runs_of_a_preset(tmp_path):
    text = "2 fig2 imp cifar100 --scores=RESULTS/lmc/cifar100-resnet32/all/scores.npy\n"
    flags = ["--dataset", str(tmp_path), "--preset", "cifar100", "--out", "o"]
    command, figures = expand(tmp_path, text, *flags)
    scores = f"--scores=o/lmc/{tmp_path.name}-resnet32/all/scores.npy"
    assert {f"--dataset={tmp_path}", "--preset=cifar100", scores} <= {*shlex.split(command)}
    assert figures == f"py figures.py --dataset={tmp_path} --out=o"
    (other := tmp_path / "a.b").mkdir()
    (tmp_path / "own.npz").touch()
    for own, name in ((other, "a"), (tmp_path / "own.npz", "own")):  # as in the folders of runs
        command, _ = expand(tmp_path, text, "--dataset", str(own), "--preset", "cifar100")
        assert f"/lmc/{name}-resnet32/all/" in command


def test_runs_of_other_data_of_the_same_name_are_not_finished(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    text = "2 a imp digits --subset=all --steps=2 --rewind=1 --levels=0 --batch-size=20"
    for name in "ab":
        (tmp_path / name).mkdir()
        labels = np.arange(40) % (2 if name == "a" else 4)
        values = dict(zip(keys, (images, labels) * 2, strict=True))
        np.savez(path := tmp_path / name / "own.npz", **values)
        flags = ("--dataset", str(path), "--preset", "digits", "--out", str(tmp_path / "r"))
        flags = (*flags, "--data-dir", str(tmp_path))
        [line, _] = expand(tmp_path, text, "--plan", *flags)
        assert "\ttodo\t" in line
        if name == "a":
            imp.main(imp.flags().parse_args([*shlex.split(line.split("\t")[-1])[2:], "--quiet"]))
            assert "\tdone\t" in expand(tmp_path, text, "--plan", *flags)[0]


def test_mistakes_in_a_grid_name_the_line(tmp_path):
    for wrong in ("2 fig2 train digits", "two fig2 imp digits", "2 fig2", "+ imp", "2 a imp 'd",
                  "2 a imp digits --size 64", "2 a imp digits --size=1 --size=2",
                  "+ impp * --size=1"):  # fmt: skip
        with pytest.raises(grid.GridError, match=r"grid.txt, line 2: not `wave figures stage"):
            expand(tmp_path, f"# a grid\n{wrong}\n")
    for text, match in (
        ("5 a imp digits", "line 1: wave 5 is not 1, 2 or 3"),
        ("2 a imp digits\n+ imp * --levels=1", "line 2: adds to no command below it"),
        ("2 a imp digits --out=x", "line 1: --out is a flag of run_all.sh"),
        ("# nothing", "holds no run"),
    ):
        with pytest.raises(grid.GridError, match=match):
            expand(tmp_path, text)
    for wrong in ("0-", "3-1"):  # for the stage to refuse
        [command, _] = expand(tmp_path, f"2 a imp digits --replicate={wrong}", "--spread")
        assert f"--replicate={wrong}" in command
    assert len(expand(tmp_path, "2 a imp digits --replicate=0-1,3", "--spread")) == 4
    late = "1 a el2n digits\n1 a imp digits --subset=easy --size=64\n"
    with pytest.raises(grid.GridError, match="not in a later wave than what makes its scores: imp"):
        expand(tmp_path, late, "--plan")
    with pytest.raises(grid.GridError, match=r"imp .*--size=-1 .*: argument --size"):
        expand(tmp_path, "2 a imp digits --size=-1", "--plan")


def test_the_half_size_grid():
    """paper/ours/half: pruning of 6 starts and 2 balanced ones, and of 5 under label noise."""
    path = str(ROOT / "paper/ours/half/grid.txt")
    found = [run for run, _ in runs_of("--grid", path)]
    assert [sum(run[0] == x for run in found) for x in ("el2n", "imp", "lmc")] == [2, 13, 6]
    tasks = planned("--grid", path)
    ranked = [maker for _, _, maker in tasks if maker]
    assert len(ranked) == 8 and sum("noise0.5" in maker for maker in ranked) == 2


def test_a_list_imports_no_torch_and_no_plan_matplotlib():
    code = "import sys, grid; {}; grid.main(sys.argv[1:])"
    for without, flags in (("torch", ["--list"]), ("matplotlib", ["--cost", "--quick"])):
        command = code.format(f"sys.modules['{without}'] = None")
        done = subprocess.run(
            [sys.executable, "-c", command, *flags], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout, done.stderr
