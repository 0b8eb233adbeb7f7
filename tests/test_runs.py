"""runs.py, one test a mechanism: files, run folders, the log, locks, other users, kills, signals,
printing. The stage here is `toy`, which counts to 40 in steps of a few milliseconds."""

import contextlib
import errno
import fcntl
import functools
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torture
from conftest import ROOT

import runs
from runs import FormatError, Interrupted, Run, UserError

STEPS = 40


def open_run(folder, settings=None, made_from=None, here=None, **more):
    settings = {"replicate": 0} if settings is None else settings
    return Run(folder, 0, settings, made_from or {}, {}, here or {"torch": "1"}, **more)


def toy(folder: Path, pause: float = 0.0, at_step=lambda step: None) -> float | None:
    """A stage: a checkpoint every third step, a row of the log every other, a result."""
    run = open_run(folder)
    with run.held:
        if run.result:
            return run.result["total"]
        saved = run.resume("count") or {"step": 0, "total": torch.zeros(())}
        step, total = saved["step"], saved["total"]
        while step < STEPS:
            with runs.signals.deferred():
                at_step(step)
                time.sleep(pause)
                total, step = torch.sin(total + step), step + 1
            if step % 2 == 0:
                run.log("count", step, total=total.item())
            if step % 3 == 0 or runs.signals.number:
                run.checkpoint("count", step, {"total": total})
            if runs.signals.number:
                raise Interrupted(runs.signals.number, f"count step {step} of {STEPS}")
        run.finish({"total": total.item()})
        runs.say(f"total {total.item()}")
        return total.item()


def as_command(main) -> int:
    """What `python toy.py` would exit with."""
    parser = SimpleNamespace(prog="toy.py", parse_args=lambda: None)
    try:
        runs.run_stage(lambda args: main(), parser)
    except SystemExit as e:
        return e.code
    return 0


def forked(main, prepare=lambda: None, out=os.devnull) -> int:
    """Runs `main` as a command in a fork, with what it prints in the file `out`; its process id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        sys.stdout = sys.stderr = open(out, "w")  # noqa: SIM115
        prepare()
        status = as_command(main)
    finally:
        os._exit(status)


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def by_another_user(main, out: Path) -> tuple[int, list[str]]:
    """`main` as a command of user 65534, who owns nothing here: exit status, lines printed."""
    if os.geteuid():
        pytest.skip("another user: needs root")

    def become():
        os.setgroups([]), os.setgid(65534), os.setuid(65534)

    status = status_of(forked(main, become, out))
    return status, out.read_text().splitlines()


@pytest.fixture
def shared(tmp_path):
    """A folder that other users may enter."""
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(path.stat().st_mode | 0o055)
    return tmp_path


# ---- files ---------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x"
    runs.write(path, lambda f: f.write(b"old"))

    def half(f):
        f.write(b"ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="space") as e:
        runs.write(path, half)
    assert e.value.filename == str(path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_damage_is_found_by_checksum_and_nothing_is_unpickled(tmp_path):
    path = tmp_path / "result.json"
    runs.write_json(path, {"accuracy": 0.91, "name": "é"})
    assert runs.read_json(path)["accuracy"] == 0.91
    with pytest.raises(UserError, match=r"result\.json is missing the key levels"):
        runs.read_json(path, "levels")
    altered = path.read_text().replace("0.91", "0.97")
    for text in (altered, "", "{", "[]", "7", "[" * 100000):
        path.write_text(text)
        with pytest.raises(UserError, match=r"result\.json (is damaged|cannot be read)"):
            runs.read_json(path)

    state = tmp_path / "x.pt"
    runs.write_tensors(state, {"w": torch.arange(3.0), "by": {"name": torch.ones(2)}})
    assert torch.equal(runs.read_tensors(state)["w"], torch.arange(3.0))
    content = state.read_bytes()
    at = content.index(torch.arange(3.0).numpy().tobytes()) + 4
    state.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    with pytest.raises(UserError, match=r"x\.pt is damaged"):
        runs.read_tensors(state)

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"w": Hostile()}, state)
    with pytest.raises(UserError, match=r"x\.pt is damaged or not one of ours"):
        runs.read_tensors(state)
    np.save(tmp_path / "x.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"x\.npy is not an \.npy, or damaged"):
        runs.read_npy(tmp_path / "x.npy")
    assert not (tmp_path / "pwned").exists()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for read in (runs.load_tensors, runs.read_npy):
        with pytest.raises(UserError, match="pipe is not a regular file"):
            read(tmp_path / "pipe")


def test_the_format_before_is_read_others_are_refused_by_name(tmp_path, monkeypatch):
    for number in (1, 2, 3, 4):
        with monkeypatch.context() as m:
            m.setattr(runs, "FORMAT", number)
            runs.write_json(tmp_path / f"{number}.json", {"x": number})
            runs.write_tensors(tmp_path / f"{number}.pt", {"x": number})
    for number in (2, 3):
        assert runs.read_json(tmp_path / f"{number}.json")["x"] == number
        assert runs.read_tensors(tmp_path / f"{number}.pt")["x"] == number
    for number, age in ((1, "an older"), (4, "a newer")):
        match = rf"written by {age} version .*\(format {number}, this reads 2 and 3\)"
        for read, kind in ((runs.read_json, "json"), (runs.read_tensors, "pt")):
            with pytest.raises(FormatError, match=match):
                read(tmp_path / f"{number}.{kind}")


# ---- run folders ---------------------------------------------------------------------------------


def test_other_settings_are_refused_with_the_difference(tmp_path, capsys):
    before = {"lr": 0.1, "model": {"name": "resnet", "width": 16}}
    open_run(tmp_path, before).held.close()
    now = {"lr": 0.2, "model": {"name": "resnet", "width": 8}}
    with pytest.raises(UserError) as e:
        open_run(tmp_path, now)
    assert str(e.value) == (
        f"{tmp_path} was created with different settings (lr 0.1, now 0.2; model.width 16, now 8): "
        "--name TAG keeps both, --fresh of its own stage starts it over"
    )
    open_run(tmp_path, before, here={"torch": "2"}).held.close()
    line = f"{tmp_path}: torch 1, now 2; remaining results may not be bit-identical\n"
    assert capsys.readouterr().err == line
    run = open_run(tmp_path, now, fresh=True)
    assert run.config["settings"] == now and len(run.config["environments"]) == 1
    run.held.close()


def test_another_origin_is_refused_or_recorded(tmp_path, capsys):
    first, second = {"model": {"name": "a"}}, {"model": {"name": "b"}}
    open_run(tmp_path, made_from=first).held.close()
    with pytest.raises(
        UserError, match=r"from something else \(model\.name a, now b\): --name TAG"
    ):
        open_run(tmp_path, made_from=second)

    def refuse(before, now):
        raise UserError(f"was begun by {before['model']['name']}")

    with pytest.raises(UserError, match=rf"^{tmp_path} was begun by a$"):
        open_run(tmp_path, made_from=second, allow=refuse)
    open_run(tmp_path, made_from=second, allow=lambda before, now: "an upgrade").held.close()
    assert capsys.readouterr().err == f"{tmp_path}: an upgrade\n"
    run = open_run(tmp_path, made_from=second, allow=refuse)
    assert (run.config["made_from"], run.config["history"]) == (second, [first])
    run.held.close()


def test_fresh_removes_what_is_its_own_and_a_kill_leaves_no_mixture(tmp_path, monkeypatch):
    ours = ("result.json", "log.csv", "level00.pt", "level100.pt", "child2.pt", "scores.npy")
    ours += (".level00.pt.77.tmp", "checkpoint-before.pt")
    theirs = ("notes.txt", "level00-best.pt", "mine.npy", ".notes.txt.77.tmp", "config.json.bak")
    open_run(tmp_path).held.close()
    for name in (*ours, *theirs):
        (tmp_path / name).write_text("x")
    for folder in (".ipynb_checkpoints", "level01.pt"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "level00.pt").write_text("x")

    def dying(path, missing_ok=False):
        if path.name == "log.csv":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    unlink = Path.unlink
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Path, "unlink", dying)
        open_run(tmp_path, {"replicate": 0, "lr": 1}, fresh=True)
    with pytest.raises(UserError, match="different settings"):  # the config is removed last
        open_run(tmp_path, {"replicate": 0, "lr": 1})
    open_run(tmp_path, {"replicate": 0, "lr": 1}, fresh=True).held.close()
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    stray = {f"{folder}/level00.pt" for folder in (".ipynb_checkpoints", "level01.pt")}
    assert left == {*theirs, *stray, "config.json", ".lock"}


def test_files_belong_to_their_run_and_name(tmp_path, capsys):
    for name in ("a", "b"):
        run = open_run(tmp_path / name)
        run.save("level00.pt", {"x": 1})
        for step in (3, 6):
            run.checkpoint("level01", step, {})
        run.finish({"ended": None})
        run.held.close()
    folder = tmp_path / "b"
    for name in ("level00.pt", "result.json"):
        (folder / name).write_bytes((tmp_path / "a" / name).read_bytes())
    (folder / "level01.pt").write_bytes((tmp_path / "b/level00.pt").read_bytes())
    run = open_run(folder)
    assert run.load("level00.pt") is run.load("level01.pt") is run.result is run.result is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # the result is read once
    assert all(x.endswith("ignoring it; the file will be regenerated") for x in lines)
    for step in (3, 6):
        run.checkpoint("level01", step, {})
    (folder / "checkpoint.pt").write_bytes(b"x")
    assert run.resume("level01")["step"] == 3 and run.resume("level00") is None
    run.finish({"ended": None, "levels": (1, 2)})
    assert run.result == runs.read_json(folder / "result.json") == runs.finished_result(folder)
    assert not (folder / "checkpoint-before.pt").exists()
    run.held.close()


# ---- the log -------------------------------------------------------------------------------------


def test_the_log_keeps_one_row_a_step_and_mends_a_torn_line(tmp_path):
    seen = []
    run, path = open_run(tmp_path), tmp_path / "log.csv"
    run.on_log = seen.append
    for step, value in ((0, 1), (10, 2), (10, 3)):
        run.log("pretrain", step, accuracy=value)
    run.log("level00", 10, loss=0.1, accuracy=None)
    expected = ["phase,step,accuracy,loss", "pretrain,0,1,", "pretrain,10,3,", "level00,10,,0.1"]
    assert path.read_text().splitlines() == expected
    row = {"replicate": 0, "phase": "pretrain", "step": 10, "accuracy": 3}
    assert seen[2] == row
    run.held.close()
    with open(path, "a") as f:
        f.write("level01,10,0.")
    assert len(runs.read_rows(path)) == 3  # as figures read a run in progress
    run = open_run(tmp_path)
    run.log("level01", 10, accuracy=0.5)
    assert path.read_text().splitlines() == [*expected, "level01,10,0.5,"]
    run.held.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"phase", b"phase,step\nlevel00,x\n", b"\xff\xfe\n1\n", b'a,b\n"' + b"x" * 200_000],
)
def test_a_damaged_log_is_named_and_a_new_one_is_begun(tmp_path, capsys, content):
    run, path = open_run(tmp_path), tmp_path / "log.csv"
    path.write_bytes(content)
    if content[:3] != b"a,b":
        with pytest.raises(UserError, match=r"log\.csv is damaged"):
            runs.read_rows(path)
    run.log("pretrain", 1, loss=2)
    assert "starting a new log" in capsys.readouterr().err or content[:3] == b"a,b"
    assert path.read_text() == "phase,step,loss\npretrain,1,2\n"
    run.held.close()


def test_a_row_is_appended_and_synced_before_a_file_follows_it(tmp_path, monkeypatch):
    calls, write, fsync = [], runs.write, os.fsync
    run = open_run(tmp_path)
    run.log("pretrain", 0, loss=1)

    def noted_write(path, fill):
        calls.append(path.name)
        write(path, fill)

    def noted_fsync(number):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    monkeypatch.setattr(runs, "write", noted_write)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    for step in range(1, 1000):
        run.log("pretrain", step, loss=1 / step)
    assert not calls
    run.checkpoint("pretrain", 1000, {})
    assert calls[:2] == ["log.csv", "checkpoint.pt"]
    rows = runs.read_rows(tmp_path / "log.csv")
    assert [int(r["step"]) for r in rows] == list(range(1000)) and rows[3]["loss"] == repr(1 / 3)
    run.held.close()


# ---- locks, other users --------------------------------------------------------------------------


def test_the_second_process_is_told_who_holds_a_folder(tmp_path, capsys):
    path = tmp_path / ".lock"
    match = rf"{tmp_path} is in use by process {os.getpid()} on \S+ since 20\d\d-\d\d-\d\d "
    with runs.lock(path):
        for _ in range(2):
            with pytest.raises(UserError, match=match), runs.lock(path):
                pass

    def hold():
        with runs.lock(path):
            time.sleep(0.5)

    pid = forked(hold)
    while not path.read_bytes():
        time.sleep(0.01)
    with runs.lock(path, wait=True):
        assert status_of(pid) == 0
    assert re.match(rf"waiting: {tmp_path} is in use by process {pid} on ", capsys.readouterr().err)


@pytest.mark.parametrize("left", [b"process 1 on another-host since 2020-01-01", b"\xff\x00", b""])
def test_a_lock_that_a_crash_left_is_taken_over(tmp_path, left):
    (tmp_path / ".lock").write_bytes(left)
    with runs.lock(tmp_path / ".lock"):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_file_systems_without_locks_or_with_read_only_ones(tmp_path, monkeypatch, capsys):
    def none(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as m:
        m.setattr(fcntl, "flock", none)
        with runs.lock(tmp_path / ".lock"):
            pass
    assert "no locks (No locks available); only one process may" in capsys.readouterr().err
    flock, asked = fcntl.flock, []

    def as_nfs(number, how):
        """flock(2), NFS details: an exclusive lock needs a file open for writing."""
        writable = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if how & fcntl.LOCK_EX and not writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        asked.append(how)
        flock(number, how)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    monkeypatch.setattr(runs, "open_lock", lambda p: os.open(p, os.O_RDONLY))
    with runs.lock(tmp_path / ".lock"):
        assert asked == [fcntl.LOCK_SH | fcntl.LOCK_NB]


def test_locks_of_another_user_that_can_be_read_are_enough(shared):
    for mode, name in ((0o777, "group"), (0o755, "read-only")):
        for lock, lock_mode in ((".old.lock", 0o644), (".private.lock", 0o600), ("none", 0)):
            (shared / name).mkdir(exist_ok=True)
            (shared / name).chmod(mode)
            if lock_mode:
                (shared / name / lock).touch()
                (shared / name / lock).chmod(lock_mode)
    locks = [p for name in ("group", "read-only") for p in (shared / name).iterdir()]
    locks += [shared / "group/.new.lock", shared / "read-only/.new.lock"]

    def hold(path, wait=True):
        with runs.lock(path, wait):
            runs.say(path)

    out = shared / "out.txt"
    with runs.lock(shared / "read-only/.other.lock"):  # by its owner, at work on something else
        status, lines = by_another_user(lambda: [hold(p) for p in locks], out)
    cannot = "cannot be opened (Permission denied); going on without a lock"
    private = [f"{p}: {cannot}" for p in locks if "private" in p.name]
    assert status == 0 and sorted(lines) == sorted([*map(str, locks), *private])
    assert not (shared / "read-only/.new.lock").exists()
    with runs.lock(shared / "read-only/.old.lock"):
        _, [line] = by_another_user(lambda: hold(shared / "read-only/.old.lock", False), out)
    assert f"{shared}/read-only is in use by process {os.getpid()} on " in line


def test_results_of_another_user_are_read_and_not_continued(shared):
    for name, levels in (("done", 3), ("begun", None)):
        run = open_run(shared / name)
        run.checkpoint("level00", 1, {"x": 1})
        if levels:
            run.finish({"levels": levels})
        run.held.close()

    def main(folder):
        run = open_run(folder, here={"torch": "1"})
        if run.result:
            return runs.say(run.result["levels"])
        run.resume("level00")

    out = shared / "out.txt"
    assert by_another_user(lambda: main(shared / "done"), out) == (0, ["3"])
    line = f"{shared}/begun can be read, not written (it belongs to user root): "
    line = f"toy.py: error: {line}another --out makes a run of your own"
    assert by_another_user(lambda: main(shared / "begun"), out) == (2, [line])
    line = f"toy.py: error: {shared}/missing: Permission denied"
    assert by_another_user(lambda: main(shared / "missing/rep0"), out) == (2, [line])


# ---- kills, signals ------------------------------------------------------------------------------


def test_an_import_that_a_signal_ends_is_an_interruption():
    """C code that is being initialised makes an ImportError of it, as scipy's does."""
    with pytest.raises(Interrupted, match="interrupted by SIGTERM"), runs.signals:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise ImportError("initialization failed") from None
    with pytest.raises(ImportError), runs.signals:
        raise ImportError("no such module")


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    """SIGKILL at each of the first file operations, half way through a write, then in between."""
    expected = toy(tmp_path / "undisturbed")
    log = (tmp_path / "undisturbed/log.csv").read_bytes()
    for first in (*range(12), 20):
        folder, kills = tmp_path / str(first), 0
        for operation in (first, first + 7, 18, 3, 31, 1000):
            crash = functools.partial(torture.crash, operation)
            status = status_of(forked(lambda f=folder: toy(f), crash))
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
        assert kills >= 3 and toy(folder) == expected
        assert (folder / "log.csv").read_bytes() == log
        names = {p.name for p in folder.iterdir()}
        assert names == {".lock", "config.json", "log.csv", "result.json"}


@pytest.fixture
def not_under_nohup():
    """Under nohup SIGHUP is ignored, by the runs as well."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, capsys, not_under_nohup, name):
    number = signal.Signals[name]
    before = [signal.getsignal(n) for n in (2, 15, 1, signal.SIGUSR1)]

    def send(step):
        if step == 7:
            for _ in range(2):  # as Slurm does, and the script around a run
                os.kill(os.getpid(), number)

    assert as_command(lambda: toy(tmp_path / "x", at_step=send)) == 128 + number
    assert capsys.readouterr().err == (
        f"toy.py: interrupted by {name} at count step 8 of 40; "
        f"count step 8 is saved in {tmp_path / 'x'}; the same command resumes\n"
    )
    assert [signal.getsignal(n) for n in (2, 15, 1, signal.SIGUSR1)] == before
    steps = []
    assert toy(tmp_path / "x", at_step=steps.append) == toy(tmp_path / "y") and steps[0] == 8


def test_a_signal_outside_a_step_or_a_second_one_leaves_at_once(tmp_path, monkeypatch, capsys):
    def between_steps():
        run = open_run(tmp_path)
        with run.held:
            signal.raise_signal(signal.SIGTERM)

    assert as_command(between_steps) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "toy.py: interrupted by SIGTERM; nothing was saved yet\n"

    def twice(step):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
            monkeypatch.setattr(runs.Signals, "TWICE", 0)
            signal.raise_signal(signal.SIGINT)

    assert as_command(lambda: toy(tmp_path, at_step=twice)) == 128 + signal.SIGTERM
    line = f"interrupted by SIGTERM; count step 3 is saved in {tmp_path}; the same command resumes"
    assert capsys.readouterr().err == f"toy.py: {line}\n"


def test_nohup_is_respected_and_nesting_restores_handlers():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runs.signals, runs.signals:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is runs.signals
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_notebook_shows_one_sentence():
    """What IPython does with an exception: ask it for its own traceback."""
    assert Interrupted(signal.SIGINT)._render_traceback_() == [
        "interrupted by SIGINT; nothing was saved yet"
    ]
    assert UserError("--lr: too large")._render_traceback_() == ["--lr: too large"]
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    shell.user_ns["runs"] = runs
    for cell in ("raise runs.Interrupted(2)", "raise runs.UserError('--lr: too large')"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            shell.run_cell(cell)
        assert len(out.getvalue().splitlines()) == 1 and "Traceback" not in out.getvalue()


# ---- printing ------------------------------------------------------------------------------------


def test_nothing_printed_ends_a_run(tmp_path):
    """A reader that has left, a full disk, an ASCII terminal, closed streams: status 0, no
    traceback, and the result is there."""
    script = tmp_path / "toy.py"
    script.write_text(f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import runs, test_runs
from pathlib import Path
def main(args):
    test_runs.toy(Path(sys.argv[1]))
    with runs.progress_bar(2, quiet=False) as bar:
        bar.update(2)
    runs.warn("größer")
    for k in range(20000):
        runs.say("größer ± 1")
class parser: prog = "toy.py"; parse_args = lambda: None
runs.run_stage(main, parser)
""")
    for name, redirect in {
        "head": "2>&1 | head -n 1 >$0/head.txt",
        "full": ">/dev/full 2>/dev/full",
        "closed": ">&- 2>&-",
        "ascii": ">$0/ascii.txt 2>&1",
    }.items():
        if name == "full" and not Path("/dev/full").exists():
            continue
        command = f"set -o pipefail; {sys.executable} $0/toy.py $0/{name} {redirect}"
        ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["bash", "-c", command, str(tmp_path)], env=ascii_only, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), name
        assert (tmp_path / name / "result.json").exists()
    lines = (tmp_path / "ascii.txt").read_text().splitlines()
    assert lines[-20001] == "gr??er" and lines[-20000:] == ["gr??er ? 1"] * 20000


def test_say_replaces_what_an_encoding_lacks_also_in_a_function_call(monkeypatch):
    for encoding, expected in (("ascii", b"5 ? 1\n"), ("latin-1", b"5 \xb1 1\n")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        runs.say("5 ± 1")
        assert stream.buffer.getvalue() == expected
    monkeypatch.setattr(sys, "stdout", None)
    runs.say("nobody listens")


def test_progress_off_a_terminal_is_lines(capsys):
    with runs.progress_bar(3, quiet=False, unit=" images", desc="decoding") as bar:
        runs.skip(bar, 1)
        for _ in range(2):
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 3 and "\r" not in "".join(lines)  # the first, the last, nothing
    assert lines[1].startswith("decoding: 100%|") and "3/3 [" in lines[1] and "images/s" in lines[1]
    runs.progress_bar(3, quiet=True).close()
    assert capsys.readouterr().err == ""


def test_what_the_user_can_mend_is_one_line(tmp_path, capsys):
    def lacking():
        (tmp_path / "none/x").read_bytes()

    def raising(e):
        def fail():
            raise e

        return fail

    for main, line in {
        raising(UserError("--lr 9:\n too large")): "error: --lr 9: too large",
        lacking: f"error: {tmp_path}/none/x: No such file or directory",
        raising(MemoryError()): "error: not enough memory (MemoryError)",
    }.items():
        assert as_command(main) == 2
        assert capsys.readouterr().err == f"toy.py: {line}\n"
    with pytest.raises(ZeroDivisionError):
        as_command(lambda: 1 / 0)


def test_without_fcntl_one_line_names_wsl():
    code = "import sys; sys.modules['fcntl'] = None; import runs"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "WSL" in done.stderr
