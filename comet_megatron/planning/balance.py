"""Which layers each stage holds: as many as make the slowest stage as fast as can be. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from comet_megatron.chunking import ChunkPlan, plan_chunks
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.errors import ConfigError
from comet_megatron.planning.costs import embedding_flops, head_flops, layer_flops
from comet_megatron.planning.cutting import FULL_CHUNKS, Cutting

AUTO = "auto"
_STAGES_TOLD_ONE_BY_ONE = 8


@dataclass(frozen=True)
class ChunkCosts:
    """FLOPs of a chunk in a step, forward and backward together.

    Attributes:
        layer: of each layer.
        first: of what the first stage has beside its layers, the embedding.
        last: of what the last stage has beside its layers, the head and the loss.
    """

    layer: float
    first: float = 0.0
    last: float = 0.0


def steady_chunk(
    memory: MemorySizes, *, tokens: int, length: int | None = None, stride: int | None = None
) -> ChunkPlan:
    """The chunk that stands for most of a sequence's: the last full one that writes memory, or the only one.

    Args:
        tokens: text tokens of the sequence, 1 or more.
        length: text tokens of a chunk instead of the model's.
        stride: text tokens per beacon instead of the model's.
    """
    lengths = None if length is None else (length,) * -(-tokens // length)
    plans = plan_chunks(tokens, memory, lengths=lengths, stride=stride)
    return plans[-2] if len(plans) > 1 else plans[0]


def chunk_costs(
    architecture: Architecture,
    memory: MemorySizes,
    *,
    tokens: int,
    labelled_share: float = 1.0,
    recompute: bool = False,
    cutting: Cutting = FULL_CHUNKS,
) -> ChunkCosts:
    """Costs of a steady chunk; with `recompute` its layers run forward twice, the head never does.

    Args:
        tokens: text tokens of the sequence.
        labelled_share: of the text tokens that have a label.
        cutting: where cuts are drawn, the expected costs of as much text as a full chunk has.
    """
    full = steady_chunk(memory, tokens=tokens)
    if not cutting.draws(memory):
        return _costs_of(architecture, full, labelled_share=labelled_share, recompute=recompute)
    strides, mean = cutting.strides(memory), ChunkCosts(0.0)
    for length, share in cutting.expected_lengths(memory, tokens=tokens).items():
        for stride in strides:
            plan = steady_chunk(memory, tokens=tokens, length=length, stride=stride)
            costs = _costs_of(architecture, plan, labelled_share=labelled_share, recompute=recompute)
            weight = share / len(strides) * full.num_text / plan.num_text
            mean = ChunkCosts(
                layer=mean.layer + weight * costs.layer,
                first=mean.first + weight * costs.first,
                last=mean.last + weight * costs.last,
            )
    return mean


def _costs_of(architecture: Architecture, plan: ChunkPlan, *, labelled_share: float, recompute: bool) -> ChunkCosts:
    forwards = 2 if recompute else 1
    return ChunkCosts(
        layer=(forwards + 2) * layer_flops(architecture, plan),
        first=forwards * embedding_flops(architecture, plan),
        last=3 * head_flops(architecture, labelled_share * plan.num_text),
    )


def split_layers(
    num_layers: int, num_stages: int, *, layer: float, first: float = 0.0, last: float = 0.0
) -> tuple[int, ...]:
    """Layers of each stage, at least one, so that the largest cost of a stage is smallest.

    One layer after the other goes to the stage that is cheapest so far, the first of several. As all layers cost the
    same, no other split has a smaller largest cost, nor with the same one a smaller sum of squares.

    Args:
        layer: cost of a layer.
        first, last: cost of what the first and the last stage have beside their layers.

    Raises:
        ConfigError: more stages than layers, or no stage.
    """
    if num_stages < 1:
        raise ConfigError(f"a pipeline of {num_stages} stages has none; use parallel.pp=1 or more")
    if num_stages > num_layers:
        what = f"parallel.pp={num_stages} stages cannot each have one of the model's {num_layers} layers"
        raise ConfigError(what, way_out=f"use parallel.pp={num_layers} or fewer")
    layers = [1] * num_stages
    for _ in range(num_layers - num_stages):
        costs = stage_costs(layers, ChunkCosts(layer, first, last))
        layers[costs.index(min(costs))] += 1
    return tuple(layers)


def stage_costs(layers_per_stage: Sequence[int], costs: ChunkCosts) -> list[float]:
    """Cost of each stage."""
    total = [count * costs.layer for count in layers_per_stage]
    total[0] += costs.first
    total[-1] += costs.last
    return total


def resolve_layers_per_stage(
    setting: str | tuple[int, ...],
    architecture: Architecture,
    memory: MemorySizes,
    *,
    num_stages: int,
    tokens: int,
    labelled_share: float = 1.0,
    recompute: bool = False,
    cutting: Cutting = FULL_CHUNKS,
) -> tuple[int, ...]:
    """What parallel.layers_per_stage means: a list as it is, "auto" by the costs of a steady chunk.

    Args:
        tokens: text tokens of the sequence that the costs are taken from.
        labelled_share: of the text tokens that have a label.
        recompute: layers run forward twice.
        cutting: how sequences are cut into chunks.

    Raises:
        ConfigError: more stages than layers, or another word.
    """
    if isinstance(setting, tuple):
        return setting
    if setting != AUTO:
        what = f"parallel.layers_per_stage={setting!r} must be auto or a list such as [8, 8, 6]"
        raise ConfigError(what)
    costs = chunk_costs(
        architecture,
        memory,
        tokens=max(tokens, 1),
        labelled_share=labelled_share,
        recompute=recompute,
        cutting=cutting,
    )
    return split_layers(architecture.num_layers, num_stages, layer=costs.layer, first=costs.first, last=costs.last)


def stage_layers(layers_per_stage: Sequence[int]) -> list[range]:
    """0-based numbers of each stage's layers in the whole model."""
    ends = list(accumulate(layers_per_stage))
    return [range(end - count, end) for end, count in zip(ends, layers_per_stage, strict=True)]


def describe_split(layers_per_stage: Sequence[int], costs: ChunkCosts, *, setting: str | tuple[int, ...]) -> str:
    """One line for the user, such as `stages   PP 4: 10 + 10 + 9 + 7 layers (by cost: the head weighs 2.1 layers)`.

    Args:
        setting: parallel.layers_per_stage as it was given.
    """
    plural = "s" * (sum(layers_per_stage) > 1)
    line = f"stages   PP {len(layers_per_stage)}: {told_layers(layers_per_stage)} layer{plural}"
    if len(layers_per_stage) == 1:
        return line
    how = "by cost" if setting == AUTO else "as given"
    return f"{line} ({how}: the head weighs {costs.last / costs.layer:.1f} layers)"


def told_layers(layers_per_stage: Sequence[int]) -> str:
    """`9 + 10 + 10 + 7`; of many stages equal neighbours together, `15 x 4 + 3`."""
    if len(layers_per_stage) <= _STAGES_TOLD_ONE_BY_ONE:
        return " + ".join(map(str, layers_per_stage))
    runs = [(count, len(list(same))) for count, same in groupby(layers_per_stage)]
    return " + ".join(f"{length} x {count}" if length > 1 else str(count) for count, length in runs)
