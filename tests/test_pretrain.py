"""pretrain.py against plain autograd, plain accuracies and imp.py."""

import csv
import dataclasses
import math

import numpy as np
import plain
import torch
import torch.nn.functional as F
from conftest import digits, study_of

import common
import engine
import runs

TINY = ("--width", 4, "--subset", "random", "--size", 128, "--rewind", 8, "--steps", 20)
EVERY = ("--every", 4)


def test_what_is_tracked_is_what_plain_torch_gives(stage, tmp_path):
    """Norm of the first minibatch gradient and the coherence at step 0, from plain autograd."""
    stage("pretrain", *TINY, *EVERY, "--track", "gradient-norm,coherence", "--replicate", "1")
    [folder] = tmp_path.rglob("rep1")
    study = study_of("pretrain", *TINY, *EVERY)
    data, model = study.data, common.ResNet(8, 4, 1, 10)
    model.load_state_dict(study.initial_state_dict(1))
    indices = common.choose_subset(study, data.train_labels, 1)
    stream = study.stream(1, 0, indices)

    def gradient(x, y):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    model.eval()
    keys = dataclasses.replace(stream, order=engine.philox_key(0, "sample", 1))
    batches = engine.batch_indices(keys, 0, 16, 64)
    pixels = data.train_images.float() * data.scale + data.shift
    images = pixels.permute(0, 3, 1, 2)
    g = torch.stack([gradient(images[i], data.train_labels[i]) for i in batches])
    mean = g.mean(0)
    expected = (g @ mean) / (g.norm(dim=1) * mean.norm())
    cosines = np.load(folder / "coherence.npy")
    assert cosines.shape == (3, 16)  # steps 0, 4, 8
    np.testing.assert_allclose(cosines[0], expected, rtol=1e-4)
    model.train()
    i = engine.batch_indices(stream, 0, 1, 64)[0]
    assert set(i.tolist()) <= set(np.load(folder / "subset.npy").tolist())
    [crops] = engine.draw_crops(stream.augment, 0, 1, 64, 1, False, i.device)
    x = engine.augment(data.train_images, i, crops, data.scale, data.shift)
    norm = gradient(x, data.train_labels[i]).norm().item()
    norms = np.load(folder / "gradient_norm.npy")
    assert norms.shape == (8,) and math.isclose(norms[0], norm, rel_tol=1e-4)
    assert (norms > 0).all()


def test_learning_curves_end_at_the_accuracies_of_w_tr(stage, tmp_path):
    scores = np.random.default_rng(0).random(1437).astype(np.float32)
    np.save(tmp_path / "mine.npy", scores)
    flags = ("--subset", "easy", "--scores", tmp_path / "mine.npy", *TINY[:2], *TINY[4:], *EVERY)
    [result] = stage("pretrain", *flags, "--track", "accuracy")
    [folder] = tmp_path.rglob("rep0")
    with open(folder / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(r["step"]) for r in rows] == [0, 4, 8]
    easy = np.argsort(scores)[:128]
    assert np.load(folder / "subset.npy").tolist() == sorted(easy.tolist())
    data, last = digits(), rows[-1]
    model = plain.network(runs.read_tensors(folder / "pretrained.pt")["model"])
    wrong = plain.losses(plain.logits(model, data.train_images), data.train_labels)[1]
    test = plain.accuracy(model)
    assert math.isclose(float(last["test_accuracy"]), test)
    assert math.isclose(result["pretrain"]["test_accuracy"], test)
    assert math.isclose(float(last["train_accuracy"]), 1 - wrong.mean())
    assert math.isclose(float(last["easy_accuracy"]), 1 - wrong[easy].mean())


def test_w_tr_is_that_of_imp_and_is_taken_by_it(stage, tmp_path):
    stage("pretrain", *TINY, *EVERY, "--track", "gradient-norm", "--replicate", "0-1")
    [own] = stage("imp", *TINY, "--levels", 0, "--replicate", "1")
    [folder] = tmp_path.glob("results/pretrain/*/*")
    flags = (*TINY[:2], "--init", folder, "--steps", 20, "--levels", 0)
    first, second = stage("imp", *flags, "--replicate", "0-1")
    assert second["pretrain"]["fingerprint"] == own["pretrain"]["fingerprint"]
    assert first["pretrain"]["fingerprint"] != second["pretrain"]["fingerprint"]
    assert second["levels"][0]["test_accuracy"] == own["levels"][0]["test_accuracy"]
    assert second["pretrain"]["step"] == 8  # of the file, without --rewind
