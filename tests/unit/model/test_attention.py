"""The chunk's attention on CPU equals softmax over a bottom-right causal mask: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from comet_megatron.backend.device import select_device

select_device(0)  # prepares Megatron-Core for this machine before its modules are imported

from comet_megatron.model import prefix_attention_cpu  # noqa: E402
from comet_megatron.model.attention import PrefixCoreAttention  # noqa: E402
from comet_megatron.model.prefix_attention_cpu import is_supported, prefix_attention  # noqa: E402

#            rows, slots, batch, heads, groups, head_dim
SIZES = [
    (40, 24, 2, 8, 4, 16),
    (40, 0, 2, 8, 4, 16),
    (7, 600, 1, 4, 4, 64),
    (1, 5, 1, 6, 2, 8),
    (1, 0, 1, 2, 1, 8),
    (333, 97, 1, 14, 2, 64),
]
every_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))


def draw(sizes, dtype=torch.float32):
    rows, slots, batch, heads, groups, head_dim = sizes
    torch.manual_seed(0)
    shapes = [(rows, batch, heads, head_dim)] + 2 * [(slots + rows, batch, groups, head_dim)]
    return [torch.randn(s).to(dtype) for s in shapes], torch.randn(shapes[0]).to(dtype)


def with_mask(query, key, value, scale=None):
    """The definition, in the dtype of its arguments."""
    slots, group_size = len(key) - len(query), query.shape[2] // key.shape[2]
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    k, v = (t.repeat_interleave(group_size, dim=1) for t in (k, v))
    mask = torch.ones(len(query), len(key), dtype=torch.bool).tril(slots)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).permute(2, 0, 1, 3)


def values_and_gradients(attention, tensors, grad, **options):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def worst_error(got, want):
    """Over the largest value of each tensor."""
    pairs = ((g.double(), w.double()) for g, w in zip(got, want, strict=True))
    return max(((g - w).abs().max() / w.abs().max().clamp_min(1e-12)).item() for g, w in pairs)


@every_size
@pytest.mark.parametrize("scale", [None, 0.3])
def test_prefix_attention_is_as_exact_as_the_masked_one(sizes, scale):
    tensors, grad = draw(sizes)
    assert is_supported(tensors[0])
    exact = values_and_gradients(with_mask, [t.double() for t in tensors], grad.double(), scale=scale)
    plain = values_and_gradients(with_mask, tensors, grad, scale=scale)
    got = values_and_gradients(prefix_attention, tensors, grad, scale=scale)
    assert worst_error(got, exact) < max(2 * worst_error(plain, exact), 1e-6)


@every_size
def test_prefix_attention_in_bf16_is_as_exact_as_the_masked_one(sizes):
    tensors, grad = draw(sizes, torch.bfloat16)
    want = values_and_gradients(with_mask, [t.double() for t in tensors], grad.double())
    plain = values_and_gradients(with_mask, tensors, grad)
    got = values_and_gradients(prefix_attention, tensors, grad)
    assert all(t.dtype == torch.bfloat16 for t in got)
    assert worst_error(got, want) < max(1.5 * worst_error(plain, want), 8e-3)


def test_prefix_attention_takes_strided_queries_keys_and_gradients():
    (query, key, value), grad = draw((20, 12, 2, 8, 4, 16))
    strided = [torch.stack([t, t], dim=-2)[..., 0, :] for t in (query, key, value)]
    assert not any(t.is_contiguous() for t in strided)
    want = values_and_gradients(prefix_attention, (query, key, value), grad)
    leaves = [t.detach().requires_grad_() for t in strided]
    out = prefix_attention(*leaves)
    got = [out, *torch.autograd.grad(out, leaves, torch.stack([grad, grad], dim=-2)[..., 0, :])]
    assert worst_error(got, want) == 0


@pytest.mark.parametrize("slots", [0, 24])
def test_core_attention_gives_the_same_where_the_kernel_is_missing(monkeypatch, slots):
    tensors, grad = draw((40, slots, 2, 8, 4, 16))
    core = PrefixCoreAttention.__new__(PrefixCoreAttention)
    torch.nn.Module.__init__(core)
    core.scale = None
    heads_apart = grad.flatten(2)
    fast = values_and_gradients(core, tensors, heads_apart)
    monkeypatch.setattr(prefix_attention_cpu, "_FORWARD", None)
    assert not is_supported(tensors[0])
    assert worst_error(values_and_gradients(core, tensors, heads_apart), fast) < 2e-6


def test_control_an_own_log_sum_exp_instead_of_the_merged_one_is_seen_in_the_gradients(monkeypatch):
    tensors, grad = draw((40, 24, 2, 8, 4, 16))
    want = values_and_gradients(with_mask, tensors, grad)
    monkeypatch.setattr(torch, "logaddexp", lambda own, prefix: own)
    assert worst_error(values_and_gradients(prefix_attention, tensors, grad), want) > 1e-2
