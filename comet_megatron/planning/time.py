"""Seconds of a step on GPUs, from a roofline: a plan, not a measurement. Pure, no torch.

A kernel takes the longer of its arithmetic at a share of the dense peak and its traffic at a share of the memory's
bandwidth. Products: FLOPs as in costs.py; attention: the causal half, its backward the five products of a flash kernel
(2.5 times its forward). Everything between products is taken to write and read each tensor that the graph keeps once.
Collectives of tensor parallelism and the reduction of gradients are not overlapped with anything; messages between
stages are, and delay only who waits for them. The shares are assumptions until they are measured.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from comet_megatron.chunking import ChunkPlan
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.errors import ConfigError
from comet_megatron.parallel.schedule import Kind, Op
from comet_megatron.planning.activations import Shards, layer_graph_bytes
from comet_megatron.planning.costs import head_flops
from comet_megatron.planning.devices import Gpu
from comet_megatron.planning.memory import BYTES, FP32_BYTES, Parameters, message_bytes, padded_vocabulary

MESSAGE_LATENCY_S = 20e-6  # of a message, beside its bytes
LATENCY_OF_A_COLLECTIVE_S = 20e-6
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Efficiency:
    """Shares of what a GPU's maker publishes that are reached. Assumed.

    Attributes:
        gemm: of the dense peak, in products.
        attention: of the dense bf16 peak.
        memory: of the memory's bandwidth.
        links: of NVLink and of the network.
    """

    gemm: float = 0.65
    attention: float = 0.5
    memory: float = 0.75
    links: float = 0.75

    @classmethod
    def parse(cls, text: str) -> Efficiency:
        """The default but for what `gemm=0.7,attention=0.6` says.

        Raises:
            ConfigError: another name, or no share above 0 and up to 1.
        """
        names = [field.name for field in fields(cls)]
        found = cls()
        for part in filter(None, text.split(",")):
            name, _, value = (piece.strip() for piece in part.partition("="))
            try:
                share = float(value)
            except ValueError:
                share = 0.0
            if name not in names or not 0 < share <= 1:
                what = f"--efficiency {text}: {part.strip()!r} is no share of {', '.join(names)}"
                raise ConfigError(what, way_out="give shares above 0 and up to 1: gemm=0.7,attention=0.6")
            found = replace(found, **{name: share})
        return found


@dataclass(frozen=True)
class Roofline:
    """Times of a model's parts on one rank."""

    architecture: Architecture
    memory: MemorySizes
    gpu: Gpu
    precision: str
    shards: Shards
    efficiency: Efficiency = Efficiency()

    @property
    def tp(self) -> int:
        return self.shards.tp

    def layer_seconds(self, plan: ChunkPlan) -> tuple[float, float]:
        """Forward and backward of one layer on one chunk."""
        products, attention = self._products_seconds(plan), self._attention_seconds(plan)
        kept = layer_graph_bytes(
            self.architecture, self.memory, plan, dtype_bytes=BYTES[self.precision], shards=self.shards
        )
        between = 2 * kept / self._memory_rate
        shared = self._tensor_parallel_seconds(plan)
        forward = products + attention + between + shared
        return forward, 2 * products + _ATTENTION_BACKWARD * attention + 2 * between + shared

    def _products_seconds(self, plan: ChunkPlan) -> float:
        a, dtype = self.architecture, BYTES[self.precision]
        queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
        peak = self.gpu.fp8_flops if self.precision == "fp8" else self.gpu.bf16_flops

        def product(rows: int, width_in: int, width_out: int, *, of_slots: bool = False) -> float:
            # Slots skip fp8: a slice of the fused weight is multiplied.
            flops = 2.0 * rows * width_in * width_out / self.tp
            traffic = dtype * (rows * (width_in + width_out) + width_in * width_out) / self.tp
            rate = (self.gpu.bf16_flops if of_slots else peak) * self.efficiency.gemm
            return max(flops / rate, traffic / self._memory_rate)

        return (
            product(plan.num_rows, a.hidden_size, queries + 2 * keys)
            + product(plan.num_rows, queries, a.hidden_size)
            + product(plan.num_rows, a.hidden_size, 2 * a.ffn_hidden_size)
            + product(plan.num_rows, a.ffn_hidden_size, a.hidden_size)
            + product(plan.num_slots, a.hidden_size, 2 * keys, of_slots=True)
        )

    def _attention_seconds(self, plan: ChunkPlan) -> float:
        width = self.architecture.num_attention_heads * self.architecture.head_dim
        pairs = plan.num_rows * (plan.num_slots + plan.num_rows / 2)
        return 4.0 * width * pairs / self.tp / (self.gpu.bf16_flops * self.efficiency.attention)

    def _tensor_parallel_seconds(self, plan: ChunkPlan) -> float:
        """Two all-reduces of a chunk's rows, or with sequence parallelism as many bytes in four collectives."""
        if self.tp == 1:
            return 0.0
        whole = plan.num_rows * self.architecture.hidden_size * BYTES[self.precision]
        sent = 2 * (self.tp - 1) / self.tp * whole
        return 2 * (sent / (self.gpu.nvlink_bandwidth * self.efficiency.links) + LATENCY_OF_A_COLLECTIVE_S)

    def head_seconds(self, num_labels: int) -> float:
        """Head and loss of a chunk, forward and backward; fp32 logits are passed over six times."""
        flops = 3 * head_flops(self.architecture, num_labels) / self.tp
        logits = num_labels * padded_vocabulary(self.architecture.vocab_size, tp=self.tp) // self.tp * FP32_BYTES
        return flops / (self.gpu.bf16_flops * self.efficiency.gemm) + 6 * logits / self._memory_rate

    def op_seconds(self, op: Op, plan: ChunkPlan, *, layers: int, has_head: bool) -> float:
        """Of an op of the schedule; the backward is not cut in two."""
        forward, backward = self.layer_seconds(plan)
        if op.kind is Kind.BACKWARD:
            return layers * backward + (self.head_seconds(plan.num_text) if has_head else 0.0)
        return layers * forward

    def message_seconds(self, plan: ChunkPlan, *, between_machines: bool) -> float:
        """A chunk's hidden states, from stage to stage."""
        sent = message_bytes(
            self.architecture, plan, dtype_bytes=BYTES[self.precision], sequence_shards=self.shards.of_rows
        )
        return MESSAGE_LATENCY_S + sent / self._link_rate(between_machines)

    def reduction_seconds(self, parameters: Parameters, *, dp: int, zero1: bool, between_machines: bool) -> float:
        """Sum of fp32 gradients over data parallelism, and with ZeRO-1 the gathering of new weights."""
        if dp == 1:
            return 0.0
        share = (dp - 1) / dp
        sent = share * parameters.trained * (FP32_BYTES + BYTES[self.precision] if zero1 else 2 * FP32_BYTES)
        return sent / self._link_rate(between_machines)

    def update_seconds(self, parameters: Parameters, *, dp: int, zero1: bool) -> float:
        """AdamW reads gradient, moments and master weight, and writes moments, master weight and weight."""
        moved = parameters.trained * (7 * FP32_BYTES + BYTES[self.precision])
        return moved / (dp if zero1 else 1) / self._memory_rate

    @property
    def _memory_rate(self) -> float:
        return self.gpu.memory_bandwidth * self.efficiency.memory

    def _link_rate(self, between_machines: bool) -> float:
        bandwidth = self.gpu.network_bandwidth if between_machines else self.gpu.nvlink_bandwidth
        return bandwidth * self.efficiency.links
