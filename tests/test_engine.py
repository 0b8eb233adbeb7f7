"""The engine against published numbers, NumPy in float64 and plain PyTorch loops."""

import math
import signal

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from conftest import digits, same, study_of, training
from torch import nn

import common
import engine
import options
import runs

CPU = torch.device("cpu")


# ---- randomness ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Random123's known answers for philox4x32-10 (Salmon et al. 2011)
        ([0, 0], [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 2, [2**32 - 1] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0xA4093822, 0x299F31D0],
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_numbers(key, counter, expected):
    assert engine.philox(torch.tensor(key), torch.tensor(counter)).tolist() == expected


def test_streams_differ_by_every_part_of_their_name():
    names = [(0, "order", 0, 0), (1, "order", 0, 0), (0, "augment", 0, 0), (0, "order", 1, 0)]
    names += [(0, "order", 0, 1), (0, "order", 1, 1)]
    assert len({engine.philox_key(*n) for n in names}) == len(names)
    first, second = (engine.generator(3, "init", 2).standard_normal(4) for _ in range(2))
    assert (first == second).all()


def test_batches_pass_over_the_subset_and_drop_what_is_left():
    indices = torch.arange(100, 111)  # 11 examples, batches of 3: three a pass, two left out
    stream = engine.Stream(None, indices, (1, 2), None)
    batches = engine.batch_indices(stream, 0, 7, 3)
    assert batches.shape == (7, 3)
    for first in (0, 3):
        seen = batches[first : first + 3].flatten().tolist()
        assert len(set(seen)) == 9 and set(seen) <= set(indices.tolist())
    assert batches[:3].tolist() != batches[3:6].tolist()
    for a, b in ((0, 1), (2, 5), (6, 7)):
        assert engine.batch_indices(stream, a, b, 3).tolist() == batches[a:b].tolist()


def test_orders_are_uniform():
    """The position of example 0 of 5 over 2,000 passes: chi-squared with 4 degrees of freedom."""
    position = [engine.permutation((7, 7), e, 5, CPU).tolist().index(0) for e in range(2000)]
    counts = np.bincount(position, minlength=5)
    assert ((counts - 400) ** 2 / 400).sum() < 18.5  # p = 0.001


def test_augmentation_is_crop_then_flip_of_the_padded_image():
    data, pad = digits(), 1
    indices, key = torch.arange(64), (5, 6)
    [crops] = engine.draw_crops(key, 9, 10, 64, pad, True, CPU)
    table = engine.draw_crops(key, 7, 12, 64, pad, True, CPU)
    assert torch.equal(table[2], crops)
    x = engine.augment(data.train_images, indices, crops, data.scale, data.shift)
    assert x.is_contiguous(memory_format=torch.channels_last)
    offsets, flips = set(), 0
    for b in range(64):
        words = engine.philox(torch.tensor(key), torch.tensor([b, 9, 0, 0])).tolist()
        up, left, flip = words[0] * 3 >> 32, words[1] * 3 >> 32, words[2] & 1
        image = np.pad(data.train_images[b, :, :, 0].numpy(), pad)[up : up + 8, left : left + 8]
        image = image[:, ::-1] if flip else image
        expected = image * data.scale.item() + data.shift.item()
        np.testing.assert_allclose(x[b, 0].numpy(), expected, atol=1e-6)
        offsets.add((up, left))
        flips += flip
    assert len(offsets) == 9 and 16 < flips < 48


def test_rate_drops_at_the_milestones():
    """Table 1, CIFAR: 0.1, a tenth from update 31,200 on (0-based), a hundredth from 46,800 on."""
    preset = options.PRESETS["cifar10"]
    lr_at = engine.step_schedule(preset.lr, preset.milestones)
    expected = {0: 0.1, 31199: 0.1, 31200: 0.01, 46799: 0.01, 46800: 0.001, 62399: 0.001}
    for step, lr in expected.items():
        assert math.isclose(lr_at(step), lr)


# ---- networks as rows ----------------------------------------------------------------------------


def test_resnet20_has_the_papers_number_of_weights():
    networks = engine.Networks(common.ResNet(20, 16, 3, 10), 2, CPU)
    assert networks.mask.shape == (2, 270_896)
    assert sum(p.numel() for p in networks.modules[0].parameters()) == 272_474
    assert networks.weights.shape == (2, 272_512)  # padded to 512 bytes
    columns = [view.columns for view in networks.layers.values()]
    assert (columns[0].start, columns[-1].stop) == (0, 270_896)


class Mixed(nn.Module):
    """A convolution with GroupNorm, and a transformer block with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.place = nn.Parameter(torch.randn(64, 8))
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.after, self.head = nn.LayerNorm(8), nn.Linear(8, 10)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, x):
        x = x + F.relu(self.norm(self.conv(x))) * self.scale
        x = x.flatten(2).transpose(1, 2) + self.place
        return self.head(self.after(x + self.attend(x, x, x)[0]).mean(1))


def test_training_is_torchs_sgd_with_the_mask_multiplied_in():
    t = training(alive=0.7)
    module = common.ResNet(8, 4, 1, 10)
    module.load_state_dict(t.networks.state(0), strict=False)
    masks = t.networks.masks(0)
    masks = {module.get_submodule(k).weight: m.float() for k, m in masks.items()}
    plain.train(module, t.data, t.streams[0], map(t.lr_at, range(12)), 1e-2, masks)
    assert [*engine.train(t)][-1] == 12
    ours, pruned = t.networks.state(0), ~t.networks.mask[0]
    for name, theirs in module.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(ours[name], theirs, rtol=2e-4, atol=2e-5)
    for matrix in (t.networks.weights, t.networks.momentum):
        assert pruned.any() and (matrix[0, : len(pruned)][pruned] == 0).all()
    assert (t.networks.gradient == 0).all()


def test_rows_keep_every_parameter_and_buffer_of_any_module():
    """Against the plain module: the same logits, and twelve steps of torch.optim.SGD."""
    torch.manual_seed(0)
    module = Mixed()
    t = training((0, 1), model=module)
    other = {k: v + 1 for k, v in module.state_dict().items()}
    t.networks.load(0, other)
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(t.networks.modules[1](x), module(x))
    assert t.networks.mask.shape == (2, 72 + 192 + 64 + 80)  # conv, in and out projection, head
    plain.train(module, t.data, t.streams[1], map(t.lr_at, range(12)), 1e-2)
    assert [*engine.train(t)][-1] == 12
    for name, value in t.networks.state(1).items():
        torch.testing.assert_close(value, module.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_bfloat16_rounds_and_no_more():
    """Thirty steps on a low-precision copy follow float32; the copy is the rounded weights."""
    losses, full, low = [], *(training(stop=30, alive=0.8, bf16=b) for b in (False, True))
    for t in (full, low):
        for step in engine.train(t):
            if t is low and step < 30:
                n = t.networks
                assert torch.equal(n.weights_bf16, n.weights.bfloat16())
                assert (n.weights_bf16[:, : n.mask.shape[1]][~n.mask] == 0).all()
        losses += engine.accuracy_and_loss(t.networks, t.data)[1]
    assert losses[0] < 2.25 and abs(losses[1] - losses[0]) < 0.05
    difference = (full.networks.weights - low.networks.weights).norm()
    assert 0 < difference < 0.1 * full.networks.weights.norm()


def test_a_row_is_the_same_alone_and_beside_others():
    together, alone = training((0, 3, 5)), training((3,))
    for t in (together, alone):
        for _ in engine.train(t):
            pass
    assert same(together.networks.get(slice(1, 2)), alone.networks.get(slice(0, 1)))


def test_a_saved_network_and_its_velocity_come_back():
    t = training((0, 1), alive=0.7)
    for _ in engine.train(t):
        pass
    copy = engine.Networks(common.ResNet(8, 4, 1, 10), 1, CPU)
    copy.load(0, t.networks.state(1), t.networks.masks(1))
    copy.set_momentum(0, t.networks.momentum_state(1))
    assert same(copy.get(slice(0, 1)), t.networks.get(slice(1, 2)))
    assert torch.equal(copy.mask[0], t.networks.mask[1])


def test_evaluation_is_what_numpy_makes_of_the_logits():
    t = training((0, 1))
    images, labels = t.data.test_images, t.data.test_labels
    found = engine.evaluate(t.networks, t.data, images, labels)
    wanted = plain.losses(plain.logits(plain.network(t.networks.state(1)), images), labels)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours[1], theirs, rtol=1e-5, atol=1e-6)
    accuracies, losses = engine.accuracy_and_loss(t.networks, t.data)
    assert math.isclose(accuracies[1], 1 - wanted[1].mean())
    assert math.isclose(losses[1], found[0][1].double().mean().item())


@pytest.mark.parametrize("size", [8, 64])
def test_strided_convolutions_of_few_channels_against_float64(size):
    """Where oneDNN writes past its workspace (#6035), the gradients are those of float64."""
    torch.manual_seed(0)
    plain = common.ResNet(8, 8, 3, 10)
    networks = engine.Networks(plain, 1, CPU)
    networks.load(0, plain.state_dict())
    x, y = torch.randn(16, 3, size, size), torch.randint(0, 10, (16,))
    x = x.contiguous(memory_format=torch.channels_last)
    F.cross_entropy(networks.modules[0](x), y).backward()
    plain = plain.double()
    F.cross_entropy(plain(x.double()), y).backward()
    shortcuts = 0
    for name, p in plain.named_parameters():
        ours = networks.modules[0].get_parameter(name).grad
        torch.testing.assert_close(ours.double(), p.grad, rtol=1e-3, atol=1e-5)
        shortcuts += "shortcut.0" in name
    assert shortcuts == 2


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def test_a_convolution_with_a_forward_of_its_own_keeps_it():
    """Where PyTorch's would be replaced since oneDNN overruns; then not in channels-last."""
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), Standardised(8, 16, 1, stride=2), *head)
    networks = engine.Networks(plain, 1, CPU)
    networks.load(0, plain.state_dict())
    x = torch.randn(4, 1, 8, 8)
    assert torch.allclose(networks.modules[0](x), plain(x), atol=1e-6)
    assert not study_of("imp", "--subset", "random", model=lambda *_: plain).model.channels_last


def test_the_first_step_that_is_not_finite_is_noted():
    diverged = torch.tensor([-1, -1, 4, -1])
    losses = torch.tensor([[1, 2, 3], [1, math.nan, math.inf], [math.nan] * 3, [1, 2, -math.inf]])
    engine.note_divergence(diverged, losses, 10)
    assert diverged.tolist() == [-1, 11, 4, 12]


def test_fp32_is_float32_and_evaluation_beside_bf16_may_take_tf32():
    cudnn = torch.backends.cudnn
    try:
        for bf16, fast, expected in (
            (True, False, (True, False, True)),
            (False, False, (True, False, False)),
            (False, True, (False, True, True)),
        ):
            common.set_numerics(bf16, fast)
            assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32) == expected
    finally:
        common.set_numerics(False, False)


# ---- exact resume --------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [1, 5, 12, 16, 17])
def test_resume_gives_the_bits_of_an_undisturbed_training(tmp_path, kill):
    observed, results = [], []

    def fit(folder, kill):
        """Twenty steps with a watch that counts what it sees and signals at one step."""
        seen = torch.zeros(1, 40)

        def watch(networks, row, step, indices, logits):
            seen[0, step] += indices.sum()
            if step.item() == kill:
                runs.signals.number = signal.SIGTERM

        t = training(stop=20, at=(0, 5, 12), watch=watch)
        t.extra = {"seen": seen}
        run = runs.Run(folder, 0, {}, {}, {}, {})
        with run.held:
            engine.fit(t, [run], "level00", runs.progress_bar(0, quiet=True), observed.append)
        return t

    for at in (None, kill):
        try:
            t = fit(tmp_path / str(at), at)
        except runs.Interrupted as e:
            assert e.number == signal.SIGTERM and f"level00 step {kill + 1} of 20" in str(e)
            runs.signals.number = 0
            t = fit(tmp_path / str(at), None)
        else:
            assert at is None
        results.append((t.networks.get(slice(None)), t.extra, sorted(set(observed))))
        observed.clear()
    assert results[0][2] == results[1][2] == [0, 5, 12]
    assert same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])
