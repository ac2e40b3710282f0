"""A transformer layer with its two memories: reads slots before attention, writes memory from its output."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from comet_megatron.backend.precision import Visit, fp8_layer
from comet_megatron.config.schema import MemorySizes
from comet_megatron.model.attention import cut_rows, pad_rows
from comet_megatron.model.chunk_tensors import ChunkTensors, SequenceShards, take_rows
from comet_megatron.model.gated_silu import gated_silu
from comet_megatron.model.memory import LayerMemory, WrittenMemory, build_memory_nets
from comet_megatron.model.rotary import Rotary


class CometLayer(TransformerLayer):
    """Megatron's transformer layer plus the memory nets of this layer (replicated over tensor parallelism)."""

    def __init__(self, *args: object, memory_sizes: MemorySizes, shards: SequenceShards, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.memory_sizes = memory_sizes
        self.shards = shards
        nets = build_memory_nets(
            memory_sizes, self.config.hidden_size, dtype=self.config.params_dtype, init_std=self.config.init_method_std
        )
        for name, net in nets.items():
            self.add_module(name, net.to(torch.cuda.current_device()))

    def forward(
        self,
        hidden: Tensor,
        *,
        rotary: Rotary,
        memory: LayerMemory,
        chunk: ChunkTensors,
        visit: Visit = Visit.ONLY,
    ) -> tuple[Tensor, WrittenMemory]:
        """One chunk through the layer.

        Args:
            hidden: [rows / sequence shards, b, h].
            rotary: positions of slots and rows.
            memory: what the layer carries into this chunk.
            visit: whether this chunk comes, or has come, another time in this pass.

        Returns:
            The layer's output, like `hidden`, and what it wrote.
        """
        residual = hidden
        with fp8_layer(self.config, self.layer_number - 1, visit):
            slots = self.read_memory(memory, hidden.dtype)
            attended = self.self_attention(self.input_layernorm(hidden), slots, rotary)
            with self.bias_dropout_add_exec_handler():
                add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
                hidden = add(attended, residual, self.hidden_dropout)
            hidden = self._forward_mlp(hidden)
        return hidden, self.write_memory(hidden, memory, chunk)

    def _forward_mlp(self, hidden: Tensor, **kwargs: object) -> Tensor:
        """Megatron's MLP behind its norm, with the gate as one autograd node, and rows padded for FP8."""
        normed = pad_rows(self.pre_mlp_layernorm(hidden), self.self_attention.row_multiple)
        gate_up, _ = self.mlp.linear_fc1(normed)
        out, bias = self.mlp.linear_fc2(gated_silu(gate_up))
        return self._forward_post_mlp((cut_rows(out, len(hidden)), bias), hidden)

    def read_memory(self, memory: LayerMemory, dtype: torch.dtype) -> Tensor | None:
        """Normalised slots [m, b, h]: the adapted global state, then the last `budget` temporary slots."""
        parts = [] if memory.global_state is None else [self.global_memory_net.o_proj(memory.global_state)]
        surplus = sum(len(e) for e in memory.entries) - self.memory_sizes.budget
        parts += [e[max(surplus, 0) :] if i == 0 else e for i, e in enumerate(memory.entries)]
        if not parts:
            return None
        slots = torch.cat(parts).to(dtype)
        if self.config.sequence_parallel:
            # Megatron sums the norm's gradient over the ranks, so the part that comes through the (replicated) memory
            # must be partial as well: sum the slots' gradient before the norm, not after it.
            slots = tensor_parallel.copy_to_tensor_model_parallel_region(slots, group=self.tp_group)
        return self.input_layernorm(slots)

    def write_memory(self, hidden: Tensor, memory: LayerMemory, chunk: ChunkTensors) -> WrittenMemory:
        """New memory from the layer's output at the beacons; one collective for both memories."""
        if not chunk.plan.writes_memory or not chunk.beacon_rows.count:
            return WrittenMemory()
        beacons = take_rows(hidden, chunk.beacon_rows, self.shards)
        num_global = chunk.plan.num_global_beacons
        state = entry = gate = None
        if num_global:
            state, gate = self.global_memory_net(beacons[:num_global], memory.global_state)
        if chunk.plan.num_beacons:
            entry = self.temp_memory_net(beacons[num_global:])
        return WrittenMemory(state, entry, None if gate is None else gate.detach().mean())
