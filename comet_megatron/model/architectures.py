"""From a checkpoint's architecture to Megatron's TransformerConfig."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from comet_megatron.backend.precision import Fp8
from comet_megatron.config.schema import Architecture

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of weights and hidden states


def padded_vocabulary(vocab_size: int, *, tp: int) -> int:
    """Rows of the embedding matrix over all tensor-parallel ranks: a multiple of 128 on each."""
    return -(-vocab_size // (128 * tp)) * 128 * tp


def _leave_as_it_is(weight: Tensor) -> Tensor:
    return weight


def build_transformer_config(
    architecture: Architecture, *, tp: int, sequence_parallel: bool, precision: str, fp8: Fp8 | None = None
) -> TransformerConfig:
    """Megatron's config of one pipeline stage.

    Weights are always loaded, so nothing is drawn; but Megatron's initialisation runs, as it is what marks a weight as
    tensor-parallel (without the mark its gradient's norm is counted on one rank only). Gradient accumulation fusion
    stays off here: the K/V prefix uses a slice of linear_qkv's weight, whose gradient Megatron's hook would then drop.
    For the other matrices see CometStage.fuse_weight_gradients.

    Args:
        precision: fp32, bf16 or fp8.
        fp8: where precision is fp8.
    """
    dtype = DTYPES[precision]
    assert (precision == "fp8") == (fp8 is not None), "FP8 has a recipe"
    settings: dict[str, object] = {}
    if fp8 is not None:
        settings = {
            "fp8": fp8.number_format,
            "fp8_recipe": fp8.recipe,
            "first_last_layers_bf16": fp8.bf16_layers > 0,
            "num_layers_at_start_in_bf16": fp8.bf16_layers,
            "num_layers_at_end_in_bf16": fp8.bf16_layers,
            # A blockwise copy that a call without gradients made lacks the transposed half, and is not made anew.
            "disable_parameter_transpose_cache": fp8.recipe == "blockwise",
        }
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.norm_eps,
        init_method_std=architecture.init_std,
        normalization="RMSNorm",
        qk_layernorm=architecture.qk_norm,
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        bf16=precision != "fp32",
        calculate_per_token_loss=True,  # the loss is scaled by the global label count: DDP must sum, not average
        init_method=_leave_as_it_is,
        output_layer_init_method=_leave_as_it_is,
        embedding_init_method=_leave_as_it_is,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **settings,
    )
