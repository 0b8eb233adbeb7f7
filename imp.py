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

--control makes, beside the run of the same settings (made first if it is missing), what a ticket is
compared with (Frankle and Carbin 2019; Frankle et al. 2021):
    reinit     its masks on another initialisation, trained from step 0
    shuffle    its masks with the places within each layer permuted, on w_tr
    one-shot   as many weights as at each of its levels, pruned in one go from the dense network
"""

import argparse
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import common
import runs

CONTROLS = ("reinit", "shuffle", "one-shot")


def flags() -> runs.Parser:
    parser = common.flags(__doc__, "replicate", "noise", "subset", "rewind")
    fraction = runs.number(float, 0, 0.99, open_low=True)
    add = parser.add_argument_group("pruning").add_argument
    add("--levels", type=runs.number(int, 0, 10**4), help="of pruning [preset]")
    add("--prune-fraction", type=fraction, default=0.2, help="of live weights, per level [0.2]")
    add("--init", type=Path, help="w_tr: a .pt, or a folder with rep<k>/pretrained.pt")
    add("--control", choices=CONTROLS, help="what a ticket is compared with [none]")
    return parser


def smallest(weights: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask (P,) without the `count` smallest of its live weights (P or more,), over all layers
    together; of equal magnitudes the first go."""
    live = mask.nonzero()[:, 0]
    order = weights[live].abs().argsort(stable=True)
    pruned = mask.clone()
    pruned[live[order[:count]]] = False
    return pruned


def prune(weights: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """The mask (P,) without the ceil(fraction r) smallest of its r live weights (Algorithm 1)."""
    return smallest(weights, mask, math.ceil(Fraction(str(fraction)) * int(mask.sum())))


def load_level(scratch: common.Networks, state: dict) -> None:
    """Row 0 of `scratch` becomes the network and mask of a levelNN.pt."""
    scratch.load(0, state["model"])
    scratch.mask[0] = scratch.flat_mask(state["mask"])


def next_mask(run: runs.Run, level: int, fraction: float, scratch: common.Networks) -> Tensor:
    """The mask (P,) that a level of IMP trains under."""
    load_level(scratch, run.load(f"level{level - 1:02d}.pt"))
    return prune(scratch.weights[0], scratch.mask[0], fraction)


def control_mask(
    args: argparse.Namespace, run: runs.Run, level: int, scratch: common.Networks
) -> Tensor:
    """The mask (P,) of a level of a control, from the files of the run that it goes beside."""
    beside = args.ticket_folder / f"rep{run.replicate}"
    load_level(scratch, runs.read_tensors(beside / f"level{level:02d}.pt"))
    mask = scratch.mask[0].clone()
    if args.control == "one-shot":
        alive = int(mask.sum())
        load_level(scratch, runs.read_tensors(beside / "level00.pt"))
        return smallest(scratch.weights[0], scratch.mask[0], mask.numel() - alive)
    if args.control == "shuffle":
        draw = common.generator(args.seed, "shuffle", run.replicate, level)
        for slot in scratch.layers.values():
            order = torch.from_numpy(draw.permutation(slot.shape.numel())).to(mask.device)
            mask[slot.columns] = mask[slot.columns][order]
    return mask


def train_level(
    args: argparse.Namespace, data: common.Data, group: list[runs.Run], level: int, progress
) -> None:
    """One level of several replicates side by side: levelNN.pt of each, a row in its log."""
    phase, model = f"level{level:02d}", common.make_model(args, data)
    scratch, pairs = common.Networks(model, 1, args.device), []
    for run in group:
        mask = scratch.mask[0].clone()  # level 0 is dense
        if level and args.control:
            mask = control_mask(args, run, level, scratch)
        elif level:
            mask = next_mask(run, level, args.prune_fraction, scratch)
        for name, slot in scratch.layers.items():
            if not mask[slot.columns].any():
                remedy = f"use --levels {level - 1}"
                run.ended = f"level {level} leaves {name} without weights: {remedy}"
        if not run.ended:
            pairs.append((run, mask))
    if not pairs:
        return
    networks = common.Networks(model, len(pairs), args.device)
    for r, (run, mask) in enumerate(pairs):
        networks.rewind(r, run.load("pretrained.pt")["model"], mask)
    train_set = (networks, data, data.train_images, data.train_labels)
    projected, (_, _, errors) = common.accuracy(networks, data), common.evaluate(*train_set)

    streams = [common.make_stream(args, data, run.replicate) for run, _ in pairs]
    schedule = common.step_schedule(args.lr, args.milestones)
    training = common.Training(args, data, networks, streams, args.rewind, args.steps, schedule)
    common.fit(training, [run for run, _ in pairs], phase, progress)

    accuracy, (losses, _, _) = common.accuracy(networks, data), common.evaluate(*train_set)
    for r, (run, _) in enumerate(pairs):
        loss, diverged = losses[r].double().mean().item(), networks.diverged[r].item()
        if diverged >= 0 or not math.isfinite(loss):
            step = diverged if diverged >= 0 else args.steps
            run.ended = f"level {level} diverged at step {step}, learning rate {schedule(step):g}"
            continue
        numbers = {
            "level": level,
            "weights_remaining": networks.mask[r].double().mean().item(),
            "test_accuracy": accuracy[r],
            "train_loss": loss,
            "projected_test_accuracy": projected[r],
            "seconds": run.seconds,
            "steps_per_second": (args.steps - args.rewind) / run.seconds,
        }
        run.log(phase, args.steps, **numbers)  # before the file that makes the level done
        state = {"model": networks.state(r), "mask": networks.masks(r), "numbers": numbers}
        run.save(f"{phase}.pt", {**state, "projected_error": errors[r].cpu().clone()})


def finished(result: dict | None, levels: int) -> bool:
    return bool(result) and bool(result["ended"] or len(result["levels"]) > levels)


def conclude(run: runs.Run, levels: int) -> None:
    """result.json from the files of the levels."""
    done = [name for k in range(levels + 1) if run.has(name := f"level{k:02d}.pt")]
    numbers = [run.load(name)["numbers"] for name in done]
    run.finish({"pretrain": common.about_start(run), "levels": numbers, "ended": run.ended})


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


def run_name(args: argparse.Namespace, control: str | None) -> str:
    origin = f"init-{args.init.stem}" if args.init else common.subset_name(args)
    return common.run_name(args, origin, f"rewind{args.rewind}", control or "")


def start_control(args: argparse.Namespace, data: common.Data, run: runs.Run) -> None:
    """pretrained.pt of a control, and its level 0 where that is the run's own."""
    beside = args.ticket_folder / f"rep{run.replicate}"
    if args.control == "reinit":
        model = common.fresh_state(args, data, common.REINIT + run.replicate)
        return common.adopt(run, common.start_from(model, data, 0))
    common.adopt(run, runs.read_tensors(beside / "pretrained.pt"))
    dense = runs.read_tensors(beside / "level00.pt")
    run.log("level00", args.steps, **dense["numbers"])
    run.save("level00.pt", dense)


def search_levels(
    args: argparse.Namespace, data: common.Data, starts: dict[int, dict]
) -> list[dict]:
    """Every level of the run, or of the control, that `args` names; returns the results."""
    keys = ("subset", "label_noise", "rewind", "pretrain_lr", "prune_fraction", "control")
    settings = common.settings_of(args, data, *keys)
    settings["init"] = args.init.stem if args.init else None
    name, first = run_name(args, args.control), 0 if args.control == "reinit" else args.rewind
    with common.open_runs(args, "imp", name, settings, args.replicate) as group:
        todo = [run for run in group if not finished(run.result, args.levels)]
        pretrained = bool(starts or args.control)
        steps = args.rewind * (not pretrained) + (args.levels + 1) * (args.steps - first)
        with runs.progress_bar(len(todo) * steps, args.quiet) as progress:
            for run in todo:
                if args.control:
                    start_control(args, data, run)
                elif starts:
                    common.adopt(run, starts[run.replicate])
            if not pretrained:
                common.pretrain(args, data, todo, progress)
            trained = argparse.Namespace(**{**vars(args), "rewind": first})
            for level in range(args.levels + 1):
                phase = f"level{level:02d}"
                lacking = [run for run in todo if not run.ended and run.load(f"{phase}.pt") is None]
                runs.skip(progress, (len(todo) - len(lacking)) * (args.steps - first))
                for part in common.side_by_side(lacking, phase):
                    train_level(trained, data, part, level, progress)
        for run in todo:
            conclude(run, args.levels)
        results = [run.result for run in group]
        if complete := [r for r in results if not r["ended"]]:
            print(table(complete))
        common.report(group)
    return results


def plan(args: argparse.Namespace) -> list[tuple[Path, int, bool]]:
    """(folder, network-steps, done) of each replicate; reads no data."""
    common.fill(args)
    folder = common.run_folder(args, "imp", run_name(args, args.control))
    first = 0 if args.control == "reinit" else args.rewind
    steps = args.rewind * (not args.control) + (args.levels + 1) * (args.steps - first)
    return common.planned(folder, args.replicate, steps, lambda r: finished(r, args.levels))


def main(args: argparse.Namespace) -> list[dict]:
    """Searches, prints the table and the paths; returns the results, one per replicate."""
    common.check_start(args, "init")
    rewind = args.rewind
    args.rewind = 0 if args.init else rewind
    data = common.prepare(args)
    starts = common.read_starts("--init", args.init, args, data, rewind)
    if starts:
        args.rewind = starts[args.replicate[0]]["step"]
    if args.control:
        ticket = argparse.Namespace(**{**vars(args), "control": None, "fresh": False})
        search_levels(ticket, data, starts)
        args.ticket_folder = common.run_folder(args, "imp", run_name(args, None))
    return search_levels(args, data, starts)


def search(**settings: Any) -> list[dict]:
    """The command as a function: search(dataset="digits", subset="easy", levels=3)."""
    return runs.call(main, flags(), settings)


if __name__ == "__main__":
    runs.run_stage(main, flags())
