"""How time and memory grow: CPU seconds (median of 3) and peak memory, each size in a process of
its own, and the exponent p of seconds ~ size^p: python bench/growth.py [how a line begins ...]"""

import functools
import multiprocessing
import resource
import sys
import tempfile
import time

import numpy as np
import step
import torch

import common
import el2n
import engine
import imp
import lmc
import runs

LINES = """step: rows, 1 2 4 8; step: depth, 8 20 32; step: batch-size, 32 64 128 256
search: levels, 2 4 8; evaluation: images, 500 1000 2000 4000
scores and ranking: images, 25000 100000 400000; histories: images, 50000 200000 800000
order: rows, 8 16 32 64; order: images, 50000 200000 800000; log: rows, 2000 8000 32000
log: rows replaced, 250 500 1000"""


@functools.cache
def training(what="", n=0):
    given = {"device": "cpu", "depth": 8, "count": 2} | ({} if what == "rows" else {what: n})
    study = step.make_study(step.flags().parse_args([f"--{k}={v}" for k, v in given.items() if k]))
    return study, step.ours(study, "eager", n if what == "rows" else 1)


def work(line, what, n):
    if line == "step":
        training(what, n)[1](2)
    elif line == "search":
        given = {"dataset": "digits", "subset": "all", "rewind": 0, "steps": 24, "quiet": True}
        imp.search(levels=n - 1, out=tempfile.mkdtemp(), **given)
    elif line == "evaluation":
        data = (study := training()[0]).data
        engine.evaluate(study.networks(1), data, data.train_images[:n], data.train_labels[:n])
    elif line == "scores and ranking":
        each, labels = np.random.default_rng(0).random((4, n), np.float32), np.arange(n) % 10
        common.reliability(each, n // 9, labels), common.easiest(each[0], labels, True)
    elif line == "histories":  # of forgetting, of 10 networks; and a histogram of barriers
        state = {k: torch.zeros(10, n, dtype=torch.int32) for k in ("seen", "forgotten")}
        el2n.forgetting_scores(state | {"learned": torch.zeros(10, n, dtype=torch.bool)})
        lmc.histogram([0], [np.random.default_rng(0).normal(size=n)])
    elif line == "order":  # of the data in 64 steps, 16 at a time, as train() asks for it
        engine.permutation.cache_clear()
        rows, images = (n, torch.arange(50000)) if what == "rows" else (1, torch.arange(n))
        for k, r in ((k, r) for k in range(0, 64, 16) for r in range(rows)):
            engine.batch_indices(engine.Stream(None, images, (r, r), (r, r)), k, k + 16, 128)
    else:  # rows of a log; replaced: each is written again, as after a kill
        log = runs.Log(runs.Path(tempfile.mkdtemp()) / "log.csv")
        for k in [*range(n), *range(n if "replaced" in what else 0)]:
            log.add({"phase": "pretrain", "step": k, "test_accuracy": k / n, "loss": 1 / n})
        runs.Log(log.path).read()


def measure(*case):
    torch.set_num_threads(1)
    runs.keep_freed_memory()
    clock = [time.process_time() for _ in range(5) if not work(*case)]
    return np.median(np.diff(clock)[-3:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    fork, wanted = multiprocessing.get_context("fork"), tuple(sys.argv[1:]) or ("",)
    for name, sizes in (x.split(", ") for x in LINES.replace("\n", "; ").split("; ")):
        if name.startswith(wanted):
            sizes = [int(x) for x in sizes.split()]
            with fork.Pool(1, maxtasksperchild=1) as pool:
                found = [pool.apply(measure, (*name.split(": "), n)) for n in sizes]
            p = np.polyfit(np.log(sizes), np.log([x for x, _ in found]), 1)[0]
            cells = [f"{1e3 * x:.4g} ms, {m:.0f} MB" for x, m in found]
            print(f"| {name} {sizes} | {'; '.join(cells)} | {p:.2f} |", flush=True)
