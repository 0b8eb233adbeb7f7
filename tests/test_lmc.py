"""lmc.py against NumPy in float64 on state dicts averaged by hand, and against imp.py."""

import copy
import itertools
import json
import shutil

import numpy as np
import plain
import pytest
import torch
from conftest import digits, parse, study_of
from torch import nn

import common
import engine
import imp
import lmc
import runs

NETWORK = ("--width", 4, "--steps", 30, "--milestones", 20, "--batch-size", 64)
TINY = (*NETWORK, "--subset", "random", "--size", 128)


def run(out, line: str, stage=lmc) -> list[dict]:
    return stage.main(parse(stage.__name__, *TINY, "--out", out, *line.split()))


def study(line: str = "") -> common.Study:
    return study_of("lmc", *TINY, *line.split())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two spawn points, two replicates, measured at the midpoint."""
    out = tmp_path_factory.mktemp("done")
    results = run(out, "--rewind 0,10 --replicate 0-1")
    return out, results


@pytest.fixture
def copied(done, tmp_path):
    return shutil.copytree(done[0], tmp_path / "results")


def folder(out, name: str = "random128-rewind10", replicate: int = 0):
    return out / "lmc/digits-resnet8x4" / f"{name}-steps30-drops20" / f"rep{replicate}"


def states(out, **where) -> list[dict]:
    return [runs.read_tensors(folder(out, **where) / f"child{c}.pt")["model"] for c in range(3)]


def children(out, **where) -> list[torch.nn.Module]:
    return [plain.network(state) for state in states(out, **where)]


def losses(module) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy and error of every training image, (N,) float64."""
    data = digits()
    return plain.losses(plain.logits(module, data.train_images), data.train_labels)[:2]


def mixed(a, b, alpha: float) -> torch.nn.Module:
    """Every entry of the two state dicts mixed, as the authors do."""
    module, first, second = copy.deepcopy(a), a.state_dict(), b.state_dict()
    entries = {k: (1 - alpha) * first[k] + alpha * second[k] for k in first}
    assert not module.load_state_dict(entries, strict=False).missing_keys
    return module


def barriers(modules, alphas) -> np.ndarray:
    """(2, pairs, A, N): loss and error barriers."""
    ends, found = [losses(m) for m in modules], []
    for i, j in itertools.combinations(range(len(modules)), 2):
        for a in alphas:
            middle = losses(mixed(modules[i], modules[j], a))
            found.append(np.array(middle) - (1 - a) * np.array(ends[i]) - a * np.array(ends[j]))
    return np.array(found).reshape(-1, len(alphas), 2, 1437).transpose(2, 0, 1, 3)


def agree(found: np.ndarray, wanted: np.ndarray) -> None:
    """Of float32 against float64; an error may turn where two logits are as good as equal."""
    assert np.allclose(found[0], wanted[0], rtol=1e-4, atol=2e-4)
    assert (found[1] != wanted[1]).mean() < 1e-3


def barrier_pairs(where) -> np.ndarray:
    return np.array([np.load(where / f"{k}_barrier_pairs.npy") for k in ("loss", "error")])


def test_midpoint_against_averaged_state_dicts(done):
    out, results = done
    where = folder(out)
    wanted = barriers(children(out), [0.5])[:, :, 0]
    agree(barrier_pairs(where), wanted)
    mean = np.load(where / "loss_barrier.npy")
    assert mean.dtype == np.float32
    assert np.allclose(mean, wanted[0].mean(0), rtol=1e-4, atol=2e-4)
    result = json.loads((where / "result.json").read_text())
    assert result["loss_barrier"] == pytest.approx(wanted[0].mean(), rel=1e-4)
    assert result["loss_barrier_std"] == pytest.approx(wanted[0].mean(1).std(ddof=1), rel=1e-3)
    assert result["error_barrier"] == pytest.approx(wanted[1].mean(), abs=1e-3)
    assert result["connected"] == (result["error_barrier"] < 0.02)
    assert [p["children"] for p in result["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    assert len({r["pretrain"]["fingerprint"] for r in results}) == 4
    ends = [losses(m)[0].mean() for m in children(out)]
    assert [c["train_loss"] for c in result["children"]] == pytest.approx(ends, rel=1e-5)


def test_supremum_per_pair_and_per_example(done, copied):
    grid = [0, 0.25, 0.5, 0.75, 1]
    run(copied, "--rewind 10 --alphas 5")
    wanted = barriers(children(copied), grid)
    where = folder(copied)
    agree(barrier_pairs(where), wanted.max(2))
    result = json.loads((where / "result.json").read_text())
    assert result["alphas"] == grid
    for pair, loss in zip(result["pairs"], wanted[0], strict=True):
        assert pair["loss_barrier"] == pytest.approx(loss.mean(1).max(), rel=1e-4, abs=1e-6)
        assert pair["loss_barrier_at_alphas"][0] == pair["loss_barrier_at_alphas"][4] == 0


def test_recompute_against_the_mean_of_the_batches(done):
    out, data = done[0], digits()
    found = lmc.measure(study("--batchnorm recompute"), states(out))
    order = engine.generator(0, "sample").permutation(len(data.train_labels))
    batches = order[: len(order) // 64 * 64].reshape(-1, 64)

    def recomputed(module):
        module = copy.deepcopy(module).train()
        norms, seen = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)], []
        for m in norms:
            m.momentum = 1.0  # the statistics of the last batch alone
        for i in batches:
            module(plain.images(data, data.train_images[torch.from_numpy(i)]))
            seen.append([(m.running_mean.clone(), m.running_var.clone()) for m in norms])
        for k, m in enumerate(norms):
            m.running_mean.copy_(sum(x[k][0] for x in seen) / len(seen))
            m.running_var.copy_(sum(x[k][1] for x in seen) / len(seen))
        return module.eval()

    ends = children(out)
    ends_losses = [losses(recomputed(m))[0] for m in ends]
    for p, (i, j) in enumerate(found["pairs"]):
        middle = losses(recomputed(mixed(ends[i], ends[j], 0.5)))[0]
        wanted = middle - (ends_losses[i] + ends_losses[j]) / 2
        assert np.allclose(found["loss_barrier_pairs"][p], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batchnorm", ("average", "recompute"))
def test_a_network_with_itself_and_the_order_of_the_ends(done, batchnorm):
    asked = study(f"--batchnorm {batchnorm} --alphas 3")
    first, second, _ = states(done[0])
    same = lmc.measure(asked, [first, first])
    assert not same["loss_barrier_pairs"].any() and not same["error_barrier_pairs"].any()
    one, other = (lmc.measure(asked, x) for x in ([first, second], [second, first]))
    assert np.array_equal(one["loss_barrier_pairs"], other["loss_barrier_pairs"])
    assert one["loss_at"][0].any() and not one["loss_at"][:, [0, 2]].any()  # the ends' own losses
    assert one["train_loss"] == other["train_loss"][::-1]


@pytest.mark.parametrize(("alphas", "passes"), ((1, 6), (5, 12)))
def test_every_network_runs_once(done, monkeypatch, alphas, passes):
    seen, usual = [], engine.predict

    def predict(networks, data, images):
        seen.append(networks.rows * len(images))
        return usual(networks, data, images)

    monkeypatch.setattr(engine, "predict", predict)
    lmc.measure(study(f"--alphas {alphas}"), states(done[0]))
    assert sum(seen) == passes * 1437


def test_child_0_is_level_0_of_imp_and_a_parent_is_the_same_w_tr(done, copied):
    out, results = done
    [dense] = run(out, "--rewind 10 --levels 0", imp)
    where = folder(out)
    level = out / "imp/digits-resnet8x4" / where.parent.name / "rep0/level00.pt"
    model, (first, second, _) = runs.read_tensors(level)["model"], states(out)
    assert runs.fingerprint(first) == runs.fingerprint(model) != runs.fingerprint(second)
    assert results[2]["pretrain"]["fingerprint"] == dense["pretrain"]["fingerprint"]
    [again] = lmc.main(parse("lmc", *NETWORK, "--out", copied, "--parent", where.parent))
    for key in ("loss_barrier", "error_barrier", "pairs"):
        assert again[key] == results[2][key]


def test_scores_are_means_over_replicates_and_imp_takes_them(done):
    out = done[0]
    path = folder(out).parent / "scores.npy"
    each = [np.load(folder(out, replicate=r) / "loss_barrier.npy") for r in (0, 1)]
    assert np.allclose(np.load(path), (each[0] + each[1]) / 2, rtol=1e-6, atol=1e-7)
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["metric"], about["replicates"]) == ("lmc", [0, 1])
    labels = digits().train_labels.numpy()
    threes = np.load(path)[labels == 3].mean()
    assert about["mean_by_class"]["3"] == pytest.approx(threes, rel=1e-4)
    line = f"--subset easy --scores {path} --rewind 10 --levels 0"
    run(out, line, imp)
    assert (
        out / "imp/digits-resnet8x4/easy128-lmc10-rewind10-steps30-drops20/rep0/result.json"
    ).exists()


def test_measuring_again_trains_nothing(copied, monkeypatch):
    def refuse(*_):
        raise AssertionError("trained")

    monkeypatch.setattr(engine, "fit", refuse)
    wider = run(copied, "--rewind 0,10 --alphas 3 --batchnorm recompute")
    assert [(len(r["alphas"]), r["batchnorm"]) for r in wider] == [(3, "recompute")] * 2
    before = json.loads((folder(copied) / "result.json").read_text())
    path = folder(copied) / "loss_barrier.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"abcd")
    run(copied, "--rewind 0,10 --alphas 3 --batchnorm recompute")
    assert path.read_bytes() == content
    monkeypatch.setattr(lmc, "measure", refuse)
    again = run(copied, "--rewind 0,10 --alphas 3 --batchnorm recompute")
    assert again[1]["pairs"] == before["pairs"]


def test_onset():
    def results(step, *connected):
        return [
            {"pretrain": {"step": step, "test_accuracy": 0.5}, "children": [{"test_accuracy": 0.5}]}
            | {"loss_barrier": 0.1, "error_barrier": 0.01, "connected": c}
            for c in connected
        ]

    spawned = [results(0, True, True), results(2, True, False)]
    spawned += [results(4, True, True), results(8, True, True)]
    assert "connected from step 4 on" in lmc.table(spawned)
    assert "not connected at the last" in lmc.table(spawned[:2])


def test_a_child_that_diverges_ends_the_run(tmp_path):
    with pytest.raises(runs.UserError, match="child 0 from step 0 diverged"):
        run(tmp_path, "--rewind 0 --lr 1e6")
    [path] = tmp_path.glob("lmc/*/*/rep0/result.json")
    assert runs.read_json(path)["loss_barrier"] is None


def test_between_saved_levels(tmp_path):
    run(tmp_path, "--rewind 10 --levels 1", imp)
    levels = sorted(tmp_path.glob("imp/*/*/rep0/level0?.pt"))
    [result] = lmc.main(parse("lmc", *NETWORK, "--out", tmp_path, "--between", *levels))
    networks = [runs.read_tensors(path)["model"] for path in levels]
    measured = lmc.measure(study(), networks)
    where = next(tmp_path.glob("lmc/*/between-level00+level01-*/rep0"))
    for kind in ("loss", "error"):
        saved = np.load(where / f"{kind}_barrier_pairs.npy")
        assert np.array_equal(saved, measured[f"{kind}_barrier_pairs"])
        assert result["pairs"][0][f"{kind}_barrier"] == measured[f"{kind}_at"].item()
    modules = [plain.network(x) for x in networks]
    agree(barrier_pairs(where), barriers(modules, [0.5])[:, :, 0])
    assert [child["file"] for child in result["children"]] == [*map(str, levels)]
    ends = [losses(m)[0].mean() for m in modules]
    assert [child["train_loss"] for child in result["children"]] == pytest.approx(ends, rel=1e-5)


class Shuffled(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.register_buffer("order", torch.randperm(64))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1)[:, self.order])


def test_the_midpoint_has_the_integer_buffers_of_the_ends():
    study = study_of("lmc", "--rewind", 0, model=Shuffled)
    state = study.initial_state_dict(3)
    assert abs(lmc.measure(study, [state, state])["loss_at"]).max() < 1e-6
    with pytest.raises(
        runs.UserError, match=r"^order \(torch.int64\) differs between the networks"
    ):
        lmc.measure(study, [state, study.initial_state_dict(4)])
