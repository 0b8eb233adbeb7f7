import json
import math
import subprocess
import sys
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

TINY = ("--width", 4, "--subset", "random", "--size", 128, "--rewind", 5, "--steps", 20)


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
    # Level 2 again, by hand: w_tr under the mask, no velocity, steps 5 to 20 of all data.
    networks = common.Networks(common.make_model(args, data), 1, args.device)
    networks.load(0, start["model"])
    networks.mask[0] = networks.flat_mask(levels[2]["mask"])
    networks.weights[0, : networks.mask.shape[1]] *= networks.mask[0]
    projected = common.accuracy(networks, data)[0]
    schedule = common.step_schedule(0.1, (300, 450))
    streams = [common.make_stream(args, data, 0)]
    assert len(streams[0].indices) == 1437
    for _ in common.train(common.Training(args, data, networks, streams, 5, 20, schedule)):
        pass
    assert same(networks.state(0), levels[2]["model"])
    numbers = result["levels"][2]
    assert numbers["test_accuracy"] == common.accuracy(networks, data)[0]
    assert numbers["projected_test_accuracy"] == projected
    alive = flat(levels[2]["mask"]).double().mean().item()
    assert math.isclose(numbers["weights_remaining"], alive)


def test_rewind_0_is_the_initialisation(stage, tmp_path):
    stage("imp", "--width", 4, "--rewind", 0, "--steps", 20, "--levels", 0)
    [folder] = tmp_path.rglob("rep0")
    assert folder.parent.name == "all-rewind0-steps20"
    data = common.load_data("digits", common.HERE / "data", torch.device("cpu"))
    start = runs.read_tensors(folder / "pretrained.pt")
    args = SimpleNamespace(seed=0, depth=8, width=4)
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
    stage("imp", *flags, "--replicate", "0-1")
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


def test_fast_on_a_cpu_says_so_and_changes_nothing(stage, monkeypatch, capsys):
    [fast] = stage("imp", *TINY, "--levels", 0, "--fast")
    lines = [x for x in capsys.readouterr().err.splitlines() if "fast" in x]
    assert lines == ["--fast: changes nothing on a CPU"]
    monkeypatch.setattr(common, "train", None)
    assert stage("imp", *TINY, "--levels", 0) == [fast]  # the same run, which is done


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


def command(*flags, cwd=common.HERE):
    words = [sys.executable, "imp.py", *map(str, flags)]
    return subprocess.run(words, cwd=cwd, text=True, capture_output=True, timeout=300)


def test_a_copy_of_imp_in_an_empty_folder_runs_with_scores_of_its_own(tmp_path):
    for name in ("imp.py", "common.py", "runs.py"):
        (tmp_path / name).write_text((common.HERE / name).read_text())
    few = ("--width", 2, "--levels", 1, "--steps", 20, "--rewind", 5, "--milestones", 20)
    done = command(*few, "--data-dir", common.HERE / "data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
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
        name = f"random128-rewind5-{kind + '-' * bool(kind)}steps20"
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
    for _ in common.train(common.Training(args, data, networks, streams, 0, 20, schedule)):
        pass
    assert same(networks.state(0), levels["reinit"][0]["model"])


def test_settings_of_a_call_are_those_of_the_command():
    """Switches on and off, lists, ranges, what is not given; a word that is no flag."""
    settings = {"flip": False, "quiet": True, "balance": False, "size": None, "label_noise": 0.1}
    settings |= {"replicate": range(3), "milestones": [3, 9], "prune_fraction": 0.5}
    called = runs.call(lambda args: args, imp.flags(), settings)
    words = "--no-flip --quiet --label-noise 0.1 --replicate 0-2 --milestones 3,9"
    assert called == imp.flags().parse_args([*words.split(), "--prune-fraction", "0.5"])
    assert called.flip is False and called.replicate == (0, 1, 2)
    with pytest.raises(runs.UserError, match="unrecognized arguments: --levles=3"):
        runs.call(lambda args: args, imp.flags(), {"levles": 3})


def test_a_result_in_plain_pytorch_and_back(stage, tmp_path, capsys):
    """Level 1 opens with nothing of ours but the ResNet; anyone's state_dict is a w_tr."""
    [result] = imp.search(
        width=4, subset="random", size=128, rewind=5, steps=20, levels=1, quiet=True,
        data_dir=common.HERE / "data", out=tmp_path / "called",
    )  # fmt: skip
    [again] = stage("imp", *TINY, "--levels", 1)
    accuracy = [[x["test_accuracy"] for x in r["levels"]] for r in (result, again)]
    assert accuracy[0] == accuracy[1]
    [path] = tmp_path.glob("called/imp/*/*/rep0/level01.pt")
    saved = torch.load(path, weights_only=True)
    assert saved["projected_error"].shape == (1437,)
    config = json.loads(path.with_name("result.json").read_text())["config"]
    assert config["settings"]["subset"] == "random"
    assert config["environments"][0]["torch"] == torch.__version__
    model = common.ResNet(8, 4, 1, 10)
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
    flags = ("--width", 4, "--steps", 20, "--levels", 0, "--init", tmp_path / "w.pt")
    [foreign] = stage("imp", *flags, "--rewind", 5)
    assert foreign["levels"][0]["test_accuracy"] == accuracy[0][0]


def test_a_mistake_is_one_line_and_status_2():
    done = command("--size", "many")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("imp.py: error: argument --size")
