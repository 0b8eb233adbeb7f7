"""Stage 3, the main job: iterative magnitude pruning (Algorithm 1) from a pre-trained w_tr.

    w_tr <- the initialisation after t_r steps of dense training on a subset of the data
    repeat: train mask * w_tr from step t_r to the end on all data; prune the 20 % smallest weights

Figures 2-4 and 11-13: test accuracy against weights remaining, for subsets and rewind steps.

    python imp.py                                        the embedded digits, a minute on a laptop
    python imp.py --dataset cifar100 --subset easy --size 2048 --rewind 400 --replicate 0-3

Writes results/imp/<data>-<model>/<subset>-rewind<t_r>/rep<k>/: pretrained.pt (w_tr); subset.npy;
levelNN.pt (the level's mask, its final weights, its numbers); log.csv; result.json. The same
command resumes where it was stopped; a larger --levels extends a finished run.

--init starts from a w_tr of one's own; where its file holds a mask, or with --mask, level 0 is
sparse already and further levels prune on. --control makes, beside the run of the same settings
(made first if it is missing), what a ticket is compared with (Frankle and Carbin 2019; Frankle et
al. 2021):
    reinit     its masks on another initialisation, trained from step 0
    shuffle    its masks with the positions within each layer permuted, on w_tr
    one-shot   as many weights as at each of its levels, pruned at once from the network of level 0
--verify FOLDER measures the saved levels of a finished run again, on any machine, and compares them
with the recorded numbers.
"""

import dataclasses
import functools
import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import common
import engine
import options
import runs
from common import Study
from engine import Networks
from runs import Run, UserError

CONTROLS = ("reinit", "shuffle", "one-shot")
MEASURING = ("verify", "batch_size", "precision", "device", "engine", "fast", "out", "quiet")
REINIT = 1 << 17  # the other initialisation of replicate k is that of replicate REINIT + k


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.Pretraining):
    """Settings of imp.py."""

    rewind: int | None = options.option(
        "t_r, the steps of pre-training; with --init the step of its file", parse=options.count
    )
    levels: int = options.option("number of pruning levels", parse=options.number(int, 0, 10**4))
    prune_fraction: float = options.option(
        "fraction of the live weights pruned at each level",
        0.2,
        options.number(float, 0, 0.99, open_low=True),
    )
    init: Path | None = options.option(
        "w_tr of one's own: a network's file, or a folder with rep<k>/pretrained.pt",
        None,
        options.path,
    )
    mask: Path | None = options.option(
        "the mask to start under: a levelNN.pt, or masks by layer", None, options.path
    )
    control: str = options.option(
        "also make what a ticket is compared with", "", str, choices=CONTROLS
    )
    projected: bool = options.option(
        "also measure w_tr under each level's mask, on every example (Figure 9)", False
    )
    verify: Path | None = options.option(
        "measure the saved levels of this run again, train nothing", None, options.path
    )

    @classmethod
    def complete(cls, given: dict[str, Any]) -> "Settings":
        if given.get("verify"):
            for field in dataclasses.fields(cls):
                used = {field.name, field.metadata.get("group")} & {*MEASURING, "data and model"}
                if field.name in given and not used:
                    shown = field.name.replace("_", "-")
                    raise UserError(f"--verify measures what is saved: leave out --{shown}")
            given = settings_of_run(given["verify"]) | given
        return super().complete(given)

    @classmethod
    def check(cls, given: dict[str, Any], values: dict[str, Any]) -> None:
        super().check(given, values)
        if values["init"]:
            options.refuse_subset(given, "init")
            values |= options.NO_SUBSET | {"rewind": given.get("rewind")}
        elif values["rewind"] == 0:
            options.drop_subset(given, values, "--rewind 0: no pre-training")
        options.check_rewind(values["rewind"] or 0, values["steps"])
        if values["mask"] and values["control"]:
            raise UserError("--control makes masks of its own: leave out --mask")


def flags() -> options.SettingsParser:
    return options.SettingsParser(Settings, __doc__)


# ---- masks ---------------------------------------------------------------------------------------


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


def load_level(scratch: Networks, state: dict) -> None:
    """Row 0 of `scratch` becomes the network and mask of a levelNN.pt."""
    scratch.load(0, state["model"], state["mask"])


def level_mask(study: Study, run: Run, level: int, scratch: Networks) -> Tensor:
    """The mask (P,) that a level of IMP trains under; of level 0 all weights, unless the run was
    given a mask."""
    if level == 0:
        start = run.load("pretrained.pt")
        scratch.load(0, start["model"], start.get("mask"))
        given = study.settings.mask
        return read_mask(study, scratch) if given and "mask" not in start else scratch.mask[0]
    load_level(scratch, run.load(f"level{level - 1:02d}.pt"))
    return prune(scratch.weights[0], scratch.mask[0], study.settings.prune_fraction)


def read_mask(study: Study, scratch: Networks) -> Tensor:
    """The mask (P,) of --mask."""
    return scratch.flat_mask(common.optional("inputs").mask_of(study.settings.mask, scratch))


def control_mask(study: Study, run: Run, level: int, scratch: Networks) -> Tensor:
    """The mask (P,) of a level of a control, from the files of the run that it is compared with."""
    s, ticket = study.settings, ticket_folder(study, run)
    load_level(scratch, runs.read_tensors(ticket / f"level{level:02d}.pt"))
    mask = scratch.mask[0].clone()
    if s.control == "one-shot":
        alive = int(mask.sum())
        load_level(scratch, runs.read_tensors(ticket / "level00.pt"))
        return smallest(scratch.weights[0], scratch.mask[0], int(scratch.mask[0].sum()) - alive)
    if s.control == "shuffle":
        draw = engine.generator(s.seed, "shuffle", run.replicate, level)
        for view in scratch.layers.values():
            order = torch.from_numpy(draw.permutation(view.shape.numel())).to(mask.device)
            mask[view.columns] = mask[view.columns][order]
    return mask


# ---- a level -------------------------------------------------------------------------------------


def level_file(level: int) -> str:
    return f"level{level:02d}.pt"


def masked_starts(study: Study, group: list[Run], level: int) -> list[tuple[Run, Tensor]]:
    """The runs of a group with the masks (P,) that they train a level under; a run whose mask would
    leave a layer empty ends."""
    scratch, pairs = study.networks(1), []
    for run in group:
        ranked = control_mask if level and study.settings.control else level_mask
        mask = ranked(study, run, level, scratch).clone()
        empty = [k for k, view in scratch.layers.items() if not mask[view.columns].any()]
        if empty:
            remedy = f": use --levels {level - 1}" * (level > 0)
            run.ended = f"level {level} leaves {empty[0]} without weights{remedy}"
        else:
            pairs.append((run, mask))
    return pairs


def train_level(study: Study, first: int, group: list[Run], level: int, progress) -> None:
    """One level of several replicates side by side, from step `first`: levelNN.pt of each, a row in
    its log, a line on the terminal."""
    s, data, phase = study.settings, study.data, f"level{level:02d}"
    pairs = masked_starts(study, group, level)
    if not pairs:
        return
    networks = study.networks(len(pairs))
    for r, (run, mask) in enumerate(pairs):
        networks.load(r, run.load("pretrained.pt")["model"])
        networks.set_mask(r, mask)
    streams = [study.stream(run.replicate) for run, _ in pairs]
    schedule = engine.step_schedule(s.lr, s.milestones)
    training = study.training(networks, streams, first, s.steps, schedule)
    engine.fit(training, [run for run, _ in pairs], phase, progress)
    accuracy, loss = engine.accuracy_and_loss(networks, data)
    for r, (run, _) in enumerate(pairs):
        diverged = networks.diverged[r].item()
        if diverged >= 0 or not math.isfinite(loss[r]):
            step = diverged if diverged >= 0 else s.steps
            run.ended = f"level {level} diverged at step {step}, learning rate {schedule(step):g}"
            continue
        numbers = {
            "level": level,
            "weights_remaining": networks.mask[r].double().mean().item(),
            "test_accuracy": accuracy[r],
            "test_loss": loss[r],
        }
        times = {"seconds": run.seconds, "steps_per_second": (s.steps - first) / run.seconds}
        run.log(phase, s.steps, **numbers, **times)  # before the file that makes the level done
        state = {"model": networks.state(r), "mask": networks.masks(r), "numbers": numbers}
        run.save(f"{phase}.pt", state)
        if not s.quiet:
            with progress.external_write_mode():
                runs.say(level_line(study, run, numbers | times))


def level_line(study: Study, run: Run, x: dict[str, Any]) -> str:
    """What is printed as a level ends."""
    first = run.load(level_file(0))["numbers"]["test_accuracy"]
    learned = first > common.chance_accuracy(study.data)
    ratio = f"{x['test_accuracy'] / first:.1%} of level 0" if learned else "level 0 is at chance"
    left, accuracy = f"{x['weights_remaining']:.2%} of weights", f"{x['test_accuracy']:.4f}"
    where = f"replicate {run.replicate}, level {x['level']}"
    return f"{where}: {left}, test accuracy {accuracy} ({ratio}), {x['seconds']:.1f} s"


def project(study: Study, run: Run, levels: int) -> list[float]:
    """Figure 9: w_tr under the mask of every level, its error ||softmax - onehot|| on every
    training example into projected_error.npy (levels, N); returns its test accuracies."""
    data, networks, errors, accuracies = study.data, study.networks(1), [], []
    start = run.load("pretrained.pt")
    for level in range(levels):
        networks.load(0, start["model"], run.load(level_file(level))["mask"])
        train = networks, data, data.train_images, data.train_labels
        errors.append(engine.evaluate(*train)[2][0].cpu().numpy())
        accuracies.append(engine.accuracy_and_loss(networks, data)[0][0])
    runs.write_array(run.folder / "projected_error.npy", np.stack(errors))
    return accuracies


# ---- a search ------------------------------------------------------------------------------------


def finished(s: Settings, result: dict | None) -> bool:
    """Whether a result.json has what the settings ask for."""
    if not result or result["ended"]:
        return bool(result)
    levels = result["levels"]
    known = not s.projected or all("projected_test_accuracy" in x for x in levels)
    return len(levels) > s.levels and known


def conclude(study: Study, run: Run) -> None:
    """result.json from the files of the levels and the times in the log."""
    count = next(k for k in itertools.count() if not run.has(level_file(k)))
    log = run.folder / "log.csv"
    rows = runs.unless_damaged(lambda: runs.read_rows(log)) if log.exists() else None
    times = {x["phase"]: x for x in rows or ()}
    levels = []
    for k in range(count):
        numbers, row = run.load(level_file(k))["numbers"], times.get(f"level{k:02d}", {})
        kept = {x: float(row[x]) for x in ("seconds", "steps_per_second") if row.get(x)}
        levels.append(numbers | kept)
    if study.settings.projected and count:
        for numbers, accuracy in zip(levels, project(study, run, count), strict=True):
            numbers["projected_test_accuracy"] = accuracy
    about = {"pretrain": common.about_start(run), "chance": common.chance_accuracy(study.data)}
    run.finish({**about, "levels": levels, "ended": run.ended})


def table(results: list[dict]) -> str:
    """Level, weights remaining, test accuracy (mean and deviation over replicates), of level 0."""
    lines = ["level  weights remaining  test accuracy      of level 0  seconds"]
    for levels in zip(*(r["levels"] for r in results), strict=False):
        accuracy, left = ([x[k] for x in levels] for k in ("test_accuracy", "weights_remaining"))
        first = [r["levels"][0]["test_accuracy"] for r in results]
        learned = all(a > r["chance"] for a, r in zip(first, results, strict=True))
        ratio = np.mean([a / b for a, b in zip(accuracy, first, strict=True)]) if learned else 0
        cells = f"{ratio:10.1%}" if learned else f"{'chance':>10}"
        seconds = np.mean([x.get("seconds", math.nan) for x in levels])
        lines.append(
            f"{levels[0]['level']:5}  {np.mean(left):17.2%}  {options.mean_std(accuracy):17}  "
            f"{cells}  {seconds:7.1f}"
        )
    return "\n".join(lines)


def name_of(s: Settings, control: str = "") -> str:
    origin = f"init-{s.init.stem}" if s.init else options.subset_name(s)
    masked = f"mask-{s.mask.stem}" if s.mask else ""
    return options.run_name(s, origin, f"rewind{s.rewind}", masked, control)


def ticket_folder(study: Study, run: Run) -> Path:
    """The run that a control is compared with."""
    return study.folder("imp", name_of(study.settings)) / f"rep{run.replicate}"


def start_control(study: Study, run: Run) -> None:
    """pretrained.pt of a control, and its level 0 where that is the run's own."""
    s, ticket = study.settings, ticket_folder(study, run)
    if s.control == "reinit":
        model = study.initial_state_dict(REINIT + run.replicate)
        return common.adopt(run, study.start_from(model, 0))
    common.adopt(run, runs.read_tensors(ticket / "pretrained.pt"))
    dense = runs.read_tensors(ticket / "level00.pt")
    run.log("level00", s.steps, **dense["numbers"])
    run.save("level00.pt", dense)


def search_levels(study: Study, starts: dict[int, dict], control: str) -> list[dict]:
    """Every level of the run that the settings name, or of a control; returns the results."""
    study = study.replace(control=control)
    s, first = study.settings, 0 if control == "reinit" else study.settings.rewind
    keys = ("subset", "label_noise", "rewind", "pretrain_lr", "prune_fraction", "control")
    settings = study.describe(*keys) | {"init": None, "mask": None}
    if s.mask:
        settings["mask"] = runs.fingerprint(read_mask(study, study.networks(1)))
    each = {r: {"init": start["fingerprint"]} for r, start in starts.items()}
    with study.runs("imp", name_of(s, control), settings, s.replicate, each=each) as group:
        todo = [run for run in group if not finished(s, run.result)]
        pretrained = bool(starts or control)
        steps = s.rewind * (not pretrained) + (s.levels + 1) * (s.steps - first)
        with runs.progress_bar(len(todo) * steps, s.quiet) as progress:
            for run in todo:
                if control:
                    start_control(study, run)
                elif starts:
                    common.adopt(run, starts[run.replicate])
            if not pretrained:
                common.pretrain(study, s.rewind, todo, progress)
            for level in range(s.levels + 1):
                phase = f"level{level:02d}"
                lacking = [
                    run for run in todo if not run.ended and run.load(level_file(level)) is None
                ]
                runs.skip(progress, (len(todo) - len(lacking)) * (s.steps - first))
                for part in engine.side_by_side(lacking, phase):
                    train_level(study, first, part, level, progress)
        for run in todo:
            conclude(study, run)
        results = [run.result for run in group]
        complete = [r for r in results if not r["ended"] or len(r["levels"]) > s.levels]
        if complete and not s.quiet:
            runs.say(table(complete))
        options.report(s, group, [run for run in group if run.result not in complete])
    return results


# ---- verifying -----------------------------------------------------------------------------------


def settings_of_run(folder: Path) -> dict[str, Any]:
    """The settings that measuring a finished run again needs, from its config.json."""
    found = sorted([*folder.glob("config.json"), *folder.glob("rep*/config.json")])
    if not found:
        raise UserError(f"--verify {folder}: no config.json there or in rep<k> below it")
    settings = runs.read_json(found[0], "settings")["settings"]
    keys = ("depth", "width", "batch_size", "steps", "rewind", "precision", "seed")
    known = {k: settings[k] for k in keys if settings.get(k) is not None}
    named = settings["dataset"] in options.PRESETS
    known |= {"subset": "all"}  # nothing is trained on it
    return known | ({"dataset": settings["dataset"]} if named else {})


def verify(study: Study) -> list[dict]:
    """Measures the saved levels of finished runs again; returns, for each, recorded and measured
    accuracies. UserError, after all were measured, where one is missing or damaged, or differs by
    more than an example in a thousand."""
    folder, rows, wrong = study.settings.verify, [], []
    for config in sorted([*folder.glob("config.json"), *folder.glob("rep*/config.json")]):
        settings = runs.read_json(config, "settings")["settings"]
        if settings["data"] != study.data.fingerprint:
            raise UserError(f"{config.parent} was made from other data than {study.data.name}")
        try:
            result = read_levels(config.parent)
        except UserError as e:
            result, wrong = [], [*wrong, str(e)]
        names = {path.name for path in config.parent.glob("level*.pt")}
        for name in sorted(names | {level_file(k) for k in range(len(result))}):
            path = config.parent / name
            try:
                row, problem = measure(study, path, result)
                line = f"{path}: {describe_measured(row)}{problem}"
            except UserError as e:
                row, problem = {"file": str(path)}, str(e)
                line = problem
            rows.append(row)
            wrong += [line] * bool(problem)
            if not study.settings.quiet:
                runs.say(line)
    if not rows:
        raise UserError(f"--verify {folder}: no level was saved there")
    if wrong:
        remedy = "to make one again, remove it and result.json and repeat the run's command"
        problem = "are missing or damaged, or differ from what was recorded"
        raise UserError(f"{len(wrong)} of {len(rows)} levels {problem} ({wrong[0]}): {remedy}")
    return rows


def read_levels(folder: Path) -> list[dict]:
    """The numbers of each level in result.json; none of a run in progress."""
    path = folder / "result.json"
    return runs.read_json(path, "levels")["levels"] if path.exists() else []


def measure(study: Study, path: Path, result: list[dict]) -> tuple[dict[str, Any], str]:
    """Recorded and measured accuracy of a levelNN.pt, and in what it differs from its own record,
    from its name or from the levels of result.json; UserError where it cannot be read."""
    networks = study.networks(1)
    network = common.optional("inputs").network_of(study, path, str(path))
    networks.load(0, network.state, network.masks)
    recorded = network.about["numbers"]
    accuracy = engine.accuracy_and_loss(networks, study.data)[0][0]
    left = networks.mask[0].double().mean().item()
    row = {"file": str(path), "recorded": recorded["test_accuracy"], "measured": accuracy}
    row |= {"weights_remaining": left}
    same = abs(accuracy - recorded["test_accuracy"]) <= 1e-3 + 1e-9
    problem = "" if same and left == recorded["weights_remaining"] else ", DIFFERS"
    if path.name != level_file(recorded["level"]):
        problem = f", is level {recorded['level']}, renamed"
    elif recorded["level"] < len(result):
        told = result[recorded["level"]]
        if any(told.get(k) != v for k, v in recorded.items()):
            problem = f", result.json has {told['test_accuracy']:.4f}, DIFFERS"
    return row, problem


def describe_measured(row: dict[str, Any]) -> str:
    shown = f"recorded {row['recorded']:.4f}, measured {row['measured']:.4f}"
    return f"{row['weights_remaining']:.2%} of weights, {shown}"


# ---- the command ---------------------------------------------------------------------------------


def plan(s: Settings) -> list[options.Planned]:
    """The runs of the command; reads no data."""
    if s.init and s.rewind is None:
        s = dataclasses.replace(s, rewind=common.optional("inputs").step_of(s.init, s.replicate[0]))
    first = 0 if s.control == "reinit" else s.rewind
    pretrained = bool(s.control or s.init)
    steps = s.rewind * (not pretrained) + (s.levels + 1) * (s.steps - first)
    folder = options.run_folder(s, "imp", name_of(s, s.control))
    done = functools.partial(finished, s)
    return options.planned(folder, s.replicate, steps, s.levels + 2, done)


def main(s: Settings, handed_in: options.HandedIn = options.NOTHING) -> list[dict] | None:
    """Searches, prints the table and the paths; returns the results, one a replicate; None after
    --dry-run."""
    study = common.prepare(s, __file__, handed_in)
    if not study.model.about["prunable"]:
        raise UserError(f"{study.model.name} has no prunable weight: {study.about['model']}")
    if s.verify:
        return verify(study)
    if s.control == "reinit":
        own, other = (study.initial_state_dict(k + s.replicate[0]) for k in (0, REINIT))
        if runs.fingerprint(own) == runs.fingerprint(other):
            raise UserError(f"--control reinit: {study.model.name} always has the same weights")
    starts = {}
    if s.init:
        starts = common.optional("inputs").read_starts(
            study, "--init", s.init, s.replicate, s.rewind, s.mask
        )
        study = study.replace(rewind=starts[s.replicate[0]]["step"])
    s, folder = study.settings, study.folder("imp", name_of(study.settings, s.control))
    levels = f"rewind {s.rewind}, {s.levels} levels, replicates {len(s.replicate)}"
    if not common.announce(study, levels, str(folder)):
        return None
    study = common.rank(study)
    if s.control:
        search_levels(study.replace(fresh=False), starts, "")
    return search_levels(study, starts, s.control)


search = options.as_function(
    main, flags, 'search(dataset="digits", subset="easy", levels=3, replicate=range(4))'
)

if __name__ == "__main__":
    runs.run_stage(main, flags())
