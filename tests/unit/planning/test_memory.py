"""Planned counts and bytes are those of stages that are really built and of chunks that are really run."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comet_megatron.checkpoint.hf_rules import Whole, plan_rules
from comet_megatron.chunking import next_token_labels, plan_chunks
from comet_megatron.config.schema import OptimizerSection
from comet_megatron.model.architectures import padded_vocabulary as vocabulary_of_the_model
from comet_megatron.model.build import build_stage
from comet_megatron.model.chunk_tensors import build_chunk_tensors
from comet_megatron.model.memory import carry_memory
from comet_megatron.planning.memory import (
    Parameters,
    StateBytes,
    checkpoint_bytes,
    count_parameters,
    kept_piece_bytes,
    message_bytes,
    padded_vocabulary,
    state_bytes,
)
from comet_megatron.testing.tiny import (
    build_oracle,
    layout_alone,
    oracle_tensors,
    tiny_architecture,
    tiny_memory,
    tiny_sequences,
)
from comet_megatron.train.model import build_trainable
from comet_megatron.train.optimizer import build_optimizer

MEMORIES = {
    "both": tiny_memory(),
    "global only": tiny_memory(stride=-1),
    "temporary only": tiny_memory(global_slots=0),
    "none": tiny_memory(global_slots=0, stride=-1),
}


def count_built(stage):
    return Parameters(
        all=sum(p.numel() for p in stage.parameters()),
        trained=sum(p.numel() for p in stage.parameters() if p.requires_grad),
    )


@pytest.mark.parametrize("trainable", ["all", "memory"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_of_all_layers_has_as_many_parameters_as_planned(tied, memory, trainable):
    architecture = tiny_architecture(tie_embeddings=tied)
    stage = build_stage(architecture, MEMORIES[memory], layout_alone().groups)
    if trainable == "memory":
        stage.freeze_backbone()
    assert count_parameters(architecture, MEMORIES[memory], 3, trainable=trainable) == count_built(stage)


@pytest.mark.parametrize("trainable", ["all", "memory"])
@pytest.mark.parametrize("tied", [False, True])
def test_each_stage_of_three_has_as_many_parameters_as_planned(tied, trainable):
    architecture, memory, split = tiny_architecture(tie_embeddings=tied, num_layers=6), tiny_memory(), (3, 2, 1)
    for number, layers in enumerate(split):
        stage = build_stage(architecture, memory, layout_alone().groups, stage=number, layers_per_stage=split)
        if trainable == "memory":
            stage.freeze_backbone()
        ends = {"is_first": number == 0, "is_last": number == 2}
        assert count_parameters(architecture, memory, layers, trainable=trainable, **ends) == count_built(stage)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tensor_parallel_rank_has_as_many_parameters_as_weights_are_loaded_into_it(tied, tp):
    architecture, memory = tiny_architecture(tie_embeddings=tied), tiny_memory()
    rules = plan_rules(architecture, memory)
    whole = Whole(oracle_tensors(build_oracle(architecture, memory)))
    loaded = sum(rule.load(whole, rank=tp - 1, size=tp).numel() for rule in rules)
    assert count_parameters(architecture, memory, 3, tp=tp).all == loaded


@given(st.integers(1, 300_000), st.integers(1, 16))
def test_the_vocabulary_is_padded_as_the_model_pads_it(vocabulary, tp):
    assert padded_vocabulary(vocabulary, tp=tp) == vocabulary_of_the_model(vocabulary, tp=tp)


def test_a_trained_weight_has_4_bytes_of_gradient_and_8_or_12_of_optimizer_state():
    count = Parameters(all=1000, trained=600)
    assert state_bytes(count, precision="fp32") == StateBytes(4000, 2400, 600 * 8)
    assert state_bytes(count, precision="bf16") == StateBytes(2000, 2400, 600 * 12)
    assert state_bytes(count, precision="bf16").total == 2000 + 2400 + 7200


@pytest.mark.parametrize("zero1", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_and_optimizer_have_the_bytes_of_a_run(precision, zero1):
    architecture, memory, layout = tiny_architecture(), tiny_memory(), layout_alone()
    stage = build_stage(architecture, memory, layout.groups, precision=precision)
    with torch.no_grad():
        for param in stage.parameters():
            param.fill_(0.01)
    model = build_trainable({0: stage}, layout, zero1=zero1)
    optimizer = build_optimizer(model, OptimizerSection(), precision=precision, zero1=zero1)
    optimizer.zero_grad()
    optimizer.step()
    held = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        moments = [t for state in part.optimizer.state.values() for t in state.values() if t.numel() > 1]
        masters = [p for group in part.optimizer.param_groups for p in group["params"]] if precision == "bf16" else []
        held += sum(t.nbytes for t in (*moments, *masters))
    planned = state_bytes(count_parameters(architecture, memory, 3), precision=precision, zero1=zero1)
    assert planned.optimizer == held
    assert planned.weights == sum(p.nbytes for p in stage.parameters())
    assert planned.gradients == sum(p.main_grad.nbytes for p in stage.parameters())


def test_zero1_shares_only_the_optimizer_state():
    count = Parameters(all=1000, trained=600)
    assert state_bytes(count, precision="bf16", dp=4, zero1=True) == StateBytes(2000, 2400, 1800)
    assert state_bytes(count, precision="bf16", dp=4, zero1=False) == StateBytes(2000, 2400, 7200)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_messages_and_checkpoints_have_the_bytes_of_what_a_chunk_really_leaves(precision, memory):
    """The hidden states that go from the first stage to the second, and what the layers of both write."""
    architecture, sizes, split = tiny_architecture(), MEMORIES[memory], (2, 1)
    stages = [
        build_stage(
            architecture, sizes, layout_alone().groups, stage=number, layers_per_stage=split, precision=precision
        )
        for number in range(2)
    ]
    for stage in stages:
        for param in stage.parameters():
            param.fill_(0.01)
    carried = [stage.empty_memory() for stage in stages]
    ids, dtype_bytes = tiny_sequences([45])[0], {"fp32": 4, "bf16": 2}[precision]
    for plan in plan_chunks(45, sizes):
        chunk = build_chunk_tensors(
            plan,
            ids[None],
            next_token_labels(ids)[None],
            sizes,
            shards=stages[0].shards,
            device=stages[0].device,
        )
        message, of_first = stages[0](chunk, carried[0])
        _, of_second = stages[1](chunk, carried[1], message)
        kept = [sum(t.nbytes for new in written for t in new[:2] if t is not None) for written in (of_first, of_second)]
        assert message_bytes(architecture, plan, dtype_bytes=dtype_bytes) == message.nbytes
        assert checkpoint_bytes(architecture, plan, 2, is_first=True, dtype_bytes=dtype_bytes) == kept[0]
        planned = checkpoint_bytes(architecture, plan, 1, is_first=False, dtype_bytes=dtype_bytes)
        assert planned == kept[1] + message.nbytes
        carried = [
            [carry_memory(m, w, budget=sizes.budget) for m, w in zip(old, new, strict=True)]
            for old, new in zip(carried, (of_first, of_second), strict=True)
        ]


def test_sequence_parallel_ranks_share_the_hidden_states_and_each_has_all_memory():
    architecture, plan = tiny_architecture(), plan_chunks(32, tiny_memory())[0]
    assert plan.num_rows == 16 + 4 + 6
    assert message_bytes(architecture, plan, dtype_bytes=2, sequence_shards=4) == 7 * 64 * 2  # 26 rows, padded to 28
    whole, shared = (
        checkpoint_bytes(architecture, plan, 3, is_first=False, dtype_bytes=2, sequence_shards=n) for n in (1, 4)
    )
    assert whole - shared == (26 - 7) * 64 * 2


@pytest.mark.parametrize(
    "sizes,wanted",
    [
        ({}, 4 * 64 * 4),  # a beacon for every 4 of 16 tokens, hidden 64; 6 global slots are more
        ({"global_slots": 2}, 2 * 64 * 4),
        ({"stride": -1}, 6 * 64 * 4),
        ({"stride": -1, "global_slots": 0}, 0),
    ],
)
def test_the_smallest_piece_that_a_layer_leaves_of_a_chunk(sizes, wanted):
    assert kept_piece_bytes(tiny_architecture(), tiny_memory(**sizes)) == wanted
