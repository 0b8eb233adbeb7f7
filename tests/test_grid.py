"""The grid of run_all.sh against the panels of the paper, each figure of each data set exactly.

The table below is written from the texts (the NeurIPS version leads; figures by the numbers of
figures.py) and from paper/*.csv. A line: stage, subset, sizes, @ steps, and what is unusual.
"""

import argparse
import csv
import functools
import importlib
import itertools
import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIGURES = [f"fig{n}" for n in range(2, 14)]
PAPERS = ("cifar10", "cifar100", "cinic10")

# Sizes and steps as the figures' axes and legends have them.
SIZES = {
    "cifar10": "256,512,1024,2048,3200,6400,12800,25600",
    "cifar100": "256,512,1024,2048,3200,6400",
    "cinic10": "12800,25600,51200,102400",
}
WARMUPS = "100,200,400,600,800,1200,1600,2400,3200"

# What curves are compared with: all data for 0, t*/2 and t* steps.
BASE = {
    "cifar10": "imp all @0,200,400",
    "cifar100": "imp all @0,400,800",
    "cinic10": "imp all @0,400,800",
}
EL2N = "el2n"  # wherever easy or hard examples are: Appendix A, K = 10
# Figure 5 right, CINIC-10 (lmc_scatter.csv): easy and random for 200 and 400 steps, LMC-scored for
# 400; sizes up to 51200. CIFAR-100's points are not public: its Figure 10 has these sizes.
SCATTER100, SCATTER_CINIC = "512,1024,2048,3200", "12800,25600,51200"

PANELS = {
    # Figure 2: M = 3200, 2048, 51200 for t*/2 steps. CIFAR-10's easy subsets are class-balanced in
    # the authors' figures and not in their text: both.
    ("fig2", "cifar10"): [
        EL2N,
        BASE["cifar10"],
        "imp easy,random,hard 3200 @200",
        "imp easy 3200 @200 balance",
    ],
    ("fig2", "cifar100"): [EL2N, BASE["cifar100"], "imp easy,random,hard 2048 @400"],
    ("fig2", "cinic10"): [EL2N, BASE["cinic10"], "imp easy,random,hard 51200 @400"],
    # Figures 3 and 11: every size; CINIC-10 also for 200 steps, where t* = 400.
    ("fig3", "cifar10"): [
        EL2N,
        BASE["cifar10"],
        f"imp easy,random,hard {SIZES['cifar10']} @200",
        f"imp easy {SIZES['cifar10']} @200 balance",
    ],
    ("fig3", "cifar100"): [
        EL2N,
        BASE["cifar100"],
        f"imp easy,random,hard {SIZES['cifar100']} @400",
    ],
    ("fig3", "cinic10"): [
        EL2N,
        BASE["cinic10"],
        "imp all @200",
        f"imp easy,random,hard {SIZES['cinic10']} @400",
        "imp easy,random,hard 12800,25600,51200 @200",
    ],
    # Figures 4 and 13: 10 % and 50 % of the labels redrawn, which at step 0 has done nothing; dense
    # is the noisy network for t* steps.
    ("fig4", "cifar10"): [
        "el2n noise0.1,noise0.5",
        "imp all @0",
        "imp all @200,400 noise0.1,noise0.5",
        "imp easy,random 3200 @200 noise0.1,noise0.5",
    ],
    ("fig13", "cifar10"): [
        "el2n noise0.1,noise0.5",
        "imp all @0",
        "imp all @200,400 noise0.1,noise0.5",
        "imp easy,random 512,1024,2048,3200 @200 noise0.1,noise0.5",
    ],
    # Figure 5: histograms of four configurations (a: CIFAR-100, b: CINIC-10); final accuracy of
    # each replicate against its barrier. CIFAR-10's is ours.
    ("fig5", "cifar10"): [EL2N, "lmc,imp all @0,200,400", "lmc,imp easy,random,hard 3200 @200"],
    ("fig5", "cifar100"): [
        EL2N,
        "lmc all @0,400,800,1600",  # 1600 only for its scores
        f"lmc,imp easy,random {SCATTER100} @400",
        f"lmc,imp easy {SCATTER100} @400 by-lmc1600",
        BASE["cifar100"],
    ],
    ("fig5", "cinic10"): [
        EL2N,
        "lmc all @200,400,800,1600",
        "imp all @200,400,800",
        f"lmc,imp easy,random {SCATTER_CINIC} @200,400",
        f"lmc,imp easy {SCATTER_CINIC} @400 by-lmc800,by-lmc1600",
    ],
    # Figure 6: 8 replicates; windows of the ranking behind "medium-hard to hard data suffices".
    ("fig6", "cifar10"): [
        EL2N,
        f"warmup all @0,{WARMUPS}",
        f"warmup easy 5120,10240,25600 @{WARMUPS} balance",
        f"warmup random,hard 5120,10240,25600 @{WARMUPS}",
        f"warmup easy 10240 @{WARMUPS} plain,offset25000,offset37500,offset39760",
    ],
    # Figure 7 (7 of the later version): 1600 steps; both log accuracy on one easy subset.
    ("fig7", "cifar100"): [
        EL2N,
        "pretrain all @1600 watch2048balanced",
        "pretrain easy 2048 @1600 balance",
    ],
    # Figure 8 (7 of the NeurIPS version): the first 200 steps.
    ("fig8", "cifar10"): [EL2N, "pretrain easy,random 25600 @200"],
    # Figure 9 (8): w_tr of all data for t*/2 and t* steps, and of the easy subset. The paper shows
    # CINIC-10; of the others the same is no further run.
    ("fig9", "cifar10"): [EL2N, "imp all @200,400", "imp easy 3200 @200"],
    ("fig9", "cifar100"): [EL2N, "imp all @400,800", "imp easy 2048 @400"],
    ("fig9", "cinic10"): [EL2N, "imp all @400,800", "imp easy 51200 @400"],
    # Figure 10 (9 and 10): LMC scores at 400, 800, 1600 against EL2N at 1600; pruning by those of
    # 1600 (CIFAR-100), of 800 and 1600 (CINIC-10), beside easy by EL2N and random.
    ("fig10", "cifar100"): [
        "el2n plain,step1600",
        "lmc all @400,800,1600",
        BASE["cifar100"],
        "imp easy,random 512,1024,2048,3200 @400",
        "imp easy 512,1024,2048,3200 @400 by-lmc1600",
    ],
    ("fig10", "cinic10"): [
        "el2n plain,step1600",
        "lmc all @400,800,1600",
        BASE["cinic10"],
        f"imp easy,random {SIZES['cinic10']} @400",
        f"imp easy {SIZES['cinic10']} @400 by-lmc800,by-lmc1600",
    ],
    # Figure 12 (12 of the later version): "for both scores, the subset was class-balanced".
    ("fig12", "cifar10"): [
        "el2n plain,forgetting",
        BASE["cifar10"],
        "imp easy 1024,2048,3200 @200 balance",
        "imp easy 1024,2048,3200 @200 balance+by-forgetting",
    ],
}
PANELS |= {("fig11", d): PANELS["fig3", d] for d in PAPERS}

Command = tuple[str, str, int, int, frozenset[str]]  # stage, subset, size, step, what is unusual


def expand(lines: list[str]) -> set[Command]:
    found = set()
    for line in lines:
        stages, *words = line.split()
        step = [w for w in words if w[0] == "@"]
        size = [w for w in words if w[0].isdigit()]
        kind = [w for w in words if w.split(",")[0] in ("all", "easy", "random", "hard")]
        more = [w for w in words if w not in (*step, *size, *kind)] or ["plain"]
        columns = [stages, *(kind or [""]), *(size or ["0"]), *(step or ["@0"]), *more]
        for s, k, m, t, w in itertools.product(*(c.lstrip("@").split(",") for c in columns)):
            found.add((s, k, int(m), int(t), frozenset(w.split("+")) - {"plain"}))
    return found


@functools.cache
def run(*args: str) -> subprocess.CompletedProcess:
    command = ["bash", ROOT / "run_all.sh", "--list", *args]
    env = {**os.environ, "PYTHON": str(ROOT / "tests/fake_python.py")}
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=120)


def read(line: str) -> tuple[str, Command, str]:
    """(data set, what the line is in terms of the table, its replicates)."""
    _, script, *words = shlex.split(line)
    flags = dict(w[2:].split("=", 1) if "=" in w else (w[2:], "") for w in words)
    known = {"dataset", "subset", "size", "rewind", "warmup", "replicate", "out", "data-dir"}
    assert "preset" not in flags, line
    step = int(flags.get("rewind", flags.get("warmup", 0)))
    unusual = {"balance"} if "balance" in flags else set()
    unusual |= {f"offset{flags['offset']}"} if flags.get("offset", "0") != "0" else set()
    unusual |= {f"noise{flags['label-noise']}"} if "label-noise" in flags else set()
    unusual |= {f"step{flags['score-step']}"} if "score-step" in flags else set()
    unusual |= {flags["metric"]} if "metric" in flags else set()
    if "easy-size" in flags:
        unusual |= {f"watch{flags['easy-size']}" + "balanced" * ("easy-balance" in flags)}
    if "scores" in flags:  # the folders are those of fake_python.py
        stage, _, folder, _ = Path(flags["scores"]).parts[-4:]
        made = {"metricforgetting-networks4": "forgetting"}.get(folder)
        # LMC scores are those of children of networks pre-trained on all data.
        unusual |= {"by-" + (made or stage + folder.removeprefix("subsetall-rewind"))}
    known |= {"balance", "offset", "label-noise", "score-step", "metric", "easy-size"}
    known |= {"easy-balance", "scores", "quiet", "networks"}
    assert set(flags) <= known, line
    subset, size = flags.get("subset", ""), int(flags.get("size", 0))
    command = Path(script).stem, subset, size, step, frozenset(unusual)
    return flags["dataset"], command, flags.get("replicate", "")


@functools.cache
def commands(*args: str) -> list[tuple[str, Command, str]]:
    done = run(*args)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) and "figures.py" in lines[-1]
    return [read(line) for line in lines[:-1]]


@pytest.mark.parametrize("dataset", PAPERS)
@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_brings_exactly_its_panels(figure, dataset):
    if (figure, dataset) not in PANELS:
        done = run("--only", figure, "--dataset", dataset)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        return
    found = commands("--only", figure, "--dataset", dataset)
    assert {d for d, *_ in found} == {dataset}
    have, expected = [c for _, c, _ in found], expand(PANELS[figure, dataset])
    assert set(have) - expected == set(), "superfluous"
    assert expected - set(have) == set(), "missing"
    assert len(have) == len(expected), "a command is there twice"


def test_nothing_else_is_run():
    """The grid is the union of the panels; 4 replicates, 8 of warmup, 2 of barriers."""
    found = commands()
    expected = {(d, c) for (_, d), lines in PANELS.items() for c in expand(lines)}
    assert {(d, c) for d, c, _ in found} == expected and len(found) == len(expected)
    replicates = {"imp": "0-3", "pretrain": "0-3", "warmup": "0-7", "lmc": "0-1", "el2n": ""}
    assert all(replicates[c[0]] == r for _, c, r in found)


def rows(name: str) -> list[dict]:
    with open(ROOT / "paper" / name, newline="") as f:
        return list(csv.DictReader(f))


def test_every_published_curve_has_its_command():
    """paper/*.csv, of which neither the script nor the table above was made by a program."""
    wanted = set()
    for r in rows("imp_curves.csv"):
        subset, noise, t = r["method"], float(r["label_noise"]), int(r["rewind_steps"])
        unusual = {f"noise{noise:g}"} if noise and t else set()
        if subset == "forgetting":
            subset, unusual = "easy", {"balance", "by-forgetting"}
        size = 0 if r["subset_size"] == "full" else int(r["subset_size"])
        wanted.add((r["dataset"], ("imp", subset, size, t, frozenset(unusual))))
    for r in rows("warmup_curves.csv"):
        if r["experiment"] not in ("fig6", "rolling"):
            continue
        subset, size = r["subset_type"].replace("score_window", "easy"), int(r["subset_size"])
        offset = int(r["left_offset"] or 0)
        unusual = {f"offset{offset}"} if offset else set()
        if subset == "easy" and r["class_balanced"] == "True":
            unusual.add("balance")  # random subsets always are
        size = 0 if subset == "all" else size
        t = int(r["warmup_steps"])
        wanted.add(("cifar10", ("warmup", subset, size, t, frozenset(unusual))))
    for r in rows("lmc_histograms.csv"):  # "random 25600, 200 it"
        what, step = r["pretraining"].split(", ")
        subset, size = what.split()
        size = 0 if subset == "all" else int(size)
        wanted.add((r["dataset"], ("lmc", subset, size, int(step.split()[0]), frozenset())))
    assert len(wanted) > 150
    assert wanted - {(d, c) for d, c, _ in commands()} == set()


def test_the_points_of_figure_5():
    """lmc_scatter.csv: as many points of each kind, two replicates each."""
    points = [r["subset_method"] for r in rows("lmc_scatter.csv")]
    found = [c for _, c, _ in commands("--only", "fig5", "--dataset", "cinic10")]
    imps = {c[1:] for c in found if c[0] == "imp"}
    drawn = [c for c in found if c[0] == "lmc" and c[1:] in imps]
    kinds = ["lmc" if any("lmc" in u for u in c[4]) else c[1] for c in drawn]
    for kind in ("all", "easy", "random", "lmc"):
        assert 2 * kinds.count(kind) == points.count(kind), kind
    for subset, size, t in (("random", 3200, 400), ("easy", 3200, 400), ("all", 0, 800)):
        assert ("lmc", subset, size, t, frozenset()) in expand(PANELS["fig5", "cifar100"])


def stages(*args: str) -> list[tuple[str, argparse.Namespace]]:
    """(stage, its arguments) of every line, read by the stage's own parser."""
    lines = [shlex.split(line)[1:] for line in run(*args).stdout.splitlines()]
    names = [(Path(script).stem, rest) for script, *rest in lines]
    return [
        (name, importlib.import_module(name).flags().parse_args(rest))
        for name, rest in names
        if name != "figures"
    ]


def test_every_flag_exists():
    """And of the digits there is something of every stage, subset and figure."""
    assert len(stages()) == len(commands())
    quick = stages("--quick")
    assert {s for s, _ in quick} == {"el2n", "imp", "lmc", "pretrain", "warmup"}
    assert {a.dataset for _, a in quick} == {"digits"}
    assert {a.subset for s, a in quick if s == "imp"} == {"all", "easy", "random", "hard"}
    assert {a.replicate for s, a in quick if s != "el2n"} == {(0, 1)}
    for figure in FIGURES:
        assert len(run("--quick", "--only", figure).stdout.splitlines()) > 2, figure


def test_waves():
    """EL2N and forgetting scores; what needs these or none; what needs LMC scores."""
    waves = [[read(x) for x in run("--wave", k).stdout.splitlines()] for k in "123"]
    assert sorted(map(str, itertools.chain(*waves))) == sorted(map(str, commands()))
    assert {c[0] for _, c, _ in waves[0]} == {"el2n"}
    by_lmc = [x for x in commands() if any(u.startswith("by-lmc") for u in x[1][4])]
    assert sorted(map(str, waves[2])) == sorted(map(str, by_lmc))
    assert [line.split()[1] for line in run("--wave", "4").stdout.splitlines()] == ["figures.py"]


def test_spread():
    """A command for each replicate, except of children whose scores are a mean over replicates."""
    found = commands("--spread", "--only", "fig5", "--dataset", "cinic10")
    assert {r for _, c, r in found if c[0] == "imp"} == set("0123")
    assert {r for _, c, r in found if c[:2] == ("lmc", "all")} == {"0-1"}
    assert {r for _, c, r in found if c[0] == "lmc" and c[1] != "all"} == {"0", "1"}
