import csv
import math

import numpy as np
import torch
import torch.nn.functional as F

import common
import pretrain

TINY = ("--width", 4, "--subset", "random", "--size", 128, "--rewind", 8, "--steps", 20)
EVERY = ("--every", 4)


def test_what_is_tracked_is_what_plain_torch_gives(stage, tmp_path):
    """Norm of the first minibatch gradient and the coherence at step 0, from plain autograd."""
    stage("pretrain", *TINY, *EVERY, "--track", "gradient-norm,coherence", "--replicate", "1")
    [folder] = tmp_path.rglob("rep1")
    args = pretrain.flags().parse_args([str(f) for f in TINY + EVERY])
    args.data_dir, args.out = common.HERE / "data", tmp_path
    data = common.prepare(args)
    model = common.make_model(args, data)
    model.load_state_dict(common.fresh_state(args, data, 1))
    indices = common.choose_subset(args, data, data.train_labels, 1)
    stream = common.make_stream(args, data, 1, 0, indices)

    def gradient(x, y):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    model.eval()
    keys = common.Stream(None, indices, common.philox_key(0, "sample", 1), None)
    batches = common.batch_indices(keys, 0, 16, args.batch_size)
    g = torch.stack(
        [
            gradient(common.normalise(data, data.train_images[i]), data.train_labels[i])
            for i in batches
        ]
    )
    mean = g.mean(0)
    expected = (g @ mean) / (g.norm(dim=1) * mean.norm())
    np.testing.assert_allclose(np.load(folder / "coherence.npy")[0], expected, rtol=1e-4)
    model.train()
    i = common.batch_indices(stream, 0, 1, args.batch_size)[0]
    [crops] = common.draw_crops(stream.augment, 0, 1, args.batch_size, 1, False, i.device)
    x = common.augment(data.train_images, i, crops, data.scale, data.shift)
    norm = gradient(x, data.train_labels[i]).norm().item()
    norms = np.load(folder / "gradient_norm.npy")
    assert norms.shape == (8,) and math.isclose(norms[0], norm, rel_tol=1e-4)


def test_learning_curves_end_at_the_accuracy_of_w_tr(stage, tmp_path):
    scores = np.random.default_rng(0).random(1437).astype(np.float32)
    np.save(tmp_path / "mine.npy", scores)
    flags = ("--subset", "easy", "--scores", tmp_path / "mine.npy", *TINY[:2], *TINY[4:], *EVERY)
    [result] = stage("pretrain", *flags, "--track", "accuracy")
    with open(next(tmp_path.rglob("log.csv")), newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(r["step"]) for r in rows] == [0, 4, 8]
    assert float(rows[-1]["test_accuracy"]) == result["pretrain"]["test_accuracy"]
    assert all(0 <= float(r[k]) <= 1 for r in rows for k in ("train_accuracy", "easy_accuracy"))


def test_w_tr_is_that_of_imp_and_is_taken_by_it(stage, tmp_path):
    stage("pretrain", *TINY, *EVERY, "--track", "gradient-norm", "--replicate", "0-1")
    [own] = stage("imp", *TINY, "--levels", 0, "--replicate", "1")
    folder = next(tmp_path.rglob("pretrain/*/*"))
    flags = (*TINY[:2], "--init", folder, "--steps", 20, "--levels", 0)
    first, second = stage("imp", *flags, "--replicate", "0-1")
    assert second["pretrain"]["fingerprint"] == own["pretrain"]["fingerprint"]
    assert first["pretrain"]["fingerprint"] != second["pretrain"]["fingerprint"]
    assert second["levels"][0]["test_accuracy"] == own["levels"][0]["test_accuracy"]
