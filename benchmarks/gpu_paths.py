"""Three ways to read a long text on a GPU with the modules of one CometStage: ours, the authors', full attention.

No gradients and no head. Each gives the last hidden state, so that it can be seen that something was computed.
"""

from __future__ import annotations

import numpy as np
import torch
from reference_paths import _slots, _whole_layer
from torch import Tensor

from comet_megatron.backend.precision import Visit, fp8_layer
from comet_megatron.chunking import IGNORE_LABEL, plan_chunks
from comet_megatron.model.chunk_tensors import build_chunk_tensors
from comet_megatron.model.memory import carry_memory
from comet_megatron.model.stage import CometStage


@torch.no_grad()
def read_with_memory(stage: CometStage, ids: np.ndarray) -> Tensor:
    """Chunk by chunk; slots are keys and values only."""
    memory, hidden = stage.empty_memory(), None
    labels = np.full((1, len(ids)), IGNORE_LABEL)
    stage.begin_pass()
    for plan in plan_chunks(len(ids), stage.memory_sizes, keep_last_memory=True):
        chunk = build_chunk_tensors(
            plan, ids[None], labels, stage.memory_sizes, shards=stage.shards, device=stage.device
        )
        hidden, written = stage(chunk, memory)
        budget = stage.memory_sizes.budget
        memory = [carry_memory(m, w, budget=budget) for m, w in zip(memory, written, strict=True)]
    return hidden[-1]


@torch.no_grad()
def read_with_slots_in_full(stage: CometStage, ids: np.ndarray) -> Tensor:
    """Chunk by chunk; a slot is a row with a query and an MLP, whose output is thrown away, as the authors do."""
    sizes, device = stage.memory_sizes, stage.device
    states: list[Tensor | None] = [None] * stage.num_layers
    queues: list[Tensor | None] = [None] * stage.num_layers
    hidden = None
    for plan in plan_chunks(len(ids), sizes, keep_last_memory=True):
        hidden = stage.embedding(torch.from_numpy(plan.row_ids(ids, sizes))[None].to(device), None)
        beacons = torch.from_numpy(plan.beacon_rows).to(device)
        global_beacons = torch.from_numpy(plan.global_rows).to(device)
        rotary = stage.rotary.first(plan.num_slots + plan.num_rows)
        for number, layer in enumerate(stage.decoder.layers):
            slots = _slots(layer, states[number], queues[number])
            rows = hidden if slots is None else torch.cat([slots.to(hidden.dtype), hidden])
            with fp8_layer(stage.config, layer.layer_number - 1, Visit.ONLY):
                hidden = _whole_layer(layer, rows, rotary)[plan.num_slots :]
            if sizes.global_slots:
                states[number], _ = layer.global_memory_net(hidden[global_beacons], states[number])
            if sizes.stride > 0:
                new = layer.temp_memory_net(hidden[beacons])
                queue = new if queues[number] is None else torch.cat([queues[number], new])
                queues[number] = queue[-sizes.budget :]
    return hidden[-1]


@torch.no_grad()
def read_with_full_attention(stage: CometStage, ids: np.ndarray, *, block_rows: int) -> Tensor:
    """The backbone alone, block by block, with the keys and values of all tokens kept: every token sees all before it.

    Args:
        block_rows: tokens that go through the layers together; the fewer, the less memory beside keys and values.
    """
    layers, device, dtype = stage.decoder.layers, stage.device, stage.config.params_dtype
    attention = layers[0].self_attention
    shape = (len(ids), 1, attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head)
    caches = [tuple(torch.empty(shape, dtype=dtype, device=device) for _ in "kv") for _ in layers]
    rotary_all = stage.rotary.first(len(ids))
    hidden = None
    for start in range(0, len(ids), block_rows):
        end = min(start + block_rows, len(ids))
        rows = torch.from_numpy(ids[start:end].astype(np.int64))[None].to(device)
        hidden = stage.embedding(rows, None)
        rotary = type(rotary_all)(rotary_all.cos[start:end], rotary_all.sin[start:end])
        for layer, (keys, values) in zip(layers, caches, strict=True):
            query, key, value = layer.self_attention.get_query_key_value_tensors(layer.input_layernorm(hidden))
            keys[start:end], values[start:end] = rotary.apply(key), value
            out = layer.self_attention.core_attention(rotary.apply(query), keys[:end], values[:end])
            hidden = layer._forward_mlp(hidden + layer.self_attention.linear_proj(out)[0])
    return hidden[-1]
