import dataclasses
import itertools
import math
import signal
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import runs
from runs import UserError

CPU = torch.device("cpu")


def digits():
    return common.load_data("digits", common.HERE / "data", CPU)


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
    assert common.philox(torch.tensor(key), torch.tensor(counter)).tolist() == expected


def test_streams_differ_by_every_part_of_their_name():
    names = [(0, "order", 0, 0), (1, "order", 0, 0), (0, "augment", 0, 0), (0, "order", 1, 0)]
    names += [(0, "order", 0, 1), (0, "order", 1, 1)]
    assert len({common.philox_key(*n) for n in names}) == len(names)
    first, second = (common.generator(3, "init", 2).standard_normal(4) for _ in range(2))
    assert (first == second).all()


def test_batches_pass_over_the_subset_and_drop_what_is_left():
    indices = torch.arange(100, 111)  # 11 examples, batches of 3: three a pass, two left out
    stream = common.Stream(None, indices, (1, 2), None)
    batches = common.batch_indices(stream, 0, 7, 3)
    assert batches.shape == (7, 3)
    for first in (0, 3):
        seen = batches[first : first + 3].flatten().tolist()
        assert len(set(seen)) == 9 and set(seen) <= set(indices.tolist())
    assert batches[:3].tolist() != batches[3:6].tolist()
    for a, b in ((0, 1), (2, 5), (6, 7)):
        assert common.batch_indices(stream, a, b, 3).tolist() == batches[a:b].tolist()


def test_orders_are_uniform():
    """Where example 0 of 5 lands over 2,000 passes: chi-squared with 4 degrees of freedom."""
    place = [common.permutation((7, 7), e, 5, CPU).tolist().index(0) for e in range(2000)]
    counts = np.bincount(place, minlength=5)
    assert ((counts - 400) ** 2 / 400).sum() < 18.5  # p = 0.001


def test_augmentation_is_crop_then_flip_of_the_padded_image():
    data, pad = digits(), 1
    indices, key = torch.arange(64), (5, 6)
    [crops] = common.draw_crops(key, 9, 10, 64, pad, True, CPU)
    table = common.draw_crops(key, 7, 12, 64, pad, True, CPU)
    assert torch.equal(table[2], crops)
    x = common.augment(data.train_images, indices, crops, data.scale, data.shift)
    assert x.is_contiguous(memory_format=torch.channels_last)
    offsets, flips = set(), 0
    for b in range(64):
        words = common.philox(torch.tensor(key), torch.tensor([b, 9, 0, 0])).tolist()
        up, left, flip = words[0] * 3 >> 32, words[1] * 3 >> 32, words[2] & 1
        image = np.pad(data.train_images[b, :, :, 0].numpy(), pad)[up : up + 8, left : left + 8]
        image = image[:, ::-1] if flip else image
        expected = image * data.scale.item() + data.shift.item()
        np.testing.assert_allclose(x[b, 0].numpy(), expected, atol=1e-6)
        offsets.add((up, left))
        flips += flip
    assert len(offsets) == 9 and 16 < flips < 48


# ---- schedule, subsets, noise --------------------------------------------------------------------


def test_rate_drops_at_the_milestones():
    """Table 1, CIFAR: 0.1, a tenth from update 31,200 on (0-based), a hundredth from 46,800 on."""
    preset = common.PRESETS["cifar10"]
    lr_at = common.step_schedule(preset.lr, preset.milestones)
    expected = {0: 0.1, 31199: 0.1, 31200: 0.01, 46799: 0.01, 46800: 0.001, 62399: 0.001}
    for step, lr in expected.items():
        assert math.isclose(lr_at(step), lr)


def test_noise_takes_the_exact_ceiling():
    """7 % of 50,000 is 3,500, though 0.07 * 50000 lies a little above in floating point."""
    labels = torch.full((50000,), 9)
    data = SimpleNamespace(train_labels=labels, classes=list(range(9)))  # no draw is 9
    assert (common.noisy_labels(data, 0.07, seed=0) != labels).sum() == 3500


def choose(subset, labels, scores=None, replicate=0, size=10, offset=0, balance=False):
    args = SimpleNamespace(subset=subset, size=size, offset=offset, balance=balance, seed=0)
    data = SimpleNamespace(classes=["a", "b", "c"], scores=scores)
    return common.choose_subset(args, data, torch.tensor(labels), replicate).tolist()


def test_random_subsets_are_balanced_and_differ_by_replicate():
    labels = [0] * 50 + [1] * 30 + [2] * 20
    chosen = [choose("random", labels, replicate=r) for r in (0, 1, 0)]
    for indices in chosen:
        assert indices == sorted(set(indices)) and len(indices) == 10
        assert sorted(np.bincount(np.array(labels)[indices])) == [3, 3, 4]
    assert chosen[0] == chosen[2] != chosen[1]


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


def test_label_noise_redraws_a_tenth_and_changes_nine_hundredths():
    labels = torch.arange(20000) % 10
    data = SimpleNamespace(train_labels=labels, classes=list(range(10)))
    noisy = common.noisy_labels(data, 0.1, seed=3)
    changed = (noisy != labels).double().mean().item()
    assert abs(changed - 0.09) < 4 * math.sqrt(0.1 * 0.09 / 20000)
    assert torch.equal(noisy, common.noisy_labels(data, 0.1, seed=3))
    assert not torch.equal(noisy, common.noisy_labels(data, 0.1, seed=4))
    assert torch.equal(common.noisy_labels(data, 0.0, seed=3), labels)


# ---- networks ------------------------------------------------------------------------------------


def test_resnet20_has_the_papers_number_of_weights():
    networks = common.Networks(common.ResNet(20, 16, 3, 10), 2, CPU)
    assert networks.mask.shape == (2, 270_896)
    assert sum(p.numel() for p in networks.modules[0].parameters()) == 272_474
    assert networks.weights.shape == (2, 272_512)  # padded to 512 bytes
    columns = [slot.columns for slot in networks.layers.values()]
    assert (columns[0].start, columns[-1].stop) == (0, 270_896)


def test_initialisation_has_the_moments_it_should():
    networks = common.Networks(common.ResNet(20, 16, 3, 10), 1, CPU)
    module, args = networks.modules[0], SimpleNamespace(seed=0, depth=20, width=16)
    data = SimpleNamespace(train_images=torch.zeros(1, 32, 32, 3), classes=range(10))
    networks.load(0, common.fresh_state(args, data, 0))
    weight = module.blocks[7].conv1.weight
    assert abs(weight.std().item() / math.sqrt(2 / weight[0].numel()) - 1) < 0.02
    scale = module.blocks[7].bn1.weight
    assert 0 <= scale.min() < 0.1 and 0.9 < scale.max() < 1
    assert module.blocks[7].bn1.bias.eq(0).all()
    assert weight.data_ptr() >= networks.weights.data_ptr()  # a view of the row


def tiny_training(rows=(0,), start=0, stop=12, steps_at=(), batch=32, masks=None, watch=None):
    args = SimpleNamespace(
        seed=0, batch_size=batch, momentum=0.9, weight_decay=1e-2, pad=1, flip=False,
        engine="eager", precision="fp32", checkpoint_every=1e9, depth=8, width=4,
    )  # fmt: skip
    data = digits()
    networks = common.Networks(common.ResNet(8, 4, 1, 10), len(rows), CPU)
    for r, replicate in enumerate(rows):
        networks.rewind(r, common.fresh_state(args, data, replicate), masks and masks[r])
    streams = [common.make_stream(args, data, r) for r in rows]
    schedule = common.step_schedule(0.1, (8,))
    at = frozenset(steps_at)
    return common.Training(args, data, networks, streams, start, stop, schedule, at, watch)


def train_plainly(plain, t, row, steps, masks=None):
    """The first steps of a row of tiny_training by torch.optim.SGD; `masks`: weight -> factor."""
    optimizer, stream = torch.optim.SGD(plain.parameters(), 0.1, 0.9, 0, 1e-2), t.streams[row]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = t.lr_at(step)
        i = common.batch_indices(stream, step, step + 1, 32)[0]
        [crops] = common.draw_crops(stream.augment, step, step + 1, 32, 1, False, CPU)
        x = common.augment(t.data.train_images, i, crops, t.data.scale, t.data.shift)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), t.data.train_labels[i]).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, m in (masks or {}).items():
                weight.mul_(m)


def test_training_is_torchs_sgd_with_the_mask_multiplied_in():
    t = tiny_training(stop=12)
    mask = torch.rand(t.networks.mask.shape[1], generator=torch.Generator().manual_seed(0)) < 0.7
    t = tiny_training(stop=12, masks=[mask])
    plain = common.ResNet(8, 4, 1, 10)
    plain.load_state_dict(t.networks.modules[0].state_dict(), strict=False)
    masks = {}
    for name, part in t.networks.masks(0).items():
        masks[plain.get_submodule(name).weight] = part.float()
    train_plainly(plain, t, 0, 12, masks)
    assert [*common.train(t)][-1] == 12
    ours = t.networks.modules[0].state_dict()
    for name, theirs in plain.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(ours[name], theirs, rtol=2e-4, atol=2e-5)
    for matrix in (t.networks.weights, t.networks.momentum):
        assert (matrix[0, : len(mask)][~mask] == 0).all()
    assert (t.networks.gradient == 0).all()


def test_bfloat16_rounds_and_no_more():
    """Thirty steps on a low-precision copy follow float32; the copy is the rounded weights."""
    full, low = tiny_training(stop=30), tiny_training(stop=30)
    low.args.precision = "bf16"
    masks = [torch.rand(low.networks.mask.shape[1]) < 0.8]
    for t in (full, low):
        t.networks.rewind(0, t.networks.state(0), masks[0])
        for step in common.train(t):
            if t is low and step < 30:
                assert torch.equal(t.networks.low, t.networks.weights.bfloat16())
                assert (t.networks.low[0, : len(masks[0])][~masks[0]] == 0).all()
    losses = [
        common.evaluate(t.networks, t.data, t.data.train_images, t.data.train_labels)[0].mean()
        for t in (full, low)
    ]
    assert losses[0] < 2.25 and abs(losses[1] - losses[0]) < 0.05
    difference = (full.networks.weights - low.networks.weights).norm()
    assert 0 < difference < 0.1 * full.networks.weights.norm()


def test_a_row_is_the_same_alone_and_beside_others():
    together, alone = tiny_training((0, 3, 5)), tiny_training((3,))
    for t in (together, alone):
        for _ in common.train(t):
            pass
    for field in ("weights", "momentum", "batchnorm"):
        assert torch.equal(getattr(together.networks, field)[1], getattr(alone.networks, field)[0])


def test_children_differ_in_order_and_augmentation_only():
    args, data = SimpleNamespace(seed=0), digits()
    a, b = (common.make_stream(args, data, 0, child) for child in (0, 1))
    assert a.order != b.order and a.augment != b.augment
    assert torch.equal(a.indices, b.indices) and torch.equal(a.labels, b.labels)


def test_evaluation_is_what_numpy_makes_of_the_logits():
    t = tiny_training((0, 1))
    images, labels = t.data.test_images, t.data.test_labels
    loss, error, norm = common.evaluate(t.networks, t.data, images, labels)
    module = t.networks.modules[1].eval()
    with torch.no_grad():
        z = module(common.normalise(t.data, images)).double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = labels.numpy()
    np.testing.assert_allclose(loss[1], -np.log(p[np.arange(len(y)), y]), rtol=1e-5, atol=1e-6)
    assert (error[1].numpy() == (z.argmax(1) != y)).all()
    np.testing.assert_allclose(norm[1], np.linalg.norm(p - np.eye(10)[y], axis=1), atol=1e-6)
    accuracy = common.accuracy(t.networks, t.data)[1]
    assert math.isclose(accuracy, (z.argmax(1) == y).mean())


def test_any_module_can_be_rows():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
            self.head = nn.Linear(3 * 36, 10, bias=False)

        def forward(self, x):
            return self.head(self.norm(self.conv(x)).flatten(1))

    networks = common.Networks(Plain(), 2, CPU)
    assert networks.mask.shape == (2, 27 + 1080)
    assert networks.modules[1].conv.bias.data_ptr() == networks.weights[1, 1107].data_ptr()
    networks.load(1, Plain().state_dict())
    networks.modules[1](torch.rand(2, 1, 8, 8)).square().sum().backward()
    assert networks.gradient[1].abs().sum() > 0 and networks.gradient[0].abs().sum() == 0


class Normed(nn.Module):
    """A small ResNet with GroupNorm, and a transformer block with parameters of its own."""

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


def test_rows_keep_every_parameter_and_buffer_of_a_module(monkeypatch):
    """Against the plain module: the same logits, and ten steps of torch.optim.SGD."""
    t = tiny_training((0, 1), stop=0)
    monkeypatch.setattr(common, "make_model", lambda args, data: Normed())
    states = [common.fresh_state(t.args, t.data, r) for r in (0, 1)]
    again = common.fresh_state(t.args, t.data, 0)
    assert all(torch.equal(states[0][k], again[k]) for k in again)
    assert not torch.equal(states[0]["place"], states[1]["place"])
    assert states[0]["norm.weight"].eq(1).all() and states[0]["after.weight"].eq(1).all()
    networks = common.Networks(Normed(), 2, CPU)
    plain = Normed()
    plain.load_state_dict(states[1])
    for r in (0, 1):
        networks.load(r, states[r])
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(networks.modules[1](x), plain(x))
    t = common.Training(t.args, t.data, networks, t.streams, 0, 10, t.lr_at)
    train_plainly(plain, t, 1, 10)
    assert [*common.train(t)][-1] == 10
    for name, value in networks.state(1).items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_a_module_that_draws_in_its_forward_pass_is_refused_by_name(monkeypatch):
    class Drops(Normed):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.1)

        def forward(self, x):
            return super().forward(self.drop(x))

    for make, problem in ((Drops, r"drop \(Dropout\) draws"), (Normed, None)):
        monkeypatch.setattr(common, "make_model", lambda args, data, make=make: make())
        if problem:
            with pytest.raises(UserError, match=problem):
                common.check_model(None, digits())
        else:
            common.check_model(None, digits())


# ---- exact resume --------------------------------------------------------------------------------


def new_run(folder):
    return runs.Run(folder, 0, {"replicate": 0}, {"torch": "x"})


@pytest.mark.parametrize("kill", [1, 5, 12, 16, 17])
def test_resume_gives_the_bits_of_an_undisturbed_training(tmp_path, kill):
    def fit(t, folder):
        run = new_run(folder)
        bar = runs.progress_bar(0, quiet=True)
        try:
            common.fit(t, [run], "level00", bar, observed.append)
        finally:
            run.held.close()

    class Kill:
        """A watch that counts what it sees, and asks for the end at one step."""

        def __init__(self, at):
            self.seen, self.at = torch.zeros(1, 40), at

        def __call__(self, networks, row, step, indices, logits):
            self.seen[0, step] += indices.sum()
            if step.item() == self.at:
                runs.signals.number = signal.SIGTERM

    observed, results = [], []
    for at in (None, kill):
        watch = Kill(at)
        t = tiny_training(stop=20, steps_at=(0, 5, 12), watch=watch)
        t.extra = {"seen": watch.seen}
        try:
            fit(t, tmp_path / str(at))
        except runs.Interrupted as e:
            assert e.number == signal.SIGTERM
            runs.signals.number = 0
            watch = Kill(None)
            t = tiny_training(stop=20, steps_at=(0, 5, 12), watch=watch)
            t.extra = {"seen": watch.seen}
            fit(t, tmp_path / str(at))
        results.append((t.networks.get(slice(None)), t.extra["seen"], sorted(set(observed))))
        observed.clear()
    assert results[0][2] == results[1][2] == [0, 5, 12]
    assert torch.equal(results[0][1], results[1][1])
    for field in common.STATE:
        assert torch.equal(results[0][0][field], results[1][0][field])


def test_nothing_is_unpickled(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"weights": Hostile()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt is damaged or not one of ours"):
        runs.read_tensors(tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "x.npz", images=np.array([Hostile()], dtype=object))
    with pytest.raises(UserError, match="damaged"):
        common.read_npz(tmp_path / "x.npz", "images")
    assert not (tmp_path / "pwned").exists()


# ---- run directories -----------------------------------------------------------------------------


def test_a_folder_of_other_settings_is_refused_with_the_difference(tmp_path, capsys):
    runs.Run(tmp_path, 0, {"replicate": 0, "lr": 0.1}, {"torch": "1"}).held.close()
    with pytest.raises(UserError, match=r"lr 0\.1, now 0\.2.*--fresh"):
        runs.Run(tmp_path, 0, {"replicate": 0, "lr": 0.2}, {"torch": "1"})
    runs.Run(tmp_path, 0, {"replicate": 0, "lr": 0.1}, {"torch": "2"}).held.close()
    assert "torch 1, now 2" in capsys.readouterr().err
    runs.Run(tmp_path, 0, {"replicate": 0, "lr": 0.2}, {"torch": "2"}, fresh=True).held.close()
    assert runs.read_json(tmp_path / "config.json")["settings"]["lr"] == 0.2


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x"
    runs.write(path, lambda f: f.write(b"old"))

    def half(f):
        f.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="space"):
        runs.write(path, half)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_altered_json_is_refused(tmp_path):
    path = tmp_path / "result.json"
    runs.write_json(path, {"accuracy": 0.91, "name": "é"})
    assert runs.read_json(path)["accuracy"] == 0.91
    path.write_text(path.read_text().replace("0.91", "0.97"))
    with pytest.raises(UserError, match="damaged"):
        runs.read_json(path)
    for text in ("", "{", "[]", "7", '{"sha256": 1}', "[" * 100000):
        path.write_text(text)
        with pytest.raises(UserError):
            runs.read_json(path)


def test_the_log_keeps_one_row_a_step(tmp_path):
    run = new_run(tmp_path)
    for step, value in ((0, 1), (10, 2), (10, 3)):
        run.log("pretrain", step, accuracy=value)
    run.log("level00", 10, loss=4)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    expected = ["phase,step,accuracy,loss", "pretrain,0,1,", "pretrain,10,3,", "level00,10,,4"]
    assert lines == expected


# ---- data ----------------------------------------------------------------------------------------


def test_digits_are_normalised_and_split():
    data = digits()
    assert data.train_images.shape == (1437, 8, 8, 1) and data.test_images.shape == (360, 8, 8, 1)
    x = common.normalise(data, data.train_images).double()
    assert abs(x.mean()) < 1e-6 and abs(x.var(correction=0) - 1) < 1e-6


def test_a_folder_is_decoded_once_with_valid_joined_to_train(tmp_path, image_folder, monkeypatch):
    from PIL import Image

    root = image_folder()
    data = common.load_data(str(root), tmp_path / "data", CPU, quiet=True)
    assert data.classes == ["cat", "dog"] and data.name == "pictures"
    assert data.train_labels.tolist() == [0] * 8 + [1] * 8 and len(data.test_labels) == 6
    expected = np.asarray(Image.open(root / "valid" / "dog" / "1.png"))
    assert (data.train_images[15].numpy() == expected).all()
    monkeypatch.setattr(common, "decode", None)  # the second start reads the cache
    again = common.load_data(str(root), tmp_path / "data", CPU, quiet=True)
    assert torch.equal(again.train_images, data.train_images)
    assert again.fingerprint == data.fingerprint


def test_a_damaged_cache_is_decoded_again(tmp_path, image_folder, capsys):
    root = image_folder()
    first = common.load_data(str(root), tmp_path / "data", CPU, quiet=True)
    [cache] = (tmp_path / "data").glob("*.npz")
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 16
    cache.write_bytes(content)
    second = common.load_data(str(root), tmp_path / "data", CPU, quiet=True)
    assert first.fingerprint == second.fingerprint and "decoding again" in capsys.readouterr().err


def test_grey_images_have_one_channel(tmp_path, image_folder):
    data = common.load_data(str(image_folder(mode="L")), tmp_path / "data", CPU, quiet=True)
    assert data.train_images.shape[3] == 1


def test_bad_folders_are_refused_by_name(tmp_path, image_folder):
    def refused(root, match):
        with pytest.raises(UserError, match=match):
            common.load_data(str(root), tmp_path / "data", CPU, quiet=True)

    refused(tmp_path / "nowhere", "neither digits, cifar10")
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    refused(tmp_path / "empty", "no images in .*train")
    refused(image_folder(tmp_path / "untested", test=0), "no images in .*test")
    odd = image_folder(tmp_path / "odd")
    image_folder(tmp_path / "odd" / "more", size=(7, 9), train=1, test=0, valid=0)
    (odd / "more/train/cat/0.png").rename(odd / "train/dog/odd.png")
    refused(odd, r"odd\.png is 7x9")
    broken = image_folder(tmp_path / "broken")
    (broken / "train/dog/3.png").write_bytes(b"\x89PNG and then nothing")
    refused(broken, r"cannot read the image .*train/dog/3\.png")
    extra = image_folder(tmp_path / "extra")
    (extra / "test/cow").mkdir()
    (extra / "test/cat/0.png").rename(extra / "test/cow/0.png")
    refused(extra, "class cow has test images and no training")


def test_cinic10_is_read_from_its_archive(tmp_path, image_folder, monkeypatch):
    import hashlib

    root = image_folder()
    with tarfile.open(tmp_path / "CINIC-10.tar.gz", "w:gz") as tar:
        for split in ("train", "valid", "test"):
            tar.add(root / split, f"./{split}")
    md5 = hashlib.md5((tmp_path / "CINIC-10.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setitem(common.CINIC10, "md5", md5)
    data = common.load_data("cinic10", tmp_path, CPU, quiet=True)
    same = common.load_data(str(root), tmp_path, CPU, quiet=True)
    assert data.fingerprint == same.fingerprint
    monkeypatch.setitem(common.CINIC10, "md5", "0" * 32)
    with pytest.raises(UserError, match=r"cannot get cinic10 .* put CINIC-10\.tar\.gz \(MD5 0000"):
        common.load_data("cinic10", tmp_path, CPU, quiet=True)


def test_the_readme_says_what_a_preset_gives():
    text = (common.HERE / "README.md").read_text()
    for field in dataclasses.fields(common.Preset):
        values = (getattr(p, field.name) for p in common.PRESETS.values())
        cells = [", ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values]
        assert f"| `--{field.name.replace('_', '-')}` | {' | '.join(cells)} |" in text


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("cinic10", "CINIC-10.tar.gz"),
    ],
)
def test_without_a_network_one_line_says_which_file_to_put_where(
    tmp_path, monkeypatch, name, archive
):
    import urllib.request

    def refuse(*a, **k):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match=f"put {archive}.* into {tmp_path}") as e:
        common.load_data(name, tmp_path, CPU, quiet=True)
    assert "\n" not in str(e.value)


def test_augmentation_is_in_the_folders_name_and_done(stage, tmp_path):
    """--pad and --flip reach the batches: other weights, each in a folder of its own."""
    tiny = ("--width", 2, "--subset", "random", "--size", 64, "--rewind", 3, "--steps", 6)
    ways = {
        "": (),
        "-pad0": ("--pad", 0),
        "-flip1": ("--flip",),
        "-pad2-flip1": ("--pad", 2, "--flip"),
    }
    weights = []
    for name, flags in ways.items():
        stage("imp", *tiny, "--levels", 0, *flags)
        folder = tmp_path / f"results/imp/digits-resnet8x2/random64-rewind3-steps6{name}/rep0"
        weights.append(runs.read_tensors(folder / "level00.pt")["model"]["stem.0.weight"])
    for a, b in itertools.combinations(weights, 2):
        assert not torch.equal(a, b)


def test_fp32_is_float32_and_evaluation_beside_bf16_may_take_tf32():
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.allow_tf32
    try:
        for precision, tf32 in (("bf16", True), ("fp32", False)):
            cpu = torch.device("cpu")
            choice = {"engine": "eager", "device": cpu, "fast": False, "precision": precision}
            common.choose_engine(SimpleNamespace(**choice))
            assert (cudnn.deterministic, cudnn.allow_tf32) == (True, tf32)
    finally:
        cudnn.deterministic, cudnn.allow_tf32 = before
