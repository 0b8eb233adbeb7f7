"""run_all.sh: waves and costs (its grid: test_grid.py), the shell's pitfalls, interruption, a real Slurm."""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common
import el2n
import imp
import lmc
import pretrain
import warmup

ROOT = Path(common.__file__).resolve().parent
SCRIPT = ROOT / "run_all.sh"
ENV = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
# A run of the embedded digits that takes seconds; what the tests call with --grid.
TINY = "steps=60 levels=1 R=0-1 tail=-steps60 extra=(--steps=60)\nuse digits digits\n"


def run(*args: object, cwd: Path = ROOT, **kwargs) -> subprocess.CompletedProcess:
    told = {"env": ENV, "capture_output": True, "text": True, "cwd": cwd, "timeout": 300}
    return subprocess.run(["bash", SCRIPT, *map(str, args)], **told | kwargs)


def listed(*args: str) -> list[tuple[str, argparse.Namespace]]:
    """(stage, its arguments) of every line of --list but figures.py; the stage's own parser reads
    them, so that a flag that does not exist fails."""
    done = run("--list", *args)
    assert done.returncode == 0, done.stderr
    found = []
    for line in done.stdout.splitlines():
        _, script, *rest = shlex.split(line)
        stages = {"el2n": el2n, "imp": imp, "lmc": lmc, "pretrain": pretrain, "warmup": warmup}
        if (stage := Path(script).stem) != "figures":
            found.append((stage, stages[stage].flags().parse_args(rest)))
    return found


def grid(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "grid.sh"
    path.write_text(text)
    return path


STUB = """import pathlib, os, sys, time
flags = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
out = pathlib.Path(flags["--out"])
with open(out / "calls", "a") as f:
    print(flags["--name"], os.environ.get("CUDA_VISIBLE_DEVICES"), file=f)
if flags["--name"] == "bad":
    sys.exit("the stub was told to fail")
time.sleep(float(flags.get("--sleep", 0)))
for r in ["rep0"] if "--replicate" in flags else ["."]:
    (out / flags["--name"] / r).mkdir(parents=True, exist_ok=True)
    (out / flags["--name"] / r / "result.json").write_text('{\\n "levels": []\\n}')
    (out / flags["--name"] / r / "scores.npy").write_text("x")
"""


def stub(tmp_path: Path, *jobs: tuple[str, str], more: str = "") -> Path:
    """A grid of stubs: (name, needs)."""
    (tmp_path / "stub.py").write_text(STUB)
    script = shlex.quote(str(tmp_path / "stub.py"))
    lines = [f"job {n} '{needs}' fig2 0 1 0 {script} --name={n} {more}" for n, needs in jobs]
    return grid(tmp_path, "\n".join(lines) + "\n")


# ---- the grid ------------------------------------------------------------------------------------


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_cost_is_table_1():
    """Network-steps against common.PRESETS; the script holds a table of its own. CIFAR-10: 54
    curves rewind to step 200, 3 to 400, 1 to 0. CINIC-10: 10 to 200, 21 to 400, 1 to 0 and 800."""
    lines = run("--cost", "--out", "nowhere").stdout.splitlines()
    told = {x[0]: x[1:4] for x in map(str.split, lines)}
    for model, counts in (
        ("cifar10-resnet20", {200: 54, 400: 3, 0: 1}),
        ("cifar100-resnet32", {400: 23, 800: 1, 0: 1}),
        ("cinic10-resnet56", {200: 10, 400: 21, 0: 1, 800: 1}),
    ):
        p, n = common.PRESETS[model.split("-")[0]], sum(counts.values())
        assert model.endswith(f"resnet{p.depth}")
        steps = sum(n * 4 * (t + (p.levels + 1) * (p.steps - t)) for t, n in counts.items())
        assert told[f"imp/{model}"] == [str(n), str(4 * n), str(steps)]
    p = common.PRESETS["cinic10"]
    assert told["el2n/cinic10-resnet56"][2] == str(p.networks * (p.score_step + 1600))
    p = common.PRESETS["cifar10"]  # clean, 10 % and 50 % noise, and forgetting
    steps = 3 * p.networks * p.score_step + 4 * p.steps
    assert told["el2n/cifar10-resnet20"][2] == str(steps)
    steps = warmup.OURS["cifar10-warmup"].steps
    assert told["warmup/cifar10-resnet20"] == ["127", "1016", str(1016 * steps)]


def test_waves():
    waves = [listed("--wave", str(w), "--dataset", "cinic10") for w in (1, 2, 3)]
    assert {s for s, _ in waves[0]} == {"el2n"}
    by = [a for w in waves for _, a in w if "lmc" in str(getattr(a, "scores", None))]
    assert [a for _, a in waves[2]] == by and len(by) == 14


def test_spread_and_unknown():
    assert {a.replicate for s, a in listed("--spread", "--only", "fig2") if s == "imp"} == {
        (0,), (1,), (2,), (3,)
    }  # fmt: skip
    for wrong in (
        ["--only", "fig99"],
        ["--dataset", "nowhere"],
        ["--jobs", "x"],
        ["--huh"],
        ["--out"],
    ):
        done = run("--list", *wrong)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, wrong


# ---- on this machine -----------------------------------------------------------------------------


def test_names_are_never_code(tmp_path):
    """A folder name full of shell: a line of --list works in `bash -c` and makes nothing else."""
    out = "-o $(touch pwned) `touch pwned` 'q\" ;touch pwned; é"
    path = grid(
        tmp_path,
        TINY.replace("R=0-1", "R=0").replace("levels=1", "levels=0") + "imp fig2 all - 0\n",
    )
    [line, _] = run("--list", "--grid", path, "--out", out, cwd=tmp_path).stdout.splitlines()
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / out / "imp/digits-resnet8/all-rewind0-steps60/rep0/result.json").exists()
    again = run("--grid", path, "--out", out, cwd=tmp_path)
    assert again.returncode == 0 and "start" not in again.stderr, again.stderr
    assert {p.name for p in tmp_path.iterdir()} == {out, "grid.sh"}


def test_a_failure_is_told_and_stops_no_other(tmp_path):
    path = stub(tmp_path, ("bad", ""), ("good", ""), ("child", "bad"), ("other", "good"))
    done = run("--grid", path, "--out", tmp_path / "o", "--jobs", "2", "--gpus", "4,7")
    assert done.returncode == 1
    assert "FAILED" in done.stdout and "--name=bad" in done.stdout and "bad,rep" not in done.stderr
    assert "WAITS" in done.stdout and "--name=child" in done.stdout
    log = next((tmp_path / "o/logs").glob("bad*.log"))
    assert f"log: {log}" in done.stdout and "told to fail" in log.read_text()
    calls = dict(x.split() for x in (tmp_path / "o/calls").read_text().splitlines())
    assert set(calls) == {"bad", "good", "other"} and {calls["bad"], calls["good"]} == {"4", "7"}
    run("--grid", path, "--out", tmp_path / "o")
    calls = [x.split()[0] for x in (tmp_path / "o/calls").read_text().splitlines()]
    assert calls[3:] == ["bad"], "only what failed runs again"


def test_ctrl_c_saves_and_goes_on(tmp_path):
    path = grid(tmp_path, TINY.replace("60", "900").replace("R=0-1", "R=0") + "imp fig2 all - 0\n")
    command = ["bash", SCRIPT, "--grid", path, "--out", tmp_path / "o"]
    folder = tmp_path / "o/imp/digits-resnet8/all-rewind0-steps900/rep0"
    ours = {"env": ENV, "cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    ours["preexec_fn"] = heed_ctrl_c
    with subprocess.Popen(command, **ours) as p:
        wait_for((folder / "pretrained.pt").exists)
        time.sleep(1)
        p.send_signal(signal.SIGINT)
        _, told = p.communicate(timeout=60)
    assert p.returncode == 130 and "goes on from here" in told
    common.lock(folder / ".lock").__enter__()  # nobody holds it: the child has ended
    assert (folder / "checkpoint.pt").exists() and not (folder / "level00.pt").exists()
    assert run(*command[2:]).returncode == 0
    assert levels(folder) == levels(
        direct(tmp_path, "--steps", "900", "--subset", "all", "--rewind", "0")
    )


def heed_ctrl_c() -> None:
    """What a shell started in the background ignores, its children ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def direct(tmp_path: Path, *flags: str) -> Path:
    """The folder of replicate 0 of the same run, uninterrupted."""
    out = tmp_path / "direct"
    command = [sys.executable, ROOT / "imp.py", "--levels", "1", "--quiet", "--out", out, *flags]
    subprocess.run(command, check=True, env=ENV, capture_output=True)
    return next(out.glob("imp/*/*/rep0"))


def levels(folder: Path) -> list[str]:
    """Fingerprints of mask and final weights of each level."""
    states = [common.read_tensors(p) for p in sorted(folder.glob("level*.pt"))]
    return [common.fingerprint(s["mask"], s["weights"], s["batchnorm"]) for s in states]


# ---- on a real Slurm -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A private one-node Slurm with four pretended cores; its environment."""
    up = Path(os.environ.get("SLURM_UP") or ROOT.parent / "shared/slurm/up.sh")
    if not up.exists():
        pytest.skip(f"no {up} to start a Slurm with (SLURM_UP names it)")
    if os.getuid() or not shutil.which("sbatch") or not shutil.which("munged"):
        pytest.skip("no Slurm here, or not root: apt-get install slurm-wlm munge")
    folder = Path("/tmp") / f"slurm-{os.getpid()}"  # a socket's path must be short
    done = subprocess.run(
        [up, folder], env={**os.environ, "SLURM_UP_CPUS": "4"}, capture_output=True
    )
    if done.returncode:
        pytest.skip(f"Slurm does not start: {done.stderr.decode().strip()[-200:]}")
    yield {**ENV, "SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run([up.with_name("down.sh"), folder], capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


def queue(env: dict, what: str = "%i %T") -> list[str]:
    command = ["squeue", "-h", "-r", "-o", what]
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout.splitlines()


def test_slurm_failing_parent_and_second_submission(slurm, tmp_path):
    jobs = [("good", ""), ("bad", ""), ("child", "bad"), ("grandchild", "child"), ("other", "good")]
    path, out = stub(tmp_path, *jobs), tmp_path / "o u't"
    out.mkdir()
    args = ["--slurm", "--grid", path, "--out", out, "--partition", "main", "--time", "5"]
    done = run(*args, env=slurm)
    assert done.returncode == 0, done.stderr
    assert "5 runs submitted" in done.stdout and "2 runs" in done.stdout.splitlines()[0]
    wait_for(lambda: not queue(slurm))
    called = [x.split()[0] for x in (out / "calls").read_text().splitlines()]
    assert sorted(called) == ["bad", "good", "other"]  # what needs the failed one was cancelled
    assert (out / "other/rep0/result.json").exists()
    again = run(*args, env=slurm)
    assert "3 runs submitted, 0 queued before, 2 finished" in again.stdout
    assert "again: bad" in again.stdout
    wait_for(lambda: not queue(slurm))
    done = run(
        "--slurm",
        "--grid",
        stub(tmp_path, ("good", ""), ("other", "good")),
        "--out",
        out,
        env=slurm,
    )
    assert done.stdout.strip() == "0 runs submitted, 0 queued before, 2 finished" and not queue(
        slurm
    )


def test_slurm_requeue_within_a_level(slurm, tmp_path):
    """Requeued in the middle of a level, a run ends with the bits of an undisturbed one; submitting
    again meanwhile does nothing."""
    path = grid(tmp_path, TINY.replace("60", "900").replace("R=0-1", "R=0") + "imp fig2 all - 0\n")
    args = ["--slurm", "--grid", path, "--out", tmp_path / "o"]
    assert "1 runs submitted" in run(*args, env=slurm).stdout
    folder = tmp_path / "o/imp/digits-resnet8/all-rewind0-steps900/rep0"
    wait_for((folder / "pretrained.pt").exists)
    time.sleep(1)
    [job] = [x.split()[0] for x in queue(slurm) if "RUNNING" in x]
    subprocess.run(["scontrol", "requeue", job], env=slurm, check=True)
    wait_for(lambda: any(x.startswith(job) and "PENDING" in x for x in queue(slurm)))
    wait_for((folder / "checkpoint.pt").exists, 20)
    assert not (folder / "level00.pt").exists()
    assert "0 runs submitted, 1 queued before" in run(*args, env=slurm).stdout
    plain = levels(direct(tmp_path, "--steps", "900", "--subset", "all", "--rewind", "0"))
    wait_for(lambda: not queue(slurm))
    [log] = (tmp_path / "o/slurm").glob(f"{job}.log")
    assert log.read_text().count("# 20") == 2, "one log of both attempts"
    assert len(plain) == 2 and levels(folder) == plain


def test_slurm_saves_before_the_time_limit(slurm, tmp_path):
    """The signal before the limit makes a run save itself and queue again (sent here by hand)."""
    path = grid(tmp_path, TINY.replace("60", "900").replace("R=0-1", "R=0") + "imp fig2 all - 0\n")
    run("--slurm", "--grid", path, "--out", tmp_path / "o", env=slurm)
    folder = tmp_path / "o/imp/digits-resnet8/all-rewind0-steps900/rep0"
    wait_for((folder / "pretrained.pt").exists)
    time.sleep(1)
    [job] = [x.split()[0] for x in queue(slurm) if "RUNNING" in x]
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=slurm, check=True)
    wait_for(lambda: any(x.startswith(job) and "PENDING" in x for x in queue(slurm)))
    wait_for((folder / "checkpoint.pt").exists, 20)
    subprocess.run(["scancel", "--user", "root"], env=slurm)
    wait_for(lambda: not queue(slurm))


def test_quick_is_the_whole_program():
    """Every stage and figure on the digits; the run itself is too long for a test."""
    runs = listed("--quick")
    assert {s for s, _ in runs} == {"el2n", "imp", "lmc", "pretrain", "warmup"}
    assert {a.dataset for _, a in runs} == {"digits"}
    subsets = {a.subset for s, a in runs if s == "imp"}
    assert subsets == {"all", "easy", "hard", "random"}
