"""What the stages share: presets, randomness, data, ResNet, Networks, training, run directories."""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

# ---- randomness ----------------------------------------------------------------------------------

PURPOSES = ("init", "order", "augment", "subset", "noise", "sample")
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


def philox(key: Tensor, counter: Tensor) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011): key (2,) and counter (..., 4) int64 that hold 32-bit
    words -> (..., 4) int64 random words. The same on every device, and in csrc/math.h."""
    k0, k1 = key[0], key[1]
    c0, c1, c2, c3 = counter.unbind(-1)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products: wrap-around keeps every bit
        c0, c1 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD
        c2, c3 = (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return torch.stack([c0, c1, c2, c3], -1)


# ---- the four operations that csrc/ fuses: their definitions -------------------------------------


def fused(definition: Any) -> Any:
    """Calls the compiled form of `definition` where csrc/ is there and built, else `definition`."""

    @functools.wraps(definition)
    def call(*args, **kwargs):
        ops = csrc_ops()
        return (
            getattr(ops, definition.__name__)(*args, **kwargs)
            if ops
            else definition(*args, **kwargs)
        )

    call.definition = definition
    return call


@functools.cache
def csrc_ops() -> Any:
    """`torch.ops.datadiet`, or None without csrc/ or without a compiler."""
    try:
        import csrc
    except ImportError:
        return None
    return csrc.load()


@fused
def masked_sgd_(
    weights: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    mask: Tensor,
    lr: Tensor,
    mu: float,
    weight_decay: float,
    low: Tensor | None = None,
) -> None:
    """One SGD step of every row, in place; pruned weights and their velocities become exactly 0.

    weights, momentum (R, D) float32; gradient (R, D) float32 or bfloat16, zeroed behind the step;
    mask (R, P) bool over the first P <= D columns; lr (1,) or (R,) float32 on the same device; low
    (R, D) bfloat16 receives a rounded copy of the new weights.
    """
    prunable = mask.shape[1]
    lr = lr[:, None]
    step = gradient.to(weights.dtype) + weight_decay * weights
    momentum.mul_(mu).add_(step)
    momentum[:, :prunable].masked_fill_(~mask, 0)
    weights.sub_(lr * momentum)
    weights[:, :prunable].masked_fill_(~mask, 0)
    gradient.zero_()
    if low is not None:
        low.copy_(weights)


@fused
def example_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, 0-1 error and EL2N norm ||softmax - onehot||_2 (Definition 2.1) per example.

    logits (N, C) float, labels (N,) int64 in [0, C) -> three (N,) float32 (float64 for float64
    logits). Ties for the largest logit go to the lowest class; a NaN counts as an error.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p = logits.log_softmax(-1)
    picked = labels[:, None]
    loss = -log_p.gather(1, picked)[:, 0]
    error = (logits.argmax(-1) != labels) | logits.isnan().any(
        -1
    )  # argmax takes the first of equals
    residual = log_p.exp().scatter_add(1, picked, torch.full_like(loss, -1.0)[:, None])
    return loss, error.to(loss.dtype), residual.norm(dim=-1)


@fused
def loss_barrier(
    middle: Tensor, first: Tensor, second: Tensor, labels: Tensor, alphas: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Barrier of every example between two networks: loss at (1 - a) first + a second minus the
    same mixture of the losses at the two ends (not clipped), likewise for the 0-1 error.

    middle (A, N, C) logits of the interpolated networks, first and second (N, C) of the ends,
    labels (N,) int64, alphas (A,) float32 -> loss (A, N), error (A, N), and their suprema over a,
    each (N,).
    """
    ends = [example_losses.definition(x, labels)[:2] for x in (first, second)]
    mids = [example_losses.definition(x, labels)[:2] for x in middle]
    a = alphas.to(ends[0][0].dtype)[:, None]
    loss, error = (
        torch.stack([m[i] for m in mids]) - ((1 - a) * ends[0][i] + a * ends[1][i]) for i in (0, 1)
    )
    return loss, error, loss.amax(0), error.amax(0)


@fused
def augment(
    images: Tensor,
    indices: Tensor,
    key: Tensor,
    step: Tensor,
    scale: Tensor,
    shift: Tensor,
    pad: int,
    flip: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A training batch: random crop out of a border of `pad` black pixels, random flip, normalise.

    images (N, H, W, C) uint8, indices (B,) int64, key (2,) int64 and step (1,) int64 for `philox`
    (slot b of the batch draws from counter (b, step, 0, 0): words 0 and 1 crop, word 2 flips),
    scale and shift (C,) float32 with pixel * scale + shift the normalised value -> (B, C, H, W)
    channels-last, float32 or bfloat16.
    """
    height, width = images.shape[1:3]
    slot = torch.arange(len(indices), device=images.device)
    zero = torch.zeros_like(slot)
    words = philox(key, torch.stack([slot, step.expand_as(slot), zero, zero], -1))
    up, left = (words[:, :2] * (2 * pad + 1) >> 32).sub_(pad).unbind(-1)
    x = torch.arange(width, device=images.device).expand(len(indices), width)
    if flip:
        x = torch.where((words[:, 2] & 1)[:, None] > 0, width - 1 - x, x)
    x = x + left[:, None]
    y = torch.arange(height, device=images.device) + up[:, None]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    pixels = images[indices[:, None, None], y[:, :, None], x[:, None, :]] * inside[..., None]
    return (pixels * scale + shift).to(dtype).permute(0, 3, 1, 2)
