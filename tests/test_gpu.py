"""The engine on a CUDA device: with `-m gpu` a real one, else that of simulated_cuda.py."""

import dataclasses
import math
import signal

import conftest
import pytest
import simulated_cuda
import torch

import common
import engine
import runs

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


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


def training(graph=True, precision="fp32", stop=24, depth=8, **more) -> engine.Training:
    """Of a ResNet on the digits under a random mask; the rate drops tenfold at step 20."""
    width = 4 if torch.cuda.get_device_name() == simulated_cuda.NAME else 16
    usual = {"model": common.ResNet(depth, width, 1, 10), "alive": 0.8, "drop": 20, "flip": True}
    usual |= {"device": DEVICE, "graph": graph, "bf16": precision == "bf16", "weight_decay": 1e-3}
    return conftest.training(stop=stop, **usual | more)


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
