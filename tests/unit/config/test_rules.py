"""The rules between values: each bad value is named with its place and what would work."""

import dataclasses
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_megatron.config.rules import (
    check_architecture,
    check_config,
    check_layout,
    check_memory_sizes,
    check_stride_divides,
    require,
)
from comet_megatron.config.schema import Architecture, Config, DataSection, MemorySizes, ModelSection, TrainSection
from comet_megatron.errors import ConfigError

GOOD = Config(
    model=ModelSection(path="base"), data=DataSection(train="shards"), train=TrainSection(output="run", steps=20)
)
SMALL = Architecture(
    family="qwen3",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=8,
    num_query_groups=8,
    head_dim=16,
    vocab_size=320,
    norm_eps=1e-6,
    rope_theta=1e6,
    tie_embeddings=False,
)
MEMORY = MemorySizes(
    chunk_size=32,
    stride=4,
    budget=16,
    memory_token_id=301,
    beacon_id=302,
    global_beacon_ids=tuple(range(303, 311)),
    first_new_id=301,
)
PAPER = dataclasses.replace(MEMORY, chunk_size=2048, stride=8, budget=2048, global_beacon_ids=tuple(range(400, 912)))


def change(config=GOOD, **values):
    """`config` with `section__name=value`, or a flat dataclass with `name=value`."""
    for key, value in values.items():
        section, _, name = key.partition("__")
        inner = dataclasses.replace(getattr(config, section), **{name: value}) if name else value
        config = dataclasses.replace(config, **{section: inner})
    return config


def texts(problems):
    return [str(problem) for problem in problems]


def layout(config=GOOD, architecture=SMALL, memory=MEMORY, *, world_size=1, where=None):
    return texts(check_layout(config, architecture, memory, world_size=world_size, where=where))


# --- the configuration alone -----------------------------------------------------------------------------------------


def test_the_defaults_with_the_required_values_have_no_problem():
    assert check_config(GOOD) == []


@pytest.mark.parametrize(
    ("key", "bad", "must"),
    [
        ("model__path", " ", "the path of a folder; or give model.init_from=hf:DIR"),
        ("model__precision", "fp16", "fp32 or bf16 or fp8"),
        ("parallel__tp", 0, "1 or more"),
        ("parallel__pp", 0, "1 or more"),
        ("parallel__slack", -1, "0 or more"),
        ("parallel__timeout_s", 0.0, "a number above 0"),
        ("profile__timeline_step", 0, "1 or more"),
        ("data__train", "", "the path of a folder"),
        ("data__seed", -1, "from 0 to 4294967295"),
        ("optimizer__lr", 0.0, "a number above 0"),
        ("optimizer__lr", math.nan, "a number above 0"),
        ("optimizer__lr", math.inf, "a number above 0"),
        ("optimizer__min_lr", -1e-9, "0 or a number above"),
        ("optimizer__warmup_steps", -1, "0 or more"),
        ("optimizer__betas", (0.9, 1.0), "two numbers from 0 up to, but not, 1"),
        ("optimizer__betas", (-0.1, 0.9), "two numbers from 0 up to, but not, 1"),
        ("optimizer__eps", 0.0, "a number above 0"),
        ("optimizer__weight_decay", -0.1, "0 or a number above"),
        ("optimizer__clip_grad", math.inf, "0 or a number above"),
        ("optimizer__memory_lr_mult", 0.0, "a number above 0"),
        ("train__output", "", "the path of a folder"),
        ("train__steps", 0, "1 or more"),
        ("train__global_batch_size", 0, "1 or more"),
        ("train__trainable", "memroy", "all or memory"),
        ("train__bptt_chunks", 0, "all, or 1 or more"),
        ("train__bptt_chunks", "none", "all, or 1 or more"),
        ("train__recompute", "selective", "none or full"),
        ("train__loss_slice_tokens", 0, "1 or more"),
        ("train__seed", 2**32, "from 0 to 4294967295"),
        ("train__save_every", -1, "0 or more"),
        ("train__eval_every", -5, "0 or more"),
        ("train__eval_sequences", 0, "1 or more"),
        ("train__cpu_threads", 0, "auto, or 1 or more"),
        ("train__cpu_threads", "all", "auto, or 1 or more"),
        ("logging__log_every", 0, "1 or more"),
    ],
)
def test_a_value_out_of_range_is_the_only_problem_and_says_what_it_must_be(key, bad, must):
    dotted = key.replace("__", ".")
    problems = texts(check_config(change(**{key: bad}), where={dotted: "my.yaml:12"}))
    assert problems == [f"{dotted}={bad!r} must be {must} (my.yaml:12)"]


@pytest.mark.parametrize(
    ("key", "edge"),
    [
        ("model__precision", "bf16"),
        ("optimizer__betas", (0.0, 0.0)),
        ("optimizer__clip_grad", 0.0),
        ("optimizer__min_lr", 5e-5),
        ("optimizer__warmup_steps", 20),
        ("optimizer__warmup_steps", 0),
        ("train__trainable", "memory"),
        ("train__recompute", "full"),
        ("train__bptt_chunks", 1),
        ("train__cpu_threads", 1),
        ("train__seed", 2**32 - 1),
        ("data__seed", 0),
        ("train__eval_sequences", 1),
    ],
)
def test_a_value_at_the_edge_of_its_range_is_allowed(key, edge):
    assert check_config(change(**{key: edge})) == []


def test_a_value_at_its_default_has_no_place():
    assert texts(check_config(change(parallel__tp=0))) == ["parallel.tp=0 must be 1 or more"]


def test_every_problem_is_found_in_one_pass():
    wrong = change(optimizer__lr=-1.0, train__trainable="none", train__eval_every=5, parallel__sequence_parallel=True)
    assert len(check_config(wrong)) == 4


def test_required_values_that_are_missing_are_named_before_anything_else():
    assert texts(check_config(Config())) == [
        "model.path has no value; give one",
        "data.train has no value; give one",
        "train.output has no value; give one",
        "train.steps has no value; give one",
    ]


def test_min_lr_above_lr_is_refused_with_both_places():
    where = {"optimizer.min_lr": "my.yaml:4", "optimizer.lr": "command line"}
    assert texts(check_config(change(optimizer__lr=1e-4, optimizer__min_lr=1e-3), where=where)) == [
        "optimizer.min_lr=0.001 is above optimizer.lr=0.0001; use at most that (my.yaml:4, command line)"
    ]


def test_more_warmup_than_training_is_refused():
    assert texts(check_config(change(train__steps=9), where={"train.steps": "my.yaml:7"})) == [
        "optimizer.warmup_steps=10 is more than train.steps=9; use 9 or fewer (my.yaml:7)"
    ]


def test_sequence_parallel_needs_tensor_parallel():
    wrong = change(parallel__sequence_parallel=True)
    assert "use parallel.tp=2 or more, or sequence_parallel=false" in texts(check_config(wrong))[0]
    assert check_config(change(wrong, parallel__tp=2)) == []


def test_evaluation_needs_held_out_data():
    wrong = change(train__eval_every=10)
    assert texts(check_config(wrong)) == [
        "train.eval_every=10 needs held-out shards; set data.eval, or train.eval_every=0"
    ]
    assert check_config(change(wrong, data__eval="held-out")) == []


# --- with a model and processes --------------------------------------------------------------------------------------


def test_a_layout_that_fits_has_no_problem():
    assert layout(change(parallel__tp=4), world_size=8) == []


def test_a_tp_that_does_not_divide_the_heads_lists_those_that_do_and_the_line():
    where = {"parallel.tp": "my.yaml:12"}
    architecture = change(SMALL, ffn_hidden_size=24 * 8)
    assert layout(change(parallel__tp=3), architecture, world_size=3, where=where) == [
        "parallel.tp=3 does not divide the model's num_attention_heads=8 and num_query_groups=8; use 1, 2, 4 or 8 "
        "(my.yaml:12)"
    ]


def test_the_tp_that_is_advised_fits_all_sizes_and_not_only_the_one_that_failed():
    architecture = change(SMALL, num_query_groups=4, ffn_hidden_size=150)
    assert layout(change(parallel__tp=8, train__global_batch_size=1), architecture, world_size=8) == [
        "parallel.tp=8 does not divide the model's num_query_groups=4 and ffn_hidden_size=150; use 1 or 2"
    ]


@pytest.mark.parametrize("name", ["num_attention_heads", "num_query_groups", "ffn_hidden_size"])
def test_each_size_that_tp_shards_has_its_rule(name):
    sizes = {"num_attention_heads": 8, "num_query_groups": 8, "ffn_hidden_size": 64, name: 12}
    messages = layout(change(parallel__tp=8), change(SMALL, **sizes), world_size=8)
    assert any(f"parallel.tp=8 does not divide the model's {name}=12; use 1, 2 or 4" in text for text in messages)


def test_fewer_processes_than_tp_says_how_many_to_start():
    assert layout(change(parallel__tp=4), world_size=2) == [
        "parallel.tp=4 needs at least 4 processes, and there are 2; start 4, or use parallel.tp=1 or 2"
    ]
    assert "and there is 1; start 4, or use parallel.tp=1" in layout(change(parallel__tp=4), world_size=1)[0]


def test_a_tp_that_does_not_divide_the_processes_says_how_many_to_start():
    assert layout(change(parallel__tp=4), world_size=6) == [
        "parallel.tp=4 does not divide the 6 processes; use parallel.tp=1 or 2, or start 4 or 8 processes"
    ]


def test_a_batch_that_the_data_parallel_ranks_cannot_share_lists_its_neighbours():
    where = {"train.global_batch_size": "my.yaml:9"}
    assert layout(change(parallel__tp=2, train__global_batch_size=6), world_size=8, where=where) == [
        "train.global_batch_size=6 cannot be shared evenly by 4 data-parallel ranks (8 processes / parallel.tp=2); "
        "use 4 or 8 (my.yaml:9)"
    ]
    assert "use 4 (" not in layout(change(train__global_batch_size=3), world_size=4)[0]
    assert layout(change(train__global_batch_size=3), world_size=4)[0].endswith("use 4")


def test_training_only_the_memory_needs_a_memory():
    none = change(MEMORY, stride=-1, global_beacon_ids=())
    wrong = change(train__trainable="memory")
    assert layout(wrong, memory=none) == [
        "train.trainable=memory, but the model has no memory; use train.trainable=all"
    ]
    assert layout(wrong, memory=change(none, stride=4)) == []
    among = change(MEMORY, beacon_id=312)
    assert layout(wrong, memory=among) == [
        "train.trainable=memory, but there are text ids among the model's beacon ids; use train.trainable=all"
    ]
    assert layout(GOOD, memory=none) == []


def test_problems_of_the_checkpoint_are_found_with_the_layout_and_name_the_checkpoint():
    messages = layout(architecture=change(SMALL, head_dim=15), memory=change(MEMORY, budget=0))
    assert len(messages) == 2 and all("(base)" in text for text in messages)


@settings(max_examples=100, deadline=None)
@given(tp=st.integers(1, 40), world_size=st.integers(1, 64), heads=st.sampled_from([8, 12, 16, 28, 48]))
def test_every_tp_that_the_advice_lists_is_accepted(tp, world_size, heads):
    architecture = change(SMALL, num_attention_heads=heads, num_query_groups=heads // 4, ffn_hidden_size=heads * 10)
    for text in layout(
        change(parallel__tp=tp, train__global_batch_size=world_size), architecture, world_size=world_size
    ):
        if advised := re.search(r"processes.*use parallel\.tp=([\d, or]*\d)", text):
            for better in map(int, re.findall(r"\d+", advised[1])):
                config = change(parallel__tp=better, train__global_batch_size=world_size)
                assert layout(config, architecture, world_size=world_size) == []


@settings(max_examples=100, deadline=None)
@given(tp=st.integers(1, 16), world_size=st.integers(1, 64), batch=st.integers(1, 64))
def test_the_layout_has_no_problem_exactly_when_everything_divides(tp, world_size, batch):
    fits = 8 % tp == 0 and world_size % tp == 0 and batch % max(world_size // tp, 1) == 0
    config = change(parallel__tp=tp, train__global_batch_size=batch)
    assert (layout(config, world_size=world_size) == []) == fits


def test_nonsense_sizes_are_reported_and_not_divided_by():
    assert layout(change(parallel__tp=0)) == []  # check_config says it
    messages = layout(change(parallel__tp=2), change(SMALL, num_query_groups=0), world_size=2)
    assert messages == ["num_query_groups=0 must be 1 or more (base)"]


# --- the checkpoint's sizes ------------------------------------------------------------------------------------------


def test_good_sizes_have_no_problem():
    assert check_architecture(SMALL) == []
    assert check_memory_sizes(MEMORY, SMALL) == []
    assert check_memory_sizes(PAPER, change(SMALL, vocab_size=1000)) == []


@pytest.mark.parametrize(
    "name",
    [
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "head_dim",
        "vocab_size",
        "max_positions",
    ],
)
def test_each_size_of_the_backbone_is_positive(name):
    assert texts(check_architecture(change(SMALL, **{name: 0}), where="base")) == [f"{name}=0 must be 1 or more (base)"]


@pytest.mark.parametrize("name", ["norm_eps", "rope_theta", "init_std"])
def test_each_real_number_of_the_backbone_is_above_zero(name):
    for bad in (0.0, math.nan):
        assert texts(check_architecture(change(SMALL, **{name: bad}))) == [f"{name}={bad} must be above 0"]


def test_an_odd_head_dim_is_refused_for_its_rotary_pairs():
    assert texts(check_architecture(change(SMALL, head_dim=15))) == [
        "head_dim=15 must be even, for rotary positions turn pairs; use 14 or 16"
    ]
    assert texts(check_architecture(change(SMALL, head_dim=1)))[0].endswith("use 2")


def test_query_groups_that_do_not_divide_the_heads_are_refused():
    assert texts(check_architecture(change(SMALL, num_query_groups=3))) == [
        "num_query_groups=3 does not divide num_attention_heads=8; use 1, 2, 4 or 8"
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0 must be 1 or more"),
        ({"stride": 0}, "stride=0 must be 1 or more, or -1 for no temporary memory"),
        ({"stride": -2}, "stride=-2 must be 1 or more, or -1 for no temporary memory"),
        ({"budget": 0}, "budget=0 must be 1 or more; for no temporary memory use stride=-1"),
        ({"adapter_rank": 0}, "adapter_rank=0 must be 1 or more"),
        (
            {"global_beacon_ids": (303, 304, 303)},
            "global_beacon_ids has 303 more than once; each global slot needs its own id",
        ),
        ({"global_beacon_ids": (302, 303)}, "beacon_id=302 is one of global_beacon_ids; it needs an id of its own"),
        ({"global_beacon_ids": (303, 320)}, "global_beacon_ids: 320 is outside the vocabulary; use 0 to 319"),
        (
            {"global_beacon_ids": tuple(range(310, 330))},
            "global_beacon_ids: 10 ids, 320 for one, are outside the vocabulary; use 0 to 319",
        ),
        ({"global_beacon_ids": (-1,)}, "global_beacon_ids: -1 is outside the vocabulary; use 0 to 319"),
        ({"beacon_id": 320}, "beacon_id=320 is outside the vocabulary; use 0 to 319"),
        ({"memory_token_id": -1}, "memory_token_id=-1 is outside the vocabulary; use 0 to 319"),
        ({"first_new_id": 321}, "first_new_id=321 is outside the vocabulary; use 0 to 320"),
    ],
)
def test_a_wrong_size_of_the_memory_is_the_only_problem_and_says_what_would_work(values, message):
    assert texts(check_memory_sizes(change(MEMORY, **values), SMALL, where="base")) == [f"{message} (base)"]


@pytest.mark.parametrize(
    "values",
    [
        {"chunk_size": 1, "stride": 1, "budget": 1, "adapter_rank": 1},
        {"memory_token_id": 0, "beacon_id": 1, "global_beacon_ids": (2, 319), "first_new_id": 0},
        {"memory_token_id": 1, "beacon_id": 0, "global_beacon_ids": (319,), "first_new_id": 320},
        {"global_beacon_ids": (0,)},
    ],
)
def test_sizes_and_ids_at_the_edge_of_their_range_are_allowed(values):
    assert check_memory_sizes(change(MEMORY, **values), SMALL) == []


@pytest.mark.parametrize("values", [{"global_beacon_ids": ()}, {"stride": -1}])
def test_either_memory_alone_needs_the_id_that_stands_for_a_slot(values):
    [message] = texts(check_memory_sizes(change(MEMORY, memory_token_id=320, **values), SMALL))
    assert message == "memory_token_id=320 is outside the vocabulary; use 0 to 319"


def test_many_divisors_are_shortened_to_those_around_the_value():
    [message] = texts(check_stride_divides(change(PAPER, stride=7)))
    assert message == "stride=7 does not divide chunk_size=2048; use 2, 4, 8 or 16 (or another divisor)"


def test_without_temporary_memory_its_sizes_and_its_beacon_do_not_matter():
    assert check_memory_sizes(change(MEMORY, stride=-1, budget=0, beacon_id=-1), SMALL) == []


def test_without_any_memory_only_the_chunk_counts():
    none = change(MEMORY, stride=-1, budget=0, beacon_id=-1, memory_token_id=-1, global_beacon_ids=())
    assert check_memory_sizes(none, SMALL) == []
    assert check_memory_sizes(none, change(SMALL, max_positions=32)) == []
    assert len(check_memory_sizes(none, change(SMALL, max_positions=31))) == 1


def test_a_chunk_with_its_slots_and_beacons_must_fit_in_the_positions():
    # 32 text, 8 beacons, 16 temporary slots, 8 global beacons, 8 global slots
    assert check_memory_sizes(MEMORY, change(SMALL, max_positions=72)) == []
    [message] = texts(check_memory_sizes(MEMORY, change(SMALL, max_positions=71)))
    assert message.startswith(
        "a chunk needs 72 positions (32 text + 8 beacons + 16 temporary slots + 8 global beacons + 8 global slots), "
        "and the model has max_positions=71; use a smaller"
    )


def test_the_sizes_of_the_paper_need_5376_positions():
    architecture = change(SMALL, vocab_size=1000, max_positions=5375)
    assert "needs 5376 positions" in texts(check_memory_sizes(PAPER, architecture))[0]


# --- raising ---------------------------------------------------------------------------------------------------------


def test_require_raises_all_problems_once_and_nothing_if_there_are_none():
    require([])
    first, second = ConfigError("first", where="a:1"), ConfigError("second")
    with pytest.raises(ConfigError) as caught:
        require([first, second, ConfigError("first", where="a:1")])
    assert str(caught.value) == "2 problems:\n- first (a:1)\n- second"


def test_a_stride_that_does_not_divide_the_chunk_is_refused_for_new_models_only():
    ragged = change(MEMORY, stride=5)
    [message] = texts(check_stride_divides(ragged))
    assert message == "stride=5 does not divide chunk_size=32; use 1, 2, 4, 8, 16 or 32"
    assert check_memory_sizes(ragged, SMALL) == []
    assert check_stride_divides(MEMORY) == check_stride_divides(change(MEMORY, stride=-1)) == []


def test_warm_up_is_held_against_the_end_of_the_decay():
    stopped_early = change(train__steps=5, optimizer__decay_steps=20)
    assert check_config(stopped_early) == []
    [message] = texts(check_config(change(stopped_early, optimizer__decay_steps=9)))
    assert message == "optimizer.warmup_steps=10 is more than optimizer.decay_steps=9; use 9 or fewer"


# --- pipeline stages -------------------------------------------------------------------------------------------------

STAGES = {
    (4, "auto", 4): None,
    (2, (1, 3), 6): None,
    (5, "auto", 5): "parallel.pp=5 stages are more than the model's 4 layers; use parallel.pp=4 or fewer",
    (2, (1, 2), 2): "parallel.layers_per_stage=[1, 2] are 3 layers, and the model has 4",
    (2, "auto", 3): "parallel.tp=1 x parallel.pp=2 = 2 does not divide the 3 processes; start 2 or 4 processes",
    (4, "auto", 1): "does not divide the 1 process; start 4 processes, or use parallel.pp=1",
    (3, "auto", 4): "or use parallel.pp=1, 2 or 4",
    (3, "auto", 8): "or use parallel.pp=1, 2 or 4",  # not 8: there are 4 layers
}


@pytest.mark.parametrize("case", STAGES, ids=str)
def test_stages_have_layers_and_processes(case):
    pp, layers, world_size = case
    config = change(parallel__pp=pp, parallel__layers_per_stage=layers, train__global_batch_size=world_size)
    assert check_config(config) == []
    problems = layout(config, world_size=world_size)
    if STAGES[case] is None:
        assert problems == []
    else:
        assert len(problems) == 1 and STAGES[case] in problems[0], problems


@pytest.mark.parametrize(
    "layers,pp,what",
    [
        ("even", 1, "must be auto, or a list of numbers"),
        ((2, 2), 3, "is for 2 stages, and parallel.pp=3 is 3 stages; give 3 numbers, or auto"),
        ((4, 0), 2, "[4, 0] leaves a stage without a layer; give each 1 or more"),
    ],
)
def test_a_split_names_each_stage_once(layers, pp, what):
    (problem,) = texts(check_config(change(parallel__pp=pp, parallel__layers_per_stage=layers)))
    assert what in problem


def test_data_parallel_ranks_are_what_tp_and_pp_leave():
    config = change(parallel__pp=2, parallel__tp=2, train__global_batch_size=3)
    (problem,) = layout(config, world_size=8)
    assert "2 data-parallel ranks (8 processes / parallel.tp=2 / parallel.pp=2); use 2 or 4" in problem
