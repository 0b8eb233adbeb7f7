"""csrc/ against float64, NumPy and hand-worked rows; its errors and its build."""

import functools
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import common
import csrc
from csrc.__main__ import kernels

ROOT = Path(__file__).resolve().parent.parent
F32, BF16 = torch.float32, torch.bfloat16
OPS = ("masked_sgd_", "example_losses", "loss_barrier", "augment")
SIZES = (1, 31, 97, 1025, 100_003)
SHAPES = [(8, 8, 1), (32, 32, 3), (5, 9, 2)]
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++: nothing to test")
card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def ops():
    return csrc.load(common.DEFINITIONS)


@functools.cache
def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return normal(shape, seed) * scale


def shifted(x: Tensor) -> Tensor:
    """The same values, contiguous, one element away from where an allocation starts."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return room[1:].view(x.shape).copy_(x)


def close_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor, size: float | None = None) -> None:
    """Our largest error is at most twice torch's. Below a thousand numbers, where torch may have
    been lucky with all of them, it may also be 4 units in the last place of `size`, the largest
    number that was summed."""
    error, allowed = (ours.double() - exact).abs().max(), 2 * (torchs.double() - exact).abs().max()
    if exact.numel() < 1000:
        size = exact.abs().max().item() if size is None else size
        allowed = max(allowed, 4 * torch.finfo(F32).eps * size)
    assert error <= allowed


# ---- masked SGD ----------------------------------------------------------------------------------


def sgd_case(rows: int, columns: int, mask: str = "random") -> list[Tensor]:
    prunable = columns - columns // 3
    masks = {"ones": torch.ones, "zeros": torch.zeros}
    alive = masks.get(mask, lambda *s: draw(*s, seed=4) > 0)(rows, prunable).bool()
    w, m, g = draw(rows, columns, seed=1), draw(rows, columns, seed=2), draw(rows, columns, seed=3)
    w[:, :prunable] *= alive
    return [w, m, g, alive, torch.full((1,), 0.1)]


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("mask", ["ones", "zeros", "random"])
def test_masked_sgd_against_float64(ops, rows, columns, mask):
    case = sgd_case(rows, columns, mask)
    plain = [x.clone() for x in case]
    exact = [x if x.dtype == torch.bool else x.double() for x in case]
    low = torch.full((rows, columns), torch.nan, dtype=BF16)
    common.masked_sgd_.definition(*plain, 0.9, 1e-4)
    common.masked_sgd_.definition(*exact, 0.9, 1e-4)
    ops.masked_sgd_(*case, 0.9, 1e-4, low=low)
    for i in (0, 1):
        close_as_torch(case[i], plain[i], exact[i])
    alive = torch.ones(rows, columns, dtype=torch.bool)
    alive[:, : case[3].shape[1]] = case[3]
    for x in case[:2]:
        assert x[~alive].eq(0).all() and not x[~alive].signbit().any()
    assert case[2].eq(0).all() and torch.equal(low, case[0].to(BF16))


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


def test_the_bfloat16_copy_is_rounded_as_in_torch(ops):
    """Ties of every exponent and random bits; the step leaves the weights as they are."""
    bits = np.arange(2**16, dtype=np.uint32) << 16
    random = np.random.default_rng(0).integers(0, 2**32, 2**18, np.uint32)
    bits = np.concatenate([bits, bits | 0x8000, random])
    w = torch.from_numpy(bits.view(np.float32))[None]
    low, rest = torch.empty_like(w, dtype=BF16), [torch.zeros_like(w) for _ in range(2)]
    ops.masked_sgd_(w, *rest, torch.empty(1, 0).bool(), torch.zeros(1), 0.0, 0.0, low)
    torch.testing.assert_close(low, w.to(BF16), rtol=0, atol=0, equal_nan=True)
    assert w.isfinite().any() and w.isnan().any()


def test_a_row_does_not_feel_its_neighbours_threads_or_alignment(ops):
    together = sgd_case(5, 100_003)
    alone = [x.clone() for x in together]
    ops.masked_sgd_(*together, 0.9, 1e-4)
    logits, labels = draw(1025, 97, scale=4), torch.arange(1025) % 97
    all_rows = ops.example_losses(logits, labels)
    threads = torch.get_num_threads()
    try:
        for r, count in enumerate((1, 2, 3, 4, 1)):
            torch.set_num_threads(count)
            one = [shifted(x[r : r + 1]) for x in alone[:4]]
            ops.masked_sgd_(*one, alone[4], 0.9, 1e-4)
            assert torch.equal(one[0][0], together[0][r]) and torch.equal(one[1][0], together[1][r])
            assert all(map(torch.equal, all_rows, ops.example_losses(shifted(logits), labels)))
    finally:
        torch.set_num_threads(threads)
    for i in range(0, 1025, 31):
        few = ops.example_losses(logits[i : i + 3], labels[i : i + 3])
        assert all(torch.equal(x[i : i + 3], y) for x, y in zip(all_rows, few, strict=True))


# ---- losses and barriers -------------------------------------------------------------------------


def exact_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, error and EL2N norm by their formulas, in float64 with NumPy."""
    x, y = logits.double().numpy(), labels.numpy()
    e = np.exp(x - x.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    loss = np.log(e.sum(1)) - (x[np.arange(len(y)), y] - x.max(1))
    norm = np.linalg.norm(p - np.eye(x.shape[1])[y], axis=1)
    return tuple(map(torch.from_numpy, (loss, (x.argmax(1) != y).astype(float), norm)))


@pytest.mark.parametrize(
    ("n", "classes", "scale"),
    [
        *itertools.product((1, 31, 97), (2, 10, 100, 1000), (1.0, 30.0, 1e4)),
        *itertools.product((1025,), (2, 10, 65, 100, 1000), (0.1, 1.0, 5.0, 30.0, 1e4)),
        *[(100_003, classes, 1.0) for classes in (2, 10)],
    ],
)
def test_example_losses_against_float64(ops, n, classes, scale):
    logits = draw(n, classes, seed=classes, scale=scale).clamp(-1e4, 1e4)
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(n))
    ours = ops.example_losses(logits, labels)
    plain = common.example_losses.definition(logits, labels)
    for a, b, c in zip(ours, plain, exact_losses(logits, labels), strict=True):
        assert a.dtype == F32 and a.shape == (n,)
        close_as_torch(a, b, c)


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
    logits, labels = torch.tensor([r[0] for r in rows]).float(), torch.tensor([r[1] for r in rows])
    for i, x in enumerate(ops.example_losses(logits, labels)):
        want = torch.tensor([r[2 + i] for r in rows], dtype=F32)
        torch.testing.assert_close(x, want, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (31, 10), (1025, 100)])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_loss_barrier_against_float64(ops, n, classes, alpha):
    first, second, middle = (draw(n, classes, seed=s, scale=5) for s in (1, 2, 3))
    labels = torch.arange(n) % classes
    ours = ops.loss_barrier(middle, first, second, labels, alpha)
    plain = common.loss_barrier.definition(middle, first, second, labels, alpha)
    at_middle, *ends = (exact_losses(x, labels)[:2] for x in (middle, first, second))
    for a, b, m, x, y in zip(ours, plain, at_middle, *ends, strict=True):
        close_as_torch(a, b, m - ((1 - alpha) * x + alpha * y), max(1.0, m.max().item()))
    if alpha in (0, 1):  # no barrier at the ends themselves
        end = second if alpha else first
        assert all(x.eq(0).all() for x in ops.loss_barrier(end, first, second, labels, alpha))


# ---- augmentation --------------------------------------------------------------------------------


def augment_case(height: int, width: int, channels: int, pad: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(height)
    corner = torch.randint(-pad, pad + 1, (33, 2), generator=g)
    return {
        "images": torch.randint(0, 256, (50, height, width, channels), generator=g).byte(),
        "indices": torch.randint(0, 50, (33,), generator=g),
        "crops": torch.cat([corner, torch.randint(0, 2, (33, 1), generator=g)], 1),
        "scale": torch.rand(channels, generator=g) / 50,
        "shift": torch.randn(channels, generator=g),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_augment_cuts_flips_and_normalises(ops, shape, pad, dtype):
    """The same as NumPy's padding and slicing, to the bit."""
    case = augment_case(*shape, pad)
    out = ops.augment(**case, dtype=dtype)
    height, width, channels = shape
    assert out.shape == (33, channels, height, width) and out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    images = np.pad(case["images"].numpy(), [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    for b, (up, left, mirrored) in enumerate(case["crops"].tolist()):
        crop = images[case["indices"][b], up + pad :, left + pad :][:height, :width]
        crop = crop[:, ::-1] if mirrored else crop
        want = crop.astype(np.float32) * case["scale"].numpy() + case["shift"].numpy()
        assert torch.equal(out[b].permute(1, 2, 0), torch.from_numpy(want).to(dtype))
    assert torch.equal(out, common.augment.definition(**case, dtype=dtype))


# ---- errors, torch.library -----------------------------------------------------------------------


def bad_calls() -> list[tuple]:
    w, m, g, mask, lr = sgd_case(2, 31)
    x, y = draw(5, 3), torch.zeros(5, dtype=torch.long)
    case = augment_case(8, 8, 3)
    chw = case["images"].permute(0, 3, 1, 2)
    sgd, losses, barrier = OPS[:3]
    return [
        (sgd, (w.double(), m, g, mask, lr, 0.9, 0.0), "weights must"),
        (sgd, (w.T.contiguous().T, m, g, mask, lr, 0.9, 0.0), "weights must.*non-contiguous"),
        (sgd, (w, m[:1], g, mask, lr, 0.9, 0.0), r"momentum must.*\(2, 31\).*got \(1, 31\)"),
        (sgd, (w, m, g.bfloat16(), mask, lr, 0.9, 0.0), "gradient must.*float32.*bfloat16"),
        (sgd, (w, m, g, mask.byte(), lr, 0.9, 0.0), "mask must.*bool.*got.*uint8"),
        (sgd, (w, m, g, torch.ones(2, 32).bool(), lr, 0.9, 0.0), "mask must be no wider"),
        (sgd, (w, m, g, mask, torch.ones(2), 0.9, 0.0), "lr must"),
        (sgd, (w, m, g, mask, lr, 0.9, 0.0, w.half()), "low must"),
        (losses, (x.double(), y), "logits must"),
        (losses, (x[:, :0], y), "logits must be of 1"),
        (losses, (x, y[:4]), "labels must"),
        (losses, (x, y + 3), r"labels must lie in \[0, 3\), got 3 at position 0"),
        (losses, (x, y - 1), "labels must lie in"),
        (barrier, (x, x, x[:4], y), "second must"),
        (barrier, (x, x[:, :2], x, y), "first must"),
        *[
            ("augment", tuple((case | change).values()), message)
            for change, message in (
                ({"images": chw}, "images must.*non-contiguous"),
                ({"indices": case["indices"] + 50}, "indices must lie in"),
                ({"indices": case["indices"] - 50}, "indices must lie in"),
                ({"crops": case["crops"][:, :2].contiguous()}, r"crops must.*\(33, 3\)"),
                ({"scale": torch.ones(2)}, "scale must"),
                ({"dtype": torch.float16}, "dtype must be float32 or bfloat16, got float16"),
            )
        ],
    ]


@pytest.mark.parametrize(("op", "arguments", "message"), bad_calls())
def test_a_wrong_argument_is_named(ops, op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(*arguments)


def test_empty_inputs(ops):
    x, y = torch.empty(0, 3), torch.empty(0, dtype=torch.long)
    assert [r.shape for r in ops.example_losses(x, y)] == [(0,)] * 3
    assert [r.shape for r in ops.loss_barrier(x, x, x, y)] == [(0,)] * 2
    none = {"indices": y, "crops": torch.empty(0, 3, dtype=torch.long)}
    assert ops.augment(**augment_case(8, 8, 3) | none).shape == (0, 3, 8, 8)
    ops.masked_sgd_(x, x.clone(), x.clone(), x.bool(), torch.ones(1), 0.9, 0.0)


def samples() -> list[tuple]:
    x, y = draw(7, 5), torch.arange(7) % 5
    case = tuple(augment_case(8, 8, 3).values())
    return [
        ("masked_sgd_", (*sgd_case(2, 33), 0.9, 1e-4)),
        ("masked_sgd_", (*sgd_case(2, 33), 0.9, 1e-4, torch.zeros(2, 33, dtype=BF16))),
        ("example_losses", (x, y)),
        ("loss_barrier", (draw(7, 5, seed=1), x, x + 1, y, 0.25)),
        ("augment", case),
        ("augment", (*case, BF16)),
    ]


@pytest.mark.parametrize(("op", "arguments"), samples())
def test_opcheck_and_the_definition_on_a_device_without_a_kernel(ops, op, arguments):
    torch.library.opcheck(getattr(ops, op).default, arguments)
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    copies = [[a.clone() if isinstance(a, Tensor) else a for a in arguments] for _ in range(2)]
    got = getattr(ops, op).default._op_dk(key, *copies[0])
    want = getattr(common, op).definition(*copies[1])
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert all(torch.equal(*p) for p in zip(*copies, strict=True) if isinstance(p[0], Tensor))


def test_a_step_compiles_to_one_graph_and_its_losses_refuse_a_gradient(ops):
    def step(images, indices, crops, scale, shift, w, m, g, mask, lr):
        x = ops.augment(images, indices, crops, scale, shift)
        loss, error, _ = ops.example_losses(x.flatten(1)[:, :10].contiguous(), indices % 10)
        ops.masked_sgd_(w, m, g, mask, lr, 0.9, 1e-4)
        return loss + error + w.sum()

    with torch.no_grad():
        a, b = ([*augment_case(8, 8, 3).values(), *sgd_case(2, 33)] for _ in range(2))
        want = step(*a)
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(*b)
    torch.testing.assert_close(got, want)
    assert torch.equal(a[5], b[5]) and torch.equal(a[6], b[6]) and b[7].eq(0).all()
    loss = ops.example_losses(draw(3, 4).requires_grad_(), torch.zeros(3, dtype=torch.long))[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.sum().backward()


# ---- build ---------------------------------------------------------------------------------------

LOAD = """
import csrc, sys
ops = csrc.load({"example_losses": print, "not_compiled": len})
assert not any(x in sys.modules for x in ("common", "torch.utils.cpp_extension"))
assert ops is None or ops is csrc.load({}) and ops.not_compiled("ab") == 2
print(ops and ops.example_losses.default)
"""
BUILT = "datadiet.example_losses.default"
NOWHERE = {"PATH": "/nowhere", "CXX": "/nowhere/g++"}


def start(code: str, cache: Path, **environment: str) -> subprocess.Popen:
    """Python on `code`, with a cache of its own and no card."""
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env | environment, **pipe)


def output(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate()
    assert process.returncode == 0 and len(err.splitlines()) <= 1, err
    return out.strip(), err


def test_a_killed_build_then_two_at_once_then_one_that_finds_it(tmp_path):
    killed = start(LOAD, tmp_path)
    while not list(tmp_path.glob("datadiet/*/build.ninja")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    code = f"import os; os.umask(0)\n{LOAD}"  # the library is still no one else's to write
    results = [output(p) for p in [start(code, tmp_path), start(code, tmp_path)]]
    assert {out for out, _ in results} == {BUILT}
    waited, built = sorted(err for _, err in results)
    assert not waited and "csrc: built for the CPU in" in built
    assert len(list(tmp_path.glob("datadiet/*.so"))) == 1
    assert output(start(LOAD, tmp_path, **NOWHERE)) == (BUILT, "")


def test_a_portable_library_serves_where_nothing_can_be_built(tmp_path):
    """As on a node with a card of compute capability 9.0 but no toolkit and no compiler."""
    code = "import sys; from csrc.__main__ import main; sys.exit(main((), True))"
    assert "built for any CPU" in output(start(code, tmp_path))[0]
    code = f"import csrc; csrc.card_archs = lambda: (90,)\n{LOAD}"
    out, err = output(start(code, tmp_path, CUDA_HOME=str(tmp_path)))
    assert out == BUILT
    assert f"no nvcc in CUDA_HOME={tmp_path}, CUDA tensors use the PyTorch defi" in err
    assert output(start(LOAD, tmp_path, **NOWHERE)) == (BUILT, "")


@pytest.mark.parametrize(
    ("environment", "message"),
    [(NOWHERE, "no C++ compiler"), ({"CXX": shutil.which("false")}, "the build failed")],
)
def test_no_working_compiler_means_the_definitions_and_one_line(tmp_path, environment, message):
    out, err = output(start(LOAD, tmp_path, **environment))
    assert out == "None" and message in err and "all tensors use the PyTorch definitions" in err


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path):
    (tmp_path / "datadiet").mkdir()
    (tmp_path / "datadiet").chmod(0o777)
    (tmp_path / f"datadiet/datadiet-{csrc.fingerprint(False)}.so").write_bytes(b"not a library")
    out, err = output(start(LOAD, tmp_path))
    assert out == "None" and "set TORCH_EXTENSIONS_DIR" in err


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


@pytest.mark.gpu
@card
def test_card_and_cpu_take_the_same_step_to_the_bit(ops):
    assert all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"datadiet::{x}", "CUDA") for x in OPS
    )
    grid = itertools.product((*SIZES, 100_016, 100_032), (1, 5), (shifted, Tensor.clone))
    for columns, rows, place in grid:
        case = [*sgd_case(rows, columns), torch.zeros(rows, columns, dtype=BF16)]
        case[2][:, : case[3].shape[1]][~case[3]] = torch.nan
        moved = [place(x.cuda()) for x in case]
        ops.masked_sgd_(*case[:5], 0.9, 1e-4, case[5])
        ops.masked_sgd_(*moved[:5], 0.9, 1e-4, moved[5])
        for here, there in zip(case, moved, strict=True):
            assert torch.equal(here, there.cpu()), (columns, rows, place)


@pytest.mark.gpu
@card
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_card_and_cpu_cut_the_same_batch_to_the_bit(ops, shape, dtype):
    case = augment_case(*shape)
    moved = {k: v.cuda() for k, v in case.items()}
    here = ops.augment(**case, dtype=dtype)
    assert torch.equal(here, ops.augment(**moved, dtype=dtype).cpu())
    moved["indices"][:2] = torch.tensor([-1, 50])
    bad = ops.augment(**moved, dtype=dtype).cpu()
    assert bad[:2].isnan().all() and torch.equal(bad[2:], here[2:])


@pytest.mark.gpu
@card
@pytest.mark.parametrize("place", [shifted, Tensor.clone])
def test_losses_on_the_card_against_float64(ops, place):
    sizes = itertools.product((1, 31, 129), (1, 2, 8, 10, 16, 17, 33, 100, 1000))
    for n, classes in [*sizes, (100_003, 10)]:
        logits, labels = draw(n, classes, seed=classes, scale=8), torch.arange(n) % classes
        case = [place((logits * s).cuda()) for s in (1, 0.5, 2)]
        y, largest = labels.cuda(), max(1.0, 2 * exact_losses(logits, labels)[0].max().item())
        poison = [torch.full((n,), torch.nan, device="cuda") for _ in range(5)]
        del poison  # the allocator hands it on to the results
        ours = *ops.example_losses(case[0], y), *ops.loss_barrier(*case, y)
        plain, exact = (
            (
                *common.example_losses.definition(x[0], y),
                *common.loss_barrier.definition(*x, y),
            )
            for x in (case, [x.double() for x in case])
        )
        for a, b, c in zip(ours, plain, exact, strict=True):
            close_as_torch(a, b, c, largest)


@pytest.mark.gpu
@card
def test_a_label_out_of_range_gives_nan_and_mixed_devices_are_named(ops):
    for classes in (10, 100):
        labels = torch.tensor([0, classes, -1, 2**40, 1]).cuda()
        for x in ops.example_losses(torch.zeros(5, classes).cuda(), labels):
            assert x.isnan().tolist() == [False, True, True, True, False]
    with pytest.raises(RuntimeError, match=r"labels must.*device 0, got.*cpu"):
        ops.example_losses(torch.zeros(3, 4).cuda(), torch.zeros(3, dtype=torch.long))


@pytest.mark.gpu
@card
def test_a_captured_graph_follows_its_tensors(ops):
    """Learning rate and crops change after the capture; nothing waits for the device."""
    case = [x.cuda() for x in augment_case(8, 8, 3).values()]
    state = [x.cuda() for x in sgd_case(2, 97)]
    alone = [x.clone() for x in state]
    gradient = state[2].clone()
    ops.augment(*case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = ops.augment(*case)
        ops.masked_sgd_(*state, 0.9, 1e-4)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for x in (state, alone):
                x[2].copy_(gradient)
                x[4].mul_(0.5)
            case[2].sub_(1)
            graph.replay()
            ops.masked_sgd_(*alone, 0.9, 1e-4)
            want = ops.augment(*case)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(batch, want) and all(map(torch.equal, state, alone))
