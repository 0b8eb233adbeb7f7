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

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import lmc
import runs

CLASSES, CHILDREN, PASSES = 10, 3, 6


def make_data(images: int, device: torch.device) -> common.Data:
    seed = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 32, 32, 3), generator=seed, dtype=torch.uint8).to(device)
    labels = torch.randint(CLASSES, (images,), generator=seed).to(device)
    scale, shift = (torch.full((3,), v, device=device) for v in (1 / 64, -2.0))
    names = [str(c) for c in range(CLASSES)]
    return common.Data("random", pixels, labels, pixels, labels, names, "", scale, shift)


def make_children(args: argparse.Namespace, data: common.Data) -> common.Networks:
    networks = common.Networks(common.make_model(args, data), CHILDREN, args.device)
    for k in range(CHILDREN):
        networks.load(k, common.fresh_state(args, data, k))
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
    args.device = common.find_device("auto")
    args.depth, args.width, args.alphas, args.seed, args.batch_size = 20, 16, 1, 0, 128
    data = make_data(args.images, args.device)
    children = make_children(args, data)
    states = [children.state(r) for r in range(children.rows)]
    ready = make_children(args, data).modules + make_children(args, data).modules
    for module in ready:
        module.eval()
    size = common.evaluated_at_once(args.device)
    with torch.inference_mode():
        batches = [common.normalise(data, x) for x in data.train_images.split(size)]
    forward(ready, batches[:1])
    lmc.measure(args, make_data(1000, args.device), states)
    ours, bare = [], []
    for _ in range(args.rounds):
        ours.append(clock(lambda: lmc.measure(args, data, states), args.device))
        bare.append(clock(lambda: forward(ready[:PASSES], batches), args.device))
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    cuda = args.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {args.threads} threads"
    fused = "with csrc" if common.are_compiled() else "without csrc"
    print(f"{name}, torch {torch.__version__}, {fused}, {args.images} images, n = {args.rounds}")
    print("                        seconds (fastest)")
    print(f"lmc.measure, {args.batchnorm:10} {min(ours):8.3f}")
    print(f"six forward passes      {min(bare):8.3f}")
    print(f"ratio: {min(ours) / min(bare):.3f} of the fastest, {ratio:.3f} median")


if __name__ == "__main__":
    main()
