"""csrc/ against float64, NumPy and hand-worked rows; its errors and its build.

What is marked `anywhere` runs on the CPU, on a GPU with `-m gpu`, and once more through the CUDA
kernels compiled as C++, a thread for a thread, under the address sanitizer.
"""

import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from conftest import ROOT
from torch import Tensor

import csrc
import csrc.build
import engine
from csrc.__main__ import PACKS, Kernel

F32, BF16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++: nothing to test")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHIM = "CUDA_KERNELS_ON_CPU" in os.environ  # where a launch is slow: smaller sizes
MANY = 2049 if SHIM else 100_003


def anywhere(test: Callable) -> Callable:
    """Marks a test of the operations on DEVICE; conftest hides GPUs from all but `-m gpu`."""
    no_gpu = DEVICE == "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    return pytest.mark.gpu(pytest.mark.skipif(no_gpu, reason="no CUDA device")(test))


@pytest.fixture(scope="module")
def ops():
    return csrc.load(engine.DEFINITIONS)


@functools.cache
def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return normal(shape, seed) * scale


def moved(case: list[Tensor], shift: bool = False) -> list[Tensor]:
    """Copies on DEVICE, with `shift` one element away from where an allocation starts."""
    if not shift:
        return [x.to(DEVICE, copy=True) for x in case]
    memory = [torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE) for x in case]
    return [m[1:].view(x.shape).copy_(x) for m, x in zip(memory, case, strict=True)]


def same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(x.cpu().signbit(), y.signbit()) or not x.is_floating_point()


def close_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor, size: float | None = None) -> None:
    """Our largest error is at most twice torch's. Below a thousand numbers, where torch may have
    been lucky with all of them, it may also be 4 units in the last place of `size`, the largest
    number that was summed."""
    ours, torchs = ours.cpu().double(), torchs.double()
    error, allowed = (ours - exact).abs().max(), 2 * (torchs - exact).abs().max()
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


@anywhere
@pytest.mark.parametrize("columns", [1, 31, 96, 1025, 1056, MANY])
@pytest.mark.parametrize("mask", ["ones", "zeros", "random"])
def test_masked_sgd_is_its_definition_to_the_bit(ops, columns, mask):
    """Also where the gradient of a pruned weight is not finite; rows and packs of four included."""
    for rows, shift in itertools.product((1, 5), (False, True)):
        case = [*sgd_case(rows, columns, mask), torch.full((rows, columns), torch.nan, dtype=BF16)]
        gradient, alive = case[2], case[3]
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf, -3e38]).repeat(alive.numel() // 4 + 1)
        gradient[:, : alive.shape[1]][~alive] = bad[: (~alive).sum()]
        here = moved(case, shift)
        ops.masked_sgd_(*here[:5], 0.9, 1e-4, here[5])
        engine.masked_sgd_.definition(*case[:5], 0.9, 1e-4, case[5])
        same_bits(here, case)
        pruned = case[0][:, : alive.shape[1]][~alive]
        assert not pruned.any() and not pruned.signbit().any() and case[0].isfinite().all()


@anywhere
def test_the_bfloat16_copy_is_rounded_as_in_torch(ops):
    """Ties of every exponent and random bits; the step leaves the weights as they are."""
    bits = np.arange(2**16, dtype=np.uint32)[:: 7 if SHIM else 1] << 16
    random = np.random.default_rng(0).integers(0, 2**32, MANY, np.uint32)
    bits = np.concatenate([bits, bits | 0x8000, random])
    w = torch.from_numpy(bits.view(np.float32))[None].to(DEVICE)
    rounded, rest = torch.empty_like(w, dtype=BF16), [torch.zeros_like(w) for _ in range(2)]
    mask, lr = torch.empty(1, 0, dtype=torch.bool), torch.zeros(1)
    ops.masked_sgd_(w, *rest, *moved([mask, lr]), 0.0, 0.0, rounded)
    torch.testing.assert_close(rounded, w.to(BF16), rtol=0, atol=0, equal_nan=True)
    assert w.isfinite().any() and w.isnan().any()


def test_a_row_is_independent_of_others_threads_and_alignment(ops):
    together = sgd_case(5, 100_003)
    alone = [x.clone() for x in together]
    ops.masked_sgd_(*together, 0.9, 1e-4)
    logits, labels = draw(1025, 97, scale=4), torch.arange(1025) % 97
    all_rows = ops.example_losses(logits, labels)
    threads = torch.get_num_threads()
    try:
        for r, count in enumerate((1, 2, 3, 4, 1)):
            torch.set_num_threads(count)
            one = moved([x[r : r + 1] for x in alone[:4]], shift=True)
            ops.masked_sgd_(*one, alone[4], 0.9, 1e-4)
            assert torch.equal(one[0][0], together[0][r]) and torch.equal(one[1][0], together[1][r])
            again = ops.example_losses(*moved([logits, labels], shift=True))
            assert all(map(torch.equal, all_rows, again))
    finally:
        torch.set_num_threads(threads)
    for i in range(0, 1025, 31):
        few = ops.example_losses(logits[i : i + 3], labels[i : i + 3])
        assert all(torch.equal(x[i : i + 3], y) for x, y in zip(all_rows, few, strict=True))


# ---- losses and barriers -------------------------------------------------------------------------


@anywhere
@pytest.mark.parametrize("classes", [1, 2, 8, 10, 16, 17, 65, 100, 1000])
def test_example_losses_against_float64(ops, classes):
    sizes = [(1, 1.0), (31, 30.0), (97, 1e4)]
    if not SHIM:
        sizes += [(1025, scale) for scale in (0.1, 1.0, 5.0, 30.0, 1e4)]
        sizes += [(MANY, 1.0)] if classes in (2, 10) else []
    for i, (n, scale) in enumerate(sizes):
        logits = draw(n, classes, seed=classes, scale=scale).clamp(-1e4, 1e4)
        labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(n))
        ours = ops.example_losses(*moved([logits, labels], shift=i % 2 == 1))
        torchs = engine.example_losses.definition(logits, labels)
        for a, b, c in zip(ours, torchs, plain.losses(logits, labels), strict=True):
            assert a.dtype == F32 and a.shape == (n,)
            close_as_torch(a, b, torch.from_numpy(c))


@anywhere
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
    case = [torch.tensor([r[0] for r in rows]).float(), torch.tensor([r[1] for r in rows])]
    for i, x in enumerate(ops.example_losses(*moved(case))):
        want = torch.tensor([r[2 + i] for r in rows], dtype=F32)
        torch.testing.assert_close(x.cpu(), want, rtol=1e-6, atol=0, equal_nan=True)


@anywhere
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (31, 10), (129, 33), (1025, 100)])
def test_loss_barrier_against_float64(ops, n, classes):
    n = min(n, 130) if SHIM else n
    first, second, middle = (draw(n, classes, seed=s, scale=5) for s in (1, 2, 3))
    labels = torch.arange(n) % classes
    at_middle, *ends = (plain.losses(x, labels)[:2] for x in (middle, first, second))
    for alpha in (0.0, 0.1, 0.5, 1.0):
        ours = ops.loss_barrier(*moved([middle, first, second, labels], alpha == 0.1), alpha)
        torchs = engine.loss_barrier.definition(middle, first, second, labels, alpha)
        for a, b, m, x, y in zip(ours, torchs, at_middle, *ends, strict=True):
            exact = torch.from_numpy(m - ((1 - alpha) * x + alpha * y))
            close_as_torch(a, b, exact, max(1.0, m.max().item()))
        if alpha in (0, 1):  # no barrier at the ends themselves
            end = second if alpha else first
            barriers = ops.loss_barrier(*moved([end, first, second, labels]), alpha)
            assert all(x.eq(0).all() for x in barriers)


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


@anywhere
@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (5, 9, 2)])
@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_augment_cuts_flips_and_normalises(ops, shape, pad, dtype):
    """The same as NumPy's padding and slicing, to the bit."""
    case = augment_case(*shape, pad)
    here = dict(zip(case, moved([*case.values()]), strict=True))
    out = ops.augment(**here, dtype=dtype)
    height, width, channels = shape
    assert out.shape == (33, channels, height, width) and out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    images = np.pad(case["images"].numpy(), [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    for b, (up, left, mirrored) in enumerate(case["crops"].tolist()):
        crop = images[case["indices"][b], up + pad :, left + pad :][:height, :width]
        crop = crop[:, ::-1] if mirrored else crop
        want = crop.astype(np.float32) * case["scale"].numpy() + case["shift"].numpy()
        same_bits([out[b].permute(1, 2, 0)], [torch.from_numpy(want).to(dtype)])
    same_bits([out], [engine.augment.definition(**case, dtype=dtype)])


# ---- errors, torch.library -----------------------------------------------------------------------


def bad_calls() -> list[tuple]:
    w, m, g, mask, lr = sgd_case(2, 31)
    x, y = draw(5, 3), torch.zeros(5, dtype=torch.long)
    case = augment_case(8, 8, 3)
    chw = case["images"].permute(0, 3, 1, 2)
    sgd, losses, barrier = "masked_sgd_", "example_losses", "loss_barrier"
    return [
        (sgd, (w.T.contiguous().T, m, g, mask, lr, 0.9, 0.0), "weights must.*non-contiguous"),
        (sgd, (w, m[:1], g, mask, lr, 0.9, 0.0), r"momentum must.*\(2, 31\).*got \(1, 31\)"),
        (sgd, (w, m, g.bfloat16(), mask, lr, 0.9, 0.0), "gradient must.*Float.*BFloat16"),
        (sgd, (w, m, g, mask.byte(), lr, 0.9, 0.0), "mask must.*Bool.*got.*Byte"),
        (sgd, (w, m, g, torch.ones(2, 32).bool(), lr, 0.9, 0.0), "mask must be no wider"),
        (sgd, (w, m, g, mask, torch.ones(2), 0.9, 0.0), "lr must"),
        (sgd, (w, m, g, mask, lr, 0.9, 0.0, w.half()), "weights_bf16 must"),
        (losses, (x[:, :0], y), "logits must be of 1"),
        (losses, (x, y + 3), r"labels must lie in \[0, 3\), got 3 at position 0"),
        (losses, (x, y - 1), "labels must lie in"),
        (barrier, (x, x, x[:4], y), "second must"),
        *[
            ("augment", tuple((case | change).values()), message)
            for change, message in (
                ({"images": chw}, "images must.*non-contiguous"),
                ({"indices": case["indices"] + 50}, "indices must lie in"),
                ({"crops": case["crops"][:, :2].contiguous()}, r"crops must.*\(33, 3\)"),
                ({"scale": torch.ones(2)}, "scale must"),
                ({"dtype": torch.float16}, "dtype must be Float or BFloat16, got Half"),
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
    want = getattr(engine, op).definition(*copies[1])
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert all(torch.equal(*p) for p in zip(*copies, strict=True) if isinstance(p[0], Tensor))


def test_losses_refuse_a_gradient(ops):
    loss = ops.example_losses(draw(3, 4).requires_grad_(), torch.zeros(3, dtype=torch.long))[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.sum().backward()


# ---- build ---------------------------------------------------------------------------------------

LOAD = """
import os; os.umask(0)  # the library is still no one else's to write
import csrc, sys
ops = csrc.load({"example_losses": print, "not_compiled": len})
assert not any(x in sys.modules for x in ("engine", "torch.utils.cpp_extension"))
assert ops is csrc.load({}) and ops.not_compiled("ab") == 2
print(ops.example_losses.default)
"""
LOADED = ("datadiet.example_losses.default\n", 0)


@pytest.fixture
def compilers(ops, tmp_path) -> tuple[Path, Path]:
    """One that gives a copy of the library in place for whatever it compiles, one that hangs."""
    copies, hangs = tmp_path / "copies", tmp_path / "hangs"
    copy = f'cp {csrc.find(csrc.gpu_archs())} "$x"'
    copies.write_text(f"#!/bin/sh\nfor x; do case $y in -o) {copy};; esac; y=$x; done\n")
    hangs.write_text("#!/bin/sh\nsleep 100\n")
    for path in (copies, hangs):
        path.chmod(0o755)
    return copies, hangs


def start(cache: Path | str, compiler: Path | str, **more: str) -> subprocess.Popen:
    env = {"TORCH_EXTENSIONS_DIR": cache, "CUDA_VISIBLE_DEVICES": "", "CXX": compiler, **more}
    env = os.environ | {k: str(v) for k, v in env.items()}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", LOAD]
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipe)


def test_after_a_killed_build_two_at_once_build_one_library(compilers, tmp_path):
    copies, hangs = compilers
    killed = start(tmp_path, hangs)
    while not list(tmp_path.glob("datadiet/*/build.ninja")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    both = [start(tmp_path, copies), start(tmp_path, copies)]
    results = [(*p.communicate(), p.returncode) for p in both]
    assert {(out, code) for out, _, code in results} == {LOADED}
    waited, built = sorted(err for _, err, _ in results)
    assert not waited and len(built.splitlines()) == 1 and "csrc: built for the CPU in" in built
    (library,) = tmp_path.glob("datadiet/*.so")
    assert csrc.is_trusted(library)


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """The libraries that load_library() would load, out of a cache of the test's own."""
    paths = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.ops, "load_library", paths.append)
    monkeypatch.setattr(csrc, "gpu_archs", tuple)
    return paths


def test_a_portable_library_serves_where_nothing_can_be_built(
    compilers, loaded, tmp_path, monkeypatch, capfd
):
    """As on a node with a GPU of compute capability 9.0 but no toolkit and no compiler."""
    monkeypatch.setenv("CXX", str(compilers[0]))
    portable = csrc.build.build((), portable=True)
    assert "built for any CPU" in capfd.readouterr().err
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert csrc.load_library() and not capfd.readouterr().err
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(csrc, "gpu_archs", lambda: (90,))
    assert csrc.load_library() and loaded == [portable] * 2
    line = f"no nvcc in CUDA_HOME={tmp_path}; CUDA tensors use the PyTorch definitions"
    assert capfd.readouterr().err == f"csrc: {line}\n"


def test_a_library_for_more_gpus_serves_each_and_one_for_this_cpu_goes_first(
    loaded, tmp_path, monkeypatch
):
    monkeypatch.setattr(csrc, "cpu", lambda: "AVX2")
    (tmp_path / "datadiet").mkdir(0o700)
    native, portable = csrc.library_name((), False), csrc.library_name((), True)
    assert native.endswith("-AVX2") and portable.endswith("-any")
    for name in (f"{native}-80-90", f"{portable}-86", portable, native):
        (tmp_path / f"datadiet/{name}.so").touch(0o700)
    found = [csrc.find(archs) for archs in ((), (80,), (80, 90), (86,), (75,))]
    wanted = [native, f"{native}-80-90", f"{native}-80-90", f"{portable}-86", None]
    assert [path and path.stem for path in found] == wanted


@pytest.mark.parametrize(
    ("cxx", "message"),
    [
        ("/nowhere/g++ -pipe", "no C++ compiler: /nowhere/g++ is not found"),
        ("env no-such-c++", "no C++ compiler: no-such-c++ is not found"),
        ("-pipe", "no C++ compiler: -pipe is not found"),
        (shutil.which("false"), "the build failed"),
    ],
)
def test_no_working_compiler_means_the_definitions(loaded, monkeypatch, capfd, cxx, message):
    monkeypatch.setenv("CXX", cxx)
    assert not csrc.load_library() and not loaded
    err = capfd.readouterr().err
    assert message in err and "; all tensors use the PyTorch definitions" in err
    assert len(err.splitlines()) == 1


def test_a_compiler_with_arguments_and_a_cache_under_a_tilde(compilers, tmp_path):
    """`ccache g++ -pipe`, in that `env` stands for ccache."""
    process = start("~/cache", f"env {compilers[0]} -pipe", HOME=str(tmp_path))
    out, err = process.communicate()
    assert (out, process.returncode) == LOADED, err
    assert list(tmp_path.glob("cache/datadiet/*.so"))


def test_a_cache_may_be_a_link_to_a_folder_of_the_users_own(loaded, tmp_path, capfd):
    (tmp_path / "scratch").mkdir(0o700)
    (tmp_path / "datadiet").symlink_to("scratch")
    library = tmp_path / f"scratch/{csrc.library_name((), False)}.so"
    library.touch(0o700)
    assert csrc.load_library() and loaded == [library]
    (tmp_path / "scratch").chmod(0o777)  # others could have put it there
    assert not csrc.load_library()
    assert "set TORCH_EXTENSIONS_DIR" in capfd.readouterr().err


@pytest.mark.skipif(not shutil.which("clang++"), reason="no clang++")
def test_clang_compiles_without_warnings_what_passes_the_same_tests(tmp_path):
    """As on macOS, without g++'s attributes."""
    build_library(cached(tmp_path), "clang++", "-O3", "-Wall", "-Wextra", "-Werror")
    run_tests(tmp_path)


# ---- the CUDA kernels ----------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_cuda_kernels_spill_nothing_and_move_whole_packs():
    """Read from the machine code for two architectures; no GPU is needed."""
    command = [sys.executable, "-m", "csrc", "--arch", "80", "90"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checked = {line.split()[0] for line in done.stdout.splitlines() if "loads ahead of" in line}
    assert checked == {"sm_80", "sm_90"}


def test_what_is_wrong_with_a_kernel_is_named():
    name = "apply_kernel<true, float, BatchNorm>"
    _, loads, stores = PACKS[name]
    assert not Kernel("sm_90", name, 64, 0, loads, stores).faults()
    for bad in ((3, loads, stores), (0, loads - 1, stores), (0, loads, 0), (0, loads, stores, 16)):
        assert len(Kernel("sm_90", name, 64, *bad).faults()) == 1


def cached(folder: Path) -> Path:
    """Where load() looks for a library when `folder` is TORCH_EXTENSIONS_DIR."""
    (folder / "datadiet").mkdir(0o700)
    return folder / f"datadiet/{csrc.library_name((), False)}.so"


def build_library(to: Path, compiler: str, *flags: str, source: Path | None = None) -> None:
    """Compiles ops.cpp, or another source, without torch's machinery."""
    from torch.utils.cpp_extension import include_paths, library_paths

    folder = Path(csrc.__file__).parent
    flags += ("-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", f"-I{folder}")
    flags += (*(f"-isystem{p}" for p in include_paths()), *(f"-L{p}" for p in library_paths()))
    command = [compiler, *flags, source or folder / "ops.cpp", "-ltorch_cpu", "-o", to]
    subprocess.run(command, check=True)


def run_tests(cache: Path, *flags: str, **variables: str) -> None:
    """Runs the tests marked `anywhere` with the library in a cache, in a process of their own."""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    files = [Path(__file__).with_name(f"test_{x}.py") for x in ("csrc", "batch_norm")]
    options = ["-m", "pytest", "-q", "-x", "-s", "-m", "gpu", "-p", "no:cacheprovider", *flags]
    command, out = [sys.executable, *options, *files], {"capture_output": True, "text": True}
    done = subprocess.run(command, env=environment | variables, **out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "AddressSanitizer" not in done.stderr


def test_the_kernels_run_on_the_cpu_under_the_address_sanitizer(tmp_path):
    """The operations for CPU tensors by the loops of ops.cu, which cuda_shim.h runs."""
    library, folder = cached(tmp_path), Path(csrc.__file__).parent
    files = ("ops.cpp", "ops.cu", "batch_norm.cuh")
    text = "".join(folder.joinpath(name).read_text() for name in files)
    launch = r"([\w(][^;{}\n]*?)<<<(.*?), (\w*THREADS), 0, .*?>>>\(([^;]*)\);"
    text, launches = re.subn(launch, r"shim::launch(\2, \3, [&] { (\1)(\4); });", text)
    assert launches == 5
    text = re.sub(r'#include (<cuda_runtime.h>|"batch_norm.cuh")|#pragma unroll.*', "", text)
    for old, new in (
        ("return false;\n#endif", "return true;\n#endif"),  # of on_gpu()
        ("if (!on_gpu(like)) return run(a);", "launch(a, nullptr);"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    source = tmp_path / "shim.cpp"
    source.write_text('#include "cuda_shim.h"\n' + text)
    shim = f"-I{Path(__file__).parent}"
    build_library(library, "g++", "-fsanitize=address", "-Wno-psabi", shim, source=source)
    find = ["g++", "-print-file-name=libasan.so"]
    sanitizer = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    options = "detect_leaks=0:detect_stack_use_after_return=0"  # kernels are fibers
    run_tests(tmp_path, LD_PRELOAD=sanitizer, ASAN_OPTIONS=options, CUDA_KERNELS_ON_CPU="1")


@anywhere
def test_an_index_out_of_range_gives_nan_on_a_gpu(ops):
    if DEVICE == "cpu" and not SHIM:
        pytest.skip("on the CPU it is an error: bad_calls()")
    for classes in (10, 100):
        x, labels = moved([torch.zeros(5, classes), torch.tensor([0, classes, -1, 2**40, 1])])
        for result in (*ops.example_losses(x, labels), *ops.loss_barrier(x, x, x, labels)):
            assert result.isnan().tolist() == [False, True, True, True, False]
    case = moved([*augment_case(5, 9, 2).values()])
    good = ops.augment(*case)
    case[1][:2] = torch.tensor([-1, 50])
    bad = ops.augment(*case)
    assert bad[:2].isnan().all() and torch.equal(bad[2:], good[2:])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_a_captured_graph_follows_its_tensors(ops):
    """Learning rate and crops change after the capture; nothing waits for the device."""
    with pytest.raises(RuntimeError, match=r"labels must.*device 0, got.*cpu"):
        ops.example_losses(torch.zeros(3, 4).cuda(), torch.zeros(3, dtype=torch.long))
    case, state = moved([*augment_case(8, 8, 3).values()]), moved(sgd_case(2, 97))
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
