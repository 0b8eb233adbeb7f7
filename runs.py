"""Run folders for long jobs: atomic writes, locks, resume, signals, one-line errors.

Knows no network and no data set. Whatever is written is written atomically and checked when it is
read; an interrupted run resumes from its last checkpoint.
"""

import ast
import contextlib
import csv
import ctypes
import errno
import fnmatch
import functools
import hashlib
import io
import json
import os
import platform
import re
import secrets
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    sys.exit("Windows has no fcntl, which run folders need: use WSL (or Linux, or macOS)")

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

FORMAT = 3  # of the files in a run folder; 2 had no identity (made_from) in config.json
READABLE = (2, FORMAT)

# What the stages write into a run folder, and so all that --fresh removes.
OWN_FILES = """config.json result.json scores.json log.csv checkpoint.pt checkpoint-before.pt
    pretrained.pt warm.pt child[0-9].pt child[0-9][0-9].pt
    level[0-9][0-9].pt level[0-9][0-9][0-9].pt level[0-9][0-9][0-9][0-9].pt
    subset.npy scores.npy never_learned.npy gradient_norm.npy coherence.npy projected_error.npy
    loss_barrier.npy loss_barrier_pairs.npy error_barrier_pairs.npy"""
OWN_MODULES = ("common", "csrc", "engine", "inputs", "loading", "modelcode", "options", "runs")
REMEDIES = "--name TAG keeps both, --fresh of its own stage starts it over"


class OneLine:
    """An exception that IPython and Jupyter show as its message, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class UserError(OneLine, Exception):
    """A mistake of the user's, or a disk that refuses: one line on stderr, exit status 2."""


class FormatError(UserError):
    """A file of another format, which must be neither read nor regenerated."""


class Interrupted(OneLine, KeyboardInterrupt):
    """A signal (`number`) ended the run; the message says what is saved and how to resume. `at` is
    where it ended, such as "level03 step 400 of 600"."""

    def __init__(self, number: int, at: str = ""):
        self.number = number
        name = signal.Signals(number).name
        super().__init__(f"interrupted by {name}{f' at {at}' if at else ''}; {what_is_saved()}")


def one_line(e: BaseException | str) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__


# ---- printing ------------------------------------------------------------------------------------


def put(name: str, text: str) -> None:
    """Writes to sys.stdout or sys.stderr without ever failing: what its encoding lacks is replaced,
    and once nobody reads it (`imp.py | head`) or its disk is full, what follows is dropped."""
    stream = getattr(sys, name)
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(text.encode(stream.encoding, "replace").decode(stream.encoding))
        stream.flush()
    except (OSError, ValueError, AttributeError):  # broken, closed, or None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # What is left in its buffer must not fail again when the interpreter exits.
            number = stream.fileno()
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), number)


def say(text: Any = "") -> None:
    put("stdout", f"{text}\n")


def warn(message: str) -> None:
    put("stderr", f"{message}\n")


class BarOutput:
    """sys.stderr for tqdm: it never fails, and where it is no terminal it gets a line for each
    state of the bar instead of carriage returns."""

    def write(self, text: str) -> None:
        lines = f"{text.strip()}\n" if text.strip() else ""
        put("stderr", text if sys.stderr.isatty() else lines)

    def flush(self) -> None:
        put("stderr", "")

    def __getattr__(self, name: str) -> Any:  # encoding, fileno: tqdm asks for them
        return getattr(sys.stderr, name)


def progress_bar(total: int, quiet: bool, unit: str = " steps", desc: str | None = None) -> tqdm:
    """Counts over a whole command: rate, phase, time left. Where stderr is no terminal, at most a
    line every half minute."""
    quiet = quiet or not total or sys.stderr is None
    widget = any(c.__name__ == "tqdm_notebook" for c in tqdm.__mro__)
    how = {"dynamic_ncols": True}
    if not quiet and not widget and not sys.stderr.isatty():
        how = {"ncols": 100, "mininterval": 30, "maxinterval": 60}
    out = BarOutput()
    return tqdm(desc=desc, total=total, unit=unit, smoothing=0.02, file=out, disable=quiet, **how)


def skip(progress: tqdm, steps: int) -> None:
    """Steps that an earlier process took: done, but no measure of speed."""
    if not progress.disable:
        progress.initial += steps
        progress.update(steps)


# ---- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """OSErrors inside name the file that the user knows, not a temporary one or none."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror or one_line(e), str(path)) from e


def write(path: Path, fill: Callable[[io.BufferedWriter], Any]) -> None:
    """Writes a file atomically: it is there whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            with open(temporary, "wb") as f:
                fill(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as e:  # some network file systems sync no folders
        if e.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


def append(path: Path, data: bytes) -> None:
    with naming(path), open(path, "ab") as f:
        f.write(data)


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
                h.update(f"{k}:{fingerprint(x)}".encode(errors="surrogatepass"))
        else:
            h.update(json.dumps(v, sort_keys=True).encode())
    return h.hexdigest()[:16]


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    """Nested dicts of tensors and plain values as a .pt for `torch.load(weights_only=True)`."""
    buffer = io.BytesIO()
    torch.save({**state, "format": FORMAT, "sha256": fingerprint(state)}, buffer)
    write(path, lambda f: f.write(buffer.getbuffer()))


def check_file(path: Path) -> None:
    if not path.is_file():  # a pipe would wait for its writer
        raise UserError(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}")


def load_tensors(path: Path) -> Any:
    """What a .pt holds, ours or not, on the CPU; UserError if it cannot be read."""
    check_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged or hostile file may provoke any exception
        raise UserError(f"{path} is damaged or not one of ours ({one_line(e)[:80]})") from e


def checked_tensors(path: Path, state: Any) -> dict[str, Any]:
    """`state`, loaded from `path`, if it is what `write_tensors` wrote; else UserError."""
    if not isinstance(state, dict) or "sha256" not in state:
        raise UserError(f"{path} is damaged or not one of ours (it has no checksum)")
    check_format(path, state.get("format", 1))
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
    if number not in READABLE:
        age = "a newer" if isinstance(number, int) and number > FORMAT else "an older"
        message = f"was written by {age} version of these scripts (format {number}, this reads"
        formats = " and ".join(map(str, READABLE))
        raise FormatError(f"{path} {message} {formats}): use that version, or another --out")


def write_json(path: Path, value: dict) -> dict:
    """Writes a dict, and returns what `read_json` will give."""
    value = json.loads(json.dumps({"format": FORMAT, **value}, allow_nan=False))
    text = json.dumps({**value, "sha256": fingerprint(value)}, indent=1)
    write(path, lambda f: f.write(text.encode() + b"\n"))
    return value


def read_json(path: Path, *keys: str) -> dict:
    """What `write_json` wrote, with these keys; UserError if it is anything else, or damaged."""
    try:
        value = json.loads(path.read_bytes())
        checksum, number = value.pop("sha256"), value.get("format", 1)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({one_line(e)})") from e
    check_format(path, number)
    if checksum != fingerprint(value):
        raise UserError(f"{path} is damaged (its checksum differs)")
    if lacking := [k for k in keys if k not in value]:
        raise UserError(f"{path} is missing the key {lacking[0]}")
    return value


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy; UserError if it is anything else, or damaged. Nothing is unpickled."""
    check_file(path)
    try:
        with warnings.catch_warnings(action="error"):
            array = np.load(path, allow_pickle=False)
        array.shape  # an .npz has none  # noqa: B018
    except Exception as e:  # numpy, zipfile and tokenize have an exception each for damage
        raise UserError(f"{path} is not an .npy, or damaged ({one_line(e)})") from e
    return array


def read_npz(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Arrays of an .npz (all, or those named), whose zip checksums are verified; nothing is
    unpickled. UserError where it is damaged or lacks one."""
    check_file(path)
    try:
        with np.load(path, allow_pickle=False) as f:
            return {n: f[n] for n in names or f.files}
    except MemoryError:
        raise
    except Exception as e:  # zipfile, zlib and numpy have an exception each for damage
        raise UserError(f"{path} is damaged, or no .npz ({one_line(e)})") from e


def imported(file: Path) -> list[Path]:
    """The files beside a Python file that it and these import, but for this project's own."""
    found = [file]
    for path in found:
        names, nodes = set(), []
        with contextlib.suppress(OSError, SyntaxError, ValueError):
            nodes = [*ast.walk(ast.parse(path.read_bytes()))]
        for n in (n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)):
            names |= {f"{getattr(n, 'module', '') or ''}.{a.name}".strip(".") for a in n.names}
        for parts in (name.split(".") for name in sorted(names)):
            ends = (parts, parts[:-1]) if parts[0] not in OWN_MODULES else ()
            near = [d.joinpath(*p) for d in (file.parent, path.parent) for p in ends if p]
            new = [f for p in near for f in (p.with_suffix(".py"), p / "__init__.py")]
            found += [f for f in dict.fromkeys(new) if f.is_file() and f not in found]
    return found[1:]


def unless_damaged(read: Callable[[], Any]) -> Any:
    """What `read` gives; None, with a line on stderr, for a file that can be regenerated."""
    try:
        return read()
    except FormatError:
        raise
    except UserError as e:
        return warn(f"{e}: ignoring it; the file will be regenerated")


# ---- locks ---------------------------------------------------------------------------------------


def is_writable(folder: Path) -> bool:
    """Whether this process may change what is in a folder."""
    return os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds `path` for this process alone; the lock ends with the process, however that ends. Where
    another process has it, waits, or raises a UserError that says which one.

    A lock file of another user's that can be read is enough. In a folder that this process cannot
    write, the lock is shared with other readers, and excludes only who changes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = open_lock(path)
    if number is None:
        yield
        return
    how = fcntl.LOCK_EX if is_writable(path.parent) else fcntl.LOCK_SH
    try:
        try:
            flock(number, how | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.pread(number, 200, 0).decode(errors="replace").strip("\0")
            message = f"{path.parent} is in use by {one_line(holder or 'another process')}"
            if not wait:
                raise UserError(message) from e
            warn(f"waiting: {message}")
            flock(number, how)
        except OSError as e:  # some file systems of clusters have no locks
            warn(f"{path.parent}: no locks ({e.strerror}); only one process may work on it")
        me = f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}"
        with contextlib.suppress(OSError):  # a full disk; or a descriptor that is read-only
            os.ftruncate(number, 0)
            os.pwrite(number, me.encode(), 0)
        yield
        with contextlib.suppress(OSError):  # the next holder may be unable to write its own name
            os.ftruncate(number, 0)
    finally:
        os.close(number)


def open_lock(path: Path) -> int | None:
    """A descriptor of a lock file, made if missing, or None where it cannot be opened."""
    problem = None
    # Without O_CREAT first: Linux refuses it on files of other users in sticky folders.
    for how in (os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        try:
            return os.open(path, how | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            pass
        except OSError as e:
            problem = e
    if problem and path.exists():  # else nobody works there, and this process only reads
        warn(f"{path}: cannot be opened ({problem.strerror}); going on without a lock")
    return None


def flock(number: int, how: int) -> None:
    """fcntl.flock; over NFS an exclusive lock needs a descriptor open for writing (EBADF)."""
    try:
        fcntl.flock(number, how)
    except OSError as e:
        if e.errno != errno.EBADF:
            raise
        fcntl.flock(number, how & ~fcntl.LOCK_EX | fcntl.LOCK_SH)


# ---- run folders ---------------------------------------------------------------------------------


class Run:
    """A run folder, locked by this process: config, tensors, checkpoint, log, result.

    Every file carries the identity of its run and its own name, so that no other is taken for it.
    `settings` and `made_from` identify the run: a folder with others is refused, except that
    `allow(before, now)`, if given, judges another `made_from`: it raises UserError (its message
    follows the folder's name), or returns a line to print, or None; then the change is recorded in
    config["history"]. `about` are facts and `here` is the environment, both recorded only.

    `seconds` is what the phase in progress has taken, over all processes that worked on it; `ended`
    says why a run cannot continue; `on_log` is called with each row of the log and the replicate.
    `saved` names the last thing that a resumed run would start from.
    """

    def __init__(
        self,
        folder: Path,
        replicate: int | None,
        settings: dict,
        made_from: dict,
        about: dict,
        here: dict,
        fresh: bool = False,
        allow: Callable[[dict, dict], str | None] | None = None,
    ):
        self.folder, self.replicate, self.seconds = folder, replicate or 0, 0.0
        self.ended: str | None = None
        self.on_log: Callable[[dict], Any] | None = None
        self.saved, self.resumed = "", None
        self.rows = Log(folder / "log.csv")
        self.held = contextlib.ExitStack()
        # Scores are shared, so wait for who makes them; a run is not, so refuse.
        self.held.enter_context(lock(folder / ".lock", wait=replicate is None))
        try:
            self.writable = is_writable(folder)
            if fresh:
                self.check_writable()
            if self.writable:
                remove_own(folder, fresh)
            settings, made_from, about = json.loads(json.dumps([settings, made_from, about]))
            self.config = self.enter(settings, made_from, about, here, allow)
        except BaseException:
            self.held.close()
            raise
        OPEN.append(self)
        self.held.callback(OPEN.remove, self)

    def enter(
        self, settings: dict, made_from: dict, about: dict, here: dict, allow: Callable | None
    ) -> dict:
        """config.json: compares the settings and the origin with it, or begins the run."""
        path = self.folder / "config.json"
        if not path.exists():
            self.check_writable()
            (self.folder / "log.csv").unlink(missing_ok=True)  # of a run that lost its config
            config = {"run": secrets.token_hex(8), "settings": settings, "made_from": made_from}
            config |= {"about": about, "environments": [here]}
            write_json(path, config)
            return config
        try:
            config = read_json(path, "run", "settings", "environments")
        except FormatError:
            raise
        except UserError as e:
            raise UserError(f"{e}: --fresh starts the run over") from e
        if (number := config.pop("format")) != FORMAT:
            raise FormatError(
                f"{self.folder} was written by an earlier version (format {number}, this continues "
                f"{FORMAT}): it can be read, not continued; {REMEDIES}"
            )
        if changes := differences(config["settings"], settings):
            what = f"{self.folder} was created with different settings"
            raise UserError(f"{what} ({changes}): {REMEDIES}")
        before = json.dumps(config)
        if changes := differences(config["made_from"], made_from):
            try:
                if allow is None:
                    raise UserError(f"was made from something else ({changes}): {REMEDIES}")
                if line := allow(config["made_from"], made_from):
                    warn(f"{self.folder}: {line}")
            except UserError as e:
                raise UserError(f"{self.folder} {e}") from e
            config["history"] = [*config.get("history", []), config["made_from"]]
            config["made_from"] = made_from
        if changes := differences(config["environments"][-1], here):
            warn(f"{self.folder}: {changes}; remaining results may not be bit-identical")
            config["environments"].append(here)
        config["about"] = about
        if self.writable and json.dumps(config) != before:
            write_json(path, config)
        return config

    def check_writable(self) -> None:
        """UserError where this process may read the folder but not continue the run."""
        if self.writable:
            return
        if os.statvfs(self.folder).f_flag & os.ST_RDONLY:
            why = os.strerror(errno.EROFS)
        elif (owner := self.folder.stat().st_uid) != os.geteuid():
            with contextlib.suppress(KeyError):  # a user without a name here
                owner = self.folder.owner()
            why = f"it belongs to user {owner}"
        else:
            why = os.strerror(errno.EACCES)
        remedy = "another --out makes a run of your own"
        raise UserError(f"{self.folder} can be read, not written ({why}): {remedy}")

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def save(self, name: str, state: dict[str, Any]) -> None:
        self.rows.sync()  # a file must not outlive the rows that it follows
        write_tensors(self.folder / name, {**state, "file": [self.config["run"], name]})
        self.saved = name

    def load(self, name: str, saved_as: str | None = None) -> dict[str, Any] | None:
        """A file of this run; None, with a line on stderr if it is there but damaged, or of
        another run or name."""

        def read() -> dict[str, Any]:
            state = read_tensors(self.folder / name)
            if state.pop("file", None) != [self.config["run"], saved_as or name]:
                raise UserError(f"{self.folder / name} belongs to another run, or was renamed")
            self.saved = name
            return state

        return unless_damaged(read) if self.has(name) else None

    def checkpoint(self, phase: str, step: int, state: dict[str, Any]) -> None:
        """Saves the state inside a phase; the one before is kept against damage."""
        path, self.resumed = self.folder / "checkpoint.pt", None
        if path.exists():
            with naming(path):
                os.replace(path, self.folder / "checkpoint-before.pt")
        self.save(path.name, {"phase": phase, "step": step, "seconds": self.seconds, **state})
        self.saved = f"{phase} step {step}"

    def resume(self, phase: str) -> dict[str, Any] | None:
        """The last good checkpoint of a phase, kept until the next is written or another phase is
        asked for. Called before work begins, so it raises UserError where the folder cannot be
        written."""
        self.check_writable()
        if self.resumed and self.resumed["phase"] == phase:
            return self.resumed
        for name in ("checkpoint.pt", "checkpoint-before.pt"):
            state = self.load(name, saved_as="checkpoint.pt")
            if state and state["phase"] == phase:
                self.saved, self.resumed = f"{phase} step {state['step']}", state
                return state
        return None

    def log(self, phase: str, step: int, **values: Any) -> None:
        """One row of log.csv; a row of the same phase and step is replaced."""
        row = {"phase": phase, "step": step, **values}
        self.rows.add(row)
        if self.on_log:
            self.on_log({"replicate": self.replicate} | row)

    @functools.cached_property
    def result(self) -> dict | None:
        """result.json, or None where there is none, or it is damaged or another run's."""
        path = self.folder / "result.json"

        def read() -> dict:
            value = read_json(path, "config")
            if value["config"]["run"] != self.config["run"]:
                raise UserError(f"{path} belongs to another run")
            return value

        return unless_damaged(read) if path.exists() else None

    def finish(self, result: dict) -> None:
        """Writes result.json, whose presence means done."""
        self.rows.sync()
        for name in ("checkpoint.pt", "checkpoint-before.pt"):
            (self.folder / name).unlink(missing_ok=True)
        value = {"config": self.config, **result}
        self.result = write_json(self.folder / "result.json", value)
        self.saved = "result.json"


OPEN: list[Run] = []  # of this process


def what_is_saved() -> str:
    """For who interrupts: what the runs of this process would resume from."""
    saved = [run for run in OPEN if run.saved]
    if not saved:
        return "nothing was saved yet"
    more = f" and in {len(saved) - 1} more" if len(saved) > 1 else ""
    return f"{saved[0].saved} is saved in {saved[0].folder}{more}; the same command resumes"


def remove_own(folder: Path, fresh: bool) -> None:
    """Removes what a killed process left of its writes and, if `fresh`, the files of the run; never
    what is not ours. The config goes last: until then what is left belongs to it."""
    for path in sorted(folder.iterdir(), key=lambda p: (p.name == "config.json", p.name)):
        written = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
        name = written[1] if written else path.name
        ours = (written or fresh) and any(
            fnmatch.fnmatchcase(name, own) for own in OWN_FILES.split()
        )
        if ours and (path.is_symlink() or not path.is_dir()):
            path.unlink(missing_ok=True)


def differences(before: dict, now: dict) -> str:
    """ "lr 0.1, now 0.2; model.name a, now b": what differs, by dotted name."""
    a, b = flatten(before), flatten(now)
    changed = sorted(k for k in a | b if a.get(k) != b.get(k))
    more = f"; {len(changed) - 8} more" if len(changed) > 8 else ""
    return "; ".join(f"{k} {a.get(k)}, now {b.get(k)}" for k in changed[:8]) + more


def flatten(value: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for k, v in value.items():
        flat |= flatten(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return flat


def finished_result(folder: Path) -> dict | None:
    """result.json of a folder that no process needs to hold; None if missing, damaged, or of a run
    that ended early."""
    try:
        result = read_json(folder / "result.json")
    except UserError:
        return None
    return None if result.get("ended") else result


# ---- the log -------------------------------------------------------------------------------------


class Log:
    """log.csv, one row a phase and step: rows are appended; the file is rewritten where a row is
    replaced, a column is new, or its last line was torn by a kill."""

    def __init__(self, path: Path):
        self.path, self.columns, self.unsynced = path, [], False
        self.rows: dict[tuple[str, int], dict] | None = None  # read when the first is added

    def read(self) -> dict[tuple[str, int], dict]:
        try:
            rows = read_rows(self.path) if self.path.exists() else []
        except UserError as e:
            rows = warn(f"{e}: starting a new log") or []
        return {(r["phase"], int(r["step"])): r for r in rows}

    def add(self, row: dict) -> None:
        if first := self.rows is None:
            self.rows = self.read()
            self.columns = list(dict.fromkeys(k for r in self.rows.values() for k in r))
        key = row["phase"], row["step"]
        if first or key in self.rows or not row.keys() <= {*self.columns}:
            self.rows[key] = row
            self.columns = list(dict.fromkeys([*self.columns, *row]))
            header = dict(zip(self.columns, self.columns, strict=True))
            text = self.as_text([header, *self.rows.values()])
            write(self.path, lambda f: f.write(text))
            return
        self.rows[key] = row
        append(self.path, self.as_text([row]))
        self.unsynced = True

    def as_text(self, rows: Iterable[dict]) -> bytes:
        out = io.StringIO()
        csv.DictWriter(out, self.columns, lineterminator="\n").writerows(rows)
        return out.getvalue().encode()

    def sync(self) -> None:
        """Brings appended rows to the disk."""
        if self.unsynced:
            with naming(self.path), open(self.path, "ab") as f:
                os.fsync(f.fileno())
            self.unsynced = False


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a log.csv, but for a last line that is still being written; UserError if it is
    anything else, or damaged."""
    try:
        text = path.read_bytes()
        whole = text[: text.rindex(b"\n") + 1].decode()
        rows = list(csv.DictReader(io.StringIO(whole, newline=""), strict=True))
        for row in rows:
            _ = row["phase"].lower(), int(row["step"])
            _ = [float(v) for k, v in row.items() if k not in ("phase", "outcome") and v]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, csv.Error) as e:
        raise UserError(f"{path} is damaged ({one_line(e)})") from e
    return rows


# ---- signals -------------------------------------------------------------------------------------


class Signals:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1: inside `deferred` they are only noted, and the run saves
    itself when the step in progress is done; elsewhere, or the second time, it is left at once.
    Within `TWICE` seconds of the first a signal is the same one: schedulers send it to every
    process, and a script around this one sends it on.
    """

    TWICE = 1
    number, waits, since = 0, False, 0.0

    def __init__(self):
        self.before: list[dict] = []  # handlers to restore, by depth

    def __enter__(self) -> None:
        if not self.before:
            self.number = 0
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            before = signal.getsignal(number)
            nohup = number == signal.SIGHUP and before is signal.SIG_IGN
            if before is not None and not nohup:  # None: of a C library, which cannot be restored
                with contextlib.suppress(ValueError):  # not the main thread: not ours to handle
                    handlers[number] = signal.signal(number, self)
        self.before.append(handlers)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for number, handler in self.before.pop().items():
            signal.signal(number, handler)
        noted, self.number = self.number, self.number * bool(self.before)
        if noted and isinstance(error, ImportError | SystemError):  # of C code that it ended
            raise Interrupted(noted) from error

    def __call__(self, number: int, frame: Any) -> None:
        again, now = self.number, time.monotonic()
        if again and now < self.since + self.TWICE:
            return
        self.number, self.since = again or number, now
        if again or not self.waits:
            raise Interrupted(self.number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        before, self.waits = self.waits, True
        try:
            yield
        finally:
            self.waits = before


signals = Signals()


# ---- the command line ----------------------------------------------------------------------------


def run_stage(main: Callable[[Any], Any], parser: Any) -> None:
    """The command line around a `main`: one line and status 2 for what the user can mend, or status
    128 + signal after a signal. `parser` is an argparse one whose errors are UserErrors."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # None, or replaced
            stream.reconfigure(errors="replace")
    try:
        with signals:
            main(parser.parse_args())
            return
    except Interrupted as e:
        problem, status = str(e), 128 + e.number
    except UserError as e:
        problem, status = f"error: {e}", 2
    except OSError as e:
        problem, status = f"error: {e.filename or 'a file'}: {e.strerror or one_line(e)}", 2
    except (MemoryError, torch.OutOfMemoryError) as e:
        problem, status = f"error: not enough memory ({one_line(e)})", 2
    finally:
        put("stdout", "")  # flushed here, where nothing can fail
    warn(f"{parser.prog}: {' '.join(problem.split())}")
    sys.exit(status)


def keep_freed_memory() -> None:
    """Freed blocks stay with the process (glibc): else every step faults its tensors in again."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped apart, whatever its size
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap never shrinks
