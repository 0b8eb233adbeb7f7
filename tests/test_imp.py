"""imp.py against Algorithm 1 by hand, plain PyTorch, and runs whose outcome must be the same."""

import dataclasses
import math
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise

import numpy as np
import plain
import pytest
import torch
from conftest import ROOT, contents, digits, parse, same, study_of

import common
import engine
import imp
import options
import runs
from runs import UserError

TINY = ("--width", 4, "--subset", "random", "--size", 128, "--rewind", 5, "--steps", 20)
DROPS = (10, 15)  # the preset's 300 and 450 of 600 steps, at their share of 20


def levels_of(folder, count: int) -> list[dict]:
    return [runs.read_tensors(folder / f"level{k:02d}.pt") for k in range(count)]


# ---- pruning -------------------------------------------------------------------------------------


def test_pruning_is_a_sort_by_hand():
    weights = torch.tensor([0.5, -0.1, 0.0, 0.3, -0.3, 0.1, 2.0, 0.3, 0.05, 9.0])
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 1]).bool()
    # Nine live: ceil(0.2 * 9) = 2 go, 0.05 and of the two 0.1 the first.
    assert imp.prune(weights, mask, 0.2).nonzero()[:, 0].tolist() == [0, 3, 4, 5, 6, 7, 9]
    # ceil(0.5 * 9) = 5: both 0.1 too, then of the three 0.3 the first two.
    assert imp.prune(weights, mask, 0.5).nonzero()[:, 0].tolist() == [0, 6, 7, 9]
    assert mask.sum() == 9  # not changed in place


def test_the_ceiling_is_that_of_the_decimal_fraction():
    """14 % of 50 are 7, though 0.14 * 50 lies a little above in floating point."""
    assert math.ceil(0.14 * 50) == 8
    mask = imp.prune(torch.arange(1.0, 51), torch.ones(50, dtype=torch.bool), 0.14)
    assert mask.nonzero()[:, 0].tolist() == [*range(7, 50)]


# ---- Algorithm 1 ---------------------------------------------------------------------------------


def retrained(start: dict, masks: dict | None, first: int) -> engine.Networks:
    """Replicate 0 from `start` under masks, from step `first` to 20 on all data, by hand."""
    study = study_of("imp", *TINY)
    networks, streams = study.networks(1), [study.stream(0)]
    assert len(streams[0].indices) == 1437
    networks.load(0, start, masks)
    schedule = engine.step_schedule(0.1, DROPS)
    assert [*engine.train(study.training(networks, streams, first, 20, schedule))][-1] == 20
    return networks


def test_algorithm_1_to_the_letter(stage, tmp_path):
    [result] = stage("imp", *TINY, "--levels", 3, "--projected")
    [folder] = tmp_path.rglob("rep0")
    start, levels = runs.read_tensors(folder / "pretrained.pt"), levels_of(folder, 4)
    layers = list(levels[0]["mask"])

    def flat(tensors, suffix=""):
        return torch.cat([tensors[name + suffix].flatten() for name in layers])

    assert flat(levels[0]["mask"]).all() and start["step"] == 5
    for before, level in pairwise(levels):
        weights, mask = flat(before["model"], ".weight").abs(), flat(before["mask"])
        after, live = flat(level["mask"]), int(mask.sum())
        assert int(after.sum()) == live - math.ceil(Fraction("0.2") * live)
        assert not (after & ~mask).any()
        assert weights[mask & ~after].max() <= weights[after].min()
        assert (flat(level["model"], ".weight")[~after] == 0).all()
    networks = retrained(start["model"], levels[2]["mask"], 5)
    assert same(networks.state(0), levels[2]["model"])

    data, errors = digits(), np.load(folder / "projected_error.npy")
    for numbers, level, error in zip(result["levels"], levels, errors, strict=True):
        projected = plain.network(start["model"], level["mask"])
        for key, wanted in {
            "test_accuracy": plain.accuracy(plain.network(level["model"])),
            "weights_remaining": flat(level["mask"]).double().mean().item(),
            "projected_test_accuracy": plain.accuracy(projected),
        }.items():
            assert math.isclose(numbers[key], wanted)
        z = plain.logits(projected, data.train_images)
        np.testing.assert_allclose(error, plain.losses(z, data.train_labels)[2], atol=1e-5)


def test_rewind_0_is_the_initialisation(stage, tmp_path):
    stage("imp", "--width", 4, "--rewind", 0, "--steps", 20, "--levels", 0)
    [folder] = tmp_path.rglob("rep0")
    assert folder.parent.name == "all-rewind0-steps20"
    state = runs.read_tensors(folder / "pretrained.pt")["model"]
    draw = np.random.default_rng(np.random.SeedSequence([0, 0, 0, 0]))
    stem = draw.standard_normal((4, 1, 3, 3)) * math.sqrt(2 / 9)  # Kaiming: 9 inputs
    scale = draw.uniform(0, 1, 4)
    np.testing.assert_array_equal(state["stem.0.weight"].numpy(), stem.astype(np.float32))
    np.testing.assert_array_equal(state["stem.1.weight"].numpy(), scale.astype(np.float32))
    assert (state["stem.1.running_mean"] == 0).all() and (state["stem.1.running_var"] == 1).all()


def test_label_noise_is_in_the_pretraining_only(stage, monkeypatch):
    streams, make_stream = [], common.Study.stream

    def spy(*args, **kwargs):
        streams.append(make_stream(*args, **kwargs))
        return streams[-1]

    monkeypatch.setattr(common.Study, "stream", spy)
    stage("imp", *TINY, "--levels", 1, "--label-noise", 0.5)
    labels = digits().train_labels
    wrong = [(s.labels != labels).double().mean().item() for s in streams]
    # Half of the labels are redrawn, a tenth of these to what they were.
    assert len(wrong) == 3 and abs(wrong[0] - 0.45) < 0.06 and wrong[1:] == [0, 0]


def test_replicates_are_the_same_side_by_side_and_alone(stage, tmp_path):
    stage("imp", *TINY, "--levels", 1, "--replicate", "0-1")
    stage("imp", *TINY, "--levels", 1, "--replicate", "1", out=tmp_path / "alone")
    for name, keys in (("pretrained", ["model"]), ("level01", ["model", "mask"])):
        a, b = (runs.read_tensors(p) for p in tmp_path.rglob(f"rep1/{name}.pt"))
        [other] = (runs.read_tensors(p) for p in tmp_path.rglob(f"rep0/{name}.pt"))
        for key in keys:
            assert same(a[key], b[key]) and not same(a[key], other[key])


def test_a_finished_run_is_left_alone_and_extended_by_more_levels(stage, monkeypatch):
    [first] = stage("imp", *TINY, "--levels", 1)
    with monkeypatch.context() as m:
        m.setattr(engine, "train", None)
        assert stage("imp", *TINY, "--levels", 1) == [first]
        assert stage("imp", *TINY, "--levels", 0) == [first]
    [longer] = stage("imp", *TINY, "--levels", 2)
    assert longer["levels"][:2] == first["levels"] and len(longer["levels"]) == 3


def test_fast_on_a_cpu_says_so_and_changes_nothing(stage, monkeypatch, capsys):
    [fast] = stage("imp", *TINY, "--levels", 0, "--fast")
    lines = [x for x in capsys.readouterr().err.splitlines() if "fast" in x]
    assert lines == ["--fast: changes nothing on a CPU"]
    monkeypatch.setattr(engine, "train", None)
    assert stage("imp", *TINY, "--levels", 0) == [fast]  # the same run, which is done


def test_a_mask_of_ones_own_is_level_0_and_is_pruned_on(stage, tmp_path):
    """Under the mask of level 1, levels 0 and 1 are levels 1 and 2 of the run that it is from."""
    stage("imp", *TINY, "--levels", 2)
    [folder] = tmp_path.rglob("rep0")
    flags = ("--levels", 1, "--mask", folder / "level01.pt")
    [result] = stage("imp", *TINY, *flags, out=tmp_path / "masked")
    [masked] = (tmp_path / "masked").rglob("rep0")
    for ours, theirs in zip(levels_of(masked, 2), levels_of(folder, 3)[1:], strict=True):
        assert same(ours["model"], theirs["model"]) and same(ours["mask"], theirs["mask"])
    assert result["levels"][0]["weights_remaining"] < 0.81


def test_controls_against_their_oracles(stage, tmp_path):
    """reinit and shuffle keep every layer's count; reinit at level 0 is dense training from that
    initialisation; one-shot at level 1 is IMP's level 1. The missing run is made first."""
    for control in imp.CONTROLS:
        stage("imp", *TINY, "--levels", 2, "--control", control)
    levels, starts = {}, {}
    for kind in ("", *imp.CONTROLS):
        name = f"random128-rewind5-{kind + '-' * bool(kind)}steps20"
        [folder] = tmp_path.glob(f"results/imp/*/{name}/rep0")
        levels[kind] = levels_of(folder, 3)
        starts[kind] = runs.read_tensors(folder / "pretrained.pt")["model"]
    for k in range(3):
        counts = {kind: [int(m.sum()) for m in x[k]["mask"].values()] for kind, x in levels.items()}
        assert counts["reinit"] == counts["shuffle"] == counts[""]
        assert sum(counts["one-shot"]) == sum(counts[""])
    assert same(levels["reinit"][2]["mask"], levels[""][2]["mask"])
    assert not same(levels["shuffle"][2]["mask"], levels[""][2]["mask"])
    assert same(starts["shuffle"], starts[""]) and same(starts["one-shot"], starts[""])
    assert same(levels["one-shot"][1]["model"], levels[""][1]["model"])
    dense = levels[""][0]["model"]  # what one-shot at level 2 leaves of it: the largest
    mask = levels["one-shot"][2]["mask"]
    weights = torch.cat([dense[f"{k}.weight"].flatten().abs() for k in mask])
    kept = torch.cat([m.flatten() for m in mask.values()])
    assert weights[~kept].max() <= weights[kept].min()
    other = study_of("imp", *TINY).initial_state_dict(imp.REINIT)
    assert same(starts["reinit"], {k: other[k] for k in starts["reinit"]})
    assert same(retrained(other, None, 0).state(0), levels["reinit"][0]["model"])
    weight = "head.weight"
    assert not torch.equal(other[weight], study_of("imp", *TINY).initial_state_dict(0)[weight])


# ---- what ends a run -----------------------------------------------------------------------------


def test_a_layer_that_dies_ends_the_run_and_says_at_which_level(stage, tmp_path):
    with pytest.raises(UserError, match=r"replicate 0: level \d leaves .* without weights"):
        stage("imp", *TINY, "--levels", 9, "--prune-fraction", 0.95)
    [path] = tmp_path.rglob("result.json")
    result = runs.read_json(path)
    last = len(result["levels"])
    assert f"level {last} leaves" in result["ended"] and f"--levels {last - 1}" in result["ended"]
    assert last >= 1
    stage("imp", *TINY, "--levels", last - 1, "--prune-fraction", 0.95)  # that remedy


def test_a_replicate_that_diverges_reports_nothing_and_the_other_goes_on(
    stage, tmp_path, monkeypatch
):
    [well] = stage("imp", *TINY, "--levels", 1, "--replicate", 1, out=tmp_path / "well")
    initial_state_dict = common.Study.initial_state_dict

    def poison(study, replicate):
        state = initial_state_dict(study, replicate)
        if replicate == 0:
            state["head.weight"].fill_(3e38)
        return state

    monkeypatch.setattr(common.Study, "initial_state_dict", poison)
    with pytest.raises(UserError, match=r"replicate 0: pre-training diverged at step 0") as e:
        stage("imp", *TINY, "--levels", 1, "--replicate", "0-1")
    assert "\n" not in str(e.value) and "replicate 1" not in str(e.value)
    sick, other = (runs.read_json(p) for p in sorted(tmp_path.glob("results/**/result.json")))
    assert sick["levels"] == [] and sick["pretrain"]["test_accuracy"] is None
    assert len(other["levels"]) == 2
    for a, b in zip(other["levels"], well["levels"], strict=True):
        assert a["test_accuracy"] == b["test_accuracy"] and a["test_loss"] == b["test_loss"]


def test_a_level_that_diverges_says_step_and_rate(stage, tmp_path):
    with pytest.raises(UserError, match=r"level 0 diverged at step \d+, learning rate 1e\+06"):
        stage("imp", *TINY, "--levels", 1, "--lr", 1e6)
    [path] = tmp_path.rglob("result.json")
    assert runs.read_json(path)["levels"] == []


# ---- as a function, in plain PyTorch, measured again ---------------------------------------------


def test_a_call_passes_on_switches_lists_and_ranges_and_refuses_other_words():
    parser = imp.flags()
    settings = {"flip": False, "quiet": True, "balance": False, "size": None, "label_noise": 0.1}
    settings |= {"replicate": range(3), "milestones": [3, 9]}
    called = parser.parse_args(options.as_words(parser, settings))
    words = "--no-flip --quiet --label-noise 0.1 --replicate 0-2 --milestones 3,9"
    assert called == parser.parse_args(words.split())
    with pytest.raises(dataclasses.FrozenInstanceError):
        called.levels = 3
    with pytest.raises(UserError, match=r"^levles is no setting \(did you mean levels\?\)$"):
        imp.search(levles=3)


def test_a_result_in_plain_pytorch_and_back(stage, tmp_path):
    """Level 1 opens with nothing of ours but the ResNet; anyone's state_dict is a w_tr."""
    [result] = imp.search(
        width=4, subset="random", size=128, rewind=5, steps=20, levels=1, quiet=True,
        data_dir=ROOT / "data", out=tmp_path / "called", device="cpu",
    )  # fmt: skip
    [again] = stage("imp", *TINY, "--levels", 1)
    accuracy = [[x["test_accuracy"] for x in r["levels"]] for r in (result, again)]
    assert accuracy[0] == accuracy[1]
    [path] = tmp_path.glob("called/imp/*/*/rep0/level01.pt")
    saved = torch.load(path, weights_only=True)
    zeros = sum(int((saved["model"][f"{k}.weight"] == 0).sum()) for k in saved["mask"])
    total = sum(m.numel() for m in saved["mask"].values())
    assert math.isclose(1 - zeros / total, result["levels"][1]["weights_remaining"])
    accuracy_1 = plain.accuracy(plain.network(saved["model"], saved["mask"]))
    assert math.isclose(accuracy_1, result["levels"][1]["test_accuracy"])
    start = torch.load(path.with_name("pretrained.pt"), weights_only=True)["model"]
    torch.save(start, tmp_path / "w.pt")
    flags = ("--width", 4, "--steps", 20, "--levels", 0, "--init", tmp_path / "w.pt")

    [foreign] = stage("imp", *flags, "--rewind", 5)
    assert foreign["levels"][0]["test_accuracy"] == accuracy[0][0]


@pytest.fixture
def measured(stage, tmp_path):
    """A finished run, and the call that measures it again, with no flag but the folder."""
    stage("imp", *TINY, "--levels", 2, "--replicate", "0-1")
    [folder] = tmp_path.glob("results/imp/*/*")
    return folder, lambda path=folder: stage("imp", "--verify", path, out=tmp_path / "unused")


def test_verify_measures_every_level_again_and_writes_nothing(measured, tmp_path, monkeypatch):
    folder, verify = measured
    before = contents(tmp_path)
    monkeypatch.setattr(engine, "train", None)
    rows = verify()
    files = [folder / f"rep{r}/level{k:02d}.pt" for r in (0, 1) for k in range(3)]
    assert [row["file"] for row in rows] == [str(f) for f in files]
    for row, file in zip(rows, files, strict=True):
        saved = torch.load(file, weights_only=True)
        assert row["measured"] == row["recorded"]
        assert math.isclose(row["measured"], plain.accuracy(plain.network(saved["model"])))
        alive = torch.cat([m.flatten() for m in saved["mask"].values()]).double().mean().item()
        assert math.isclose(row["weights_remaining"], alive)
    assert [row["file"] for row in verify(folder / "rep1")] == [str(f) for f in files[3:]]
    assert contents(tmp_path) == before


def rewritten(path, change) -> None:
    state = runs.read_tensors(path)
    change(state)
    runs.write_tensors(path, state)


def test_verify_finds_another_accuracy_mask_or_data_set(measured):
    folder, verify = measured
    file = folder / "rep0/level02.pt"
    state = runs.read_tensors(file)
    for key, off in (("test_accuracy", 1 / 360), ("weights_remaining", -1e-3)):
        numbers = state["numbers"] | {key: state["numbers"][key] + off}
        rewritten(file, lambda s, numbers=numbers: s.update(numbers=numbers))
        with pytest.raises(UserError, match=r"^1 of 6 levels .* differ from what was recorded \("):
            verify()
    rewritten(file, lambda s: s.update(numbers=state["numbers"]))
    assert len(verify()) == 6
    file.with_name("level03.pt").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"^1 of 7 levels .*level03\.pt: .*is level 2, renamed"):
        verify()
    file.with_name("level03.pt").unlink()
    other = (folder / "rep1/level02.pt").read_bytes()
    file.write_bytes(other)  # intact, but another replicate's
    with pytest.raises(UserError, match=r"^1 of 6 levels .*rep0/level02\.pt: .*result\.json has"):
        verify()
    file.write_bytes(other[:-100])
    (folder / "rep1/level01.pt").unlink()
    with pytest.raises(UserError, match=r"^2 of 6 levels .*rep0/level02\.pt is damaged"):
        verify()
    result = runs.read_json(folder / "rep1/result.json")
    result["levels"][0]["test_accuracy"] += 0.1
    runs.write_json(folder / "rep1/result.json", result)
    with pytest.raises(UserError, match=r"^3 of 6 levels"):
        verify()
    for path in folder.glob("rep*/[lr]e*"):
        path.unlink()
    with pytest.raises(UserError, match=r"no level was saved there$"):
        verify()
    with pytest.raises(UserError, match="measures what is saved: leave out --levels"):
        parse("imp", "--verify", folder, "--levels", 1)
    config = runs.read_json(folder / "rep0/config.json")
    config["settings"]["data"] = "0" * 16
    runs.write_json(folder / "rep0/config.json", config)
    with pytest.raises(UserError, match=r"rep0 was made from other data than digits$"):
        verify()
    with pytest.raises(UserError, match=r"no config\.json there or in rep<k> below it$"):
        verify(folder.parent)


def test_another_initialisation_must_be_another(stage):
    def fixed(channels, classes):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    with pytest.raises(UserError, match=r"^--control reinit: fixed always has the same weights$"):
        stage("imp", *TINY[2:], "--levels", 1, "--control", "reinit", model=fixed)


# ---- as a program --------------------------------------------------------------------------------


def test_a_copy_in_an_empty_folder_runs_with_scores_of_its_own(tmp_path):
    """With the files that common.py names; what needs another one says which."""
    for name in ("imp.py", "common.py", "options.py", "engine.py", "runs.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data")
    elsewhere = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def command(*flags):
        words = [sys.executable, "imp.py", "--device", "cpu", *map(str, flags)]
        how = {"text": True, "capture_output": True, "timeout": 300, "env": elsewhere}
        return subprocess.run(words, cwd=tmp_path, **how)

    few = ("--width", 2, "--levels", 1, "--steps", 20, "--rewind", 5)
    done = command(*few, "--networks", 2, "--score-step", 6)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("digits: 1,437 training and 360 test images of 8x8x1, 10 classes")
    assert "1,290 prunable" in lines[0] and "scores first: 2 networks x 6 steps" in lines[0]
    assert lines[1].startswith("el2n scores: mean of 2 networks")
    [head] = (k for k, line in enumerate(lines) if line.startswith("level  weights remaining"))
    table = [line.split()[:2] for line in lines[head + 1 : -1]]
    assert table == [["0", "100.00%"], ["1", "80.00%"]]  # 1290 - 258
    result = runs.read_json(tmp_path / lines[-1])
    assert [x["weights_remaining"] for x in result["levels"]] == [1, 0.8]
    assert not result["config"]["environments"][0]["csrc"]
    wrong = command("--dataset", "cifar10")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "imp.py: error: this needs loading.py beside options.py: copy it too\n"
