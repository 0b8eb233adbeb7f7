"""warmup.py: eigenvalues against dense Hessians in float64, phases against one plain training."""

import copy
import gc
import json
import math

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from conftest import digits, parse, study_of
from torch import nn
from torch.func import functional_call

import common
import engine
import options
import runs
import warmup

NETWORK = ("--width", 4, "--steps", 40, "--milestones", "20,30", "--batch-size", 64)
NETWORK += ("--peak-lr", 0.4, "--warmup", 18, "--sharpness-every", 20, "--sharpness-sample", 16)
TINY = (*NETWORK, "--subset", "random", "--size", 128)


def run(out, line: str = "", usual=TINY, **handed_in) -> list[dict]:
    s = parse("warmup", *usual, "--out", out, *line.split())
    return warmup.main(s, options.HandedIn(**handed_in))


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


def dense_spectrum(module: nn.Module, x, y, without: tuple[str, ...] = ()) -> np.ndarray:
    """All eigenvalues, ascending, of the Hessian that autograd writes out in float64, over all
    parameters but those named in `without`."""
    module = copy.deepcopy(module).double().train()
    named = {k: p for k, p in module.named_parameters() if k not in without}
    names, sizes = list(named), [p.numel() for p in named.values()]
    shapes = [p.shape for p in named.values()]
    x = x.double()

    def loss(w):
        parts = [p.view(s) for p, s in zip(w.split(sizes), shapes, strict=True)]
        weights = dict(zip(names, parts, strict=True))
        return F.cross_entropy(functional_call(module, weights, (x,)), y)

    w = torch.cat([p.detach().reshape(-1) for p in named.values()])
    return np.linalg.eigvalsh(torch.autograd.functional.hessian(loss, w).numpy())


def top(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return warmup.top_eigenvalue(module, x, y, np.random.default_rng(1).standard_normal(size))


@pytest.mark.parametrize("norm", (True, False))
def test_top_eigenvalue_against_the_dense_hessian(norm):
    downward = 0
    for seed in range(4):
        module, x, y = tiny(norm, seed)
        spectrum = dense_spectrum(module, x, y)
        loss, found = top(module, x, y)
        assert found == pytest.approx(spectrum[-1], rel=1e-3)
        assert loss == pytest.approx(F.cross_entropy(module(x), y).item(), rel=1e-5)
        downward += -spectrum[0] > spectrum[-1]
    if not norm:
        assert downward, "no case where the largest magnitude is negative"


class Partly(nn.Module):
    """A frozen layer between trained ones, and parameters that the logits do not depend on, the
    first of them before those that they do depend on."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(7))
        self.first = nn.Conv2d(channels, 3, 3, stride=2)
        self.frozen = nn.Conv2d(3, 4, 1).requires_grad_(False)
        self.norm = nn.BatchNorm2d(4)
        self.aside, self.head = nn.Linear(2, 5), nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.norm(self.frozen(self.first(x).tanh())).tanh().mean((2, 3)))


UNTRAINED = ("unused", "frozen.weight", "frozen.bias", "aside.weight", "aside.bias")


def test_an_eigenvalue_below_zero_beside_an_unused_parameter():
    """An unused parameter has eigenvalues of 0, and is no part of the Hessian."""

    class Valley(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            """Logits z = -(w1^2 + 2 w2^2 + 3 w3^2) / 2 and 0."""
            z = -(self.w**2 * torch.tensor([1.0, 2.0, 3.0])).sum() / 2
            return torch.stack([z.expand(len(x)), torch.zeros(len(x))], 1)

    # At w = 0: dz/dw = 0, d2z/dw2 = -(1, 2, 3), and d loss / dz is 1/2 for label 1, -1/2 for 0.
    x = torch.zeros(4, 1)
    assert top(Valley(), x, torch.ones(4).long())[1] == pytest.approx(-0.5)
    assert top(Valley(), x, torch.zeros(4).long())[1] == pytest.approx(1.5)


def test_the_first_eigenvalue_of_a_run_is_over_what_is_trained(tmp_path):
    """At step 0: on the sample of the seed, true labels, no augmentation."""
    line = "--warmup 0 --steps 1 --milestones 1 --sharpness-every 1"
    [result] = run(tmp_path, line, NETWORK, model=Partly)
    own = study_of("warmup", *NETWORK, *line.split(), model=Partly)
    module, data = Partly(1, 10), own.data
    module.load_state_dict(own.initial_state_dict(0))
    sample = engine.generator(0, "sample").permutation(1437)[:16]
    case = module, plain.images(data, data.train_images[sample]), data.train_labels[sample]
    wanted = dense_spectrum(*case, UNTRAINED)
    assert len(wanted) == 30 + 8 + 50  # first, norm, head
    assert result["sharpness"][0]["eigenvalue"] == pytest.approx(wanted[-1], rel=1e-3)
    with_frozen = dense_spectrum(*case, (UNTRAINED[0], *UNTRAINED[3:]))
    assert with_frozen[-1] > 1.01 * wanted[-1]  # that of the frozen layer would be seen


def test_measuring_leaves_the_network_as_it_was():
    networks = engine.Networks(common.ResNet(8, 4, 1, 10), 2, torch.device("cpu"))
    for r in range(2):
        common.initialise_resnet(networks.template, engine.generator(0, "init", r))
        networks.load(r, networks.template.state_dict())
    names = (*engine.STATE, "gradient")
    before = {k: getattr(networks, k).clone() for k in names}
    x, y = torch.randn(8, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    value = top(networks.modules[1], x, y)
    assert all(torch.equal(before[k], getattr(networks, k)) for k in names)
    assert value == top(networks.modules[1], x, y)
    networks.modules[1](x)  # running statistics move again
    assert not torch.equal(before["statistics"], networks.statistics)


def test_no_eigenvalue_is_not_a_crash(monkeypatch):
    module, x, y = tiny(True, 0)

    def tired(*_, **__):
        raise warmup.ArpackNoConvergence("no", np.array([]), np.zeros((0, 0)))

    monkeypatch.setattr(warmup, "eigsh", tired)
    assert math.isnan(top(module, x, y)[1])
    with torch.no_grad():
        module[0].weight.fill_(math.nan)
    assert math.isnan(top(module, x, y)[1])


def test_no_graph_stays_alive_after_an_evaluation():
    module, x, y = tiny(True, 0)
    counts = []
    gc.collect()
    gc.disable()  # so that cycles, which would keep graphs alive, are counted
    try:
        for _ in range(6):
            top(module, x, y)
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[1] == counts[-1]


# ---- the two phases ------------------------------------------------------------------------------


def test_phases_are_one_training_with_momentum_and_order_kept(tmp_path):
    """With all data as the subset, one uninterrupted training is the same, to the last bit."""
    flags = (*NETWORK, "--subset", "all")
    [result] = run(tmp_path, usual=flags)
    study = study_of("warmup", *flags)
    networks, data = study.networks(1), study.data
    networks.load(0, study.initial_state_dict(0))

    def rate(s):
        return 0.4 * s / 18 if s < 18 else 0.4 * 0.1 ** ((s >= 20) + (s >= 30))

    for _ in engine.train(study.training(networks, [study.stream(0)], 0, 40, rate)):
        pass
    loss, _, _ = engine.evaluate(networks, data, data.train_images, data.train_labels)
    assert result["train_loss"] == loss[0].double().mean().item()
    assert result["test_accuracy"] == engine.accuracy_and_loss(networks, data)[0][0]
    assert [x["step"] for x in result["sharpness"]] == [0, 20, 40]


def test_phase_1_sees_the_window_and_phase_2_everything(tmp_path, monkeypatch):
    seen, usual = [], engine.fit

    def fit(t, group, phase, *more):
        seen.append((phase, t.start, t.stop, t.streams[0].indices.tolist(), t.lr_at(t.start)))
        return usual(t, group, phase, *more)

    monkeypatch.setattr(engine, "fit", fit)
    scores = np.random.default_rng(0).random(1437).astype(np.float32)
    np.save(tmp_path / "mine.npy", scores)
    line = f"--subset easy --offset 100 --size 64 --scores {tmp_path / 'mine.npy'}"
    run(tmp_path, f"{line} --sharpness-every 0 --warmup 0,18")
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
        return run(place, "--replicate 0-1")


@pytest.mark.parametrize("stop", (1, 5, 9))
def test_resumes_to_the_same_bits(undisturbed, tmp_path, monkeypatch, stop):
    """Files in order: replicate 0's and 1's at steps 16 and 18, warm.pt; then 20, 36, 40."""
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
        run(tmp_path, line)
    again = run(tmp_path, line)
    for key in undisturbed[0].keys() - {"config", "seconds", "sha256"}:
        assert [r[key] for r in undisturbed] == [r[key] for r in again], key
    assert undisturbed[0]["train_loss"] != undisturbed[1]["train_loss"]


def test_replicates_warm_up_on_balanced_subsets_of_their_own(undisturbed, place):
    first, second = (np.load(next(place.rglob(f"rep{r}/subset.npy"))) for r in (0, 1))
    labels = digits().train_labels.numpy()
    for subset in (first, second):
        assert len(set(subset.tolist())) == 128
        assert np.bincount(labels[subset]).min() >= 12  # the other 8 fall where they may
    assert not np.array_equal(first, second)


# ---- outcomes, presets, mistakes -----------------------------------------------------------------


def test_divergence_is_an_outcome(tmp_path):
    [result] = run(tmp_path, "--peak-lr 1e6")
    assert (result["outcome"], result["test_accuracy"], result["ended"]) == ("diverged", None, None)
    assert 0 < result["diverged_at"] < 40
    values = {x["step"]: x["eigenvalue"] for x in result["sharpness"]}
    assert values[0] > 0
    assert values[40] is None


def test_chance_is_an_outcome(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "accuracy_and_loss", lambda *_: ([0.1], [2.3]))
    [result] = run(tmp_path, "--sharpness-every 0")
    assert (result["outcome"], result["test_accuracy"]) == ("chance", 0.1)


def test_the_paper_settings_and_those_of_the_scores():
    """Scores are made by Table 1's settings, so that all stages share them."""
    ours = warmup.PRESETS["cifar10"]
    assert (ours.batch_size, ours.steps, ours.milestones) == (1024, 7840, (3920, 5880))
    assert (ours.lr, ours.depth, ours.momentum, ours.weight_decay) == (3.2, 20, 0.9, 1e-4)
    s = parse("warmup")
    assert (s.batch_size, s.lr, s.warmup) == (128, 4.0, (0, 80))
    scored = options.scoring(s)
    assert (scored.batch_size, scored.lr) == (64, 0.1)
    assert options.el2n_name(scored) == options.el2n_name(parse("el2n"))
    own = options.scoring(parse("warmup", "--width", 4, "--score-step", 5, "--subset", "easy"))
    assert (own.width, own.score_step, own.batch_size) == (4, 5, 64)


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


class Attends(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 10)

    def forward(self, x):
        x = x[:, 0]
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_the_hessian_of_attention(tmp_path):
    """Whose fused operation cannot be differentiated twice."""
    line = "--subset random --warmup 0 --steps 8 --milestones 6 --sharpness-every 8"
    [result] = run(tmp_path, line, NETWORK[2:], model=Attends)
    assert all(math.isfinite(x["eigenvalue"]) for x in result["sharpness"])
