"""run_all.sh (its grid: test_grid.py): the shell's pitfalls, failures, Ctrl-C, a real Slurm."""

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
import runs

ROOT = Path(common.__file__).resolve().parent
SCRIPT = ROOT / "run_all.sh"
REAL = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
FAKE = {**os.environ, "PYTHON": str(ROOT / "tests/fake_python.py")}
# A run of the embedded digits to be interrupted in its only level.
SMALL = ["--width=4", "--batch-size=16"]
LONG = f"""extra=({" ".join(SMALL)} --steps=800) levels=0 R=0
use digits digits
imp fig2 all - 0
"""
FOLDER = "imp/digits-resnet8x4/all-rewind0-steps800-batch16/rep0"
SHELL = "-o $(touch pwned) `touch pwned` 'q\" ;touch pwned; é"  # a name that is never run
# One run that fails, on which one depends, and one that succeeds, on which one depends.
FAMILY = """use digits digits
lmc fig2 all - 20; good=$made
lmc fig2 random 13 20; bad=$made
scores=$bad imp fig2 easy 30 20
scores=$good imp fig2 easy 40 20
"""
GOOD, BAD = "lmc/digits/subsetall-rewind20", "lmc/digits/subsetrandom-size13-rewind20"
CHILD = "imp/digits/subseteasy-size40-rewind20-subsetall-rewind20"


def run(*args: object, env: dict = FAKE, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = ["bash", SCRIPT, *map(str, args)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


def grid(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "grid.sh"
    path.write_text(text)
    return path


def calls(out: Path) -> list[list[str]]:
    """[folder, CUDA_VISIBLE_DEVICES] of each stage that the fake Python ran."""
    return [line.split() for line in (out / "calls").read_text().splitlines()]


def wait_for(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    """Fingerprint of the network that LONG's run trains when nothing interrupts it."""
    out = tmp_path_factory.mktemp("undisturbed")
    flags = ["--steps=800", "--subset=all", "--rewind=0", "--levels=0", "--quiet", "--out", out]
    command = [sys.executable, ROOT / "imp.py", *flags, *SMALL]
    subprocess.run(command, check=True, env=REAL, cwd=ROOT)
    return trained(out / FOLDER)


def trained(folder: Path) -> str:
    return runs.fingerprint(runs.read_tensors(folder / "level00.pt")["model"])


# ---- commands ------------------------------------------------------------------------------------


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    files = [SCRIPT, *map(ROOT.joinpath, (".ci/run", "bench/card.sh", "paper/ours/half/grid.sh"))]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_mistakes_are_one_line():
    """Beside those of test_mistakes.py."""
    for wrong in (
        ["--only", "fig2,fig99"],
        ["--only", "fig7", "--dataset", "cifar10"],
        ["--out", "two\nlines"],
    ):
        done = run("--list", *wrong)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), wrong


def test_a_folder_of_images_takes_a_grid(tmp_path):
    lines = run("--list", "--dataset", tmp_path, "--preset", "cifar100", "--only", "fig2").stdout
    assert lines.count(f"--dataset={tmp_path} --preset=cifar100 ") == 7
    last = ["fig2", f"--dataset={tmp_path.name}", "--out=results"]
    assert lines.splitlines()[-1].split()[2:] == last


def test_the_half_size_grid():
    """paper/ours/half/grid.sh: pruning and children of six starts, three by scores of its own."""
    lines = run("--list", "--grid", "paper/ours/half/grid.sh").stdout.splitlines()
    assert ["el2n.py" in x for x in lines] == [True] + 13 * [False]
    assert sum("imp.py" in x and "--prune-fraction=0.65" in x for x in lines) == 6
    assert sum("lmc.py" in x and "--replicate=2-3" in x for x in lines) == 6
    ranked = [x for x in lines if "--subset=easy" in x or "--subset=hard" in x]
    assert ranked == [x for x in lines if "--scores=" in x] and len(ranked) == 4


def test_cost_is_table_1():
    """Network-steps in closed form from common.PRESETS. CIFAR-10: 54 curves rewind to step 200, 3
    to 400, 1 to 0; CIFAR-100: 23 to 400; CINIC-10: 10 to 200, 21 to 400."""
    lines = run("--cost", "--out", "nowhere", env=REAL).stdout.splitlines()
    cost = {x[0]: x[1:4] for x in map(str.split, lines)}
    for model, counts in (
        ("cifar10-resnet20", {200: 54, 400: 3, 0: 1}),
        ("cifar100-resnet32", {400: 23, 800: 1, 0: 1}),
        ("cinic10-resnet56", {200: 10, 400: 21, 0: 1, 800: 1}),
    ):
        p, n = common.PRESETS[model.split("-")[0]], sum(counts.values())
        steps = sum(n * 4 * (t + (p.levels + 1) * (p.steps - t)) for t, n in counts.items())
        assert cost[f"imp/{model}"] == [str(n), str(4 * n), str(steps)]
    p = common.PRESETS["cifar10"]  # clean, 10 % and 50 % noise, and forgetting
    assert cost["el2n/cifar10-resnet20"][2] == str(3 * 10 * p.score_step + 4 * p.steps)
    assert cost["warmup/cifar10-resnet20"] == ["127", "1016", str(1016 * 7840)]


# ---- on this machine -----------------------------------------------------------------------------


def test_a_failure_stops_only_what_needs_it(tmp_path):
    path, out = grid(tmp_path, FAMILY), tmp_path / "o"
    done = run("--grid", path, "--out", out, "--jobs", "2", "--gpus", "4,7")
    assert done.returncode == 1
    failed, log, waits, needed = done.stdout.splitlines()[-4:]
    assert failed.startswith("FAILED  ") and "--size=13" in failed
    assert waits.startswith("WAITS   ") and "--size=30" in waits
    assert needed.endswith(f"for: {BAD}/rep0-1")
    assert "13 brings bad luck" in Path(log.split("log: ")[1]).read_text()
    found = dict(calls(out))
    assert set(found) == {GOOD, BAD, CHILD} and {found[GOOD], found[BAD]} == {"4", "7"}
    assert "drawn --out=" in done.stdout
    done = run("--grid", path, "--out", out)
    assert "2 runs to do, 2 finished before" in done.stderr
    assert [x[0] for x in calls(out)[3:]] == [BAD], "only what failed runs again"


def test_el2n_scores_that_fail_stop_what_ranks_by_them(tmp_path):
    text = "use digits digits\nel2n ''\nimp fig2 easy 30 20\nimp fig2 random 30 20\n"
    done = run("--grid", grid(tmp_path, text), "--out", tmp_path / "o")
    assert done.returncode == 0
    (tmp_path / "p/el2n/digits").mkdir(parents=True)
    (tmp_path / "p/el2n/digits/el2n").touch()  # a file where the folder should be
    done = run("--grid", tmp_path / "grid.sh", "--out", tmp_path / "p", "--jobs", "3")
    assert done.returncode == 1
    words = [x.split()[0] for x in done.stdout.splitlines()]
    assert words == ["drawn", "FAILED", "log:", "WAITS", "for:"]
    assert done.stderr.count("start") == 2, "the random subset needs no scores"


def heed_ctrl_c() -> None:
    """What a shell started in the background ignores, its children ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_saves_and_goes_on(tmp_path, undisturbed):
    """Also where the name of a folder is full of shell; and a line of --list is a command."""
    flags = ["--grid", grid(tmp_path, LONG), "--only", "fig2", "--out", SHELL]
    here, folder = {"env": REAL, "cwd": tmp_path}, tmp_path / SHELL / FOLDER
    pipes = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": heed_ctrl_c}
    with subprocess.Popen(["bash", SCRIPT, *flags], **here, **pipes) as p:
        wait_for((folder / "pretrained.pt").exists)
        time.sleep(0.5)
        p.send_signal(signal.SIGINT)
        _, messages = p.communicate(timeout=60)
    assert p.returncode == 130 and "goes on from here" in messages
    runs.lock(folder / ".lock").__enter__()  # nobody holds it: the child has ended
    assert (folder / "checkpoint.pt").exists() and not (folder / "level00.pt").exists()
    again = run(*flags, **here)
    assert again.returncode == 0 and "1 runs to do" in again.stderr, again.stderr
    assert trained(folder) == undisturbed
    [line, last] = run("--list", *flags, **here).stdout.splitlines()
    assert shlex.split(last)[1:] == [str(ROOT / "figures.py"), "fig2", f"--out={SHELL}"]
    command = ["bash", "-c", f"printf '%s\\n' {line}"]
    said = subprocess.run(command, **here, capture_output=True, text=True).stdout
    assert said.splitlines() == shlex.split(line) and f"--out={SHELL}" in said
    run("--grid", grid(tmp_path, FAMILY), "--out", SHELL + "2", cwd=tmp_path)
    assert {x[0] for x in calls(tmp_path / (SHELL + "2"))} == {GOOD, BAD, CHILD}
    assert {p.name for p in tmp_path.iterdir()} == {SHELL, SHELL + "2", "grid.sh"}


def test_term_stops_the_children(tmp_path):
    path = grid(tmp_path, "use digits digits\nimp fig2 random 14 20\n")
    command = ["bash", SCRIPT, "--grid", path, "--out", tmp_path / "o"]
    with subprocess.Popen(command, env=FAKE, stderr=subprocess.PIPE) as p:
        wait_for((tmp_path / "o/calls").exists)
        p.terminate()
        p.communicate(timeout=20)  # far sooner than the child would end
    assert p.returncode == 143


# ---- on a real Slurm -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A private one-node Slurm with four pretended cores; what it adds to an environment."""
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
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run([up.with_name("down.sh"), folder], capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


def queue(slurm: dict) -> list[str]:
    command = ["squeue", "-h", "-r", "-o", "%i %T"]
    done = subprocess.run(command, env=os.environ | slurm, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_slurm_failing_parent_and_second_submission(slurm, tmp_path):
    path, out = grid(tmp_path, FAMILY), tmp_path / "o u't"
    out.mkdir()
    args = ["--slurm", "--grid", path, "--out", out, "--partition", "main", "--time", "5"]
    done = run(*args, env=FAKE | slurm)
    assert done.returncode == 0, done.stderr
    assert "4 runs submitted" in done.stdout and "2 runs" in done.stdout.splitlines()[0]
    wait_for(lambda: not queue(slurm))
    assert sorted(x[0] for x in calls(out)) == sorted([GOOD, BAD, CHILD])  # the other cancelled
    again = run(*args, env=FAKE | slurm).stdout
    assert "2 runs submitted, 0 queued before, 2 finished" in again and f"again: {BAD}" in again
    wait_for(lambda: not queue(slurm))
    text = FAMILY.replace("random 13", "random 15")
    done = run("--slurm", "--grid", grid(tmp_path, text), "--out", out, env=FAKE | slurm)
    assert "2 runs submitted, 0 queued before, 2 finished" in done.stdout
    wait_for(lambda: not queue(slurm))
    done = run("--slurm", "--grid", path, "--out", out, env=FAKE | slurm)
    assert done.stdout.strip() == "0 runs submitted, 0 queued before, 4 finished"


def start_long_run(slurm: dict, tmp_path: Path) -> tuple[Path, str]:
    """(folder, job) of LONG's run, in the middle of a level."""
    args = ["--slurm", "--grid", grid(tmp_path, LONG), "--out", tmp_path / "o"]
    assert "1 runs submitted" in run(*args, env=REAL | slurm).stdout
    folder = tmp_path / "o" / FOLDER
    wait_for((folder / "pretrained.pt").exists)
    time.sleep(0.5)
    [job] = [x.split()[0] for x in queue(slurm) if "RUNNING" in x]
    return folder, job


def wait_for_requeue(slurm: dict, folder: Path, job: str) -> None:
    wait_for(lambda: any(x.startswith(job) and "PENDING" in x for x in queue(slurm)))
    wait_for((folder / "checkpoint.pt").exists, 20)
    assert not (folder / "level00.pt").exists()


def test_slurm_requeue_within_a_level(slurm, tmp_path, undisturbed):
    """Requeued in the middle of a level, a run ends with the bits of an undisturbed one; submitting
    again meanwhile does nothing."""
    folder, job = start_long_run(slurm, tmp_path)
    subprocess.run(["scontrol", "requeue", job], env=os.environ | slurm, check=True)
    wait_for_requeue(slurm, folder, job)
    args = ["--slurm", "--grid", tmp_path / "grid.sh", "--out", tmp_path / "o"]
    assert "0 runs submitted, 1 queued before" in run(*args, env=REAL | slurm).stdout
    wait_for(lambda: not queue(slurm))
    [log] = (tmp_path / "o/slurm").glob(f"{job}.log")
    assert log.read_text().count("# 20") == 2, "one log of both attempts"
    assert trained(folder) == undisturbed


def test_slurm_saves_before_the_time_limit(slurm, tmp_path):
    """The signal before the limit makes a run save itself and queue again (sent here by hand)."""
    folder, job = start_long_run(slurm, tmp_path)
    command = ["scancel", "--batch", "--signal=USR1", job]
    subprocess.run(command, env=os.environ | slurm, check=True)
    wait_for_requeue(slurm, folder, job)
    subprocess.run(["scancel", "--user", "root"], env=os.environ | slurm)
    wait_for(lambda: not queue(slurm))
