"""Barriers between three children against the six forward passes they cannot do without.

    python bench/lmc.py --images 1000 --rounds 7 --threads 1           the table of bench/lmc.md
    python bench/lmc.py                                                50,000 images, five rounds

ResNet-20, random 32x32 images, random weights. Above: `lmc.measure`, all that a finished run does
to get its barriers (networks made from state_dicts, interpolation, logits, losses, suprema, arrays
on the host). Below: six networks that stand ready, in eval mode, over batches of the same size that
lie normalised on the device, nothing kept. The two take turns; the figures are the fastest round of
each and the median over rounds of their ratio.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import engine
import lmc
import loading
import options
import runs

CLASSES, CHILDREN, PASSES = 10, 3, 6


def make_study(images: int, batchnorm: str) -> common.Study:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(images) % CLASSES
    names = ("train_images", "train_labels", "test_images", "test_labels")
    data = dict(zip(names, (pixels, labels, pixels, labels), strict=True))
    settings = {"dataset": "random", "preset": "cifar10", "precision": "fp32"}
    settings |= {"batchnorm": batchnorm, "rewind": (0,), "subset": "all"}
    s = lmc.Settings.complete(settings)
    return common.prepare(s, lmc.__file__, options.HandedIn(data=loading.as_arrays(data)))


def make_children(study: common.Study) -> engine.Networks:
    networks = study.networks(CHILDREN)
    for k in range(CHILDREN):
        networks.load(k, study.initial_state_dict(k))
    return networks


@torch.inference_mode()
def forward(modules: list, batches: list[Tensor]) -> None:
    for module in modules:
        for x in batches:
            module(x)


def clock(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=50000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batchnorm", choices=("average", "recompute"), default="average")
    args = parser.parse_args()
    runs.keep_freed_memory()  # as the stages do
    torch.set_num_threads(args.threads)
    study = make_study(args.images, args.batchnorm)
    device, data, children = study.device, study.data, make_children(study)
    states = [children.state(r) for r in range(children.rows)]
    ready = make_children(study).modules + make_children(study).modules
    for module in ready:
        module.eval()
    size = engine.eval_batch_size(device)
    with torch.inference_mode():
        batches = [engine.normalise(data, x) for x in data.train_images.split(size)]
    forward(ready, batches[:1])
    lmc.measure(make_study(1000, args.batchnorm), states)
    ours, bare = [], []
    for _ in range(args.rounds):
        ours.append(clock(lambda: lmc.measure(study, states), device))
        bare.append(clock(lambda: forward(ready[:PASSES], batches), device))
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {args.threads} threads"
    fused = "with csrc" if engine.are_compiled() else "without csrc"
    print(f"{name}, torch {torch.__version__}, {fused}, {args.images} images, n = {args.rounds}")
    print("                        seconds (fastest)")
    print(f"lmc.measure, {args.batchnorm:10} {min(ours):8.3f}")
    print(f"six forward passes      {min(bare):8.3f}")
    print(f"ratio: {min(ours) / min(bare):.3f} of the fastest, {ratio:.3f} median")


if __name__ == "__main__":
    main()
