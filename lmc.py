"""Stage 4: linear mode connectivity of children spawned at w_tr (Section 4, Appendix C).

    each child: w_tr, then training from step t_r to the end on all data, in an order and with an
    augmentation of its own (child 0's are those of level 0 of imp.py: the same network, bit by bit)
    barrier of an example: its loss halfway between two children less the mean of its two losses

Figure 5, and the LMC scores (Definition C.1) of Figures 9 and 10. Children are connected where the
0-1 error barrier is below 2 %.

    python lmc.py                      the embedded digits, three spawn points, a minute on a laptop
    python lmc.py --dataset cifar10 --subset easy --size 3200 --rewind 0,200,400,800 --replicate 0-3

Writes results/lmc/<data>-<model>/<subset>-rewind<t_r>/, a folder for each spawn point:
scores.npy and scores.json, for `imp.py --scores`: the barrier of each training example, mean over
the replicates of the command; and rep<k>/: pretrained.pt (w_tr), child<c>.pt, result.json,
loss_barrier.npy (N,), mean over pairs, loss_barrier_pairs.npy and error_barrier_pairs.npy
(pairs, N). Another --alphas or --batchnorm measures the same children again, in place.

--between FILE FILE ... measures networks that were saved, levels of a run, children, or anyone's
state_dict that fits, each with each: results/lmc/<data>-<model>/between-<names>/.

    python lmc.py --between rep0/level00.pt rep0/level04.pt rep0/level08.pt

Barriers are taken on the unaugmented training images with their true labels, BatchNorm in eval
mode. With --alphas N a pair's barrier is the supremum over alpha of its mean over examples, an
example's the supremum of its own. BatchNorm's running statistics are interpolated like weights;
--batchnorm recompute puts in their place, at the ends too, the mean over the batches of one pass of
unaugmented training images in training mode (an order from the seed, the last partial batch left
out), so that a network's barrier with itself is 0 either way.
"""

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
import engine
import options
import runs
from common import Study
from engine import Networks
from runs import Run, UserError

SPAWN = {"digits": (0, 20, 60)}  # what --rewind is there; elsewhere the step of the preset alone
CONNECTED = 0.02  # error barrier (Frankle et al. 2020)
BINS = (-np.inf, -1, -0.1, -0.01, 0.01, 0.1, 0.5, 1, 2, 4, np.inf)
ARRAYS = ("loss_barrier", "loss_barrier_pairs", "error_barrier_pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.Pretraining):
    """Settings of lmc.py."""

    rewind: tuple[int, ...] = options.option(
        "t_r, or several, at which children are spawned; with --parent the step of its file",
        parse=options.numbers,
    )
    children: int = options.option("children of each w_tr", 3, options.number(int, 2, 64))
    alphas: int = options.option(
        "points of interpolation: 1, the midpoint alone, or an odd number from 0 to 1",
        1,
        options.number(int, 1, 10001),
    )
    batchnorm: str = options.option(
        "statistics of interpolated networks", "average", str, choices=("average", "recompute")
    )
    parent: Path | None = options.option(
        "w_tr of one's own: a network's file, or a folder with rep<k>/pretrained.pt",
        None,
        options.path,
    )
    between: tuple[Path, ...] = options.option(
        "saved networks to measure, each with each, instead of children",
        (),
        options.path,
        nargs="+",
        action="extend",
    )

    @classmethod
    def check(cls, given: dict[str, Any], values: dict[str, Any]) -> None:
        steps = SPAWN.get(values["preset"], (cls.presets[values["preset"]].rewind,))
        steps = tuple(t for t in steps if t < values["steps"])
        values |= {"rewind": given.get("rewind", steps), "between": tuple(values["between"])}
        if values["between"] and len(values["between"]) < 2:
            raise UserError("--between takes two files or more")
        if values["alphas"] % 2 == 0:
            raise UserError(f"--alphas {values['alphas']}: an odd number has 1/2 among the values")
        for flag in ("parent", "children", "rewind", "replicate") if values["between"] else ():
            if flag in given:
                raise UserError(f"--between measures saved networks: leave out --{flag}")
        for flag in ("parent", "between"):
            if values[flag]:
                options.refuse_subset(given, flag)
        super().check(given, values)
        if values["parent"]:
            values["rewind"] = given.get("rewind", ())
            if len(values["rewind"]) > 1:
                raise UserError("--parent is one spawn point: give one --rewind, or none")
        if values["parent"] or values["between"] or values["rewind"] == (0,):
            options.drop_subset(given, values, "--rewind 0: no pre-training")
        for t in values["rewind"]:
            options.check_rewind(t, values["steps"])


def flags() -> options.SettingsParser:
    return options.SettingsParser(Settings, __doc__)


# ---- children ------------------------------------------------------------------------------------


def load_children(run: Run, count: int) -> list[dict]:
    """The child<c>.pt of a run; empty if one is missing."""
    found = [run.load(f"child{c}.pt") for c in range(count)]
    return found if all(found) else []


def train_children(study: Study, rewind: int, group: list[Run], progress) -> None:
    """The children of several replicates side by side: child<c>.pt of each run."""
    s, k = study.settings, study.settings.children
    networks, streams = study.networks(len(group) * k), []
    for i, run in enumerate(group):
        start = run.load("pretrained.pt")
        for c in range(k):
            networks.load(i * k + c, start["model"], start.get("mask"))
            streams.append(study.stream(run.replicate, c))
    schedule = engine.step_schedule(s.lr, s.milestones)
    training = study.training(networks, streams, rewind, s.steps, schedule)
    engine.fit(training, group, "children", progress)
    accuracy, _ = engine.accuracy_and_loss(networks, study.data)
    for i, run in enumerate(group):
        for c in range(k):
            row = i * k + c
            about = {"diverged": networks.diverged[row].item(), "test_accuracy": accuracy[row]}
            state = {"model": networks.state(row), **about, "seconds": run.seconds / k}
            run.save(f"child{c}.pt", state)


# ---- barriers ------------------------------------------------------------------------------------


def reestimate(study: Study, networks: Networks) -> None:
    """BatchNorm's statistics of every row anew: the mean over the batches of one pass."""
    size, data = study.settings.batch_size, study.data
    n = len(data.train_labels)
    draw = engine.generator(study.settings.seed, "sample")
    order = torch.from_numpy(draw.permutation(n)).to(study.device)
    for module in networks.modules:
        norms = [m for m in module.modules() if isinstance(m, engine.NORMS)]
        usual = [m.momentum for m in norms]
        for k, indices in enumerate(order[: n - n % size].split(size)):
            for m in norms:
                m.momentum = 1 / (k + 1)  # makes the running average a plain mean
            with torch.no_grad():
                x = engine.normalise(data, data.train_images[indices])
                module(networks.arrange(x))
        for m, momentum in zip(norms, usual, strict=True):
            m.momentum = momentum


def measure(study: Study, states: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Barriers of every two of K networks, given as state_dicts: per example
    `loss_barrier_pairs` and `error_barrier_pairs` (pairs, N), and at each alpha the means
    `loss_at` and `error_at` (pairs, A); `alphas`; `pairs`; `train_loss` of the K ends. Every end
    and every interpolated network runs once over the training set."""
    s, data, labels = study.settings, study.data, study.data.train_labels
    ends, middle = (study.networks(rows) for rows in (len(states), 1))
    for row, state in enumerate(states):
        ends.load(row, state)
    origin = ends.statistics.clone()

    def logits(networks: Networks) -> torch.Tensor:
        if s.batchnorm == "recompute":
            reestimate(study, networks)
        return engine.predict(networks, data, data.train_images)

    at_ends = logits(ends)
    alphas = [i / (s.alphas - 1) for i in range(s.alphas)] if s.alphas > 1 else [0.5]
    pairs = list(itertools.combinations(range(len(states)), 2))
    for k in (k for k, v in states[0].items() if not v.is_floating_point()):
        if not all(torch.equal(state[k], states[0][k]) for state in states):
            raise UserError(f"{k} ({states[0][k].dtype}) differs between the networks: no midpoint")
    middle.load(0, states[0])  # of what is not interpolated
    shape = (2, len(pairs), len(labels))  # of losses, of errors
    barrier, at = np.full(shape, -np.inf, np.float32), np.zeros((*shape[:2], len(alphas)))
    for p, (i, j) in enumerate(pairs):
        for k, a in enumerate(alphas):
            if a in (0, 1):
                x = at_ends[j if a else i]
            else:
                middle.weights[0] = (1 - a) * ends.weights[i] + a * ends.weights[j]
                middle.statistics[0] = (1 - a) * origin[i] + a * origin[j]
                x = logits(middle)[0]
            loss, error = engine.loss_barrier(x, at_ends[i], at_ends[j], labels, a)
            for kind, values in enumerate((loss, error)):
                at[kind, p, k] = values.double().mean().item()
                barrier[kind, p] = np.maximum(barrier[kind, p], values.cpu().numpy())
    losses = [engine.example_losses(x, labels)[0].double().mean().item() for x in at_ends]
    per_example = {"loss_barrier_pairs": barrier[0], "error_barrier_pairs": barrier[1]}
    means = {"loss_at": at[0], "error_at": at[1], "train_loss": losses}
    return {"alphas": alphas, "pairs": pairs, **per_example, **means}


def save_barriers(run: Run, found: dict[str, Any], each: list[dict], **about: Any) -> None:
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


def conclude(study: Study, run: Run, rewind: int) -> None:
    """Measures the children of a run: its arrays and its result.json."""
    s = study.settings
    children = [] if run.ended else load_children(run, s.children)
    about = {"pretrain": common.about_start(run), "batchnorm": s.batchnorm}
    for c, child in enumerate(children):
        if child["diverged"] >= 0 and not run.ended:
            step = child["diverged"]
            run.ended = f"child {c} from step {rewind} diverged at step {step}: lower --lr"
    if run.ended:
        keys = ("loss_barrier", "loss_barrier_std", "error_barrier", "connected")
        empty = {"children": [], "alphas": [], "pairs": [], **dict.fromkeys(keys)}
        run.finish({**about, **empty, "ended": run.ended})
        return
    found = measure(study, [child["model"] for child in children])
    keys = ("test_accuracy", "seconds")
    each = [{"child": c, **{k: x[k] for k in keys}} for c, x in enumerate(children)]
    save_barriers(run, found, each, **about)


def arrays(run: Run) -> list[np.ndarray]:
    """The arrays of a finished run, in the order of ARRAYS; empty if one is missing or damaged."""
    try:
        found = [runs.read_npy(run.folder / f"{name}.npy") for name in ARRAYS]
    except UserError:
        return []
    return found if runs.fingerprint(*found) == run.result["sha256_of_arrays"] else []


def measured_alike(s: Settings, run: Run) -> bool:
    """Whether this run was measured as the settings ask."""
    r = run.result
    if not r or r["ended"]:
        return bool(r)
    alike = (len(r["alphas"]), r["batchnorm"]) == (s.alphas, s.batchnorm)
    return alike and bool(arrays(run))


def save_scores(study: Study, rewind: int, group: list[Run]) -> None:
    """LMC scores (Definition C.1): scores.npy and scores.json beside the folders of the runs."""
    folder = group[0].folder.parent
    each = np.stack([arrays(run)[0] for run in group])
    about = {k: getattr(study.settings, k) for k in ("children", "alphas", "batchnorm")}
    about |= {"metric": "lmc", "rewind": rewind, "replicates": [run.replicate for run in group]}
    with contextlib.suppress(UserError):  # none yet, or damaged
        before = runs.read_json(folder / "scores.json", "sha256_of_scores", *about)
        found = runs.fingerprint(runs.read_npy(folder / "scores.npy"))
        scores = each.mean(0, dtype=np.float64).astype(np.float32)
        same = found == runs.fingerprint(scores) == before["sha256_of_scores"]
        if same and all(before[k] == v for k, v in about.items()):
            return
    with runs.lock(folder / ".lock", wait=True):  # other replicates may run beside these
        for left in folder.glob(".scores.*.tmp"):  # of a process that died
            left.unlink()
        common.save_scores(folder, each, study.data.train_labels, study, **about)


# ---- spawn points --------------------------------------------------------------------------------


def name_of(s: Settings, rewind: int) -> str:
    """Of one spawn point."""
    origin = f"parent-{s.parent.stem}" if s.parent else options.subset_name(s)
    more = f"children{s.children}" if s.children != 3 else ""
    return options.run_name(s, origin, f"rewind{rewind}", more)


def spawn(study: Study, rewind: int, starts: dict[int, dict]) -> list[Run]:
    """One spawn point: pre-training, children, barriers and scores; the finished runs."""
    study = dataclasses.replace(study, settings=study.settings.of_phase(rewind))
    s, name = study.settings, name_of(study.settings, rewind)
    settings = study.describe("subset", "label_noise", "pretrain_lr", "children")
    settings |= {"rewind": rewind, "parent": None}
    each = {r: {"parent": start["fingerprint"]} for r, start in starts.items()}
    with study.runs("lmc", name, settings, s.replicate, each=each) as group:
        todo = [run for run in group if not measured_alike(s, run)]
        per_run = s.children * (s.steps - rewind)
        total = len(todo) * (per_run + rewind * (not starts))
        with runs.progress_bar(total, s.quiet) as progress:
            for run in todo if starts else ():
                common.adopt(run, starts[run.replicate])
            if not starts:
                common.pretrain(study, rewind, todo, progress)
            alive = [run for run in todo if not run.ended]
            lacking = [run for run in alive if not load_children(run, s.children)]
            runs.skip(progress, (len(todo) - len(lacking)) * per_run)
            for part in engine.side_by_side(lacking, "children"):
                train_children(study, rewind, part, progress)
        for run in todo:
            conclude(study, run, rewind)
        if complete := [run for run in group if not run.result["ended"]]:
            save_scores(study, rewind, complete)
            if not s.quiet:
                runs.say(f"LMC scores: {group[0].folder.parent / 'scores.npy'}")
    return group


# ---- any saved networks --------------------------------------------------------------------------


def between_name(s: Settings, marks: list[str]) -> str:
    stems = "+".join(path.stem for path in s.between)[:80]
    return options.run_name(s, f"between-{stems}-{runs.fingerprint(marks)[:6]}", keys=())


def measure_between(study: Study) -> list[dict]:
    """--between: the barriers of saved networks, each with each; returns the result."""
    s, states = study.settings, []
    for path in s.between:
        network = common.optional("inputs").network_of(study, path, f"--between {path}")
        if network.about.get("data", study.data.fingerprint) != study.data.fingerprint:
            raise UserError(f"--between {path}: trained on other data than {study.data.name}")
        states.append(network.state)
    marks = [runs.fingerprint(state) for state in states]
    name = between_name(s, marks)
    if not common.announce(study, f"{len(states)} networks", str(study.folder("lmc", name))):
        return None
    with study.runs("lmc", name, study.describe() | {"between": marks}, [0]) as [run]:
        if not measured_alike(s, run):
            networks = study.networks(len(states))
            for row, state in enumerate(states):
                networks.load(row, state)
            accuracy, _ = engine.accuracy_and_loss(networks, study.data)
            each = [
                {"child": c, "file": str(file), "test_accuracy": a}
                for c, (file, a) in enumerate(zip(s.between, accuracy, strict=True))
            ]
            save_barriers(run, measure(study, states), each, batchnorm=s.batchnorm)
        result = run.result
    if not s.quiet:
        for x in result["children"]:
            runs.say(f"test accuracy {x['test_accuracy']:.4f}  {x['file']}")
        for pair in result["pairs"]:
            first, second = (result["children"][c]["file"] for c in pair["children"])
            values = f"loss barrier {pair['loss_barrier']:.4f}, error {pair['error_barrier']:.4f}"
            runs.say(f"{values}  {first}  {second}")
        runs.say(str(run.folder / "result.json"))
    return [result]


# ---- tables --------------------------------------------------------------------------------------


def table(spawned: list[list[dict]]) -> str:
    """One line a spawn point, mean and deviation over replicates, and the onset."""
    lines = ["spawned at  pre-trained accuracy  children accuracy  loss barrier      error barrier"]
    joined = []
    for results in spawned:
        start = options.mean_std([r["pretrain"]["test_accuracy"] for r in results])
        accuracy = [np.mean([c["test_accuracy"] for c in r["children"]]) for r in results]
        loss, error = (
            options.mean_std([r[k] for r in results]) for k in ("loss_barrier", "error_barrier")
        )
        joined.append(all(r["connected"] for r in results))
        lines.append(
            f"{results[0]['pretrain']['step']:10}  {start:20}  {options.mean_std(accuracy):17}  "
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


# ---- the command ---------------------------------------------------------------------------------


def plan(s: Settings) -> list[options.Planned]:
    """The runs of every spawn point; reads no data."""
    if s.between:  # nothing is trained
        return [options.Planned(options.run_folder(s, "lmc", "between"), 0, False, 0)]
    found = []
    for t in s.rewind or (common.optional("inputs").step_of(s.parent, s.replicate[0]),):
        one = s.of_phase(t)
        folder = options.run_folder(one, "lmc", name_of(one, t))
        steps = t * (not s.parent) + s.children * (s.steps - t)
        found += options.planned(folder, s.replicate, steps, s.children + 1)
    return found


def main(s: Settings, handed_in: options.HandedIn = options.NOTHING) -> list[dict] | None:
    """Measures every spawn point, prints the tables and the paths; returns the results, by spawn
    point and replicate; None after --dry-run."""
    study = common.prepare(s, __file__, handed_in)
    s, starts, points = study.settings, {}, study.settings.rewind
    if s.between:
        return measure_between(study)
    if s.parent:
        given = points[0] if points else None
        starts = common.optional("inputs").read_starts(
            study, "--parent", s.parent, s.replicate, given
        )
        points = (starts[s.replicate[0]]["step"],)
    folders = [study.folder("lmc", name_of(s.of_phase(t), t)) for t in points]
    if not common.announce(study, f"{s.children} children", ", ".join(map(str, folders))):
        return None
    study = common.rank(study)
    spawned = [spawn(study, t, starts) for t in points]
    complete = [[run for run in group if not run.result["ended"]] for group in spawned]
    complete = [group for group in complete if group]
    if complete and not s.quiet:
        steps = [group[0].result["pretrain"]["step"] for group in complete]
        runs.say(table([[run.result for run in group] for group in complete]))
        pooled = [np.stack([arrays(run)[1] for run in group]) for group in complete]
        runs.say(histogram(steps, pooled))
    finished = [run for group in spawned for run in group]
    options.report(s, finished)
    return [run.result for run in finished]


connect = options.as_function(main, flags, 'connect(dataset="digits", rewind=[0, 20], children=3)')

if __name__ == "__main__":
    runs.run_stage(main, flags())
