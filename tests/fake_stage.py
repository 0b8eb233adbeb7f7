"""Stands in for every stage and for figures.py where run_all.sh is tested; see `project` there.

A run is an empty file. --size=13 fails. --size=14 runs until it is stopped, saves its state then,
and finishes when it is started again. --size=15 waits for a file `go` in --out.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

STAGE = Path(__file__).stem


def read(words: list[str]) -> SimpleNamespace:
    """The settings of a command; its folder is named by --subset and --size."""
    given = dict(w[2:].split("=", 1) if "=" in w else (w[2:], "") for w in words)
    out, size = Path(given["out"]), given.get("size")
    name = "-".join(filter(None, (given.get("subset", STAGE), size)))
    folder = out / STAGE / f"{given['dataset']}-resnet8" / name
    runs = [folder / f"rep{k}" for k in given.get("replicate", "").split("-") if k] or [folder]
    return SimpleNamespace(out=out, runs=runs, size=size, batch_size=64, depth=8, width=16)


def flags() -> SimpleNamespace:
    return SimpleNamespace(parse_args=read)


def plan(settings: SimpleNamespace) -> list[tuple]:
    return [(folder, 1, (folder / "done").exists(), 1) for folder in settings.runs]


def run(settings: SimpleNamespace) -> None:
    first, started = settings.runs[0], time.monotonic()
    with open(settings.out / "calls", "a") as f:
        name = first.relative_to(settings.out)
        print(name, os.environ.get("CUDA_VISIBLE_DEVICES"), file=f)
    first.mkdir(parents=True, exist_ok=True)
    if settings.size == "13":
        sys.exit("13 brings bad luck")

    def save(number: int, _) -> None:
        (first / "saved").touch()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, save)
    wait_for = {"14": first / "saved", "15": settings.out / "go"}.get(settings.size)
    while wait_for and not wait_for.exists() and time.monotonic() < started + 60:
        time.sleep(0.05)
    for folder in settings.runs:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "done").touch()


if __name__ == "__main__" and STAGE == "figures":
    print("drawn", *sys.argv[1:])
elif __name__ == "__main__":
    run(read(sys.argv[1:]))
