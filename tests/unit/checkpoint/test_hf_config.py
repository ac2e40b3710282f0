"""config.json into sizes and back: every family, as transformers 4 and 5 write it, and what is not built."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comet_megatron.checkpoint.hf_config import FORMATS, architecture_of, hf_config_of, memory_of
from comet_megatron.checkpoint.model_folder import ModelDescription
from comet_megatron.checkpoint.verify import Difference, worst
from comet_megatron.config.schema import RopeScaling, from_dict, to_dict
from comet_megatron.errors import CheckpointError
from comet_megatron.testing.tiny import FAMILIES, tiny_architecture, tiny_memory

# As published, as far as it is read.
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
MISTRAL_7B_V0_1 = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def read(config, **changes):
    return architecture_of({**config, **changes}, where="config.json")


def test_llama_3_with_its_rope_scaling():
    found = read(LLAMA_3_2_1B)
    assert found.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192) and found.rope_theta == 5e5
    assert (found.qk_norm, found.qkv_bias, found.tie_embeddings, found.head_dim) == (False, False, True, 64)


def test_rotary_settings_of_transformers_5_are_the_same():
    rope = {**LLAMA_3_2_1B["rope_scaling"], "rope_theta": 5e5}
    newer = {k: v for k, v in LLAMA_3_2_1B.items() if not k.startswith("rope")}
    assert read(newer, rope_parameters=rope) == read(LLAMA_3_2_1B)


def test_rotary_settings_under_the_old_name_of_the_type_are_read():
    old = {"type": "linear", "factor": 4.0}
    assert read(LLAMA_3_2_1B, rope_scaling=old).rope_scaling == RopeScaling("linear", 4.0)


def test_qwen2_5_has_biases_and_derives_its_head_size():
    found = read(QWEN2_5_7B)
    assert (found.qkv_bias, found.qk_norm, found.head_dim, found.max_positions) == (True, False, 128, 32768)


def test_a_sliding_window_bounds_the_positions_of_a_chunk_where_it_is_on():
    assert read(MISTRAL_7B_V0_1).max_positions == 4096
    assert read(MISTRAL_7B_V0_1, sliding_window=None).max_positions == 32768
    absent = {k: v for k, v in MISTRAL_7B_V0_1.items() if k != "sliding_window"}
    assert read(absent).max_positions == 4096  # the class's default
    assert read(QWEN2_5_7B, use_sliding_window=True, sliding_window=1024).max_positions == 1024


def test_keys_that_may_be_absent_have_their_familys_value():
    bare = {k: v for k, v in LLAMA_3_2_1B.items() if k.startswith(("num_", "hidden_size", "inter", "vocab", "model"))}
    found = architecture_of({k: v for k, v in bare.items() if k != "num_key_value_heads"}, where="c")
    assert (found.num_query_groups, found.max_positions, found.rope_theta, found.tie_embeddings) == (
        32,
        2048,
        10000.0,
        False,
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported.*\n.*qwen3, qwen2, llama, mistral"),
        ({"model_type": None}, "None is not supported"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "'llama3' needs low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "much"}}, "no number"),
        ({"rope_scaling": [1]}, "rotary settings"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rms_norm_eps": "small"}, "no number"),
        ({"max_position_embeddings": float("inf")}, "no number"),
        ({"tie_word_embeddings": "false"}, "neither true nor false"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "rope type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "'linear' needs factor"),
        (
            {"rope_scaling": {**LLAMA_3_2_1B["rope_scaling"], "low_freq_factor": 4.0}},
            "low_freq_factor 4 is not below high_freq_factor",
        ),
    ],
)
def test_what_is_not_built_is_refused_by_name(changes, says):
    with pytest.raises(CheckpointError, match=says):
        read(LLAMA_3_2_1B, **changes)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_export_says_is_read_back_as_it_was(family, form):
    description = ModelDescription(tiny_architecture(family), tiny_memory(), {"vocab_size": 230, "eos_token_id": 0})
    if form == "official" and family != "qwen3":
        with pytest.raises(CheckpointError, match=f"its backbone is {family}"):
            hf_config_of(description, tokenizer_eos=0, dtype="float32", form=form)
        return
    config = hf_config_of(description, tokenizer_eos=0, dtype="float32", form=form)
    assert architecture_of(config, where="c") == description.architecture
    long = replace(description, architecture=replace(description.architecture, max_positions=32768))
    config = hf_config_of(long, tokenizer_eos=0, dtype="float32", form=form)
    if form == "backbone" and family == "mistral":  # of a first model that did not say it
        config["sliding_window"] = None
    assert architecture_of(config, where="c") == long.architecture
    if form != "backbone":
        assert memory_of(config, where="c") == description.memory


def test_odd_values_of_the_memory_keys_are_refused_by_name():
    config = hf_config_of(ModelDescription(tiny_architecture(), tiny_memory(), {}), tokenizer_eos=0, dtype="float32")
    for key, value in (("memory_adapter_rank", "x"), ("memory_adapter_rank", [1]), ("chunk_size", "32")):
        with pytest.raises(CheckpointError, match=key):
            memory_of({**config, key: value}, where="c")
    assert architecture_of({**config, "architectures": 5}, where="c") == tiny_architecture()


def test_the_authors_class_needs_adapters_of_its_rank():
    description = ModelDescription(tiny_architecture(), replace(tiny_memory(), adapter_rank=4), {"vocab_size": 230})
    with pytest.raises(CheckpointError, match="rank 4, theirs 8"):
        hf_config_of(description, tokenizer_eos=0, dtype="float32", form="official")


@pytest.mark.parametrize(
    ("changes", "stride", "new_ids"),
    [
        ({"temp_beacon_stride": -1, "temp_beacon_id": None, "temp_mem_budget": None}, -1, range(200, 207)),
        ({"global_beacon_ids": None}, 4, range(200, 208)),
        ({"global_beacon_ids": [], "temp_beacon_stride": -1, "temp_beacon_id": None}, -1, range(200, 201)),
    ],
    ids=["no temporary", "no global", "neither"],
)
def test_a_memory_that_is_off_needs_no_ids(changes, stride, new_ids):
    description = ModelDescription(tiny_architecture(), tiny_memory(), {})
    config = hf_config_of(description, tokenizer_eos=0, dtype="float32")
    found = memory_of({**config, **changes}, where="c")
    assert found.stride == stride and found.new_ids == new_ids


def test_verify_takes_what_is_no_number_for_the_largest_difference():
    differences = [Difference("layer 1", 1e-7, 1.0), Difference("layer 1", float("nan"), 1.0)]
    assert not worst(differences).is_noise and not worst(differences[::-1]).is_noise
    assert not worst([Difference("layer 1", float("inf"), 1.0), differences[0]]).is_noise


def test_sizes_survive_their_json_and_older_ones_have_defaults():
    architecture = tiny_architecture("llama")
    content = to_dict(architecture)
    assert from_dict(type(architecture), content) == architecture
    older = {k: v for k, v in to_dict(tiny_architecture()).items() if k not in ("qk_norm", "qkv_bias", "rope_scaling")}
    assert from_dict(type(architecture), older) == tiny_architecture()
