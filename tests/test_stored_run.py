"""A run folder of each format, stopped in level 1, as an earlier version of these scripts left it:
today's finish it to the same numbers, or refuse it by name.

    python tests/test_stored_run.py tests/runs/format3      stores one of today's format

For a format that is there the command renews the expected numbers only, after a change that means
to move bits. Where the environment is the stored one, the weights are the same bits. Elsewhere sums
run in another order: with oneDNN held to SSE4.1, AVX or AVX-512, torch to no vectors, AVX2 or
AVX-512, with csrc and without it, masks and accuracies were the same, and of the weights none moved
by more than 2e-6, of the losses none by more than 4e-8; ten times that is allowed.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import conftest  # before torch
import pytest
import torch

import common
import imp
import runs

HERE = conftest.ROOT / "tests"
FLAGS = "--width 2 --batch-size 64 --steps 40 --milestones 30 --size 128 --rewind 6 --levels 2"


def call(out: Path):
    words = f"--data-dir {conftest.ROOT / 'data'} --device cpu --quiet --out {out}"
    return imp.main(imp.flags().parse_args([*FLAGS.split(), *words.split()]))


def begin(out: Path) -> None:
    """Scores, and a run that stands at step 22 of level 1."""
    train, trained = common.train, []

    def train_and_stop(t, start=None):
        trained.append(t)
        t.at |= {22} if len(trained) == 4 else set()  # scores, pre-training, levels 0 and 1
        for step in train(t, start):
            runs.signals.number = 15 * (len(trained) == 4 and step == 22)
            yield step

    common.train = train_and_stop
    try:
        call(out)
    except runs.Interrupted:
        runs.signals.number = 0
    finally:
        common.train = train
    for lock in out.rglob(".lock"):
        lock.unlink()


def store(place: Path) -> None:
    """`begun`, unless it is there, and what it ends in: `level02.pt` and `expected.json`."""
    if not (place / "begun").exists():
        begin(place / "begun")
    with tempfile.TemporaryDirectory() as out:
        shutil.copytree(place / "begun", out, dirs_exist_ok=True)
        [result] = call(Path(out))
        level = runs.read_tensors(next(Path(out).glob("imp/*/*/rep0/level02.pt")))
    runs.write_tensors(place / "level02.pt", {k: level[k] for k in ("model", "mask")})
    environment = result["config"]["environments"][-1]
    expected = {"levels": result["levels"], "environment": environment}
    (place / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


@pytest.mark.parametrize("place", sorted((HERE / "runs").glob("format*")), ids=lambda p: p.name)
def test_a_run_of_an_earlier_version_ends_in_the_same_numbers(place, tmp_path, monkeypatch):
    out, starts, train = tmp_path / "results", [], common.train
    shutil.copytree(place / "begun", out)
    if place.name != f"format{runs.FORMAT}":
        with pytest.raises(runs.FormatError, match=rf"\({place.name[:6]} {place.name[6:]}, this"):
            call(out)
        return
    monkeypatch.setattr(common, "train", lambda t, at: starts.append(at) or train(t, at))
    before = {p: p.read_bytes() for p in out.rglob("*.pt") if "checkpoint" not in p.name}
    [result] = call(out)
    assert starts == [22, 6] and all(p.read_bytes() == b for p, b in before.items())
    expected = json.loads((place / "expected.json").read_text())
    stored = runs.read_tensors(place / "level02.pt")
    found = runs.read_tensors(next(out.glob("imp/*/*/rep0/level02.pt")))
    for a, b in zip(result["levels"], expected["levels"], strict=True):
        for key in ("level", "weights_remaining", "test_accuracy", "projected_test_accuracy"):
            assert a[key] == b[key]
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=4e-7)
    assert all(torch.equal(found["mask"][k], mask) for k, mask in stored["mask"].items())
    for key, weight in stored["model"].items():
        torch.testing.assert_close(found["model"][key], weight, rtol=0, atol=2e-5)
    here = result["config"]["environments"][-1]
    if {**here, "commit": ""} == {**expected["environment"], "commit": ""}:
        assert runs.fingerprint(found["model"]) == runs.fingerprint(stored["model"]), "other bits"


if __name__ == "__main__":
    store(Path(sys.argv[1]).resolve())
