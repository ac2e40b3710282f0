"""Self-attention in which memory slots are a K/V prefix: keys and values for slots and rows, queries for rows only.

Shapes: rows [n, b, h]; slots [m, b, h]; heads are this rank's. Causal inside the chunk, every row sees every slot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from comet_megatron.model.prefix_attention_cpu import is_supported, prefix_attention
from comet_megatron.model.rotary import Rotary


class PrefixCoreAttention(MegatronModule):
    """softmax(QK^T)V with a bottom-right causal mask, on torch's scaled_dot_product_attention or its CPU kernel."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **kwargs: object) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [n, b, heads, d], key and value [m + n, b, groups, d] -> [n, b, heads * d]."""
        n, b, heads, head_dim = query.shape
        if is_supported(query):
            return prefix_attention(query, key, value, self.scale).view(n, b, heads * head_dim)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = heads != key.shape[2]
        if len(key) == n:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        else:
            mask = causal_lower_right(n, len(key))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).reshape(n, b, heads * head_dim)


class PrefixSelfAttention(SelfAttention):
    """Megatron's self-attention with memory slots as a prefix of keys and values."""

    def memory_key_value(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised slots [m, b, h], whole on each tensor-parallel rank -> keys, values [m, b, groups, d].

        Only the K and V rows of the fused linear_qkv weight are used (per group: queries, then K, then V). Without
        sequence parallelism the gradient of the slots is summed over the tensor-parallel ranks here, each of which
        uses its own heads; with it the layer has done so before the norm.
        """
        groups, head_dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        if not self.config.sequence_parallel and self.pg_collection.tp.size() > 1:
            slots = tensor_parallel.copy_to_tensor_model_parallel_region(slots, group=self.pg_collection.tp)
        weight = self.linear_qkv.weight
        hidden = weight.shape[-1]
        kv_weight = weight.view(groups, -1, hidden)[:, -2 * head_dim :].reshape(groups * 2 * head_dim, hidden)
        key_value = F.linear(slots, kv_weight)
        if self.linear_qkv.bias is not None:
            key_value = key_value + self.linear_qkv.bias.view(groups, -1)[:, -2 * head_dim :].reshape(-1)
        key, value = key_value.view(*slots.shape[:2], groups, 2 * head_dim).split(head_dim, dim=3)
        return (key if self.k_layernorm is None else self.k_layernorm(key)), value

    def forward(self, rows: Tensor, slots: Tensor | None, rotary: Rotary) -> tuple[Tensor, Tensor | None]:
        """Attention of a chunk.

        Args:
            rows: normalised rows [n / sequence shards, b, h].
            slots: normalised memory slots [m, b, h], or None.
            rotary: positions 0..m+n-1.

        Returns:
            Output [n / sequence shards, b, h] and the projection's bias, if it has one.
        """
        query, key, value = self.get_query_key_value_tensors(rows)
        query = rotary.tail(len(query)).apply(query)
        if slots is not None:
            memory_key, memory_value = self.memory_key_value(slots)
            key, value = torch.cat([memory_key, key]), torch.cat([memory_value, value])
        key = rotary.apply(key)
        return self.linear_proj(self.core_attention(query, key, value))
