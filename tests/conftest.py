"""What the tests of the stages share: tiny runs on the embedded digits."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, and inherited by what tests start

import sys
from pathlib import Path

import pytest

os.environ.setdefault("PYTHON", sys.executable)  # for run_all.sh, whether it is activated or not

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    """The tests of the stages compare with the CPU; `-m gpu` alone sees a GPU."""
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


def parse(name: str, *flags):
    """The settings of a stage, quiet and on the CPU."""
    words = ("--data-dir", ROOT / "data", "--device", "cpu", "--quiet", *flags)
    return __import__(name).flags().parse_args([str(word) for word in words])


def study_of(name: str, *flags, **handed_in):
    """What a stage works with, before anything is trained."""
    import common
    import options

    handed_in = options.HandedIn(**handed_in)
    study = common.prepare(parse(name, *flags), ROOT / f"{name}.py", handed_in)
    return common.rank(study)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file but the locks, which tell of processes."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder): p.read_bytes() for p in files}


def digits(device="cpu"):
    import torch

    import common
    import options

    return common.load_data(options.Settings.complete({}), torch.device(device))


def training(
    rows=(0,), stop=12, at=(), alive=1.0, watch=None, model=None, device="cpu", drop=8, **settings
):
    """Of networks on the digits, a row for each replicate, a share `alive` of their weights not
    pruned; at rate 0.1, from step `drop` on 0.01."""
    import torch

    import common
    import engine

    usual = {"batch_size": 32, "momentum": 0.9, "weight_decay": 1e-2, "pad": 1, "flip": False}
    usual |= {"graph": False, "bf16": False, "checkpoint_every": 1e9}
    device, data, streams = torch.device(device), digits(device), []
    model = model or common.ResNet(8, 4, 1, 10)
    networks = engine.Networks(model, len(rows), device)
    draw = torch.rand(networks.mask.shape[1], generator=torch.Generator().manual_seed(0))
    for r, replicate in enumerate(rows):
        if isinstance(model, common.ResNet):
            common.initialise_resnet(model, engine.generator(0, "init", replicate))
        networks.load(r, model.state_dict())
        networks.set_mask(r, draw < alive)
        keys = (engine.philox_key(0, purpose, replicate) for purpose in ("order", "augment"))
        everything = torch.arange(len(data.train_labels), device=device)
        streams.append(engine.Stream(data.train_labels, everything, *keys))
    settings, schedule = engine.StepSettings(**usual | settings), engine.step_schedule(0.1, (drop,))
    return engine.Training(
        settings, data, networks, streams, 0, stop, schedule, frozenset(at), watch
    )


def same(a: dict, b: dict) -> bool:
    """Whether two dicts of tensors are equal to the last bit."""
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def stage(tmp_path):
    """Calls a stage's main as its command line would: stage("imp", "--levels", 1)."""

    def call(name: str, *flags, out: Path = tmp_path / "results", **handed_in):
        import options

        s = parse(name, "--out", out, *flags)
        return __import__(name).main(s, options.HandedIn(**handed_in))

    return call


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
