"""The gate of the MLP as one autograd node equals silu(gate) * up, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from comet_megatron.model.gated_silu import gated_silu


def plain(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def value_and_gradient(function, x, grad):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return y.detach(), *torch.autograd.grad(y, x, grad)


@pytest.mark.parametrize("shape", [(70, 2, 64), (1, 1, 2)])
def test_equals_the_plain_gate(shape):
    x, grad = 3 * torch.randn(shape), torch.randn(*shape[:-1], shape[-1] // 2)
    for got, want in zip(value_and_gradient(gated_silu, x, grad), value_and_gradient(plain, x, grad), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_bf16_is_as_exact_as_the_plain_gate():
    x, grad = (3 * torch.randn(70, 2, 64)).bfloat16(), torch.randn(70, 2, 32).bfloat16()
    exact = value_and_gradient(plain, x.double(), grad.double())
    pairs = zip(value_and_gradient(gated_silu, x, grad), value_and_gradient(plain, x, grad), exact, strict=True)
    for got, unfused, want in pairs:
        assert got.dtype == torch.bfloat16
        error, allowed = ((t.double() - want).abs().max() for t in (got, unfused))
        assert error <= 1.5 * allowed
