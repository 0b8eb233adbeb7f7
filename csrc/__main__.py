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

KERNEL = re.compile(
    r"entry function '(?:void )?([^('\n]+)[^\n]*' for '(\w+)'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)


def kernels(report: str) -> list[tuple[str, str, int, int]]:
    """(kernel, sm, registers, spilled bytes) out of what ptxas -v prints."""
    if shutil.which("c++filt"):
        report = subprocess.run(["c++filt"], input=report, capture_output=True, text=True).stdout
    report = re.sub(r"datadiet::|\(anonymous namespace\)::", "", report)
    rows = [match.groups() for match in KERNEL.finditer(report)]
    return [(name, sm, int(used), int(out) + int(back)) for name, sm, out, back, used in rows]


def main(archs: tuple[int, ...], portable: bool) -> int:
    try:
        library, note = build(archs, portable)
    except BuildError as error:
        print(f"csrc: {error}", file=sys.stderr)
        return 1
    print(f"{library}: {note or 'in place already'}")
    rows = kernels(library.with_suffix(".log").read_text())
    for name, sm, registers, spilled in rows:
        print(f"{sm}  {name:44}  {registers:3} registers  {spilled} bytes spilled")
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
