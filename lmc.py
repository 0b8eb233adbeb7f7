"""Stage 4: linear mode connectivity of children spawned at w_tr (Section 4, Appendix C).

    each child: w_tr, then training from step t_r to the end on all data, in an order and with an
    augmentation of its own (child 0's are those of level 0 of imp.py: the same network, bit by bit)
    barrier of an example: its loss halfway between two children less the mean of its two losses

Figure 5, and the LMC scores (Definition C.1) of Figures 9 and 10. Children are connected where the
0-1 error barrier is below 2 %.

    python lmc.py                      the embedded digits, three spawn points, a minute on a laptop
    python lmc.py --dataset cifar10 --subset easy --size 3200 --rewind 0,200,400,800 --replicate 0-3

Writes results/lmc/<data>-<network>/<subset>-rewind<t_r>/, a folder for each spawn point:
scores.npy and scores.json, for `imp.py --scores`: the barrier of each training example, mean over
the replicates of the command; and rep<k>/: pretrained.pt (w_tr), child<c>.pt, result.json,
loss_barrier.npy (N,), mean over pairs, loss_barrier_pairs.npy and error_barrier_pairs.npy
(pairs, N). Another --alphas or --batchnorm measures the same children again, in place.

--between FILE FILE ... measures networks that were saved, levels of a run, children, or anyone's
state_dict that fits, each with each: results/lmc/<data>-<network>/between-<names>/.

    python lmc.py --between rep0/level00.pt rep0/level04.pt rep0/level08.pt

Barriers are taken on the unaugmented training images with their true labels, BatchNorm in eval
mode. With --alphas N a pair's barrier is the supremum over alpha of its mean over examples, an
example's the supremum of its own. BatchNorm's running statistics are interpolated like weights;
--batchnorm recompute puts in their place, at the ends too, the mean over the batches of one pass of
unaugmented training images in training mode (an order from the seed, the last partial batch left
out), so that a network's barrier with itself is 0 either way.
"""

import argparse
import contextlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import common
import runs

SPAWN = {"digits": (0, 20, 60)}  # what --rewind is there; elsewhere the step of the preset alone
CONNECTED = 0.02  # error barrier (Frankle et al. 2020)
BINS = (-np.inf, -1, -0.1, -0.01, 0.01, 0.1, 0.5, 1, 2, 4, np.inf)
ARRAYS = ("loss_barrier", "loss_barrier_pairs", "error_barrier_pairs")


def flags() -> runs.Parser:
    parser = common.flags(__doc__, "replicate", "noise", "subset")
    add = parser.add_argument_group("barriers").add_argument
    add("--rewind", dest="spawn_at", type=runs.numbers, help="t_r, or several [preset]")
    add("--children", type=runs.number(int, 2, 64), default=3, help="of each w_tr [3]")
    several = "1, the midpoint alone, or an odd number of values from 0 to 1 [1]"
    add("--alphas", type=runs.number(int, 1, 10001), default=1, help=several)
    ways = ("average", "recompute")
    add("--batchnorm", choices=ways, default="average", help="of interpolated networks [average]")
    add("--parent", type=Path, help="w_tr: a .pt, or a folder with rep<k>/pretrained.pt")
    add("--between", type=Path, nargs="+", help="saved networks to measure instead of children")
    return parser


def load_children(run: runs.Run, count: int) -> list[dict]:
    """The child<c>.pt of a run; empty if one is missing."""
    found = [run.load(f"child{c}.pt") for c in range(count)]
    return found if all(found) else []


def train_children(
    args: argparse.Namespace, data: common.Data, group: list[runs.Run], progress
) -> None:
    """The children of several replicates side by side: child<c>.pt of each run."""
    k = args.children
    networks = common.Networks(common.make_model(args, data), len(group) * k, args.device)
    streams = []
    for i, run in enumerate(group):
        start = run.load("pretrained.pt")
        for c in range(k):
            networks.rewind(i * k + c, start["model"])
            streams.append(common.make_stream(args, data, run.replicate, c))
    schedule = common.step_schedule(args.lr, args.milestones)
    training = common.Training(args, data, networks, streams, args.rewind, args.steps, schedule)
    common.fit(training, group, "children", progress)
    accuracy = common.accuracy(networks, data)
    for i, run in enumerate(group):
        for c in range(k):
            row = i * k + c
            about = {"diverged": networks.diverged[row].item(), "test_accuracy": accuracy[row]}
            state = {"model": networks.state(row), **about, "seconds": run.seconds}
            run.save(f"child{c}.pt", state)


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
    args: argparse.Namespace, data: common.Data, states: list[dict[str, torch.Tensor]]
) -> dict[str, Any]:
    """Barriers of every two of K networks, given as state_dicts: per example
    `loss_barrier_pairs` and `error_barrier_pairs` (pairs, N), and at each alpha the means
    `loss_at` and `error_at` (pairs, A); `alphas`; `pairs`; `train_loss` of the K ends. Every end
    and every interpolated network runs once over the training set."""
    model, labels = common.make_model(args, data), data.train_labels
    ends, middle = (common.Networks(model, rows, args.device) for rows in (len(states), 1))
    for row, state in enumerate(states):
        ends.load(row, state)
    origin = ends.batchnorm.clone()

    def logits(networks: common.Networks) -> torch.Tensor:
        if args.batchnorm == "recompute":
            reestimate(args, data, networks)
        return common.predict(networks, data, data.train_images)

    at_ends = logits(ends)
    alphas = [i / (args.alphas - 1) for i in range(args.alphas)] if args.alphas > 1 else [0.5]
    pairs = list(itertools.combinations(range(len(states)), 2))
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
            loss, error = common.loss_barrier(x, at_ends[i], at_ends[j], labels, a)
            for kind, values in enumerate((loss, error)):
                at[kind, p, k] = values.double().mean().item()
                barrier[kind, p] = np.maximum(barrier[kind, p], values.cpu().numpy())
    losses = [common.example_losses(x, labels)[0].double().mean().item() for x in at_ends]
    per_example = {"loss_barrier_pairs": barrier[0], "error_barrier_pairs": barrier[1]}
    means = {"loss_at": at[0], "error_at": at[1], "train_loss": losses}
    return {"alphas": alphas, "pairs": pairs, **per_example, **means}


def save_barriers(run: runs.Run, found: dict[str, Any], each: list[dict], **about: Any) -> None:
    """Arrays and result.json of what `measure` found between networks described by `each`."""
    found["loss_barrier"] = found["loss_barrier_pairs"].mean(0, dtype=np.float64).astype(np.float32)
    for name in ARRAYS:
        runs.write_array(run.folder / f"{name}.npy", found[name])
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
        "sha256_of_arrays": runs.fingerprint(*(found[name] for name in ARRAYS)),
    }
    each = [x | {"train_loss": loss} for x, loss in zip(each, found["train_loss"], strict=True)]
    shown = {"children": each, "alphas": found["alphas"], "pairs": pairs}
    run.finish({**about, **shown, **summary, "ended": None})


def conclude(args: argparse.Namespace, data: common.Data, run: runs.Run) -> None:
    """Measures the children of a run: its arrays and its result.json."""
    children = [] if run.ended else load_children(run, args.children)
    about = {"pretrain": common.about_start(run), "batchnorm": args.batchnorm}
    for c, child in enumerate(children):
        if child["diverged"] >= 0 and not run.ended:
            step = child["diverged"]
            run.ended = f"child {c} from step {args.rewind} diverged at step {step}: lower --lr"
    if run.ended:
        keys = ("loss_barrier", "loss_barrier_std", "error_barrier", "connected")
        empty = {"children": [], "alphas": [], "pairs": [], **dict.fromkeys(keys)}
        run.finish({**about, **empty, "ended": run.ended})
        return
    found = measure(args, data, [child["model"] for child in children])
    keys = ("test_accuracy", "seconds")
    each = [{"child": c, **{k: x[k] for k in keys}} for c, x in enumerate(children)]
    save_barriers(run, found, each, **about)


def arrays(run: runs.Run) -> list[np.ndarray]:
    """The arrays of a finished run, in the order of ARRAYS; empty if one is missing or damaged."""
    try:
        found = [runs.read_npy(run.folder / f"{name}.npy") for name in ARRAYS]
    except runs.UserError:
        return []
    return found if runs.fingerprint(*found) == run.result["sha256_of_arrays"] else []


def measured_alike(args: argparse.Namespace, run: runs.Run) -> bool:
    """Whether this run was measured in the way that is wanted now."""
    r = run.result
    if not r or r["ended"]:
        return bool(r)
    alike = (len(r["alphas"]), r["batchnorm"]) == (args.alphas, args.batchnorm)
    return alike and bool(arrays(run))


def save_scores(args: argparse.Namespace, data: common.Data, group: list[runs.Run]) -> None:
    """LMC scores (Definition C.1): scores.npy and scores.json beside the folders of the runs."""
    folder = group[0].folder.parent
    each = np.stack([arrays(run)[0] for run in group])
    about = {k: getattr(args, k) for k in ("children", "rewind", "alphas", "batchnorm")}
    about |= {"metric": "lmc", "replicates": [run.replicate for run in group]}
    with contextlib.suppress(runs.UserError):  # none yet, or damaged
        before = runs.read_json(folder / "scores.json", "sha256_of_scores", *about)
        found = runs.fingerprint(runs.read_npy(folder / "scores.npy"))
        scores = each.mean(0, dtype=np.float64).astype(np.float32)
        same = found == runs.fingerprint(scores) == before["sha256_of_scores"]
        if same and all(before[k] == v for k, v in about.items()):
            return
    with runs.lock(folder / ".lock", wait=True):  # other replicates may run beside these
        for left in folder.glob(".scores.*.tmp"):  # by a process that died
            left.unlink()
        common.save_scores(folder, each, data.train_labels, args, data, **about)


def run_name(args: argparse.Namespace) -> str:
    """Of one spawn point."""
    origin = f"parent-{args.parent.stem}" if args.parent else common.subset_name(args)
    more = f"children{args.children}" if args.children != 3 else ""
    return common.run_name(args, origin, f"rewind{args.rewind}", more)


def spawn(args: argparse.Namespace, data: common.Data, starts: dict[int, dict]) -> list[runs.Run]:
    """One spawn point: pre-training, children, barriers and scores; the finished runs."""
    keys = ("subset", "label_noise", "rewind", "pretrain_lr", "children")
    settings = common.settings_of(args, data, *keys)
    with common.open_runs(args, "lmc", run_name(args), settings, args.replicate) as group:
        todo = [run for run in group if not measured_alike(args, run)]
        each = args.children * (args.steps - args.rewind)
        total = len(todo) * (each + args.rewind * (not starts))
        with runs.progress_bar(total, args.quiet) as progress:
            for run in todo if starts else ():
                common.adopt(run, starts[run.replicate])
            if not starts:
                common.pretrain(args, data, todo, progress)
            alive = [run for run in todo if not run.ended]
            lacking = [run for run in alive if not load_children(run, args.children)]
            runs.skip(progress, (len(todo) - len(lacking)) * each)
            for part in common.side_by_side(lacking, "children"):
                train_children(args, data, part, progress)
        for run in todo:
            conclude(args, data, run)
        if complete := [run for run in group if not run.result["ended"]]:
            save_scores(args, data, complete)
            print(f"LMC scores: {group[0].folder.parent / 'scores.npy'}")
    return group


def between_name(paths: list[Path], marks: list[str]) -> str:
    stems = "+".join(path.stem for path in paths)
    return f"between-{stems[:80]}-{runs.fingerprint(marks)[:6]}"


def measure_between(args: argparse.Namespace, data: common.Data) -> list[dict]:
    """--between: the barriers of saved networks, each with each; returns the result."""
    model, states, marks = common.make_model(args, data), [], []
    for path in args.between:
        state, about = common.read_network(path)
        if about.get("data", data.fingerprint) != data.fingerprint:
            raise runs.UserError(f"--between {path}: trained on other data than {data.name}")
        states.append(common.check_fits(f"--between {path}", model, state))
        marks.append(runs.fingerprint(states[-1]))
    settings = common.settings_of(args, data) | {"between": marks}
    name = between_name(args.between, marks)
    with common.open_runs(args, "lmc", name, settings, [0]) as [run]:
        if not measured_alike(args, run):
            networks = common.Networks(model, len(states), args.device)
            for row, state in enumerate(states):
                networks.load(row, state)
            accuracy = common.accuracy(networks, data)
            files = [str(path) for path in args.between]
            each = [
                {"child": c, "file": file, "test_accuracy": a}
                for c, (file, a) in enumerate(zip(files, accuracy, strict=True))
            ]
            save_barriers(run, measure(args, data, states), each, batchnorm=args.batchnorm)
        result = run.result
    for pair in result["pairs"]:
        first, second = (result["children"][c]["file"] for c in pair["children"])
        values = f"loss barrier {pair['loss_barrier']:.4f}, error {pair['error_barrier']:.4f}"
        print(f"{values}  {first}  {second}")
    print(run.folder / "result.json")
    return [result]


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
    onset = "not connected at the last spawn point"
    if late is not None:
        onset = f"connected from step {spawned[late][0]['pretrain']['step']} on"
    return "\n".join([*lines, f"{onset} (error barrier below {CONNECTED:.0%})"])


def histogram(steps: list[int], pooled: list[np.ndarray]) -> str:
    """Shares of per-example loss barriers (all pairs and replicates), a column a spawn point."""
    lines = ["loss barrier     " + "".join(f"{f'spawned at {t}':19}" for t in steps)]
    counts = np.array([np.histogram(x, BINS)[0] / x.size for x in pooled])
    for low, high, shares in zip(BINS, BINS[1:], counts.T, strict=False):
        cells = "".join(f"{s:6.1%} {'#' * round(10 * s):12}" for s in shares)
        lines.append(f"{low:5g} to {high:5g}  {cells}".rstrip())
    return "\n".join(lines)


def spawn_points(args: argparse.Namespace) -> list[int]:
    """The steps of --rewind; without it those of the data set."""
    steps = SPAWN.get(args.preset, (args.defaults.rewind,))
    return list(args.spawn_at or [t for t in steps if t < args.steps])


def plan(args: argparse.Namespace) -> list[tuple[Path, int, bool]]:
    """(folder, network-steps, done) of each spawn point and replicate; reads no data."""
    check_flags(args)
    if args.between:  # nothing is trained
        args.subset = "all"
        common.fill(args)
        marks = [runs.fingerprint(common.read_network(path)[0]) for path in args.between]
        folder = common.run_folder(args, "lmc", between_name(args.between, marks))
        return common.planned(folder, (0,), 0)
    common.fill(args)
    found = []
    for t in spawn_points(args):
        one = common.with_steps(args, "rewind", t)
        folder = common.run_folder(one, "lmc", run_name(one))
        found += common.planned(folder, args.replicate, t + args.children * (args.steps - t))
    return found


def check_flags(args: argparse.Namespace) -> None:
    """UserError for flags that contradict each other."""
    if args.between and len(args.between) < 2:
        raise runs.UserError("--between takes two files or more")
    if args.alphas % 2 == 0:
        raise runs.UserError(f"--alphas {args.alphas}: an odd number has 1/2 among the values")
    common.check_start(args, "parent", "between")
    if args.parent and args.spawn_at and len(args.spawn_at) > 1:
        raise runs.UserError("--parent is one spawn point: give one --rewind, or none")


def check_steps(args: argparse.Namespace, data: common.Data) -> None:
    for t in () if args.parent or args.between else spawn_points(args):
        common.check_rewind(t, args.steps)


def main(args: argparse.Namespace) -> list[dict]:
    """Measures every spawn point, prints the tables and the paths; returns the results, by spawn
    point and replicate."""
    check_flags(args)
    if args.parent or args.between or args.spawn_at == (0,):
        args.subset, args.size = "all", None  # no subset is trained on
    data = common.prepare(args, check_more=check_steps)
    if args.between:
        return measure_between(args, data)
    step = args.spawn_at[0] if args.spawn_at else None
    starts = common.read_starts("--parent", args.parent, args, data, step)
    if starts:
        args.spawn_at = (starts[args.replicate[0]]["step"],)
    points = [common.with_steps(args, "rewind", t) for t in spawn_points(args)]
    spawned = [spawn(point, data, starts) for point in points]
    complete = [[run for run in group if not run.result["ended"]] for group in spawned]
    if complete := [group for group in complete if group]:
        steps = [group[0].result["pretrain"]["step"] for group in complete]
        print(table([[run.result for run in group] for group in complete]))
        pooled = [np.stack([arrays(run)[1] for run in group]) for group in complete]
        print(histogram(steps, pooled))
    finished = [run for group in spawned for run in group]
    common.report(finished)
    return [run.result for run in finished]


def connect(**settings: Any) -> list[dict]:
    """The command as a function: connect(dataset="digits", rewind=[0, 20], children=3)."""
    return runs.call(main, flags(), settings)


if __name__ == "__main__":
    runs.run_stage(main, flags())
