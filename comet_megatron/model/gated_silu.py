"""The gate of a SwiGLU MLP as one autograd node: keeps its input only, and makes no copies of the halves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last axis: [..., 2f] -> [..., f]."""
    return _GatedSilu.apply(gate_up)


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        torch.mul(grad, activated, out=grad_up)
        grad_activated = torch.mul(grad, up, out=activated)
        torch.ops.aten.silu_backward.grad_input(grad_activated, gate, grad_input=grad_gate)
        return grad_gate_up
