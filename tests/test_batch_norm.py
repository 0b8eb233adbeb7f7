"""BatchNorm + residual + ReLU of csrc/ against float64, PyTorch, and itself."""

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from test_csrc import DEVICE, SHIM, anywhere
from torch import Tensor

import csrc
import engine

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++: nothing to test")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPES = [(2, 1, 1, 1), (3, 3, 5, 7), (5, 16, 9, 7), (3, 100, 9, 5), (4, 65, 3, 3), (2, 192, 4, 4)]
SHAPES += [(260, 1, 64, 32)]  # pixels for more blocks than PARTS
SHAPES += [] if SHIM else [(4, 24, 33, 11), (33, 8, 31, 17), (64, 32, 4, 4), (7, 64, 5, 5)]
CASES = list(itertools.product([False, True], [False, True]))  # with a residual, with ReLU
definition = engine.batch_norm_relu.definition


@pytest.fixture(scope="module")
def op():
    return csrc.load(engine.DEFINITIONS).batch_norm_relu


def draw(shape, dtype=F32, adds=True, mean=0.5, scale=2.0) -> list[Tensor | None]:
    """x, weight, bias, running mean and variance, residual, and the gradient of y."""
    g = torch.Generator().manual_seed(sum(shape))
    image = lambda: torch.randn(shape, generator=g)  # noqa: E731
    c = shape[1]
    last = [image() * scale + mean, image() if adds else None, image()]
    x, residual, dy = (
        None if t is None else t.to(dtype).contiguous(memory_format=torch.channels_last)
        for t in last
    )
    weight, bias = torch.rand(c, generator=g) + 0.1, torch.randn(c, generator=g)
    running = torch.randn(c, generator=g), torch.rand(c, generator=g) + 0.5
    return [x, weight, bias, *running, residual, dy]


def results(op, arguments, relu, dtype=None, device="cpu", copy=True) -> dict[str, Tensor]:
    """y, the running statistics and all gradients. Without `copy` the images stay where they are,
    if that is on `device`."""
    x, weight, bias, mean, var, residual, dy = (
        None if t is None else t.to(device, dtype or t.dtype, copy=copy or t.dim() == 1)
        for t in arguments
    )
    inputs = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    inputs = {k: t.detach().requires_grad_() for k, t in inputs.items() if t is not None}
    x, weight, bias, residual = (inputs.get(k) for k in ("x", "weight", "bias", "residual"))
    y = op(x, weight, bias, mean, var, residual, 0.3, 1e-4, relu)
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    out = {"y": y.detach(), "running_mean": mean, "running_var": var}
    out |= {f"d{k}": g for k, g in zip(inputs, grads, strict=True)}
    return {k: t.cpu() for k, t in out.items()}


@pytest.fixture
def kernels(op, monkeypatch):
    """The definition is not to be called."""

    def fail(*_):
        raise AssertionError("the definition ran")

    monkeypatch.setattr(F, "batch_norm", fail)
    return op


@anywhere
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_at_most_twice_those_of_torch(op, shape, dtype):
    for adds, relu in CASES if sum(shape) < 300 else CASES[3:]:
        arguments = draw(shape, dtype, adds)
        ours, torchs = (
            results(op, arguments, relu, None, DEVICE),
            results(definition, arguments, relu),
        )
        exact = results(definition, arguments, relu, F64)
        for name, want in exact.items():
            assert ours[name].dtype is torchs[name].dtype and ours[name].shape == want.shape
            keep = torch.ones_like(want, dtype=torch.bool)
            if name in ("dx", "dresidual") and relu:  # away from ReLU's corner
                keep = (ours["y"] > 0) == (exact["y"] > 0)
                assert keep.double().mean() > 0.999 or keep.numel() < 1000
            error, theirs = (((r[name].double() - want).abs() * keep).max() for r in (ours, torchs))
            summed = arguments[-1].abs().sum((0, 2, 3)).max() if want.dim() == 1 else 0.0
            size = max(want.abs().max(), summed)
            allowed = max(2 * theirs, (2 if want.numel() < 1000 else 0.5) * 1.2e-7 * size)
            assert error <= allowed, f"{name} {adds=} {relu=}: {error:.3g}, torch {theirs:.3g}"


@anywhere
def test_a_mean_far_from_zero_and_an_outlier_cost_no_accuracy(op):
    for mean, outlier in ((1e4, 0.0), (0.0, 1e6)):
        arguments = draw((32, 16, 16, 16), mean=mean, scale=1.0)
        arguments[0][0, :, 0, 0] += outlier
        ours, torchs = (
            results(op, arguments, True, None, DEVICE),
            results(definition, arguments, True),
        )
        exact = results(definition, arguments, True, F64)
        for name in ("running_mean", "running_var"):
            error, theirs = ((r[name].double() - exact[name]).abs().max() for r in (ours, torchs))
            assert error <= max(2 * theirs, 1.2e-7 * exact[name].abs().max())


@anywhere
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_same_bits_wherever_the_images_lie_in_memory(op, dtype):
    arguments = draw((9, 20, 7, 5), dtype)
    shifted = list(arguments)
    for i in (0, 5, 6):
        memory = torch.empty(arguments[i].numel() + 1, dtype=dtype, device=DEVICE)
        shifted[i] = memory[1:].as_strided(arguments[i].shape, arguments[i].stride())
        shifted[i].copy_(arguments[i])
    a, b = (results(op, x, True, None, DEVICE, copy=False) for x in (arguments, shifted))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("shape", [(9, 16, 32, 32), (40, 24, 11, 33), (2, 64, 3, 3)])
def test_same_bits_for_any_number_of_threads_and_every_time(kernels, shape):
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            seen.append([results(kernels, draw(shape, adds=a), r) for a, r in CASES])
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("adds", "relu"), CASES)
def test_second_derivatives_are_those_of_the_definition(op, adds, relu):
    def second(f, dtype=None):
        *arguments, dy = [
            None if t is None else (t.to(dtype) if dtype else t).clone()
            for t in draw((3, 4, 3, 3), adds=adds)
        ]
        inputs = [t.requires_grad_() for t in (*arguments[:3], arguments[5], dy) if t is not None]
        x = arguments[0]
        arguments[0] = (x * x).contiguous(memory_format=torch.channels_last)  # no leaf
        y = f(*arguments, relu=relu)
        first = torch.autograd.grad(y, inputs[:-1], dy, create_graph=True)
        again = torch.autograd.grad(sum((g**3).sum() for g in first), inputs, allow_unused=True)
        return [*first, *again]

    for ours, want in zip(second(op), second(definition, F64), strict=True):
        if ours is None:  # what does not depend on it at all has no gradient, or zeros
            assert want is None or not want.any()
        else:
            torch.testing.assert_close(ours.double(), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("adds", [False, True])
def test_opcheck(op, adds):
    ops = torch.ops.datadiet
    x, weight, bias, mean, var, residual, dy = draw((3, 16, 5, 3), adds=adds)
    arguments = (x, weight, bias, mean, var, residual, 0.1, 1e-5, True)
    torch.library.opcheck(ops.batch_norm_relu_forward.default, arguments)
    without = (x, weight, bias, None, None, residual, 0.1, 1e-5, True)
    torch.library.opcheck(ops.batch_norm_relu_forward.default, without)
    y, mean, rstd = ops.batch_norm_relu_forward(*arguments)
    gradients = (dy, x, y if adds else None, weight, bias, mean, rstd, True)
    torch.library.opcheck(ops.batch_norm_relu_backward.default, gradients)


def test_what_has_no_kernel_takes_the_definition(op):
    x, *rest, _ = draw((3, 16, 5, 5))
    slices = torch.cat([x, x], 3)[..., ::2]
    for images in (x.double(), x.contiguous(), slices, x.half()):
        dtype = images.dtype
        arguments = [t.to(dtype).clone() for t in rest]
        again = [t.clone() for t in arguments]
        assert torch.equal(op(images, *arguments), definition(images, *again))
        assert torch.equal(arguments[2], again[2])
    with pytest.raises(ValueError, match="more than 1 value"):
        op(x[:1, :, :1, :1], *rest[:4])


def test_no_statistics_gradients_of_any_layout_and_parts_that_need_none(kernels):
    x, weight, bias, _, _, residual, dy = draw((3, 16, 5, 5))
    with torch.no_grad():
        y = kernels(x, weight, bias, None, None, residual)
    grads = []
    for gradient in (dy, dy.contiguous()):
        r = residual.clone().requires_grad_()
        assert torch.equal(kernels(x, weight, bias, None, None, r), y)
        kernels(x, weight, bias, None, None, r).backward(gradient)
        grads.append(r.grad)
    assert torch.equal(*grads) and torch.equal(grads[0], dy * (y > 0))


def test_a_nan_stays_one_and_wrong_arguments_are_named(kernels):
    x, weight, bias, mean, var, residual, _ = draw((2, 16, 3, 3))
    x[0, 3] = float("nan")
    y = kernels(x, weight, bias, mean, var, residual)
    assert y[:, 3].isnan().all() and not y[:, :3].isnan().any() and not y[:, 4:].isnan().any()
    assert mean[3].isnan() and var[3].isnan()
    with pytest.raises(RuntimeError, match="bias must be a contiguous"):
        kernels(x, weight, bias[:3], mean, var)
    with pytest.raises(RuntimeError, match="both be given"):
        kernels(x, weight, bias, mean, None)
