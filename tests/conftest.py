"""What the tests of the stages share: tiny runs on the embedded digits."""

import os

# Before torch, and inherited by what tests start: as many threads there as here, and not the AVX2
# convolutions of oneDNN, which in torch 2.15 write out of bounds for 4 channels.
os.environ |= {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "SSE41"}

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    """The tests of the stages compare with the CPU; `-m gpu` alone sees the card."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def nothing_is_left_of_a_signal():
    """What a test leaves noted would end all of pytest in a later one."""
    import runs

    yield
    left = runs.signals.number, runs.signals.waits
    runs.signals.number, runs.signals.waits = 0, False
    assert left == (0, False), "a signal or its deferral was left behind"


@pytest.fixture
def stage(tmp_path):
    """Calls a stage's main as its command line would: stage("imp", "--levels", 1)."""

    def call(name: str, *flags, out: Path = tmp_path / "results"):
        module = __import__(name)
        words = ("--out", out, "--data-dir", ROOT / "data", "--quiet", *flags)
        return module.main(module.flags().parse_args([str(word) for word in words]))

    return call


@pytest.fixture
def image_folder(tmp_path):
    """A folder data set of two classes of 9x9 PNGs, made of random pixels: (path, make more)."""
    from PIL import Image

    def make(root: Path = tmp_path / "pictures", train=6, test=3, valid=2, size=(9, 9), mode="RGB"):
        draw = np.random.default_rng(0)
        for split, n in (("train", train), ("valid", valid), ("test", test)):
            for c in ("cat", "dog") if n else ():
                (root / split / c).mkdir(parents=True, exist_ok=True)
                for k in range(n):
                    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
                    pixels = draw.integers(0, 256, shape, dtype=np.uint8)
                    Image.fromarray(pixels, mode).save(root / split / c / f"{k}.png")
        return root

    return make


@pytest.fixture
def simulated_cuda(request, monkeypatch):
    """A simulated CUDA device for which csrc is built if it can be, or, with the parameter
    "definitions", is not."""
    import inspect
    from types import SimpleNamespace

    import torch
    from simulated_cuda import SimulatedCuda

    import engine

    built, wanted = engine.are_compiled(), getattr(request, "param", "any")
    if wanted == "csrc" and not built:
        pytest.skip("no compiler: csrc is not built")
    call = engine.operations().batch_norm_relu
    devices = inspect.getclosurevars(call).nonlocals["devices"] if built else []
    if wanted == "definitions":
        plain = SimpleNamespace(**engine.DEFINITIONS)
        monkeypatch.setattr(engine, "operations", lambda: plain)
    caches = (engine.cuda_streams, engine.permutation)
    for cache in caches:
        cache.cache_clear()
    devices.append("cuda")
    with SimulatedCuda(monkeypatch) as device, torch.autograd.set_multithreading_enabled(False):
        yield device
    devices.remove("cuda")
    for cache in caches:
        cache.cache_clear()
