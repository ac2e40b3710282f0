"""Attention of a chunk over its memory slots and itself, on torch's CPU flash kernel without a mask.

With a bottom-right causal mask the kernel computes the masked triangle too, and each layer builds a mask. Here the
slots (which every row sees) and the chunk (causal) are attended to apart, and the two outputs are merged by their
log-sum-exps. The backward calls the kernel's own backward on each part with the merged output and log-sum-exp, which
is exact: given those, a part's gradients do not depend on the other part (as in ring attention, arXiv 2310.01889).

Shapes: n rows, m slots, b batch, d head dimension; P = b * groups problems with r query heads each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

DTYPES = (torch.float32, torch.bfloat16)
_OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"
_FORWARD = getattr(torch.ops.aten, _OPERATOR, None)
_BACKWARD = getattr(torch.ops.aten, f"{_OPERATOR}_backward", None)


def is_supported(query: Tensor) -> bool:
    """Whether this torch has the kernel for such a query."""
    return query.device.type == "cpu" and query.dtype in DTYPES and _FORWARD is not None and _BACKWARD is not None


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(QK^T)V with a bottom-right causal mask.

    Args:
        query: [n, b, heads, d].
        key, value: [m + n, b, groups, d], the slots first.
        scale: of the scores; None: 1 / sqrt(d).

    Returns:
        [n, b, heads, d].
    """
    return _PrefixAttention.apply(query, key, value, scale)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        query, key, value = (t.contiguous() for t in (query, key, value))
        slots, group_size = len(key) - len(query), query.shape[2] // key.shape[2]
        q, k, v = _split_heads(query, group_size), _repeat_heads(key, group_size), _repeat_heads(value, group_size)
        own, own_lse = _FORWARD(q, k[:, :, slots:], v[:, :, slots:], 0.0, True, scale=scale)
        out, lse = torch.empty_like(query), own_lse
        if slots:
            prefix, prefix_lse = _FORWARD(q, k[:, :, :slots], v[:, :, :slots], 0.0, False, scale=scale)
            own_share = torch.sigmoid(own_lse - prefix_lse).unsqueeze(-1)
            lse = torch.logaddexp(own_lse, prefix_lse)
            own = torch.lerp(prefix.float(), own.float(), own_share)
        _split_heads(out, group_size).copy_(own)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, lse = ctx.saved_tensors
        slots, group_size = len(key) - len(query), query.shape[2] // key.shape[2]
        k, v = _repeat_heads(key, group_size), _repeat_heads(value, group_size)
        rows = [_split_heads(t.contiguous(), group_size) for t in (grad_out, query, out)]
        grad_query, grad_key, grad_value = (torch.empty_like(t) for t in (query, key, value))

        def backward_of(part: slice, *, is_causal: bool) -> Tensor:
            grad_q, *grads = _BACKWARD(
                *rows[:2], k[:, :, part], v[:, :, part], rows[2], lse, 0.0, is_causal, scale=ctx.scale
            )
            for whole, grad in zip((grad_key, grad_value), grads, strict=True):
                into = whole[part].flatten(1, 2).transpose(0, 1)
                torch.sum(grad, 1, out=into) if group_size > 1 else into.copy_(grad[:, 0])
            return grad_q

        grad_q = backward_of(slice(slots, None), is_causal=True)
        if slots:
            grad_q = grad_q + backward_of(slice(slots), is_causal=False)
        _split_heads(grad_query, group_size).copy_(grad_q)
        return grad_query, grad_key, grad_value, None


def _split_heads(rows: Tensor, group_size: int) -> Tensor:
    """Contiguous [n, b, groups * r, d] -> a view [P, r, n, d]."""
    n, b, heads, d = rows.shape
    return rows.view(n, b * heads // group_size, group_size, d).permute(1, 2, 0, 3)


def _repeat_heads(key: Tensor, group_size: int) -> Tensor:
    """Contiguous [m + n, b, groups, d] -> a view [P, r, m + n, d] that repeats each group for its query heads."""
    return key.flatten(1, 2).transpose(0, 1).unsqueeze(1).expand(-1, group_size, -1, -1)
