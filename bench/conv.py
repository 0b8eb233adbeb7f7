"""The convolutions of a training step, shape by shape: forward, and the two gradients.

    python bench/conv.py                          ResNet-20, 128 images of 32x32
    python bench/conv.py --depth 8 --batch-size 64 --side 8 --channels 1        that of the digits

On a GPU in bfloat16, exact (cuDNN's deterministic algorithms, what runs use) beside fast (chosen
by timing, what --fast uses), each pass 200 times in a CUDA graph; on a CPU in float32. Figures are
the fastest of --repeats, in microseconds a call; the last lines are sums over a step.
"""

import argparse
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import engine
import options
import runs

PASSES = ("forward", "input", "weight")  # the latter two are gradients
WAYS = {"exact": (True, False), "fast": (False, True)}  # deterministic, chosen by timing


def flags() -> options.Parser:
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--depth", type=options.positive, default=20, help="of the ResNet [20]")
    add("--width", type=options.positive, default=16, help="channels of its first group [16]")
    add("--batch-size", type=options.positive, default=128, help="images [128]")
    add("--side", type=options.positive, default=32, help="of an image, pixels [32]")
    add("--channels", type=options.positive, default=3, help="of an image [3]")
    add("--repeats", type=options.positive, default=5, help="timings [5]")
    add("--device", default="auto", help="[auto: a GPU if there is one]")
    return parser


def shapes(args: argparse.Namespace) -> Counter:
    """(channels in, channels out, side, kernel, stride) -> how many such layers, in order."""
    model, found = common.ResNet(args.depth, args.width, args.channels, 10), Counter()

    def note(layer: nn.Conv2d, inputs: tuple, output: torch.Tensor) -> None:
        size = layer.in_channels, layer.out_channels, inputs[0].shape[-1]
        found[*size, layer.kernel_size[0], layer.stride[0]] += 1

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    model(torch.zeros(2, args.channels, args.side, args.side))
    return found


def passes(args: argparse.Namespace, shape: tuple) -> dict[str, Callable[[], object]]:
    """The three passes of a layer on random tensors."""
    before, after, side, kernel, stride = shape
    out = -(-side // stride)
    like = {"device": args.device, "dtype": torch.bfloat16 if on_gpu(args) else torch.float32}
    sizes = [(args.batch_size, before, side, side), (after, before, kernel, kernel)]
    sizes += [(args.batch_size, after, out, out)]
    x, w, y = (torch.randn(*s, **like).to(memory_format=torch.channels_last) for s in sizes)
    rest = [stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], 1

    def gradient(*wanted: bool) -> Callable[[], object]:
        backward = torch.ops.aten.convolution_backward
        return lambda: backward(y, x, w, None, *rest, [*wanted, False])

    return {
        "forward": lambda: torch.ops.aten.convolution(x, w, None, *rest),
        "input": gradient(True, False),
        "weight": gradient(False, True),
    }


def on_gpu(args: argparse.Namespace) -> bool:
    return args.device.type == "cuda"


def microseconds(args: argparse.Namespace, call: Callable[[], object]) -> float:
    """Of a call, the fastest timing of many."""
    count = 200 if on_gpu(args) else 20

    def many() -> None:
        for _ in range(count):
            call()

    run = many
    if on_gpu(args):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with engine.on_stream(stream):
            many()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            many()
        run = graph.replay
    times = []
    for _ in range(args.repeats + 1):  # the first is warm-up
        began = time.perf_counter()
        run()
        if on_gpu(args):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1e6 * min(times[1:]) / count


def main(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Prints the table; returns the sums over a step by way and pass."""
    args.device = options.find_device(args.device)
    ways = WAYS if on_gpu(args) else {"exact": WAYS["exact"]}
    name = torch.cuda.get_device_name() if on_gpu(args) else platform.machine()
    print(f"{name}, torch {torch.__version__}, batch {args.batch_size}; microseconds a call")
    heading = "".join(f"{f'{way} {what}':>15}" for way in ways for what in PASSES)
    print(f"{'layers':>6}  {'shape':24}{heading}")
    sums = {way: dict.fromkeys(PASSES, 0.0) for way in ways}
    for k, (shape, layers) in enumerate(shapes(args).items()):
        cells, calls = "", passes(args, shape)
        for way, (deterministic, chosen) in ways.items():
            cudnn = {"enabled": True, "deterministic": deterministic, "benchmark": chosen}
            for what, call in calls.items():
                with torch.backends.cudnn.flags(**cudnn, allow_tf32=True):
                    taken = microseconds(args, call)
                if k or what != "input":  # nothing needs the gradient of the images
                    sums[way][what] += layers * taken
                cells += f"{taken:15.1f}"
        before, after, side, kernel, stride = shape
        text = f"{before} to {after}, {side}x{side}, {kernel}x{kernel}/{stride}"
        print(f"{layers:6}  {text:24}{cells}", flush=True)
    for way, taken in sums.items():
        total = sum(taken.values())
        parts = ", ".join(f"{what} {t / total:.0%}" for what, t in taken.items())
        print(f"{way}: {total / 1e3:.2f} ms a step: {parts}")
    return sums


if __name__ == "__main__":
    runs.run_stage(main, flags())
