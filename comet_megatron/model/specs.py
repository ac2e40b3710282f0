"""Which modules a CoMeT layer is built from (Megatron ModuleSpec)."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from comet_megatron.model.attention import PrefixCoreAttention, PrefixSelfAttention
from comet_megatron.model.layer import CometLayer
from comet_megatron.model.norm import RMSNorm


def stored_prefixes() -> dict[str, str]:
    """Prefixes of a layer's parameters -> under which checkpoints hold them, whatever modules a layer is built from."""
    return dict(get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map)


def local_layer_spec(*, qk_norm: bool) -> ModuleSpec:
    """Megatron's own torch layers, with ours in their places."""
    spec = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
    spec.module = CometLayer
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    layer.self_attention.module = PrefixSelfAttention
    attention = layer.self_attention.submodules
    attention.core_attention = PrefixCoreAttention
    attention.q_layernorm = attention.k_layernorm = RMSNorm if qk_norm else None
    return spec
