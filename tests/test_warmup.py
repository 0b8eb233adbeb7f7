"""warmup.py: eigenvalues against dense Hessians in float64, phases against one plain training."""

import copy
import gc
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import common
import el2n
import runs
import warmup

TINY = (
    "--width 4 --steps 40 --milestones 20,30 --batch-size 64 --peak-lr 0.4 --subset random "
    "--size 128 --warmup 18 --sharpness-every 20 --sharpness-sample 16 --quiet"
)


def parse(out, line: str = ""):
    return warmup.flags().parse_args([*TINY.split(), "--out", str(out), *line.split()])


def plain(result: dict) -> dict:
    """What must not depend on how often a run was stopped."""
    return {k: v for k, v in result.items() if k not in ("config", "seconds", "sha256")}


# ---- sharpness -----------------------------------------------------------------------------------


def tiny(norm: bool, seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    between = nn.BatchNorm2d(3) if norm else nn.Identity()
    parts = nn.Conv2d(1, 3, 3), between, nn.Tanh(), nn.Conv2d(3, 4, 3, bias=False), nn.Flatten()
    module = nn.Sequential(*parts)
    x, y = torch.randn(12, 1, 5, 5), torch.randint(0, 4, (12,))
    if not norm:  # far from a minimum: saddles with strong downward directions
        for p in module.parameters():
            nn.init.normal_(p, std=1.0)
    return module, x, y


def dense_spectrum(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """All eigenvalues, ascending, of the Hessian that autograd writes out in float64."""
    module = copy.deepcopy(module).double().train()
    names = [k for k, _ in module.named_parameters()]
    sizes = [p.numel() for p in module.parameters()]
    shapes = [p.shape for p in module.parameters()]
    x = x.double()

    def loss(w):
        parts = [p.view(s) for p, s in zip(w.split(sizes), shapes, strict=True)]
        weights = dict(zip(names, parts, strict=True))
        return F.cross_entropy(functional_call(module, weights, (x,)), y)

    w = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    return np.linalg.eigvalsh(torch.autograd.functional.hessian(loss, w).numpy())


def top(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    size = sum(p.numel() for p in module.parameters())
    return warmup.top_eigenvalue(module, x, y, np.random.default_rng(1).standard_normal(size))


@pytest.mark.parametrize("norm", (True, False))
def test_top_eigenvalue_against_the_dense_hessian(norm):
    downward = 0
    for seed in range(8):
        module, x, y = tiny(norm, seed)
        spectrum = dense_spectrum(module, x, y)
        loss, found = top(module, x, y)
        assert found == pytest.approx(spectrum[-1], rel=1e-3)
        assert loss == pytest.approx(F.cross_entropy(module(x), y).item(), rel=1e-5)
        downward += -spectrum[0] > spectrum[-1]
    if not norm:
        assert downward, "no case where the largest magnitude is negative"


def test_top_eigenvalue_of_a_resnet(tmp_path):
    args = parse(tmp_path, "--width 1")
    data = warmup.prepare(args)
    data.classes = data.classes[:3]
    module = common.make_model(args, data)
    module.load_state_dict(common.fresh_state(args, data, 0))
    torch.manual_seed(0)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))
    assert top(module, x, y)[1] == pytest.approx(dense_spectrum(module, x, y)[-1], rel=1e-3)


def test_measuring_leaves_the_network_as_it_was(tmp_path):
    args = parse(tmp_path)
    data = warmup.prepare(args)
    networks = common.Networks(common.make_model(args, data), 2, torch.device("cpu"))
    for r in range(2):
        networks.load(r, common.fresh_state(args, data, r))
    names = ("weights", "momentum", "gradient", "batchnorm")
    before = {k: getattr(networks, k).clone() for k in names}
    x, y = torch.randn(8, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    value = top(networks.modules[1], x, y)
    assert all(torch.equal(before[k], getattr(networks, k)) for k in names)
    assert value == top(networks.modules[1], x, y)
    networks.modules[1](x)  # running statistics move again
    assert not torch.equal(before["batchnorm"], networks.batchnorm)


def test_no_eigenvalue_is_not_a_crash(monkeypatch):
    module, x, y = tiny(True, 0)

    def tired(*_, **__):
        raise warmup.ArpackNoConvergence("no", np.array([]), np.zeros((0, 0)))

    monkeypatch.setattr(warmup, "eigsh", tired)
    assert math.isnan(top(module, x, y)[1])
    with torch.no_grad():
        module[0].weight.fill_(math.nan)
    assert math.isnan(top(module, x, y)[1])


def test_memory_is_flat_over_60_evaluations():
    module, x, y = tiny(True, 0)
    start = np.random.default_rng(1).standard_normal(sum(p.numel() for p in module.parameters()))
    gc.collect()
    gc.disable()  # so that cycles, which would keep graphs alive, are counted
    try:
        sizes, tensors = [], []
        for k in range(60):
            warmup.top_eigenvalue(module, x, y, start, tolerance=0.1)
            if k % 6 == 5:
                with open("/proc/self/statm") as f:
                    sizes.append(int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
                tensors.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    finally:
        gc.enable()
    assert tensors[0] == tensors[-1]
    assert sizes[-1] - sizes[1] < 2**22


# ---- the two phases ------------------------------------------------------------------------------


def test_phases_are_one_training_with_momentum_and_order_kept(tmp_path):
    """With all data as the subset, one uninterrupted training is the same, to the last bit."""
    one = parse(tmp_path, "--subset all")
    one.size = None
    [result] = warmup.main(copy.copy(one))
    data = warmup.prepare(one)
    networks = common.Networks(common.make_model(one, data), 1, one.device)
    networks.load(0, common.fresh_state(one, data, 0))

    def rate(s):
        return 0.4 * s / 18 if s < 18 else 0.4 * 0.1 ** ((s >= 20) + (s >= 30))

    streams = [common.make_stream(one, data, 0)]
    for _ in common.train(common.Training(one, data, networks, streams, 0, 40, rate)):
        pass
    loss, _, _ = common.evaluate(networks, data, data.train_images, data.train_labels)
    assert result["train_loss"] == loss[0].double().mean().item()
    assert result["test_accuracy"] == common.accuracy(networks, data)[0]
    assert [x["step"] for x in result["sharpness"]] == [0, 20, 40]


def test_phase_1_sees_the_window_and_phase_2_everything(tmp_path, monkeypatch):
    seen, usual = [], common.fit

    def fit(t, runs, phase, *more):
        seen.append((phase, t.start, t.stop, t.streams[0].indices.tolist(), t.lr_at(t.start)))
        return usual(t, runs, phase, *more)

    monkeypatch.setattr(common, "fit", fit)
    scores = np.random.default_rng(0).random(1437).astype(np.float32)
    np.save(tmp_path / "mine.npy", scores)
    line = f"--subset easy --offset 100 --size 64 --scores {tmp_path / 'mine.npy'}"
    warmup.main(parse(tmp_path, f"{line} --sharpness-every 0 --warmup 0,18"))
    window = sorted(np.argsort(scores)[100:164].tolist())
    everything = list(range(1437))
    assert seen == [
        ("main", 0, 40, everything, 0.4),
        ("warmup", 0, 18, window, 0.0),
        ("main", 18, 40, everything, 0.4),
    ]
    base = tmp_path / "warmup/digits-resnet8x4"
    names = {p.name.partition("-steps")[0] for p in base.iterdir()}
    assert names == {"all-warmup0", "easy64+100-mine-warmup18"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


def cheap(module, x, y, start) -> tuple[float, float]:
    """In place of an eigenvalue where only its way into the files matters."""
    return 1.0, sum(p.double().sum().item() for p in module.parameters())


@pytest.fixture(scope="module")
def undisturbed(place):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(warmup, "top_eigenvalue", cheap)
        return warmup.main(parse(place, "--replicate 0-1"))


# Files in order: replicate 0's and 1's at steps 16 and 18, warm.pt; then at steps 20, 36, 40.
@pytest.mark.parametrize("stop", (1, 5, 9))
def test_resumes_to_the_same_bits(undisturbed, tmp_path, monkeypatch, stop):
    calls, usual = [], runs.Run.save

    def save(run, *state):
        usual(run, *state)
        calls.append(run)
        if len(calls) == stop:
            raise SystemExit(143)

    monkeypatch.setattr(runs.Run, "save", save)
    monkeypatch.setattr(warmup, "top_eigenvalue", cheap)
    line = "--replicate 0-1 --checkpoint-every 0"
    with pytest.raises(SystemExit):
        warmup.main(parse(tmp_path, line))
    again = warmup.main(parse(tmp_path, line))
    for one, other in zip(undisturbed, again, strict=True):
        assert plain(one) == plain(other)
    assert undisturbed[0]["train_loss"] != undisturbed[1]["train_loss"]


def test_a_replicate_is_the_same_alone(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(warmup, "top_eigenvalue", cheap)
    assert plain(warmup.main(parse(tmp_path, "--replicate 1"))[0]) == plain(undisturbed[1])


# ---- outcomes, presets, mistakes -----------------------------------------------------------------


def test_divergence_is_an_outcome(tmp_path):
    [result] = warmup.main(parse(tmp_path, "--peak-lr 1e6"))
    assert (result["outcome"], result["test_accuracy"], result["ended"]) == ("diverged", None, None)
    assert 0 < result["diverged_at"] < 40
    values = {x["step"]: x["eigenvalue"] for x in result["sharpness"]}
    assert values[0] > 0
    assert values[40] is None


def test_chance_is_an_outcome(tmp_path, monkeypatch):
    usual = common.accuracy
    monkeypatch.setattr(common, "accuracy", lambda *a: [0.1 for _ in usual(*a)])
    [result] = warmup.main(parse(tmp_path, "--sharpness-every 0"))
    assert (result["outcome"], result["test_accuracy"]) == ("chance", 0.1)


def test_the_paper_settings_and_those_of_the_scores(tmp_path, monkeypatch):
    ours = warmup.PRESETS["cifar10"]
    assert (ours.batch_size, ours.steps, ours.milestones) == (1024, 7840, (3920, 5880))
    assert (ours.lr, ours.depth, ours.momentum, ours.weight_decay) == (3.2, 20, 0.9, 1e-4)
    usual = el2n.flags().parse_args(["--out", str(tmp_path)])
    common.fill(usual)
    seen = []

    def read_scores(args, data):
        seen.append((common.score_settings(args), common.scores_path(args)))
        return np.arange(1437.0)

    monkeypatch.setattr(common, "read_scores", read_scores)
    args = warmup.flags().parse_args(["--quiet", "--out", str(tmp_path)])
    data = warmup.prepare(args)
    assert seen == [(common.score_settings(usual), common.scores_path(usual))]
    assert (seen[0][0]["batch_size"], seen[0][0]["lr"]) == (64, 0.1)  # Table 1's, not warmup's
    assert (args.batch_size, args.lr, args.lengths) == (128, 4.0, (0, 80))
    assert np.array_equal(data.scores, np.arange(1437.0))


def test_the_table_and_the_log(undisturbed, place):
    shown = warmup.table({18: undisturbed})
    assert "2 of 2" in shown.splitlines()[1]
    [path] = place.glob("warmup/*/*/rep0/log.csv")
    rows = [line.split(",") for line in path.read_text().splitlines()]
    assert [r[:2] for r in rows[1:]] == [
        ["warmup", "0"],
        ["main", "20"],
        ["main", "40"],
        ["end", "40"],
    ]
    result = json.loads((path.parent / "result.json").read_text())
    column = rows[0].index("eigenvalue")
    assert [float(r[column]) for r in rows[1:4]] == [x["eigenvalue"] for x in result["sharpness"]]
