"""Configuration of a CoMeT model (arXiv 2602.01766): the backbone, two memories and the tokens that write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

DEFAULT_ROPE_THETA = 1e4  # of transformers, for every backbone
# Rotary scalings, and what each needs to know.
ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class CometConfig(PretrainedConfig):
    """Sizes of the backbone (Qwen3's keys) and of the memories (the keys of CoMeT's authors).

    The defaults describe a Qwen3 without memory, whose text is cut into chunks that do not see each other.

    Args:
        backbone_model_type: model_type of the backbone (qwen3, qwen2, llama, mistral); a name only.
        qk_norm: queries and keys are normed, as in Qwen3.
        qkv_bias: their projections and that of the values have biases, as in Qwen2.
        rope_theta: base of the rotary embedding, 1e4 where it is not given, as for the backbones in transformers;
            `rope_parameters={"rope_theta": ...}` (transformers 5) is read too.
        rotary_scaling: {"rope_type": "llama3" | "linear", "factor": ...} with the keys of transformers, or None;
            read from `rope_parameters` or `rope_scaling` too. Under a name of its own, as transformers 4 and 5 make
            different things of those.
        chunk_size: text tokens of a chunk; beacons and memory slots come on top.
        placeholder_id: id that stands for a memory slot where a position needs an id; never generated.
        temp_beacon_id: id of the beacon that writes one slot of the temporary memory.
        temp_beacon_stride: text tokens before each such beacon; -1: no temporary memory.
        temp_mem_budget: slots that the temporary memory keeps; the oldest leave first.
        global_beacon_ids: ids of the beacons at the end of a chunk, one for each slot of the global memory;
            empty: no global memory.
        memory_adapter_rank: rank of the low-rank adapters inside the memory nets.

    Raises:
        ValueError: the sizes contradict each other, or ask for a backbone that is not built here.
    """

    model_type = "comet"

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        intermediate_size: int = 22016,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 32,
        head_dim: int = 128,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        backbone_model_type: str = "qwen3",
        qk_norm: bool = True,
        qkv_bias: bool = False,
        rope_theta: float | None = None,
        rotary_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        use_sliding_window: bool = False,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        chunk_size: int = 2048,
        placeholder_id: int | None = None,
        temp_beacon_id: int | None = None,
        temp_beacon_stride: int = -1,
        temp_mem_budget: int = 0,
        global_beacon_ids: Sequence[int] | None = (),
        memory_adapter_rank: int = 8,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        # Not kept as `rope_parameters`: transformers 4 and 5 then read and write the same plain key.
        rope = {**(rope_scaling or {}), **(rope_parameters or {}), **(rotary_scaling or {})}
        self.backbone_model_type = backbone_model_type
        self.qk_norm = qk_norm
        self.qkv_bias = qkv_bias
        self.rope_theta = float(rope.pop("rope_theta", None) or rope_theta or DEFAULT_ROPE_THETA)
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
        self.rotary_scaling = None if rope["rope_type"] == "default" else rope
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.use_sliding_window = use_sliding_window
        self.chunk_size = chunk_size
        self.placeholder_id = placeholder_id
        self.temp_beacon_id = temp_beacon_id
        self.temp_beacon_stride = temp_beacon_stride
        self.temp_mem_budget = temp_mem_budget
        self.global_beacon_ids = list(global_beacon_ids or ())
        self.memory_adapter_rank = memory_adapter_rank
        for key in ("auto_map", "model_type"):  # this class's own, whatever config the keys were taken from
            kwargs.pop(key, None)
        self.auto_map = {
            "AutoConfig": "configuration_comet.CometConfig",
            "AutoModelForCausalLM": "modeling_comet.CometForCausalLM",
        }
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        problems = self._memory_problems() + self._backbone_problems()
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def has_temporary_memory(self) -> bool:
        return self.temp_beacon_stride > 0

    @property
    def has_global_memory(self) -> bool:
        return len(self.global_beacon_ids) > 0

    @property
    def memory_token_ids(self) -> list[int]:
        """Ids that are no text: beacons and the placeholder. They are never generated."""
        ids = [self.placeholder_id, self.temp_beacon_id, *self.global_beacon_ids]
        return sorted({i for i in ids if i is not None and i >= 0})

    def _memory_problems(self) -> list[str]:
        problems = []
        if self.chunk_size < 1:
            problems.append(f"chunk_size={self.chunk_size} must be at least 1 text token")
        stride = self.temp_beacon_stride
        if stride != -1 and stride < 1:
            problems.append(f"temp_beacon_stride={stride} must be at least 1, or -1 for no temporary memory")
        if self.has_temporary_memory and self.temp_mem_budget < 1:
            problems.append(f"temp_mem_budget={self.temp_mem_budget} must be at least 1 slot, or temp_beacon_stride -1")
        if self.has_temporary_memory and self.temp_beacon_id is None:
            problems.append("temp_beacon_id is missing while temp_beacon_stride > 0")
        if len(set(self.global_beacon_ids)) != len(self.global_beacon_ids):
            problems.append("global_beacon_ids holds an id twice")
        if self.memory_adapter_rank < 1:
            problems.append(f"memory_adapter_rank={self.memory_adapter_rank} must be at least 1")
        beyond = [i for i in self.memory_token_ids if i >= self.vocab_size]
        if beyond:
            problems.append(f"beacon or placeholder ids {beyond} are beyond vocab_size={self.vocab_size}")
        return problems

    def _backbone_problems(self) -> list[str]:
        problems = []
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim} must be even for rotary positions")
        rope = self.rotary_scaling
        if rope is not None and rope["rope_type"] not in ROPE_KEYS:
            problems.append(f"rope_type={rope['rope_type']!r} is not built, only default, {', '.join(ROPE_KEYS)}")
        elif rope is not None:
            keys = ROPE_KEYS[rope["rope_type"]]
            problems += [f"rope_type={rope['rope_type']!r} needs the key {k}" for k in keys if not rope.get(k)]
        for key, value, built in (
            ("hidden_act", self.hidden_act, "silu"),
            ("attention_bias", self.attention_bias, False),
            ("attention_dropout", self.attention_dropout, 0.0),
            ("use_sliding_window", self.use_sliding_window, False),
        ):
            if value != built:
                problems.append(f"{key}={value!r} is not built, only {built!r}")
        return problems


CometConfig.register_for_auto_class()
