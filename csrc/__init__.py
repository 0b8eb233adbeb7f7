"""Fused operations: `load(definitions)` gives a namespace of them, or None without a compiler.

The first use builds ops.cpp (schemas, CPU) and, where there is a card and an nvcc, ops.cu for it;
later uses find the library in TORCH_EXTENSIONS_DIR or ~/.cache/datadiet. The definitions, plain
PyTorch, give `torch.compile` the shapes, and serve tensors on a device without a compiled form.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from csrc import batch_norm

HERE = Path(__file__).resolve().parent
SOURCES = ("math.h", "batch_norm.h", "ops.cpp", "batch_norm.cuh", "ops.cu")
# no contraction and no fast-math: one arithmetic on every processor, see math.h
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno"]
NVCC_FLAGS = ["-O3", "-fmad=false", "-Xptxas=-v"]
# In a process of its own: ours keeps its environment and prints nothing of torch's or ninja's.
BUILD = """
import json, sys
from torch.utils.cpp_extension import load
load(**json.loads(sys.argv[1]), is_python_module=False, verbose=True)
"""


class BuildError(Exception):
    """Why there is no library, in one line."""


# ---- load ----------------------------------------------------------------------------------------


_loaded: list[SimpleNamespace | None] = []  # a list, since torch.compile traces through load()


def load(definitions: dict[str, Callable]) -> SimpleNamespace | None:
    """The operations under the names of their definitions, built if need be; None without a
    compiler. A name that is not compiled here keeps its definition.

    The first call says on stderr, in one line, what was built and what is missing; it says nothing
    where all is in place. It is not for inside `torch.compile`, the later ones are.
    """
    if not _loaded:
        _loaded.append(register(definitions) if load_library() else None)
    return _loaded[0]


def load_library() -> bool:
    """Loads the operations, with the CUDA part, else without; False if neither can be built."""
    message, done = [], False
    for archs in dict.fromkeys([card_archs(), ()]):
        try:
            library, note = find(archs) or build(archs)
            torch.ops.load_library(library)
            message += [note] if note else []
            done = True
            break
        except (BuildError, OSError) as error:
            users = "CUDA tensors" if archs else "all tensors"
            message.append(f"{str(error).splitlines()[0]}, {users} use the PyTorch definitions")
    if message:
        print(f"csrc: {'; '.join(message)}", file=sys.stderr, flush=True)
    return done


def card_archs() -> tuple[int, ...]:
    """Compute capabilities of the visible cards, (80,) for an A100; none without a card."""
    if not (torch.version.cuda and torch.cuda.is_available()):
        return ()
    cards = range(torch.cuda.device_count())
    return tuple(sorted({a * 10 + b for a, b in map(torch.cuda.get_device_capability, cards)}))


def register(definitions: dict[str, Callable]) -> SimpleNamespace:
    """Gives every operation its definition, for shapes and for devices that have no kernel here.

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


# ---- build ---------------------------------------------------------------------------------------


def find(archs: tuple[int, ...]) -> tuple[Path, str] | None:
    """A library in the cache for this CPU, else a portable one, with code for all of `archs`."""
    for portable in (False, True):
        built = cache_folder().glob(f"datadiet-{fingerprint(portable)}*.so")
        for library in sorted(built, key=lambda path: len(path.name)):
            if set(map(str, archs)) <= set(library.stem.split("-")[2:]) and trusted(library):
                return library, ""
    return None


def build(archs: tuple[int, ...], portable: bool = False) -> tuple[Path, str]:
    """The library for this CPU, or for any like it, and the given compute capabilities, and a note
    if it was built now. Beside it lies ptxas' report (.log).

    It is built in a folder of its own, then renamed into place: of a build that was killed nothing
    is taken. The lock, which the system takes back with the process, only spares a second process
    the work.
    """
    folder = cache_folder()
    name = "-".join(["datadiet", fingerprint(portable), *map(str, archs)])
    library = folder / f"{name}.so"
    start = time.perf_counter()
    with open(folder / "lock", "w") as lock:
        with contextlib.suppress(OSError):  # some network disks have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if trusted(library):
            return library, ""
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
            report = compile_into(scratch, archs, portable)
            Path(scratch, "ops.log").write_text(report)
            Path(scratch, "ops.so").chmod(0o755)  # whatever the umask: see trusted()
            os.replace(Path(scratch, "ops.log"), library.with_suffix(".log"))
            os.replace(Path(scratch, "ops.so"), library)
    seconds = time.perf_counter() - start
    devices = ", ".join(["any CPU" if portable else "the CPU", *(f"sm_{a}" for a in archs)])
    return library, f"built for {devices} in {seconds:.0f} s, kept in {folder}"


def compile_into(scratch: str, archs: tuple[int, ...], portable: bool) -> str:
    """Writes ops.so; returns the compilers' report, or raises BuildError with their complaint."""
    compilers = [os.environ.get("CXX")] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    cxx = next(filter(shutil.which, compilers), None)
    if not cxx:
        raise BuildError("no C++ compiler (install g++ or set CXX)")
    # pip's ninja lies beside this Python; CC would become nvcc's host compiler
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    environment = {**os.environ, "CXX": cxx, "PATH": path, "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    environment.pop("CC", None)
    if not shutil.which("ninja", path=path):
        raise BuildError("no ninja (pip install ninja)")
    sources = [str(HERE / "ops.cpp")]
    flags, cuda_flags = CXX_FLAGS + ([] if portable else ["-march=native"]), []
    if archs:
        environment["CUDA_HOME"] = str(cuda_home())
        sources.append(str(HERE / "ops.cu"))
        flags.append("-DUSE_CUDA")
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        cuda_flags = [*NVCC_FLAGS, *targets, f"-ccbin={cxx}"]
    job = {"name": "ops", "sources": sources, "build_directory": scratch}
    job |= {"extra_cflags": flags, "extra_cuda_cflags": cuda_flags}
    command = [sys.executable, "-c", BUILD, json.dumps(job)]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=environment, **out)
    if done.returncode:
        lines = done.stdout.splitlines()
        lines = [x for x in lines if re.search(r"\berror:", x, re.I)] or lines[-1:] or ["no reason"]
        raise BuildError(f"the build failed: {lines[0].strip()}")
    return done.stdout


def cuda_home() -> Path:
    """The CUDA toolkit, of the major version that torch was built with."""
    nvcc = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = [Path(nvcc).resolve().parent.parent] if nvcc else []
    for home in [Path(named)] if named else [*found, Path("/usr/local/cuda")]:
        if (home / "bin/nvcc").exists() and list(home.glob("lib*/libcudart.so*")):
            break  # else the nvcc on the PATH is a script that calls another
    else:
        raise BuildError(f"no nvcc in CUDA_HOME={named}" if named else "no nvcc (set CUDA_HOME)")
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.", text)
    if torch.version.cuda and version and version[1] != torch.version.cuda.split(".")[0]:
        raise BuildError(f"nvcc in {home} is CUDA {version[1]}, torch's is {torch.version.cuda}")
    return home


# ---- cache ---------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """A folder that only this user can write to."""
    root = os.path.expanduser(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache")
    folder = Path(root) / "datadiet"
    with contextlib.suppress(OSError):
        if not root.startswith("~"):  # a user without a home
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if trusted(folder) and os.access(folder, os.W_OK):
        return folder
    raise BuildError(f"{folder} is not this user's alone (set TORCH_EXTENSIONS_DIR)")


def trusted(path: Path) -> bool:
    """Whether `path` is there, belongs to this user and cannot be written to by others."""
    others = stat.S_IWGRP | stat.S_IWOTH
    with contextlib.suppress(OSError):
        status = path.lstat()
        mine = status.st_uid == os.geteuid() and not status.st_mode & others
        return mine and not stat.S_ISLNK(status.st_mode)
    return False


def fingerprint(portable: bool) -> str:
    """Of all that the library depends on; the CPU too, as home directories are shared by hosts."""
    text = [*CXX_FLAGS, *NVCC_FLAGS, torch.__version__, platform.machine(), str(portable)]
    if not portable:
        with contextlib.suppress(OSError):
            cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
            text += [line for line in cpu if line.startswith(("model name", "flags", "Features"))]
    digest = hashlib.sha256("\n".join(text).encode())
    for source in SOURCES:
        digest.update((HERE / source).read_bytes())
    return digest.hexdigest()[:16]
