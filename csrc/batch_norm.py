"""BatchNorm over the batch, a residual and ReLU in one: shapes, gradients, and what is left to the
definition (float64, layouts other than channels-last, devices without a kernel, second derivatives).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPS = ("batch_norm_relu_forward", "batch_norm_relu_backward")
TYPES = (torch.float32, torch.bfloat16)


def register(library: Any) -> None:
    """Shapes for fake tensors; no gradient through the bare operations, `fused` has it."""

    @torch.library.register_fake("datadiet::batch_norm_relu_forward")
    def _(x, weight, bias, running_mean, running_var, residual, momentum, eps, relu):
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)

    @torch.library.register_fake("datadiet::batch_norm_relu_backward")
    def _(dy, x, y, weight, bias, mean, rstd, relu):
        dresidual = x.new_empty(0) if y is None else torch.empty_like(x)
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), dresidual

    for name in OPS:
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def fused(definition: Callable, devices: tuple[str, ...]) -> Callable:
    """`definition` through the kernels on the device types named, wherever they apply."""
    forward_op = torch.ops.datadiet.batch_norm_relu_forward.default
    backward_op = torch.ops.datadiet.batch_norm_relu_backward.default
    channels_last = torch.channels_last

    class BatchNormRelu(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, x, weight, bias, running_mean, running_var, residual, momentum, eps, relu
        ):
            y, mean, rstd = forward_op(
                x, weight, bias, running_mean, running_var, residual, momentum, eps, relu
            )
            needs_y = relu and residual is not None  # else the mask is computed again from x
            ctx.save_for_backward(x, weight, bias, mean, rstd, y if needs_y else None)
            ctx.rest = residual is not None, momentum, eps, relu
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, bias, mean, rstd, y = ctx.saved_tensors
            adds, momentum, eps, relu = ctx.rest
            if torch.is_grad_enabled():  # create_graph=True
                if y is not None:
                    dy = torch.where(y <= 0, 0, dy)
                z = definition(
                    x, weight, bias, None, None, None, momentum, eps, relu and y is None
                )
                wanted = [t for t in (x, weight, bias) if t.requires_grad]
                found = iter(torch.autograd.grad(z, wanted, dy, create_graph=True))
                dx, dweight, dbias = (
                    next(found) if t.requires_grad else None for t in (x, weight, bias)
                )
                return dx, dweight, dbias, None, None, dy if adds else None, None, None, None
            if not dy.is_contiguous(memory_format=channels_last):
                dy = dy.contiguous(memory_format=channels_last)
            dx, dweight, dbias, dresidual = backward_op(
                dy, x, y, weight, bias, mean, rstd, relu
            )
            if not adds:
                dresidual = None
            elif y is None:
                dresidual = dy
            return dx, dweight, dbias, None, None, dresidual, None, None, None

    apply = BatchNormRelu.apply

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
        if (
            x.dtype in TYPES
            and x.device.type in devices
            and x.dim() == 4
            and x.is_contiguous(memory_format=channels_last)
            and x.numel() > x.shape[1]  # else torch has the error
            and weight.dtype is torch.float32
            and (
                residual is None
                or (
                    residual.dtype is x.dtype
                    and residual.shape == x.shape
                    and residual.is_contiguous(memory_format=channels_last)
                )
            )
        ):
            return apply(
                x, weight, bias, running_mean, running_var, residual, momentum, eps, relu
            )
        return definition(
            x, weight, bias, running_mean, running_var, residual, momentum, eps, relu
        )

    return batch_norm_relu
