"""Command lines of README and docs parse; the README's ways in are run in their smallest form.

Those that cannot run in a test are named in NOT_HERE with the reason.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import figures
import runs

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "paper/ours/half/README.md"]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
COMMAND = re.compile(r"^(?:python [a-z0-9_]+\.py|bash run_all\.sh)\b.*")


def commands(page: Path) -> list[str]:
    """The command lines of a page, indented or fenced, without what is said beside them."""
    found = []
    for line in page.read_text().splitlines():
        if line.startswith("    ") or line.startswith(("python ", "bash ")):
            plain = re.split(r"\s{2,}|\s#\s", line.strip())[0]
            if COMMAND.match(plain):
                found.append(plain)
    return found


def quoted(page: Path) -> list[str]:
    """The commands within the text and the tables of a page."""
    found = re.findall(r"`([^`\n]+)`", page.read_text())
    return [x for x in found if COMMAND.match(x) and "..." not in x]


ALL = sorted({(page, line) for page in PAGES for line in (*commands(page), *quoted(page))})
TINY = "--width 2 --networks 2 --score-step 3 --steps 8 --levels 1 --rewind 2 --size 64 --quiet"
# What the README offers, and the words that make it small; later words of a flag win.
SMALL = {
    "python imp.py --dataset cifar100 --subset easy --size 2048 --rewind 400 --replicate 0-3": (
        f"--dataset tiny.npz --preset cifar100 --batch-size 16 --replicate 0-1 {TINY}"
    ),
    "bash run_all.sh --quick": "--list",
    "bash run_all.sh --cost": "",
    "bash run_all.sh": "--list",
    "bash run_all.sh --only fig2 --dataset cifar10 --gpus 0,1": "--list",
    "python figures.py --out paper/ours/half/noise --compare 'easy*noise0.5' 'all*noise0.5'": "",
    "python figures.py": "--out ROOT/paper/ours/half/noise --figures drawn",
}
NOT_HERE = {
    "bash run_all.sh --slurm --partition gpu --gres gpu:1 --time 12:00:00": (
        "needs a cluster; tests/test_run_all.py submits to a Slurm of its own"
    ),
}


def test_every_way_in_is_run_or_named():
    assert set(commands(ROOT / "README.md")) == {*SMALL, *NOT_HERE}
    assert len(ALL) > 30


@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{p.name}: {x}" for p, x in ALL])
def test_command_lines_parse(page, line):
    program, *words = shlex.split(line)[1:]
    if program == "run_all.sh":
        known = subprocess.run(
            ["bash", ROOT / "run_all.sh", "--help"], capture_output=True, text=True
        ).stdout
        for word in words:
            assert not word.startswith("--") or word.split("=")[0] in known, word
        return
    parse = figures.flags().parse_args if program == "figures.py" else None
    parse = parse or __import__(program.removesuffix(".py")).flags().parse_args
    try:
        parse(words)
    except runs.UserError as e:
        pytest.fail(f"{page.name}: {line}: {e}")


@pytest.mark.parametrize("line", SMALL)
def test_the_readmes_ways_in(line, tmp_path):
    import numpy as np

    draw = np.random.default_rng(0)
    arrays = {
        f"{split}_{what}": draw.integers(0, high, size, dtype=np.uint8)
        for split, n in (("train", 256), ("test", 64))
        for what, high, size in (("images", 256, (n, 8, 8, 3)), ("labels", 10, (n,)))
    }
    np.savez(tmp_path / "tiny.npz", **arrays)
    program, script, *words = shlex.split(f"{line} {SMALL[line]}".replace("ROOT", str(ROOT)))
    program = sys.executable if program == "python" else program
    command = [program, str(ROOT / script), *words]
    where = ROOT if "--compare" in line else tmp_path  # the stored study; it writes nothing
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if script == "imp.py":
        results = sorted(tmp_path.rglob("imp/*/*/rep*/result.json"))
        assert [r.parent.name for r in results] == ["rep0", "rep1"]
        for r in results:
            left = [x["weights_remaining"] for x in runs.read_json(r)["levels"]]
            assert left[0] == 1 and abs(left[1] - 0.8) < 0.001
    elif "--compare" in line:
        assert re.search(r"verdict +dominates", done.stdout)
    elif script == "figures.py":
        assert (tmp_path / "drawn/fig4-half-cifar10-resnet20x8.pdf").exists()
    else:
        assert len(done.stdout.splitlines()) > 5


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readmes_function_call_and_the_level_in_plain_pytorch(tmp_path):
    """`imp.search(...)`, then the snippet of docs/files.md on what it wrote."""
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/files.md").read_text(), re.S)
    call = 'imp.search(dataset="digits", levels=3)'
    assert call in (ROOT / "README.md").read_text()
    small = f', data_dir=r"{ROOT}/data", steps=8, rewind=2, networks=2, score_step=3)'
    code = "import imp\n" + call.replace(")", small)
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "env": ENV}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "results/imp/digits-resnet8").iterdir()
    snippet = snippet.replace("easy256-rewind20", folder.name)
    snippet = snippet.replace('Path("data")', f'Path(r"{ROOT}/data")')
    done = subprocess.run([sys.executable, "-c", snippet], **run)
    measured, stored = map(float, done.stdout.split())
    assert abs(measured - stored) < 1e-6
