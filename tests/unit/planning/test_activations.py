"""The planned bytes of a chunk's graph are those of the tensors that autograd really saves."""

from dataclasses import replace

import pytest
import torch

from comet_megatron.chunking import next_token_labels, plan_chunks
from comet_megatron.model.build import build_stage
from comet_megatron.model.chunk_tensors import build_chunk_tensors
from comet_megatron.model.memory import LayerMemory, carry_memory
from comet_megatron.planning.activations import Shards, head_bytes, layer_graph_bytes
from comet_megatron.planning.memory import BYTES, padded_vocabulary
from comet_megatron.testing.tiny import layout_alone, tiny_architecture, tiny_memory, tiny_sequences

WIDE = {"hidden_size": 128, "ffn_hidden_size": 192, "num_attention_heads": 8, "num_query_groups": 2, "head_dim": 32}
MEMORIES = {
    "both": {},
    "global only": {"stride": -1},
    "temporary only": {"global_slots": 0},
    "none": {"global_slots": 0, "stride": -1},
}


def saved_bytes(stage, chunk, entering):
    """Of the tensors saved by a forward, each storage once; not weights, and not the memory that entered."""
    left_out = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    left_out |= {
        t.untyped_storage().data_ptr() for m in entering for t in (m.global_state, *m.entries) if t is not None
    }
    left_out |= {t.untyped_storage().data_ptr() for t in stage.rotary.first(1)}
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor  # alive, or its place would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, written = stage(chunk, entering)
    saved = [t for place, t in found.items() if place not in left_out and t.dtype != torch.int64]
    return sum(t.untyped_storage().nbytes() for t in saved), written


def as_leaves(memory):
    state = None if memory.global_state is None else memory.global_state.detach().requires_grad_()
    return LayerMemory(state, tuple(e.detach().requires_grad_() for e in memory.entries))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "memory"), [*(("qwen3", m) for m in MEMORIES), ("qwen2", "both"), ("llama", "both")]
)
def test_autograd_saves_what_is_planned_in_the_first_a_middle_and_the_last_chunk(family, memory, precision):
    architecture = replace(tiny_architecture(family), **WIDE)
    sizes = tiny_memory(chunk_size=64, budget=24, **MEMORIES[memory])
    stage = build_stage(architecture, sizes, layout_alone().groups, precision=precision)
    with torch.no_grad():
        for param in stage.parameters():
            param.fill_(0.01)
    stage.rotary.first(256)
    tokens = 64 * 3 + 40
    ids, carried = tiny_sequences([tokens])[0], stage.empty_memory()
    for plan in plan_chunks(tokens, sizes):
        labels = next_token_labels(ids)[None]
        chunk = build_chunk_tensors(plan, ids[None], labels, sizes, shards=stage.shards, device=stage.device)
        entering = [as_leaves(m) for m in carried]
        saved, written = saved_bytes(stage, chunk, entering)
        planned = architecture.num_layers * layer_graph_bytes(
            architecture, sizes, plan, dtype_bytes=BYTES[precision], shards=Shards()
        )
        assert saved == pytest.approx(planned, rel=0.01)
        carried = [carry_memory(m, w, budget=sizes.budget) for m, w in zip(entering, written, strict=True)]


def test_tensor_parallel_ranks_share_heads_and_mlp_and_with_sequence_parallelism_the_rows():
    architecture, sizes = tiny_architecture(), tiny_memory(chunk_size=64)
    plan = plan_chunks(64 * 3, sizes)[1]
    alone, shared, with_rows = (
        layer_graph_bytes(architecture, sizes, plan, dtype_bytes=2, shards=shards)
        for shards in (Shards(), Shards(tp=4), Shards(tp=4, sequence_parallel=True))
    )
    assert alone / 4 < with_rows < shared < alone


def test_a_gpu_keeps_two_more_tensors_of_the_mlp():
    architecture, sizes = tiny_architecture(), tiny_memory()
    plan = plan_chunks(40, sizes)[1]
    cpu, cuda = (
        layer_graph_bytes(architecture, sizes, plan, dtype_bytes=2, shards=Shards(on_cuda=on_cuda))
        for on_cuda in (False, True)
    )
    assert cuda - cpu == 2 * plan.num_rows * architecture.ffn_hidden_size * 2


def test_logits_are_counted_for_a_slice_and_no_more_rows_than_have_a_label():
    architecture = tiny_architecture()
    vocabulary = padded_vocabulary(architecture.vocab_size, tp=1)
    few, slice_, all_ = (
        head_bytes(architecture, labels, dtype_bytes=4, shards=Shards(), slice_tokens=slice_tokens)
        for labels, slice_tokens in ((8, 16), (40, 16), (40, 64))
    )
    assert all_ - slice_ == 24 * vocabulary * 4
    assert slice_ - few == (8 * vocabulary + 3 * 32 * architecture.hidden_size) * 4
