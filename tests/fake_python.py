#!/usr/bin/env python3
"""Stands in for Python where run_all.sh is tested (PYTHON=tests/fake_python.py): every stage is a
touched file, and figures.py only makes plans. `--size 13` fails; `--size 14` waits to be stopped.
"""

import os
import shlex
import sys
import time
from pathlib import Path

SHARED = {"--dataset", "--preset", "--out", "--data-dir", "--device", "--quiet", "--replicate"}


def read(words: list[str]) -> tuple[str, Path, dict[str, str]]:
    """(folder, the file that says done, flags) of a stage's command."""
    stage = Path(words[0]).stem
    flags = dict(w.split("=", 1) for w in words[1:] if "=" in w)
    own = [w for w in words[1:] if w.split("=")[0] not in SHARED | {"--scores"}]
    by = [Path(flags["--scores"]).parent.name] if "--scores" in flags else []
    name = "".join(w.removeprefix("--").replace("=", "") + "-" for w in own + by) or "el2n-"
    folder = f"{stage}/{Path(flags['--dataset']).name}/{name[:-1]}"
    done = Path(flags["--out"], folder, "done" + flags.get("--replicate", ""))
    return folder, done, flags


def main(words: list[str]) -> None:
    if Path(words[0]).stem == "figures":
        if "--plan" not in words:
            print("drawn", *words[1:])
        for line in sys.stdin if "--plan" in words else ():
            folder, done, flags = read(shlex.split(line)[1:])
            replicates = "/rep" + flags["--replicate"] if "--replicate" in flags else ""
            print("done" if done.exists() else "todo", 1, 1, folder + replicates, sep="\t")
        return
    folder, done, flags = read(words)
    with open(Path(flags["--out"], "calls"), "a") as f:
        print(folder, os.environ.get("CUDA_VISIBLE_DEVICES"), file=f)
    if flags.get("--size") == "13":
        sys.exit("13 brings bad luck")
    time.sleep(60 if flags.get("--size") == "14" else 0)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()


if __name__ == "__main__":
    main(sys.argv[1:])
