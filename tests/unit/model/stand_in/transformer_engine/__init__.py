"""A stand-in for Transformer Engine that computes in torch on CPU, for one process: it tests our calls.

Signatures, FP8 contexts, the weight cache and the checks of shapes follow transformer_engine 2.11 (its sources, read).
FP8 is emulated: operands are rounded to float8 with one scale each (e4m3 forward, e5m2 for gradients), products are
exact. `LOG` remembers each call of a Linear. It says nothing about the real kernels: tests/gpu is for those.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import types
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

__version__ = "2.11.0"
LOG: list[dict] = []
ROUNDS = True  # False: FP8 operands keep their values, so that nothing but the plumbing differs from bf16


class FP8GlobalStateManager:
    FP8_ENABLED, FP8_RECIPE, RECOMPUTE, PHASE, FIRSTS = False, None, False, False, []

    @classmethod
    def is_fp8_enabled(cls):
        return cls.FP8_ENABLED

    @classmethod
    def get_fp8_recipe(cls):
        return cls.FP8_RECIPE


@contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    state = FP8GlobalStateManager
    before = state.FP8_ENABLED, state.FP8_RECIPE
    state.FP8_ENABLED, state.FP8_RECIPE = enabled, fp8_recipe
    yield
    state.FP8_ENABLED, state.FP8_RECIPE = before


class activation_recompute_forward:
    """As the real one: its first half makes the cache ready for a backward, its second takes a first half off."""

    def __init__(self, activation_recompute=False, recompute_phase=False):
        self.enabled, self.phase = activation_recompute, recompute_phase

    def __enter__(self):
        state = FP8GlobalStateManager
        state.RECOMPUTE, state.PHASE = self.enabled and state.is_fp8_enabled(), self.phase
        if self.enabled and not self.phase:
            state.FIRSTS.append(True)
        if self.enabled and self.phase:
            state.FIRSTS.pop(0)

    def __exit__(self, *details):
        FP8GlobalStateManager.RECOMPUTE = FP8GlobalStateManager.PHASE = False


class _Recipe:
    def __init__(self, fp8_format=None, fp8_dpa=False):
        assert not fp8_dpa
        self.fp8_format = fp8_format


Float8CurrentScaling = type("Float8CurrentScaling", (_Recipe,), {"multiple": 16})
MXFP8BlockScaling = type("MXFP8BlockScaling", (_Recipe,), {"multiple": 32})
Float8BlockScaling = type("Float8BlockScaling", (_Recipe,), {"multiple": 128})


def _round(x, dtype):
    if not ROUNDS or dtype is None:
        return x
    scale = torch.finfo(dtype).max / x.float().abs().max().clamp_min(1e-12)
    return ((x.float() * scale).to(dtype).float() / scale).to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, inp, bias, cached, has_columns, fp8):
        own = _round(inp, torch.float8_e4m3fn if fp8 else None)
        ctx.save_for_backward(own, cached)
        ctx.has_columns, ctx.fp8, ctx.bias = has_columns, fp8, bias is not None
        return F.linear(own, cached, bias)

    @staticmethod
    def backward(ctx, grad):
        inp, cached = ctx.saved_tensors
        rounded = _round(grad, torch.float8_e5m2 if ctx.fp8 else None)
        grad_input = None
        if ctx.needs_input_grad[1]:
            assert ctx.has_columns, "the FP8 weight has no transposed half for the backward"
            grad_input = rounded @ cached
        flat = rounded.reshape(-1, rounded.shape[-1])
        grad_weight = flat.T @ inp.reshape(-1, inp.shape[-1]) if ctx.needs_input_grad[0] else None
        return grad_weight, grad_input, grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.bias else None, None, None, None


class _Module(nn.Module):
    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0


class Linear(_Module):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ):
        super().__init__()
        assert tp_group is None or tp_group.size() == 1, "the stand-in is for one process"
        assert not sequence_parallel and not return_bias
        self.parallel_mode, self.use_bias, self.fuse_wgrad_accumulation = parallel_mode, bias, fuse_wgrad_accumulation
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        init_method(self.weight)
        self.weight.tensor_model_parallel, self.weight.partition_dim = True, 1 if parallel_mode == "row" else 0
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype, device=device))
        else:
            self.bias = torch.Tensor().to(dtype=params_dtype, device=device)
        self.cache, self.save_original_input = None, save_original_input

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        state, fp8 = FP8GlobalStateManager, FP8GlobalStateManager.FP8_ENABLED
        LOG.append({"module": self, "fp8": fp8, "rows": len(inp) * inp.shape[1], "first": is_first_microbatch})
        cached, has_columns = self.weight.detach(), True
        if fp8:
            recipe = state.get_fp8_recipe()
            assert (len(inp) * inp.shape[1]) % recipe.multiple == 0, "rows of an FP8 product"
            assert all(n % recipe.multiple == 0 for n in self.weight.shape), "widths of an FP8 product"
            wants_columns = torch.is_grad_enabled() and inp.requires_grad
            wants_columns = wants_columns or (state.RECOMPUTE and not state.PHASE)
            cached, has_columns = self._weight_for(recipe, is_first_microbatch, wants_columns)
        return _Linear.apply(self.weight, inp, self.bias if self.use_bias else None, cached, has_columns, fp8)

    def _weight_for(self, recipe, is_first, wants_columns):
        """TransformerEngineBaseModule.get_weight_workspace: a blockwise cache that lacks a half is not made anew."""
        fresh = _round(self.weight.detach(), torch.float8_e4m3fn)
        if is_first is None:
            return fresh, wants_columns
        if (
            self.cache is not None
            and wants_columns
            and not self.cache[1]
            and not isinstance(recipe, Float8BlockScaling)
        ):
            self.cache = None
        if self.cache is None:
            self.cache = (fresh.clone(), wants_columns)
        elif is_first:
            self.cache = (fresh.clone(), self.cache[1])
        return self.cache


class RMSNorm(_Module):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        device=None,
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DotProductAttention(_Module):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        softmax_scale=None,
        softmax_type="vanilla",
        return_max_logit=False,
    ):
        super().__init__()
        assert attention_dropout == 0.0 and qkv_format == "sbhd" and window_size is None
        self.heads, self.groups, self.scale = num_attention_heads, num_gqa_groups, softmax_scale

    def forward(self, query_layer, key_layer, value_layer, attention_mask=None, *, attn_mask_type=None):
        assert attention_mask is None and attn_mask_type == "causal_bottom_right"
        n, b, heads, d = query_layer.shape
        assert (heads, key_layer.shape[2]) == (self.heads, self.groups)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query_layer, key_layer, value_layer))
        mask = causal_lower_right(n, len(key_layer))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=heads != k.shape[1])
        return out.permute(2, 0, 1, 3).reshape(n, b, heads * d)


# Other names are there for Megatron-Core's imports only; its optimizer finds none of Transformer Engine's.


class _Rest(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


_CONTENTS = {
    "common.recipe": {
        "Format": types.SimpleNamespace(E4M3="e4m3", HYBRID="hybrid"),
        "Float8CurrentScaling": Float8CurrentScaling,
        "MXFP8BlockScaling": MXFP8BlockScaling,
        "Float8BlockScaling": Float8BlockScaling,
    },
    "pytorch": {
        "Linear": Linear,
        "RMSNorm": RMSNorm,
        "DotProductAttention": DotProductAttention,
        "fp8_autocast": fp8_autocast,
    },
    "pytorch.fp8": {"FP8GlobalStateManager": FP8GlobalStateManager, "fp8_autocast": fp8_autocast},
    "pytorch.distributed": {"activation_recompute_forward": activation_recompute_forward},
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        ours, _, inner = fullname.partition(".")
        if ours != __name__ or inner == "pytorch.optimizers" or not inner.rpartition(".")[2].islower() or "._" in inner:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec):
        return _Rest(spec.name)

    def exec_module(self, module):
        vars(module).update(_CONTENTS.get(module.__name__.partition(".")[2], {}))


sys.meta_path.insert(0, _Finder())
for _name in ("common.recipe", "pytorch.distributed", "pytorch.ops"):  # which Megatron takes as attributes
    importlib.import_module(f"{__name__}.{_name}")
