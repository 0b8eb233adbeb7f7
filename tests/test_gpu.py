"""The engine on a CUDA device: with `-m gpu` the real one, else that of pretend_card.py."""

import math
import signal
from types import SimpleNamespace

import pytest
import torch

import common
import runs

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def card(request):
    """The real one; where there is none, but with `-m gpu`, that of pretend_card.py."""
    if not torch.cuda.is_available():
        if request.config.option.markexpr == "gpu":
            pytest.skip("needs a CUDA device")
        return request.getfixturevalue("pretended_card")


@pytest.fixture(autouse=True)
def deterministic(capsys, request):
    """And no engine has fallen back to a slower one, but where that is the test."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield
    if "cannot_be_recorded" not in request.node.name:
        assert "going on" not in capsys.readouterr().err


def training(engine, precision="fp32", rows=(0,), stop=24, watch=None, at=(), depth=8):
    width = 4 if torch.cuda.get_device_name() == "a pretended card" else 16
    args = SimpleNamespace(
        seed=0, batch_size=32, momentum=0.9, weight_decay=1e-3, pad=1, flip=True,
        engine=engine, precision=precision, checkpoint_every=1e9, depth=depth, width=width,
    )  # fmt: skip
    data = common.load_data("digits", common.HERE / "data", DEVICE)
    networks = common.Networks(common.make_model(args, data), len(rows), DEVICE)
    mask = torch.rand(networks.mask.shape[1], generator=torch.Generator().manual_seed(0)) < 0.8
    for r, replicate in enumerate(rows):
        networks.rewind(r, common.fresh_state(args, data, replicate), mask)
    streams = [common.make_stream(args, data, r) for r in rows]
    schedule = common.step_schedule(0.1, (20,))
    return common.Training(args, data, networks, streams, 0, stop, schedule, frozenset(at), watch)


def finish(t, start=None):
    for _ in common.train(t, start):
        pass
    torch.cuda.synchronize()
    return t.networks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_graph_gives_the_bits_of_the_eager_steps(precision):
    a, b = (finish(training(engine, precision)) for engine in ("eager", "graph"))
    assert torch.equal(a.weights, b.weights) and torch.equal(a.batchnorm, b.batchnorm)


def test_the_device_gives_the_crops_and_orders_of_the_cpu():
    t = training("eager")
    s, data = t.streams[0], t.data
    cpu = common.Stream(s.labels.cpu(), s.indices.cpu(), s.order, s.augment)
    batch = common.batch_indices(s, 3, 60, 32)
    assert torch.equal(batch.cpu(), common.batch_indices(cpu, 3, 60, 32))
    crops, wanted = (common.draw_crops(s.augment, 3, 60, 32, 1, True, d) for d in (DEVICE, "cpu"))
    assert torch.equal(crops.cpu(), wanted)
    tensors = data.train_images, batch[4], crops[4], data.scale, data.shift
    x, y = common.augment(*tensors), common.augment.definition(*(v.cpu() for v in tensors))
    torch.testing.assert_close(x.cpu(), y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_rows_are_the_same_alone_and_beside_others(engine, precision):
    together = finish(training(engine, precision, rows=(0, 1, 2)))
    alone = finish(training(engine, precision, rows=(1,)))
    assert torch.equal(together.weights[1], alone.weights[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_under_the_graph_gives_the_bits_of_an_undisturbed_training(tmp_path, precision):
    undisturbed = finish(training("graph", precision))

    run = runs.Run(tmp_path, 0, {"replicate": 0}, {})
    bar = runs.progress_bar(0, quiet=True)

    def interrupt(step):
        if step == 17:
            runs.signals.number = signal.SIGTERM

    t = training("graph", precision, at=(17,))
    with pytest.raises(runs.Interrupted):
        common.fit(t, [run], "level00", bar, interrupt)
    runs.signals.number = 0
    again = training("graph", precision)
    common.fit(again, [run], "level00", bar)
    assert torch.equal(again.networks.weights, undisturbed.weights)
    assert torch.equal(again.networks.batchnorm, undisturbed.batchnorm)


def test_pruned_weights_are_zero_after_every_step():
    t = training("graph", "bf16", rows=(0, 1), at=range(1, 24))
    for _ in common.train(t):
        n, p = t.networks, t.networks.mask.shape[1]
        for matrix in (n.weights, n.momentum) + ((n.low,) if n.low is not None else ()):
            assert (matrix[:, :p][~n.mask] == 0).all()
        assert (n.gradient == 0).all()


def test_the_rate_drops_at_exactly_its_step():
    """With no momentum and no decay the change of the weights is rate * gradient: a tenth."""
    changes = []
    for first in (19, 20):
        t = training("graph", stop=20 if first == 19 else 21)
        t.args.momentum = t.args.weight_decay = 0.0
        t.streams[0].order = (1, 1)
        finish(t)
        changes.append(t.networks.weights.clone())
    t = training("graph", stop=21)
    t.args.momentum = t.args.weight_decay = 0.0
    t.streams[0].order = (1, 1)
    t.lr_at = lambda step: 0.1
    undropped = finish(t).weights
    ratio = (changes[1] - changes[0]).norm() / (undropped - changes[0]).norm()
    assert math.isclose(ratio.item(), 0.1, rel_tol=1e-2)


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_a_step_never_waits_for_the_device(engine, monkeypatch):
    seen = []

    def watch(networks, row, step, indices, logits):
        seen.append(row)

    finish(training(engine, "bf16", rows=(0, 1), watch=watch, stop=12))  # builds what has to be
    t = training(engine, "bf16", rows=(0, 1), watch=watch, stop=12)
    update, augment = common.masked_sgd_, common.augment

    def last(*tensors):
        update(*tensors)
        torch.cuda.set_sync_debug_mode("default")

    def first(*tensors):
        torch.cuda.set_sync_debug_mode("error")
        return augment(*tensors)

    monkeypatch.setattr(common, "masked_sgd_", last)
    monkeypatch.setattr(common, "augment", first)
    try:
        finish(t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert set(seen) == {0, 1}


def test_a_function_that_cannot_be_recorded_still_runs(capsys):
    total = torch.zeros(1, device=DEVICE)

    def function():
        total.add_(1)
        total.item()  # waits for the device: not allowed in a graph

    step = common.Captured(function, common.cuda_streams(DEVICE)[0])
    for _ in range(6):
        step()
    assert total.item() == 6 and "going on without" in capsys.readouterr().err
