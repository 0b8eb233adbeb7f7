"""BatchNorm over the batch, a residual and ReLU in one, with its gradients."""

from collections.abc import Callable

import torch


def register(library: torch.library.Library) -> None:
    """Shapes for fake tensors; the bare operations have no gradient, what `compiled` gives has."""

    def forward_shapes(x, weight, bias, running_mean, running_var, residual, momentum, eps, relu):
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)

    def backward_shapes(dy, x, y, weight, bias, mean, rstd, relu):
        dresidual = x.new_empty(0) if y is None else torch.empty_like(x)
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), dresidual

    for name, shapes in (("forward", forward_shapes), ("backward", backward_shapes)):
        torch.library.register_fake(f"datadiet::batch_norm_relu_{name}", shapes, lib=library)
        library.impl(f"batch_norm_relu_{name}", torch.library.fallthrough_kernel, "Autograd")


def compiled(definition: Callable) -> Callable:
    """`definition` through the kernels; itself where there are none (float64, layouts other than
    channels-last, devices without them) and for second derivatives.
    """
    forward_op = torch.ops.datadiet.batch_norm_relu_forward.default
    backward_op = torch.ops.datadiet.batch_norm_relu_backward.default
    channels_last = torch.channels_last
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    devices = [d for d in ("cpu", "cuda") if has_kernel(forward_op.name(), d.upper())]

    class BatchNormRelu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, running_mean, running_var, residual, momentum, eps, relu):
            adds = residual is not None
            y, mean, rstd = forward_op(
                x, weight, bias, running_mean, running_var, residual, momentum, eps, relu
            )
            # without a residual, what ReLU lets through is computed again from x
            ctx.save_for_backward(x, weight, bias, mean, rstd, y if relu and adds else None)
            ctx.options = adds, momentum, eps, relu
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, bias, mean, rstd, y = ctx.saved_tensors
            adds, momentum, eps, relu = ctx.options
            dresidual = dy if adds else None
            if torch.is_grad_enabled():  # create_graph=True
                if y is not None:
                    dy = dresidual = torch.where(y <= 0, 0, dy)
                z = definition(x, weight, bias, None, None, None, momentum, eps, relu and y is None)
                inputs = [t for t in (x, weight, bias) if t.requires_grad]
                some = iter(torch.autograd.grad(z, inputs, dy, create_graph=True))
                grads = [next(some) if t.requires_grad else None for t in (x, weight, bias)]
            else:
                dy = dy.contiguous(memory_format=channels_last)
                *grads, masked = backward_op(dy, x, y, weight, bias, mean, rstd, relu)
                dresidual = dresidual if y is None else masked
            return *grads, None, None, dresidual, None, None, None

    def batch_norm_relu(
        x, weight, bias, running_mean, running_var, residual=None, momentum=0.1, eps=1e-5, relu=True
    ):
        fits = (
            x.dtype in (torch.float32, torch.bfloat16)
            and x.dim() == 4
            and x.is_contiguous(memory_format=channels_last)
            and x.device.type in devices
            and weight.dtype is torch.float32
            and x.numel() > weight.numel()  # else the error is torch's
        )
        if fits and residual is not None:
            fits = (
                residual.dtype is x.dtype
                and residual.shape == x.shape
                and residual.is_contiguous(memory_format=channels_last)
            )
        call = BatchNormRelu.apply if fits else definition
        return call(x, weight, bias, running_mean, running_var, residual, momentum, eps, relu)

    return batch_norm_relu
