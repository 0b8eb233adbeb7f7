"""A training step and a small search of ours beside open_lth's and TurboPrune's, in CPU seconds.

    python bench/peers.py --peers FOLDER --count 8 --repeats 5
    python bench/peers.py --peers FOLDER --count 0 --repeats 3 --jobs
    python bench/peers.py --parts 500 0

FOLDER holds clones of both, patched as bench/peers.md says. ResNet-20, 128 random images of 32x32,
half of the weights masked, one thread; every loop is its authors' own, data loading included, in a
process of its own. They take turns: each figure is the median of --repeats timings of --count
steps, by the process's own CPU time, so that what else the machine does counts little. --jobs
times a whole search with 3 levels of 36 steps of ResNet-8 on 50,000 + 10,000 random images, by
user time of the process and its children, ours and open_lth's lottery in turns. --parts tells
where the time of such a search of ours goes.
"""

import argparse
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
import numpy as np
import torch

HERE = Path(__file__).resolve().parent.parent
BATCH, WARM = 128, 3


def random_images(n: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(n)
    return draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), draw.integers(0, 10, n)


# ---- a loop each, in a process that takes `count` steps for every line on stdin ------------------


def turns(count: int) -> Iterator[None]:
    """One item for each line on stdin; when the next is asked for, `count` steps have been taken,
    and the CPU seconds of each are printed."""
    for _ in sys.stdin:
        began = time.process_time()
        yield
        print((time.process_time() - began) / count, file=sys.__stdout__, flush=True)


def ours(precision: str, folder: Path, count: int) -> None:
    sys.path[:0] = [str(HERE), str(HERE / "bench")]
    import step

    from runs import keep_freed_memory

    keep_freed_memory()
    flags = ["--device", "cpu", "--precision", precision, "--count", str(count)]
    run = step.ours(step.make_study(step.flags().parse_args(flags)), "eager", 1)
    run(step.WARM)
    for _ in turns(count):
        run(count)


def open_lth(precision: str, folder: Path, count: int) -> None:
    sys.path.insert(0, str(folder / "open_lth"))
    import models.registry
    import torchvision.transforms as T
    from datasets import cifar10
    from platforms import local, platform
    from pruning.mask import Mask
    from pruning.pruned_model import PrunedModel
    from training.train import train

    platform._PLATFORM = local.Platform()
    hparams = models.registry.get_default_hparams("cifar_resnet_20")
    model = models.registry.get(hparams.model_hparams)
    mask = {k: (torch.rand_like(v) < 0.5).float() for k, v in Mask.ones_like(model).items()}
    augment = [T.RandomHorizontalFlip(), T.RandomCrop(32, 4)]
    loader = cifar10.DataLoader(cifar10.Dataset(*random_images(10112), augment), BATCH, 0)
    lots = turns(count)

    def before_step(output, step, *_) -> None:
        lot, begun = divmod(step.iteration - WARM, count)
        if lot >= 0 and not begun and next(lots, sys) is sys:
            sys.exit()

    with tempfile.TemporaryDirectory() as output:
        train(
            hparams.training_hparams, PrunedModel(model, Mask(mask)), loader, output, [before_step]
        )


def resnet20(weights=None) -> torch.nn.Module:
    """TurboPrune has torchvision's models alone; this one is made of torchvision's blocks."""
    from torch import nn
    from torchvision.models.resnet import BasicBlock, conv1x1

    width, blocks = 16, []
    for channels in (16,) * 3 + (32,) * 3 + (64,) * 3:
        same = channels == width
        norm = nn.BatchNorm2d(channels)
        shortcut = None if same else nn.Sequential(conv1x1(width, channels, 2), norm)
        blocks.append(BasicBlock(width, channels, 1 if same else 2, shortcut))
        width = channels
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
    return nn.Sequential(*stem, *blocks, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10))


def turboprune(precision: str, folder: Path, count: int) -> None:
    root = folder / "TurboPrune"
    sys.path.insert(0, str(root))
    import torchvision
    import wandb
    from omegaconf import OmegaConf

    torchvision.models.small_resnet20 = resnet20
    parts = {"dataset": "dp_cifar10", "experiment": "ep_cifar10", "model": "mp_resnet18"}
    parts |= {"optimizer": "sgd_cifar10", "pruning": "iterative_imp"}
    names = {f"{k}_params": root / "conf" / f"{k}_params" / f"{v}.yaml" for k, v in parts.items()}
    cfg = OmegaConf.create({k: OmegaConf.load(v) for k, v in names.items()})
    cfg.model_params.model_name, cfg.dataset_params.total_batch_size = "small_resnet20", BATCH
    cfg.experiment_params.training_precision = "float32"
    sys.stdout = sys.stderr  # it prints a progress bar
    wandb.init()
    with tempfile.TemporaryDirectory() as data:
        cfg.dataset_params.data_root_dir = data
        (Path(data) / "cifar10").mkdir()
        for split in ("train", "test"):  # an epoch is `count` steps: its preparation is in the time
            images, labels = map(torch.from_numpy, random_images(count * BATCH))
            arrays = {"images": images, "labels": labels, "classes": 10}
            torch.save(arrays, f"{data}/cifar10/CIFAR10_{split}.pt")
        from harness_definitions.standard_pruning_harness import PruningHarness

        harness = PruningHarness(cfg=cfg, gpu_id=0, expt_dir=("", data))
    for module in harness.model.modules():
        if hasattr(module, "mask"):
            module.mask = (torch.rand_like(module.mask) < 0.5).float()
    harness._setup_optimizer()
    harness._setup_scheduler(1000)
    harness.train_epoch()
    for _ in turns(count):
        harness.train_epoch()


LOOPS = {
    "ours, float32": (ours, "fp32"),
    "ours, bfloat16": (ours, "bf16"),
    "open_lth": (open_lth, "fp32"),
    "TurboPrune": (turboprune, "fp32"),
}


class Apart:
    """A loop in a process of its own; a call gives the CPU milliseconds of each step."""

    def __init__(self, name: str, folder: Path, count: int):
        command = [sys.executable, __file__, "--peers", folder, "--count", str(count)]
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        errors = subprocess.DEVNULL if name == "TurboPrune" else None
        self.child = subprocess.Popen([*command, "--serve", name], stderr=errors, **pipe)

    def __call__(self) -> float:
        print(file=self.child.stdin, flush=True)
        return 1e3 * float(self.child.stdout.readline())


# ---- a whole search ------------------------------------------------------------------------------


def write_random_cifar(folder: Path) -> Path:
    """50,000 + 10,000 random images, as an .npz and in CIFAR-10's own layout for open_lth."""
    arrays = {}
    for split, n in (("train", 50000), ("test", 10000)):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = random_images(n)
    np.savez(folder / "random.npz", **arrays)
    layout = folder / "open_lth_datasets" / "cifar10" / "cifar-10-batches-py"
    layout.mkdir(parents=True)
    files = {f"data_batch_{i}": ("train", slice(10000 * (i - 1), 10000 * i)) for i in range(1, 6)}
    for name, (split, part) in (files | {"test_batch": ("test", slice(None))}).items():
        images = arrays[f"{split}_images"][part].transpose(0, 3, 1, 2).reshape(10000, 3072)
        rows = {"data": images, "labels": arrays[f"{split}_labels"][part].tolist()}
        (layout / name).write_bytes(pickle.dumps(rows))
    (layout / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))
    return folder / "random.npz"


def jobs(peers: Path, repeats: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = write_random_cifar(folder)
        given = {"dataset": data, "preset": "cifar10", "depth": 8, "subset": "all", "rewind": 0}
        given |= {"steps": 36, "levels": 2, "device": "cpu", "out": folder / "results"}
        flags = [str(x) for k, v in given.items() for x in (f"--{k}", v)]
        search = [sys.executable, HERE / "imp.py", *flags, "--quiet", "--fresh"]
        lottery = [sys.executable, peers / "open_lth" / "open_lth.py", "lottery", "--levels=2"]
        lottery += ["--default_hparams=cifar_resnet_8", "--training_steps=36it"]
        commands = {"ours, float32": search, "ours, bfloat16": [*search, "--precision", "bf16"]}
        commands["open_lth"] = lottery
        taken = {name: [] for name in commands}
        for i in range(repeats):
            home = folder / str(i)  # open_lth keeps data and results below the home folder
            home.mkdir()
            (home / "open_lth_datasets").symlink_to(folder / "open_lth_datasets")
            for name, command in commands.items():
                environment = os.environ | ({"HOME": str(home)} if command is lottery else {})
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                taken[name].append(after.ru_utime - before.ru_utime)
                print(f"{name}: {taken[name][-1]:.1f} s", file=sys.stderr, flush=True)
    return taken


def parts(steps: int, levels: int) -> None:
    """Where the time of a search of ours goes, in this process."""
    sys.path.insert(0, str(HERE))
    import common
    import engine
    import imp
    import runs

    def timed(call, name: str):
        def timed_call(*args, **kwargs):
            began = time.process_time()
            value = call(*args, **kwargs)
            spent[name] = spent.get(name, 0) + time.process_time() - began
            return value

        return timed_call

    runs.keep_freed_memory()
    spent = {"imports": time.process_time()}
    for module, name in ((common, "prepare"), (engine, "fit"), (engine, "accuracy_and_loss")):
        setattr(module, name, timed(getattr(module, name), name))
    with tempfile.TemporaryDirectory() as temporary:
        data = write_random_cifar(Path(temporary))
        began = time.process_time()
        given = {"preset": "cifar10", "depth": 8, "subset": "all", "rewind": 0, "device": "cpu"}
        given |= {"steps": steps, "levels": levels, "quiet": True, "out": temporary}
        imp.search(dataset=str(data), **given)
    spent["all"] = spent["imports"] + time.process_time() - began
    for name, seconds in spent.items():
        print(f"{name:20}{seconds:8.2f} s {seconds / spent['all']:7.1%}")


def table(taken: dict[str, list[float]], unit: str) -> None:
    first = statistics.median(next(iter(taken.values())))
    for name, times in taken.items():
        middle = statistics.median(times)
        spread = f"{min(times):.1f} to {max(times):.1f}"
        print(f"{name:16}{middle:8.1f} {unit}  ({spread})  {middle / first:.2f} of ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, default=".", help="folder with both clones")
    parser.add_argument("--count", type=int, default=8, help="steps in a timing; 0: no steps")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", action="store_true", help="also a whole search")
    two = {"nargs": 2, "type": int, "metavar": ("STEPS", "LEVELS")}
    parser.add_argument("--parts", help="where the time of a search of ours goes", **two)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.serve:
        loop, precision = LOOPS[args.serve]
        return loop(precision, args.peers.resolve(), args.count)
    if args.parts:
        return parts(*args.parts)
    if args.count:
        loops = {name: Apart(name, args.peers, args.count) for name in LOOPS}
        taken = {name: [] for name in LOOPS}
        for _ in range(args.repeats):
            for name, loop in loops.items():
                taken[name].append(loop())
                print(f"{name}: {taken[name][-1]:.0f} ms a step", file=sys.stderr, flush=True)
        table(taken, "ms")
        for loop in loops.values():
            loop.child.stdin.close()
            loop.child.wait()
    if args.jobs:
        table(jobs(args.peers.resolve(), args.repeats), "s")


if __name__ == "__main__":
    main()
