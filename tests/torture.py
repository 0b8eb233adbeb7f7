"""Does a run that was killed, starved of disk or crowded end in the numbers of one left alone?

    python tests/torture.py                      200 kills and all the rest, minutes on two cores
    python tests/torture.py --kills 2000         more of them
    python tests/torture.py --hours 8            kills until then
    python tests/torture.py --only disk,crowd    parts of it: kills, signals, disk, crowd, long
    python tests/torture.py --short              a few of each, in under a minute (in the tests)

Every stage runs on the embedded digits, with --short on 80 images, with networks of a few channels
and a checkpoint after every 16 steps at most. torch is imported once; each run is a fork of this
process, which is what makes hundreds of kills cheap. Kills come at random times, and at random file
operations: with half a file written, before and after its rename, before a file is removed. A run
is started again until it is done; then every result.json, score, mask, weight and barrier is
compared with those of a run that nobody disturbed, tensors and arrays by their bytes, tables
without the columns of seconds.
"""

import argparse
import contextlib
import csv
import errno
import functools
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process with threads cannot be forked
import torch
from conftest import ROOT

import engine
import runs

SMALL = ("--width", "4", "--batch-size", "32", "--steps", "40", "--milestones", "30")
CASES = {  # name -> stage and flags, short enough to be killed often
    "imp": "imp --subset random --size 64 --rewind 10 --levels 3 --replicate 0-1",
    "el2n": "el2n --networks 2 --score-step 40",
    "lmc": "lmc --subset random --size 64 --rewind 0,10 --children 2",
    "warmup": "warmup --subset random --size 64 --warmup 0,20 --sharpness-every 20 "
    "--sharpness-sample 32",
    "forgetting": "el2n --metric forgetting --networks 2",
    "pretrain": "pretrain --subset random --size 64 --rewind 30 --track gradient-norm,coherence "
    "--every 10",
}
SHORT = {"imp": "--rewind 4 --levels 1 --steps 12 --milestones 9", "el2n": "--score-step 16"}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
VARIES = {"seconds", "steps_per_second", "sha256", "environments", "run", "file"}


class Failed(Exception):
    """What a disturbed run got wrong."""


# ---- runs as forks -------------------------------------------------------------------------------


def start(words: list[str], log: Path, prepare: Callable[[], Any] = lambda: None) -> int:
    """A stage as its command line runs it, in a fork: its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.setpgid(0, 0)
        sys.argv = [f"{words[0]}.py", *words[1:]]
        module = __import__(words[0])
        prepare()
        runs.run_stage(module.main, module.flags())
        status = 0
    except SystemExit as e:
        status = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(pid: int, limit: float, log: Path) -> int:
    """Its exit status, -N for signal N; Failed if it hangs."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            text = log.read_text(errors="replace") if log.exists() else ""
            if "Traceback" in text or "Exception ignored" in text:
                raise Failed(f"a traceback:\n{text[-3000:]}")
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise Failed(f"still there after {limit:g} s:\n{log.read_text()[-2000:]}")


class Case:
    """A stage with its flags, and what it leaves when nobody disturbs it."""

    def __init__(self, name: str, place: Path, short: bool = False):
        self.name, self.place = name, place
        self.log = place / f"{name}.log"
        stage, *own = CASES[name].split()
        self.flags = [stage, *SMALL, *own, "--data-dir", str(ROOT / "data")]
        if short:
            shared = ("--dataset", str(pictures(place)), "--data-dir", str(place / "data"))
            self.flags += [*SHORT.get(name, "").split(), *shared]
        undisturbed, count = place / f"{name}-undisturbed", place / f"{name}.count"
        began = time.monotonic()
        self.run(undisturbed, lambda: crash(-1, count))
        self.seconds = time.monotonic() - began
        self.expected = state_of(undisturbed)
        sizes = [int(line) for line in count.read_text().splitlines()]
        self.operations, self.largest = len(sizes), max(sizes)
        final = sum(p.stat().st_size for p in undisturbed.rglob("*") if p.is_file())
        self.bytes = max(final, self.largest)  # without so much space it cannot end

    def words(self, out: Path, *more: str) -> list[str]:
        own = ("--out", str(out), "--device", "cpu", "--quiet")
        return [*self.flags, *own, "--checkpoint-every", "0", *more]

    def start(self, out: Path, prepare: Callable[[], Any] = lambda: None, *more: str) -> int:
        return start(self.words(out, *more), self.log, prepare)

    def run(self, out: Path, prepare: Callable[[], Any] = lambda: None, expect: str = "") -> bool:
        """Runs it to its end: True if it is done, False if it ended with one line that says
        `expect` and where; anything else is a failure."""
        status = wait(self.start(out, prepare), 120, self.log)
        text = self.log.read_text()
        if status == 2 and expect:
            one_line(text, expect, str(out))
        elif status:
            raise Failed(f"exit status {status}:\n{text[-2000:]}")
        return status == 0

    def compare(self, out: Path) -> None:
        """Failed if what is in `out` is not what an undisturbed run left."""
        state = state_of(out)
        for name in sorted(self.expected.keys() | state.keys()):
            a, b = self.expected.get(name), state.get(name)
            if a != b:
                how = "is missing" if b is None else "was left over" if a is None else "differs"
                raise Failed(f"{name} {how}{first_difference(a, b)}")


def plain(value: Any) -> Any:
    """A value of a file with tensors as fingerprints and without what equal runs do not share."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in VARIES}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return runs.fingerprint(value) if isinstance(value, torch.Tensor) else value


def state_of(out: Path) -> dict[str, Any]:
    """File -> content, of everything below a results folder but locks."""
    read = {
        ".pt": lambda p: plain(runs.read_tensors(p)),
        ".json": lambda p: plain(runs.read_json(p)),
        ".csv": lambda p: [plain(row) for row in csv.DictReader(p.read_text().splitlines())],
    }
    files = (p for p in out.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(out)): read.get(p.suffix, Path.read_bytes)(p) for p in files}


def first_difference(a: Any, b: Any) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        for k in a.keys() | b.keys():
            if a.get(k) != b.get(k):
                return f" at {k}" + first_difference(a.get(k), b.get(k))
    return f": {str(a)[:100]}, now {str(b)[:100]}"


# ---- what happens to them ------------------------------------------------------------------------


def crash(at: int, count: Path | None = None) -> None:
    """Kills this process at its file operation number `at`; the lines of `count` are the sizes of
    the files that operations write, 0 for others."""
    seen = itertools.count()

    def point(half: Any = None) -> None:
        if next(seen) == at:
            if half:
                half.flush()
                os.ftruncate(half.fileno(), os.fstat(half.fileno()).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if count:
            with open(count, "a") as f:
                f.write(f"{half.tell() if half else 0}\n")

    def write(path: Path, fill: Callable) -> None:
        def fill_and_die(f) -> None:
            fill(f)
            point(f)

        usual_write(path, fill_and_die)

    def append(path: Path, data: bytes) -> None:
        point()
        usual_append(path, data[: len(data) // 2])
        point()
        usual_append(path, data[len(data) // 2 :])

    def replace(*paths) -> None:
        point()
        usual_replace(*paths)
        point()

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            point()
        usual_unlink(path, missing_ok)

    usual_write, usual_append = runs.write, runs.append
    usual_replace, usual_unlink = os.replace, Path.unlink
    runs.write, runs.append, os.replace, Path.unlink = write, append, replace, unlink


def refuse(at: int, number: int) -> None:
    """Lets write number `at` of this process, and all later ones, fail after half of it."""
    seen, usual_write = itertools.count(), runs.write

    def write(path: Path, fill: Callable) -> None:
        def half(f) -> None:
            fill(f)
            if next(seen) >= at:
                os.ftruncate(f.fileno(), f.tell() // 2)
                raise OSError(number, os.strerror(number))

        usual_write(path, half)

    runs.write = write


def kills(cases: list[Case], draw: random.Random, count: int, until: float | None) -> str:
    """SIGKILL at random times and file operations; each run is started again until it is done."""
    began, killed, starts, finished = time.monotonic(), 0, 0, 0
    for case in itertools.cycle(cases):
        if (killed >= count) if until is None else (time.monotonic() > until):
            break
        out, history, status = case.place / f"{case.name}-killed", [], None
        left = draw.randint(1, 12)  # kills before it is left to finish
        while status != 0:
            when = case.seconds * draw.random() if left else None
            at = draw.randrange(max(1, int(case.operations * draw.random())))
            at_operation = left and draw.random() < 0.5
            history.append(f"operation {at}" if at_operation else f"{when} s")
            prepare = functools.partial(crash, at) if at_operation else lambda: None
            pid = case.start(out, prepare)
            if left and not at_operation:
                time.sleep(when)
                os.kill(pid, signal.SIGKILL)
            try:
                status = wait(pid, 120, case.log)
                if status not in (0, -signal.SIGKILL):
                    raise Failed(f"exit status {status}:\n{case.log.read_text()[-2000:]}")
                if status == 0:
                    case.compare(out)
            except Failed as e:
                raise Failed(f"{case.name}, killed at {', '.join(history)}: {e}") from e
            starts, killed, left = starts + 1, killed + (status != 0), max(0, left - 1)
        shutil.rmtree(out)
        finished += 1
    return (
        f"{killed} kills, {starts} starts, {finished} runs done, all as if undisturbed; "
        f"{time.monotonic() - began:.0f} s"
    )


def signals(cases: list[Case], draw: random.Random, count: int) -> str:
    """Signals at random times and in the middle of a random step: the conventional status; in a
    step, with a checkpoint."""
    sent, longest, saved = 0, 0.0, 0
    for case in itertools.cycle(cases):
        if sent >= count:
            break
        out, status = case.place / f"{case.name}-stopped", None
        while status != 0:
            number, left = draw.choice(SIGNALS), sent < count
            in_step = left and draw.random() < 0.5
            at = functools.partial(raise_in_step, number, draw.randrange(30))
            pid = case.start(out, at if in_step else lambda: None, "--checkpoint-every", "1e9")
            if left and not in_step:
                time.sleep(0.05 + case.seconds * draw.random())  # handlers are installed by then
                os.kill(pid, number)
            before = time.monotonic()
            status = wait(pid, 60, case.log)
            if status == 0:
                case.compare(out)
                continue
            last = case.log.read_text().splitlines()[-1]
            sentence = f".py: interrupted by {signal.Signals(number).name}"
            ends = last.endswith(("command resumes", "saved yet"))
            if status != 128 + number or sentence not in last or not ends:
                raise Failed(f"{case.name}: status {status} after signal {number}: {last}")
            if in_step and not list(out.rglob("checkpoint.pt")):
                raise Failed(f"{case.name}: signal {number} in a step, and no checkpoint")
            sent, saved = sent + 1, saved + in_step
            longest = max(longest, 0 if in_step else time.monotonic() - before)
        shutil.rmtree(out)
    return (
        f"{sent} signals, {saved} in a step, each with a checkpoint; at most {longest:.2f} s to end"
    )


def raise_in_step(number: int, step: int) -> None:
    """Lets this process send itself a signal in its training step number `step`."""
    augment, seen = engine.augment, itertools.count()

    def augment_and_raise(*args, **kwargs):
        if next(seen) == step:
            os.kill(os.getpid(), number)
        return augment(*args, **kwargs)

    engine.augment = augment_and_raise


def one_line(text: str, *needles: str) -> None:
    lines = text.splitlines()
    wrong = [n for n in needles if n not in (lines or [""])[-1]]
    if wrong or sum("error:" in line for line in lines) != 1:
        raise Failed(f"not one clear line with {wrong or needles}:\n{text}")


def disk(cases: list[Case], draw: random.Random, short: bool) -> str:
    """Writes that fail, a limit on the size of files, small disks, and disks to read from only."""
    failed, limited, full = 0, 0, 0

    def finish(case: Case, out: Path) -> None:
        case.run(out)
        case.compare(out)
        for path in out.iterdir():
            shutil.rmtree(path)

    for case in cases:
        out = case.place / f"{case.name}-refused"
        for number in (errno.ENOSPC,) if short else (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            for at in draw.sample(range(case.operations // 3), 1 if short else 6):
                hook = functools.partial(refuse, at, number)
                if case.run(out, hook, os.strerror(number)) or draw.random() < 0.5:
                    finish(case, out)  # else the next refusal finds it half way
                failed += 1
        finish(case, out)
        sizes = (1000, case.largest // 2, case.largest - 1)
        for size in sizes[-1:] if short else sizes:
            limit = (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            hook = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
            if case.run(out, hook, os.strerror(errno.EFBIG)):
                raise Failed(f"{case.name} ended well with files of at most {size} bytes")
            limited += 1
        finish(case, out)
    counts = f"{failed} refused writes, {limited} size limits"
    if os.environ.get("TORTURE_MOUNTS") != "1":  # see main
        return f"{counts}; no small disks: mounting is not allowed here"
    for case in cases:
        out, least = case.place / f"{case.name}-small", 16
        out.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "small", out], check=True)
        try:
            for _ in range(1 if short else 6):
                least = draw.randrange(least, int(case.bytes * 0.95) // 1024)
                remount(out, f"size={least // 4 * 4}k")
                if case.run(out, expect=os.strerror(errno.ENOSPC)):
                    raise Failed(f"{case.name} ended well on {least} KiB")
                full += 1
                if draw.random() < 0.5:
                    remount(out, "size=64m")
                    finish(case, out)
                    least = 16
            remount(out, "size=64m,ro")
            if case.run(out, expect=os.strerror(errno.EROFS)):
                raise Failed(f"{case.name} ended well on a read-only disk")
            remount(out, "rw")
            case.run(out)
            case.compare(out)
            remount(out, "ro")
            case.run(out)  # what is done can be read
            case.compare(out)
        finally:
            subprocess.run(["umount", out], check=True)
    return f"{counts}, {full} full disks, {len(cases)} read-only ones; one line each, then as usual"


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)


def pictures(place: Path) -> Path:
    """A folder data set of 80 training and 80 test images, random pixels."""
    from PIL import Image

    pixels = random.Random(0)
    for split, label, k in itertools.product(("train", "test"), ("cat", "dog"), range(40)):
        path = place / "pictures" / split / label / f"{k}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.frombytes("L", (8, 8), pixels.randbytes(64)).save(path)
    return place / "pictures"


def crowd(place: Path, size: int) -> str:
    """That many processes on one results folder, one set of scores and one cache of decoded images;
    two on one run; a decoder killed at work."""
    pictures(place)
    shutil.rmtree(place / "data", ignore_errors=True)
    flags = "imp --subset easy --size 32 --rewind 4 --levels 1 --steps 12 --width 2 --batch-size 16"
    shared = ("--dataset", str(place / "pictures"), "--device", "cpu", "--quiet")

    def words(out: str, data: str, *more: str) -> list[str]:
        where = ("--out", str(place / out), "--data-dir", str(place / data))
        return [*flags.split(), *shared, *where, *more]

    log = place / "killed.log"
    pid = start(words("killed", "data"), log, slow_decoding)
    until = time.monotonic() + 30
    while not list((place / "data").glob(".pictures*.lock")) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    if wait(pid, 5, log) != -signal.SIGKILL or list((place / "data").glob("*.npz")):
        raise Failed("the decoder was not killed while decoding")
    if wait(start(words("alone", "data", "--replicate", f"0-{size - 2}"), log), 60, log):
        raise Failed(f"after a killed decoder:\n{log.read_text()}")

    began, logs = time.monotonic(), [place / f"crowd{k}.log" for k in range(size)]
    pids = [
        start(words("together", "fresh", "--replicate", str(k % (size - 1))), log)
        for k, log in enumerate(logs)
    ]
    statuses = [wait(pid, 240, log) for pid, log in zip(pids, logs, strict=True)]
    seconds = time.monotonic() - began
    holders = [k for k in (0, size - 1) if statuses[k] == 2]
    if len(holders) > 1 or any(s for k, s in enumerate(statuses) if k not in holders):
        texts = "\n".join(log.read_text() for log in logs)
        raise Failed(f"statuses {statuses}:\n{texts}")
    for k in holders:
        one_line(logs[k].read_text(), "is in use by process", " on ", " since ")
    alone, together = state_of(place / "alone"), state_of(place / "together")
    if alone != together:
        raise Failed(f"a crowd changes {first_difference(alone, together)}")
    caches = len(list((place / "fresh").glob("*.npz")))
    waited = sum("waiting: " in log.read_text() for log in logs)
    return (
        f"{size} processes at once, {waited} waited, {len(holders)} refused, {caches} cache, "
        f"results as of one process; {seconds:.0f} s"
    )


def slow_decoding() -> None:
    import loading

    pixels_of = loading.pixels_of

    @functools.wraps(pixels_of)
    def slowly(*args, **kwargs):
        time.sleep(0.05)
        return pixels_of(*args, **kwargs)

    loading.pixels_of = slowly


def long_life(place: Path, short: bool) -> str:
    """Memory, open files and the log over many steps with checkpoints, and over many levels."""
    steps, levels, found = (200, 8, []) if short else (10_000, 200, [])
    small = "--width 2 --batch-size 16 --milestones 4"
    pretrain = f"pretrain --subset random --size 16 --rewind {steps} --steps {steps + 1} {small}"
    prune = f"imp --rewind 0 --steps 6 --levels {levels} --prune-fraction 0.01 {small}"
    for name, flags in {
        f"{steps} steps": f"{pretrain} --track gradient-norm --every {steps // 4}",
        f"{levels} levels": prune,
    }.items():
        log, samples = place / "long.log", place / "samples"
        samples.unlink(missing_ok=True)
        out, data = place / "long", ROOT / "data"
        shared = ("--out", str(out), "--data-dir", str(data), "--device", "cpu", "--quiet")
        words = [*flags.split(), *shared, "--checkpoint-every", "0"]
        if status := wait(start(words, log, lambda x=samples: sample(x)), 1800, log):
            raise Failed(f"{name}: status {status}:\n{log.read_text()}")
        rows = [tuple(map(int, line.split())) for line in samples.read_text().splitlines()]
        part = len(rows) // 4
        early, late = (max(r[0] for r in part) for part in (rows[part : 2 * part], rows[-part:]))
        files = {max(r[1] for r in part) for part in (rows[part : 2 * part], rows[-part:])}
        if late > early + 8 or len(files) > 1:
            raise Failed(f"{name}: {early} MiB, then {late}; open files {files}")
        [lines] = [len(p.read_text().splitlines()) for p in out.rglob("log.csv")]
        found.append(
            f"{name}: {early} MiB, then {late}, {max(files)} open files, {lines} log lines"
        )
        shutil.rmtree(out)
    return "; ".join(found)


def sample(path: Path) -> None:
    """At every file that this process writes, its memory (MiB) and open files go to `path`."""
    write, page = runs.write, os.sysconf("SC_PAGE_SIZE")

    def write_and_tell(*args) -> None:
        write(*args)
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        own = (resident - shared) * page >> 20  # a fork maps the libraries anew, page by page
        with open(path, "a") as f:
            f.write(f"{own} {len(os.listdir('/proc/self/fd'))}\n")

    runs.write = write_and_tell


# ---- command line --------------------------------------------------------------------------------

PARTS = ("kills", "signals", "disk", "crowd", "long")


def flags() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs [200]")
    parser.add_argument("--hours", type=float, help="of kills, instead of a number of them")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {','.join(CASES)}")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when [0]")
    parser.add_argument("--short", action="store_true", help="a few of each")
    return parser


def main() -> int:
    args = flags().parse_args()
    if "disk" in args.only and "TORTURE_MOUNTS" not in os.environ:
        # A mount namespace of our own, so that nothing stays mounted, however this ends.
        allowed = subprocess.run(["unshare", "-rm", "true"], stderr=subprocess.DEVNULL)
        os.environ["TORTURE_MOUNTS"] = "1" if allowed.returncode == 0 else "0"
        if allowed.returncode == 0:
            os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])
    torch.set_num_threads(1)
    engine.operations()  # built once, before the forks
    for stage in {words.split()[0] for words in CASES.values()}:
        __import__(stage)
    draw, place = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="torture-"))
    began, failed, short = time.monotonic(), 0, args.short
    until = None if args.hours is None else began + 3600 * args.hours
    try:
        needed = {"kills", "signals", "disk"} & {*args.only.split(",")}
        cases = [Case(name, place, short) for name in args.cases.split(",") if needed]
        for part in args.only.split(","):
            try:
                if part == "kills":
                    found = kills(cases, draw, 5 if short else args.kills, until)
                elif part == "signals":
                    found = signals(cases, draw, 4 if short else 60)
                elif part == "disk":
                    found = disk(cases[:1] if short else cases, draw, short)
                elif part == "crowd":
                    found = crowd(place, 8 if short else 20)
                else:
                    found = long_life(place, short)
            except Failed as e:
                failed, found = failed + 1, f"FAILED: {e}"
            print(f"{part}: {found}", flush=True)
        print(f"{time.monotonic() - began:.0f} s, torch {torch.__version__}, seed {args.seed}")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
