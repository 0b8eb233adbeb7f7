"""The commands of grid.txt: which runs there are, what is finished, what they cost.

run_all.sh calls this and documents the flags. --list prints commands; --cost a table of jobs, runs,
network-steps, hours and gigabytes; --plan what run_all.sh runs, a line a command: wave, done or
todo, folder below --out, number of the command that makes its scores or -, command. Only --cost and
--plan import the stages, whose settings know folders and steps.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import importlib
import itertools
import json
import math
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
STAGES = ("el2n", "pretrain", "imp", "lmc", "warmup")
PAPER = ("cifar10", "cifar100", "cinic10")  # run by default
DRAW = 4  # the wave of figures.py, the last
IMAGES = {  # channels, classes, training examples
    "digits": (1, 10, 1437),
    "cifar10": (3, 10, 50_000),
    "cifar100": (3, 100, 50_000),
    "cinic10": (3, 10, 180_000),
}

Flags = dict[str, str | None]  # {"--size": "3200", "--balance": None}


class GridError(Exception):
    """A user's mistake, in one line."""


@dataclasses.dataclass
class Command:
    wave: int
    figures: set[str]
    stage: str
    flags: Flags

    @property
    def words(self) -> list[str]:
        return [name if value is None else f"{name}={value}" for name, value in self.flags.items()]

    @property
    def key(self) -> tuple:
        """Equal for commands that are one run."""
        return self.stage, frozenset(self.flags.items() - {("--projected", None)})

    def makes_scores_for(self, other: "Command") -> bool:
        """Whether these are the EL2N scores that `other` uses unless --scores names some."""
        if self.stage != "el2n" or {"--metric", "--networks", "--score-step"} & {*self.flags}:
            return False
        ranks = other.flags.get("--subset") in ("easy", "hard") or other.stage == "pretrain"
        if not ranks or "--scores" in other.flags:  # pretrain tracks the accuracy on easy examples
            return False
        alike = (self.flags["--dataset"] == other.flags["--dataset"], noise(self) == noise(other))
        return all(alike)


def noise(command: Command) -> float:
    return float(command.flags.get("--label-noise") or 0)


# ---- the grid ------------------------------------------------------------------------------------


def read_flags(words: Iterable[str]) -> Flags:
    """ValueError for a word that is no flag, and for a flag that is given twice."""
    parts = [word.partition("=") for word in words if word]
    found = {name: value if equal else None for name, equal, value in parts}
    if len(found) < len(parts) or not all(name.startswith("--") for name in found):
        raise ValueError
    return found


def alternatives(word: str) -> list[str]:
    """--size=256|512 -> --size=256, --size=512; |--balance -> nothing, --balance."""
    name, equal, value = word.partition("=")
    if equal and "|" not in name:
        return [f"{name}={v}" for v in value.split("|")]
    return word.split("|")


def read_grid(path: Path) -> list[tuple[str, Command]]:
    """(data set, command) line by line, the alternatives of a line expanded."""
    found: list[tuple[str, Command]] = []
    additions: list[tuple[list[str], list[str], Flags, int]] = []
    applied = set()
    if not path.is_file():
        raise GridError(f"--grid {path}: no such file")
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise GridError(f"--grid {path}: cannot be read ({e})") from e
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if words[0] == "+":
                _, stages, datasets, *flags = words
                if not {*stages.split("|")} <= {*STAGES, "*"}:
                    raise ValueError
                given = stages.split("|"), datasets.split("|"), read_flags(flags), number
                additions.append(given)
                continue
            wave, figures, *rest = words
            if int(wave) not in range(1, DRAW):
                raise GridError(f"{path}, line {number}: wave {wave} is not 1, 2 or 3")
            for stage, dataset, *flags in itertools.product(*map(alternatives, rest)):
                if stage not in STAGES:
                    raise ValueError
                own = read_flags(flags)
                added: Flags = {}
                for stages, datasets, more, its_number in additions:
                    if {stage, "*"} & {*stages} and {dataset, "*"} & {*datasets}:
                        added |= more
                        applied.add(its_number)
                if taken := sorted({"--out", "--data-dir"} & {*own, *added}):
                    problem = f"{taken[0]} is a flag of run_all.sh"
                    raise GridError(f"{path}, line {number}: {problem}, for all runs")
                added = {name: value for name, value in added.items() if name not in own}
                command = {"--dataset": dataset} | own | added
                found.append((dataset, Command(int(wave), {*figures.split(",")}, stage, command)))
        except ValueError as e:
            form = "`wave figures stage data-set flags` or `+ stages data-sets flags`"
            raise GridError(f"{path}, line {number}: not {form}, a flag as --name=value") from e
    if unused := [number for *_, number in additions if number not in applied]:
        raise GridError(f"{path}, line {unused[0]}: adds to no command below it")
    return found


def of_folder(command: Command, folder: str, preset: str) -> Command:
    """A command about the data set `preset`, with a folder of images or an .npz instead."""
    flags = {"--dataset": folder, "--preset": preset} | command.flags | {"--dataset": folder}
    if scores := flags.get("--scores"):
        flags["--scores"] = scores.replace(f"/{preset}-", f"/{Path(folder).resolve().stem}-")
    return dataclasses.replace(command, flags=flags)


def choose_data(
    grid: list[tuple[str, Command]], datasets: Iterable[str], preset: str | None
) -> Iterator[Command]:
    known = {dataset for dataset, _ in grid}
    if preset and known >= {*datasets}:
        raise GridError("--preset goes with --dataset and a folder of images or an .npz")
    preset = preset or "cifar10"
    names = ", ".join([*filter(known.__contains__, IMAGES), *sorted(known - {*IMAGES, "quick"})])
    for dataset in datasets:
        own, npz = Path(dataset), dataset.lower().endswith(".npz")
        if dataset not in known and not (own.is_dir() or (npz and own.is_file())):
            raise GridError(f"--dataset {dataset}: neither {names} nor a folder or an .npz")
        if dataset not in known and preset not in known:
            raise GridError(f"--preset {preset}: not one of {names}")
        for of, command in grid:
            if of == dataset:
                yield command
            elif of == preset and dataset not in known:
                yield of_folder(command, dataset, preset)


def merge(commands: Iterable[Command]) -> list[Command]:
    """Each run once, for all the figures that need it, --projected if any of them asks for it."""
    found: dict[tuple, Command] = {}
    for c in commands:
        first = found.setdefault(c.key, c)
        flags = c.flags if "--projected" in c.flags else first.flags
        figures = first.figures | c.figures
        found[c.key] = Command(min(first.wave, c.wave), figures, c.stage, flags)
    return list(found.values())


def choose_figures(commands: list[Command], only: list[str], where: str) -> list[Command]:
    """The commands of some figures and those that make the scores of these."""
    for figure in only:
        if not any(figure in c.figures for c in commands):
            raise GridError(f"no run is for {figure}{where}")
    wanted = [c for c in commands if c.figures & {*only}]
    return [c for c in commands if c in wanted or any(c.makes_scores_for(x) for x in wanted)]


def spread(command: Command) -> Iterator[Command]:
    """A command for each replicate; LMC scores are a mean over replicates, which stay together."""
    flags = command.flags
    parts = re.findall(r"(?:^|,)(\d+)(?:-(\d+))?(?=,|$)", flags.get("--replicate") or "")
    numbers = [k for first, last in parts for k in range(int(first), int(last or first) + 1)]
    together = command.stage == "lmc" and flags.get("--subset") == "all"
    if len(numbers) < 2 or together:  # the stage refuses what is no list
        yield command
        return
    for k in numbers:
        yield dataclasses.replace(command, flags=flags | {"--replicate": str(k)})


def commands_of(args: argparse.Namespace) -> list[Command]:
    grid = read_grid(args.grid)
    if args.quick and (args.dataset or args.preset):
        raise GridError("--quick is of the digits: leave out --dataset and --preset")
    datasets = ["quick"] if args.quick else args.dataset
    if not datasets:
        own = args.grid.resolve() != HERE / "grid.txt"
        datasets = list(dict.fromkeys(d for d, _ in grid)) if own else PAPER
    commands = merge(choose_data(grid, datasets, args.preset))
    if not commands:
        raise GridError(f"--grid {args.grid}: holds no run")
    if args.only:
        where = f" of {' '.join(args.dataset)}" if args.dataset else ""
        commands = choose_figures(commands, args.only.split(","), where)
    if args.spread:
        commands = [single for command in commands for single in spread(command)]
    for c in commands:
        if scores := c.flags.get("--scores"):
            c.flags["--scores"] = re.sub(r"^RESULTS(?=/)", lambda _: args.out, scores)
        c.flags |= {"--out": args.out, "--data-dir": args.data_dir}
        c.flags |= {"--device": args.device} if args.device else {}
    commands.sort(key=lambda c: c.wave)
    return [c for c in commands if args.wave in (None, c.wave)]


def shell(args: argparse.Namespace, script: str, words: Iterable[str]) -> str:
    """A command that the shell and Python's shlex read alike."""
    return shlex.join([args.python, f"{args.beside}{script}.py", *words])


def drawing(args: argparse.Namespace) -> str:
    """The command that draws the figures."""
    names = ["digits"] if args.quick else args.dataset
    words = [*filter(None, args.only.split(",")), *(f"--dataset={name}" for name in names)]
    return shell(args, "figures", [*words, f"--out={args.out}"])


# ---- plans and costs -----------------------------------------------------------------------------


class Job(NamedTuple):
    """What a stage says about a command."""

    folders: list[Path]  # below --out: imp/cifar10-resnet20/easy3200-rewind200/rep0
    steps: int  # network-steps
    done: bool
    networks: int  # that stay on disk
    settings: Any

    @property
    def folder(self) -> str:
        """imp/cifar10-resnet20/easy3200-rewind200/rep0-3"""
        first = self.folders[0]
        if not re.fullmatch(r"rep\d+", first.name):
            return str(first)
        numbers = [int(f.name[3:]) for f in self.folders if f.parent == first.parent]
        row = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
        name = f"{numbers[0]}-{numbers[-1]}" if row else ",".join(map(str, numbers))
        return f"{first.parent}/rep{name}"

    @property
    def scores(self) -> set[Path]:
        """Where it leaves scores."""
        folders = (f.parent if f.name.startswith("rep") else f for f in self.folders)
        return {folder / "scores.npy" for folder in folders}


@functools.cache
def parser_of(stage: str) -> Any:
    return importlib.import_module(stage).flags()


def plan(command: Command) -> Job:
    """Imports the stage."""
    stage = importlib.import_module(command.stage)
    from runs import UserError

    try:
        settings = parser_of(command.stage).parse_args(command.words)
        folders, steps, done, networks = zip(*stage.plan(settings), strict=True)
    except UserError as e:
        raise GridError(f"{shlex.join([command.stage, *command.words])}: {e}") from e
    below = [Path(folder).relative_to(settings.out) for folder in folders]
    return Job(below, sum(steps), all(done), sum(networks), settings)


@functools.cache
def fingerprint_of(dataset: str, data_dir: Path, resize: int) -> str:
    """Of a data set of one's own; reads it."""
    import torch

    import common
    from options import Settings
    from runs import UserError

    given = {"dataset": dataset, "data_dir": data_dir, "resize": resize}
    try:
        return common.load_data(Settings.complete(given), torch.device("cpu")).fingerprint
    except UserError as e:
        raise GridError(str(e)) from e


def is_done(command: Command, job: Job, out: Path) -> bool:
    """Whether runs are finished and, of data of one's own, were made from these. Of others a stage
    that is started refuses the folder."""
    s = job.settings
    if not job.done or command.flags["--dataset"] in IMAGES:
        return job.done
    try:
        configs = [json.loads((out / f / "config.json").read_text()) for f in job.folders]
        known = {config["settings"]["data"] for config in configs}
    except (OSError, ValueError, LookupError):
        return False
    return known == {fingerprint_of(s.dataset, s.data_dir, s.resize)}


def print_plan(args: argparse.Namespace, commands: list[Command]) -> None:
    jobs = [plan(c) for c in commands]
    maker = {Path(args.out, path): i for i, job in enumerate(jobs) for path in job.scores}
    el2n = [i for i, c in enumerate(commands) if c.stage == "el2n"]
    for c, job in zip(commands, jobs, strict=True):
        by = c.flags.get("--scores")
        makers = [i for i in el2n if commands[i].makes_scores_for(c)]
        need = maker.get(Path(by), "-") if by else next(iter(makers), "-")
        if need != "-" and commands[need].wave >= c.wave:
            text = shlex.join([c.stage, *c.words])
            raise GridError(f"not in a later wave than what makes its scores: {text}")
        line = shell(args, c.stage, c.words)
        state = "done" if is_done(c, job, Path(args.out)) else "todo"
        print(c.wave, state, job.folder, need, line, sep="\t")
    if args.wave in (None, DRAW):
        print(DRAW, "todo", "figures", "-", drawing(args), sep="\t")


def bytes_of_network(depth: int, width: int, channels: int, classes: int) -> int:
    """Of a ResNet and its mask: float32 weights and BatchNorm statistics, a byte a mask's entry."""
    blocks, prunable, norms = (depth - 2) // 6, 9 * channels * width, [width]
    before = width
    for w in (width, 2 * width, 4 * width):
        prunable += 9 * w * before + 9 * w * w * (2 * blocks - 1)
        norms += [w] * 2 * blocks
        if w != before:
            prunable += before * w
            norms.append(w)
        before = w
    prunable += 4 * width * classes
    return 5 * prunable + 4 * classes + 16 * sum(norms) + 8 * len(norms)


def size_of(command: Command, job: Job) -> float:
    """Bytes of the networks that a command leaves; NaN for models other than our ResNet."""
    name = command.flags.get("--preset") or command.flags["--dataset"]
    channels, classes, examples = IMAGES.get(name, IMAGES["cifar10"])
    depth, width = job.settings.depth, job.settings.width
    if depth is None or width is None:
        return math.nan
    errors = 4 * examples if "--projected" in command.flags else 0
    return job.networks * (bytes_of_network(depth, width, channels, classes) + errors)


def numbers_of(folder: Path) -> tuple[int, list[dict]]:
    """(batch size, numbers of each level) of an imp run, finished or in progress."""
    settings = json.loads((folder / "config.json").read_text())["settings"]
    result = folder / "result.json"
    if result.exists():
        return settings["batch_size"], json.loads(result.read_text())["levels"]
    with open(folder / "log.csv", newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["phase"].startswith("level")]
    return settings["batch_size"], rows


def rates(out: Path) -> dict[str, float]:
    """Images per second of each model, the median over the levels of imp."""
    by_model = defaultdict(list)
    for folder in sorted(out.glob("imp/*/*/rep*")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not a run, or damaged
            batch, levels = numbers_of(folder)
            found = [batch * float(x["steps_per_second"]) for x in levels]
            by_model[folder.parent.parent.name] += found
    return {model: median(values) for model, values in by_model.items()}


def cost(commands: list[Command], out: Path, rate: float | None) -> str:
    """A table by stage and model; hours by the measured images per second of the model, else by
    `rate`, the steps per second of ResNet-20 on 128 images."""
    measured = rates(out)
    rows: dict[str, list[float]] = {}
    for command in commands:
        job = plan(command)
        stage, model = job.folders[0].parts[:2]
        speed = measured.get(model, math.nan)
        depth = job.settings.depth
        if math.isnan(speed) and rate and depth and not model.startswith("digits"):
            speed = 128 * rate * 18 / (depth - 2)
        hours = job.steps * job.settings.batch_size / speed / 3600
        row = (1, len(job.folders), job.steps, hours, size_of(command, job) / 1e9)
        for name in (f"{stage}/{model}", "all"):
            rows[name] = [a + b for a, b in zip(rows.get(name, [0.0] * 5), row, strict=True)]
    total = rows.pop("all", [0.0] * 5)
    form = "{:<30} {:>6} {:>6} {:>16} {:>10} {:>8}".format
    lines = [form("stage/model", "jobs", "runs", "network-steps", "hours", "GB")]
    for name, (*counts, hours, size) in [*rows.items(), ("all", total)]:
        last = ["-" if math.isnan(x) else f"{x:.1f}" for x in (hours, size)]
        lines.append(form(name, *map(int, counts), *last))
    if math.isnan(total[3]):
        lines.append("hours: no measured rate for some of these; run one, or give --rate")
    return "\n".join(lines)


# ---- command line --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise GridError(message)


def flags() -> Parser:
    parser = Parser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    for mode in ("list", "cost", "plan"):
        add(f"--{mode}", dest="mode", action="store_const", const=mode, default="list")
    add("--grid", type=Path, default=HERE / "grid.txt")
    add("--only", default="")
    add("--dataset", action="append", default=[])
    add("--preset")
    add("--quick", action="store_true")
    add("--spread", action="store_true")
    add("--wave", type=int, choices=range(1, DRAW + 1))
    add("--out", default="results")
    add("--data-dir", default="data")
    add("--device")
    add("--rate", type=float)
    add("--python", default=sys.executable, help="of the commands")
    add("--beside", default="", help="before the names of scripts: '' or a folder with its slash")
    return parser


def main(words: list[str]) -> None:
    args = flags().parse_args(words)
    if args.rate is not None and not 0 < args.rate < math.inf:
        raise GridError(f"--rate {args.rate:g}: not a number above 0")
    commands = commands_of(args)
    if args.mode == "plan":
        print_plan(args, commands)
    elif args.mode == "cost":
        print(cost(commands, Path(args.out), args.rate))
    else:
        for command in commands:
            print(shell(args, command.stage, command.words))
        if args.wave in (None, DRAW):
            print(drawing(args))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except GridError as e:
        print(f"run_all.sh: error: {e}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `run_all.sh --list | head`
        sys.exit(0)
