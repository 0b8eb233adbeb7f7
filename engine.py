"""The engine: networks as rows of matrices, their randomness, training, evaluation, checkpoints.

A network of a run is a row of a few matrices (`Networks`). Rewinding copies a row, pruning finds
the smallest live magnitudes of a row, a midpoint is the mean of two rows, the optimizer is one
fused pass over all rows. What a row computes is independent of the other rows trained with it.
This file knows neither flags nor data sets; `csrc/` beside it makes it faster.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import runs
from runs import Run, one_line, signals, warn

# ---- randomness ----------------------------------------------------------------------------------

PURPOSES = ("init", "order", "augment", "subset", "noise", "sample", "shuffle")
WORD = 0xFFFFFFFF  # 32 bits


def seeds(seed: int, purpose: str, replicate: int = 0, child: int = 0) -> np.random.SeedSequence:
    """The root of one random stream: (seed, replicate, child, purpose), nothing global."""
    return np.random.SeedSequence([seed, replicate, child, PURPOSES.index(purpose)])


def generator(seed: int, purpose: str, replicate: int = 0, child: int = 0) -> np.random.Generator:
    """A NumPy generator for draws that are made once: initialisation, subsets, label noise."""
    return np.random.default_rng(seeds(seed, purpose, replicate, child))


def philox_key(seed: int, purpose: str, replicate: int = 0, child: int = 0) -> tuple[int, int]:
    """Two 32-bit words that key `philox` for draws made at every step: data order, augmentation."""
    k0, k1 = seeds(seed, purpose, replicate, child).generate_state(2, np.uint32)
    return int(k0), int(k1)


def philox(key: Tensor | tuple[int, int], counter: Tensor) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011): key (2,) and counter (..., 4) int64 that hold 32-bit
    words -> (..., 4) int64 random words. The same on every device."""
    k0, k1 = key[0], key[1]
    c0, c1, c2, c3 = counter.unbind(-1)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products: wrap-around keeps every bit
        c0, c1 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD
        c2, c3 = (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return torch.stack([c0, c1, c2, c3], -1)


def draw_crops(
    key: tuple[int, int], first: int, last: int, batch: int, pad: int, flip: bool, device
) -> Tensor:
    """The augmentation of steps [first, last): (last - first, batch, 3) int64 of up and left, the
    corner of a random crop out of a border of `pad` pixels, in [-pad, pad], and 1 for a flip.
    Example b of step s draws from the Philox counter (b, s, 0, 0)."""
    example = torch.arange(batch, device=device).expand(last - first, -1)
    step = torch.arange(first, last, device=device)[:, None].expand_as(example)
    zero = torch.zeros_like(example)
    words = philox(key, torch.stack([example, step, zero, zero], -1))
    corner = (words[..., :2] * (2 * pad + 1) >> 32) - pad
    return torch.cat([corner, words[..., 2:3] & int(flip)], -1)


# ---- the operations that csrc/ fuses: their definitions ------------------------------------------

DEFINITIONS: dict[str, Callable] = {}


def fused(definition: Callable) -> Callable:
    """Calls the compiled form of `definition` where csrc/ is there and built, else `definition`."""
    name = definition.__name__
    DEFINITIONS[name] = definition

    @functools.wraps(definition)
    def call(*args, **kwargs):
        return getattr(operations(), name)(*args, **kwargs)

    call.definition = definition
    return call


@functools.cache
def operations() -> Any:
    """A namespace of the operations: compiled, or as defined without csrc/ or a compiler."""
    try:
        import csrc
    except ImportError:
        return SimpleNamespace(**DEFINITIONS)
    return csrc.load(DEFINITIONS) or SimpleNamespace(**DEFINITIONS)


def are_compiled() -> bool:
    """Whether csrc/ is built and in use."""
    return operations().masked_sgd_ is not DEFINITIONS["masked_sgd_"]


@fused
def masked_sgd_(
    weights: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    mask: Tensor,
    lr: Tensor,
    mu: float,
    weight_decay: float,
    weights_bf16: Tensor | None = None,
) -> None:
    """One SGD step of every row, in place; pruned weights and their velocities become exactly 0.

    weights, momentum, gradient (R, D) float32, the gradient zeroed after the step; mask (R, P)
    bool over the first P <= D columns; lr (1,) float32 on the same device; weights_bf16 (R, D)
    bfloat16 receives a rounded copy of the new weights.
    """
    prunable = mask.shape[1]
    momentum.mul_(mu).add_(gradient + weight_decay * weights)
    momentum[:, :prunable].masked_fill_(~mask, 0)
    weights.sub_(lr * momentum)
    weights[:, :prunable].masked_fill_(~mask, 0)
    gradient.zero_()
    if weights_bf16 is not None:
        weights_bf16.copy_(weights)


@fused
def example_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, 0-1 error and EL2N norm ||softmax - onehot||_2 (Definition 2.1) per example.

    logits (N, C) float32, labels (N,) int64 in [0, C) -> three (N,) float32. Ties for the largest
    logit go to the lowest class; a NaN counts as an error.
    """
    log_p = logits.log_softmax(-1)
    picked = labels[:, None]
    loss = -log_p.gather(1, picked)[:, 0]
    wrong = logits.argmax(-1) != labels  # argmax takes the first of equals
    error = wrong | logits.isnan().any(-1)
    residual = log_p.exp().scatter_add(1, picked, torch.full_like(loss, -1.0)[:, None])
    return loss, error.to(loss.dtype), residual.norm(dim=-1)


@fused
def loss_barrier(
    middle: Tensor, first: Tensor, second: Tensor, labels: Tensor, alpha: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Barrier of every example between two networks: the loss at (1 - alpha) first + alpha second
    minus the same mixture of the losses at the two ends (not clipped), likewise for the 0-1 error.

    middle, first, second (N, C) float32 logits of the interpolated network and of the ends, labels
    (N,) int64 -> loss (N,), error (N,).
    """
    ends = [example_losses.definition(x, labels)[:2] for x in (first, second)]
    a = torch.tensor(alpha, dtype=middle.dtype, device=middle.device)
    at_middle = example_losses.definition(middle, labels)[:2]
    loss, error = (m - ((1 - a) * x + a * y) for m, x, y in zip(at_middle, *ends, strict=True))
    return loss, error


@fused
def augment(
    images: Tensor,
    indices: Tensor,
    crops: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A training batch: cropped out of a black border, flipped, normalised.

    images (N, H, W, C) uint8, indices (B,) int64, crops (B, 3) int64 of `draw_crops`, scale and
    shift (C,) float32 with pixel * scale + shift the normalised value -> (B, C, H, W)
    channels-last, float32 or bfloat16.
    """
    height, width = images.shape[1:3]
    up, left, mirrored = crops.unbind(-1)
    x = torch.arange(width, device=images.device).expand(len(indices), width)
    x = torch.where(mirrored[:, None] > 0, width - 1 - x, x) + left[:, None]
    y = torch.arange(height, device=images.device) + up[:, None]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    pixels = images[indices[:, None, None], y[:, :, None], x[:, None, :]] * inside[..., None]
    return (pixels * scale + shift).to(dtype).permute(0, 3, 1, 2)


@fused
def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """BatchNorm in training mode, plus `residual`, then ReLU: y (N, C, H, W).

    x, residual and y (N, C, H, W) float32 or bfloat16, weight, bias and the running statistics
    (C,) float32, the latter two updated in place.
    """
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


# ---- networks as rows ----------------------------------------------------------------------------

CONVOLUTIONS = nn.modules.conv._ConvNd  # of one to three dimensions, transposed ones too
RECURRENT = nn.RNNBase | nn.RNNCellBase
NORMS = nn.modules.batchnorm._BatchNorm
MATRICES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters that pruning ranks, in the module's order: the weights of all
    convolutions, linear layers, attention projections and recurrent layers that are trained."""
    found = set()
    for m in module.modules():
        own = dict(m.named_parameters(recurse=False))
        if isinstance(m, CONVOLUTIONS | nn.Linear | nn.Bilinear):
            found.add(id(own.get("weight")))
        elif isinstance(m, nn.MultiheadAttention):
            found |= {id(own.get(name)) for name in MATRICES}
        elif isinstance(m, RECURRENT):
            found |= {id(p) for name, p in own.items() if name.startswith("weight_")}
    named = module.named_parameters()
    return [name for name, p in named if id(p) in found and p.requires_grad]


def layer_name(parameter: str) -> str:
    """What a mask is called: the layer of a weight, else the parameter's own name."""
    return parameter.removesuffix(".weight")


def padded(n: int) -> int:
    return -(-n // 128) * 128  # rows start on 512 bytes: no kernel is chosen by a row's alignment


@dataclasses.dataclass(frozen=True)
class ParamView:
    """Where a parameter or floating buffer of a module lies in a row."""

    name: str
    shape: torch.Size
    columns: slice
    channels_last: bool  # weights of 2d convolutions lie as (out, kh, kw, in)

    def of(self, row: Tensor) -> Tensor:
        """The part of a row in its own shape, sharing memory."""
        if not (self.channels_last and len(self.shape) == 4):
            return row[self.columns].view(self.shape)
        out, channels, kh, kw = self.shape
        return row[self.columns].view(out, kh, kw, channels).permute(0, 3, 1, 2)


def param_views(
    tensors: Iterable[tuple[str, Tensor]], channels_last: bool, start: int = 0
) -> list[ParamView]:
    views = []
    for name, t in tensors:
        views.append(ParamView(name, t.shape, slice(start, start + t.numel()), channels_last))
        start += t.numel()
    return views


def width_of(views: list[ParamView]) -> int:
    return views[-1].columns.stop if views else 0


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU."""
    return {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}


def strided_pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of stride above 1 as one of stride 1 on every stride-th pixel."""
    rows, columns = conv.stride
    return F.conv2d(x[:, :, ::rows, ::columns], conv.weight, conv.bias)


def overruns(m: nn.Module) -> bool:
    """Whether oneDNN would write the weight gradient of a channels-last convolution past its
    workspace (uxlfoundation/oneDNN #6035: 1x1, strided, fewer input channels than a vector)."""
    plain = isinstance(m, nn.Conv2d) and m.groups == 1 and m.padding in ((0, 0), "valid")
    return plain and m.kernel_size == (1, 1) and max(m.stride) > 1 and m.in_channels < 16


def is_plain(conv: nn.Conv2d) -> bool:
    """Whether a convolution, perhaps of a class derived from nn.Conv2d, computes as that does."""
    calls = ((getattr(conv, k), getattr(nn.Conv2d, k)) for k in ("forward", "_conv_forward"))
    return all(getattr(own, "__func__", None) is theirs for own, theirs in calls)


def avoid_overrun(module: nn.Module) -> None:
    """Replaces, in place, on the CPU, plain convolutions that would overrun by the same function
    without that code."""
    for m in module.modules():
        if overruns(m) and is_plain(m):
            m.forward = functools.partial(strided_pointwise, m)


STATE = ("weights", "momentum", "statistics", "diverged")


class Networks:
    """R networks of one architecture, each a row of a few matrices.

    weights, momentum, gradient (R, D) float32, prunable weights in the first P columns; mask (R, P)
    bool, True where a weight is alive; statistics (R, B) float32, BatchNorm's running statistics
    and whatever else is not trained; diverged (R,) int64, the step at which the loss stopped being
    finite, or -1. `modules[r]` is an ordinary nn.Module whose parameters, gradients and buffers
    are views of row r. Outside the process a network is a state_dict: `state`, `load`.

    `channels_last` says whether images and the weights of 2d convolutions lie so in memory.
    """

    def __init__(
        self, model: nn.Module, rows: int, device: torch.device, channels_last: bool = True
    ):
        prunable = set(prunable_parameters(model))
        named = dict(model.named_parameters())
        trained = {k: p for k, p in named.items() if p.requires_grad}
        fixed = {k: b for k, b in model.named_buffers() if b.is_floating_point()}
        fixed |= {k: p for k, p in named.items() if k not in trained}
        first = param_views(((k, p) for k, p in trained.items() if k in prunable), channels_last)
        width = width_of(first)
        rest = ((k, p) for k, p in trained.items() if k not in prunable)
        self.parameters = first + param_views(rest, channels_last, width)
        self.fixed = param_views(fixed.items(), channels_last)
        self.layers = {layer_name(v.name): v for v in first}
        self.weights = torch.zeros(rows, padded(width_of(self.parameters)), device=device)
        self.momentum = torch.zeros_like(self.weights)
        self.gradient = torch.zeros_like(self.weights)
        self.mask = torch.ones(rows, width, dtype=torch.bool, device=device)
        self.statistics = torch.zeros(rows, padded(width_of(self.fixed)), device=device)
        self.weights_bf16: Tensor | None = None
        self.diverged = torch.full((rows,), -1, device=device)
        self.template, self.channels_last = model, channels_last
        for view in self.fixed:  # a state_dict lacks buffers that are not persistent
            for row in self.statistics:
                view.of(row).copy_(fixed[view.name].detach())
        self.modules = [self.view(r) for r in range(rows)]

    def view(self, row: int, bf16: bool = False) -> nn.Module:
        """A module whose tensors are views of a row; with `bf16`, all trained parameters but those
        of BatchNorm are views of `self.weights_bf16`."""
        module = copy.deepcopy(self.template).train().to(self.weights.device)
        full = {id(p) for m in module.modules() if isinstance(m, NORMS) for p in m.parameters()}
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        for view in self.parameters:
            p = tensors[view.name]
            p.data = view.of(
                (self.weights_bf16 if bf16 and id(p) not in full else self.weights)[row]
            )
            p.grad = None if bf16 else view.of(self.gradient[row])
        for view in self.fixed:
            tensors[view.name].data = view.of(self.statistics[row])
        for m in module.modules():
            if "num_batches_tracked" in m._buffers:
                m.num_batches_tracked = None  # the momentum is fixed: nothing counts
        if self.weights.device.type == "cpu":
            avoid_overrun(module)
        return module

    def bf16_modules(self) -> list[nn.Module]:
        """Modules that compute in bfloat16, BatchNorm in float32, on a copy of the weights (R, D)
        that the update itself writes at every step, so that no step casts."""
        self.weights_bf16 = self.weights.bfloat16()
        return [self.view(r, bf16=True) for r in range(self.rows)]

    def arrange(self, images: Tensor) -> Tensor:
        """(N, C, H, W), channels-last, in the memory layout that the modules take."""
        # A clone, since images of one channel count as contiguous with either order of strides.
        contiguous = torch.contiguous_format
        return images if self.channels_last else images.clone(memory_format=contiguous)

    @property
    def rows(self) -> int:
        return len(self.weights)

    def get(self, rows: slice) -> dict[str, Tensor]:
        """Copies on the CPU of the state of some rows: all that a step reads and writes."""
        return {k: getattr(self, k)[rows].cpu().clone() for k in STATE}

    def put(self, rows: slice, state: dict[str, Tensor]) -> None:
        for k in STATE:
            getattr(self, k)[rows] = state[k].to(self.weights.device)

    def state(self, row: int) -> dict[str, Tensor]:
        """The state_dict of a row: copies on the CPU under the module's names and shapes."""
        return on_cpu(self.modules[row].state_dict())

    @torch.no_grad()
    def load(
        self, row: int, state: dict[str, Tensor], masks: dict[str, Tensor] | None = None
    ) -> None:
        """Row `row` becomes the network of a state_dict that fits, under masks by layer (all alive
        without), its velocity zero."""
        mine = self.modules[row].state_dict()
        for k, v in mine.items():
            v.copy_(state[k])
        self.mask[row] = True if masks is None else self.flat_mask(masks)
        self.apply_mask(row)
        self.diverged[row] = -1
        self.momentum[row], self.gradient[row] = 0, 0

    def set_mask(self, row: int, mask: Tensor) -> None:
        """Row `row` under a mask (P,): what it prunes becomes zero."""
        self.mask[row] = mask.to(self.mask.device)
        self.apply_mask(row)

    def apply_mask(self, row: int) -> None:
        self.weights[row, : self.mask.shape[1]].masked_fill_(~self.mask[row], 0)

    def momentum_state(self, row: int) -> dict[str, Tensor]:
        """The velocities of a row by parameter, on the CPU."""
        return on_cpu({v.name: v.of(self.momentum[row]) for v in self.parameters})

    def set_momentum(self, row: int, state: dict[str, Tensor]) -> None:
        for view in self.parameters:
            view.of(self.momentum[row]).copy_(state[view.name])

    def masks(self, row: int) -> dict[str, Tensor]:
        """The mask of a row by layer, in the shapes of the weights, on the CPU."""
        return on_cpu({name: view.of(self.mask[row]) for name, view in self.layers.items()})

    def flat_mask(self, masks: dict[str, Tensor]) -> Tensor:
        """(P,) on the device of masks by layer, which must be this network's."""
        flat = torch.ones_like(self.mask[0])
        for name, view in self.layers.items():
            view.of(flat).copy_(masks[name])
        return flat


# ---- what a row trains on ------------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    """A data set on the device. Images are (N, H, W, C) uint8, labels (N,) int64."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]
    fingerprint: str  # of all pixels and labels
    scale: Tensor  # (C,) float32: pixel * scale + shift has mean 0 and deviation 1
    shift: Tensor  # over the training images

    @property
    def device(self) -> torch.device:
        return self.train_images.device


@dataclasses.dataclass
class Stream:
    """What one row trains on: the labels (N,), the training examples it may draw (M,), and the
    Philox keys of its data order and of its augmentation."""

    labels: Tensor
    indices: Tensor
    order: tuple[int, int]
    augment: tuple[int, int]


@functools.lru_cache(maxsize=128)
def permutation(key: tuple[int, int], epoch: int, n: int, device: torch.device) -> Tensor:
    """A random order of n examples, the same on every device: argsort of 63-bit Philox draws."""
    i = torch.arange(n, device=device)
    counter = torch.stack([i, 0 * i + epoch, 0 * i, 0 * i], -1)
    words = philox(key, counter)
    return (words[:, 0] << 31 | words[:, 1] >> 1).argsort(stable=True)


def batch_indices(stream: Stream, first: int, last: int, batch_size: int) -> Tensor:
    """Batches of steps [first, last): (last - first, batch_size) indices of training examples. A
    fresh permutation each pass; what is left of a pass after its last full batch is dropped."""
    n = len(stream.indices)
    per_pass = n // batch_size
    passes = range(first // per_pass, (last - 1) // per_pass + 1)
    orders = [permutation(stream.order, e, n, stream.indices.device) for e in passes]
    batches = torch.cat([o[: per_pass * batch_size].view(per_pass, batch_size) for o in orders])
    before = passes.start * per_pass
    return stream.indices[batches[first - before : last - before]]


def step_schedule(lr: float, milestones: tuple[int, ...]) -> Callable[[int], float]:
    """Divides the rate by 10 at each milestone, from the update with that 0-based index on."""
    return lambda step: lr * 0.1 ** sum(step >= m for m in milestones)


# ---- training ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What a training step needs to know, whatever it is part of."""

    batch_size: int
    momentum: float
    weight_decay: float
    pad: int  # border of random crops, in pixels
    flip: bool
    graph: bool  # one CUDA graph a step, else PyTorch's eager mode
    bf16: bool
    checkpoint_every: float  # seconds


Watch = Callable[[Networks, int, Tensor, Tensor, Tensor], None]


@dataclasses.dataclass
class Training:
    """Rows that train side by side from step `start` to step `stop` at the rate `lr_at(step)`.

    `at` names steps to report at. `watch(networks, row, step, indices, logits)` is called for every
    row between backward and update; tensors of its own, rows first, go into `extra`.
    """

    settings: StepSettings
    data: Data
    networks: Networks
    streams: list[Stream]
    start: int
    stop: int
    lr_at: Callable[[int], float]
    at: frozenset[int] = frozenset()
    watch: Watch | None = None
    extra: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@functools.cache
def cuda_streams(device: torch.device) -> list[Any]:
    """All streams that training uses, made once: torch deals 32 in turn, and a later one could be
    the capture stream itself. The first captures and warms up, the others are branches."""
    with torch.cuda.device(device):
        return [torch.cuda.Stream() for _ in range(32)]


class GraphedStep:
    """A step that touches nothing but the device's memory, as a CUDA graph: called three times to
    warm up, then recorded, then replayed, each call a step that counts. Continues without a graph
    where it cannot be recorded."""

    failed: ClassVar[list] = []  # keep failed graphs alive: torch 2.11's allocator refers to them

    def __init__(self, step: Callable[[], None], stream: Any):
        self.step, self.stream, self.calls, self.graph = step, stream, 0, None

    def __call__(self) -> None:
        if self.calls == 3:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                # The outer context puts the stream back where a failed capture does not.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
                ):
                    self.step()
                self.graph = graph
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                self.failed.append(graph)
                warn(f"CUDA graph failed, continuing without: {one_line(e)}")
        self.calls += 1
        if self.graph:
            return self.graph.replay()
        with on_stream(self.stream):  # warming up on the main stream is not allowed
            self.step()
        torch.cuda.current_stream().wait_stream(self.stream)


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Puts work on another stream, after what the current one has queued; None: on this one."""
    if stream is None:
        yield
    else:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield


class GradientTargets:
    """Where the gradients of a module go: into those of its float32 twin, one copy a type."""

    def __init__(self, module: nn.Module, full: nn.Module):
        self.groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for p, q in zip(module.parameters(), full.parameters(), strict=True):
            if p.requires_grad:
                parameters, targets = self.groups.setdefault(p.dtype, ([], []))
                parameters.append(p)
                targets.append(q.grad)

    def backward(self, loss: Tensor) -> None:
        groups = self.groups.values()
        parameters = [p for group, _ in groups for p in group]
        gradients = list(torch.autograd.grad(loss, parameters, materialize_grads=True))
        for _, targets in groups:
            torch._foreach_copy_(targets, gradients[: len(targets)])
            del gradients[: len(targets)]


def train(t: Training, start: int | None = None) -> Iterator[int]:
    """Takes one masked SGD step of every row after the other; yields the number of steps done at
    each step of `t.at` and now and then between.

    A row whose loss stops being finite computes on in its own row; `networks.diverged` says from
    which step on. A step reads and writes the device's memory only (its rate, batches, crops and
    losses lie in tables there) and never waits for it, so that a CUDA graph of one step is every
    step. In a graph the rows are parallel branches.
    """
    s, networks, streams, data = t.settings, t.networks, t.streams, t.data
    step, device = t.start if start is None else start, networks.weights.device
    rows, cuda = networks.rows, device.type == "cuda"
    longest, size = 128 if cuda else 16, s.batch_size  # of the tables, in steps
    modules = networks.bf16_modules() if s.bf16 else networks.modules
    dtype = torch.bfloat16 if s.bf16 else torch.float32
    gradients = [GradientTargets(*pair) for pair in zip(modules, networks.modules, strict=True)]
    rates = torch.tensor([t.lr_at(k) for k in range(t.start, t.stop)], device=device)
    table = functools.partial(torch.zeros, dtype=torch.int64, device=device)
    batches, targets = table(rows, longest, size), table(rows, longest, size)
    crops, losses = table(rows, longest, size, 3), torch.zeros(rows, longest, device=device)
    rate, steps, position = torch.zeros(longest, device=device), table(longest), table(1)
    pool = cuda_streams(device) if s.graph else [None] * 2
    branches = [pool[1 + r % (len(pool) - 1)] for r in range(rows)]

    def one_step() -> None:
        indices, labels, crop = (
            x.index_select(1, position)[:, 0] for x in (batches, targets, crops)
        )
        now = steps.index_select(0, position)
        for r in range(rows):
            with on_stream(branches[r]):
                x = augment(data.train_images, indices[r], crop[r], data.scale, data.shift, dtype)
                logits = modules[r](networks.arrange(x))
                loss = F.cross_entropy(logits.float(), labels[r])
                gradients[r].backward(loss)
                losses[r].index_copy_(0, position, loss.detach()[None])
                if t.watch:
                    t.watch(networks, r, now, indices[r], logits.detach())
        for stream in set(branches) - {None}:
            torch.cuda.current_stream().wait_stream(stream)
        matrices = networks.weights, networks.momentum, networks.gradient, networks.mask
        lr = rate.index_select(0, position)
        masked_sgd_(*matrices, lr, s.momentum, s.weight_decay, networks.weights_bf16)
        position.add_(1)

    do_step = GraphedStep(one_step, pool[0]) if s.graph else one_step
    in_flight: collections.deque = collections.deque()
    while step < t.stop:
        last = min(step + longest, t.stop)
        begin, end = step, next((k for k in range(step + 1, last) if k in t.at), last)
        with signals.deferred():
            for r, stream in enumerate(streams):
                batches[r, : end - begin] = batch_indices(stream, begin, end, size)
                targets[r, : end - begin] = stream.labels[batches[r, : end - begin]]
                drawn = begin, end, size, s.pad, s.flip, device
                crops[r, : end - begin] = draw_crops(stream.augment, *drawn)
            rate[: end - begin] = rates[begin - t.start : end - t.start]
            torch.arange(begin, begin + longest, out=steps)
            position.zero_()
            while step < end and not signals.number:
                do_step()
                step += 1
            note_divergence(networks.diverged, losses[:, : step - begin], begin)
            if cuda:  # two tables in flight at most: the host sleeps, a signal is answered soon
                in_flight.append(torch.cuda.Event(blocking=True))
                in_flight[-1].record()
                if len(in_flight) > 2:
                    in_flight.popleft().synchronize()
            if cuda and (step == t.stop or signals.number):
                torch.cuda.synchronize()  # the clocks of the callers stop here
        yield step
    networks.weights_bf16 = None


def note_divergence(diverged: Tensor, losses: Tensor, first: int) -> None:
    """Writes into `diverged` (R,) the first step at which the losses (R, S) of steps `first`,
    `first` + 1, ... are not finite, for rows where none was."""
    if losses.shape[1]:
        bad = ~losses.isfinite()
        step = first + bad.to(torch.int32).argmax(1)  # the first of equals
        diverged.copy_(torch.where(bad.any(1) & (diverged < 0), step, diverged))


# ---- evaluation ----------------------------------------------------------------------------------


def normalise(data: Data, images: Tensor) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32, channels-last, unaugmented."""
    return (images * data.scale + data.shift).permute(0, 3, 1, 2)


def eval_batch_size(device: torch.device) -> int:
    """Images of one forward pass; 100 are what a CPU's caches hold."""
    return 1000 if device.type == "cuda" else 100


@torch.inference_mode()
def predict(networks: Networks, data: Data, images: Tensor) -> Tensor:
    """Logits (R, N, classes) float32 of unaugmented images (N, H, W, C) uint8, BatchNorm in eval
    mode (running statistics)."""
    logits = []
    for module in networks.modules:
        module.eval()
        for x in images.split(eval_batch_size(images.device)):
            logits.append(module(networks.arrange(normalise(data, x))).float())
        module.train()
    return torch.cat(logits).view(networks.rows, len(images), -1)


def evaluate(
    networks: Networks, data: Data, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, 0-1 error and EL2N norm, each (R, N), of every row on every example."""
    rows = [example_losses(row, labels) for row in predict(networks, data, images)]
    loss, error, norm = (torch.stack(x) for x in zip(*rows, strict=True))
    return loss, error, norm


def accuracy_and_loss(networks: Networks, data: Data) -> tuple[list[float], list[float]]:
    """Accuracy on the test images, a fraction, and mean cross-entropy, of every row."""
    loss, error, _ = evaluate(networks, data, data.test_images, data.test_labels)
    return (error == 0).double().mean(1).tolist(), loss.double().mean(1).tolist()


# ---- training that can be stopped ----------------------------------------------------------------


def fit(
    t: Training,
    group: list[Run],
    phase: str,
    progress: tqdm,
    observe: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains to the end, with checkpoints, from where the last checkpoint of `phase` stands.

    The rows of `t` belong to the runs of the group in equal parts. `observe(step)` is called at
    each step of `t.at`, `t.start` included: once or, after a resume, again.
    """
    networks, share = t.networks, t.networks.rows // len(group)
    parts = [slice(i * share, (i + 1) * share) for i in range(len(group))]
    step, began = t.start, time.perf_counter()
    for run, rows in zip(group, parts, strict=True):
        run.seconds = 0.0
        if saved := run.resume(phase):
            step, run.seconds = saved["step"], saved["seconds"]
            networks.put(rows, saved["networks"])
            for k, v in t.extra.items():
                v[rows] = saved["extra"][k].to(v.device)
    before, saved_at = [run.seconds for run in group], began
    progress.set_description(phase, refresh=False)
    runs.skip(progress, (step - t.start) * networks.rows)
    if step in t.at:
        observe(step)
    for done in train(t, step):
        progress.update((done - step) * networks.rows)
        step, now = done, time.perf_counter()
        for run, seconds in zip(group, before, strict=True):
            run.seconds = seconds + (now - began) / len(group)
        if signals.number or now - saved_at > t.settings.checkpoint_every:
            for run, rows in zip(group, parts, strict=True):
                extra = {k: v[rows].cpu().clone() for k, v in t.extra.items()}
                run.checkpoint(phase, step, {"networks": networks.get(rows), "extra": extra})
            saved_at = now
        if signals.number:
            raise runs.Interrupted(signals.number, f"{phase} step {step} of {t.stop}")
        if step in t.at:
            observe(step)
    # The last update may be the one that goes wrong, and no loss is taken after it.
    finite = networks.weights.isfinite().all(1) & networks.statistics.isfinite().all(1)
    networks.diverged[~finite & (networks.diverged < 0)] = t.stop


def side_by_side(group: list[Run], phase: str) -> list[list[Run]]:
    """Runs that stand at the same step of a phase: these train together."""
    by_step: dict[int, list[Run]] = {}
    for run in group:
        saved = run.resume(phase)
        by_step.setdefault(saved["step"] if saved else -1, []).append(run)
    return list(by_step.values())
