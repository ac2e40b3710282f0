"""Which modules a CoMeT layer is built from (Megatron ModuleSpec): torch's, or Transformer Engine's.

The only place that takes Megatron's Transformer Engine modules. Both kinds have the same parameters under the same
names, so that a checkpoint of one loads in the other: norms and matrices are modules of their own, not fused.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from comet_megatron.model.attention import PrefixCoreAttention, PrefixSelfAttention
from comet_megatron.model.layer import CometLayer
from comet_megatron.model.norm import RMSNorm


def stored_prefixes() -> dict[str, str]:
    """Prefixes of a layer's parameters -> under which checkpoints hold them, whatever modules a layer is built from."""
    return dict(get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map)


def layer_spec(*, qk_norm: bool, backend: str) -> ModuleSpec:
    """A layer's modules.

    Args:
        qk_norm: queries and keys are normed.
        backend: torch or te.
    """
    spec = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
    spec.module = CometLayer
    layer = spec.submodules
    layer.self_attention.module = PrefixSelfAttention
    attention = layer.self_attention.submodules
    norm: type = RMSNorm
    attention.core_attention = PrefixCoreAttention
    if backend == "te":
        from megatron.core.extensions import transformer_engine as te

        norm = te.TENorm
        attention.core_attention = _te_core_attention()
        attention.linear_qkv = layer.mlp.submodules.linear_fc1 = te.TEColumnParallelLinear
        attention.linear_proj = layer.mlp.submodules.linear_fc2 = te.TERowParallelLinear
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    attention.q_layernorm = attention.k_layernorm = norm if qk_norm else None
    return spec


def norm_of(spec: ModuleSpec) -> type:
    """The norm of a layer's modules; for the one before the head."""
    return spec.submodules.input_layernorm


def _te_core_attention() -> type:
    """Transformer Engine's attention kernels (flash attention, cuDNN) with the mask that slots as a prefix need."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class PrefixTEAttention(TEDotProductAttention):
        """softmax(QK^T)V with a bottom-right causal mask."""

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """query [n, b, heads, d], key and value [m + n, b, groups, d] -> [n, b, heads * d]."""
            return super().forward(query, key, value, None, AttnMaskType.causal_bottom_right)

    return PrefixTEAttention
