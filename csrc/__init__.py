"""Fused operations: `load(definitions)` returns a namespace of them, or None without a compiler.

The first use compiles ops.cpp (schemas, CPU) and, where there is a GPU and nvcc, ops.cu for it;
later uses find the library in TORCH_EXTENSIONS_DIR or ~/.cache/datadiet. The definitions, plain
PyTorch, give `torch.compile` the shapes, and serve tensors on a device without a compiled form.
"""

import contextlib
import hashlib
import os
import platform
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from csrc import batch_norm

HERE = Path(__file__).resolve().parent
SOURCES = ("formulas.h", "batch_norm.h", "ops.cpp", "batch_norm.cuh", "ops.cu")
# no contraction and no fast-math: one arithmetic on every processor, see formulas.h
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno"]
NVCC_FLAGS = ["-O3", "-fmad=false"]
# What torch's own kernels need, by torch.backends.cpu.get_cpu_capability(); others get none.
CPU_FLAGS = {"AVX2": ["-mavx2", "-mfma"]}
CPU_FLAGS["AVX512"] = [*CPU_FLAGS["AVX2"], *(f"-mavx512{x}" for x in ("f", "vl", "bw", "dq"))]


class BuildError(Exception):
    """Why there is no library, in one line."""


# ---- load ----------------------------------------------------------------------------------------

_loaded: list[SimpleNamespace | None] = []  # a list, since torch.compile traces through load()


def load(definitions: dict[str, Callable]) -> SimpleNamespace | None:
    """The operations under the names of their definitions, built if need be; None if they cannot
    be. A name that is not compiled keeps its definition. The first call, which must not be inside
    `torch.compile`, prints to stderr what it built and why something is missing, a line each.
    """
    if not _loaded:
        _loaded.append(register(definitions) if load_library() else None)
    return _loaded[0]


def load_library() -> bool:
    """Loads the operations, if possible with the CUDA part; False if neither can be built."""
    from csrc.build import build

    for archs in dict.fromkeys([gpu_archs(), ()]):
        try:
            torch.ops.load_library(find(archs) or build(archs))
            return True
        except (BuildError, OSError) as error:
            reason, users = str(error).splitlines()[0], "CUDA" if archs else "all"
            message = f"csrc: {reason}; {users} tensors use the PyTorch definitions"
            print(message, file=sys.stderr, flush=True)
    return False


def gpu_archs() -> tuple[int, ...]:
    """Compute capabilities of the visible GPUs, (80,) for an A100; () without a GPU."""
    if not (torch.version.cuda and torch.cuda.is_available()):
        return ()
    gpus = range(torch.cuda.device_count())
    return tuple(sorted({a * 10 + b for a, b in map(torch.cuda.get_device_capability, gpus)}))


def register(definitions: dict[str, Callable]) -> SimpleNamespace:
    """Gives every operation its definition, for shapes and for devices without a kernel.

    The results carry no gradient, rather than a silently wrong one; the definitions do.
    """
    global _library  # the registrations live as long as this object
    _library = torch.library.Library("datadiet", "IMPL")
    compiled = [name for name in definitions if hasattr(torch.ops.datadiet, name)]
    for name in compiled:
        torch.library.register_fake(f"datadiet::{name}", definitions[name], lib=_library)
        _library.impl(name, definitions[name], "CompositeExplicitAutograd")
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    ops = {name: getattr(torch.ops.datadiet, name) for name in compiled}
    batch_norm.register(_library)
    if "batch_norm_relu" in definitions:
        ops["batch_norm_relu"] = batch_norm.compiled(definitions["batch_norm_relu"])
    return SimpleNamespace(**{**definitions, **ops})


# ---- cache ---------------------------------------------------------------------------------------


def find(archs: tuple[int, ...]) -> Path | None:
    """A library in the cache for this CPU, else a portable one, with code for all of `archs`."""
    for portable in (False, True):
        built = cache_folder().glob(f"{library_name((), portable)}*.so")
        for library in sorted(built, key=lambda path: len(path.name)):
            if set(map(str, archs)) <= set(library.stem.split("-")[3:]) and is_trusted(library):
                return library
    return None


def cache_folder() -> Path:
    """A folder, or what a link to one points to, that only this user can write to."""
    root = os.path.expanduser(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache")
    folder = Path(root, "datadiet").resolve()
    with contextlib.suppress(OSError):
        if not root.startswith("~"):  # a user without a home
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_trusted(folder):
        raise BuildError(f"{folder} is not this user's alone (set TORCH_EXTENSIONS_DIR)")
    return folder


def is_trusted(path: Path) -> bool:
    """Whether `path` exists, belongs to this user and cannot be written to by others."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return False


def cpu() -> str:
    """The instructions to compile for; a home directory may be shared by hosts that differ."""
    name = torch.backends.cpu.get_cpu_capability()
    return name if name in CPU_FLAGS else "any"


def library_name(archs: tuple[int, ...], portable: bool) -> str:
    """For the CPU, the GPUs, and, as a hash, all else that the library depends on."""
    text = [*CXX_FLAGS, *NVCC_FLAGS, str(CPU_FLAGS), torch.__version__, platform.machine()]
    digest = hashlib.sha256("\n".join(text).encode())
    for source in SOURCES:
        digest.update((HERE / source).read_bytes())
    kind = "any" if portable else cpu()
    return "-".join(["datadiet", digest.hexdigest()[:16], kind, *map(str, archs)])
