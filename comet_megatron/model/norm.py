"""RMSNorm that Megatron's layers build: works under sequence parallelism, which Megatron's torch wrapper refuses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last axis.

    Under sequence parallelism the weight is marked so that Megatron sums its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm over the last axis; on CPU, where torch composes it of many passes, one node of few passes."""
    if x.device.type != "cpu":
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return _RMSNormOnCPU.apply(x, weight, eps)


class _RMSNormOnCPU(torch.autograd.Function):
    """In fp32 whatever the dtype. Keeps the input and one number a row."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x * scale, p = n * grad: d_weight = sum of p; d_x = scale * (grad * weight - n * (p @ weight)/h)."""
        x, weight, scale = ctx.saved_tensors
        wide, wide_weight, wide_grad = x.float(), weight.float(), grad.float()
        product = (wide * scale).mul_(wide_grad).view(-1, x.shape[-1])
        grad_weight = product.sum(0)  # adds pairwise; a matrix-vector product is six times less exact
        along = product.mv(wide_weight).view_as(scale).mul_(scale).div_(x.shape[-1])
        grad_x = torch.mul(wide_grad, wide_weight, out=product.view(x.shape)).addcmul_(wide, along, value=-1)
        return grad_x.mul_(scale).to(x.dtype), grad_weight.to(weight.dtype), None
