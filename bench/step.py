"""Network-steps per second of the training step, alternatives side by side in one run.

    python bench/step.py                               ResNet-20, 128 random images of 32x32
    python bench/step.py --dataset FOLDER --rows 1,2,4,10 --steps 500 --out bench/step.json

loader    what one writes first, and what the paper's time ran: torchvision transforms in a
          DataLoader, torch.optim.SGD, the mask multiplied in (autocast to bfloat16 on a GPU)
resident  the same loop with data and augmentation on the device
then the engines of common.py, and on a GPU the graph without the compiler, and several rows. Each
figure is the median of --repeats timings, taken in turns so that what else the machine does falls
on all alike; warm-up and compilation are not timed. Also: the part of the step outside forward and
backward, the rate of a matrix product and of a copy in this run; on a GPU memory, how busy the host
is, and the time to evaluate 50,000 images.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


def flags() -> common.Parser:
    parser = common.flags(__doc__)
    parser.set_defaults(dataset="random", out=None, batch_size=128, depth=20, width=16)
    parser.add_argument("--classes", type=common.positive, default=10, help="of random images [10]")
    parser.add_argument("--rows", type=common.numbers, default=(1, 4), help="networks [1,4]")
    parser.add_argument("--repeats", type=common.positive, default=5, help="timings [5]")
    told = "comma-separated part of loader,resident,eager,compiled,graph-eager,graph [all]"
    parser.add_argument("--only", default="", help=told)
    return parser


def random_data(classes: int, device: torch.device) -> common.Data:
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.integers(0, 256, (10000, 32, 32, 3), dtype=np.uint8)).to(device)
    labels = torch.from_numpy(draw.integers(0, classes, 10000)).to(device)
    scaling = (torch.full((3,), v, device=device) for v in (1 / 64, -2.0))
    names = [str(c) for c in range(classes)]
    return common.Data("random", images, labels, images, labels, names, "", *scaling)


class Plain:
    """A user's own loop: the model, its masks, torch.optim.SGD."""

    def __init__(self, args: argparse.Namespace, data: common.Data):
        self.args, self.data = args, data
        self.model = common.make_model(args, data).to(args.device)
        common.initialise(self.model, common.generator(0, "init"))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, 0.9, weight_decay=1e-4)
        weights = [p for p in self.model.parameters() if p.dim() > 1]
        self.masks = [(p, (torch.rand_like(p) < 0.5).float()) for p in weights]

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.no_grad():
            for p, mask in self.masks:
                p.mul_(mask)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Pictures(torch.utils.data.Dataset):
    def __init__(self, data: common.Data):
        import torchvision.transforms as T
        from PIL import Image

        self.images = [Image.fromarray(x) for x in data.train_images[:10000].cpu().numpy()]
        self.labels = data.train_labels.tolist()
        normalise = T.Normalize((0.5,) * 3, (0.25,) * 3)
        crop = T.RandomCrop(32, padding=4)
        self.transform = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[i]), self.labels[i]


def loader(args: argparse.Namespace, data: common.Data):
    plain = Plain(args, data)
    cores = len(os.sched_getaffinity(0))
    batches = torch.utils.data.DataLoader(
        Pictures(data), args.batch_size, shuffle=True, drop_last=True, persistent_workers=True,
        num_workers=min(cores, 8), pin_memory=args.device.type == "cuda",
    )  # fmt: skip

    def endless():
        while True:
            yield from batches

    source = endless()

    def run(steps: int) -> None:
        for _ in range(steps):
            x, y = (v.to(args.device, non_blocking=True) for v in next(source))
            plain.step(x, y)

    return run


def resident(args: argparse.Namespace, data: common.Data):
    plain, key = Plain(args, data), torch.tensor([1, 2], device=args.device)
    scaling = (data.scale, data.shift, args.pad, args.flip)

    def run(steps: int) -> None:
        for s in range(steps):
            i = torch.randint(len(data.train_labels), (args.batch_size,), device=args.device)
            step = torch.full((1,), s, device=args.device)
            x = common.augment.definition(data.train_images, i, key, step, *scaling)
            plain.step(x.contiguous(), data.train_labels[i])

    return run


def engine(args: argparse.Namespace, data: common.Data, name: str, rows: int):
    """Steps of common.train under an engine; one training goes on through all timings."""
    args = argparse.Namespace(**vars(args) | {"engine": name.removesuffix("-eager")})
    networks = common.Networks(common.make_model(args, data), rows, args.device)
    for r, module in enumerate(networks.modules):
        common.initialise(module, common.generator(0, "init", r))
        networks.mask[r] = torch.rand(networks.mask.shape[1], device=args.device) < 0.5
    streams = [common.make_stream(args, data, r) for r in range(rows)]
    reports = frozenset(range(0, 10**5, args.steps)) | {WARM}
    constant = common.step_schedule(0.1, ())
    t = common.Training(args, data, networks, streams, 0, 10**5, constant, reports)
    steps, done = common.train(t), 0
    if name == "graph-eager":
        forward_loss, eager = common.forward_loss, common.forward_loss("eager")
        common.forward_loss = lambda _: eager
        done = next(steps)
        common.forward_loss = forward_loss

    def run(count: int) -> int:
        nonlocal done
        first = done
        while done < first + count:
            done = next(steps)
        return done - first

    return run


WARM = 10


def loop_share(args: argparse.Namespace, data: common.Data) -> float:
    """The part of a step on a CPU that is not forward and backward, by a clock around these two."""
    inside = 0.0

    def timed(function):
        def call(*given):
            nonlocal inside
            began = time.perf_counter()
            result = function(*given)
            inside += time.perf_counter() - began
            return result

        return call

    forward_loss, grad = common.forward_loss, torch.autograd.grad
    common.forward_loss = lambda name: timed(forward_loss(name))
    torch.autograd.grad = timed(grad)
    run = engine(args, data, "compiled", 1)
    run(2)
    inside, began = 0.0, time.perf_counter()
    run(args.steps)
    whole = time.perf_counter() - began
    common.forward_loss, torch.autograd.grad = forward_loss, grad
    return 1 - inside / whole


def on_card(args: argparse.Namespace, data: common.Data, runs: dict) -> dict:
    """What only a GPU is asked: the host's part of the time, memory, evaluation of 50,000 images by
    four networks."""
    run = runs[max(runs, key=lambda name: name.startswith("graph x1"))]
    began, busy = time.perf_counter(), time.process_time()
    torch.cuda.reset_peak_memory_stats()  # what the ways side by side hold, and no more
    seconds(run, args.steps, args.device)
    busy = (time.process_time() - busy) / (time.perf_counter() - began)
    networks = common.Networks(common.make_model(args, data), 4, args.device)
    draw = np.random.default_rng(1)
    images = torch.from_numpy(draw.integers(0, 256, (50000, 32, 32, 3), dtype=np.uint8))
    whole = (networks, data, images.to(args.device), torch.zeros(50000).long().to(args.device))
    times = [seconds(lambda _: common.evaluate(*whole), 1, args.device) for _ in range(5)]
    memory = torch.cuda.max_memory_allocated() / 1e9
    told = {"host_busy": busy, "evaluate_50000_by_4_seconds": statistics.median(times)}
    return told | {"memory_gb": memory}


def matrix_rate(args: argparse.Namespace) -> float:
    """FLOP/s of a large matrix product in the precision of the step."""
    n = 8192 if args.device.type == "cuda" else 3072
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=args.device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda _: a @ b, 1, args.device) for _ in range(8)]
    return 2 * n**3 / statistics.median(times[3:])


def copy_rate(args: argparse.Namespace) -> float:
    """Bytes read and written per second by a large copy."""
    a = torch.randn((1 << 29) if args.device.type == "cuda" else (1 << 26), device=args.device)
    b = torch.empty_like(a)
    times = [seconds(lambda _: b.copy_(a), 1, args.device) for _ in range(8)]
    return 8 * a.numel() / statistics.median(times[3:])


def flop(args: argparse.Namespace, data: common.Data) -> float:
    """Of one network-step: three times the multiplications and additions of a forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    model = common.make_model(args, data)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, data.train_images.shape[3], *data.train_images.shape[1:3]))
    return 3.0 * counter.get_total_flops() * args.batch_size


def seconds(run, steps: int, device: torch.device) -> float:
    """Of each of so many steps (or of the steps that `run` says it took), the device's work
    included."""
    began = time.perf_counter()
    taken = run(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / (taken if isinstance(taken, int) else steps)


def main(args: argparse.Namespace) -> dict:
    args.device = common.find_device(args.device)
    cuda = args.device.type == "cuda"
    args.precision = {"auto": "bf16" if cuda else "fp32"}.get(args.precision, args.precision)
    args.steps = args.steps or (128 if cuda else 8)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    args.momentum, args.weight_decay, args.pad, args.flip, args.seed = 0.9, 1e-4, 4, True, 0
    random = args.dataset == "random"
    data = (
        random_data(args.classes, args.device)
        if random
        else common.load_data(args.dataset, args.data_dir, args.device)
    )
    ways = {"loader": loader, "resident": resident}
    for name in ("eager", "compiled", *(("graph-eager", "graph") if cuda else ())):
        for rows in args.rows:
            ways[f"{name} x{rows}"] = (name, rows)
    chosen = args.only.split(",") if args.only else [k.split()[0] for k in ways]
    runs, timings = {}, {}
    for name, way in ways.items():
        if name.split()[0] in chosen:
            if callable(way):
                runs[name] = way(args, data)
            else:
                runs[name] = engine(args, data, *way)
            began = time.perf_counter()
            seconds(runs[name], WARM if cuda else 2, args.device)
            print(f"{name}: warm in {time.perf_counter() - began:.1f} s", file=sys.stderr)
            timings[name] = []
    for _ in range(args.repeats):  # in turns
        for name, run in runs.items():
            timings[name].append(seconds(run, args.steps, args.device))
            told = f"{name}: {1e3 * timings[name][-1]:.2f} ms a step"
            print(told, file=sys.stderr, flush=True)
    work, matrix, copy = flop(args, data), matrix_rate(args), copy_rate(args)
    table = {}
    for name, taken in timings.items():
        rows = int(name.split("x")[-1]) if " x" in name else 1
        table[name] = {"ms": 1e3 * statistics.median(taken), "rows": rows}
        table[name]["network_steps_per_second"] = rows / statistics.median(taken)
    base = table.get("loader", next(iter(table.values())))["network_steps_per_second"]
    print(f"{'':22}      ms  network-steps/s   ratio  of matrix rate")
    for name, row in table.items():
        rate = row["network_steps_per_second"]
        row["of_matrix_rate"] = rate * work / matrix
        told = f"{row['ms']:8.2f}  {rate:15.1f}  {rate / base:6.2f}  {row['of_matrix_rate']:14.1%}"
        print(f"{name:22}{told}")
    told = {
        "device": torch.cuda.get_device_name()
        if cuda
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "network": f"ResNet-{args.depth}, width {args.width}, batch {args.batch_size}, {data.name}",
        "precision": args.precision,
        "gflop_per_step": work / 1e9,
        "matrix_tflops": matrix / 1e12,
        "copy_gb_per_second": copy / 1e9,
        **(
            on_card(args, data, runs)
            if cuda
            else {"outside_forward_and_backward": loop_share(args, data)}
        ),
        "table": table,
    }
    print(json.dumps({k: v for k, v in told.items() if k != "table"}, indent=1))
    if args.out:
        args.out.write_text(json.dumps(told, indent=1) + "\n")
    return told


if __name__ == "__main__":
    common.run_stage(main, flags())
