import json
import math
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.utils.prune

import common
import imp
import runs
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


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- Algorithm 1 ---------------------------------------------------------------------------------


def test_algorithm_1_to_the_letter(stage, tmp_path):
    [result] = stage("imp", *TINY, "--levels", 3)
    [folder] = tmp_path.rglob("rep0")
    start = runs.read_tensors(folder / "pretrained.pt")
    levels = [runs.read_tensors(folder / f"level{k:02d}.pt") for k in range(4)]
    args = imp.flags().parse_args([str(f) for f in TINY])
    args.data_dir, args.out = common.HERE / "data", tmp_path
    data = common.prepare(args)
    names = [f"{name}.weight" for name in levels[0]["mask"]]

    def flat(state):
        named = state if names[0] in state else {f"{k}.weight": v for k, v in state.items()}
        return torch.cat([named[name].flatten() for name in names])

    assert flat(levels[0]["mask"]).all() and start["step"] == 5
    for before, level in pairwise(levels):
        weights, mask, after = flat(before["model"]), flat(before["mask"]), flat(level["mask"])
        assert int(after.sum()) == int(mask.sum()) - math.ceil(Fraction("0.2") * int(mask.sum()))
        gone = mask & ~after
        assert not (after & ~mask).any()
        assert weights[gone].abs().max() <= weights[after].abs().min()
        assert (flat(level["model"])[~after] == 0).all()
    # Level 2 again, by hand: w_tr under the mask, no velocity, steps 5 to 30 of the whole data.
    networks = common.Networks(common.make_model(args, data), 1, args.device)
    networks.load(0, start["model"])
    networks.mask[0] = networks.flat_mask(levels[2]["mask"])
    networks.weights[0, : networks.mask.shape[1]] *= networks.mask[0]
    projected = common.accuracy(networks, data)[0]
    schedule = common.step_schedule(0.1, (300, 450))
    streams = [common.make_stream(args, data, 0)]
    assert len(streams[0].indices) == 1437
    for _ in common.train(common.Training(args, data, networks, streams, 5, 30, schedule)):
        pass
    assert same(networks.state(0), levels[2]["model"])
    told = result["levels"][2]
    assert told["test_accuracy"] == common.accuracy(networks, data)[0]
    assert told["projected_test_accuracy"] == projected
    assert math.isclose(told["weights_remaining"], flat(levels[2]["mask"]).double().mean().item())


def test_rewind_0_is_the_initialisation(stage, tmp_path):
    stage("imp", "--rewind", 0, "--steps", 20, "--levels", 0)
    [folder] = tmp_path.rglob("rep0")
    assert folder.parent.name == "all-rewind0-steps20"
    data = common.load_data("digits", common.HERE / "data", torch.device("cpu"))
    start = runs.read_tensors(folder / "pretrained.pt")
    args = SimpleNamespace(seed=0, depth=8, width=16)
    expected = common.fresh_state(args, data, 0)
    assert all(torch.equal(v, expected[k]) for k, v in start["model"].items())


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
        for key in ("model", "mask"):
            assert key not in a or same(a[key], b[key])


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
    fresh_state = common.fresh_state

    def poison(args, data, replicate):
        state = fresh_state(args, data, replicate)
        if replicate == 0:
            state["head.weight"].fill_(3e38)
        return state

    monkeypatch.setattr(common, "fresh_state", poison)
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


def test_a_copy_of_imp_in_an_empty_folder_runs_with_scores_of_its_own(tmp_path):
    for name in ("imp.py", "common.py", "runs.py"):
        (tmp_path / name).write_text((common.HERE / name).read_text())
    few = ("--levels", 1, "--steps", 30, "--rewind", 5, "--milestones", 20)
    run = command(*few, "--data-dir", common.HERE / "data", cwd=tmp_path)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("el2n of digits, 4 networks; from easy to hard:")
    assert " ".join(lines[1].split()) == "level weights remaining test accuracy of dense seconds"
    result = runs.read_json(tmp_path / lines[-1])
    assert len(result["levels"]) == 2 and not result["config"]["environments"][0]["csrc"]


def test_controls_against_their_oracles(stage, tmp_path):
    """reinit and shuffle keep every layer's count; reinit at level 0 is dense training from that
    initialisation; one-shot at level 1 is IMP's level 1. The missing run is made first."""
    for control in imp.CONTROLS:
        stage("imp", *TINY, "--levels", 2, "--control", control)
    levels = {}
    for kind in ("", *imp.CONTROLS):
        name = f"random128-rewind5-{kind + '-' * bool(kind)}steps30"
        [folder] = tmp_path.glob(f"results/imp/*/{name}/rep0")
        levels[kind] = [runs.read_tensors(folder / f"level0{k}.pt") for k in range(3)]
    for k in range(3):
        counts = {kind: [int(m.sum()) for m in x[k]["mask"].values()] for kind, x in levels.items()}
        assert counts["reinit"] == counts["shuffle"] == counts[""]
        assert sum(counts["one-shot"]) == sum(counts[""])
    assert same(levels["reinit"][2]["mask"], levels[""][2]["mask"])
    assert not same(levels["shuffle"][2]["mask"], levels[""][2]["mask"])
    assert same(levels["one-shot"][1]["model"], levels[""][1]["model"])
    args = imp.flags().parse_args([str(f) for f in TINY])
    args.data_dir, args.out = common.HERE / "data", tmp_path
    data = common.prepare(args)
    networks = common.Networks(common.make_model(args, data), 1, args.device)
    networks.load(0, common.fresh_state(args, data, common.REINIT))
    schedule, streams = common.step_schedule(0.1, (300, 450)), [common.make_stream(args, data, 0)]
    for _ in common.train(common.Training(args, data, networks, streams, 0, 30, schedule)):
        pass
    assert same(networks.state(0), levels["reinit"][0]["model"])


def test_a_result_in_plain_pytorch_and_back(stage, tmp_path, capsys):
    """Level 1 opens with nothing of ours but the ResNet; anyone's state_dict is a w_tr."""
    [result] = imp.search(
        subset="random", size=128, rewind=5, steps=30, levels=1, quiet=True,
        data_dir=common.HERE / "data", out=tmp_path / "called",
    )  # fmt: skip
    [again] = stage("imp", *TINY, "--levels", 1)
    accuracy = [[x["test_accuracy"] for x in r["levels"]] for r in (result, again)]
    assert accuracy[0] == accuracy[1]
    [path] = tmp_path.glob("called/imp/*/*/rep0/level01.pt")
    saved = torch.load(path, weights_only=True)
    model = common.ResNet(8, 16, 1, 10)
    model.load_state_dict(saved["model"])
    zeros = sum(int((model.get_submodule(n).weight == 0).sum()) for n in saved["mask"])
    total = sum(m.numel() for m in saved["mask"].values())
    assert math.isclose(1 - zeros / total, result["levels"][1]["weights_remaining"])
    for name, mask in saved["mask"].items():
        torch.nn.utils.prune.custom_from_mask(model.get_submodule(name), "weight", mask)
    data = common.load_data("digits", common.HERE / "data", torch.device("cpu"))
    with torch.no_grad():
        logits = model.eval()(common.normalise(data, data.test_images))
    right = (logits.argmax(1) == data.test_labels).double().mean().item()
    assert math.isclose(right, result["levels"][1]["test_accuracy"])
    torch.save(
        torch.load(path.with_name("pretrained.pt"), weights_only=True)["model"], tmp_path / "w.pt"
    )
    flags = ("--steps", 30, "--levels", 0, "--init", tmp_path / "w.pt")
    with pytest.raises(UserError, match="give --rewind"):
        stage("imp", *flags)
    [foreign] = stage("imp", *flags, "--rewind", 5)
    assert foreign["levels"][0]["test_accuracy"] == accuracy[0][0]
    with pytest.raises(UserError, match=r"stem\.0\.weight has shape \(16, 1, 3, 3\)"):
        stage("imp", *flags, "--rewind", 5, "--width", 8)


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
        assert same(a["model"], b["model"])


def test_results_can_be_read_by_anything(stage, tmp_path):
    stage("imp", *TINY, "--levels", 0)
    [path] = tmp_path.rglob("result.json")
    result = json.loads(path.read_text())
    assert result["config"]["settings"]["subset"] == "random"
    assert result["config"]["environments"][0]["torch"] == torch.__version__
    state = torch.load(path.with_name("level00.pt"), weights_only=True)
    assert state["projected_error"].shape == (1437,)
