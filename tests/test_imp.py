import json
import math
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

import common
import runs
import imp
from runs import UserError

TINY = ("--subset", "random", "--size", 128, "--rewind", 5, "--steps", 30)


# ---- pruning -------------------------------------------------------------------------------------


def test_pruning_is_a_sort_by_hand():
    weights = torch.tensor([0.5, -0.1, 0.0, 0.3, -0.3, 0.1, 2.0, 0.3, 0.05, 9.0])
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 1]).bool()
    # Nine live: ceil(0.2 * 9) = 2 go, 0.05 and of the two 0.1 the first.
    assert imp.prune(weights, mask, 0.2).nonzero()[:, 0].tolist() == [0, 3, 4, 5, 6, 7, 9]
    # ceil(0.5 * 9) = 5: both 0.1 too, then of the three 0.3 the first two.
    assert imp.prune(weights, mask, 0.5).nonzero()[:, 0].tolist() == [0, 6, 7, 9]
    assert mask.sum() == 9  # not changed in place


@pytest.mark.parametrize("fraction", [0.2, 0.1, 0.3])
def test_exactly_the_ceiling_goes_at_every_level(fraction):
    """Also where 0.1 * r in floating point lies a little above a whole number."""
    draw, live = torch.Generator().manual_seed(0), 4096
    mask, exact = torch.ones(live, dtype=torch.bool), Fraction(str(fraction))
    for _ in range(15):
        weights = torch.randn(live + 9, generator=draw)  # weights beyond P are not prunable
        pruned = imp.prune(weights, mask, fraction)
        r = int(mask.sum())
        assert int(pruned.sum()) == r - math.ceil(exact * r)
        assert not (pruned & ~mask).any()
        assert (
            weights[: len(mask)][mask & ~pruned].abs().max() <= weights[:live][pruned].abs().min()
        )
        mask = pruned


# ---- Algorithm 1 ---------------------------------------------------------------------------------


def test_algorithm_1_to_the_letter(stage, tmp_path):
    [result] = stage("imp", *TINY, "--levels", 3)
    [folder] = tmp_path.rglob("rep0")
    start = runs.read_tensors(folder / "pretrained.pt")
    levels = [runs.read_tensors(folder / f"level{k:02d}.pt") for k in range(4)]
    args = imp.flags().parse_args([str(f) for f in TINY])
    args.data_dir, args.out = common.HERE / "data", tmp_path
    data = common.prepare(args)
    assert levels[0]["mask"].all() and start["step"] == 5
    for before, level in pairwise(levels):
        expected = imp.prune(before["weights"], before["mask"], 0.2)
        assert torch.equal(level["mask"], expected)
        assert (level["weights"][: len(expected)][~expected] == 0).all()
    # Level 2 again, by hand: w_tr under the mask, no velocity, steps 5 to 30 of the whole data.
    networks = common.Networks(common.make_model(args, data), 1, args.device)
    networks.weights[0], networks.batchnorm[0] = start["weights"], start["batchnorm"]
    networks.mask[0] = levels[2]["mask"]
    networks.weights[0, : networks.mask.shape[1]] *= networks.mask[0]
    projected = common.accuracy(networks, data)[0]
    schedule = common.step_schedule(0.1, (300, 450))
    streams = [common.make_stream(args, data, 0)]
    assert len(streams[0].indices) == 1437
    for _ in common.train(common.Training(args, data, networks, streams, 5, 30, schedule)):
        pass
    assert torch.equal(networks.weights[0], levels[2]["weights"])
    assert torch.equal(networks.batchnorm[0], levels[2]["batchnorm"])
    told = result["levels"][2]
    assert told["test_accuracy"] == common.accuracy(networks, data)[0]
    assert told["projected_test_accuracy"] == projected
    assert math.isclose(told["weights_remaining"], levels[2]["mask"].double().mean().item())


def test_rewind_0_is_the_initialisation(stage, tmp_path):
    stage("imp", "--rewind", 0, "--steps", 20, "--levels", 0)
    [folder] = tmp_path.rglob("rep0")
    assert folder.parent.name == "all-rewind0-steps20"
    networks = common.Networks(common.ResNet(8, 16, 1, 10), 1, torch.device("cpu"))
    common.initialise(networks.modules[0], common.generator(0, "init", 0))
    start = runs.read_tensors(folder / "pretrained.pt")
    assert torch.equal(start["weights"], networks.weights[0])
    assert torch.equal(start["batchnorm"], networks.batchnorm[0])


def test_label_noise_is_in_the_pretraining_only(stage, monkeypatch):
    streams, make_stream = [], common.make_stream

    def spy(*args, **kwargs):
        streams.append(make_stream(*args, **kwargs))
        return streams[-1]

    monkeypatch.setattr(common, "make_stream", spy)
    stage("imp", *TINY, "--levels", 1, "--label-noise", 0.5)
    data = common.load_data("digits", common.HERE / "data", torch.device("cpu"))
    wrong = [(s.labels != data.train_labels).double().mean().item() for s in streams]
    assert len(wrong) == 3 and abs(wrong[0] - 0.45) < 0.06 and wrong[1:] == [0, 0]


def test_replicates_are_the_same_side_by_side_and_alone(stage, tmp_path):
    flags = (*TINY, "--levels", 1)
    stage("imp", *flags, "--replicate", "0-2")
    stage("imp", *flags, "--replicate", "1", out=tmp_path / "alone")
    for name in ("pretrained.pt", "level00.pt", "level01.pt"):
        a, b = (runs.read_tensors(p) for p in tmp_path.rglob(f"rep1/{name}"))
        for key in ("weights", "batchnorm", "mask"):
            assert key not in a or torch.equal(a[key], b[key])


def test_a_finished_run_is_left_alone_and_extended_by_more_levels(stage, tmp_path, monkeypatch):
    [first] = stage("imp", *TINY, "--levels", 1)
    with monkeypatch.context() as m:
        m.setattr(common, "train", None)
        assert stage("imp", *TINY, "--levels", 1) == [first]
        assert stage("imp", *TINY, "--levels", 0) == [first]
    [longer] = stage("imp", *TINY, "--levels", 2)
    assert longer["levels"][:2] == first["levels"] and len(longer["levels"]) == 3


def test_a_damaged_level_is_made_again(stage, tmp_path, capsys):
    [first] = stage("imp", *TINY, "--levels", 2)
    [path] = tmp_path.rglob("level01.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    path.with_name("result.json").unlink()
    [second] = stage("imp", *TINY, "--levels", 2)
    assert "level01.pt is damaged" in capsys.readouterr().err
    for a, b in zip(first["levels"], second["levels"], strict=True):
        assert a["test_accuracy"] == b["test_accuracy"] and a["train_loss"] == b["train_loss"]


# ---- what ends a run -----------------------------------------------------------------------------


def test_a_layer_that_dies_ends_the_run_and_says_at_which_level(stage, tmp_path):
    with pytest.raises(UserError, match=r"replicate 0: level \d leaves .* without weights"):
        stage("imp", *TINY, "--levels", 9, "--prune-fraction", 0.95)
    [path] = tmp_path.rglob("result.json")
    result = runs.read_json(path)
    last = len(result["levels"])
    assert f"level {last} leaves" in result["ended"] and f"--levels {last - 1}" in result["ended"]
    assert last >= 1


def test_a_replicate_that_diverges_reports_nothing_and_the_other_goes_on(
    stage, tmp_path, monkeypatch
):
    [well] = stage("imp", *TINY, "--levels", 1, "--replicate", 1, out=tmp_path / "well")
    initialise = common.initialise

    def poison(module, draw):
        initialise(module, draw)
        if not poisoned:
            module.head.weight.data.fill_(3e38)
        poisoned.append(module)

    poisoned = []
    monkeypatch.setattr(common, "initialise", poison)
    with pytest.raises(UserError, match=r"replicate 0: pre-training diverged at step 0") as e:
        stage("imp", *TINY, "--levels", 1, "--replicate", "0-1")
    assert "\n" not in str(e.value)
    sick, other = (runs.read_json(tmp_path / p) for p in sorted(results_below(tmp_path)))
    assert sick["levels"] == [] and sick["pretrain"]["test_accuracy"] is None
    for a, b in zip(other["levels"], well["levels"], strict=True):
        assert a["test_accuracy"] == b["test_accuracy"] and a["train_loss"] == b["train_loss"]


def results_below(tmp_path):
    return [p.relative_to(tmp_path) for p in (tmp_path / "results").rglob("result.json")]


def test_a_level_that_diverges_says_step_and_rate(stage, tmp_path):
    with pytest.raises(UserError, match=r"level 0 diverged at step \d+, learning rate 1e\+06"):
        stage("imp", *TINY, "--levels", 1, "--lr", 1e6)
    [path] = tmp_path.rglob("result.json")
    assert runs.read_json(path)["levels"] == []


# ---- as a program --------------------------------------------------------------------------------


def command(*flags, cwd=common.HERE, **kwargs):
    words = [sys.executable, "imp.py", *map(str, flags)]
    return subprocess.Popen(
        words, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
    )


def test_a_copy_of_imp_and_common_alone_runs(tmp_path):
    for name in ("imp.py", "common.py"):
        (tmp_path / name).write_text((common.HERE / name).read_text())
    run = command(*TINY, "--levels", 1, "--data-dir", common.HERE / "data", cwd=tmp_path)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    lines = out.splitlines()
    assert " ".join(lines[0].split()) == "level weights remaining test accuracy of dense seconds"
    result = runs.read_json(tmp_path / lines[-1])
    assert len(result["levels"]) == 2 and not result["config"]["environments"][0]["csrc"]
    run = command("--subset", "easy", "--data-dir", common.HERE / "data", cwd=tmp_path)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 2 and err.count("\n") == 1 and "give --scores FILE" in err


def test_a_mistake_is_one_line_and_status_2():
    run = command("--size", "many")
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("imp.py: error: argument --size")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_ends_with_the_numbers_of_one_never_killed(stage, tmp_path, number):
    flags = (*TINY[:6], "--steps", 120, "--levels", 2)
    [expected] = stage("imp", *flags, out=tmp_path / "undisturbed")
    shared = ("--out", tmp_path / "killed", "--data-dir", common.HERE / "data")
    run = command(*flags, *shared, "--checkpoint-every", 0, "--quiet")
    until = time.monotonic() + 60
    while not list(tmp_path.glob("killed/imp/*/*/rep0/level00.pt")):  # then it is in level 1
        assert run.poll() is None and time.monotonic() < until, run.communicate()
        time.sleep(0.01)
    os.kill(run.pid, number)
    run.communicate(timeout=5)
    assert run.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert not list(tmp_path.glob("killed/imp/*/*/rep0/result.json"))
    run = command(*flags, *shared)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    result = runs.read_json(common.HERE / out.splitlines()[-1])
    times = ("seconds", "steps_per_second")
    for a, b in zip(result["levels"], expected["levels"], strict=True):
        assert {k: v for k, v in a.items() if k not in times} == {
            k: v for k, v in b.items() if k not in times
        }
    for name in ("pretrained.pt", "level00.pt", "level01.pt", "level02.pt"):
        a, b = (runs.read_tensors(p) for p in tmp_path.glob(f"*/imp/*/*/rep0/{name}"))
        assert torch.equal(a["weights"], b["weights"])


def test_results_can_be_read_by_anything(stage, tmp_path):
    stage("imp", *TINY, "--levels", 0)
    [path] = tmp_path.rglob("result.json")
    result = json.loads(path.read_text())
    assert result["config"]["settings"]["subset"] == "random"
    assert result["config"]["environments"][0]["torch"] == torch.__version__
    state = torch.load(path.with_name("level00.pt"), weights_only=True)
    assert state["projected_error"].shape == (1437,)
