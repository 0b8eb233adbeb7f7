"""Runs of the stages that are disturbed, damaged or go wrong. Mechanisms are tested in
test_runs.py; here, that the stages keep what these promise, and the short form of torture.py."""

import itertools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, contents
from torture import first_difference, pictures, state_of

import common
import engine
import imp
import runs
from runs import UserError

SMALL = ("--width", 4, "--batch-size", 32, "--steps", 16, "--milestones", 12)
IMP = ("imp", "--subset", "random", "--size", 32, "--rewind", 4, "--levels", 2, *SMALL)
RUNS = {
    "imp": (*IMP, "--replicate", "0-1"),
    "lmc": ("lmc", *IMP[1:7], "--children", 2, "--replicate", "0-1", *SMALL),
    "warmup": ("warmup", *IMP[1:5], "--warmup", 4, "--sharpness-every", 0, *SMALL),
    "el2n": ("el2n", "--networks", 2, "--score-step", 4, *SMALL),
}


# ---- kills, signals, full disks, crowds ----------------------------------------------------------


@pytest.fixture(scope="module")
def tortured():
    """The lines of `torture.py --short`, by part."""
    words = [sys.executable, "tests/torture.py", "--short", "--cases", "imp,el2n"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    lines = re.split(r"^(?=\w+: )", done.stdout, flags=re.M)
    return {line.split(":")[0]: line for line in lines if ":" in line}


@pytest.mark.parametrize("part", ["kills", "signals", "disk", "crowd", "long"])
def test_a_disturbed_run_ends_as_an_undisturbed_one(tortured, part):
    assert part in tortured and "FAILED" not in tortured[part], tortured
    if "not allowed" in tortured[part]:
        pytest.skip(tortured[part])


# ---- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Finished runs of the stages, to be copied and damaged, and what they hold."""
    out = tmp_path_factory.mktemp("done")
    for flags in RUNS.values():
        call(flags, out)
    return out, state_of(out)


DATA = []  # flags of a data set small enough that most of a run is what is tested here


@pytest.fixture(scope="module", autouse=True)
def small_data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    DATA[:] = "--dataset", pictures(place), "--data-dir", place


def call(flags, out):
    module = __import__(flags[0])
    words = (*DATA, "--out", out, "--quiet", "--device", "cpu")
    return module.main(module.flags().parse_args([str(f) for f in (*flags[1:], *words)]))


def assert_state(out, done, stage) -> None:
    """What is in `out` is what the finished runs of the stage hold."""
    after = state_of(out)
    expected = {k: v for k, v in done[1].items() if k.startswith(f"{stage}/")}
    assert after == expected, first_difference(expected, after)


def cut(path: Path, content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(path: Path, content: bytes) -> bytes:
    """A bit of each of 200 bytes: more than a .pt pads with bytes that nobody reads."""
    at = len(content) // 3
    flipped = bytes(byte ^ 4 for byte in content[at : at + 200])
    return content[:at] + flipped + content[at + 200 :]


def empty(path: Path, content: bytes) -> bytes:
    return b""


def instead(name: str):
    """The file `name` beside it, or of another run, is copied over it."""

    def swap(path: Path, content: bytes) -> bytes:
        return (path.parent / name).read_bytes()

    return swap


REBUILT = {
    "imp/*/*/rep0/result.json": ("imp", "../rep1/result.json", "config.json"),
    "imp/*/*/rep0/pretrained.pt": ("imp", "../rep1/pretrained.pt", "level00.pt"),
    "imp/*/*/rep0/level00.pt": ("imp", "../rep1/level00.pt", "level02.pt"),
    "imp/*/*/rep0/level01.pt": ("imp", "../rep1/level01.pt", "level02.pt"),
    "imp/*/*/rep0/level02.pt": ("imp", "../rep1/level02.pt", "level01.pt"),
    "lmc/*/*/rep1/result.json": ("lmc", "../rep0/result.json", "config.json"),
    "lmc/*/*/rep1/pretrained.pt": ("lmc", "../rep0/pretrained.pt", "child0.pt"),
    "lmc/*/*/rep1/child0.pt": ("lmc", "../rep0/child0.pt", "child1.pt"),
    "lmc/*/*/rep1/loss_barrier.npy": ("lmc", "../rep0/loss_barrier.npy", "result.json"),
    "lmc/*/*/scores.npy": ("lmc", "rep0/loss_barrier.npy", "scores.json"),
    "lmc/*/*/scores.json": ("lmc", "rep0/result.json", "scores.npy"),
    "warmup/*/*/rep0/result.json": ("warmup", "config.json", "warm.pt"),
    "warmup/*/*/rep0/warm.pt": ("warmup", "result.json", "config.json"),
    "el2n/*/*/result.json": ("el2n", "scores.json", "config.json"),
}
DAMAGES = [  # that every kind is noticed in every kind of file, test_mistakes.py has by fuzzing
    (pattern, stage, damage)
    for (pattern, (stage, *others)), kind in zip(
        REBUILT.items(), itertools.cycle((cut, flip, empty)), strict=False
    )
    for damage in (kind, *map(instead, others))
]


@pytest.mark.parametrize(("pattern", "stage", "damage"), DAMAGES)
def test_damage_is_noticed_and_mended(done, tmp_path, capsys, pattern, stage, damage):
    copied = tmp_path / "results"
    shutil.copytree(done[0] / stage, copied / stage)
    [path] = copied.glob(pattern)
    path.write_bytes(damage(path, path.read_bytes()))
    if path.suffix == ".pt":  # else the result is there and nothing needs the file
        path.with_name("result.json").unlink()
    call(RUNS[stage], copied)
    if path.suffix != ".npy" and "scores" not in path.name:
        line = f"{path.name} .*: ignoring it; the file will be regenerated"
        assert re.search(line, capsys.readouterr().err)
    assert_state(copied, done, stage)


@pytest.mark.parametrize(
    ("stage", "damage"), [*zip(RUNS, (cut, flip, empty, instead("result.json")), strict=True)]
)
def test_a_damaged_config_is_refused_by_name_and_nothing_touched(done, tmp_path, stage, damage):
    copied = shutil.copytree(done[0] / stage, tmp_path / stage)
    for path in copied.rglob("config.json"):
        path.write_bytes(damage(path, path.read_bytes()))
    before = contents(copied)
    with pytest.raises(UserError, match=r"config\.json .*: --fresh starts the run over"):
        call(RUNS[stage], tmp_path)
    assert contents(copied) == before


@pytest.mark.parametrize("damage", [cut, "swapped", "both"])
def test_checkpoints_are_of_their_run_and_step(done, tmp_path, monkeypatch, capsys, damage):
    """A run stopped in level 1, then one or both of its checkpoints damaged or another run's."""
    out = tmp_path / "results"
    with monkeypatch.context() as m:  # 4 steps before, 12 a level; a checkpoint after every 2
        m.setattr(engine, "train", stop_at(4 + 12 + 6, 2))
        with pytest.raises(runs.Interrupted):
            call((*RUNS["imp"], "--checkpoint-every", 0), out)
    runs.signals.number = 0
    rep0, rep1 = sorted(out.glob("imp/*/*/rep?"))
    assert (rep0 / "checkpoint.pt").exists() and (rep0 / "checkpoint-before.pt").exists()
    names = ("checkpoint.pt", "checkpoint-before.pt") if damage == "both" else ("checkpoint.pt",)
    for name in names:
        if damage in ("swapped", "both"):
            shutil.copy(rep1 / "checkpoint.pt", rep0 / name)
        else:
            (rep0 / name).write_bytes(damage(rep0 / name, (rep0 / name).read_bytes()))
    call(RUNS["imp"], out)
    assert "the file will be regenerated" in capsys.readouterr().err
    assert_state(out, done, "imp")


def stop_at(limit: int, every: int):
    """`engine.train`, reporting at every `every` steps and signalled once `limit` are taken."""
    train, taken = engine.train, [0]

    def stopping(t, start):
        at, t.at = t.at, frozenset(range(t.start, t.stop, every)) | t.at
        for step in train(t, start):
            taken[0] += every
            runs.signals.number = 15 * (taken[0] >= limit)
            yield step
        t.at = at

    return stopping


# ---- numbers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "step", "noted"), [(math.nan, 3, 4), (math.inf, 11, 12), (-math.inf, 3, 4)]
)
def test_a_row_that_goes_wrong_stops_alone(tmp_path, bad, step, noted):
    """A gradient of row 0 spoiled in one step, also in the last, after which no loss is taken."""

    def spoil(networks, row, now, indices, logits):
        if now.item() == step and networks.rows == 2 and row == 0:
            networks.gradient[0, 7] = bad

    words = [*map(str, (*IMP[1:], *DATA)), "--out", str(tmp_path), "--quiet", "--device", "cpu"]
    study = common.prepare(imp.flags().parse_args(words), "imp.py")
    rows = []
    for replicates in ((0, 1), (1,)):
        networks = study.networks(len(replicates))
        for row, replicate in enumerate(replicates):
            networks.load(row, study.initial_state_dict(replicate))
        streams = [study.stream(replicate) for replicate in replicates]
        training = study.training(networks, streams, 0, 12, lambda step: 0.1)
        training.watch = spoil
        run = runs.Run(tmp_path / str(len(rows)), 0, {}, {}, {}, {})
        with run.held:
            engine.fit(training, [run], "level00", runs.progress_bar(0, quiet=True))
        rows.append(networks)
    assert rows[0].diverged.tolist() == [noted, -1]
    beside, alone = rows[0].get(slice(1, 2)), rows[1].get(slice(0, 1))
    assert beside.keys() == alone.keys()
    assert all(torch.equal(beside[k], alone[k]) for k in beside)
