"""Builds the operations and checks the machine code of every CUDA kernel.

    python -m csrc                  for this machine
    python -m csrc --arch 80 90     the CUDA part too, for GPUs that need not be here (CI)
    python -m csrc --portable       for any CPU of this kind, where nodes share a home directory

Fails if there is no build, if a kernel spills registers, or if one that handles packs of four
values makes fewer accesses of a whole pack than it should, or a store before the loads ahead of it.
"""

import argparse
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from csrc import BuildError, gpu_archs
from csrc.build import build, cuda_home

# Kernels that handle packs of four values: (bits of a pack, loads ahead of a store, stores).
PACKS = {
    "apply_kernel<true, float, BatchNorm>": (128, 8, 4),
    "apply_kernel<true, bf16, BatchNorm>": (64, 8, 4),
    "apply_kernel<true, float, BatchNormBackward>": (128, 4, 2),
    "apply_kernel<true, bf16, BatchNormBackward>": (64, 4, 2),
    "sums_kernel<true, float, BatchNorm>": (128, 8, 0),
    "sums_kernel<true, bf16, BatchNorm>": (64, 8, 0),
    "sums_kernel<true, float, BatchNormBackward>": (128, 6, 2),
    "sums_kernel<true, bf16, BatchNormBackward>": (64, 6, 2),
    "sgd_kernel<4>": (128, 3, 3),
}


@dataclasses.dataclass
class Kernel:
    arch: str
    name: str
    registers: int
    spills: int  # accesses of local memory
    loads: int = 0  # of a whole pack, before the first such store
    stores: int = 0
    narrow: int = 0  # stores of less than 64 bits

    def faults(self) -> list[str]:
        bits, loads, stores = PACKS.get(self.name, (0, 0, 0))
        found = [f"{self.spills} spills"] if self.spills else []
        if self.loads < loads or self.stores < stores or (bits and self.narrow):
            found.append(f"not {loads} loads of {bits} bits ahead of {stores} stores, none narrow")
        return [f"{self.arch} {self.name}: {text}" for text in found]


def kernels(library: Path) -> list[Kernel]:
    """What cuobjdump, of the CUDA toolkit or of torch's triton, reads in the machine code."""
    folders = [os.environ.get("PATH", os.defpath), str(cuda_home() / "bin")]
    if triton := importlib.util.find_spec("triton"):
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    path = os.pathsep.join(folders)
    if not (shutil.which("cuobjdump", path=path) and shutil.which("c++filt")):
        raise BuildError("built, but not checked: no cuobjdump or no c++filt")
    texts = []
    for option in ("-res-usage", "-sass"):  # which runs nvdisasm
        command = [shutil.which("cuobjdump", path=path), option, str(library)]
        done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True)
        texts.append(readable(done.stdout))
    registers, arch, found = {}, "", []
    for line in re.finditer(r"^arch = (\w+)|Function (.+):\n.*?REG:(\d+)", texts[0], re.M):
        arch = line[1] or arch
        registers[arch, line[2]] = int(line[3] or 0)
    for part in re.split(r"(?=code for sm_|Function : )", texts[1]):
        if part.startswith("code for"):
            arch = part.split()[2]
        elif part.startswith("Function"):
            name = part.split("\n")[0].removeprefix("Function : ").strip()
            found.append(read_kernel(arch, name, registers[arch, name], part))
    return found


def readable(text: bytes) -> str:
    """With the names of C++, without namespaces, return types and parameters."""
    text = subprocess.run(["c++filt"], input=text, capture_output=True).stdout
    words = re.sub(r"datadiet::|\(anonymous namespace\)::", "", text.decode())
    return re.sub(r"(Function :? ?)(?:void )?([^(\n:]+)\([^\n:]*", r"\1\2", words)


def read_kernel(arch: str, name: str, registers: int, sass: str) -> Kernel:
    kernel = Kernel(arch, name, registers, len(re.findall(r"\b(?:LDL|STL)\b", sass)))
    bits = PACKS.get(name, (0,))[0]
    parts = re.split(r"\bBAR\.", sass)  # pixels come before the first barrier, or after the last
    for load, width in re.findall(
        r"\b(?:(LDG)|STG)\.E(?:\.EF)?\.?(\w*)", parts[-1 if "apply" in name else 0]
    ):
        if load:
            kernel.loads += width == str(bits) and not kernel.stores
        else:
            kernel.stores += width == str(bits)
            kernel.narrow += width not in ("64", "128")
    return kernel


def main(archs: tuple[int, ...], portable: bool) -> int:
    try:
        library = build(archs, portable)
        print(library)
        rows = kernels(library) if archs else []
    except BuildError as error:
        print(f"csrc: {error}", file=sys.stderr)
        return 1
    for k in rows:
        accesses = f"{k.loads} loads ahead of {k.stores} stores" if k.name in PACKS else ""
        print(f"{k.arch}  {k.name:44}  {k.registers:3} registers  {k.spills} spills  {accesses}")
    missing = {(f"sm_{a}", name) for a in archs for name in PACKS} - {
        (k.arch, k.name) for k in rows
    }
    faults = [f"{arch} {name}: missing" for arch, name in sorted(missing)]
    faults += [text for k in rows for text in k.faults()]
    for text in faults:
        print(f"csrc: {text}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", help="compute capabilities, 80 for an A100")
    parser.add_argument("--portable", action="store_true", help="for any CPU of this kind")
    args = parser.parse_args()
    sys.exit(main(tuple(args.arch) if args.arch else gpu_archs(), args.portable))
