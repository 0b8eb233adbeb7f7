"""Stage 3, the main job: iterative magnitude pruning (Algorithm 1) from a pre-trained w_tr.

    w_tr <- the initialisation after t_r steps of dense training on a subset of the data
    repeat: train mask * w_tr from step t_r to the end on all data; prune the 20 % smallest weights

Figures 2-4 and 11-13: test accuracy against weights remaining, for subsets and rewind steps.

    python imp.py                                        the embedded digits, a minute on a laptop
    python imp.py --dataset cifar100 --subset easy --size 2048 --rewind 400 --replicate 0-3

Writes results/imp/<data>-<network>/<subset>-rewind<t_r>/rep<k>/: pretrained.pt (w_tr); levelNN.pt
(the level's mask, its final weights, its numbers, and the error ||softmax - onehot|| of w_tr under
its mask for every training example); log.csv; result.json. The same command goes on where it was
stopped; a larger --levels extends a finished run.
"""

import argparse
import math
from fractions import Fraction
from pathlib import Path

from torch import Tensor

import common


def flags() -> common.Parser:
    parser = common.flags(__doc__, "replicate", "noise", "subset", "rewind")
    told = "of pruning [the preset's]"
    parser.add_argument("--levels", type=common.number(int, 0, 10**4), help=told)
    kind, told = common.number(float, 0, 0.99, open_low=True), "of live weights, per level [0.2]"
    parser.add_argument("--prune-fraction", type=kind, default=0.2, help=told)
    told = "w_tr: a pretrained.pt, or a folder with rep<k>/pretrained.pt"
    parser.add_argument("--init", type=Path, help=told)
    return parser


def prune(weights: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """The mask (P,) without the ceil(fraction r) smallest of its r live weights (P or more,),
    over all layers together; of equal magnitudes the first go."""
    live = mask.nonzero()[:, 0]
    count = math.ceil(Fraction(str(fraction)) * len(live))
    order = weights[live].abs().argsort(stable=True)
    pruned = mask.clone()
    pruned[live[order[:count]]] = False
    return pruned


def next_mask(run: common.Run, level: int, fraction: float, layers: dict[str, slice]) -> Tensor:
    """The mask (P,) that a level trains under. Says so in `run.ended` where a layer would die."""
    before = run.load(f"level{level - 1:02d}.pt")
    mask = prune(before["weights"], before["mask"], fraction)
    for name, columns in layers.items():
        if not mask[columns].any():
            run.ended = f"level {level} leaves {name} without weights: use --levels {level - 1}"
    return mask


def train_level(
    args: argparse.Namespace, data: common.Data, runs: list[common.Run], level: int, progress
) -> None:
    """One level of several replicates side by side: levelNN.pt of each, a row in its log."""
    phase, model = f"level{level:02d}", common.make_model(args, data)
    layers = common.Networks(model, 1, args.device).layers
    masks = [next_mask(run, level, args.prune_fraction, layers) if level else None for run in runs]
    pairs = [(run, mask) for run, mask in zip(runs, masks, strict=True) if not run.ended]
    if not pairs:
        return
    networks = common.Networks(model, len(pairs), args.device)
    for r, (run, mask) in enumerate(pairs):
        networks.rewind(r, run.load("pretrained.pt"), mask)
    whole = (networks, data, data.train_images, data.train_labels)
    projected, (_, _, errors) = common.accuracy(networks, data), common.evaluate(*whole)

    streams = [common.make_stream(args, data, run.replicate) for run, _ in pairs]
    schedule = common.step_schedule(args.lr, args.milestones)
    training = common.Training(args, data, networks, streams, args.rewind, args.steps, schedule)
    common.fit(training, [run for run, _ in pairs], phase, progress)

    accuracy, (losses, _, _) = common.accuracy(networks, data), common.evaluate(*whole)
    for r, (run, _) in enumerate(pairs):
        loss, diverged = losses[r].double().mean().item(), networks.diverged[r].item()
        if diverged >= 0 or not math.isfinite(loss):
            step = diverged if diverged >= 0 else args.steps
            run.ended = f"level {level} diverged at step {step}, learning rate {schedule(step):g}"
            continue
        told = {
            "level": level,
            "weights_remaining": networks.mask[r].double().mean().item(),
            "test_accuracy": accuracy[r],
            "train_loss": loss,
            "projected_test_accuracy": projected[r],
            "seconds": run.seconds,
            "steps_per_second": (args.steps - args.rewind) / run.seconds,
        }
        run.log(phase, args.steps, **told)  # before the file that makes the level done
        mask = {"mask": networks.mask[r].cpu().clone(), "projected_error": errors[r].cpu().clone()}
        run.save(f"{phase}.pt", {**mask, **networks.snapshot(r), "numbers": told})


def finished(run: common.Run, levels: int) -> bool:
    return bool(run.result) and (run.result["ended"] or len(run.result["levels"]) > levels)


def conclude(run: common.Run, levels: int) -> None:
    """result.json from the files of the levels."""
    done = [run.load(f"level{k:02d}.pt") for k in range(levels + 1) if run.has(f"level{k:02d}.pt")]
    numbers = [d["numbers"] for d in done]
    run.finish({"pretrain": run.pretraining(), "levels": numbers, "ended": run.ended})


def table(results: list[dict]) -> str:
    """Level, weights remaining, test accuracy (mean and deviation over replicates), of dense."""
    lines = ["level  weights remaining  test accuracy      of dense  seconds"]
    for levels in zip(*(r["levels"] for r in results), strict=False):
        accuracy, seconds = ([x[k] for x in levels] for k in ("test_accuracy", "seconds"))
        dense = [r["levels"][0]["test_accuracy"] for r in results]
        of_dense = sum(a / d for a, d in zip(accuracy, dense, strict=True)) / len(dense)
        lines.append(
            f"{levels[0]['level']:5}  {levels[0]['weights_remaining']:17.2%}  "
            f"{common.mean_std(accuracy):17}  {of_dense:8.1%}  {sum(seconds) / len(seconds):7.1f}"
        )
    return "\n".join(lines)


def main(args: argparse.Namespace) -> list[dict]:
    """Searches, prints the table and the paths; returns the results, one per replicate."""
    if args.init and (args.subset or args.size or args.label_noise):
        told = "leave out --subset, --size and --label-noise"
        raise common.UserError(f"--init brings its own pre-training: {told}")
    asked = args.rewind
    args.rewind = 0 if args.init else args.rewind
    data = common.prepare(args)
    starts = {}
    for k in args.replicate if args.init else ():
        starts[k] = common.read_start("--init", args.init, args, data, k, asked)
    keys = ("subset", "label_noise", "rewind", "pretrain_lr", "prune_fraction")
    settings = common.settings_of(args, data, *keys)
    settings["init"] = args.init.stem if args.init else None
    origin = f"init-{args.init.stem}" if args.init else common.subset_name(args)
    name = common.run_name(args, origin, f"rewind{args.rewind}")
    with common.open_runs(args, data, "imp", name, settings) as runs:
        todo = [run for run in runs if not finished(run, args.levels)]
        steps = (0 if starts else args.rewind) + (args.levels + 1) * (args.steps - args.rewind)
        with common.progress_bar(args, len(todo) * steps) as progress:
            for run in todo if starts else ():
                run.adopt(starts[run.replicate])
            if not starts:
                common.pretrain(args, data, todo, progress)
            for level in range(args.levels + 1):
                phase = f"level{level:02d}"
                lacking = [run for run in todo if not run.ended and run.load(f"{phase}.pt") is None]
                common.skip(progress, (len(todo) - len(lacking)) * (args.steps - args.rewind))
                for group in common.side_by_side(lacking, phase):
                    train_level(args, data, group, level, progress)
        for run in todo:
            conclude(run, args.levels)
        results = [run.result for run in runs]
        complete = [r for r in results if not r["ended"]]
        if complete:
            print(table(complete))
        common.report(runs)
    return results


if __name__ == "__main__":
    common.run_stage(main, flags())
