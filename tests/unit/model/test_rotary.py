"""Rotation of heads by position: equal to its definition, with the inverse rotation as its backward."""

from __future__ import annotations

import pytest
import torch

from comet_megatron.model.rotary import RotaryTable


@pytest.fixture
def rotary():
    table = RotaryTable(theta=1e4, head_dim=16, dtype=torch.float32, device=torch.device("cpu"))
    return table.first(300)


def by_definition(x, first_position, theta=1e4):
    """Each pair (i, i + d/2) of a head as a complex number, turned by its angle; in fp64."""
    half = x.shape[-1] // 2
    angles = torch.outer(
        torch.arange(first_position, first_position + len(x)).double(),
        theta ** (-torch.arange(half).double() / half),
    )
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("strided", [False, True])
def test_equals_the_definition(rotary, strided):
    x = torch.randn(300, 2, 3, 16)
    given = torch.cat([x, x], dim=-1)[..., :16] if strided else x
    for positions, rows, first in ((rotary, slice(300), 0), (rotary.tail(40), slice(40), 260)):
        got = positions.apply(given[rows]).double()
        torch.testing.assert_close(got, by_definition(x[rows], first), atol=2e-4, rtol=0)


def test_backward_is_the_inverse_rotation(rotary):
    x = torch.randn(300, 2, 3, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(rotary.apply(x), x, rotary.apply(x).detach())
    torch.testing.assert_close(grad, x.detach(), atol=1e-5, rtol=0)


def test_backward_equals_automatic_differentiation(rotary):
    x = torch.randn(300, 1, 2, 16, requires_grad=True)
    upstream = torch.randn_like(x)
    plain = x * rotary.cos + x.roll(8, -1) * rotary.sin
    (want,) = torch.autograd.grad(plain, x, upstream)
    (got,) = torch.autograd.grad(rotary.apply(x), x, upstream)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(rotary.apply(x), plain, atol=1e-6, rtol=0)
