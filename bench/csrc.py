"""The four operations of csrc/ against PyTorch, side by side in one run.

    python bench/csrc.py [--rounds 50] [--turn 10] [--threads 2]      prints tables for csrc.md

The two sides take turns of ten calls (--turn 1: of one, so that each finds the caches full of the
other's data). The figures are the fastest round, which a busy machine disturbs least, and the ratio
of the medians. On a GPU the clock is CUDA events, and the kernels' rates, on inputs well past the
L2 cache, stand beside a device copy's in the same run.
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
import engine

ROWS, COLUMNS, PRUNABLE = 4, 272_480, 270_896  # ResNet-20, four replicates; rows padded to 16
RESNET20 = [432, *[2304] * 6, 4608, *[9216] * 5, 18432, *[36864] * 5, 512, 2048, 640]  # prunable
RESNET20 += [16] * 14 + [32] * 14 + [64] * 14 + [10]  # BatchNorm and bias
SEED = torch.Generator().manual_seed(0)

# ---- what is compared ----------------------------------------------------------------------------


def normal(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, generator=SEED).to(device)


def sgd_row_matrix(device: str, rows: int = ROWS) -> Callable[[], None]:
    w, m, g = (normal(rows, COLUMNS, device=device) for _ in range(3))
    mask = normal(rows, PRUNABLE, device=device) > 0
    lr = torch.tensor([0.1], device=device)
    return lambda: engine.operations().masked_sgd_(w, m, g, mask, lr, 0.9, 1e-4)


def sgd_torch(
    device: str, sizes: list[int], same_work: bool = False, **kind: bool
) -> Callable[[], None]:
    """torch.optim.SGD and _foreach_mul_ with the masks of the weights. The fused step also masks
    the momentum and clears the gradient: so does this one with `same_work`."""
    weights = [normal(n, device=device).requires_grad_() for _ in range(ROWS) for n in sizes]
    masks = [(normal(len(w), device=device) > 0).float() for w in weights]
    for w in weights:
        w.grad = normal(len(w), device=device)
    optimiser = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=1e-4, **kind)

    @torch.no_grad()
    def step() -> None:
        optimiser.step()
        torch._foreach_mul_(weights, masks)
        if same_work:
            torch._foreach_mul_([optimiser.state[w]["momentum_buffer"] for w in weights], masks)
            optimiser.zero_grad(set_to_none=False)

    return step


def pairs(device: str) -> dict[str, tuple[Callable, Callable]]:
    """name -> (PyTorch, ours)."""
    kind = {"foreach": True} if device == "cpu" else {"fused": True}
    matrix = sgd_row_matrix(device)
    out = {
        f"masked_sgd_, 4 rows; torch: {what}": (sgd_torch(device, sizes, same, **kind), matrix)
        for what, sizes, same in (
            ("4 x 65 tensors, as the networks have", RESNET20, False),
            ("4 flat tensors", [COLUMNS], False),
            ("4 flat tensors, same work", [COLUMNS], True),
        )
    }
    for n, classes in ((50_000, 10), (50_000, 100)):
        x, a, b = (normal(n, classes, device=device) for _ in range(3))
        y = torch.arange(n, device=device) % classes
        for name, args in (("example_losses", (x, y)), ("loss_barrier", (x, a, b, y))):
            out[f"{name}, {n} x {classes}"] = sides(name, args)
    images = torch.randint(0, 256, (50_000, 32, 32, 3), generator=SEED, dtype=torch.uint8)
    indices = torch.randint(0, 50_000, (512,), generator=SEED)
    args = (images, indices, crops(512), torch.rand(3) / 50, torch.rand(3))
    out["augment, 512 of 32x32x3"] = sides("augment", tuple(x.to(device) for x in args))
    return out


def crops(n: int) -> Tensor:
    """Corners up to 4 pixels outside, and flips."""
    corners = torch.randint(-4, 5, (n, 2), generator=SEED)
    return torch.cat([corners, torch.randint(0, 2, (n, 1), generator=SEED)], 1)


def sides(name: str, args: tuple) -> tuple[Callable, Callable]:
    definition, ours = getattr(engine, name).definition, getattr(engine.operations(), name)
    return lambda: definition(*args), lambda: ours(*args)


# ---- clocks --------------------------------------------------------------------------------------


def seconds(call: Callable, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def clock(calls: list[Callable], device: str, rounds: int, turn: int = 10) -> list[list[float]]:
    """Seconds of every round, for each call; `turn` rounds of one, then as many of the next."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds // turn + 1):  # the first turn warms up
        for call, seen in zip(calls, times, strict=True):
            seen += [seconds(call, device) for _ in range(turn)]
    return [seen[turn:] for seen in times]


def compare(device: str, rounds: int, turn: int) -> None:
    print("\n| operation | PyTorch, ms | csrc, ms | ratio | of medians |\n|---|---|---|---|---|")
    for name, calls in pairs(device).items():
        times = clock(list(calls), device, rounds, turn)
        (torchs, ours), (a, b) = map(min, times), map(statistics.median, times)
        ratios = f"{torchs / ours:.1f} | {a / b:.1f}"
        print(f"| {name} | {torchs * 1e3:.3f} | {ours * 1e3:.3f} | {ratios} |")


# ---- a GPU's memory ------------------------------------------------------------------------------


def bandwidth(rounds: int) -> None:
    """GB/s of each kernel beside a device copy of about as many bytes."""
    n, rows, device = 8_000_000, 256, "cuda"
    wide = [normal(n // 10, 100, device=device) for _ in range(3)]
    x = [w.view(n, 10) for w in wide]
    y, y100 = (torch.arange(k, device=device) % c for k, c in ((n, 10), (n // 10, 100)))
    ops = engine.operations()
    images = torch.zeros(50_000, 32, 32, 3, dtype=torch.uint8, device=device)
    affine = torch.rand(3)
    draw = [t.to(device) for t in (torch.randperm(50_000), crops(50_000), affine, affine)]
    calls = {  # name: (bytes it must move, call)
        "copy": (2 * wide[0].nbytes, lambda: wide[1].copy_(wide[0])),
        "masked_sgd_": (
            rows * (24 * COLUMNS + PRUNABLE),
            sgd_row_matrix(device, rows),
        ),
        "example_losses, C 10": (n * 60, lambda: ops.example_losses(x[0], y)),
        "example_losses, C 100": (n // 10 * 420, lambda: ops.example_losses(wide[0], y100)),
        "loss_barrier, C 10": (n * 136, lambda: ops.loss_barrier(*x, y)),
        "loss_barrier, C 100": (n // 10 * 1216, lambda: ops.loss_barrier(*wide, y100)),
        "augment": (images.numel() * 5, lambda: ops.augment(images, *draw)),
    }
    times = clock([call for _, call in calls.values()], device, rounds)
    moved = [size for size, _ in calls.values()]
    rates = [b / statistics.median(t) / 1e9 for b, t in zip(moved, times, strict=True)]
    print("\n| kernel | GB/s | of the copy's |\n|---|---|---|")
    for name, rate in zip(calls, rates, strict=True):
        print(f"| {name} | {rate:.0f} | {rate / rates[0]:.0%} |")


def launches() -> None:
    """Kernels that one optimiser step starts, counted by the profiler."""
    step = sgd_row_matrix("cuda")
    step()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    print(f"\nlaunches per optimiser step: {len(kernels)}")


def main(rounds: int, turn: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, n = {rounds}")
    compare("cpu", rounds, turn)
    if device == "cuda":
        compare("cuda", rounds, turn)
        bandwidth(rounds)
        launches()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x for x in lines if x.startswith("model name")).split(": ")[1]
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--turn", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    main(args.rounds, args.turn)
