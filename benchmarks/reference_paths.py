"""What the model is timed against: slots computed in full as the authors do, and plain full attention.

Both run the very modules of a CometStage (the same weights, fused projections, norms, rotary embedding and attention
kernel), so that the difference is what they compute and not how well it is written.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from comet_megatron.chunking import IGNORE_LABEL, plan_chunks
from comet_megatron.model.layer import CometLayer
from comet_megatron.model.rotary import Rotary
from comet_megatron.model.stage import CometStage


def loss_with_slots_in_full(stage: CometStage, token_ids: np.ndarray, labels: np.ndarray) -> Tensor:
    """Mean loss of one sequence, all in one autograd graph, the way the authors compute it.

    A memory slot is a row of the chunk whose vector is replaced at the input of every layer: it has a query, an output
    projection and an MLP, and what comes out is thrown away. The head runs on every row. Beacons that nobody reads, in
    the last chunk, are computed.

    Args:
        token_ids, labels: [tokens].
    """
    sizes = stage.memory_sizes
    states: list[Tensor | None] = [None] * stage.num_layers
    queues: list[Tensor | None] = [None] * stage.num_layers
    total, count = torch.zeros(()), int((labels != IGNORE_LABEL).sum())
    for plan in plan_chunks(len(token_ids), sizes, keep_last_memory=True):
        rows = torch.from_numpy(plan.row_ids(token_ids, sizes))[None]
        hidden = stage.embedding(rows, None)
        beacons, global_beacons = torch.from_numpy(plan.beacon_rows), torch.from_numpy(plan.global_rows)
        rotary = stage.rotary.first(plan.num_slots + plan.num_rows)
        for number, layer in enumerate(stage.decoder.layers):
            slots = _slots(layer, states[number], queues[number])
            hidden = _whole_layer(layer, hidden if slots is None else torch.cat([slots, hidden]), rotary)
            out, hidden_rows = hidden, hidden[plan.num_slots :]
            hidden = hidden_rows
            if sizes.global_slots:
                states[number], _ = layer.global_memory_net(hidden_rows[global_beacons], states[number])
            if sizes.stride > 0:
                new = layer.temp_memory_net(hidden_rows[beacons])
                queue = new if queues[number] is None else torch.cat([queues[number], new])
                queues[number] = queue[-sizes.budget :]
        row_labels = torch.full((len(out),), IGNORE_LABEL)
        row_labels[plan.num_slots + torch.from_numpy(plan.text_rows)] = torch.from_numpy(
            labels[plan.text_start : plan.text_end]
        )
        total = total + _summed_loss(stage, out, row_labels)
    return total / count


def loss_with_full_attention(stage: CometStage, token_ids: np.ndarray, labels: np.ndarray) -> Tensor:
    """Mean loss of one sequence by the backbone alone: every token attends to all tokens before it."""
    hidden = stage.embedding(torch.from_numpy(token_ids.astype(np.int64))[None], None)
    rotary = stage.rotary.first(len(token_ids))
    for layer in stage.decoder.layers:
        hidden = _whole_layer(layer, hidden, rotary)
    return _summed_loss(stage, hidden, torch.from_numpy(labels)) / int((labels != IGNORE_LABEL).sum())


def _slots(layer: CometLayer, state: Tensor | None, queue: Tensor | None) -> Tensor | None:
    parts = [] if state is None else [layer.global_memory_net.o_proj(state)]
    parts += [] if queue is None else [queue]
    return torch.cat(parts) if parts else None


def _whole_layer(layer: CometLayer, hidden: Tensor, rotary: Rotary) -> Tensor:
    """The plain transformer layer on every row, causal."""
    attention = layer.self_attention
    query, key, value = attention.get_query_key_value_tensors(layer.input_layernorm(hidden))
    attended, _ = attention.linear_proj(attention.core_attention(rotary.apply(query), rotary.apply(key), value))
    return layer._forward_mlp(hidden + attended)


def _summed_loss(stage: CometStage, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = stage.logits(stage.decoder.final_layernorm(hidden))
    return F.cross_entropy(logits[:, 0], labels, ignore_index=IGNORE_LABEL, reduction="sum")
