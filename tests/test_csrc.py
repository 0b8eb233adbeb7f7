"""csrc/ against float64, NumPy, hand-worked rows, published vectors; its build and its errors."""

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import common
import csrc
from csrc.__main__ import kernels

ROOT = Path(__file__).resolve().parent.parent
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = (1, 31, 97, 1025, 100_003)
KAT = [  # Random123 kat_vectors, philox4x32 10: counter, key, result
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++: nothing to test")
card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def ops():
    return csrc.load()


@functools.cache
def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
    return (normal(shape, seed) * scale).to(dtype)


def sgd_case(rows: int, columns: int, mask: str = "random", gradient: torch.dtype = F32) -> list:
    prunable = columns - columns // 3
    masks = {"ones": torch.ones, "zeros": torch.zeros}
    alive = masks.get(mask, lambda *s: draw(*s, seed=4) > 0)(rows, prunable).bool()
    w = draw(rows, columns, seed=1)
    w[:, :prunable] *= alive
    m, g = draw(rows, columns, seed=2, scale=0.1), draw(rows, columns, seed=3, dtype=gradient)
    return [w, m, g, alive, torch.full((1,), 0.1)]


def close_as_torch(
    ours: Tensor, torchs: Tensor, exact: Tensor, what: str, size: float | None = None
) -> None:
    """Our largest error is at most twice torch's. Below a thousand numbers, where torch may have
    been lucky with all of them, and in float64, which is the judge itself, it may also be 4 units
    in the last place of `size`, the largest number that was summed."""
    error, theirs = (ours.double() - exact).abs().max(), (torchs.double() - exact).abs().max()
    allowed = 2 * theirs
    if exact.numel() < 1000 or ours.dtype == F64:
        size = exact.abs().max() if size is None else size
        allowed = torch.maximum(allowed, 4 * torch.finfo(ours.dtype).eps * torch.as_tensor(size))
    assert error <= allowed, f"{what}: {error:.3g}, torch {theirs:.3g}"


# ---- arithmetic of math.h, called from Python ----------------------------------------------------


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """A few functions of math.h, over arrays."""
    folder = tmp_path_factory.mktemp("header")
    (folder / "h.cpp").write_text(
        f"""#include "{ROOT / "csrc/math.h"}"
        using namespace datadiet;
        extern "C" void philox_(const uint32_t* c, const uint32_t* k, uint32_t* out) {{
          Words w = philox(k[0], k[1], {{{{c[0], c[1], c[2], c[3]}}}});
          for (int i = 0; i < 4; ++i) out[i] = w.w[i]; }}
        extern "C" void exp_(const float* x, float* y, int n) {{
          for (int i = 0; i < n; ++i) y[i] = exp_nonpositive(x[i]); }}
        extern "C" void f16_(const f16* x, float* y, int n) {{
          for (int i = 0; i < n; ++i) y[i] = value(x[i]); }}
        extern "C" void bf16_(const bf16* x, float* y, int n) {{
          for (int i = 0; i < n; ++i) y[i] = value(x[i]); }}
        extern "C" void to_bf16_(const float* x, bf16* y, int n) {{
          for (int i = 0; i < n; ++i) put(y[i], x[i]); }}
        """
    )
    command = ["g++", *csrc.CXX_FLAGS, "-shared", "h.cpp", "-o", "h.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "h.so"))


def over(function, x: np.ndarray, out: type) -> np.ndarray:
    y = np.empty(len(x), out)
    function(*(ctypes.c_void_p(a.ctypes.data) for a in (x, y)), len(x))
    return y


@pytest.mark.parametrize(("counter", "key", "words"), KAT)
def test_philox_gives_the_published_vectors(header, counter, key, words):
    c, k, out = (np.array(v, np.uint32) for v in (counter, key, [0] * 4))
    header.philox_(*(ctypes.c_void_p(a.ctypes.data) for a in (c, k, out)))
    assert out.tolist() == words
    assert common.philox(torch.tensor(key), torch.tensor(counter)).tolist() == words


def test_exponential_is_within_one_and_a_half_ulp(header):
    x = -np.geomspace(1e-8, 87.3, 1_000_000).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert np.abs((over(header.exp_, x, np.float32) - exact) / ulp).max() < 1.5
    edge = np.array([0.0, -0.0, -87.31, -1e4, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(over(header.exp_, edge, np.float32), [1, 1, 0, 0, 0, np.nan])


def test_every_16_bit_float_converts_as_in_torch(header):
    bits = np.arange(2**16, dtype=np.uint16)
    for function, dtype in ((header.f16_, F16), (header.bf16_, BF16)):
        exact = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
        np.testing.assert_array_equal(over(function, bits, np.float32), exact)
    x = np.random.default_rng(0).integers(0, 2**32, 2**18, np.uint32).view(np.float32)
    ties = (bits.astype(np.uint32) << 16 | 0x8000).view(np.float32)
    x = np.concatenate([x, ties])
    exact = torch.from_numpy(x).to(BF16).float().numpy()
    y = over(header.to_bf16_, x, np.uint16).astype(np.uint32) << 16
    np.testing.assert_array_equal(y.view(np.float32), exact)


# ---- masked SGD ----------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("mask", ["ones", "zeros", "random"])
@pytest.mark.parametrize("gradient", [F32, BF16])
def test_masked_sgd_against_float64(ops, rows, columns, mask, gradient):
    case = sgd_case(rows, columns, mask, gradient)
    if rows > 1:
        case[4] = torch.linspace(0.05, 0.4, rows)
    case[4] = case[4].clone()
    plain = [x.clone() for x in case]
    exact = [x if x.dtype == torch.bool else x.double() for x in case]
    low = torch.full((rows, columns), torch.nan, dtype=BF16)
    common.masked_sgd_.definition(*plain, 0.9, 1e-4)
    common.masked_sgd_.definition(*exact, 0.9, 1e-4)
    ops.masked_sgd_(*case, 0.9, 1e-4, low=low)
    for i, what in ((0, "weights"), (1, "momentum")):
        close_as_torch(case[i], plain[i], exact[i], what)
    alive = torch.ones(rows, columns, dtype=torch.bool)
    alive[:, : case[3].shape[1]] = case[3]
    for x in case[:2]:
        assert x[~alive].eq(0).all() and not x[~alive].signbit().any()
    assert case[2].eq(0).all()
    assert torch.equal(low, case[0].to(BF16))


def test_masked_sgd_is_torchs_own_sgd_where_nothing_is_masked(ops):
    w, m, _, mask, lr = sgd_case(2, 97, "ones")
    m.zero_()
    parameter = torch.nn.Parameter(w.double())
    optimiser = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.05)
    for step in range(20):
        g = draw(2, 97, seed=step)
        parameter.grad = g.double()
        optimiser.step()
        ops.masked_sgd_(w, m, g, mask, lr, 0.9, 0.05)
    torch.testing.assert_close(w.double(), parameter.data, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -3e38])
def test_masked_weights_stay_zero_under_a_gradient_that_is_not_finite(ops, bad):
    w, m, g, mask, lr = sgd_case(2, 31)
    pruned = (~mask).nonzero(as_tuple=True)
    g[pruned] = bad
    ops.masked_sgd_(w, m, g, mask, lr, 0.9, 1e-4)
    for x in (w, m):
        assert x[pruned].eq(0).all() and not x[pruned].signbit().any()
    assert g.eq(0).all() and w.isfinite().all()


def test_a_row_does_not_feel_its_neighbours_threads_or_alignment(ops):
    rows, columns = 5, 100_003
    together = sgd_case(rows, columns)
    alone = [x.clone() for x in together]
    ops.masked_sgd_(*together, 0.9, 1e-4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for r in range(rows):
            one = [shifted(x[r : r + 1]) for x in alone[:4]]
            ops.masked_sgd_(*one, alone[4], 0.9, 1e-4)
            assert torch.equal(one[0][0], together[0][r]) and torch.equal(one[1][0], together[1][r])
        logits, labels = draw(1025, 97, scale=4), torch.arange(1025) % 97
        a = ops.example_losses(logits, labels)
        torch.set_num_threads(4)
        b = ops.example_losses(shifted(logits), labels)
        c = [ops.example_losses(logits[i : i + 3], labels[i : i + 3]) for i in range(0, 1025, 31)]
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, a, b))
    for k, i in enumerate(range(0, 1025, 31)):
        assert all(torch.equal(x[i : i + 3], y) for x, y in zip(a, c[k], strict=True))


def shifted(x: Tensor) -> Tensor:
    """The same values, contiguous, one element away from where an allocation starts."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return room[1:].view(x.shape).copy_(x)


# ---- losses and barriers -------------------------------------------------------------------------


def exact_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, error and EL2N norm by their formulas, in float64 with NumPy."""
    x, y = logits.double().numpy(), labels.numpy()
    e = np.exp(x - x.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    at = np.arange(len(y))
    loss = np.log(e.sum(1)) - (x[at, y] - x.max(1))
    norm = np.linalg.norm(p - np.eye(x.shape[1])[y], axis=1)
    return tuple(map(torch.from_numpy, (loss, (x.argmax(1) != y).astype(float), norm)))


@pytest.mark.parametrize(
    ("n", "classes", "dtype", "scale"),
    [
        *itertools.product((1, 31, 97), (2, 10, 100, 1000), (F32, BF16, F16), (1.0, 30.0, 1e4)),
        *itertools.product((1025,), (2, 10, 65, 100, 1000), (F32,), (0.1, 1.0, 5.0, 30.0, 1e4)),
        *itertools.product((100_003,), (2, 10), (F32,), (1.0,)),
    ],
)
def test_example_losses_against_float64(ops, n, classes, dtype, scale):
    logits = draw(n, classes, seed=classes, scale=scale).clamp(-1e4, 1e4).to(dtype)
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(n))
    ours = ops.example_losses(logits, labels)
    plain = common.example_losses.definition(logits, labels)
    for what, a, b, c in zip(
        ("loss", "error", "norm"), ours, plain, exact_losses(logits, labels), strict=True
    ):
        assert a.dtype == F32 and a.shape == (n,)
        close_as_torch(a, b, c, what)


def test_example_losses_of_hand_worked_rows(ops):
    t, inf, nan = np.log(3.0), torch.inf, torch.nan
    rows = [  # logits, label, loss, error, norm
        ([0.0, t], 1, np.log(4 / 3), 0, np.sqrt(2) / 4),
        ([0.0, t], 0, np.log(4.0), 1, 3 * np.sqrt(2) / 4),
        ([5.0, 5.0], 0, np.log(2.0), 0, np.sqrt(0.5)),  # the first of equals wins
        ([5.0, 5.0], 1, np.log(2.0), 1, np.sqrt(0.5)),
        ([1e4, -1e4], 0, 0.0, 0, 0.0),
        ([1e4, -1e4], 1, 2e4, 1, np.sqrt(2.0)),
        ([0.0, -20.0], 0, np.log1p(np.exp(-20.0)), 0, np.sqrt(2) * np.exp(-20.0)),
        ([0.0, -inf], 0, 0.0, 0, 0.0),
        ([nan, 0.0], 1, nan, 1, nan),
        ([0.0, nan], 0, nan, 1, nan),
    ]
    for dtype in (F32, F64):
        logits = torch.tensor([r[0] for r in rows], dtype=dtype)
        ours = ops.example_losses(logits, torch.tensor([r[1] for r in rows]))
        for i, x in enumerate(ours):
            want = torch.tensor([r[2 + i] for r in rows], dtype=dtype)
            torch.testing.assert_close(x, want, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (31, 10), (1025, 100)])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_loss_barrier_against_float64(ops, n, classes, dtype):
    alphas = torch.tensor([0.0, 0.25, 0.5, 1.0])
    first, second = (draw(n, classes, seed=s, dtype=dtype, scale=5) for s in (1, 2))
    middle = draw(4, n, classes, seed=3, dtype=dtype, scale=5)
    middle[0], middle[3] = first, second
    labels = torch.arange(n) % classes
    ours = ops.loss_barrier(middle, first, second, labels, alphas)
    plain = common.loss_barrier.definition(middle, first, second, labels, alphas)
    ends = [exact_losses(x, labels)[:2] for x in (first, second)]
    a = alphas.double()[:, None]
    for i, what in enumerate(("loss", "error")):
        mids = torch.stack([exact_losses(x, labels)[i] for x in middle])
        exact = mids - ((1 - a) * ends[0][i] + a * ends[1][i])
        close_as_torch(ours[i], plain[i], exact, what)
        close_as_torch(ours[2 + i], plain[2 + i], exact.amax(0), f"supremum of {what}")
        assert ours[i][[0, 3]].eq(0).all()  # no barrier at the ends themselves


def test_supremum_keeps_a_nan(ops):
    middle = torch.zeros(3, 2, 4)
    middle[1, 0, 2] = torch.nan
    end, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
    loss, _, top, top_error = ops.loss_barrier(middle, end, end, labels, torch.rand(3))
    assert loss.isnan().nonzero().tolist() == [[1, 0]]
    assert top.isnan().tolist() == [True, False] and top_error.tolist() == [1, 0]


# ---- augmentation --------------------------------------------------------------------------------


def augment_case(height: int, width: int, channels: int, batch: int = 33) -> dict:
    g = torch.Generator().manual_seed(height)
    return {
        "images": torch.randint(0, 256, (50, height, width, channels), generator=g).byte(),
        "indices": torch.randint(0, 50, (batch,), generator=g),
        "key": torch.tensor(common.philox_key(3, "augment", 1, 2)),
        "step": torch.tensor([12_345]),
        "scale": torch.rand(channels, generator=g) / 50,
        "shift": torch.randn(channels, generator=g),
    }


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (5, 9, 2)])
@pytest.mark.parametrize(("pad", "flip"), [(0, False), (1, True), (4, True)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_augment_cuts_flips_and_normalises(ops, shape, pad, flip, dtype):
    """The same crops and flips as NumPy's padding and slicing, to the bit."""
    case = augment_case(*shape)
    out = ops.augment(**case, pad=pad, flip=flip, dtype=dtype)
    height, width, channels = shape
    assert out.shape == (33, channels, height, width) and out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    images = np.pad(case["images"].numpy(), [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    drawn = set()
    for b, index in enumerate(case["indices"].tolist()):
        words = common.philox(case["key"], torch.tensor([b, 12_345, 0, 0])).tolist()
        y, x = ((w * (2 * pad + 1)) >> 32 for w in words[:2])
        crop = images[index, y : y + height, x : x + width]
        mirrored = flip and words[2] & 1
        crop = crop[:, ::-1] if mirrored else crop
        want = crop.astype(np.float32) * case["scale"].numpy() + case["shift"].numpy()
        assert torch.equal(out[b].permute(1, 2, 0), torch.from_numpy(want).to(dtype))
        drawn.add((y, x, mirrored))
    assert len(drawn) > min(12, (2 * pad + 1) ** 2 - 1)
    assert torch.equal(out, common.augment.definition(**case, pad=pad, flip=flip, dtype=dtype))


# ---- errors --------------------------------------------------------------------------------------


def bad_calls() -> list:
    w, m, g, mask, lr = sgd_case(2, 31)
    x, y = draw(5, 3), torch.zeros(5, dtype=torch.long)
    a = augment_case(8, 8, 3)
    sgd, losses, augment = "masked_sgd_", "example_losses", "augment"

    def change(**new) -> tuple:
        return (*{**a, **new}.values(), 1, True)

    return [
        (sgd, (w.double(), m, g, mask, lr, 0.9, 0.0), "weights must"),
        (sgd, (w.T.contiguous().T, m, g, mask, lr, 0.9, 0.0), "weights must.*non-contiguous"),
        (sgd, (w, m[:1], g, mask, lr, 0.9, 0.0), r"momentum must.*\(2, 31\).*got \(1, 31\)"),
        (sgd, (w, m, g.half(), mask, lr, 0.9, 0.0), "gradient must"),
        (sgd, (w, m, g, mask.byte(), lr, 0.9, 0.0), "mask must.*bool.*got.*uint8"),
        (sgd, (w, m, g, torch.ones(2, 32).bool(), lr, 0.9, 0.0), "mask must be no wider"),
        (sgd, (w, m, g, mask, torch.ones(3), 0.9, 0.0), "lr must"),
        (sgd, (w, m, g, mask, lr[0], 0.9, 0.0), "lr must"),
        (sgd, (w, m, g, mask, lr, 0.9, 0.0, w.half()), "low must"),
        (losses, (x.int(), y), "logits must"),
        (losses, (x[0], y), "logits must"),
        (losses, (x.T, y[:3]), "logits must"),
        (losses, (x[:, :0], y), "logits must be of 1"),
        (losses, (x, y.int()), "labels must"),
        (losses, (x, y[:4]), "labels must"),
        (losses, (x, y + 3), r"labels must lie in \[0, 3\), got 3 at position 0"),
        (losses, (x, y - 1), "labels must lie in"),
        ("loss_barrier", (x[None], x, x[:4], y, lr), "second must"),
        ("loss_barrier", (x[None], x, x, y, torch.ones(2)), "middle must"),
        ("loss_barrier", (x[None].double(), x, x, y, lr), "middle must"),
        ("loss_barrier", (x[None][:0], x, x, y, lr[:0]), "alphas must"),
        ("loss_barrier", (x[None], x, x, y + 9, lr), "labels must lie in"),
        (augment, change(images=a["images"].float()), "images must"),
        (augment, change(images=a["images"].permute(0, 3, 1, 2)), "images must.*non-contiguous"),
        (augment, change(indices=a["indices"] + 50), "indices must lie in"),
        (augment, change(indices=a["indices"] - 50), "indices must lie in"),
        (augment, change(key=a["key"][:1]), "key must"),
        (augment, change(step=a["step"][0]), "step must"),
        (augment, change(scale=torch.ones(2)), "scale must"),
        (augment, (*a.values(), -1, True), "pad must"),
        (augment, (*a.values(), 1, True, F16), "dtype must be float32 or bfloat16, got float16"),
    ]


@pytest.mark.parametrize(("op", "arguments", "message"), bad_calls())
def test_a_wrong_argument_is_named(ops, op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(*arguments)


def test_empty_inputs(ops):
    empty = torch.empty(0, dtype=torch.long)
    assert [x.shape for x in ops.example_losses(torch.empty(0, 3), empty)] == [(0,)] * 3
    loss, _, top, _ = ops.loss_barrier(
        torch.empty(2, 0, 3), torch.empty(0, 3), torch.empty(0, 3), empty, torch.ones(2)
    )
    assert loss.shape == (2, 0) and top.shape == (0,)
    case = augment_case(8, 8, 3)
    assert ops.augment(**{**case, "indices": empty}, pad=1, flip=True).shape == (0, 3, 8, 8)
    w = torch.empty(0, 7)
    ops.masked_sgd_(w, w.clone(), w.clone(), torch.empty(0, 3).bool(), torch.ones(1), 0.9, 0.0)


def test_results_refuse_a_gradient(ops):
    loss = ops.example_losses(draw(3, 4).requires_grad_(), torch.zeros(3, dtype=torch.long))[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.sum().backward()


# ---- torch.library -------------------------------------------------------------------------------


def samples() -> list:
    x, y = draw(7, 5), torch.arange(7) % 5
    case = tuple(augment_case(8, 8, 3).values())
    low = torch.zeros(2, 33, dtype=BF16)
    return [
        ("masked_sgd_", (*sgd_case(2, 33), 0.9, 1e-4)),
        ("masked_sgd_", (*sgd_case(2, 33, gradient=BF16), 0.9, 1e-4, low)),
        *[("example_losses", (x.to(dtype), y)) for dtype in (F32, BF16, F16, F64)],
        ("loss_barrier", (draw(2, 7, 5), x, x + 1, y, torch.rand(2))),
        ("augment", (*case, 2, True)),
        ("augment", (*case, 0, False, BF16)),
    ]


@pytest.mark.parametrize(("op", "arguments"), samples())
def test_opcheck(ops, op, arguments):
    torch.library.opcheck(getattr(ops, op).default, arguments)


@pytest.mark.parametrize(("op", "arguments"), samples())
def test_a_device_without_a_kernel_takes_the_definition(ops, op, arguments):
    """What a CUDA tensor meets where there was no nvcc."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    copies = [[a.clone() if isinstance(a, Tensor) else a for a in arguments] for _ in range(2)]
    got = getattr(ops, op).default._op_dk(key, *copies[0])
    want = getattr(common, op).definition(*copies[1])
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert all(torch.equal(*p) for p in zip(*copies, strict=True) if isinstance(p[0], Tensor))


def test_a_step_compiles_to_one_graph(ops):
    def step(images, indices, key, count, scale, shift, w, m, g, mask, lr):
        x = ops.augment(images, indices, key, count, scale, shift, 2, True)
        loss, error, _ = ops.example_losses(x.flatten(1)[:, :10].contiguous(), indices % 10)
        ops.masked_sgd_(w, m, g, mask, lr, 0.9, 1e-4)
        return loss + error + w.sum()

    with torch.no_grad():
        a, b = ([*augment_case(8, 8, 3).values(), *sgd_case(2, 33)] for _ in range(2))
        want = step(*a)
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(*b)
    torch.testing.assert_close(got, want)
    assert torch.equal(a[6], b[6]) and torch.equal(a[7], b[7]) and b[8].eq(0).all()


# ---- build ---------------------------------------------------------------------------------------

LOAD = "import csrc; o = csrc.load(); print(o and o.example_losses.default)"


def start(code: str, cache: Path, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**env, **environment}, stdout=pipe, stderr=pipe
    )


def output(process: subprocess.Popen) -> tuple[str, list[str]]:
    out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    said = [line for line in err.decode().splitlines() if line.startswith("csrc: ")]
    return out.decode().strip(), said


def test_two_processes_build_at_once_and_a_third_finds_it(tmp_path):
    code = f"import os; os.umask(0); {LOAD}"  # the library is still no one else's to write
    results = [output(p) for p in [start(code, tmp_path), start(code, tmp_path)]]
    assert {out for out, _ in results} == {"datadiet.example_losses.default"}
    said = [line for _, lines in results for line in lines]
    assert len(said) == 1 and "csrc: built for the CPU in" in said[0]  # one built, one waited
    assert len(list(tmp_path.glob("datadiet/*.so"))) == 1
    assert not [p for p in (tmp_path / "datadiet").iterdir() if p.is_dir()]
    assert output(start(LOAD, tmp_path, PATH="/nowhere", CXX="/nowhere/g++")) == (
        "datadiet.example_losses.default",
        [],
    )


def test_no_compiler_means_the_definitions_and_one_line(tmp_path):
    code = f"{LOAD}; csrc.load()"
    out, said = output(start(code, tmp_path, PATH="/nowhere", CXX="/nowhere/g++"))
    assert out == "None" and len(said) == 1
    assert "no C++ compiler" in said[0] and "PyTorch definitions" in said[0]


def test_a_compiler_that_fails_means_the_definitions_and_one_line(tmp_path):
    out, said = output(start(LOAD, tmp_path, CXX=shutil.which("false")))
    assert out == "None" and len(said) == 1 and "PyTorch definitions" in said[0]


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path):
    folder = tmp_path / "datadiet"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / f"datadiet-{csrc.fingerprint(())}.so").write_bytes(b"not a library")
    out, said = output(start(LOAD, tmp_path))
    assert (
        out == "datadiet.example_losses.default" and len(said) == 1 and "private folder" in said[0]
    )


def test_a_missing_nvcc_leaves_the_cpu_part(tmp_path):
    """As on a machine with a card of compute capability 9.0 but no toolkit."""
    code = f"import csrc; csrc.card_archs = lambda: (90,); {LOAD}"
    out, said = output(start(code, tmp_path, CUDA_HOME=str(tmp_path)))
    assert out == "datadiet.example_losses.default" and len(said) == 1
    assert f"no nvcc in CUDA_HOME={tmp_path}, CUDA tensors use the PyTorch defi" in said[0]
    assert "built for the CPU in" in said[0]


def test_spills_are_read_from_the_report():
    report = """ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z1gv' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers"""
    assert [row[1:] for row in kernels(report)] == [("sm_90", 255, 16), ("sm_90", 32, 0)]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_cuda_part_builds_without_a_card_and_spills_nothing():
    command = [sys.executable, "-m", "csrc", "--arch", "80", "90"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {line.split()[0] for line in done.stdout.splitlines() if "0 bytes spilled" in line}
    assert built == {"sm_80", "sm_90"}


# ---- on a card -----------------------------------------------------------------------------------


@pytest.fixture
def strict():
    """Sets back what a test sets: any wait of the host for the device is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_card(x):
    return x.cuda() if isinstance(x, Tensor) else x


@pytest.mark.gpu
@card
def test_the_card_has_its_own_kernels(ops):
    for name in csrc.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"datadiet::{name}", "CUDA")


@pytest.mark.gpu
@card
def test_card_and_cpu_take_the_same_step_to_the_bit(ops):
    grid = itertools.product(
        (*SIZES, 100_016, 100_032), (1, 5), (F32, BF16), (shifted, Tensor.clone)
    )
    for columns, rows, gradient, place in grid:
        case = sgd_case(rows, columns, gradient=gradient)
        case[2][:, : case[3].shape[1]][~case[3]] = torch.nan
        moved = [*(place(x.cuda()) for x in case[:4]), case[4].cuda()]
        low = torch.full((rows, columns), torch.nan, dtype=BF16)
        low_moved = place(low.cuda())
        ops.masked_sgd_(*case, 0.9, 1e-4, low)
        ops.masked_sgd_(*moved, 0.9, 1e-4, low_moved)
        for here, there in zip([*case[:3], low], [*moved[:3], low_moved], strict=True):
            assert torch.equal(here, there.cpu()), (columns, rows, gradient, place)


@pytest.mark.gpu
@card
@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (5, 9, 2)])
def test_card_and_cpu_draw_the_same_batch_to_the_bit(ops, shape):
    for dtype in (F32, BF16):
        case = augment_case(*shape)
        moved = {k: v.cuda() for k, v in case.items()}
        here = ops.augment(**case, pad=2, flip=True, dtype=dtype)
        assert torch.equal(here, ops.augment(**moved, pad=2, flip=True, dtype=dtype).cpu())
        moved["indices"][:2] = torch.tensor([-1, 50])
        bad = ops.augment(**moved, pad=2, flip=True, dtype=dtype).cpu()
        assert bad[:2].isnan().all() and torch.equal(bad[2:], here[2:])


@pytest.mark.gpu
@card
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("place", [shifted, Tensor.clone])
def test_losses_on_the_card_against_float64(ops, dtype, place):
    sizes = itertools.product((1, 31, 129), (2, 10, 33, 34, 65, 66, 100, 1000))
    for n, classes in [*sizes, (100_003, 10)]:
        logits = draw(n, classes, seed=classes, scale=8).to(dtype)
        labels, alphas = torch.arange(n) % classes, torch.tensor([0.5, 0.25])
        there, y = place(logits.cuda()), labels.cuda()
        largest = max(1.0, 2 * exact_losses(logits, labels)[0].max().item())
        poison = [torch.full((size,), torch.nan, device="cuda") for size in (n, n, n, 2 * n)]
        del poison  # the allocator hands it on to the results
        ours = ops.example_losses(there, y)
        plain = common.example_losses.definition(there, y)
        for a, b, c in zip(ours, plain, exact_losses(logits, labels), strict=True):
            close_as_torch(a.cpu(), b.cpu(), c, f"losses of {n} x {classes}", largest)
        case = [torch.stack([logits, logits * 0.5]), logits, logits * 2, labels, alphas]
        moved = [place(x.cuda()) for x in case]
        exact = common.loss_barrier.definition(*(x.double() for x in case[:3]), labels, alphas)
        plain = common.loss_barrier.definition(*moved)
        for a, b, c in zip(ops.loss_barrier(*moved), plain, exact, strict=True):
            close_as_torch(a.cpu(), b.cpu(), c, f"barriers of {n} x {classes}", largest)


@pytest.mark.gpu
@card
def test_a_label_out_of_range_gives_nan_on_the_card(ops):
    for classes in (10, 100):
        labels = torch.tensor([0, classes, -1, 2**40, 1]).cuda()
        for x in ops.example_losses(torch.zeros(5, classes).cuda(), labels):
            assert x.isnan().tolist() == [False, True, True, True, False]


@pytest.mark.gpu
@card
def test_a_captured_graph_follows_its_tensors(ops, strict):
    """Learning rate and step change after the capture; nothing waits for the device."""
    case = [on_card(x) for x in augment_case(8, 8, 3).values()]
    state = [on_card(x) for x in sgd_case(2, 97)]
    alone = [x.clone() for x in state]
    gradient = state[2].clone()
    torch.cuda.set_sync_debug_mode("error")
    ops.augment(*case, 2, True)
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = ops.augment(*case, 2, True)
        ops.masked_sgd_(*state, 0.9, 1e-4)
    torch.cuda.set_sync_debug_mode("error")
    for step in range(3):
        state[2].copy_(gradient)
        alone[2].copy_(gradient)
        case[3].add_(1)
        state[4].mul_(0.5)
        graph.replay()
        alone[4].mul_(0.5)
        ops.masked_sgd_(*alone, 0.9, 1e-4)
        want = ops.augment(*case, 2, True)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(batch, want), step
        assert all(map(torch.equal, state, alone)), step
        torch.cuda.set_sync_debug_mode("error")


@pytest.mark.gpu
@card
def test_mixed_devices_are_named(ops):
    with pytest.raises(RuntimeError, match=r"labels must.*device 0, got.*cpu"):
        ops.example_losses(torch.zeros(3, 4).cuda(), torch.zeros(3, dtype=torch.long))
