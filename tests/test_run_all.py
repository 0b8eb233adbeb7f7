"""run_all.sh: where it runs, failures, signals, a real Slurm. Its table of runs: test_grid.py."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
SHELL = "-o $(touch pwned) `touch pwned` 'q\" ;touch pwned; é"  # a name that must not be executed
# One run that fails, on which one depends, and one that succeeds, on which one depends.
GOOD, BAD = "lmc/digits-resnet8/all", "lmc/digits-resnet8/random-13"
CHILD = "imp/digits-resnet8/easy-40"
FAMILY = f"""
2 fig2 lmc digits --subset=all
2 fig2 lmc digits --subset=random --size=13
3 fig2 imp digits --subset=easy --size=30 --scores=RESULTS/{BAD}/scores.npy
3 fig2 imp digits --subset=easy --size=40 --scores=RESULTS/{GOOD}/scores.npy
"""
LONG, WAITING = "imp/digits-resnet8/hard-14", "imp/digits-resnet8/hard-15"


@pytest.fixture
def project(tmp_path):
    """A copy of run_all.sh and grid.py whose stages are tests/fake_stage.py: project(FLAG...)."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("el2n", "imp", "lmc", "pretrain", "warmup", "figures"):
        shutil.copy(ROOT / "tests/fake_stage.py", folder / f"{name}.py")
    for name in ("run_all.sh", "grid.py", "grid.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "runs.py").write_text("class UserError(Exception): pass\n")

    def run(*words, grid="", env=ENV, cwd=folder, script=folder / "run_all.sh", **more):
        (folder / "own.txt").write_text(grid)
        flags = [*(["--grid", folder / "own.txt"] if grid else []), *words]
        command = ["bash", script, *map(str, flags)]
        if more.pop("wait", True):
            return subprocess.run(
                command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120
            )
        return subprocess.Popen(command, env=env, cwd=cwd, stderr=-1, text=True, **more)

    run.folder = folder
    return run


def calls(out: Path) -> list[list[str]]:
    """[folder, CUDA_VISIBLE_DEVICES] of each stage that ran."""
    path = out / "calls"
    return [x.rsplit(" ", 1) for x in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


# ---- where it is called --------------------------------------------------------------------------


def test_shellcheck():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip("shellcheck is not installed")
    files = [ROOT / name for name in ("run_all.sh", "bench/card.sh", ".ci/run")]
    files = [f for f in files if f.exists()]
    done = subprocess.run([found, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_finds_itself(project, tmp_path):
    """With CDPATH set, and through relative and absolute symbolic links."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/runs").symlink_to("../project/run_all.sh")
    (tmp_path / "link").symlink_to(tmp_path / "bin/runs")
    for script in ("project/run_all.sh", "bin/runs", "link"):
        for env in (ENV, ENV | {"CDPATH": f".:/:{tmp_path}"}):
            done = project("--list", "--only=fig2", cwd=tmp_path, script=script, env=env)
            command = shlex.split(done.stdout.splitlines()[0])
            assert command[:2] == [sys.executable, str(project.folder / "el2n.py")], done.stderr


def test_it_finds_a_python_with_torch(project, tmp_path):
    """PYTHON alone, else an active environment, .venv beside the script, python3, python."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "nproc", "readlink"):
        (tools / name).symlink_to(shutil.which(name))
    python = tmp_path / "env/bin/python"
    for path, exits in ((tools / "python3", 1), (python, 0)):
        path.parent.mkdir(parents=True, exist_ok=True)
        body = f'exec {sys.executable} "$@"' if exits == 0 else "exit 1"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    for env, said in (
        ({}, "tried .venv/bin/python python3 python. PYTHON="),
        ({"PYTHON": "python3"}, "tried python3. PYTHON="),
        ({"VIRTUAL_ENV": "/gone"}, "tried /gone/bin/python .venv/bin/python python3 python."),
    ):
        done = project("--list", env={"PATH": str(tools), **env})
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert said in done.stderr
    env = {"PATH": str(tools), "VIRTUAL_ENV": str(tmp_path / "env")}
    assert project("--list", env=env).stdout.startswith(f"{python} el2n.py")
    python.parent.parent.rename(project.folder / ".venv")
    assert project("--list", env=env).stdout.startswith(".venv/bin/python el2n.py")


def test_a_tilde_is_the_home_folder(project, tmp_path):
    env = ENV | {"HOME": "/home/me"}
    for flag in (["--out=~/x"], ["--out", "~/x/"], ["--data-dir=~"]):
        last = project("--list", *flag, "--only=fig2", env=env).stdout.splitlines()[0]
        assert {"--out=/home/me/x", "--data-dir=/home/me"} & {*last.split()}, last


def test_mistakes_are_one_line(project):
    """Beside those of test_mistakes.py."""
    for wrong in (
        ["--only", "fig2,fig99"],
        ["--only", "fig7", "--dataset", "cifar10"],
        ["--out", "two\nlines"],
        ["--wave", "5"],
        ["--slurm"],
        ["--rate", "0"],
        ["--partition", "gpu"],
        ["--gpus", "0-3"],
        ["--out", ""],
        ["--only="],
        ["--quick", "--dataset", "cifar10"],
        ["--preset", "cifar100"],
    ):
        done = project("--list", *wrong)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), wrong


# ---- on this machine -----------------------------------------------------------------------------


def test_a_failure_blocks_only_what_needs_it(project, tmp_path):
    """Two GPUs and two at a time; names that the shell could execute; again, only what failed."""
    out = tmp_path / SHELL
    flags = {"grid": FAMILY, "cwd": tmp_path}
    done = project("--out", SHELL, "--jobs", "2", "--gpus", "4,7", **flags)
    assert done.returncode == 1
    drawn, failed, log, blocked, needed = done.stdout.splitlines()
    assert drawn == f"drawn --out={SHELL}"
    assert failed.startswith("FAILED  ") and "--size=13" in failed
    assert blocked.startswith("BLOCKED ") and "--size=30" in blocked
    assert needed.endswith(f"by: {BAD}")
    assert "13 brings bad luck" in (tmp_path / log.split("log: ")[1]).read_text()
    found = dict(calls(out))
    assert set(found) == {GOOD, BAD, CHILD} and {found[GOOD], found[BAD]} == {"4", "7"}
    done = project("--out", SHELL, **flags)
    assert "2 runs to do, 2 finished before" in done.stderr
    assert [x[0] for x in calls(out)[3:]] == [BAD]
    line = project("--list", "--out", SHELL, **flags).stdout.splitlines()[0]
    command = ["bash", "-c", f"printf '%s\\n' {line}"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert said.splitlines() == shlex.split(line) and f"--out={SHELL}" in said
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_runs(project, tmp_path, sent, status):
    """They save their state, and the same command resumes them."""
    grid, folder = "2 fig2 imp digits --subset=hard --size=14\n", LONG
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with project("--out", tmp_path, grid=grid, wait=False, **heed) as p:
        wait_for((tmp_path / folder).exists)
        time.sleep(0.3)
        p.send_signal(sent)
        _, messages = p.communicate(timeout=20)
    assert p.returncode == status and "resumes" in messages
    assert (tmp_path / folder / "saved").exists() and not (tmp_path / folder / "done").exists()
    assert project("--out", tmp_path, grid=grid).returncode == 0
    assert (tmp_path / folder / "done").exists()


# ---- on a real Slurm -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm():
    """A private one-node Slurm of four cores; what it adds to an environment."""
    up = Path(os.environ.get("SLURM_UP") or ROOT.parent / "shared/slurm/up.sh")
    if not up.exists():
        pytest.skip(f"no {up} to start a Slurm with (SLURM_UP names it)")
    if os.getuid() or not shutil.which("sbatch") or not shutil.which("munged"):
        pytest.skip("no Slurm here, or not root: apt-get install slurm-wlm munge")
    folder = Path("/tmp") / f"slurm-{os.getpid()}"  # a socket's path must be short
    env = {**os.environ, "SLURM_UP_CPUS": "4"}
    done = subprocess.run([up, folder], env=env, capture_output=True)
    if done.returncode:
        pytest.skip(f"Slurm does not start: {done.stderr.decode().strip()[-200:]}")
    more = "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n"
    more += "PartitionName=urgent Nodes=ALL PriorityTier=9\n"
    with open(folder / "slurm.conf", "a") as f:
        f.write(more)
    slurm = {"SLURM_CONF": str(folder / "slurm.conf")}
    ask(slurm, "scontrol", "reconfigure")
    yield slurm
    subprocess.run([up.with_name("down.sh"), folder], capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


def ask(slurm: dict, *command: str) -> list[str]:
    done = subprocess.run(command, env=os.environ | slurm, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def queue(slurm: dict) -> dict[str, tuple[str, str]]:
    """ARRAY_ELEMENT -> (job id, state)."""
    rows = (x.split() for x in ask(slurm, "squeue", "-h", "-r", "-o", "%i %A %T"))
    return {element: (job, state) for element, job, state in rows}


def test_slurm_failed_scores_and_a_second_submission(slurm, project, tmp_path):
    out = tmp_path / "o u't"
    out.mkdir()
    flags = ["--slurm", "--out", out, "--partition", "main", "--time", "5"]
    done = project(*flags, grid=FAMILY, env=ENV | slurm)
    assert "4 runs submitted" in done.stdout and "2 runs" in done.stdout.splitlines()[0]
    wait_for(lambda: not queue(slurm))
    assert sorted(x[0] for x in calls(out)) == sorted([GOOD, BAD, CHILD])  # the other cancelled
    assert "drawn" in (out / "slurm/figures.log").read_text()
    again = project(*flags, grid=FAMILY, env=ENV | slurm).stdout
    assert "2 runs submitted, 0 queued before, 2 finished" in again and f"again: {BAD}" in again
    wait_for(lambda: not queue(slurm))


TWO = "2 fig2 imp digits --subset=hard --size=15\n2 fig2 imp digits --subset=hard --size=14\n"


def start_two(slurm, project, out: Path) -> tuple[str, str]:
    """Two elements of one array: LONG, whose job id is that of the array, and WAITING."""
    said = project("--slurm", "--out", out, grid=TWO, env=ENV | slurm).stdout
    job = said.split()[1].rstrip(":")
    wait_for(lambda: len(calls(out)) == 2)
    return f"{job}_1", f"{job}_0"


def test_slurm_an_element_requeues_itself_alone(slurm, project, tmp_path):
    """At the signal before the time limit (here by scancel); submitted again, nothing happens."""
    element, other = start_two(slurm, project, tmp_path)
    jobs = {x: job for x, (job, _) in queue(slurm).items()}
    assert jobs[element] == element.split("_")[0] != jobs[other]
    ask(slurm, "scancel", "--batch", "--signal=USR1", element)
    wait_for(lambda: queue(slurm)[element][1] == "PENDING")
    assert (tmp_path / LONG / "saved").exists() and queue(slurm)[other][1] == "RUNNING"
    again = project("--slurm", "--out", tmp_path, grid=TWO, env=ENV | slurm).stdout
    assert again == "0 runs submitted, 2 queued before, 0 finished\n"
    (tmp_path / "go").touch()
    wait_for(lambda: not queue(slurm))
    started = [x[0] for x in calls(tmp_path)]
    assert (started.count(LONG), started.count(WAITING)) == (2, 1)
    assert all((tmp_path / folder / "done").exists() for folder in (LONG, WAITING))
    log = (tmp_path / f"slurm/{element}.log").read_text()
    assert log.count("# 20") == 2, "one log of both attempts"


def test_slurm_scancel_preemption_and_a_failing_node(slurm, project, tmp_path):
    """Cancelled, a run saves its state and stays away; the others are queued again."""
    element, other = start_two(slurm, project, tmp_path)
    ask(slurm, "scancel", element)
    wait_for(lambda: element not in queue(slurm))
    assert (tmp_path / LONG / "saved").exists()
    ask(slurm, "sbatch", "-p", "urgent", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait_for(lambda: queue(slurm)[other][1] == "PENDING")
    assert (tmp_path / WAITING / "saved").exists()
    wait_for(lambda: queue(slurm)[other][1] == "RUNNING")
    wait_for(lambda: len(calls(tmp_path)) == 3)
    [node] = ask(slurm, "sinfo", "-h", "-p", "main", "-o", "%n")
    ask(slurm, "scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    wait_for(lambda: queue(slurm)[other][1] == "PENDING")
    resume = ["scontrol", "update", f"nodename={node}", "state=resume"]
    subprocess.run(resume, env=os.environ | slurm, capture_output=True)  # unless it is back already
    (tmp_path / "go").touch()
    wait_for(lambda: not queue(slurm))
    assert [x[0] for x in calls(tmp_path)].count(WAITING) == 3
    assert (tmp_path / WAITING / "done").exists()


def test_a_time_limit_that_leaves_no_time(project, tmp_path):
    """An element that is stopped in its first minute three times is not queued a fourth time."""
    jobs = tmp_path / "jobs"
    jobs.write_text(
        f"{sys.executable} imp.py --dataset=digits --subset=hard --size=14 --out={tmp_path}\n"
    )
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho scontrol $*\n")
    (tmp_path / "scontrol").chmod(0o755)
    env = ENV | {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    env |= {"PATH": f"{tmp_path}:{ENV['PATH']}"}
    for restarts, said in (("2", "scontrol requeue 7_0"), ("3", "--time")):
        saved = tmp_path / LONG / "saved"
        saved.unlink(missing_ok=True)
        started = len(calls(tmp_path))
        env |= {"SLURM_RESTART_COUNT": restarts}
        with project("--task", jobs, env=env, wait=False, stdout=-1) as p:
            wait_for(lambda n=started: len(calls(tmp_path)) > n)
            time.sleep(0.3)
            p.send_signal(signal.SIGUSR1)
            printed = "".join(p.communicate(timeout=20))
        assert said in printed and saved.exists()


def test_slurm_requeue_gives_the_same_bits(slurm, tmp_path):
    """A real run, requeued in the middle of a level, and one that is never interrupted."""
    small = "--width=4 --batch-size=16 --steps=400 --levels=0 --rewind=0 --subset=all --replicate=0"
    (tmp_path / "grid.txt").write_text(f"2 fig2 imp digits {small}\n")
    level = "imp/digits-resnet8x4/all-rewind0-steps400-batch16/rep0/level00.pt"
    alone = [sys.executable, ROOT / "imp.py", *small.split(), "--quiet", "--out", tmp_path / "a"]
    subprocess.run(alone, check=True, env=ENV, cwd=ROOT)
    flags = ["--slurm", "--grid", tmp_path / "grid.txt", "--out", tmp_path / "b"]
    command = ["bash", ROOT / "run_all.sh", *flags]
    subprocess.run(command, check=True, env=ENV | slurm, cwd=ROOT)
    wait_for((tmp_path / "b" / level).with_name("pretrained.pt").exists)
    time.sleep(0.2)
    [element] = [x for x, (_, state) in queue(slurm).items() if state == "RUNNING"]
    ask(slurm, "scancel", "--batch", "--signal=USR1", element)
    wait_for((tmp_path / "b" / level).with_name("checkpoint.pt").exists, 20)
    wait_for(lambda: not queue(slurm))
    first, second = (runs.read_tensors(tmp_path / x / level)["model"] for x in "ab")
    assert all(first[k].equal(second[k]) for k in first) and first.keys() == second.keys()
