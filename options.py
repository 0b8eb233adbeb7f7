"""Settings: presets, typed flags, and what a run was made from.

A stage's settings are one frozen dataclass. Its fields, their types, defaults and help are the
command line, the keywords of the stage as a function, and what config.json holds. Where a field has
no default of its own, the preset of the data set gives it, so that a `Settings` is always complete.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch

import runs
from engine import StepSettings, are_compiled
from runs import REMEDIES, UserError, one_line

HERE = Path(__file__).resolve().parent
VERSION = "3.0"

# ---- presets -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Preset:
    """The settings of one data set, each of them a flag. Table 1 of the paper, but for K and the
    step of EL2N (Appendix A) and the levels (Figure 2); `digits`, `width`, `pad` and `flip` are
    ours."""

    depth: int
    batch_size: int
    steps: int
    milestones: tuple[int, ...]
    pretrain_lr: float
    rewind: int  # the step at which easy examples suffice: half of the paper's t*
    size: int  # of the subset in Figure 2
    levels: int
    subset: str = "easy"
    networks: int = 10  # K of Definition 2.1
    score_step: int = 7800
    lr: float = 0.1
    width: int = 16
    momentum: float = 0.9
    weight_decay: float = 1e-4
    pad: int = 4
    flip: bool = True


PRESETS = {
    "digits": Preset(8, 64, 600, (300, 450), 0.1, 20, 256, 8, score_step=120, pad=1, flip=False),
    "cifar10": Preset(20, 128, 62400, (31200, 46800), 0.4, 200, 3200, 20),
    "cifar100": Preset(32, 128, 62400, (31200, 46800), 0.4, 400, 2048, 20),
    "cinic10": Preset(56, 256, 31250, (15625, 23440), 0.1, 400, 51200, 12, score_step=8000),
}

# ---- kinds of values -----------------------------------------------------------------------------


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable:
    """An argparse type: a finite number in [low, high] (or (low, high])."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high or (low == value and not open_low)) or value == math.inf:
            above = "above" if open_low else "at least"
            limit = f" and at most {high:g}" if high < math.inf else ""
            name = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {above} {low:g}{limit}")
        return value

    return parse


positive, count = number(int, 1, 10**9), number(int, 0, 10**9)
rate, fraction = number(float, 0, 1e6, open_low=True), number(float, 0, 1)


def numbers(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers and ranges, ascending: "0-3", "0,2", "31200,46800"."""
    values = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            span = range(int(first), int(last if dash else first) + 1)
            if not 0 < len(span) <= 1000:
                raise ValueError
            values += span
    except ValueError:
        values = []
    if not values or sorted(set(values)) != values:
        raise argparse.ArgumentTypeError(f"{text!r} is not an ascending list like 0-3 or 0,2")
    return tuple(values)


def path(text: str) -> Path:
    """An argparse type: a path, in which ~ is the home directory, also after `=`."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text).expanduser()


class FromPreset:
    """Stands for "as the preset of the data set says" in signatures and in --help."""

    def __repr__(self) -> str:
        return "preset"


PRESET = FromPreset()


def option(help: str, default: Any = PRESET, parse: Callable | None = None, **more: Any) -> Any:
    """A field of settings: its flag's help is a sentence, `parse` reads the flag's text (None for a
    switch); `group` is its heading in --help, `choices`, `names` and `nargs` are argparse's."""
    metadata = {"help": help, "default": default, "parse": parse, **more}
    if default is PRESET:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


DATA, TRAINING, RUN = ({"group": x} for x in ("data and model", "training", "run"))
SUBSET, SCORES = ({"group": x} for x in ("subset to pre-train on", "scores"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all stages share. Built by `complete` from what the user gave."""

    presets: ClassVar[dict[str, Preset]] = PRESETS

    dataset: str = option(
        "digits, cifar10, cifar100, cinic10, a folder with train/CLASS and test/CLASS, or an .npz",
        "digits",
        os.path.expanduser,
        **DATA,
    )
    preset: str = option(
        "whose settings to take; a folder's by the size of its images", parse=str, **DATA
    )
    data_dir: Path = option("where data are kept", Path("data"), path, **DATA)
    resize: int = option(
        "side in pixels that a folder's images are resized to; 0: none",
        0,
        number(int, 0, 4096),
        **DATA,
    )
    model: str = option(
        "a network of one's own, as FILE.py:FUNCTION, called with channels and classes; "
        "without it the ResNet",
        "",
        str,
        **DATA,
    )
    depth: int | None = option("layers of the ResNet, 6n+2", parse=number(int, 1, 1202), **DATA)
    width: int | None = option(
        "channels of the ResNet's first group", parse=number(int, 1, 1024), **DATA
    )
    steps: int = option(
        "SGD steps of a training, pre-training included", parse=positive, **TRAINING
    )
    batch_size: int = option("examples in a step", parse=positive, **TRAINING)
    lr: float = option("learning rate", parse=rate, **TRAINING)
    milestones: tuple[int, ...] = option(
        "steps at which the rate drops tenfold; the preset's at their share of --steps",
        parse=numbers,
        **TRAINING,
    )
    momentum: float = option("SGD momentum", parse=fraction, **TRAINING)
    weight_decay: float = option(
        "weight decay of all parameters", parse=number(float, 0, 1e6), **TRAINING
    )
    pad: int = option(
        "border in pixels that random crops may reach into", parse=number(int, 0, 1024), **TRAINING
    )
    flip: bool = option("flip images horizontally at random", **TRAINING)
    seed: int = option("root of every random number", 0, number(int, 0, 2**32 - 1), **RUN)
    out: Path = option("where results are written", Path("results"), path, **RUN)
    name: str = option("a tag: gives a variant a folder of its own", "", str, **RUN)
    device: str = option("cpu, cuda, cuda:1; auto: a GPU if there is one", "auto", str, **RUN)
    engine: str = option(
        "eager, or one CUDA graph a step; auto: graph on a GPU",
        "auto",
        str,
        choices=("auto", "eager", "graph"),
        **RUN,
    )
    precision: str = option(
        "of training; auto: bf16 on a GPU, fp32 on a CPU",
        "auto",
        str,
        choices=("auto", "fp32", "bf16"),
        **RUN,
    )
    fast: bool = option(
        "on a GPU: TF32 and the fastest convolutions; trades bitwise reproducibility for speed",
        False,
        **RUN,
    )
    checkpoint_every: float = option("seconds between checkpoints", 60.0, number(float, 0), **RUN)
    fresh: bool = option("start the run's folder over", False, **RUN)
    allow_edited: bool = option(
        "continue a run that other code began; the change is recorded", False, **RUN
    )
    dry_run: bool = option("print what would be run, and stop", False, **RUN)
    quiet: bool = option("print nothing but errors and warnings", False, **RUN)

    @property
    def usual(self) -> Preset:
        """The preset that this run's settings are compared with."""
        return self.presets[self.preset]

    @classmethod
    def complete(cls, given: dict[str, Any]) -> Self:
        """Settings from what was given by name; UserError where that contradicts itself."""
        given = {k: v for k, v in given.items() if v is not None}
        values = {f.name: f.metadata["default"] for f in dataclasses.fields(cls)} | given
        preset = given.get("preset") or preset_of(values["dataset"], values["resize"])
        if preset not in cls.presets:
            raise UserError(f"--preset {preset}: not one of {', '.join(cls.presets)}")
        values |= {"preset": preset}
        usual = cls.presets[preset]
        values = {k: getattr(usual, k) if v is PRESET else v for k, v in values.items()}
        if "milestones" not in given:
            values["milestones"] = scaled_milestones(usual, values["steps"])
        cls.check(given, values)
        return cls(**values)

    @classmethod
    def check(cls, given: dict[str, Any], values: dict[str, Any]) -> None:
        """Fills in `values` what depends on other values; UserError for a contradiction."""
        if values["model"]:
            for flag in ("depth", "width"):
                if flag in given:
                    raise UserError(f"--{flag} belongs to the ResNet: leave it out with --model")
                values[flag] = None
        elif (values["depth"] - 2) % 6 or values["depth"] < 8:
            depth = values["depth"]
            raise UserError(f"--depth {depth}: a ResNet has 8, 14, 20, ... (6n+2) layers")
        if values["name"] and not all(c.isalnum() or c in "-_.+" for c in values["name"]):
            raise UserError(f"--name {values['name']}: letters, digits and -_.+ only")

    @property
    def step(self) -> StepSettings:
        """What a training step needs; of settings whose device is known."""
        shared = ("batch_size", "momentum", "weight_decay", "pad", "flip", "checkpoint_every")
        return StepSettings(
            **{k: getattr(self, k) for k in shared},
            graph=self.engine == "graph",
            bf16=self.precision == "bf16",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring(Settings):
    """How EL2N scores (Definition 2.1) are made."""

    label_noise: float = option(
        "fraction of labels resampled uniformly during pre-training and scoring",
        0.0,
        fraction,
        **SUBSET,
    )
    networks: int = option("K, the networks that scores are a mean over", parse=positive, **SCORES)
    score_step: int = option("steps before scoring", parse=positive, **SCORES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subset(Scoring):
    """The part of the training data that a phase sees (Section 3), for several replicates."""

    subset: str = option(
        "all, random (class-balanced), or the easy or hard end of the ranking",
        parse=str,
        choices=("all", "random", "easy", "hard"),
        **SUBSET,
    )
    size: int | None = option("examples in the subset", parse=positive, **SUBSET)
    offset: int = option("examples of the ranking to skip", 0, count, **SUBSET)
    balance: bool = option("take the easiest or hardest within each class", False, **SUBSET)
    scores: Path | None = option(
        "scores to rank by, an .npy; without it EL2N scores, made if missing", None, path, **SUBSET
    )
    indices: Path | None = option(
        "a subset of one's own: training examples in an .npy or a text file", None, path, **SUBSET
    )
    always_scored: ClassVar[bool] = False  # whether EL2N scores are used whatever the subset

    replicate: tuple[int, ...] = option(
        "replicates to train side by side, such as 0-3 or 0,2", (0,), numbers, **RUN
    )

    @classmethod
    def check(cls, given: dict[str, Any], values: dict[str, Any]) -> None:
        super().check(given, values)
        if values["indices"]:
            for flag in ("subset", "size", "offset", "balance", "scores"):
                if flag in given:
                    raise UserError(f"--indices is the subset: leave out --{flag}")
            values |= {"subset": "indices", "size": None}
        if values["subset"] == "all":
            if "size" in given:
                raise UserError("--size goes with --subset random, easy or hard")
            values["size"] = None
        if values["subset"] not in ("easy", "hard"):
            scored = () if cls.always_scored else ("scores", "networks", "score_step")
            if wrong := flags_of(given, ("offset", "balance", *scored)):
                raise UserError(f"{wrong[0]} goes with --subset easy or hard")
        if max(values["replicate"]) >= 1 << 16:
            raise UserError(f"--replicate {values['replicate'][-1]}: at most {(1 << 16) - 1}")

    def of_phase(self, steps: int) -> Self:
        """For a phase of this many steps: in one of none nothing is trained on a subset."""
        return self if steps else dataclasses.replace(self, **NO_SUBSET)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining(Subset):
    """Dense pre-training on the subset, to step t_r."""

    pretrain_lr: float = option("constant learning rate of pre-training", parse=rate, **SUBSET)


NO_SUBSET = {"subset": "all", "size": None, "offset": 0, "balance": False, "label_noise": 0.0}
NO_SUBSET |= {"scores": None, "indices": None}
OF_SUBSETS = (*NO_SUBSET, "pretrain_lr", "networks", "score_step")


def flags_of(given: dict[str, Any], names: Iterable[str]) -> list[str]:
    """The flags of those of these settings that were given a value."""
    return [f"--{k.replace('_', '-')}" for k in names if given.get(k)]


def refuse_subset(given: dict[str, Any], flag: str) -> None:
    """UserError where a flag brings its own w_tr, and a subset to pre-train on is given too."""
    if names := flags_of(given, OF_SUBSETS):
        raise UserError(f"--{flag} brings its own pre-training: leave out {names[0]}")


def drop_subset(given: dict[str, Any], values: dict[str, Any], why: str) -> None:
    """Takes the subset out of `values`, since no step is trained on it; a line says what was given
    for it."""
    if names := flags_of({k: v for k, v in given.items() if v != "all"}, OF_SUBSETS):
        runs.warn(f"{why}, for which {', '.join(names)} would be")
    values |= NO_SUBSET


def check_rewind(rewind: int, steps: int) -> None:
    if rewind >= steps:
        raise UserError(f"--rewind {rewind}: not before the end of training (--steps {steps})")


def scaled_milestones(usual: Preset, steps: int) -> tuple[int, ...]:
    """The preset's milestones at their share of `steps`."""
    return tuple(sorted({round(m * steps / usual.steps) for m in usual.milestones}))


def preset_of(dataset: str, resize: int) -> str:
    """Of a name in PRESETS its own; of other data cifar10's for 32x32 images, else digits'."""
    if dataset in PRESETS:
        return dataset
    return preset_by_size((resize, resize) if resize else optional("loading").peek_size(dataset))


def preset_by_size(size: tuple[int, int] | None) -> str:
    return "cifar10" if size == (32, 32) else "digits"


def optional(name: str) -> Any:
    """A module of the project that only some commands need, so that a stage runs without it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
        raise UserError(f"this needs {name}.py beside {Path(__file__).name}: copy it too") from e


# ---- the command line and the function call ------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError that suggests what was meant."""

    def __init__(self, description: str, **more: Any):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False, **more)
        self.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")

    def parse_args(self, words: list[str] | None = None, namespace: Any = None) -> Any:
        given, unknown = self.parse_known_args(words, namespace)
        if unknown:
            known = [f for a in self._actions for f in a.option_strings]
            flag = unknown[0].split("=")[0]
            raise UserError(f"unknown: {unknown[0]}{did_you_mean(flag, known)}")
        return given

    def error(self, message: str) -> None:
        raise UserError(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean X?)", or nothing where nothing is near."""
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


class SettingsParser(Parser):
    """The command line of a stage: `parse_args` gives its settings."""

    def __init__(self, kind: type[Settings], description: str):
        table = preset_table(kind.presets)
        super().__init__(description, epilog=table, argument_default=argparse.SUPPRESS)
        self.kind, self.usage = kind, "%(prog)s [--dataset DATA] [--flag VALUE ...]"
        groups: dict[str, Any] = {}
        for field in fields_of(kind):
            about = dict(field.metadata)
            heading = about.pop("group", "of this stage")
            if heading not in groups:
                groups[heading] = self.add_argument_group(heading)
            add_flag(groups[heading], field.name, about)

    def parse_args(self, words: list[str] | None = None, namespace: Any = None) -> Any:
        return self.kind.complete(vars(super().parse_args(words, namespace)))


def fields_of(kind: type) -> list[dataclasses.Field]:
    """The fields of settings, the stage's own first."""
    own: dict[str, dataclasses.Field] = {}
    named = {f.name: f for f in dataclasses.fields(kind)}
    for c in kind.__mro__:
        own |= {k: named[k] for k in inspect.get_annotations(c) if k in named and k not in own}
    return list(own.values())


def add_flag(group: Any, name: str, about: dict[str, Any]) -> None:
    default, parse = about.pop("default"), about.pop("parse")
    flags = about.pop("names", (f"--{name.replace('_', '-')}",))
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    shown = "" if shown in (None, "") or default is False else f" [{shown}]"
    about["help"] = (about["help"] + shown).replace("%", "%%")
    if parse is None:  # a switch; one that a preset may turn on has a --no- form
        about["action"] = argparse.BooleanOptionalAction if default is PRESET else "store_true"
        group.add_argument(*flags, dest=name, **about)
    else:
        about.setdefault("metavar", None if "choices" in about else flags[0][2:].upper())
        group.add_argument(*flags, dest=name, type=parse, **about)


def preset_table(presets: dict[str, Preset]) -> str:
    """What the presets give, for --help."""
    kind = type(next(iter(presets.values())))
    lines = ["presets, by data set (Table 1 of the paper; digits are ours):"]
    lines.append(f"  {'':16}" + "".join(f"{p:>14}" for p in presets))
    for name in (f.name for f in dataclasses.fields(kind)):
        values = (getattr(p, name) for p in presets.values())
        cells = (",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)
        lines.append(f"  {name.replace('_', '-'):16}" + "".join(f"{c:>14}" for c in cells))
    return "\n".join(lines)


class HandedIn(NamedTuple):
    """What a function call may hand in beside flags."""

    data: Any = None  # what `loading.as_arrays` gives
    model: Callable | None = None  # called with channels and classes
    on_log: Callable[[dict], None] | None = None  # called with each row of log.csv


NOTHING = HandedIn()


def as_function(main: Callable, flags: Callable[[], SettingsParser], example: str) -> Callable:
    """A stage as a function: its flags, with underscores, are keywords; a run directory identical
    to the command's. Raises UserError for a mistake and KeyboardInterrupt after a saved Ctrl-C."""
    parser = flags()
    code_identity.cache_clear()  # the stage may be one that a notebook has reloaded

    def call(**settings: Any) -> Any:
        model = settings.pop("model") if callable(settings.get("model")) else None
        data, on_log = settings.pop("data", None), settings.pop("on_log", None)
        if data is not None:
            data = optional("loading").as_arrays(data)
            settings = {"dataset": "data", **settings}
            if settings["dataset"] not in parser.kind.presets:
                settings = {"preset": preset_by_size(data[0].shape[1:3]), **settings}
        handed_in = HandedIn(data, model, on_log)
        with runs.signals:
            return main(parser.parse_args(as_words(parser, settings)), handed_in)

    fields = fields_of(parser.kind)
    lines = [example, "", *(f"{f.name}: {f.metadata['help']}" for f in fields)]
    lines += ["data: arrays or data sets, see loading.as_arrays; `dataset` is their name then"]
    lines += ["model: also a function of channels and classes that gives a module"]
    lines += ["on_log: called with each row of log.csv, and its replicate, as a dict"]
    call.__doc__ = "\n".join([(main.__doc__ or "").strip(), "", *lines])
    keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    shown = [keyword(f.name, default=f.metadata["default"], annotation=f.type) for f in fields]
    shown += [keyword(name, default=None) for name in ("data", "on_log")]
    call.__name__ = call.__qualname__ = example.split("(")[0]
    call.__module__ = main.__module__
    call.__signature__ = inspect.Signature(shown)
    return call


def as_words(parser: Parser, settings: dict[str, Any]) -> list[str]:
    """Keywords as the words of a command line, so that both are read by one parser."""
    flags = {a.dest: a for a in parser._actions if a.option_strings}
    words = []
    for name, value in settings.items():
        if name not in flags:
            raise UserError(f"{name} is no setting{did_you_mean(name, flags)}")
        names = flags[name].option_strings
        if isinstance(value, bool):
            off = [flag for flag in names if flag.startswith("--no-")]
            words += names[:1] if value else off
        elif value is not None and value is not PRESET:
            each = value if isinstance(value, list | tuple | range) else [value]
            if flags[name].type is path and not all(isinstance(v, str | Path) for v in each):
                what = f"{name}: expected the path of a file, not a {type(value).__name__}"
                raise UserError(f"{what}: save it (np.save, torch.save) and give the path")
            text = [*map(str, each)]
            words += [names[0], *text] if flags[name].nargs else [f"{names[0]}={','.join(text)}"]
    return words


# ---- identity: what a run was made from ----------------------------------------------------------

SHARED = ("common.py", "options.py", "engine.py")
OPERATIONS = ("formulas.h", "batch_norm.h", "ops.cpp", "batch_norm.cuh", "ops.cu")


def code_hash(*files: Path) -> str:
    """Of source files, without blank lines and lines of comment."""
    digest = hashlib.sha256()
    for file in files:
        comment = b"#" if file.suffix == ".py" else b"//"
        lines = file.read_bytes().splitlines() if file.exists() else []
        stripped = (line.rstrip() for line in lines)
        kept = (x for x in stripped if x and not x.lstrip().startswith(comment))
        digest.update(b"\n".join(kept) + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def code_identity(stage: Path | None) -> dict[str, str]:
    """Hashes of the code that makes a result, by role: the stage's file and the shared ones, each
    with what it imports from beside it."""
    files = {name: HERE / name for name in SHARED} | ({"stage": stage} if stage else {})
    hashes = {role: code_hash(path, *runs.imported(path)) for role, path in files.items()}
    if are_compiled():
        hashes["csrc"] = code_hash(*(HERE / "csrc" / name for name in OPERATIONS))
    return hashes


RELEASES = HERE / "data/releases.json"  # version -> {role or stage: hash}


def released() -> set[str]:
    """The hashes of every file of every release."""
    with contextlib.suppress(OSError, ValueError):
        return {h for files in json.loads(RELEASES.read_text()).values() for h in files.values()}
    return set()


def compare_origin(s: Settings, before: dict, now: dict) -> str | None:
    """Compares what a run was made from with what would continue it. Returns a line where they
    differ and may: both are releases, or --allow-edited; else raises UserError."""
    known = released()
    changes = runs.differences(
        {k: v for k, v in before.items() if k != "code"},
        {k: v for k, v in now.items() if k != "code"},
    )
    if changes:
        raise UserError(f"was made from something else ({changes}): {REMEDIES}")
    old, new = before["code"], now["code"]
    edited = [role for role in old | new if old.get(role) != new.get(role)]
    if {"csrc"} == {*edited} and len(old) != len(new):
        return None  # a machine without a compiler computes the same; environments tell of it
    by_hand = [x for x in edited if {old.get(x), new.get(x)} - {None} - known]
    if by_hand and not s.allow_edited:
        what = ", ".join("the stage" if x == "stage" else x for x in by_hand)
        remedy = "--allow-edited continues it and records the change"
        raise UserError(f"was begun by other code ({what} edited since): {REMEDIES}, {remedy}")
    return f"continued by {'edited code' if by_hand else 'another release'}: {', '.join(edited)}"


def find_device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU if there is one. UserError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs go to the current one
        torch.zeros(1, device=device).item()  # the device "meta" has no values
        return device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {one_line(e)}") from e


def environment(device: torch.device, step: StepSettings) -> dict:
    """What the bits of a result depend on, beside settings and origin."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cuda = device.type == "cuda"
    return {
        "version": VERSION,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "engine": "graph" if step.graph else "eager",
        "precision": "bf16" if step.bf16 else "fp32",
        "csrc": are_compiled(),
    }


def cpu_name() -> str:
    """The processor, and what its libraries are held to: kernels are chosen by these."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), model)
    limits = (os.environ.get(k, "") for k in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"))
    return " ".join([model, torch.backends.cpu.get_cpu_capability(), *filter(None, limits)])


# ---- the folder of a run -------------------------------------------------------------------------


def data_name(dataset: str) -> str:
    """Of a data set in folder names."""
    return dataset if dataset in PRESETS else Path(dataset).resolve().stem


def model_name(s: Settings) -> str:
    """Of the network in folder names: resnet20, resnet20x8 (another width), or the function's."""
    if s.model:
        return s.model.rpartition(":")[2].lower()
    wide = f"x{s.width}" if s.width != s.usual.width else ""
    return f"resnet{s.depth}{wide}"


def run_folder(s: Settings, stage: str, name: str, model: str = "") -> Path:
    """OUT/<stage>/<data>-<model>/<name>."""
    return s.out / stage / f"{data_name(s.dataset)}-{model or model_name(s)}" / name


COMPARED = ("depth", "width", "steps", "batch_size", "lr", "momentum", "weight_decay", "milestones")
COMPARED += ("pad", "flip", "seed", "precision", "fast", "name")  # of every stage, in config.json
SHORT = {"steps": "steps", "milestones": "drops", "batch_size": "batch", "lr": "lr"}
SHORT |= {"momentum": "momentum", "weight_decay": "decay", "pad": "pad", "flip": "flip"}
SHORT |= {"pretrain_lr": "prelr", "networks": "networks", "score_step": "step"}


def run_name(s: Settings, *parts: str, keys: Iterable[str] = SHORT) -> str:
    """A folder's name: what the run is about, then every setting that is not the preset's."""
    words = [p for p in parts if p]
    for key in keys:
        usual = getattr(s.usual, key)
        if key == "milestones":
            usual = scaled_milestones(s.usual, s.steps)
        value = getattr(s, key, usual)
        if value != usual:
            words.append(SHORT[key] + "+".join(f"{v:g}" for v in np.atleast_1d(value)))
    if s.resize:
        words.append(f"resize{s.resize}")
    if getattr(s, "label_noise", 0):
        words.append(f"noise{s.label_noise:g}")
    words += ["fast"] * s.fast + [f"seed{s.seed}"] * bool(s.seed)
    return "-".join(words + [s.name] * bool(s.name))


def subset_name(s: Subset) -> str:
    """easy3200, easy3200+1000 (an offset), hard512balanced, indices-mine, all."""
    if s.subset == "indices":
        return f"indices-{s.indices.stem}"
    if s.subset == "all":
        return "all"
    offset = f"+{s.offset}" if s.offset else ""
    name = f"{s.subset}{s.size}{offset}" + "balanced" * s.balance
    if s.subset == "random" or not s.scores:
        return name
    by = score_name(s.scores)
    return name if by == "el2n" else f"{name}-{by}"


SCORE_KEYS = ("batch_size", "lr", "momentum", "weight_decay", "pad", "flip")
SCORE_KEYS += ("networks", "score_step")


def scoring(s: Scoring) -> Scoring:
    """The settings under which a stage's EL2N scores are made: its own, but Table 1's where the
    stage as such departs from it, as warmup does."""
    table1 = vars(PRESETS[s.preset])
    values = {f.name: getattr(s, f.name) for f in dataclasses.fields(Scoring)}
    departs = {k: v for k, v in table1.items() if k in values and getattr(s.usual, k) != v}
    return Scoring(**{**values, **departs})


def el2n_name(s: Scoring) -> str:
    """The folder of EL2N scores; what they do not depend on is not in its name."""
    return run_name(s, "el2n", keys=SCORE_KEYS)


def score_name(path: Path) -> str:
    """el2n, forgetting, lmc800 (of children spawned at step 800); before they are made, the same
    from the folder that a stage will write them to."""
    stage, folder = path.absolute().parts[-4:-3], path.absolute().parent.name
    if path.with_suffix(".json").exists():
        about = runs.read_json(path.with_suffix(".json"), "metric")
        return f"{about['metric']}{about.get('rewind', '')}"
    if stage == ("lmc",) and (spawned := re.search(r"-rewind(\d+)", folder)):
        return f"lmc{spawned[1]}"
    return folder.split("-")[0] if stage == ("el2n",) else path.stem


def is_ranked(s: Settings) -> bool:
    """Whether the subset is an end of a ranking."""
    return getattr(s, "subset", "all") in ("easy", "hard")


def needs_el2n(s: Settings) -> bool:
    """Whether EL2N scores of the stage's settings are used."""
    ranked = is_ranked(s) or getattr(s, "always_scored", False)
    return ranked and not getattr(s, "scores", None)


class Planned(NamedTuple):
    """What one run of a command makes."""

    folder: Path
    steps: int  # network-steps
    done: bool
    networks: int  # kept on disk


def planned(
    folder: Path,
    replicates: Iterable[int],
    steps: int,
    networks: int,
    done: Callable[[dict | None], bool] = bool,
) -> list[Planned]:
    """The runs of each replicate; `done` judges result.json, or None."""
    folders = [folder / f"rep{k}" for k in replicates]
    return [Planned(f, steps, done(runs.finished_result(f)), networks) for f in folders]


def mean_std(values: list[float], digits: int = 4) -> str:
    """ "0.9132 ± 0.0021" (sample deviation), or the value alone."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def report(s: Settings, finished: list[runs.Run], short: list[runs.Run] | None = None) -> None:
    """Prints where the results are; UserError, now that all is done, for runs that ended early
    (`short`: before what was asked for)."""
    for run in finished if not s.quiet else ():
        runs.say(str(run.folder / "result.json"))
    short = finished if short is None else short
    ended = [(run.replicate, run.result["ended"]) for run in short if run.result["ended"]]
    if ended:
        raise UserError("; ".join(f"replicate {r}: {why}" for r, why in ended))


def record_release() -> None:
    """Adds the hashes of this version's files to releases.json, once a release."""
    stages = ("el2n", "pretrain", "imp", "lmc", "warmup")
    files = {f"{name}.py": code_hash(HERE / f"{name}.py") for name in stages}
    files |= {name: code_hash(HERE / name) for name in SHARED}
    files["csrc"] = code_hash(*(HERE / "csrc" / name for name in OPERATIONS))
    known = json.loads(RELEASES.read_text()) if RELEASES.exists() else {}
    RELEASES.write_text(json.dumps(known | {VERSION: files}, indent=1) + "\n")


if __name__ == "__main__":
    record_release()
