"""el2n.py against NumPy and SciPy in float64 and forgetting counted by hand."""

from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch
from conftest import digits
from scipy.stats import spearmanr

import el2n
import engine
import runs
from runs import UserError

TINY = ("--width", 4, "--networks", 2, "--score-step", 6)


def test_el2n_is_the_mean_norm_of_the_error_vectors(stage, tmp_path, monkeypatch):
    """Against NumPy in float64 on the logits that the stage's own networks give; a network gives
    the same alone."""
    logits = []
    predict = engine.predict
    monkeypatch.setattr(engine, "predict", lambda *a: logits.append(predict(*a)) or logits[-1])
    stage("el2n", *TINY)
    [folder] = (tmp_path / "results/el2n/digits-resnet8x4").iterdir()
    assert folder.name == "el2n-networks2-step6"
    y = digits().train_labels.numpy()
    each = [plain.losses(z, y)[2] for z in logits[0]]  # of (K, N, C)
    expected = np.mean(each, 0)
    np.testing.assert_allclose(np.load(folder / "scores.npy"), expected, rtol=1e-5, atol=1e-6)
    about = runs.read_json(folder / "scores.json")
    means = [expected[y == c].mean() for c in range(10)]
    assert about["classes_from_easy_to_hard"] == [str(c) for c in np.argsort(means)]
    found = [about["mean_by_class"][str(c)] for c in range(10)]
    np.testing.assert_allclose(found, means, rtol=1e-5)
    # Of two networks every split into halves is the same one; more of it in test_common.py.
    known, r = about["reliability"], spearmanr(*each).statistic
    assert known["split_half"] == pytest.approx(r, abs=1e-4)
    assert known["shared_by_chance"] == pytest.approx(256 / 1437)
    stage("el2n", *TINY, "--networks", 1)
    assert torch.equal(logits[1][0], logits[0][0])


def test_forgetting_by_hand():
    """Six presentations of four examples to one network; Toneva et al. count 1 -> 0 turns."""
    right = torch.tensor(
        [  # right at each presentation        events
            [0, 1, 1, 0, 1, 0],  # learned, forgotten twice
            [1, 1, 1, 1, 1, 1],  # never forgotten
            [0, 0, 0, 0, 0, 0],  # never learned: behind all others
            [1, 0, 1, 0, 1, 0],  # forgotten three times
        ]
    )
    labels = torch.zeros(4, dtype=torch.int64)
    stream = engine.Stream(labels, torch.arange(4), (0, 0), (0, 0))
    networks = SimpleNamespace(rows=1)
    t = engine.Training(None, None, networks, [stream], 0, 6, None)
    el2n.count_forgetting(t)
    for column in right.T:
        logits = torch.stack([column, 1 - column], -1).float()  # class 0 wins where right
        order = torch.randperm(4)
        t.watch(networks, 0, torch.zeros(1), order, logits[order])
    assert t.extra["forgotten"].tolist() == [[2, 0, 0, 3]]
    assert t.extra["learned"].tolist() == [[True, True, False, True]]
    assert el2n.forgetting_scores(t.extra).tolist() == [[2, 0, 6, 3]]


def test_forgetting_scores_rank_and_say_what_was_never_learned(stage, tmp_path):
    stage("el2n", *TINY[:4], "--metric", "forgetting", "--steps", 44)
    [path] = tmp_path.rglob("scores.npy")
    scores, never = np.load(path), np.load(path.parent / "never_learned.npy")
    assert scores.shape == never.shape == (1437,) and 0 < never.mean() < 1
    # 22 batches a pass of 1,437: two presentations at most, so one turn at most
    assert scores[never == 0].max() <= 1 and set(np.unique(never)) <= {0, 0.5, 1}
    assert (scores[never == 1] == 2).all() and (scores[never == 0.5] >= 1).all()


def test_a_run_that_diverges_says_at_which_step(stage, tmp_path):
    with pytest.raises(UserError, match=r"network \d diverged at step \d+: lower --lr \(1e\+06\)"):
        stage("el2n", *TINY, "--lr", 1e6, "--score-step", 40)
    assert not list(tmp_path.rglob("scores.npy"))


def test_missing_scores_are_made_once_and_do_not_depend_on_the_stage(stage, tmp_path):
    few = ("--width", 2, "--networks", 2, "--score-step", 6)
    stage("el2n", *few, out=tmp_path / "byhand")
    flags = (*few, "--size", 64, "--steps", 9, "--rewind", 2, "--levels", 0, "--milestones", "6")
    made = []
    for subset in ("easy", "hard"):
        stage("imp", "--subset", subset, *flags)
        [folder] = tmp_path.glob("results/el2n/*/*")
        made.append({p.name: p.read_bytes() for p in folder.glob("[!.]*")})
    assert made[0] == made[1]  # result.json too, which has the seconds
    [path] = tmp_path.glob("byhand/**/scores.npy")
    assert made[0]["scores.npy"] == path.read_bytes()
