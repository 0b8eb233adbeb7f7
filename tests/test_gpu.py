"""The engine on a CUDA device: with `-m gpu` a real one, else that of simulated_cuda.py."""

import dataclasses
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import simulated_cuda
import torch

import common
import engine
import runs

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
DIGITS = Path(__file__).parent.parent / "data/digits.npz"


@pytest.fixture(autouse=True)
def gpu(request):
    """The real one; where there is none, unless with `-m gpu`, that of simulated_cuda.py."""
    if not torch.cuda.is_available():
        if request.config.option.markexpr == "gpu":
            pytest.skip("needs a CUDA device")
        return request.getfixturevalue("simulated_cuda")


@pytest.fixture(autouse=True)
def deterministic(capsys, request):
    """And no step has fallen back to a slower one, but where that is the test."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield
    if "cannot_be_recorded" not in request.node.name:
        assert "continuing without" not in capsys.readouterr().err


def training(
    graph=True, precision="fp32", rows=(0,), stop=24, watch=None, at=(), depth=8, **settings
) -> engine.Training:
    """Of a ResNet on the digits, the replicates `rows`, under a random mask; the rate drops tenfold
    at step 20."""
    settings = {"momentum": 0.9, "weight_decay": 1e-3, **settings}
    step = engine.StepSettings(
        batch_size=32, pad=1, flip=True, graph=graph, bf16=precision == "bf16",
        checkpoint_every=1e9, **settings,
    )  # fmt: skip
    width = 4 if torch.cuda.get_device_name() == simulated_cuda.NAME else 16
    model = common.ResNet(depth, width, 1, 10)
    networks = engine.Networks(model, len(rows), DEVICE)
    mask = torch.rand(networks.mask.shape[1], generator=torch.Generator().manual_seed(0)) < 0.8
    data, streams = digits(), []
    everything = torch.arange(len(data.train_labels), device=DEVICE)
    for r, replicate in enumerate(rows):
        common.initialise_resnet(model, engine.generator(0, "init", replicate))
        networks.load(r, model.state_dict())
        networks.set_mask(r, mask)
        keys = (engine.philox_key(0, purpose, replicate) for purpose in ("order", "augment"))
        streams.append(engine.Stream(data.train_labels, everything, *keys))
    schedule = engine.step_schedule(0.1, (20,))
    return engine.Training(step, data, networks, streams, 0, stop, schedule, frozenset(at), watch)


def digits() -> engine.Data:
    stored = np.load(DIGITS)
    images = torch.from_numpy(stored["images"])[..., None].to(DEVICE)
    labels = torch.from_numpy(stored["labels"].astype(np.int64)).to(DEVICE)
    scale, shift = torch.full((1,), 1 / 96, device=DEVICE), torch.full((1,), -0.8, device=DEVICE)
    parts = images[:-360], labels[:-360], images[-360:], labels[-360:]
    return engine.Data("digits", *parts, [str(c) for c in range(10)], "", scale, shift)


def finish(t: engine.Training, start: int | None = None) -> engine.Networks:
    for _ in engine.train(t, start):
        pass
    torch.cuda.synchronize()
    return t.networks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_graph_gives_the_bits_of_the_eager_steps(precision):
    a, b = (finish(training(graph, precision)) for graph in (False, True))
    assert torch.equal(a.weights, b.weights) and torch.equal(a.statistics, b.statistics)


def test_the_device_gives_the_crops_and_orders_of_the_cpu():
    t = training(graph=False)
    s, data = t.streams[0], t.data
    cpu = engine.Stream(s.labels.cpu(), s.indices.cpu(), s.order, s.augment)
    batch = engine.batch_indices(s, 3, 60, 32)
    assert torch.equal(batch.cpu(), engine.batch_indices(cpu, 3, 60, 32))
    crops, wanted = (engine.draw_crops(s.augment, 3, 60, 32, 1, True, d) for d in (DEVICE, "cpu"))
    assert torch.equal(crops.cpu(), wanted)
    tensors = data.train_images, batch[4], crops[4], data.scale, data.shift
    x, y = engine.augment(*tensors), engine.augment.definition(*(v.cpu() for v in tensors))
    torch.testing.assert_close(x.cpu(), y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("graph", [False, True])
def test_rows_are_the_same_alone_and_beside_others(graph, precision):
    together = finish(training(graph, precision, rows=(0, 1, 2)))
    alone = finish(training(graph, precision, rows=(1,)))
    assert torch.equal(together.weights[1], alone.weights[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_under_the_graph_gives_the_bits_of_an_undisturbed_training(tmp_path, precision):
    undisturbed = finish(training(precision=precision))
    progress = runs.progress_bar(0, quiet=True)

    def interrupt(step):
        if step == 17:
            runs.signals.number = signal.SIGTERM

    run = runs.Run(tmp_path, 0, {"replicate": 0}, {}, {}, {})
    with run.held:
        with pytest.raises(runs.Interrupted):
            engine.fit(
                training(precision=precision, at=(17,)), [run], "level00", progress, interrupt
            )
        runs.signals.number = 0
        again = training(precision=precision)
        engine.fit(again, [run], "level00", progress)
    assert torch.equal(again.networks.weights, undisturbed.weights)
    assert torch.equal(again.networks.statistics, undisturbed.statistics)


def test_pruned_weights_are_zero_after_every_step():
    t = training(precision="bf16", rows=(0, 1), at=range(1, 24))
    for step in engine.train(t):
        n, p = t.networks, t.networks.mask.shape[1]
        rounded = n.weights_bf16 if step < t.stop else n.weights
        for matrix in (n.weights, n.momentum, rounded):
            assert (matrix[:, :p][~n.mask] == 0).all()
        assert (n.gradient == 0).all()


def test_the_rate_drops_at_exactly_its_step():
    """With no momentum and no decay the change of the weights is rate * gradient: a tenth."""

    def weights(stop, **changes):
        t = training(stop=stop, momentum=0.0, weight_decay=0.0)
        return finish(dataclasses.replace(t, **changes)).weights.clone()

    before, dropped, undropped = weights(20), weights(21), weights(21, lr_at=lambda step: 0.1)
    ratio = (dropped - before).norm() / (undropped - before).norm()
    assert math.isclose(ratio.item(), 0.1, rel_tol=1e-2)


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_never_waits_for_the_device(graph, monkeypatch):
    seen = []

    def watch(networks, row, step, indices, logits):
        seen.append(row)

    case = {"graph": graph, "precision": "bf16", "rows": (0, 1), "watch": watch, "stop": 12}
    finish(training(**case))  # builds what has to be
    t = training(**case)
    update, augment = engine.masked_sgd_, engine.augment

    def last(*tensors):
        update(*tensors)
        torch.cuda.set_sync_debug_mode("default")

    def first(*tensors):
        torch.cuda.set_sync_debug_mode("error")
        return augment(*tensors)

    monkeypatch.setattr(engine, "masked_sgd_", last)
    monkeypatch.setattr(engine, "augment", first)
    try:
        finish(t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert set(seen) == {0, 1}


def test_a_step_that_cannot_be_recorded_still_runs(capsys):
    total = torch.zeros(1, device=DEVICE)

    def function():
        total.add_(1)
        total.item()  # waits for the device: not allowed in a graph

    step = engine.GraphedStep(function, engine.cuda_streams(DEVICE)[0])
    for _ in range(6):
        step()
    assert total.item() == 6 and "continuing without" in capsys.readouterr().err
