"""Run folders for long jobs: whole files, locks, resume, signals, one-line errors.

Knows no network and no data set. Whatever is written appears whole or not at all and is checked
when it is read; a killed run goes on from its last checkpoint.
"""

import argparse
import contextlib
import csv
import ctypes
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import secrets
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

FORMAT = 2  # of the files in a run folder; 1 held networks as rows without names


class UserError(Exception):
    """A mistake of the user's, or a disk that refuses: one line on stderr, exit status 2."""


class FormatError(UserError):
    """A file of another format, which must be neither read nor made again."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, after the run has saved itself; `number` is the signal."""

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number


def one_line(e: BaseException | str) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__


def warn(message: str) -> None:
    print(message, file=sys.stderr)


# ---- files ---------------------------------------------------------------------------------------


def write(path: Path, fill: Callable[[io.BufferedWriter], Any]) -> None:
    """Writes a file so that it is there whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as e:  # name the file that the user knows, not the temporary one
        raise OSError(e.errno, e.strerror or one_line(e), str(path)) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
    write(path, lambda f: np.save(f, array))


def fingerprint(*values: Any) -> str:
    """sha256 (first 16 hex digits) of arrays, tensors and plain values, by content."""
    h = hashlib.sha256()
    for v in values:
        if isinstance(v, Tensor):
            v = v.detach().cpu().contiguous().numpy()
        if isinstance(v, np.ndarray):
            h.update(f"{v.dtype}{v.shape}".encode())
            h.update(np.ascontiguousarray(v).view(np.uint8).data)
        elif isinstance(v, dict):
            for k, x in v.items():
                h.update(f"{k}:{fingerprint(x)}".encode())
        else:
            h.update(json.dumps(v, sort_keys=True).encode())
    return h.hexdigest()[:16]


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    """Nested dicts of tensors and plain values as a .pt for `torch.load(weights_only=True)`."""
    buffer = io.BytesIO()
    torch.save({**state, "format": FORMAT, "sha256": fingerprint(state)}, buffer)
    write(path, lambda f: f.write(buffer.getbuffer()))


def load_tensors(path: Path) -> Any:
    """What a .pt holds, ours or not, on the CPU; UserError if it cannot be read."""
    if not path.is_file():
        raise UserError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged or hostile file may provoke any exception
        raise UserError(f"{path} is damaged or not one of ours ({one_line(e)[:80]})") from e


def checked_tensors(path: Path, state: Any) -> dict[str, Any]:
    """`state`, loaded from `path`, if it is what `write_tensors` wrote; else UserError."""
    if not isinstance(state, dict) or "sha256" not in state:
        raise UserError(f"{path} is damaged or not one of ours (it has no checksum)")
    check_format(path, state.get("format", state.get("version")))
    content = {k: v for k, v in state.items() if k not in ("format", "sha256")}
    try:
        bytes_held = sum(t.nbytes for t in tensors_in(content))
        intact = bytes_held <= path.stat().st_size and fingerprint(content) == state["sha256"]
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} is damaged or not one of ours ({one_line(e)[:80]})") from e
    if not intact:
        raise UserError(f"{path} is damaged (its checksum differs)")
    return content


def tensors_in(state: dict) -> Iterator[Tensor]:
    for v in state.values():
        if isinstance(v, dict):
            yield from tensors_in(v)
        elif isinstance(v, Tensor):
            yield v


def read_tensors(path: Path) -> dict[str, Any]:
    """What `write_tensors` wrote; UserError if it is anything else, or damaged."""
    return checked_tensors(path, load_tensors(path))


def check_format(path: Path, number: Any) -> None:
    if number != FORMAT:
        age = "a newer" if isinstance(number, int) and number > FORMAT else "an older"
        message = f"was written by {age} version of these scripts (format {number}, this reads"
        raise FormatError(f"{path} {message} {FORMAT}): use that version, or another --out")


def write_json(path: Path, value: dict) -> None:
    value = json.loads(json.dumps({"format": FORMAT, **value}, allow_nan=False))
    text = json.dumps({**value, "sha256": fingerprint(value)}, indent=1)
    write(path, lambda f: f.write(text.encode() + b"\n"))


def read_json(path: Path, *keys: str) -> dict:
    """What `write_json` wrote, with these keys; UserError if it is anything else, or damaged."""
    try:
        value = json.loads(path.read_bytes())
        checksum, number = value.pop("sha256"), value.get("format", value.get("version"))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({one_line(e)})") from e
    check_format(path, number)
    if checksum != fingerprint(value):
        raise UserError(f"{path} is damaged (its checksum differs)")
    if lacking := [k for k in keys if k not in value]:
        raise UserError(f"{path} is another file, without {lacking[0]}")
    return value


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy; UserError if it is anything else, or damaged. Nothing is unpickled."""
    if not path.is_file():  # a pipe would wait for its writer
        raise UserError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        with warnings.catch_warnings(action="error"):
            array = np.load(path, allow_pickle=False)
        array.shape  # an .npz has none  # noqa: B018
    except Exception as e:  # numpy, zipfile and tokenize have an exception each for damage
        raise UserError(f"{path} is not an .npy, or damaged ({one_line(e)})") from e
    return array


def unless_damaged(read: Callable[[], Any]) -> Any:
    """What `read` gives; None, with a line on stderr, for a file that can be made again."""
    try:
        return read()
    except FormatError:
        raise
    except UserError as e:
        return warn(f"{e}: ignored; it will be made again")


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds `path` for this process alone; it falls with the process, however that ends. Where
    another process has it, waits, or says in a UserError which one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):  # read-only folder: nothing in it can change
        yield
        return
    with open(path, "a+", errors="replace") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            f.seek(0)
            message = f"{path.parent} is in use by {one_line(f.read(200) or 'another process')}"
            if not wait:
                raise UserError(message) from e
            warn(f"waiting: {message}")
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError as e:  # some file systems of clusters have no locks
            warn(f"{path.parent}: no locks ({e.strerror}); only one process may work on it")
        f.truncate(0)
        f.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}")
        f.flush()
        yield


# ---- run folders ---------------------------------------------------------------------------------


class Run:
    """A run folder, held by this process: config, tensors, checkpoint, log, result.

    Every file carries the identity of its run and its own name, so that no other is taken for it.
    `seconds` is what the phase in progress has taken, over all processes that worked on it; `ended`
    says why a run cannot go on.
    """

    def __init__(
        self, folder: Path, replicate: int | None, settings: dict, here: dict, fresh: bool = False
    ):
        self.folder, self.replicate, self.seconds = folder, replicate or 0, 0.0
        self.ended: str | None = None
        self.held = contextlib.ExitStack()
        # Scores are shared, so wait for who makes them; a run is not, so refuse.
        self.held.enter_context(lock(folder / ".lock", wait=replicate is None))
        try:
            for path in folder.iterdir():
                if path.name != ".lock" and (fresh or path.suffix == ".tmp"):
                    path.unlink()
            self.config = self.enter(json.loads(json.dumps(settings)), here)
        except BaseException:
            self.held.close()
            raise

    def enter(self, settings: dict, here: dict) -> dict:
        """config.json: compares the settings with it, or begins the run with them."""
        path = self.folder / "config.json"
        if not path.exists():
            (self.folder / "log.csv").unlink(missing_ok=True)  # of a run that lost its config
            config = {"run": secrets.token_hex(8), "settings": settings, "environments": [here]}
            write_json(path, config)
            return config
        try:
            config = read_json(path, "run", "settings", "environments")
        except FormatError:
            raise
        except UserError as e:
            raise UserError(f"{e}: --fresh starts the run over") from e
        del config["format"]
        if changes := differences(config["settings"], settings):
            remedy = "--fresh starts it over, --out keeps both"
            raise UserError(f"{self.folder} holds a run of other settings ({changes}): {remedy}")
        if changes := differences(config["environments"][-1], here):
            warn(f"{self.folder}: {changes}; what is left may differ in bits")
            config["environments"].append(here)
            write_json(path, config)
        return config

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def save(self, name: str, state: dict[str, Any]) -> None:
        write_tensors(self.folder / name, {**state, "file": [self.config["run"], name]})

    def load(self, name: str, saved_as: str | None = None) -> dict[str, Any] | None:
        """A file of this run; None, with a line on stderr if it is there but damaged, or of
        another run or name."""

        def read() -> dict[str, Any]:
            state = read_tensors(self.folder / name)
            if state.pop("file", None) != [self.config["run"], saved_as or name]:
                raise UserError(f"{self.folder / name} is another run's, or was renamed")
            return state

        return unless_damaged(read) if self.has(name) else None

    def checkpoint(self, phase: str, step: int, state: dict[str, Any]) -> None:
        """Saves the state inside a phase; the one before is kept against damage."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            os.replace(path, self.folder / "checkpoint-before.pt")
        self.save(path.name, {"phase": phase, "step": step, "seconds": self.seconds, **state})

    def resume(self, phase: str) -> dict[str, Any] | None:
        """The last good checkpoint of a phase."""
        for name in ("checkpoint.pt", "checkpoint-before.pt"):
            state = self.load(name, saved_as="checkpoint.pt")
            if state and state["phase"] == phase:
                return state
        return None

    def log(self, phase: str, step: int, **values: Any) -> None:
        """One row of log.csv; a row of the same phase and step is replaced."""
        path, rows = self.folder / "log.csv", {}
        if path.exists():
            try:
                rows = {(r["phase"], int(r["step"])): r for r in read_rows(path)}
            except UserError as e:
                warn(f"{e}: begun anew")
        rows[phase, step] = {"phase": phase, "step": step, **values}
        out = io.StringIO()
        names = list(dict.fromkeys(k for r in rows.values() for k in r))
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        write(path, lambda f: f.write(out.getvalue().encode()))

    @property
    def result(self) -> dict | None:
        """result.json, or None where there is none, or it is damaged or another run's."""
        path = self.folder / "result.json"

        def read() -> dict:
            value = read_json(path, "config")
            if value["config"]["run"] != self.config["run"]:
                raise UserError(f"{path} is another run's")
            return value

        return unless_damaged(read) if path.exists() else None

    def finish(self, result: dict) -> None:
        """Writes result.json, whose presence means done."""
        for name in ("checkpoint.pt", "checkpoint-before.pt"):
            (self.folder / name).unlink(missing_ok=True)
        write_json(self.folder / "result.json", {"config": self.config, **result})


def differences(before: dict, now: dict) -> str:
    changed = sorted(k for k in before | now if before.get(k) != now.get(k))
    return ", ".join(f"{k} {before.get(k)}, now {now.get(k)}" for k in changed)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a log.csv; UserError if it is anything else, or damaged."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f, strict=True))
        for row in rows:
            _ = row["phase"].lower(), int(row["step"])
            _ = [float(v) for k, v in row.items() if k not in ("phase", "outcome") and v]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, csv.Error) as e:
        raise UserError(f"{path} is damaged ({one_line(e)})") from e
    return rows


def finished_result(folder: Path) -> dict | None:
    """result.json of a folder that no process needs to hold; None if missing, damaged, or of a run
    that ended early."""
    try:
        result = read_json(folder / "result.json")
    except UserError:
        return None
    return None if result.get("ended") else result


# ---- progress, signals ---------------------------------------------------------------------------


class Lines:
    """stderr for a progress bar where it is no terminal: a line each time instead of a return."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(steps: int, quiet: bool) -> tqdm:
    """Counts over a whole command: rate, phase, time left. Where stderr is no terminal, a line
    every half minute."""
    rarely = {"file": Lines(), "mininterval": 30, "maxinterval": 60, "ncols": 100}
    kind = {"dynamic_ncols": True} if sys.stderr.isatty() else rarely
    return tqdm(total=steps, unit=" steps", smoothing=0.02, disable=quiet, **kind)


def skip(progress: tqdm, steps: int) -> None:
    """Steps that an earlier process took: done, but no measure of speed."""
    if not progress.disable:
        progress.initial += steps
        progress.update(steps)


class Signals:
    """SIGINT and SIGTERM: inside `deferred` they are only noted, and the run saves itself when the
    step in hand is done; elsewhere, once more, or after `PATIENCE` seconds, it is left at once.
    Within `TWICE` seconds of the first a signal is the same one: schedulers send it to every
    process, and a script around this one sends it on.
    """

    PATIENCE, TWICE = 20, 1
    number, waits, since = 0, False, 0.0

    def __enter__(self) -> None:
        self.number = 0
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
        try:
            self.before = {n: signal.signal(n, self) for n in handled}
        except ValueError:  # not the main thread: signals are somebody else's
            self.before = {}

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.number = 0

    def __call__(self, number: int, frame: Any) -> None:
        again, now = self.number, time.monotonic()
        if again and number != signal.SIGALRM and now < self.since + self.TWICE:
            return
        self.number, self.since = again or number, now
        if again or not self.waits:
            raise Interrupted(self.number)
        signal.setitimer(signal.ITIMER_REAL, self.PATIENCE)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
            if self.number:
                signal.setitimer(signal.ITIMER_REAL, 0)


signals = Signals()


# ---- the command line ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def __init__(self, description: str, **more: Any):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, **more)

    def error(self, message: str) -> None:
        raise UserError(message)


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


def numbers(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers and ranges, ascending: "0-3", "0,2", "31200,46800"."""
    values = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            if not 0 < len(span) <= 1000:
                raise ValueError
            values += span
    except ValueError:
        values = []
    if not values or sorted(set(values)) != values:
        raise argparse.ArgumentTypeError(f"{text!r} is not an ascending list like 0-3 or 0,2")
    return tuple(values)


def call(main: Callable[[argparse.Namespace], Any], parser: Parser, settings: dict) -> Any:
    """A stage as a function: `settings` are its flags, with underscores. The same folder and the
    same bits as the command; UserError for a mistake, KeyboardInterrupt after a saved Ctrl-C."""
    words = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            off = f"--no-{flag[2:]}"
            words += [flag] if value else [off] * (off in parser._option_string_actions)
        elif value is not None:
            listed = isinstance(value, list | tuple | range)
            words.append(f"{flag}={','.join(map(str, value)) if listed else value}")
    with signals:
        return main(parser.parse_args(words))


def run_stage(main: Callable[[argparse.Namespace], Any], parser: Parser) -> None:
    """The command line around a `main`: one line and status 2 for what the user can mend, status
    128 + signal after a signal."""
    keep_freed_memory()
    try:
        with signals:
            main(parser.parse_args())
    except Interrupted as e:
        sys.exit(128 + e.number)
    except UserError as e:
        problem = str(e)
    except OSError as e:
        problem = f"{e.filename or 'a file'}: {e.strerror or one_line(e)}"
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        remedy = "a smaller --batch-size, --width, or fewer networks side by side"
        problem = f"not enough memory ({one_line(e)}): {remedy}"
    else:
        return
    warn(f"{parser.prog}: error: {' '.join(problem.split())}")
    sys.exit(2)


def out_of_memory(e: BaseException) -> bool:
    """Python's, CUDA's, or that of torch's allocator on the CPU, which has no class of its own."""
    known = isinstance(e, MemoryError | torch.OutOfMemoryError)
    return known or "DefaultCPUAllocator: can't allocate memory" in str(e)


def keep_freed_memory() -> None:
    """Freed blocks stay with the process (glibc): else every step faults its tensors in again."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped apart, whatever its size
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap never shrinks
