"""What a run reads back, damaged, swapped, of another version or held by another; a row that goes
wrong; and the short form of torture.py."""

import csv
import errno
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_common import tiny_training
from torture import first_difference, pictures, state_of

import common
import imp
import runs
from runs import UserError

ROOT = common.HERE
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
def torture():
    """The lines of `torture.py --short`, by part."""
    words = [sys.executable, "tests/torture.py", "--short", "--cases", "imp,el2n"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    lines = re.split(r"^(?=\w+: )", done.stdout, flags=re.M)
    return {line.split(":")[0]: line for line in lines if ":" in line}


@pytest.mark.parametrize("part", ["kills", "signals", "disk", "crowd", "long"])
def test_a_disturbed_run_ends_as_an_undisturbed_one(torture, part):
    assert part in torture and "FAILED" not in torture[part], torture
    if "not allowed" in torture[part]:
        pytest.skip(torture[part])


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
    DATA[:] = "--dataset", pictures(place), "--preset", "digits", "--data-dir", place


def call(flags, out):
    module = __import__(flags[0])
    words = (*DATA, "--out", out, "--quiet", "--device", "cpu")
    return module.main(module.flags().parse_args([str(f) for f in (*flags[1:], *words)]))


@pytest.fixture
def copied(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "results")
    return tmp_path / "results"


def cut(path: Path, content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(path: Path, content: bytes) -> bytes:
    place = len(content) // 3
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


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
def test_damage_is_noticed_and_made_good(done, tmp_path, capsys, pattern, stage, damage):
    copied = tmp_path / "results"
    shutil.copytree(done[0] / stage, copied / stage)
    [path] = copied.glob(pattern)
    path.write_bytes(damage(path, path.read_bytes()))
    if path.suffix == ".pt":  # else the result is there and nothing needs the file
        path.with_name("result.json").unlink()
    call(RUNS[stage], copied)
    if path.suffix != ".npy" and "scores" not in path.name:
        assert re.search(f"{path.name} .*: ignored; it will be made again", capsys.readouterr().err)
    after = state_of(copied)
    expected = {k: v for k, v in done[1].items() if k.startswith(f"{stage}/")}
    assert after == expected, first_difference(expected, after)


@pytest.mark.parametrize(
    ("stage", "damage"), [*zip(RUNS, (cut, flip, empty, instead("result.json")), strict=True)]
)
def test_a_damaged_config_is_refused_by_name_and_nothing_touched(copied, stage, damage):
    for path in copied.glob(f"{stage}/*/*/**/config.json"):
        path.write_bytes(damage(path, path.read_bytes()))
    before = {p: p.read_bytes() for p in copied.rglob("*.*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(UserError, match=r"config\.json .*: --fresh starts the run over"):
        call(RUNS[stage], copied)
    assert all(p.read_bytes() == content for p, content in before.items())


def test_the_config_of_another_replicate_is_refused(copied):
    [path] = copied.glob("imp/*/*/rep0/config.json")
    path.write_bytes((path.parent.parent / "rep1/config.json").read_bytes())
    with pytest.raises(UserError, match="other settings \\(replicate 1, now 0\\)"):
        call(RUNS["imp"], copied)


@pytest.mark.parametrize("killed_after", [1, 3])
def test_a_fresh_start_that_is_killed_mixes_nothing(copied, monkeypatch, killed_after):
    """--fresh with another rate, stopped between two of the files it removes."""
    unlink, count = Path.unlink, itertools.count(1)

    def dying(path, missing_ok=False):
        if path.suffix in (".pt", ".json", ".csv") and next(count) > killed_after:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    flags = (*IMP, "--lr", 0.05)
    undisturbed = call(flags, copied / "undisturbed")
    [folder] = copied.glob("imp/*/*/")
    other = folder.with_name("random32-rewind4-steps16-drops12-batch32-lr0.05")
    shutil.copytree(folder, other)  # as if made with the settings of today's name
    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            call((*flags, "--fresh"), copied)
    with pytest.raises(UserError, match=r"other settings \(lr 0.1, now 0.05\)"):
        call(flags, copied)
    [result] = call((*flags, "--fresh"), copied)
    assert [x["train_loss"] for x in result["levels"]] == [
        x["train_loss"] for x in undisturbed[0]["levels"]
    ]


@pytest.mark.parametrize("damage", [cut, "swapped", "both"])
def test_checkpoints_are_of_their_run_and_step(done, tmp_path, monkeypatch, capsys, damage):
    """A run stopped in level 1, then one or both of its checkpoints damaged or another run's."""
    out = tmp_path / "results"
    with monkeypatch.context() as m:  # 4 steps before, 12 a level; a checkpoint after every 2
        m.setattr(common, "train", stop_at(4 + 12 + 6, 2))
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
    assert "ignored; it will be made again" in capsys.readouterr().err
    after = state_of(out)
    expected = {k: v for k, v in done[1].items() if k.startswith("imp/")}
    assert after == expected, first_difference(expected, after)


def stop_at(limit: int, every: int):
    """`common.train`, reporting at every `every` steps and signalled once `limit` are taken."""
    train, taken = common.train, [0]

    def stopping(t, start):
        at, t.at = t.at, frozenset(range(t.start, t.stop, every)) | t.at
        for step in train(t, start):
            taken[0] += every
            runs.signals.number = 15 * (taken[0] >= limit)
            yield step
        t.at = at

    return stopping


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """EL2N scores where imp.py looks for them, and others of another seed."""
    out = tmp_path_factory.mktemp("scored")
    flags = ("--width", 2, "--batch-size", 16)
    call(("el2n", *flags), out)
    call(("el2n", *flags, "--seed", 1), out)
    return out


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("scores.npy", cut), ("scores.npy", flip), ("scores.npy", instead("config.json"))),
        *(("scores.json", empty), ("scores.json", instead("config.json")), ("both", "both")),
    ],
)
def test_damaged_scores_are_refused_by_name(scored, tmp_path, name, damage):
    out = tmp_path / "results"
    shutil.copytree(scored, out)
    first, second = sorted(out.glob("el2n/*/*"))
    if damage == "both":  # a pair that fits together, of another run
        match = r"scores\.npy: those of other settings"
        for n in ("scores.npy", "scores.json"):
            shutil.copy(second / n, first / n)
    else:
        match = rf"--scores .*{re.escape(name)}.*el2n\.py --fresh|scores\.npy.*el2n\.py --fresh"
        (first / name).write_bytes(damage(first / name, (first / name).read_bytes()))
    with pytest.raises(UserError, match=match):
        call(("imp", "--width", 2, "--batch-size", 16, "--size", 64, "--levels", 0), out)
    assert not (out / "imp").exists()


def test_a_cache_of_other_images_is_not_taken(tmp_path, image_folder, capsys):
    """Two folders whose arrays have the same shapes; the cache of one copied over the other's."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    a, b = image_folder(tmp_path / "a/pictures"), image_folder(tmp_path / "b/pictures")
    (b / "train/cat/0.png").write_bytes((b / "train/dog/0.png").read_bytes())
    data, cpu = tmp_path / "data", torch.device("cpu")
    first = common.load_data(str(a), data, cpu, quiet=True)
    [cache] = data.glob("*.npz")
    content = cache.read_bytes()
    other = common.load_data(str(b), data, cpu, quiet=True)
    assert other.fingerprint != first.fingerprint
    for path in data.glob("*.npz"):
        path.write_bytes(content)
    assert common.load_data(str(b), data, cpu, quiet=True).fingerprint == other.fingerprint
    assert "is of other images: decoding again" in capsys.readouterr().err


def test_digits_that_are_not_the_projects_are_refused(tmp_path):
    with np.load(ROOT / "data/digits.npz") as f:
        images, labels = f["images"], f["labels"].copy()
    labels[3] ^= 1
    np.savez(tmp_path / "digits.npz", images=images, labels=labels)
    with pytest.raises(UserError, match=r"digits\.npz is not the project's"):
        common.load_data("digits", tmp_path, torch.device("cpu"))


# ---- what is never executed or written elsewhere -------------------------------------------------


@pytest.mark.parametrize("form", ["unpacked", "archive"])
@pytest.mark.parametrize(
    ("name", "folder", "archive"),
    [
        ("cifar10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python", "cifar-100-python.tar.gz"),
    ],
)
def test_pickles_of_cifar_are_checked_before_they_are_opened(
    tmp_path, monkeypatch, form, name, folder, archive
):
    """Hostile files under the names that torchvision unpickles, in a folder or in an archive that
    also holds a name outside the folder."""
    import pickle
    import urllib.request

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    def refuse(*a, **k):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    data, planted = tmp_path / "data", tmp_path / "planted" / folder
    planted.mkdir(parents=True)
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]
    for n in (*names, "train", "test", "meta"):
        (planted / n).write_bytes(pickle.dumps(Hostile()))
    data.mkdir()
    if form == "unpacked":
        shutil.copytree(planted, data / folder)
    else:
        with tarfile.open(data / archive, "w:gz") as tar:
            tar.add(planted, folder)
            tar.add(planted / "train", "../escaped")
    with pytest.raises(UserError, match=f"cannot get {name} .*put {archive}"):
        common.load_data(name, data, torch.device("cpu"), quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == {"data", "planted"}


# ---- locks ---------------------------------------------------------------------------------------


def test_the_second_process_hears_who_holds_a_folder(tmp_path):
    with (
        runs.lock(tmp_path / ".lock"),
        pytest.raises(
            UserError,
            match=rf"{tmp_path} is in use by process {os.getpid()} on \S+ since 20\d\d-\d\d-\d\d ",
        ),
        runs.lock(tmp_path / ".lock"),
    ):
        pass


@pytest.mark.parametrize("left", [b"process 1 on another-host since 2020-01-01", b"\xff\x00", b""])
def test_a_lock_that_a_crash_left_is_taken_over(tmp_path, left):
    (tmp_path / ".lock").write_bytes(left)
    with runs.lock(tmp_path / ".lock"):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_file_systems_without_locks_are_named_and_used(tmp_path, monkeypatch, capsys):
    def none(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with runs.lock(tmp_path / ".lock"):
        pass
    assert "no locks (No locks available); only one process may" in capsys.readouterr().err


def test_a_folder_to_read_from_needs_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *a: False)
    with runs.lock(tmp_path / ".cifar10.lock", wait=True):
        assert not list(tmp_path.iterdir())


# ---- signals, memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_step_saves_a_checkpoint_with_the_alarm_off(tmp_path, monkeypatch, number):
    checkpoint, augment, seen, timers = runs.Run.checkpoint, common.augment, itertools.count(), []

    def augment_and_signal(*args, **kwargs):
        if next(seen) == 9:
            for _ in range(2):  # as Slurm does, and the script around a run
                os.kill(os.getpid(), number)
            timers.append(signal.getitimer(signal.ITIMER_REAL)[0])
        return augment(*args, **kwargs)

    def save(run, *args):
        timers.append(signal.getitimer(signal.ITIMER_REAL)[0])
        checkpoint(run, *args)

    monkeypatch.setattr(common, "augment", augment_and_signal)
    monkeypatch.setattr(runs.Run, "checkpoint", save)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    words = [*map(str, IMP[1:]), "--out", str(tmp_path), "--quiet", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["imp.py", *words])
    with pytest.raises(SystemExit) as e:
        runs.run_stage(imp.main, imp.flags())
    assert e.value.code == 128 + number
    assert 0 < timers[0] <= runs.Signals.PATIENCE and timers[1:] == [0]
    [path] = tmp_path.rglob("checkpoint.pt")
    assert (runs.read_tensors(path)["phase"], runs.read_tensors(path)["step"]) == ("level00", 10)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before


@pytest.mark.parametrize(
    ("error", "called"),
    [
        (MemoryError("x"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("expected a contiguous memory format"), False),
    ],
)
def test_only_a_lack_of_memory_is_called_one(monkeypatch, capsys, error, called):
    def fail(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["imp.py"])
    with pytest.raises(SystemExit if called else RuntimeError):
        runs.run_stage(fail, imp.flags())
    assert capsys.readouterr().err.startswith("imp.py: error: not enough memory" * called)


# ---- numbers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "step", "noted"), [(math.nan, 3, 4), (math.inf, 11, 12), (-math.inf, 3, 4)]
)
def test_a_row_that_goes_wrong_stops_alone(tmp_path, bad, step, noted):
    """A gradient of row 0 spoiled in one step, also in the last, after which no loss is taken."""

    def spoil(networks, row, now, indices, logits):
        if now.item() == step and networks.rows == 2 and row == 0:
            networks.gradient[0, 7] = bad

    rows = []
    for replicates in ((0, 1), (1,)):
        t = tiny_training(replicates, stop=12, watch=spoil)
        run = runs.Run(tmp_path / str(len(rows)), 0, {"replicate": 0}, {})
        common.fit(t, [run], "level00", runs.progress_bar(0, quiet=True))
        run.held.close()
        rows.append(t.networks)
    assert rows[0].diverged.tolist() == [noted, -1]
    for field in ("weights", "momentum", "batchnorm"):
        assert torch.equal(getattr(rows[0], field)[1], getattr(rows[1], field)[0])


@pytest.mark.parametrize("flags", [("--rewind", 1), ("--rewind", 3)])
def test_no_accuracy_of_a_pretraining_that_diverges(tmp_path, flags, monkeypatch):
    """result.json has no number of it."""
    fit = common.fit

    def fit_and_spoil(t, group, phase, *more):
        if phase == "pretrain":
            t.networks.weights[0, 0] = math.nan
        fit(t, group, phase, *more)

    monkeypatch.setattr(common, "fit", fit_and_spoil)
    with pytest.raises(UserError, match="pre-training diverged at step 0"):
        call((*IMP[:5], *flags, "--levels", 1, *SMALL), tmp_path)
    [path] = tmp_path.rglob("result.json")
    result = runs.read_json(path)
    assert result["pretrain"]["test_accuracy"] is None and result["levels"] == []


# ---- formats, the log ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number", "age"),
    [
        *(("config.json", 1, "an older"), ("result.json", 3, "a newer")),
        *(("level01.pt", 3, "a newer"), ("pretrained.pt", 1, "an older")),
    ],
)
def test_files_of_another_format_are_refused_and_left(copied, monkeypatch, name, number, age):
    [folder] = copied.glob("imp/*/*/rep0")
    path, kind = folder / name, "json" if name.endswith("json") else "tensors"
    value = getattr(runs, f"read_{kind}")(path)
    value.pop("format", None)
    with monkeypatch.context() as m:
        m.setattr(runs, "FORMAT", number)
        getattr(runs, f"write_{kind}")(path, value)
    if kind == "tensors":
        (folder / "result.json").unlink()
    content = path.read_bytes()
    match = rf"{re.escape(name)} was written by {age} version .*\(format {number}, this reads 2\)"
    with pytest.raises(runs.FormatError, match=match):
        call(RUNS["imp"], copied)
    assert path.read_bytes() == content


def test_a_folder_of_the_first_format_is_refused_in_one_line(copied):
    """There the number was called "version"."""
    [path] = copied.glob("imp/*/*/rep0/config.json")
    value = {"version": 1, "settings": {"dataset": "digits"}, "environments": []}
    path.write_text(json.dumps(value | {"sha256": runs.fingerprint(value)}))
    match = r"config\.json was written by an older version of these scripts \(format 1, .*\)[^\n]*$"
    with pytest.raises(runs.FormatError, match=match):
        call(RUNS["imp"], copied)


def test_going_on_with_other_instructions_is_said(copied, monkeypatch, capsys):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX")  # without effect in a process that runs
    call(RUNS["imp"], copied)
    err = capsys.readouterr().err
    lines = [x for x in err.splitlines() if "what is left may differ in bits" in x]
    assert len(lines) == 2, err  # a line each run
    assert all(re.search(r"device .* SSE41, now .* AVX;", x) for x in lines)


def test_results_say_where_they_were_made(copied, monkeypatch):
    """Also where a run is gone on with elsewhere: then both."""
    here = common.environment
    monkeypatch.setattr(common, "environment", lambda args: here(args) | {"torch": "99.0"})
    results = call((*IMP[:-8], "--levels", 3, *SMALL), copied)
    first, second = results[0]["config"]["environments"]
    assert first["torch"] == torch.__version__ and second["torch"] == "99.0"
    assert {"commit", "python", "numpy", "device", "threads", "engine", "csrc"} <= first.keys()


def test_the_log_does_not_grow_with_restarts(copied):
    [log] = copied.glob("imp/*/*/rep0/log.csv")
    lines = log.read_text().splitlines()
    for _ in range(3):
        for name in ("level01.pt", "level02.pt", "result.json"):
            (log.parent / name).unlink()
        call(RUNS["imp"], copied)
    again = list(csv.DictReader(log.open()))
    assert len(again) == len(lines) - 1 == 3
    value = json.loads((log.parent / "result.json").read_text())
    assert [float(r["test_accuracy"]) for r in again] == [
        x["test_accuracy"] for x in value["levels"]
    ]


@pytest.mark.parametrize(
    "content", [b"phase", b"phase,step\nlevel00,x\n", b"\xff\xfe\n1", b'a,b\n"' + b"x" * 200_000]
)
def test_figures_name_a_damaged_log_and_go_on(copied, capsys, content):
    import figures

    [folder] = copied.glob("imp/*/*/rep0")
    (folder / "result.json").unlink()
    (folder / "log.csv").write_bytes(content + b"\nlevel01,3\n")
    assert [r.folder.name for r in figures.read_runs(copied) if r.place[0] == "imp"] == ["rep1"]
    assert "skipped: " in capsys.readouterr().err
