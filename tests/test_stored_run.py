"""A run folder that an earlier release left, stopped in level 1: format 2, which had no identity in
config.json. It is refused in one line where it would be continued, and nothing in it is touched;
what it holds is read, and measures as that release recorded it: expected.json has its numbers,
level02.pt its last network. Training draws other numbers since, so that none is repeated.
"""

import json
import shutil

import numpy as np
import plain
import pytest
import torch
from conftest import ROOT, contents, same, study_of

import engine
import inputs
import runs

PLACE = ROOT / "tests/runs/format2"
TRAINING = ("--width", 2, "--batch-size", 64, "--steps", 40, "--milestones", 30)
FLAGS = (*TRAINING, "--size", 128, "--rewind", 6, "--levels", 2)
SCORES = ("--scores", PLACE / "begun/el2n/digits-resnet8x2/el2n/scores.npy")
RUN = "imp/digits-resnet8x2/easy128-rewind6-steps40-drops30"


@pytest.fixture
def old(tmp_path):
    return shutil.copytree(PLACE / "begun", tmp_path / "results")


def expected() -> list[dict]:
    return json.loads((PLACE / "expected.json").read_text())["levels"]


@pytest.mark.parametrize("refused", ["el2n", "imp"])
def test_it_is_refused_in_one_line_and_left_as_it_was(old, stage, refused):
    """Its scores, where they would be made; with scores that are given, the run itself."""
    where, given = old / "el2n/digits-resnet8x2/el2n", ()
    if refused == "imp":
        where, given = old / RUN / "rep0", SCORES
    before = contents(old)
    with pytest.raises(runs.FormatError) as e:
        stage("imp", *FLAGS, *given, out=old)
    assert str(e.value) == (
        f"{where} was written by an earlier version (format 2, this continues 3): it can be read, "
        "not continued; --name TAG keeps both, --fresh of its own stage starts it over"
    )
    assert contents(old) == before


def test_a_name_keeps_both_and_fresh_starts_over(old, stage):
    """On the subset that its scores give: they are read."""
    before = contents(old)
    [named] = stage("imp", *FLAGS, *SCORES, "--name", "mine", out=old)
    assert len(named["levels"]) == 3 and before.items() <= contents(old).items()
    easy = np.argsort(np.load(SCORES[1]), kind="stable")[:128]
    assert np.load(old / f"{RUN}-mine/rep0/subset.npy").tolist() == sorted(easy.tolist())
    [fresh] = stage("imp", *FLAGS, *SCORES, "--fresh", out=old)
    for a, b in zip(fresh["levels"], named["levels"], strict=True):
        assert (a["test_accuracy"], a["test_loss"]) == (b["test_accuracy"], b["test_loss"])
    assert runs.read_json(old / RUN / "rep0/config.json")["format"] == 3
    assert not (old / RUN / "rep0/checkpoint.pt").exists()


def test_its_finished_level_measures_as_recorded(old, stage):
    before = contents(old)
    [row] = stage("imp", "--verify", old / RUN, out=old / "unused")
    assert row["file"] == str(old / RUN / "rep0/level00.pt")
    wanted = expected()[0]["test_accuracy"]
    assert (row["recorded"], row["measured"], row["weights_remaining"]) == (wanted, wanted, 1)
    assert contents(old) == before


def test_its_last_network_measures_as_recorded():
    """With today's reader and engine, and as an ordinary module in float64."""
    study, wanted = study_of("imp", *TRAINING, "--subset", "all"), expected()[2]
    network, networks = inputs.network_of(study, PLACE / "level02.pt", "it"), study.networks(1)
    networks.load(0, network.state, network.masks)
    assert engine.accuracy_and_loss(networks, study.data)[0] == [wanted["test_accuracy"]]
    assert networks.mask[0].double().mean().item() == wanted["weights_remaining"]
    stored = torch.load(PLACE / "level02.pt", weights_only=True)["model"]
    accuracy = plain.accuracy(plain.network(stored, width=2))
    assert accuracy == pytest.approx(wanted["test_accuracy"])


def test_a_new_run_starts_from_its_w_tr_and_mask(old, stage, tmp_path):
    flags = (*TRAINING, "--levels", 0, "--init", old / RUN)
    w_tr = runs.read_tensors(old / RUN / "rep0/pretrained.pt")
    stored = runs.read_tensors(PLACE / "level02.pt")["mask"]
    for name, more in (("dense", ()), ("sparse", ("--mask", PLACE / "level02.pt"))):
        [result] = stage("imp", *flags, *more, out=tmp_path / name)
        assert result["pretrain"]["step"] == 6
        [folder] = (tmp_path / name).rglob("rep0")
        start = runs.read_tensors(folder / "pretrained.pt")
        level = runs.read_tensors(folder / "level00.pt")
        if more:
            assert same(level["mask"], stored) and same(start["mask"], stored)
            for k, mask in stored.items():
                theirs = w_tr["model"][f"{k}.weight"]
                assert torch.equal(start["model"][f"{k}.weight"], theirs * mask)
            wanted = expected()[2]["projected_test_accuracy"]
            assert result["pretrain"]["test_accuracy"] == pytest.approx(wanted)
        else:
            assert same(start["model"], w_tr["model"])
            assert all(m.all() for m in level["mask"].values())
            assert result["pretrain"]["test_accuracy"] == w_tr["test_accuracy"]
