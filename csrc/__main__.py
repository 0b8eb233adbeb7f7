"""Builds the operations and says what was built: registers and spills of every kernel.

    python -m csrc                  for this machine
    python -m csrc --arch 80 90     the CUDA part too, for cards that need not be here (CI)
    python -m csrc --portable       for any CPU of this kind, where nodes share a home directory

Fails if there is no build, or if a kernel spills registers.
"""

import argparse
import re
import shutil
import subprocess
import sys

from csrc import BuildError, build, card_archs

KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def kernels(report: str) -> list[tuple[str, str, int, int]]:
    """(kernel, sm, registers, spilled bytes) out of what ptxas -v prints."""
    rows, name, sm, spilled = [], "", "", 0
    for line in demangle(report).splitlines():
        if found := KERNEL.search(line):
            name, sm = found.groups()
        elif found := SPILL.search(line):
            spilled = int(found[1]) + int(found[2])
        elif found := REGISTERS.search(line):
            rows.append((name, sm, int(found[1]), spilled))
    return rows


def demangle(report: str) -> str:
    """`sgd_kernel<4,false,float>` for every mangled name, where binutils are installed."""
    if not shutil.which("c++filt"):
        return report
    text = subprocess.run(["c++filt"], input=report, capture_output=True, text=True).stdout
    names = re.compile(r"'void (?:datadiet::|\(anonymous namespace\)::)*(.*?)\(.*' for")
    return names.sub(
        lambda m: f"'{m[1].replace('datadiet::', '').replace(' ', '')}' for",
        text,
    )


def main(archs: tuple[int, ...], portable: bool) -> int:
    try:
        library, note = build(archs, portable)
    except BuildError as error:
        print(f"csrc: {error}", file=sys.stderr)
        return 1
    print(f"{library}: {note or 'in place already'}")
    rows = kernels(library.with_suffix(".log").read_text())
    for name, sm, registers, spilled in rows:
        print(f"{sm}  {name:32}  {registers:3} registers  {spilled} bytes spilled")
    if archs and not rows:
        print("csrc: ptxas reported no kernel", file=sys.stderr)
        return 1
    return int(any(spilled for *_, spilled in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", help="compute capabilities, 80 for an A100")
    parser.add_argument("--portable", action="store_true", help="without -march=native")
    args = parser.parse_args()
    sys.exit(main(tuple(args.arch) if args.arch else card_archs(), args.portable))
