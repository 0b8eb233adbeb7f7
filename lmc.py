"""Stage 4: linear mode connectivity of children spawned at w_tr (Section 4, Appendix C).

    each child: w_tr, then training from step t_r to the end on all data, in an order and with an
    augmentation of its own (child 0's are those of level 0 of imp.py: the same network, bit by bit)
    barrier of an example: its loss halfway between two children less the mean of its two losses

Figure 5, and the LMC scores (Definition C.1) of Figures 9-11. Children are connected where the 0-1
error barrier is below 2 %.

    python lmc.py                      the embedded digits, three spawn points, a minute on a laptop
    python lmc.py --dataset cifar10 --subset easy --size 3200 --rewind 0,200,400,800 --replicate 0-3

Writes results/lmc/<data>-<network>/<subset>-rewind<t_r>/, a folder for each spawn point:
scores.npy and scores.json, for `imp.py --scores`: the barrier of each training example, mean over
the replicates of the command; and rep<k>/: pretrained.pt (w_tr), children.pt, result.json,
loss_barrier.npy (N,), mean over pairs, loss_barrier_pairs.npy and error_barrier_pairs.npy
(pairs, N). Another --alphas or --batchnorm measures the same children again, in place.

Barriers are taken on the unaugmented training images with their true labels, BatchNorm in eval
mode. With --alphas N a pair's barrier is the supremum over alpha of its mean over examples, an
example's the supremum of its own. BatchNorm's running statistics are interpolated like weights;
--batchnorm recompute puts in their place, at the ends too, the mean over the batches of one pass of
unaugmented training images in training mode (an order from the seed, the last partial batch left
out), so that a network's barrier with itself is 0 either way.
"""

import argparse
import contextlib
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import common

SPAWN = {"digits": (0, 20, 60)}  # of other data sets, the step of the preset alone
CONNECTED = 0.02  # error barrier (Frankle et al. 2020)
BINS = (-np.inf, -1, -0.1, -0.01, 0.01, 0.1, 0.5, 1, 2, 4, np.inf)
ARRAYS = ("loss_barrier", "loss_barrier_pairs", "error_barrier_pairs")


def flags() -> common.Parser:
    parser = common.flags(__doc__, "replicate", "noise", "subset")
    told = "t_r, or several: a spawn point each [digits 0,20,60, else the preset's]"
    parser.add_argument("--rewind", type=common.numbers, help=told)
    name, kind, default, told = common.FLAGS["rewind"][1]
    parser.add_argument(f"--{name}", type=kind, default=default, help=f"{told} [the preset's]")
    parser.add_argument("--children", type=common.number(int, 2, 64), default=3, help="[3]")
    told = "1, the midpoint alone, or an odd number of values from 0 to 1 [1]"
    parser.add_argument("--alphas", type=common.number(int, 1, 10001), default=1, help=told)
    told = "statistics of interpolated networks [average]"
    parser.add_argument(
        "--batchnorm", choices=("average", "recompute"), default="average", help=told
    )
    told = "w_tr: a pretrained.pt, or a folder with rep<k>/pretrained.pt"
    parser.add_argument("--parent", type=Path, help=told)
    return parser


def train_children(
    args: argparse.Namespace, data: common.Data, runs: list[common.Run], progress
) -> None:
    """The children of several replicates side by side: children.pt of each run."""
    count = args.children
    networks = common.Networks(common.make_model(args, data), len(runs) * count, args.device)
    streams = []
    for i, run in enumerate(runs):
        start = run.load("pretrained.pt")
        for c in range(count):
            networks.rewind(i * count + c, start)
            streams.append(common.make_stream(args, data, run.replicate, c))
    schedule = common.step_schedule(args.lr, args.milestones)
    training = common.Training(args, data, networks, streams, args.rewind, args.steps, schedule)
    common.fit(training, runs, "children", progress)
    accuracy = common.accuracy(networks, data)
    for i, run in enumerate(runs):
        rows = slice(i * count, (i + 1) * count)
        state = {k: getattr(networks, k)[rows].cpu().clone() for k in ("weights", "batchnorm")}
        told = {"diverged": networks.diverged[rows].tolist(), "test_accuracy": accuracy[rows]}
        run.save("children.pt", {**state, **told, "seconds": run.seconds})


def reestimate(args: argparse.Namespace, data: common.Data, networks: common.Networks) -> None:
    """BatchNorm's statistics of every row anew: the mean over the batches of one pass."""
    size, n = args.batch_size, len(data.train_labels)
    order = torch.from_numpy(common.generator(args.seed, "sample").permutation(n)).to(args.device)
    for module in networks.modules:
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        usual = [m.momentum for m in norms]
        for k, indices in enumerate(order[: n - n % size].split(size)):
            for m in norms:
                m.momentum = 1 / (k + 1)  # makes the running average a plain mean
            with torch.no_grad():
                module(common.normalise(data, data.train_images[indices]))
        for m, momentum in zip(norms, usual, strict=True):
            m.momentum = momentum


def measure(
    args: argparse.Namespace, data: common.Data, weights: Tensor, batchnorm: Tensor
) -> dict:
    """Barriers of every two of K networks, weights (K, D) and batchnorm (K, B): per example
    `loss_barrier_pairs` and `error_barrier_pairs` (pairs, N), and at each alpha the means
    `loss_at` and `error_at` (pairs, A); `alphas`; `pairs`; `train_loss` of the K ends. Every end
    and every interpolated network runs once over the training set."""
    model, labels = common.make_model(args, data), data.train_labels
    ends, middle = (common.Networks(model, rows, args.device) for rows in (len(weights), 1))
    ends.weights.copy_(weights)
    ends.batchnorm.copy_(batchnorm)
    origin = ends.batchnorm.clone()

    def logits(networks: common.Networks) -> Tensor:
        if args.batchnorm == "recompute":
            reestimate(args, data, networks)
        return common.predict(networks, data, data.train_images)

    at_ends = logits(ends)
    alphas = [i / (args.alphas - 1) for i in range(args.alphas)] if args.alphas > 1 else [0.5]
    pairs = list(itertools.combinations(range(len(weights)), 2))
    shape = (2, len(pairs), len(labels))  # of losses, of errors
    barrier, at = np.full(shape, -np.inf, np.float32), np.zeros((*shape[:2], len(alphas)))
    for p, (i, j) in enumerate(pairs):
        for k, a in enumerate(alphas):
            if a in (0, 1):
                x = at_ends[j if a else i]
            else:
                middle.weights[0] = (1 - a) * ends.weights[i] + a * ends.weights[j]
                middle.batchnorm[0] = (1 - a) * origin[i] + a * origin[j]
                x = logits(middle)[0]
            alpha = torch.tensor([a], device=args.device)
            loss, error, _, _ = common.loss_barrier(x[None], at_ends[i], at_ends[j], labels, alpha)
            for kind, values in enumerate((loss, error)):
                at[kind, p, k] = values.double().mean().item()
                barrier[kind, p] = np.maximum(barrier[kind, p], values[0].cpu().numpy())
    losses = [common.example_losses(x, labels)[0].double().mean().item() for x in at_ends]
    told = {"alphas": alphas, "pairs": pairs, "train_loss": losses}
    both = {"loss_barrier_pairs": barrier[0], "error_barrier_pairs": barrier[1]}
    return told | both | {"loss_at": at[0], "error_at": at[1]}


def conclude(args: argparse.Namespace, data: common.Data, run: common.Run) -> None:
    """Measures the children of a run: its arrays and its result.json."""
    children = None if run.ended else run.load("children.pt")
    told = {"pretrain": run.pretraining(), "batchnorm": args.batchnorm}
    if children and max(children["diverged"]) >= 0:
        c = next(c for c, step in enumerate(children["diverged"]) if step >= 0)
        step = children["diverged"][c]
        run.ended = f"child {c} from step {args.rewind} diverged at step {step}: lower --lr"
    if run.ended:
        keys = ("loss_barrier", "loss_barrier_std", "error_barrier", "connected")
        empty = {"children": [], "alphas": [], "pairs": [], **dict.fromkeys(keys)}
        run.finish({**told, **empty, "ended": run.ended})
        return
    found = measure(args, data, children["weights"], children["batchnorm"])
    found["loss_barrier"] = found["loss_barrier_pairs"].mean(0, dtype=np.float64).astype(np.float32)
    for name in ARRAYS:
        common.write(run.folder / f"{name}.npy", lambda f, x=found[name]: np.save(f, x))
    accuracy, seconds = children["test_accuracy"], children["seconds"]
    each = [
        {"child": c, "test_accuracy": accuracy[c], "train_loss": loss, "seconds": seconds}
        for c, loss in enumerate(found["train_loss"])
    ]
    pairs = [
        {"children": list(ends), "loss_barrier": loss.max(), "error_barrier": error.max()}
        | {"loss_barrier_at_alphas": loss.tolist(), "error_barrier_at_alphas": error.tolist()}
        for ends, loss, error in zip(
            found["pairs"], found["loss_at"], found["error_at"], strict=True
        )
    ]
    losses, errors = ([x[k] for x in pairs] for k in ("loss_barrier", "error_barrier"))
    summary = {
        "loss_barrier": np.mean(losses),
        "loss_barrier_std": np.std(losses, ddof=1) if len(losses) > 1 else None,
        "error_barrier": np.mean(errors),
        "connected": bool(np.mean(errors) < CONNECTED),
        "sha256_of_arrays": common.fingerprint(*(found[name] for name in ARRAYS)),
    }
    shown = {"children": each, "alphas": found["alphas"], "pairs": pairs}
    run.finish({**told, **shown, **summary, "ended": None})


def arrays(run: common.Run) -> list[np.ndarray]:
    """The arrays of a finished run, in the order of ARRAYS; empty if one is missing or damaged."""
    try:
        found = [common.read_npy(run.folder / f"{name}.npy") for name in ARRAYS]
    except common.UserError:
        return []
    return found if common.fingerprint(*found) == run.result["sha256_of_arrays"] else []


def finished(args: argparse.Namespace, run: common.Run) -> bool:
    """Whether this run was measured in the way that is asked for."""
    r = run.result
    if not r or r["ended"]:
        return bool(r)
    alike = (len(r["alphas"]), r["batchnorm"]) == (args.alphas, args.batchnorm)
    return alike and bool(arrays(run))


def save_scores(args: argparse.Namespace, data: common.Data, runs: list[common.Run]) -> None:
    """LMC scores (Definition C.1): scores.npy and scores.json beside the folders of the runs."""
    folder = runs[0].folder.parent
    scores = np.mean([arrays(run)[0] for run in runs], 0, dtype=np.float64).astype(np.float32)
    told = {k: getattr(args, k) for k in ("children", "rewind", "alphas", "batchnorm")}
    told |= {"metric": "lmc", "replicates": [run.replicate for run in runs]}
    with contextlib.suppress(common.UserError):  # none there, or damaged
        there = common.read_json(folder / "scores.json", "sha256_of_scores", *told)
        found = common.fingerprint(common.read_npy(folder / "scores.npy"))
        same = found == common.fingerprint(scores) == there["sha256_of_scores"]
        if same and all(there[k] == v for k, v in told.items()):
            return
    with common.lock(folder / ".lock", wait=True):  # other replicates may run beside these
        for left in folder.glob(".scores.*.tmp"):  # by a process that died
            left.unlink()
        common.write_scores(folder, scores, data.train_labels, args, data, **told)


def spawn(args: argparse.Namespace, data: common.Data, starts: dict[int, dict]) -> list[common.Run]:
    """One spawn point: pre-training, children, barriers and scores; the finished runs."""
    keys = ("subset", "label_noise", "rewind", "pretrain_lr", "children")
    settings = common.settings_of(args, data, *keys)
    origin = f"parent-{args.parent.stem}" if args.parent else common.subset_name(args)
    parts = [f"children{args.children}"] if args.children != 3 else []
    name = common.run_name(args, origin, f"rewind{args.rewind}", *parts)
    with common.open_runs(args, data, "lmc", name, settings) as runs:
        todo = [run for run in runs if not finished(args, run)]
        each = args.children * (args.steps - args.rewind)
        with common.progress_bar(args, len(todo) * (each + args.rewind * (not starts))) as progress:
            for run in todo if starts else ():
                run.adopt(starts[run.replicate])
            if not starts:
                common.pretrain(args, data, todo, progress)
            lacking = [run for run in todo if not run.ended and run.load("children.pt") is None]
            common.skip(progress, (len(todo) - len(lacking)) * each)
            for group in common.side_by_side(lacking, "children"):
                train_children(args, data, group, progress)
        for run in todo:
            conclude(args, data, run)
        if whole := [run for run in runs if not run.result["ended"]]:
            save_scores(args, data, whole)
            print(f"LMC scores: {runs[0].folder.parent / 'scores.npy'}")
    return runs


def table(spawned: list[list[dict]]) -> str:
    """One line a spawn point, mean and deviation over replicates, and the onset."""
    lines = ["spawned at  pre-trained accuracy  children accuracy  loss barrier      error barrier"]
    joined = []
    for results in spawned:
        start = common.mean_std([r["pretrain"]["test_accuracy"] for r in results])
        accuracy = [np.mean([c["test_accuracy"] for c in r["children"]]) for r in results]
        loss, error = (
            common.mean_std([r[k] for r in results]) for k in ("loss_barrier", "error_barrier")
        )
        joined.append(all(r["connected"] for r in results))
        lines.append(
            f"{results[0]['pretrain']['step']:10}  {start:20}  {common.mean_std(accuracy):17}  "
            f"{loss:16}  {error:16}  {'connected' if joined[-1] else ''}"
        )
    late = next((k for k in range(len(joined)) if all(joined[k:])), None)
    told = "not connected at the last spawn point"
    if late is not None:
        told = f"connected from step {spawned[late][0]['pretrain']['step']} on"
    return "\n".join([*lines, f"{told} (error barrier below {CONNECTED:.0%})"])


def histogram(steps: list[int], pooled: list[np.ndarray]) -> str:
    """Shares of per-example loss barriers (all pairs and replicates), a column a spawn point."""
    lines = ["loss barrier     " + "".join(f"{f'spawned at {t}':19}" for t in steps)]
    counts = np.array([np.histogram(x, BINS)[0] / x.size for x in pooled])
    for low, high, shares in zip(BINS, BINS[1:], counts.T, strict=False):
        cells = "".join(f"{s:6.1%} {'#' * round(10 * s):12}" for s in shares)
        lines.append(f"{low:5g} to {high:5g}  {cells}".rstrip())
    return "\n".join(lines)


def main(args: argparse.Namespace) -> list[dict]:
    """Measures every spawn point, prints the tables and the paths; returns the results, by spawn
    point and replicate."""
    if args.alphas % 2 == 0:
        raise common.UserError(f"--alphas {args.alphas}: an odd number has 1/2 among the values")
    if args.parent and (args.subset or args.size or args.label_noise):
        told = "leave out --subset, --size and --label-noise"
        raise common.UserError(f"--parent brings its own pre-training: {told}")
    asked = args.rewind
    if args.parent and asked and len(asked) > 1:
        raise common.UserError("--parent is one spawn point: give one --rewind, or none")
    args.subset = "all" if args.parent else args.subset
    args.rewind = 0 if args.parent else max(asked) if asked else None
    data, starts = common.prepare(args), {}
    for k in args.replicate if args.parent else ():
        only = asked[0] if asked else None
        starts[k] = common.read_start("--parent", args.parent, args, data, k, only)
        asked = (args.rewind,)
    sweep = SPAWN.get(args.preset, (args.rewind,))
    sweep = asked or [t for t in sweep if t < args.steps]
    spawned = []
    for t in sweep:
        one, its = argparse.Namespace(**{**vars(args), "rewind": t}), data
        if t == 0 and not args.parent:  # nothing is pre-trained, so no subset or score matters
            one.subset, one.label_noise = "all", 0.0
            its = dataclasses.replace(data, scores=None)
        spawned.append(spawn(one, its, starts))
    whole = [[run for run in runs if not run.result["ended"]] for runs in spawned]
    if whole := [runs for runs in whole if runs]:
        steps = [runs[0].result["pretrain"]["step"] for runs in whole]
        print(table([[run.result for run in runs] for runs in whole]))
        print(histogram(steps, [np.stack([arrays(run)[1] for run in runs]) for runs in whole]))
    runs = [run for runs in spawned for run in runs]
    common.report(runs)
    return [run.result for run in runs]


if __name__ == "__main__":
    common.run_stage(main, flags())
