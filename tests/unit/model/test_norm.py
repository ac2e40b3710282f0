"""RMSNorm's one node on CPU equals torch's own, and is as exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from comet_megatron.backend.device import select_device

select_device(0)  # prepares Megatron-Core for this machine before its modules are imported

from comet_megatron.model.norm import rms_norm  # noqa: E402


def torch_rms_norm(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def values_and_gradients(norm, x, weight, grad, eps):
    x, weight = x.detach().requires_grad_(), weight.detach().clone().requires_grad_()
    y = norm(x, weight, eps)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def worst_error(got, want):
    """Over the largest value of each tensor."""
    pairs = ((g.double(), w.double()) for g, w in zip(got, want, strict=True))
    return max(((g - w).abs().max() / w.abs().max()).item() for g, w in pairs)


def draw(shape, size=1.0, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(shape) * size).to(dtype), (torch.rand(shape[-1]) + 0.5).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize(
    ("shape", "size", "eps"),
    [
        ((70, 2, 512), 1.0, 1e-6),
        ((70, 2, 4, 64), 1.0, 1e-6),
        ((70, 2, 512), 1e-3, 1e-6),  # eps is as large as the mean square
        ((64, 1, 512), 1e-3, 1e-12),
        ((1, 1, 8), 1.0, 1.1920929e-07),
    ],
)
def test_values_and_gradients_are_as_exact_as_torch(shape, size, eps):
    x, weight, grad = draw(shape, size)
    want = values_and_gradients(torch_rms_norm, x.double(), weight.double(), grad.double(), eps)
    assert worst_error(values_and_gradients(rms_norm, x, weight, grad, eps), want) < 5e-7


def test_bf16_computes_in_fp32_and_rounds_once():
    x, weight, grad = draw((70, 2, 512), dtype=torch.bfloat16)
    want = values_and_gradients(torch_rms_norm, x.double(), weight.double(), grad.double(), 1e-6)
    got = values_and_gradients(rms_norm, x, weight, grad, 1e-6)
    assert all(t.dtype == torch.bfloat16 for t in got)
    assert worst_error(got, want) <= 2**-8


def test_heads_that_lie_apart_in_memory():
    x, weight, grad = draw((70, 2, 4, 64))
    apart = torch.cat([x, x], dim=-1)[..., :64]
    assert not apart.is_contiguous()
    want = values_and_gradients(rms_norm, x, weight, grad, 1e-6)
    got = values_and_gradients(rms_norm, apart, weight, torch.cat([grad, grad], dim=-1)[..., :64], 1e-6)
    assert worst_error(got, want) < 2e-7


def test_a_row_of_zeros_stays_finite():
    x, weight, grad = draw((3, 1, 8))
    x[1] = 0
    assert all(t.isfinite().all() for t in values_and_gradients(rms_norm, x, weight, grad, 1e-6))


def test_control_another_eps_is_seen():
    x, weight, grad = draw((70, 2, 512), 1e-3)
    want = values_and_gradients(torch_rms_norm, x, weight, grad, 1e-6)
    assert worst_error(values_and_gradients(rms_norm, x, weight, grad, 1e-5), want) > 0.1
