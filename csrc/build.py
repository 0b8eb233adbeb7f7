"""Compiles the operations by torch.utils.cpp_extension into the cache."""

import contextlib
import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from csrc import (
    CPU_FLAGS,
    CXX_FLAGS,
    HERE,
    NVCC_FLAGS,
    BuildError,
    cache_folder,
    cpu,
    is_trusted,
    library_name,
)

# In a process of its own: ours keeps its environment and prints nothing of torch's or ninja's.
LOAD = """
import json, sys
from torch.utils.cpp_extension import load
load(**json.loads(sys.argv[1]), is_python_module=False, verbose=True)
"""


def build(archs: tuple[int, ...], portable: bool = False) -> Path:
    """The library for this CPU, or any of its kind, and for GPUs of these compute capabilities.

    It is built in a private folder and then renamed, so an interrupted build leaves nothing that
    would be loaded. The lock only spares a second process the work. Raises BuildError.
    """
    folder, start = cache_folder(), time.perf_counter()
    library = folder / f"{library_name(archs, portable)}.so"
    with open(folder / "lock", "w") as lock:
        with contextlib.suppress(OSError):  # some network disks have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if is_trusted(library):
            return library
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
            compile_into(scratch, archs, portable)
            Path(scratch, "ops.so").chmod(0o755)  # whatever the umask: see is_trusted()
            os.replace(Path(scratch, "ops.so"), library)
    devices = ", ".join(["any CPU" if portable else "the CPU", *(f"sm_{a}" for a in archs)])
    message = f"csrc: built for {devices} in {time.perf_counter() - start:.0f} s, kept in {folder}"
    print(message, file=sys.stderr, flush=True)
    return library


def compile_into(scratch: str, archs: tuple[int, ...], portable: bool) -> None:
    """Writes ops.so, or raises BuildError with the compilers' complaint."""
    found = next(filter(shutil.which, ["g++", "c++", "clang++"]), "g++")
    cxx = shlex.split(os.environ.get("CXX", "")) or [found]
    programs = list(itertools.takewhile(lambda word: not word.startswith("-"), cxx)) or cxx[:1]
    for program in programs:
        if not shutil.which(program):
            raise BuildError(f"no C++ compiler: {program} is not found (install it or set CXX)")
    # torch and nvcc take CXX for one program: of `ccache g++ -pipe` they get the second, the option
    # goes among the others, and where there is a ccache torch puts it in front itself. CC would go
    # to nvcc. pip's ninja lies beside this Python.
    environment = {**os.environ, "CXX": programs[-1], "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    environment.pop("CC", None)
    environment["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{Path(sys.executable).parent}"
    options = cxx[len(programs) :]
    flags = options + CXX_FLAGS + ([] if portable else CPU_FLAGS.get(cpu(), []))
    job = {"name": "ops", "sources": [str(HERE / "ops.cpp")], "build_directory": scratch}
    if archs:
        environment["CUDA_HOME"] = str(cuda_home())
        job["sources"].append(str(HERE / "ops.cu"))
        flags.append("-DUSE_CUDA")
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        host = [f"-ccbin={programs[-1]}", *(f"-Xcompiler={x}" for x in options)]
        job["extra_cuda_cflags"] = [*NVCC_FLAGS, *targets, *host]
    job |= {"extra_cflags": flags, "extra_ldflags": options}
    command = [sys.executable, "-c", LOAD, json.dumps(job)]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=environment, **out)
    if done.returncode:
        lines = done.stdout.splitlines() or ["no reason given"]
        error = next((x for x in lines if re.search(r"\berror:", x, re.I)), lines[-1])
        raise BuildError(f"the build failed: {error.strip()}")


def cuda_home() -> Path:
    """The CUDA toolkit, of the major version that torch was built with."""
    nvcc, named = shutil.which("nvcc"), os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [Path(nvcc).resolve().parent.parent] if nvcc else []
    for home in [Path(named)] if named else [*homes, Path("/usr/local/cuda")]:
        if (home / "bin/nvcc").exists() and list(home.glob("lib*/libcudart.so*")):
            break  # else the nvcc on the PATH is a script that calls another
    else:
        raise BuildError(f"no nvcc in CUDA_HOME={named}" if named else "no nvcc (set CUDA_HOME)")
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.", text)
    if torch.version.cuda and version and version[1] != torch.version.cuda.split(".")[0]:
        raise BuildError(f"nvcc in {home} is CUDA {version[1]}, torch's is {torch.version.cuda}")
    return home
