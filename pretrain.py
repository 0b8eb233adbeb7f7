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
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

import common

KINDS = ("accuracy", "gradient-norm", "coherence")
BATCHES = 16  # whose gradients are compared


def flags() -> common.Parser:
    parser = common.flags(__doc__, "replicate", "noise", "subset", "rewind")
    told = f"comma-separated: {','.join(KINDS)} [all]"
    parser.add_argument("--track", type=kinds, default=KINDS, help=told)
    parser.add_argument("--every", type=common.positive, default=10, help="steps between rows [10]")
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


def track(t: common.Training, runs: list[common.Run]) -> Callable[[int], None]:
    """Sets what a pre-training reports; returns the observer that writes the log."""
    args, data, networks = t.args, t.data, t.networks
    t.at = frozenset([*range(0, args.rewind, args.every), args.rewind])
    order = sorted(t.at)
    if "gradient-norm" in args.track:
        norms = torch.zeros(networks.rows, args.rewind, device=args.device)
        t.extra["gradient_norm"] = norms
        t.watch = lambda networks, step, indices, logits: norms.index_copy_(
            1, step, networks.gradient.norm(dim=1, keepdim=True)
        )
    if "coherence" in args.track:
        shape = (networks.rows, len(order), BATCHES)
        t.extra["coherence"] = torch.zeros(shape, device=args.device)
    if "accuracy" in args.track:
        scores = common.read_scores(args, data) if data.scores is None else data.scores
        easy = torch.from_numpy(np.argsort(scores, kind="stable")[: args.size].copy())
    samples = []
    for run, stream in zip(runs, t.streams, strict=True):
        key = common.philox_key(args.seed, "sample", run.replicate)
        samples.append(common.Stream(stream.labels, stream.indices, key, stream.augment))

    def observe(step: int) -> None:
        told = [{} for _ in runs]
        if "accuracy" in args.track:
            test = common.accuracy(networks, data)
            whole = (networks, data, data.train_images, data.train_labels)
            right = (common.evaluate(*whole)[1] == 0).double()
            for r, row in enumerate(told):
                row["test_accuracy"], row["train_accuracy"] = test[r], right[r].mean().item()
                row["easy_accuracy"] = right[r, easy.to(right.device)].mean().item()
        if "coherence" in args.track:
            for r, row in enumerate(told):
                cosines = coherence(t, r, samples[r], step)
                t.extra["coherence"][r, order.index(step)] = cosines
                row["coherence"] = cosines.mean().item()
        for run, row in zip(runs, told, strict=True):
            run.log("pretrain", step, **row)

    return observe


def main(args: argparse.Namespace) -> list[dict]:
    """Pre-trains, prints the last row of each log and the paths; returns the results."""
    data = common.prepare(args)
    if args.rewind == 0:
        raise common.UserError("--rewind 0: there is nothing to pre-train")
    keys = ("subset", "label_noise", "rewind", "pretrain_lr", "track", "every")
    settings = common.settings_of(args, data, *keys)
    name = common.run_name(args, common.subset_name(args), f"rewind{args.rewind}")
    with common.open_runs(args, data, "pretrain", name, settings) as runs:
        todo = [run for run in runs if run.result is None]
        with common.progress_bar(args, len(todo) * args.rewind) as progress:
            common.pretrain(args, data, todo, progress, track)
        for run in todo:
            for kind, values in run.load("pretrained.pt")["tracked"].items():
                common.write(run.folder / f"{kind}.npy", lambda f, v=values: np.save(f, v.numpy()))
            run.finish({"pretrain": run.pretraining(), "ended": run.ended})
        results = [run.result for run in runs]
        accuracies = [r["pretrain"]["test_accuracy"] for r in results if not r["ended"]]
        if accuracies:
            print(f"test accuracy at step {args.rewind}: {common.mean_std(accuracies)}")
        common.report(runs)
    return results


if __name__ == "__main__":
    common.run_stage(main, flags())
