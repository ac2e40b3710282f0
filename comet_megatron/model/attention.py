"""Self-attention in which memory slots are a K/V prefix: keys and values for slots and rows, queries for rows only.

Shapes: rows [n, b, h]; slots [m, b, h]; heads are this rank's. Causal inside the chunk, every row sees every slot.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from comet_megatron.backend.precision import row_multiple, rows_to_add
from comet_megatron.model.prefix_attention_cpu import is_supported, prefix_attention
from comet_megatron.model.rotary import Rotary

# On a GPU the kernel that builds all scores is never taken; where none of these can compute, torch says why.
FUSED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def pad_rows(rows: Tensor, multiple: int) -> Tensor:
    """Zeros after the last row of [n, b, ...], as many as an FP8 product needs; the caller cuts its output again."""
    added = rows_to_add(len(rows), rows.shape[1], multiple=multiple)
    return rows if not added else F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, added))


def cut_rows(rows: Tensor, count: int) -> Tensor:
    """Without what pad_rows added. A slice of all rows is no slice: its backward would fill and copy a tensor."""
    return rows if len(rows) == count else rows[:count]


class PrefixCoreAttention(MegatronModule):
    """softmax(QK^T)V with a bottom-right causal mask, on torch's scaled_dot_product_attention or its CPU kernel.

    On a GPU: flash attention in bf16, the memory-efficient kernel in fp32; neither builds a mask.
    """

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
        if query.is_cuda and query.dtype == torch.float32 and grouped:  # no flash; the other kernel has no groups
            k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
            grouped = False
        with sdpa_kernel(FUSED_KERNELS) if query.is_cuda else nullcontext():
            if len(key) == n:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
            else:
                mask = causal_lower_right(n, len(key))
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).reshape(n, b, heads * head_dim)


class PrefixSelfAttention(SelfAttention):
    """Megatron's self-attention with memory slots as a prefix of keys and values.

    Under FP8 the rows' products are FP8 and the slots' keys and values bf16: as a product with a part of a weight they
    are out of Transformer Engine's sight. That costs less than it looks (docs/gpu_backends.md) and leaves each module
    one call a chunk, checkpoints as they are, and the memory in bf16.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        # With sequence parallelism rows come padded: another rank's stand behind this one's.
        self.row_multiple = 1 if self.config.sequence_parallel else row_multiple(self.config, self.layer_number - 1)

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
        if self.config.add_qkv_bias:  # without, Transformer Engine's bias is an empty tensor
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
        count = len(rows)
        query, key, value = self.get_query_key_value_tensors(pad_rows(rows, self.row_multiple))
        if not self.config.sequence_parallel:
            query, key, value = (cut_rows(t, count) for t in (query, key, value))
        query = rotary.tail(len(query)).apply(query)
        if slots is not None:
            memory_key, memory_value = self.memory_key_value(slots)
            key, value = torch.cat([memory_key, key]), torch.cat([memory_value, value])
        key = rotary.apply(key)
        attended = self.core_attention(query, key, value)
        out, bias = self.linear_proj(pad_rows(attended, self.row_multiple))
        return cut_rows(out, count), bias
