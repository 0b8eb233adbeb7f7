"""Stage 5: learning-rate warmup on a subset, and the sharpness it is meant to lower (Section 5).

    phase 1, steps 0 to t - 1: the subset, at the rate peak * s / t in step s
    phase 2, steps t to the end: all data, at the peak, ten times lower from each milestone on;
    weights, momentum and BatchNorm statistics go on where phase 1 left them

Figure 6: final accuracy against warmup length, on easy, random and hard subsets.

    python warmup.py                        the embedded digits without and with warmup, a minute
    python warmup.py --dataset cifar10 --subset easy --size 5120 --warmup 0,400,1600 --replicate 0-7

Writes results/warmup/<data>-<network>/<subset>-warmup<t>/rep<k>/: warm.pt (the state after phase
1), log.csv, result.json. Divergence (a loss that is not finite) and chance accuracy at the end are
outcomes, not errors. `--subset easy --offset K --size M` warms up on a window of the ranking.

Sharpness is the largest (algebraic) eigenvalue of the Hessian of the mean training loss, over all
parameters, on --sharpness-sample training images with their true labels, unaugmented, drawn once
from the seed and the same for every run of it; BatchNorm in training mode with the whole sample as
one batch, running statistics untouched. Hessian-vector products by double backward in float32.
"""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

import common
import runs


@dataclasses.dataclass(frozen=True)
class Preset(common.Preset):
    """What this experiment has in place of Table 1; EL2N scores are made by Table 1's settings."""

    lengths: tuple[int, ...] = (1600,)
    sharpness_every: int = 196
    sharpness_sample: int = 1024


PAPER = {"batch_size": 1024, "steps": 7840, "milestones": (3920, 5880), "lr": 3.2, "size": 5120}
# The digits' peak is more than they stand unprepared.
DIGITS = {"batch_size": 128, "steps": 300, "milestones": (150, 225), "lr": 4.0, "size": 512}
DIGITS |= {"lengths": (0, 80), "sharpness_every": 30, "sharpness_sample": 256}
PRESETS = {
    name: Preset(**{**vars(preset), **(DIGITS if name == "digits" else PAPER)})
    for name, preset in common.PRESETS.items()
}


def flags() -> runs.Parser:
    parser = common.flags(__doc__, "replicate", "noise", "subset")
    peak = runs.number(float, 0, 1e6, open_low=True)
    add = parser.add_argument_group("warmup (presets: digits, others)").add_argument
    several = "t, or several; 0 is no warmup [0,80, 1600]"
    add("--warmup", dest="lengths", type=runs.numbers, help=several)
    add("--peak-lr", dest="lr", type=peak, help="another name of --lr [4, 3.2]")
    add("--sharpness-every", type=runs.count, help="steps; 0 for no eigenvalues [30, 196]")
    sample = runs.number(int, 2, 10**9)
    add("--sharpness-sample", type=sample, help="training examples of the Hessian [256, 1024]")
    return parser


def prepare(args: argparse.Namespace) -> common.Data:
    """As `common.prepare`, with the presets of this stage."""
    if args.lengths == (0,):
        args.subset, args.size = "all", None  # the subset is never seen
    return common.prepare(args, PRESETS, check_lengths)


def check_lengths(args: argparse.Namespace, data: common.Data) -> None:
    if max(args.lengths) > args.steps:
        raise runs.UserError(f"--warmup {max(args.lengths)}: longer than --steps {args.steps}")
    n = len(data.train_labels)
    if args.sharpness_every and args.sharpness_sample > n:
        problem = f"{data.name} has {n} training images"
        raise runs.UserError(f"--sharpness-sample {args.sharpness_sample}: {problem}")


# ---- sharpness -----------------------------------------------------------------------------------


@contextlib.contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm by the batch at hand, its running statistics neither read nor written."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


def top_eigenvalue(
    module: nn.Module, x: Tensor, y: Tensor, start: np.ndarray, tolerance: float = 1e-4
) -> tuple[float, float]:
    """Mean cross-entropy of a network in training mode on one batch x (M, C, H, W), y (M,), and the
    largest eigenvalue of its Hessian over all D parameters; NaN where Lanczos finds none. `start`
    (D,) begins the iteration; `tolerance` is relative."""
    parameters = list(module.parameters())

    def flat(tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with batch_statistics(module), exact:
        loss = F.cross_entropy(module(x), y)
        gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True))
        if not gradient.isfinite().all():
            return loss.item(), math.nan

        def product(v: np.ndarray) -> np.ndarray:
            along = gradient @ torch.from_numpy(v).to(gradient)
            keep = {"retain_graph": True, "materialize_grads": True}
            return flat(torch.autograd.grad(along, parameters, **keep)).double().cpu().numpy()

        # ARPACK works in float64 around the float32 products, so that only they round.
        hessian = LinearOperator((len(start), len(start)), matvec=product, dtype=np.float64)
        wanted = {"k": 1, "which": "LA", "tol": tolerance, "return_eigenvectors": False}
        try:
            [top] = eigsh(hessian, v0=start, maxiter=100, **wanted)
        except ArpackNoConvergence as e:
            top = max(e.eigenvalues, default=math.nan)
        except ArpackError:
            top = math.nan
    return loss.item(), float(top)


def watch_sharpness(t: common.Training, group: list[runs.Run], phase: str) -> Callable[[int], None]:
    """The observer that writes the eigenvalues of a training into its `extra` and its logs."""
    args, data, networks = t.args, t.data, t.networks
    draw = common.generator(args.seed, "sample")
    picked = torch.from_numpy(draw.permutation(len(data.train_labels))[: args.sharpness_sample])
    picked = picked.to(args.device)
    start = draw.standard_normal(sum(p.numel() for p in networks.modules[0].parameters()))
    x, y = common.normalise(data, data.train_images[picked]), data.train_labels[picked]

    def observe(step: int) -> None:
        for r, run in enumerate(group):
            if networks.diverged[r] >= 0:
                continue
            loss, top = top_eigenvalue(networks.modules[r], x, y, start)
            t.extra["eigenvalue"][r, step // args.sharpness_every] = top
            run.log(phase, step, lr=t.lr_at(step), sample_loss=loss, eigenvalue=top)

    return observe


# ---- the two phases ------------------------------------------------------------------------------


def train_phase(
    args: argparse.Namespace, data: common.Data, group: list[runs.Run], phase: str, progress
) -> common.Training:
    """Phase "warmup" or "main" of several replicates side by side."""
    t, t_end, every = args.warmup, args.steps, args.sharpness_every
    networks = common.Networks(common.make_model(args, data), len(group), args.device)
    reports = range(0, t_end + 1, every) if every else ()
    table = torch.full(
        (len(group), len(reports)), math.nan, dtype=torch.float64, device=args.device
    )
    labels, streams = common.noisy_labels(data, args.label_noise, args.seed), []
    for r, run in enumerate(group):
        indices = common.choose_subset(args, data, labels, run.replicate)
        subset = {"indices": indices, "labels": labels} if phase == "warmup" else {}
        streams.append(common.make_stream(args, data, run.replicate, **subset))
        networks.load(r, common.fresh_state(args, data, run.replicate))
        if phase == "main" and t:
            warm = run.load("warm.pt")
            networks.load(r, warm["model"])
            networks.set_momentum(r, warm["momentum"])
            networks.diverged[r] = warm["diverged"]
            table[r] = warm["eigenvalue"].to(args.device)
    first, last, schedule = 0, t, lambda step: args.lr * step / t
    if phase == "main":
        first, last, schedule = t, t_end, common.step_schedule(args.lr, args.milestones)
    at = frozenset(s for s in reports if first < s <= last or s == first == 0)
    training = common.Training(args, data, networks, streams, first, last, schedule, at)
    training.extra["eigenvalue"] = table
    observe = watch_sharpness(training, group, phase) if every else lambda step: None
    common.fit(training, group, phase, progress, observe)
    return training


def warm(args: argparse.Namespace, data: common.Data, group: list[runs.Run], progress) -> None:
    """Phase 1: warm.pt of several replicates."""
    training = train_phase(args, data, group, "warmup", progress)
    networks = training.networks
    for r, run in enumerate(group):
        state = {"model": networks.state(r), "momentum": networks.momentum_state(r)}
        state |= {"diverged": networks.diverged[r].item(), "seconds": run.seconds}
        run.save("warm.pt", {**state, "eigenvalue": training.extra["eigenvalue"][r].cpu().clone()})


def finish(args: argparse.Namespace, data: common.Data, group: list[runs.Run], progress) -> None:
    """Phase 2: result.json of several replicates."""
    training = train_phase(args, data, group, "main", progress)
    networks, share = training.networks, data.test_labels.bincount().max().item()
    n, accuracy = len(data.test_labels), common.accuracy(networks, data)
    chance = share / n + 2 * math.sqrt(share / n * (1 - share / n) / n)  # two standard errors
    losses = common.evaluate(networks, data, data.train_images, data.train_labels)[0]
    for r, run in enumerate(group):
        loss, diverged = losses[r].double().mean().item(), networks.diverged[r].item()
        if diverged < 0 and not math.isfinite(loss):
            diverged = args.steps
        good = diverged < 0
        outcome = "diverged" if not good else "trained" if accuracy[r] > chance else "chance"
        tops = training.extra["eigenvalue"][r].tolist()
        numbers = {
            "test_accuracy": accuracy[r] if good else None,
            "outcome": outcome,
            "diverged_at": None if good else diverged,
            "train_loss": loss if good else None,
        }
        run.log("end", args.steps, **numbers)
        sharpness = [
            {"step": k * args.sharpness_every, "eigenvalue": x if math.isfinite(x) else None}
            for k, x in enumerate(tops)
        ]
        seconds = run.seconds + (run.load("warm.pt")["seconds"] if args.warmup else 0)
        run.finish({**numbers, "sharpness": sharpness, "seconds": seconds, "ended": None})


def run_name(args: argparse.Namespace) -> str:
    """Of one length of warmup."""
    return common.run_name(args, common.subset_name(args), f"warmup{args.warmup}")


def run_length(args: argparse.Namespace, data: common.Data) -> list[runs.Run]:
    """Both phases at one warmup length; the finished runs."""
    keys = ("subset", "label_noise", "warmup", "sharpness_every", "sharpness_sample")
    settings = common.settings_of(args, data, *keys)
    with common.open_runs(args, "warmup", run_name(args), settings, args.replicate) as group:
        todo = [run for run in group if run.result is None]
        with runs.progress_bar(len(todo) * args.steps, args.quiet) as progress:
            lacking = [run for run in todo if args.warmup and run.load("warm.pt") is None]
            runs.skip(progress, (len(todo) - len(lacking)) * args.warmup)
            for part in common.side_by_side(lacking, "warmup"):
                warm(args, data, part, progress)
            for part in common.side_by_side(todo, "main"):
                finish(args, data, part, progress)
    return group


def table(lengths: dict[int, list[dict]]) -> str:
    """One line a warmup length, mean and deviation over the replicates that trained."""
    heading = "warmup  trained  test accuracy      train loss         sharpness: "
    lines = [heading + "start  largest  end"]
    for t, results in lengths.items():
        trained = [r for r in results if r["outcome"] == "trained"]
        accuracy, loss = (
            common.mean_std([r[k] for r in trained]) if trained else "-"
            for k in ("test_accuracy", "train_loss")
        )
        curves = [[x["eigenvalue"] for x in r["sharpness"]] for r in trained]
        tops = np.nanmean(np.array(curves or [[]], float), 0)
        sharpness = f"{tops[0]:16.1f}  {tops.max():7.1f}  {tops[-1]:.1f}" if len(tops) else ""
        count = f"{len(trained)} of {len(results)}"
        lines.append(f"{t:6}  {count:7}  {accuracy:17}  {loss:17}  {sharpness}".rstrip())
    return "\n".join(lines)


def plan(args: argparse.Namespace) -> list[tuple[Path, int, bool]]:
    """(folder, network-steps, done) of each length and replicate; reads no data."""
    common.fill(args, PRESETS)
    found = []
    for length in args.lengths:
        one = common.with_steps(args, "warmup", length)
        folder = common.run_folder(one, "warmup", run_name(one))
        found += common.planned(folder, args.replicate, args.steps)
    return found


def main(args: argparse.Namespace) -> list[dict]:
    """Trains with every warmup length, prints the table and the paths; returns the results."""
    data, finished, lengths = prepare(args), [], {}
    for t in args.lengths:
        group = run_length(common.with_steps(args, "warmup", t), data)
        finished, lengths[t] = finished + group, [run.result for run in group]
    print(table(lengths))
    common.report(finished)
    return [run.result for run in finished]


def warm_up(**settings: Any) -> list[dict]:
    """The command as a function: warm_up(dataset="digits", warmup=[0, 80])."""
    return runs.call(main, flags(), settings)


if __name__ == "__main__":
    runs.run_stage(main, flags())
