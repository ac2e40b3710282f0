"""Attention of a chunk over its slots and itself: torch's kernels and Transformer Engine's, against fp32 in full."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from comet_megatron.backend.device import select_device
from comet_megatron.testing.gpu import MACHINE, require_backend

if MACHINE.cuda.is_there:
    select_device(0)
from comet_megatron.model.architectures import build_transformer_config  # noqa: E402
from comet_megatron.model.attention import PrefixCoreAttention  # noqa: E402
from comet_megatron.model.specs import layer_spec  # noqa: E402
from comet_megatron.testing.tiny import layout_alone, tiny_architecture  # noqa: E402

ROWS, HEADS, GROUPS, HEAD_DIM = 2816, 16, 8, 128
SLOTS = (0, 512, 2560)


def tensors(slots: int, dtype: torch.dtype, rows: int = ROWS):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((rows, HEADS), (slots + rows, GROUPS), (slots + rows, GROUPS))
    made = [torch.randn(n, 1, h, HEAD_DIM, generator=generator, device="cuda") for n, h in shapes]
    return [t.to(dtype).requires_grad_() for t in made]


def in_full(query, key, value):
    """fp32, every score."""
    q, k, v = (t.float().permute(1, 2, 0, 3) for t in (query, key, value))
    k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device="cuda").tril(k.shape[2] - q.shape[2])
    scores = (q @ k.transpose(2, 3) / HEAD_DIM**0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def core(backend: str, dtype: torch.dtype):
    require_backend(backend)
    precision = "fp32" if dtype == torch.float32 else "bf16"
    sizes = {"num_attention_heads": HEADS, "num_query_groups": GROUPS, "head_dim": HEAD_DIM}
    architecture = tiny_architecture().__class__(**{**vars(tiny_architecture()), **sizes})
    config = build_transformer_config(architecture, tp=1, sequence_parallel=False, precision=precision)
    if backend == "torch":
        return PrefixCoreAttention(config)
    from megatron.core.transformer.enums import AttnMaskType

    kind = layer_spec(qk_norm=True, backend="te").submodules.self_attention.submodules.core_attention
    return kind(config, 1, AttnMaskType.causal, "self", pg_collection=layout_alone().groups).cuda()


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.bfloat16), ("te", torch.bfloat16), ("torch", torch.float32)]
)
def test_output_and_gradients_equal_full_attention(backend, dtype, slots):
    query, key, value = tensors(slots, dtype)
    out = core(backend, dtype)(query, key, value)
    grad = torch.randn_like(out)
    out.backward(grad)
    exact = [t.detach().float().requires_grad_() for t in (query, key, value)]
    want = in_full(*exact)
    want.backward(grad.float())
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    for found, wanted in ((out, want), *((a.grad, b.grad) for a, b in zip((query, key, value), exact, strict=True))):
        assert (found.float() - wanted).abs().max() < tolerance * wanted.abs().max()


@pytest.mark.parametrize("rows", [1, 77, 2816])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torch_never_takes_the_kernel_that_makes_all_scores(dtype, slots, rows):
    query, key, value = tensors(slots, dtype, rows)
    attention = core("torch", dtype)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        attention(query, key, value).sum().backward()
    operators = {event.key for event in seen.key_averages()}
    assert not any("attention_math" in name for name in operators), operators
    wanted = ("flash_attention", "cudnn_attention") if dtype == torch.bfloat16 else ("efficient_attention",)
    assert any(word in name for name in operators for word in wanted), operators


@pytest.mark.parametrize("backend", ["torch", "te"])
def test_no_score_matrix_is_allocated(backend):
    query, key, value = tensors(2560, torch.bfloat16)
    attention = core(backend, torch.bfloat16)
    attention(query, key, value).sum().backward()  # kernels and their workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention(query, key, value).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    scores = HEADS * ROWS * (ROWS + 2560) * 2
    assert peak < scores, f"{peak / 2**20:.0f} MiB; all scores in bf16 are {scores / 2**20:.0f}"
