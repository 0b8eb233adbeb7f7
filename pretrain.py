"""Stage 2: dense pre-training to step t_r on a subset of the data, watched closely.

What the other stages do by themselves, as a file for `imp.py --init` and `lmc.py --parent`, with
the paper's view of the phase: learning curves on the test, training and easy examples (Figure 7a of
the later version), gradient coherence (7b), minibatch gradient norms (Figure 7/8).

    python pretrain.py
    python pretrain.py --dataset cifar10 --subset all --rewind 1600 --every 10 --replicate 0-3

Writes results/pretrain/<data>-<network>/<subset>-rewind<t_r>/rep<k>/: pretrained.pt (w_tr);
log.csv, a row every --every steps; gradient_norm.npy (t_r,), norm of each minibatch gradient;
coherence.npy (rows of the log, 16), cosine of each of 16 minibatch gradients with their mean;
result.json.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import common
import runs

KINDS = ("accuracy", "gradient-norm", "coherence")
BATCHES = 16  # whose gradients are compared


def flags() -> runs.Parser:
    parser = common.flags(__doc__, "replicate", "noise", "subset", "rewind")
    add = parser.add_argument_group("log").add_argument
    add("--track", type=kinds, default=KINDS, help=f"comma-separated: {','.join(KINDS)} [all]")
    add("--every", type=runs.positive, default=10, help="steps between rows [10]")
    add("--easy-size", type=runs.positive, help="easy examples of easy_accuracy [--size]")
    add("--easy-balance", action="store_true", help="these within each class [--balance]")
    return parser


def kinds(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if not set(chosen) <= set(KINDS):
        raise argparse.ArgumentTypeError(f"{text!r} is not some of {','.join(KINDS)}")
    return chosen


def coherence(t: common.Training, row: int, keys: common.Stream, step: int) -> torch.Tensor:
    """(16,) cosines of minibatch gradients at the weights of a row with their mean; unaugmented
    examples of its subset, BatchNorm in eval mode, drawn anew at each step."""
    module, gradient, gradients = t.networks.modules[row].eval(), t.networks.gradient[row], []
    for i in common.batch_indices(keys, BATCHES * step, BATCHES * (step + 1), t.args.batch_size):
        x = common.normalise(t.data, t.data.train_images[i])
        F.cross_entropy(module(x), keys.labels[i]).backward()
        gradients.append(gradient.clone())
        gradient.zero_()
    module.train()
    each = torch.stack(gradients)
    return F.cosine_similarity(each, each.mean(0, keepdim=True))


def easy_examples(args: argparse.Namespace, data: common.Data) -> torch.Tensor:
    """The easy examples whose accuracy is logged: by default those that --subset easy would take,
    so that curves of all data and of a subset tell of the same examples."""
    scores = common.read_scores(args, data) if data.scores is None else data.scores
    size = args.easy_size or args.size or args.defaults.size
    if size > len(scores):
        raise runs.UserError(f"--easy-size {size}: {data.name} has {len(scores)} training images")
    balance = args.easy_balance or args.balance
    easy = {"subset": "easy", "size": size, "balance": balance, "offset": 0}
    wanted = argparse.Namespace(**{**vars(args), **easy})
    return common.choose_subset(
        wanted, dataclasses.replace(data, scores=scores), data.train_labels, 0
    )


def track(t: common.Training, group: list[runs.Run]) -> Callable[[int], None]:
    """Sets what a pre-training reports; returns the observer that writes the log."""
    args, data, networks = t.args, t.data, t.networks
    t.at = frozenset([*range(0, args.rewind, args.every), args.rewind])
    order = sorted(t.at)
    if "gradient-norm" in args.track:
        norms = torch.zeros(networks.rows, args.rewind, device=args.device)
        t.extra["gradient_norm"] = norms
        t.watch = lambda networks, row, step, indices, logits: norms[row].index_copy_(
            0, step, networks.gradient[row].norm()[None]
        )
    if "coherence" in args.track:
        shape = (networks.rows, len(order), BATCHES)
        t.extra["coherence"] = torch.zeros(shape, device=args.device)
    easy = easy_examples(args, data) if "accuracy" in args.track else None
    samples = []
    for run, stream in zip(group, t.streams, strict=True):
        key = common.philox_key(args.seed, "sample", run.replicate)
        samples.append(common.Stream(stream.labels, stream.indices, key, stream.augment))

    def observe(step: int) -> None:
        rows = [{} for _ in group]
        if easy is not None:
            test = common.accuracy(networks, data)
            errors = common.evaluate(networks, data, data.train_images, data.train_labels)[1]
            right = (errors == 0).double()
            for r, row in enumerate(rows):
                row["test_accuracy"], row["train_accuracy"] = test[r], right[r].mean().item()
                row["easy_accuracy"] = right[r, easy].mean().item()
        if "coherence" in args.track:
            for r, row in enumerate(rows):
                cosines = coherence(t, r, samples[r], step)
                t.extra["coherence"][r, order.index(step)] = cosines
                row["coherence"] = cosines.mean().item()
        for run, row in zip(group, rows, strict=True):
            run.log("pretrain", step, **row)

    return observe


def run_name(args: argparse.Namespace) -> str:
    balanced = "balanced" * (args.easy_balance or args.balance)
    watched = f"easy{args.easy_size or args.size or args.defaults.size}{balanced}"
    watched = watched if args.easy_size or args.easy_balance else ""
    return common.run_name(args, common.subset_name(args), f"rewind{args.rewind}", watched)


def plan(args: argparse.Namespace) -> list[tuple[Path, int, bool]]:
    """(folder, network-steps, done) of each replicate; reads no data."""
    common.fill(args)
    folder = common.run_folder(args, "pretrain", run_name(args))
    return common.planned(folder, args.replicate, args.rewind)


def main(args: argparse.Namespace) -> list[dict]:
    """Pre-trains, prints the last row of each log and the paths; returns the results."""
    data = common.prepare(args)
    if args.rewind == 0:
        raise runs.UserError("--rewind 0: there is nothing to pre-train")
    keys = ("subset", "label_noise", "rewind", "pretrain_lr", "track", "every")
    settings = common.settings_of(args, data, *keys, "easy_size", "easy_balance")
    with common.open_runs(args, "pretrain", run_name(args), settings, args.replicate) as group:
        todo = [run for run in group if run.result is None]
        with runs.progress_bar(len(todo) * args.rewind, args.quiet) as progress:
            common.pretrain(args, data, todo, progress, track)
        for run in todo:
            for kind, values in run.load("pretrained.pt")["tracked"].items():
                runs.write_array(run.folder / f"{kind}.npy", values.numpy())
            run.finish({"pretrain": common.about_start(run), "ended": run.ended})
        results = [run.result for run in group]
        accuracies = [r["pretrain"]["test_accuracy"] for r in results if not r["ended"]]
        if accuracies:
            print(f"test accuracy at step {args.rewind}: {common.mean_std(accuracies)}")
        common.report(group)
    return results


def pretrain(**settings: Any) -> list[dict]:
    """The command as a function: pretrain(dataset="digits", subset="easy", replicate=range(4))."""
    return runs.call(main, flags(), settings)


if __name__ == "__main__":
    runs.run_stage(main, flags())
