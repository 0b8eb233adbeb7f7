"""Subsets, label noise, the ResNet, scores and pre-training, against NumPy and plain PyTorch."""

import functools
import math
import random
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from conftest import same, study_of
from torch import nn

import common
import engine
import inputs
import runs
from runs import UserError

SMALL = ("--width", 4, "--batch-size", 32, "--steps", 30)
RANDOM = ("--subset", "random", "--size", 128)


def train_plainly(study, replicate, steps, lr, indices, labels):
    """A network of a replicate after `steps` of torch.optim.SGD at a constant rate, in float64."""
    module = common.ResNet(8, 4, 1, 10)
    module.load_state_dict(study.initial_state_dict(replicate))
    keys = (engine.philox_key(0, p, replicate) for p in ("order", "augment"))
    plain.train(module, study.data, engine.Stream(labels, indices, *keys), [lr] * steps, 1e-4)
    return module.double().eval()


# ---- label noise and subsets ---------------------------------------------------------------------


def test_noise_takes_the_exact_ceiling():
    """7 % of 50,000 is 3,500, though 0.07 * 50000 lies a little above in floating point."""
    labels = torch.full((50000,), 9)
    data = SimpleNamespace(train_labels=labels, classes=list(range(9)))  # no draw is 9
    for fraction, expected in ((0.07, 3500), (0.00001, 1), (1.0, 50000)):
        assert (common.noisy_labels(data, fraction, seed=0) != labels).sum() == expected


def test_noise_redraws_a_tenth_and_changes_nine_hundredths():
    labels = torch.arange(20000) % 10
    data = SimpleNamespace(train_labels=labels, classes=list(range(10)))
    noisy = common.noisy_labels(data, 0.1, seed=3)
    changed = (noisy != labels).double().mean().item()
    assert abs(changed - 0.09) < 4 * math.sqrt(0.1 * 0.09 / 20000)
    assert set(noisy[noisy != labels].tolist()) == set(range(10))
    assert torch.equal(noisy, common.noisy_labels(data, 0.1, seed=3))
    assert not torch.equal(noisy, common.noisy_labels(data, 0.1, seed=4))
    assert torch.equal(common.noisy_labels(data, 0.0, seed=3), labels)
    assert torch.equal(labels, torch.arange(20000) % 10)  # a copy was changed


def choose(subset, labels, scores=None, replicate=0, size=10, offset=0, balance=False, own=None):
    s = SimpleNamespace(subset=subset, size=size, offset=offset, balance=balance, seed=0)
    data = SimpleNamespace(classes=["a", "b", "c"])
    study = SimpleNamespace(settings=s, data=data, scores=scores, indices=own)
    return common.choose_subset(study, torch.tensor(labels), replicate).tolist()


def test_random_subsets_are_balanced_and_differ_by_replicate():
    labels = [0] * 50 + [1] * 30 + [2] * 20
    chosen = [choose("random", labels, replicate=r) for r in (0, 1, 0)]
    for indices in chosen:
        assert indices == sorted(set(indices)) and len(indices) == 10
        assert sorted(np.bincount(np.array(labels)[indices])) == [3, 3, 4]
    assert chosen[0] == chosen[2] != chosen[1]
    larger = [np.bincount(np.array(labels)[choose("random", labels, None, r)]) for r in range(30)]
    assert {x.argmax() for x in larger} == {0, 1, 2}  # what is over goes to random classes
    labels = [0] * 8 + [1] * 8 + [2] * 2  # the third is used up
    assert np.bincount(np.array(labels)[choose("random", labels, size=12)]).tolist() == [5, 5, 2]


def test_easy_and_hard_are_the_ends_of_the_ranking_with_ties_by_index():
    labels, scores = [0, 0, 0, 1, 1, 1, 2, 2], np.array([5, 1, 1, 1, 0, 9, 9, 2.0])
    assert choose("easy", labels, scores, size=3) == [1, 2, 4]
    assert choose("hard", labels, scores, size=2) == [5, 6]
    assert choose("hard", [0, 1, 2], np.array([0, 3, 1], np.uint8), size=1) == [1]
    assert choose("hard", labels, scores, size=3) == [0, 5, 6]
    assert choose("easy", labels, scores, size=2, offset=2) == [2, 3]
    # the easiest of each class (1, 4, 7), then the second easiest, classes in order
    assert choose("easy", labels, scores, size=3, balance=True) == [1, 4, 7]
    assert choose("easy", labels, scores, size=5, balance=True) == [1, 2, 3, 4, 7]
    assert choose("hard", labels, scores, size=3, balance=True) == [0, 5, 6]
    assert choose("all", [0, 1, 2, 0], size=None) == [0, 1, 2, 3]
    assert choose("indices", [0, 1, 2, 0], size=None, own=np.array([3, 1])) == [1, 3]


# ---- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_resnet_is_that_of_he_et_al(training):
    """Against the same written with torch.nn.functional alone, in float64."""
    torch.manual_seed(0)
    module = common.ResNet(14, 4, 3, 5).double().train(training)
    w = {k: v.clone() for k, v in module.state_dict().items()}
    for k in w:
        if "running" in k:
            w[k] += 0.5 * torch.rand_like(w[k])
    module.load_state_dict(w)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)

    def norm(x, name):
        mean, var = (w[f"{name}.running_{k}"].clone() for k in ("mean", "var"))
        return F.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"], training)

    y = norm(F.conv2d(x, w["stem.0.weight"], padding=1), "stem.1").relu()
    for b, stride in enumerate((1, 1, 2, 1, 2, 1)):  # 14 = 6 * 2 + 2: three groups of two
        name = f"blocks.{b}"
        z = F.conv2d(y, w[f"{name}.conv1.weight"], stride=stride, padding=1)
        z = norm(z, f"{name}.bn1").relu()
        z = norm(F.conv2d(z, w[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if stride == 2:
            y = F.conv2d(y, w[f"{name}.shortcut.0.weight"], stride=2)
            y = norm(y, f"{name}.shortcut.1")
        y = (y + z).relu()
    expected = F.linear(y.mean((2, 3)), w["head.weight"], w["head.bias"])
    assert y.shape == (6, 16, 2, 2)
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)


def test_initialisation_has_the_moments_it_should():
    module = common.ResNet(20, 16, 3, 10)
    common.initialise_resnet(module, np.random.default_rng(0))
    weight, norm = module.blocks[7].conv1.weight, module.blocks[7].bn1
    assert abs(weight.std().item() / math.sqrt(2 / (64 * 9)) - 1) < 0.02  # Kaiming, fan-in
    assert abs(weight.mean().item()) < 4 * math.sqrt(2 / (64 * 9) / weight.numel())
    assert 0 <= norm.weight.min() < 0.1 and 0.9 < norm.weight.max() < 1
    assert norm.bias.eq(0).all()
    assert 0 < module.head.bias.abs().max() <= 1 / 8  # of 64 inputs


def test_replicates_differ_in_initialisation_and_children_in_order_and_augmentation_only():
    study = study_of("imp", *SMALL, *RANDOM)
    before = torch.get_rng_state()
    first, again, other = (study.initial_state_dict(r) for r in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, again) and not torch.equal(first["head.weight"], other["head.weight"])
    a, b = (study.stream(0, child) for child in (0, 1))
    assert a.order != b.order and a.augment != b.augment
    assert torch.equal(a.labels, b.labels) and torch.equal(a.labels, study.data.train_labels)
    assert a.indices.tolist() == b.indices.tolist() == list(range(1437))


def flat(*parts):
    return nn.Sequential(nn.Flatten(), *parts, nn.Linear(64, 10))


class Does(nn.Module):
    """Two layers of which `forward(module, logits, x)` makes the output."""

    def __init__(self, forward=lambda m, y, x: y, *prepare):
        super().__init__()
        self.first, self.last, self.calls, self.does = (
            nn.Linear(64, 64),
            nn.Linear(64, 10),
            0,
            forward,
        )
        for do in prepare:
            do(self)

    def forward(self, x):
        return self.does(self, self.last(self.first(x.flatten(1))), x)


def count(m, y, x):
    m.calls += 1
    return y


def drift(m, y, x):
    m.mean.add_(0.1)
    return y


def drawn(m, y, x):
    random.random()
    return y


def by_closure(m):
    m.last.register_forward_hook(lambda _, inputs, output: output * m.first.bias.sum())


OUTSIDE = nn.Parameter(torch.ones(10))
REFUSED = {
    r"1 \(Dropout\) uses randomness": lambda *_: flat(nn.Dropout(0.1)),
    "the module uses randomness": lambda *_: Does(drawn),
    r"1.weight is torch.float64": lambda *_: flat().double(),
    r"p is torch.complex64": lambda *_: Does(
        lambda m, y, x: y, lambda m: m.register_parameter("p", nn.Parameter(torch.ones(1) * 1j))
    ),
    r"p is torch.bool": lambda *_: Does(
        lambda m, y, x: y,
        lambda m: m.register_parameter("p", nn.Parameter(torch.ones(1) > 0, requires_grad=False)),
    ),
    "1: BatchNorm with momentum=None": lambda *_: flat(nn.BatchNorm1d(64, momentum=None)),
    r"gives \(2, 7\) for 2 images of 10 classes": lambda *_: flat(nn.ReLU(), nn.Linear(64, 7))[:3],
    r"gives \(2,\) for 2 images of 10 classes in eval mode": lambda *_: Does(
        lambda m, y, x: y if m.training else y.argmax(1)
    ),
    r"gives tuple for 2 .* in eval mode": lambda *_: Does(
        lambda m, y, x: y if m.training else (y, x)
    ),
    r"gives probabilities \(each row sums to 1\), not": lambda *_: Does(
        lambda m, y, x: y.softmax(1)
    ),
    r"gives probabilities .* in eval mode": lambda *_: Does(
        lambda m, y, x: y if m.training else y.softmax(1)
    ),
    "holds a computed weight": lambda *_: Does(
        lambda m, y, x: y, lambda m: torch.nn.utils.prune.identity(m.last, "weight")
    ),
    "depend on no parameter that is trained": lambda *_: flat().requires_grad_(False),
    "depend on a trained tensor that is none of its own": lambda *_: Does(
        lambda m, y, x: y * OUTSIDE
    ),
    "trained tensor that is none of its own parameters": lambda *_: Does(
        lambda m, y, x: y, by_closure
    ),
    "calls changes in forward": lambda *_: Does(count),
    "mean .* changes in forward.*persistent": lambda *_: Does(
        drift, lambda m: m.register_buffer("mean", torch.zeros(1), persistent=False)
    ),
    "last.weight shares the memory of first.weight": lambda *_: Does(
        lambda m, y, x: y, lambda m: setattr(m.last.weight, "data", m.first.weight.data[:10])
    ),
    "differs when made again with one seed": lambda *_: Does(
        lambda m, y, x: y,
        lambda m: nn.init.constant_(m.last.bias, random.random()),
    ),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_a_model_that_cannot_be_kept_exact_is_refused_by_name(problem):
    with pytest.raises(UserError, match=rf"^--model .*: .*{problem}") as e:
        study_of("imp", *RANDOM, model=REFUSED[problem])
    assert "\n" not in str(e.value)


def small(*flags, **more):
    return study_of("imp", *RANDOM, *flags, **more)


def test_a_template_is_made_from_the_seed():
    """What a module keeps beside its state_dict is the same in every phase."""

    def shuffled(channels, classes):
        order = torch.randperm(64)
        return Does(lambda m, y, x: y, lambda m: setattr(m, "order", order))

    study = small(model=shuffled)
    torch.manual_seed(1)
    first, second = (study.networks(1).modules[0].order for _ in range(2))
    assert torch.equal(first, second)


def test_a_module_made_in_eval_mode_is_trained_in_training_mode():
    [module] = small(model=lambda *_: flat(nn.BatchNorm1d(64)).eval()).networks(1).modules
    assert module.training and module[1].training


def test_what_forward_only_leaves_behind_is_allowed():
    """In bfloat16, too: the last images, and how many they were."""

    def leave(m, y, x):
        m.images, m.calls = x.clone(), len(x)
        return y

    for precision in ("fp32", "bf16"):
        assert small("--precision", precision, model=lambda *_: Does(leave)).model.name == "does"


def test_saved_buffers_may_change_the_logits():
    """A running mean that the output has in training mode."""

    def shift(m, y, x):
        drift(m, y, x)
        return y + m.mean

    def make(*_):
        return Does(shift, lambda m: m.register_buffer("mean", torch.zeros(1)))

    for precision in ("fp32", "bf16"):
        assert small("--precision", precision, model=make).model.name == "make"


def test_the_same_start_for_all_replicates_is_said(capsys):
    def fixed(channels, classes):
        torch.manual_seed(0)
        return flat()

    small(model=fixed)
    line = "--model fixed: the initial weights are the same in every replicate\n"
    assert capsys.readouterr().err == line


def test_a_users_resnet_initialises_itself(monkeypatch):
    """One of --model or model=, and one whose weights make_model has set by hand."""

    def ones(*_):
        model = common.ResNet(8, 2, 1, 10)
        nn.init.ones_(model.head.weight)
        return model

    assert small(model=ones).initial_state_dict(0)["head.weight"].eq(1).all()
    monkeypatch.setattr(common, "make_model", lambda *_: seeded_net)
    seeded_net = common.seeded(0, 0, ones)
    assert same(small().initial_state_dict(1), engine.on_cpu(seeded_net.state_dict()))


class Experts(nn.Module):
    """Of eight experts those are used that the images of a batch are sent to."""

    def __init__(self, *_):
        super().__init__()
        self.gate, self.experts = (
            nn.Linear(64, 8),
            nn.ModuleList(nn.Linear(64, 10) for _ in range(8)),
        )

    def forward(self, x):
        x = x.flatten(1)
        share, best = self.gate(x).softmax(1).max(1)
        used = best.unique().tolist()
        return sum((share * (best == k))[:, None] * self.experts[k](x) for k in used)


def test_what_only_some_images_need_is_trained(stage):
    assert (
        len(small("--batch-size", 256, "--size", 256, model=Experts).model.about["untrained"]) < 8
    )
    [result] = stage("imp", *RANDOM, "--levels", 0, "--steps", 8, "--rewind", 0, model=Experts)
    assert not result["ended"]


def test_statistics_of_instance_norm_are_kept(stage, tmp_path):
    def make(*_):
        norm = nn.InstanceNorm2d(1, affine=True, track_running_stats=True)
        return nn.Sequential(norm, nn.Flatten(), nn.Linear(64, 10))

    flags = (*RANDOM, "--levels", 0, "--steps", 8, "--rewind", 0)
    stage("imp", *flags, out=tmp_path, model=make)
    [folder] = tmp_path.rglob("rep0")
    [row] = stage("imp", "--verify", folder, model=make)
    assert row["measured"] == row["recorded"]


def test_logits_of_another_type_are_measured_as_float32(stage):
    for kind in (torch.float64, torch.bfloat16):
        model = functools.partial(lambda kind, *_: Does(lambda m, y, x: y.to(kind)), kind)
        [result] = stage(
            "imp",
            *RANDOM,
            "--levels",
            0,
            "--steps",
            8,
            "--rewind",
            0,
            "--name",
            f"{kind}"[6:],
            model=model,
        )
        assert not result["ended"]


def test_chance_is_the_most_frequent_class_and_two_standard_errors():
    data = SimpleNamespace(test_labels=torch.tensor([0] * 50 + [1] * 30 + [2] * 20))
    assert math.isclose(common.chance_accuracy(data), 0.5 + 2 * 0.05)


# ---- scores --------------------------------------------------------------------------------------


def test_el2n_scores_are_definition_2_1_and_rank_the_subset(tmp_path, monkeypatch, capsys):
    """Made once, under the noisy labels, by networks that no ticket begins from."""
    ways = (*SMALL, "--networks", 2, "--score-step", 5, "--label-noise", 0.25, "--out", tmp_path)
    study = study_of("imp", *ways, "--subset", "hard", "--size", 64)
    labels = common.noisy_labels(study.data, 0.25, 0)
    norms = []
    for replicate in (65536, 65537):
        net = train_plainly(study, replicate, 5, 0.1, torch.arange(1437), labels)
        norms.append(plain.losses(plain.logits(net, study.data.train_images), labels)[2])
    np.testing.assert_allclose(study.scores, np.mean(norms, 0), atol=1e-4)
    hardest = np.argsort(-study.scores.astype(float), kind="stable")[:64]
    assert common.choose_subset(study, labels, 0).tolist() == sorted(hardest)
    [folder] = (tmp_path / "el2n/digits-resnet8x4").iterdir()
    assert folder.name == "el2n-batch32-networks2-step5-noise0.25"
    about = runs.read_json(folder / "scores.json")
    means = [study.scores[labels.numpy() == c].mean() for c in range(10)]
    assert about["classes_from_easy_to_hard"] == [str(c) for c in np.argsort(means)]

    monkeypatch.setattr(engine, "fit", None)  # nothing is trained
    assert (study_of("imp", *ways, "--subset", "easy").scores == study.scores).all()
    given = ("--width", 2, "--label-noise", 0.25, "--scores", folder / "scores.npy")
    assert (study_of("imp", *given).scores == study.scores).all()
    assert "made by resnet8x4, not by resnet8x2" in capsys.readouterr().err


def test_reliability_of_two_networks_is_their_rank_correlation():
    """Ranks 1..6 with one swap of neighbours: rho = 1 - 6 * 2 / (6 * 35)."""
    each = np.array([[1, 2, 3, 4, 5, 60], [10, 11, 13, 12, 14, 15.0]])
    found, rho = common.reliability(each, 3, np.zeros(6)), 1 - 12 / 210
    assert math.isclose(found["split_half"], rho)
    assert math.isclose(found["spearman_brown"], 2 * rho / (1 + rho))
    assert found["easiest"] == 3 and math.isclose(found["shared_by_halves"], 2 / 3)
    assert found["shared_by_chance"] == 0.5
    found = common.reliability(np.array([[1, 2, 3], [3, 2, 1.0]]), 1, np.zeros(3))
    assert math.isclose(found["spearman_brown"], -1) and found["shared_by_halves"] == 0


# ---- pre-training --------------------------------------------------------------------------------


def pretrained(study, rewind, replicates=(0, 1)):
    """What pre-training leaves in the runs of a study: their folders and pretrained.pt."""
    with study.runs("imp", "of-a-test", study.describe("subset"), replicates) as group:
        common.pretrain(study, rewind, group, runs.progress_bar(0, quiet=True))
        return [(run.folder, run.load("pretrained.pt")) for run in group]


def test_w_tr_is_torchs_sgd_on_the_subset(tmp_path, monkeypatch):
    """At the constant rate of pre-training, under the noisy labels; trained once."""
    flags = (*SMALL, *RANDOM, "--label-noise", 0.25, "--pretrain-lr", 0.05, "--out", tmp_path)
    study = study_of("imp", *flags)
    labels = common.noisy_labels(study.data, 0.25, 0)
    starts = pretrained(study, 6)
    for replicate, (folder, start) in enumerate(starts):
        subset = np.load(folder / "subset.npy")
        assert subset.tolist() == common.choose_subset(study, labels, replicate).tolist()
        module = train_plainly(study, replicate, 6, 0.05, torch.from_numpy(subset), labels)
        for name, value in module.float().state_dict().items():
            if "num_batches" not in name:
                torch.testing.assert_close(start["model"][name], value, rtol=2e-4, atol=2e-5)
        assert abs(start["test_accuracy"] - plain.accuracy(module.double())) < 1.5 / 360
        assert start["step"] == 6
    monkeypatch.setattr(engine, "fit", None)  # nothing is trained
    for (_, before), (_, after) in zip(starts, pretrained(study, 6), strict=True):
        assert same(before["model"], after["model"])


def test_w_tr_of_another_is_taken_if_it_fits(tmp_path):
    study = study_of("imp", *SMALL, *RANDOM, "--out", tmp_path)
    made = pretrained(study, 2)
    folder = made[0][0].parent
    starts = inputs.read_starts(study, "--init", folder, (0, 1), None)
    for replicate, (_, start) in enumerate(made):
        taken = starts[replicate]
        assert same({k: start["model"][k] for k in taken["model"]}, taken["model"])
        assert (taken["step"], taken["test_accuracy"]) == (2, start["test_accuracy"])
    file, start = folder / "rep1/pretrained.pt", made[1][1]
    both = inputs.read_starts(study, "--init", file, (0, 1), 2)
    assert both[0]["fingerprint"] == both[1]["fingerprint"] == start["fingerprint"]
    with study.runs("imp", "of-a-test", study.describe("subset"), (0, 1)) as (first, second):
        common.adopt(second, start)
        with pytest.raises(UserError, match=f"^{first.folder} began from another w_tr: --name TAG"):
            common.adopt(first, start)
