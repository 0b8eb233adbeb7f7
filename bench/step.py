"""Network-steps per second of the training step, alternatives side by side in one run.

    python bench/step.py                               ResNet-20, 128 random images of 32x32
    python bench/step.py --dataset FOLDER --rows 1,2,4,10 --count 500 --json step.json

loader    what one writes first, and what the paper's time ran: torchvision transforms in a
          DataLoader, torch.optim.SGD, the mask multiplied in (autocast to bfloat16 on a GPU)
resident  the same loop with data and augmentation on the device
then the engines of engine.py, with BatchNorm by torch (plain) or fused, and several rows; on a GPU
the graph also as --fast has it (fast) and with torch's BatchNorm (plain-graph), beside the exact
one. Each figure is the median of --repeats timings, taken in turns so that what else the machine
does falls on all alike; warm-up is apart. The user's loops run in processes of their own, without
what the stages set for theirs (`runs.keep_freed_memory`). The last column is the share of the
ceiling: the time that the convolutions' FLOP take at the rate of a large matrix product in this
run, or the time that the tensors read and written by convolutions and BatchNorm take at the rate
of a large copy, whichever is longer, over the time measured. Also: where the time of a step goes,
by kernel; the part outside forward and backward; on a GPU memory, how busy the host is, and the
time to evaluate 50,000 images.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import engine
import loading
import options
import runs as files
from common import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.Settings):
    """What is measured: the data set "random" is 10,000 random images of CIFAR's shape."""

    classes: int = options.option("classes of random images", 10, options.positive)
    rows: tuple[int, ...] = options.option("networks side by side", (1, 4), options.numbers)
    repeats: int = options.option("timings", 5, options.positive)
    count: int = options.option("steps in a timing; 0: 128 on a GPU, else 8", 0, options.count)
    only: str = options.option(
        "part of loader,resident,plain,eager,graph,fast,plain-graph", "", str
    )
    json: str = options.option("a file for all that was measured", "", str)
    serve: str = options.option("for the process of a user's loop: its name", "", str)

    @classmethod
    def complete(cls, given: dict) -> "Settings":
        return super().complete({"dataset": "random", "preset": "cifar10"} | given)


def flags() -> options.SettingsParser:
    return options.SettingsParser(Settings, __doc__)


def make_study(s: Settings) -> Study:
    handed_in = options.NOTHING
    if s.dataset == "random":
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (10000, 32, 32, 3), dtype=np.uint8)
        names = ("train_images", "train_labels", "test_images", "test_labels")
        labels = np.arange(10000) % s.classes
        arrays = dict(zip(names, (images, labels, images, labels), strict=True))
        handed_in = options.HandedIn(data=loading.as_arrays(arrays))
    study = common.prepare(s, __file__, handed_in)
    return study.replace(count=s.count or (128 if study.device.type == "cuda" else 8))


class Plain:
    """A user's own loop: the model, its masks, torch.optim.SGD."""

    def __init__(self, study: Study):
        self.model = study.model.build().to(study.device)
        self.model.load_state_dict(study.initial_state_dict(0))
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
    def __init__(self, data: engine.Data):
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


def loader(study: Study):
    plain, device = Plain(study), study.device
    cores = len(os.sched_getaffinity(0))
    batches = torch.utils.data.DataLoader(
        Pictures(study.data), study.settings.batch_size, shuffle=True, drop_last=True,
        persistent_workers=True, num_workers=min(cores, 8), pin_memory=device.type == "cuda",
    )  # fmt: skip

    def endless():
        while True:
            yield from batches

    source = endless()

    def run(steps: int) -> None:
        for _ in range(steps):
            x, y = (v.to(device, non_blocking=True) for v in next(source))
            plain.step(x, y)

    return run


def resident(study: Study):
    plain, s, data, device = Plain(study), study.settings, study.data, study.device
    crop = (s.batch_size, s.pad, s.flip, device)

    def run(steps: int) -> None:
        for step in range(steps):
            i = torch.randint(len(data.train_labels), (s.batch_size,), device=device)
            [crops] = engine.draw_crops((1, 2), step, step + 1, *crop)
            x = engine.augment.definition(data.train_images, i, crops, data.scale, data.shift)
            plain.step(x.contiguous(), data.train_labels[i])

    return run


LOOPS = {"loader": loader, "resident": resident}


def serve(study: Study) -> None:
    """The child of `apart`: for every number of steps on stdin, the seconds of each on stdout."""
    run = LOOPS[study.settings.serve](study)
    for line in sys.stdin:
        print(seconds(run, int(line), study.device), flush=True)


def apart(name: str):
    """A loop of the user's in a process of its own; gives the seconds of each step."""
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", name]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(steps: int) -> float:
        print(steps, file=child.stdin, flush=True)
        return float(child.stdout.readline())

    return run


def ours(study: Study, name: str, rows: int):
    """Steps of engine.train; one training goes on through all timings."""
    fast = name == "fast"
    study = study.replace(engine="graph" if name in GRAPHS else "eager")
    numerics = {"enabled": True, "benchmark": fast, "deterministic": not fast}
    numerics["allow_tf32"] = fast or study.settings.precision == "bf16"
    networks = study.networks(rows)
    for r in range(rows):
        networks.load(r, study.initial_state_dict(r))
        networks.mask[r] = torch.rand(networks.mask.shape[1], device=study.device) < 0.5
    streams = [study.stream(r) for r in range(rows)]
    reports = frozenset(range(0, 10**5, study.settings.count)) | {WARM}
    t = study.training(networks, streams, 0, 10**5, engine.step_schedule(0.1, ()), reports)
    steps, done = engine.train(t), 0

    @contextlib.contextmanager
    def batch_norm():
        fused = common.batch_norm_relu
        common.batch_norm_relu = fused.definition if name.startswith("plain") else fused
        yield
        common.batch_norm_relu = fused

    def run(count: int) -> int:
        nonlocal done
        first = done
        with batch_norm(), torch.backends.cudnn.flags(**numerics):
            while done < first + count:
                done = next(steps)
        return done - first

    return run


WARM = 10
GRAPHS = ("graph", "fast", "plain-graph")


def kernels(run, steps: int, count: int = 12) -> dict[str, float]:
    """The kernels (on a CPU: the operations) that take most of the time of a step, with the parts
    they take of what the profiler saw."""
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run(steps)
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {e.key: getattr(e, name) for e in profiler.key_averages()}
    times = {k[:100]: v for k, v in times.items() if v and not k.startswith("ProfilerStep")}
    calls = sum(e.count for e in profiler.key_averages() if getattr(e, name)) / steps
    print(f"{calls:.0f} {'kernels' if cuda else 'operations'} in a step, counted by the profiler")
    first = sorted(times, key=times.get, reverse=True)[:count]
    return {k: times[k] / sum(times.values()) for k in first}


def on_gpu(study: Study, runs: dict) -> dict:
    """Measured on a GPU only: the host's part of the time, memory, evaluation of 50,000 images by
    four networks."""
    run = runs[max(runs, key=lambda name: name.startswith("graph x1"))]
    began, busy = time.perf_counter(), time.process_time()
    torch.cuda.reset_peak_memory_stats()  # what the ways side by side hold, and no more
    seconds(run, study.settings.count, study.device)
    busy = (time.process_time() - busy) / (time.perf_counter() - began)
    networks, device = study.networks(4), study.device
    draw = np.random.default_rng(1)
    images = torch.from_numpy(draw.integers(0, 256, (50000, 32, 32, 3), dtype=np.uint8))
    examples = images.to(device), torch.zeros(50000, dtype=torch.int64, device=device)

    def evaluate(_: int) -> None:
        engine.evaluate(networks, study.data, *examples)

    times = [seconds(evaluate, 1, device) for _ in range(5)]
    memory = torch.cuda.max_memory_allocated() / 1e9
    evaluation = {"evaluate_50000_by_4_seconds": statistics.median(times)}
    return {"host_busy": busy, **evaluation, "memory_gb": memory}


def matrix_rate(s: Settings) -> float:
    """FLOP/s of a large matrix product in the precision of the step."""
    device = torch.device(s.device)
    n = 8192 if device.type == "cuda" else 3072
    dtype = torch.bfloat16 if s.precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda _: a @ b, 1, device) for _ in range(8)]
    return 2 * n**3 / statistics.median(times[3:])


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    a = torch.randn((1 << 29) if device.type == "cuda" else (1 << 26), device=device)
    b = torch.empty_like(a)
    times = [seconds(lambda _: b.copy_(a), 1, device) for _ in range(8)]
    return 8 * a.numel() / statistics.median(times[3:])


class Traffic(TorchDispatchMode):
    """Counts the bytes that convolutions, BatchNorm and the head read and write, each input and
    output once; what lies between them can be done on the way."""

    OPS = ("convolution", "batch_norm", "addmm", "mm")

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if any(name in str(op) for name in self.OPS):
            outputs = out if isinstance(out, tuple) else (out,)
            tensors = [t for t in (*args, *outputs) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in tensors)
        return out


def work(study: Study) -> tuple[float, int]:
    """FLOP of a network-step (three times those of a forward pass), and its bytes (`Traffic`)."""
    from torch.utils.flop_counter import FlopCounterMode

    data, bf16 = study.data, study.settings.precision == "bf16"
    networks, size = study.networks(1), study.settings.batch_size
    [module] = networks.bf16_modules() if bf16 else networks.modules
    x = engine.normalise(data, data.train_images[:size])
    x = x.bfloat16() if bf16 else x
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    with Traffic() as traffic:
        loss = F.cross_entropy(module(x).float(), data.train_labels[:size])
        torch.autograd.grad(loss, list(module.parameters()))
    return 3.0 * counter.get_total_flops(), traffic.bytes


def seconds(run, steps: int, device: torch.device) -> float:
    """Of each of so many steps (or of the steps that `run` says it took, or as a process of its
    own measured them), the device's work included."""
    began = time.perf_counter()
    taken = run(steps)
    if isinstance(taken, float):
        return taken
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / (taken if isinstance(taken, int) else steps)


def main(s: Settings) -> dict | None:
    study = make_study(s)
    s, device = study.settings, study.device
    cuda = device.type == "cuda"
    if s.serve:
        return serve(study)
    ways = dict(LOOPS)
    for name in ("plain", "eager", *(GRAPHS if cuda else ())):
        for rows in s.rows:
            ways[f"{name} x{rows}"] = (name, rows)
    chosen = s.only.split(",") if s.only else [k.split()[0] for k in ways]
    runs, timings, starts = {}, {}, {}
    for name, way in ways.items():
        if name.split()[0] in chosen:
            began = time.perf_counter()
            runs[name] = apart(name) if name in LOOPS else ours(study, *way)
            seconds(runs[name], WARM if cuda else 2, device)
            starts[name], timings[name] = time.perf_counter() - began, []
            print(f"{name}: warm in {starts[name]:.1f} s", file=sys.stderr)
    for _ in range(s.repeats):  # in turns
        for name, run in runs.items():
            timings[name].append(seconds(run, s.count, device))
            line = f"{name}: {1e3 * timings[name][-1]:.2f} ms a step"
            print(line, file=sys.stderr, flush=True)
    matrix, copy = matrix_rate(s), copy_rate(device)
    flop, moved = work(study)
    ceiling = max(flop / matrix, moved / copy)
    table = {}
    for name, taken in timings.items():
        rows = int(name.split("x")[-1]) if " x" in name else 1
        table[name] = {"ms": 1e3 * statistics.median(taken), "rows": rows}
        rate = rows / statistics.median(taken)
        table[name] |= {"network_steps_per_second": rate, "of_ceiling": rate * ceiling}
        table[name]["seconds_to_start"] = starts[name]
    base = table.get("loader", next(iter(table.values())))["network_steps_per_second"]
    print(f"{'':22}      ms  network-steps/s   ratio  of ceiling  s to start")
    for name, row in table.items():
        rate = row["network_steps_per_second"]
        line = f"{row['ms']:8.2f}  {rate:15.1f}  {rate / base:6.2f}  {row['of_ceiling']:10.1%}"
        print(f"{name:22}{line}  {row['seconds_to_start']:10.1f}")
    fastest = max(table, key=lambda name: (table[name]["rows"] == 1, -table[name]["ms"]))
    parts = kernels(runs[fastest], s.count)
    print(f"where a step of {fastest} spends its time:")
    for name, part in parts.items():
        print(f"{part:7.1%}  {name}")
    measured = {
        "device": torch.cuda.get_device_name()
        if cuda
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "network": f"{study.model.name}, batch {s.batch_size}, {study.data.name}",
        "precision": s.precision,
        "gflop_per_step": flop / 1e9,
        "gb_moved_per_step": moved / 1e9,
        "matrix_tflops": matrix / 1e12,
        "copy_gb_per_second": copy / 1e9,
        **(on_gpu(study, runs) if cuda else {}),
        "table": table,
        "kernels": parts,
    }
    rest = {k: v for k, v in measured.items() if k not in ("table", "kernels")}
    print(json.dumps(rest, indent=1))
    if s.json:
        Path(s.json).write_text(json.dumps(measured, indent=1) + "\n")
    return measured


if __name__ == "__main__":
    if "--serve" in sys.argv:
        main(flags().parse_args())
    else:
        files.run_stage(main, flags())
