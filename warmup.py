"""Stage 5: learning-rate warmup on a subset, and the sharpness it is meant to lower (Section 5).

    phase 1, steps 0 to t - 1: the subset, at the rate peak * s / t in step s
    phase 2, steps t to the end: all data, at the peak, ten times lower from each milestone on;
    weights, momentum and BatchNorm statistics go on where phase 1 left them

Figure 6: final accuracy against warmup length, on easy, random and hard subsets.

    python warmup.py                        the embedded digits without and with warmup, a minute
    python warmup.py --dataset cifar10 --subset easy --size 5120 --warmup 0,400,1600 --replicate 0-7

Writes results/warmup/<data>-<model>/<subset>-warmup<t>/rep<k>/: warm.pt (the state after phase
1), subset.npy, log.csv, result.json. Divergence (a loss that is not finite) and chance accuracy at
the end are outcomes, not errors. `--subset easy --offset K --size M` warms up on a window of the
ranking.

Sharpness is the largest (algebraic) eigenvalue of the Hessian of the mean training loss, over all
parameters that are trained, on --sharpness-sample training images with their true labels,
unaugmented, drawn once from the seed and the same for every run of it; BatchNorm in training mode
with the whole sample as one batch, running statistics untouched. Hessian-vector products by double
backward in float32.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import engine
import options
import runs
from common import Study
from runs import Run, UserError


@dataclasses.dataclass(frozen=True)
class Preset(options.Preset):
    """What this experiment has in place of Table 1; EL2N scores are made by Table 1's settings."""

    warmup: tuple[int, ...] = (1600,)
    sharpness_every: int = 196
    sharpness_sample: int = 1024


PAPER = {"batch_size": 1024, "steps": 7840, "milestones": (3920, 5880), "lr": 3.2, "size": 5120}
# The digits' peak is more than they stand unprepared.
DIGITS = {"batch_size": 128, "steps": 300, "milestones": (150, 225), "lr": 4.0, "size": 512}
DIGITS |= {"warmup": (0, 80), "sharpness_every": 30, "sharpness_sample": 256}
PRESETS = {
    name: Preset(**{**vars(preset), **(DIGITS if name == "digits" else PAPER)})
    for name, preset in options.PRESETS.items()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.Subset):
    """Settings of warmup.py."""

    presets: ClassVar[dict[str, options.Preset]] = PRESETS

    warmup: tuple[int, ...] = options.option(
        "t, the steps of warmup, or several lengths; 0 is no warmup", parse=options.numbers
    )
    lr: float = options.option(
        "peak learning rate", parse=options.rate, names=("--lr", "--peak-lr")
    )
    sharpness_every: int = options.option(
        "steps between eigenvalues; 0 for none", parse=options.count
    )
    sharpness_sample: int = options.option(
        "training examples of the Hessian", parse=options.number(int, 2, 10**9)
    )

    @classmethod
    def check(cls, given: dict[str, Any], values: dict[str, Any]) -> None:
        super().check(given, values)
        if values["warmup"] == (0,):
            options.drop_subset(given, values, "--warmup 0: no phase 1")
        longest = max(values["warmup"])
        if longest > values["steps"]:
            raise UserError(f"--warmup {longest}: longer than --steps {values['steps']}")


def flags() -> options.SettingsParser:
    return options.SettingsParser(Settings, __doc__)


def check_sample(s: Settings, data: engine.Data) -> None:
    n = len(data.train_labels)
    if s.sharpness_every and s.sharpness_sample > n:
        problem = f"{data.name} has {n} training images"
        raise UserError(f"--sharpness-sample {s.sharpness_sample}: {problem}")


# ---- sharpness -----------------------------------------------------------------------------------


@contextlib.contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm by the batch at hand, its running statistics neither read nor written."""
    norms = [m for m in module.modules() if isinstance(m, engine.NORMS)]
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
    largest eigenvalue of its Hessian over the D parameters that are trained and that the loss
    depends on; NaN where Lanczos finds none. `start` (at least D,) begins the iteration;
    `tolerance` is relative."""
    trained = [p for p in module.parameters() if p.requires_grad]

    def flat(tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    # Neither cuDNN's recurrent layers nor flash attention can be differentiated twice.
    cudnn = not any(isinstance(m, nn.RNNBase) for m in module.modules())
    exact = torch.backends.cudnn.flags(enabled=cudnn, deterministic=True, allow_tf32=False)
    with batch_statistics(module), exact, sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(module(x), y)
        found = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
        parameters = [p for p, g in zip(trained, found, strict=True) if g is not None]
        gradient = flat(tuple(g for g in found if g is not None))
        if not gradient.isfinite().all():
            return loss.item(), math.nan

        def product(v: np.ndarray) -> np.ndarray:
            along = gradient @ torch.from_numpy(v).to(gradient)
            keep = {"retain_graph": True, "materialize_grads": True}
            return flat(torch.autograd.grad(along, parameters, **keep)).double().cpu().numpy()

        # ARPACK works in float64 around the float32 products, so that only they round.
        start = start[: len(gradient)]
        hessian = LinearOperator((len(start), len(start)), matvec=product, dtype=np.float64)
        wanted = {"k": 1, "which": "LA", "tol": tolerance, "return_eigenvectors": False}
        try:
            [top] = eigsh(hessian, v0=start, maxiter=100, **wanted)
        except ArpackNoConvergence as e:
            top = max(e.eigenvalues, default=math.nan)
        except ArpackError:
            top = math.nan
    return loss.item(), float(top)


def watch_sharpness(
    study: Study, t: engine.Training, group: list[Run], phase: str
) -> Callable[[int], None]:
    """The observer that writes the eigenvalues of a training into its `extra` and its logs."""
    s, data, networks = study.settings, study.data, t.networks
    draw = engine.generator(s.seed, "sample")
    picked = torch.from_numpy(draw.permutation(len(data.train_labels))[: s.sharpness_sample])
    picked = picked.to(study.device)
    start = draw.standard_normal(sum(v.shape.numel() for v in networks.parameters))
    x = networks.arrange(engine.normalise(data, data.train_images[picked]))
    y = data.train_labels[picked]

    def observe(step: int) -> None:
        for r, run in enumerate(group):
            if networks.diverged[r] >= 0:
                continue
            loss, top = top_eigenvalue(networks.modules[r], x, y, start)
            t.extra["eigenvalue"][r, step // s.sharpness_every] = top
            run.log(phase, step, lr=t.lr_at(step), sample_loss=loss, eigenvalue=top)

    return observe


# ---- the two phases ------------------------------------------------------------------------------


def train_phase(
    study: Study, length: int, group: list[Run], phase: str, progress
) -> engine.Training:
    """Phase "warmup" or "main" of several replicates side by side, with `length` steps of
    warmup."""
    s, data = study.settings, study.data
    networks, every = study.networks(len(group)), s.sharpness_every
    reports = range(0, s.steps + 1, every) if every else ()
    tops = torch.full((len(group), len(reports)), math.nan, dtype=torch.float64)
    tops, streams = tops.to(study.device), []
    labels = common.noisy_labels(data, s.label_noise, s.seed)
    for r, run in enumerate(group):
        subset = {}
        if phase == "warmup":
            indices = common.choose_subset(study, labels, run.replicate)
            runs.write_array(run.folder / "subset.npy", indices.cpu().numpy())
            subset = {"indices": indices, "labels": labels}
        streams.append(study.stream(run.replicate, **subset))
        networks.load(r, study.initial_state_dict(run.replicate))
        if phase == "main" and length:
            warm = run.load("warm.pt")
            networks.load(r, warm["model"])
            networks.set_momentum(r, warm["momentum"])
            networks.diverged[r] = warm["diverged"]
            tops[r] = warm["eigenvalue"].to(study.device)
    first, last, schedule = 0, length, lambda step: s.lr * step / length
    if phase == "main":
        first, last, schedule = length, s.steps, engine.step_schedule(s.lr, s.milestones)
    at = frozenset(k for k in reports if first < k <= last or k == first == 0)
    training = study.training(networks, streams, first, last, schedule, at)
    training.extra["eigenvalue"] = tops
    observe = watch_sharpness(study, training, group, phase) if every else lambda step: None
    engine.fit(training, group, phase, progress, observe)
    return training


def warm(study: Study, length: int, group: list[Run], progress) -> None:
    """Phase 1: warm.pt of several replicates."""
    training = train_phase(study, length, group, "warmup", progress)
    networks = training.networks
    for r, run in enumerate(group):
        state = {"model": networks.state(r), "momentum": networks.momentum_state(r)}
        state |= {"diverged": networks.diverged[r].item(), "seconds": run.seconds}
        run.save("warm.pt", {**state, "eigenvalue": training.extra["eigenvalue"][r].cpu().clone()})


def finish(study: Study, length: int, group: list[Run], progress) -> None:
    """Phase 2: result.json of several replicates."""
    s, data = study.settings, study.data
    training = train_phase(study, length, group, "main", progress)
    networks, chance = training.networks, common.chance_accuracy(data)
    accuracy, _ = engine.accuracy_and_loss(networks, data)
    losses = engine.evaluate(networks, data, data.train_images, data.train_labels)[0]
    for r, run in enumerate(group):
        loss, diverged = losses[r].double().mean().item(), networks.diverged[r].item()
        if diverged < 0 and not math.isfinite(loss):
            diverged = s.steps
        good = diverged < 0
        outcome = "diverged" if not good else "trained" if accuracy[r] > chance else "chance"
        tops = training.extra["eigenvalue"][r].tolist()
        numbers = {
            "test_accuracy": accuracy[r] if good else None,
            "outcome": outcome,
            "diverged_at": None if good else diverged,
            "train_loss": loss if good else None,
        }
        run.log("end", s.steps, **numbers)
        sharpness = [
            {"step": k * s.sharpness_every, "eigenvalue": x if math.isfinite(x) else None}
            for k, x in enumerate(tops)
        ]
        seconds = run.seconds + (run.load("warm.pt")["seconds"] if length else 0)
        run.finish({**numbers, "sharpness": sharpness, "seconds": seconds, "ended": None})


def name_of(s: Settings, length: int) -> str:
    """Of one length of warmup."""
    return options.run_name(s, options.subset_name(s), f"warmup{length}")


def run_length(study: Study, length: int) -> list[Run]:
    """Both phases at one length of warmup; the finished runs."""
    study = dataclasses.replace(study, settings=study.settings.of_phase(length))
    s = study.settings
    settings = study.describe("subset", "label_noise", "sharpness_every", "sharpness_sample")
    settings |= {"warmup": length}
    with study.runs("warmup", name_of(s, length), settings, s.replicate) as group:
        todo = [run for run in group if run.result is None]
        with runs.progress_bar(len(todo) * s.steps, s.quiet) as progress:
            lacking = [run for run in todo if length and run.load("warm.pt") is None]
            runs.skip(progress, (len(todo) - len(lacking)) * length)
            for part in engine.side_by_side(lacking, "warmup"):
                warm(study, length, part, progress)
            for part in engine.side_by_side(todo, "main"):
                finish(study, length, part, progress)
    return group


def table(lengths: dict[int, list[dict]]) -> str:
    """One line a warmup length, mean and deviation over the replicates that trained."""
    heading = "warmup  trained  test accuracy      train loss         sharpness: "
    lines = [heading + "start  largest  end"]
    for t, results in lengths.items():
        trained = [r for r in results if r["outcome"] == "trained"]
        accuracy, loss = (
            options.mean_std([r[k] for r in trained]) if trained else "-"
            for k in ("test_accuracy", "train_loss")
        )
        curves = [[x["eigenvalue"] for x in r["sharpness"]] for r in trained]
        tops = np.nanmean(np.array(curves or [[]], float), 0)
        sharpness = f"{tops[0]:16.1f}  {tops.max():7.1f}  {tops[-1]:.1f}" if len(tops) else ""
        count = f"{len(trained)} of {len(results)}"
        lines.append(f"{t:6}  {count:7}  {accuracy:17}  {loss:17}  {sharpness}".rstrip())
    return "\n".join(lines)


def plan(s: Settings) -> list[options.Planned]:
    """The runs of every length; reads no data."""
    found = []
    for length in s.warmup:
        one = s.of_phase(length)
        folder = options.run_folder(one, "warmup", name_of(one, length))
        found += options.planned(folder, s.replicate, s.steps, 2 * bool(length))
    return found


def main(s: Settings, handed_in: options.HandedIn = options.NOTHING) -> list[dict] | None:
    """Trains with every warmup length, prints the table and the paths; returns the results, by
    length and replicate; None after --dry-run."""
    study = common.prepare(s, __file__, handed_in)
    s = study.settings
    check_sample(s, study.data)
    folders = [study.folder("warmup", name_of(s.of_phase(t), t)) for t in s.warmup]
    if not common.announce(study, ", ".join(map(str, folders))):
        return None
    study, finished, lengths = common.rank(study), [], {}
    for t in s.warmup:
        group = run_length(study, t)
        finished, lengths[t] = finished + group, [run.result for run in group]
    if not s.quiet:
        runs.say(table(lengths))
    options.report(s, finished)
    return [run.result for run in finished]


warm_up = options.as_function(main, flags, 'warm_up(dataset="digits", warmup=[0, 80])')

if __name__ == "__main__":
    runs.run_stage(main, flags())
