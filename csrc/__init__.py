"""The four operations of `common.py`, compiled: `load()` gives `torch.ops.datadiet`, or None.

The first use builds ops.cpp (schemas, CPU) and, where there is a card and an nvcc, ops.cu for it;
later uses find the library in TORCH_EXTENSIONS_DIR or ~/.cache/datadiet. Tensors on a device
without a compiled form take the PyTorch definitions through the same operations.
"""

import atexit
import contextlib
import fcntl
import hashlib
import importlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
SOURCES = ("math.h", "ops.cpp", "ops.cu")
OPS = ("masked_sgd_", "example_losses", "loss_barrier", "augment")
# no contraction and no fast-math: one arithmetic on every processor, see math.h
CXX_FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC", "-Xptxas=-v"]


class BuildError(Exception):
    """Why there is no library, in one line."""


# ---- load ----------------------------------------------------------------------------------------


_loaded: list[Any] = []  # what load() found; a list, since torch.compile traces through load()


def load() -> Any:
    """`torch.ops.datadiet`, built if need be, or None where there is no C++ compiler.

    The first call says on stderr, in one line, what was built and what is missing; it says nothing
    where all is in place. It is not for inside `torch.compile`, the later ones are.
    """
    if not _loaded:
        _loaded.append(torch.ops.datadiet if load_library() else None)
    return _loaded[0]


def load_library() -> bool:
    """Registers the operations, with the CUDA part, else without; False if neither can be built."""
    notes, done = [], False
    archs = card_archs()
    for wanted in dict.fromkeys([archs, ()]):
        try:
            library, note = build(wanted)
            torch.ops.load_library(library)
        except (BuildError, OSError) as error:
            users = "CUDA tensors" if wanted else "all tensors"
            notes.append(f"{str(error).splitlines()[0]}, {users} use the PyTorch definitions")
            continue
        notes += [note] if note else []
        register()
        done = True
        break
    if notes:
        print(f"csrc: {'; '.join(notes)}", file=sys.stderr, flush=True)
    return done


def card_archs() -> tuple[int, ...]:
    """Compute capabilities of the visible cards, (80,) for an A100; none without a card."""
    if not (torch.version.cuda and torch.cuda.is_available()):
        return ()
    cards = range(torch.cuda.device_count())
    return tuple(sorted({a * 10 + b for a, b in map(torch.cuda.get_device_capability, cards)}))


def register() -> None:
    """Shapes for `torch.compile`, and the definitions for devices that have no kernel here.

    The results carry no gradient, rather than a silently wrong one; the definitions do.
    """

    @torch.library.register_fake("datadiet::masked_sgd_")
    def _(weights, momentum, gradient, mask, lr, mu, weight_decay, low=None) -> None:
        return None

    @torch.library.register_fake("datadiet::example_losses")
    def _(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = logits.new_empty(logits.shape[0], dtype=result_type(logits))
        return loss, torch.empty_like(loss), torch.empty_like(loss)

    @torch.library.register_fake("datadiet::loss_barrier")
    def _(middle, first, second, labels, alphas) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss = first.new_empty((alphas.shape[0], first.shape[0]), dtype=result_type(first))
        top = first.new_empty(first.shape[0], dtype=result_type(first))
        return loss, torch.empty_like(loss), top, torch.empty_like(top)

    @torch.library.register_fake("datadiet::augment")
    def _(images, indices, key, step, scale, shift, pad, flip, dtype=torch.float32) -> Tensor:
        _, height, width, channels = images.shape
        shape = (indices.shape[0], channels, height, width)
        device = images.device
        return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)

    def definition(name: str):
        return lambda *args, **kw: getattr(importlib.import_module("common"), name).definition(
            *args, **kw
        )

    global _library  # the registrations live as long as this object
    _library = torch.library.Library("datadiet", "IMPL")
    for name in OPS:
        _library.impl(name, definition(name), "CompositeExplicitAutograd")
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def result_type(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# ---- build ---------------------------------------------------------------------------------------


def build(archs: tuple[int, ...]) -> tuple[Path, str]:
    """The library for this CPU and the given compute capabilities, and a note if it was built now.

    Beside it lies ptxas' report (.log). Two processes may build at once: each into a folder of its
    own, then one atomic rename; the lock only spares the second the work.
    """
    folder, private = cache_folder()
    library = folder / f"datadiet-{fingerprint(archs)}.so"
    if trusted(library):
        return library, ""
    start = time.perf_counter()
    with open(folder / "lock", "w") as lock:
        with contextlib.suppress(OSError):  # some network disks have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if trusted(library):
            return library, ""
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compile_into(Path(scratch), archs)
            Path(scratch, "ops.so").chmod(0o755)  # whatever the umask: see trusted()
            os.replace(Path(scratch, "ops.log"), library.with_suffix(".log"))
            os.replace(Path(scratch, "ops.so"), library)
    seconds = time.perf_counter() - start
    devices = ", ".join(["the CPU", *(f"sm_{a}" for a in archs)])
    return library, f"built for {devices} in {seconds:.0f} s, kept in {private or folder}"


def compile_into(scratch: Path, archs: tuple[int, ...]) -> None:
    """Writes ops.so and ops.log; raises BuildError with the compiler's first complaint."""
    cxx = os.environ.get("CXX") or "g++"
    cxx = shutil.which(cxx) or shutil.which("c++") or shutil.which("clang++")
    if not cxx:
        raise BuildError("no C++ compiler (install g++ or set CXX)")
    lib = Path(torch.__file__).parent / "lib"
    include = ["-isystem", str(Path(torch.__file__).parent / "include")]
    jobs = [[cxx, *CXX_FLAGS, *include, "-c", str(HERE / "ops.cpp"), "-o", "cpu.o"]]
    link = [cxx, "-shared", "cpu.o", "-o", "ops.so", f"-L{lib}", "-ltorch_cpu", "-lc10"]
    if archs:
        home = cuda_home()
        jobs[0].insert(1, "-DDATADIET_CUDA")
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        nvcc = [str(home / "bin/nvcc"), *NVCC_FLAGS, *targets, "-ccbin", cxx]
        jobs.append([*nvcc, "-c", str(HERE / "ops.cu"), "-o", "cuda.o"])
        link += ["cuda.o", *(["-ltorch_cuda"] if torch.version.cuda else [])]
        link += [f"-L{p}" for p in (home / "lib64", home / "lib") if p.is_dir()] + ["-lcudart"]
    pipes = {"cwd": scratch, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    reports = []
    running = [subprocess.Popen(job, **pipes) for job in jobs]
    for job, process in zip(jobs, running, strict=True):
        report = process.communicate()[0]
        if process.returncode and "-march=native" in job:  # not every compiler knows it
            plain = [flag for flag in job if flag != "-march=native"]
            process = subprocess.run(plain, **pipes)
            report = process.stdout
        if process.returncode:
            raise BuildError(complaint(job, report))
        reports.append(report)
    done = subprocess.run(link, **pipes)
    if done.returncode:
        raise BuildError(complaint(link, done.stdout))
    Path(scratch, "ops.log").write_text(reports[-1] if archs else "")


def complaint(job: list[str], report: str) -> str:
    lines = [line for line in report.splitlines() if "error" in line.lower()] or [report.strip()]
    return f"{Path(job[0]).name} failed: {lines[0]}"


def cuda_home() -> Path:
    """The CUDA toolkit, of the major version that torch was built with."""
    nvcc = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = [Path(nvcc).resolve().parent.parent] if nvcc else []
    for home in [Path(named)] if named else [*found, Path("/usr/local/cuda")]:
        if (home / "bin/nvcc").exists() and list(home.glob("lib*/libcudart.so*")):
            break
    else:
        raise BuildError(f"no nvcc in CUDA_HOME={named}" if named else "no nvcc (set CUDA_HOME)")
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", text)
    if torch.version.cuda and version and version[1] != torch.version.cuda.split(".")[0]:
        raise BuildError(f"nvcc in {home} is CUDA {version[1]}, torch's is {torch.version.cuda}")
    return home


# ---- cache ---------------------------------------------------------------------------------------


def cache_folder() -> tuple[Path, str]:
    """A folder that only this user can write to, and a word about it if it is for once only."""
    root = os.path.expanduser(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache")
    folder = Path(root) / "datadiet"
    with contextlib.suppress(OSError):
        if not root.startswith("~"):  # a user without a home
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if trusted(folder) and os.access(folder, os.W_OK):
        return folder, ""
    scratch = tempfile.mkdtemp(prefix="datadiet-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return Path(scratch), f"a private folder for this run ({folder} is not this user's alone)"


def trusted(path: Path) -> bool:
    """Whether `path` is there, belongs to this user and cannot be written to by others."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return (
        status.st_uid == os.geteuid()
        and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        and not stat.S_ISLNK(status.st_mode)
    )


def fingerprint(archs: tuple[int, ...]) -> str:
    """Of all that the library depends on; the CPU too, as home directories are shared by hosts."""
    text = [*CXX_FLAGS, *NVCC_FLAGS, torch.__version__, str(archs), platform.machine()]
    with contextlib.suppress(OSError):
        cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        text += [line for line in cpu if line.startswith(("model name", "flags", "Features"))]
    digest = hashlib.sha256("\n".join(text).encode())
    for source in SOURCES:
        digest.update((HERE / source).read_bytes())
    return digest.hexdigest()[:16]
