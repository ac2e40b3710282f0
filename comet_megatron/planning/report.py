"""What a step of one pipeline costs: its simulated schedule, memory of stages, messages of links. Pure, no torch.

The op lists are those that training runs. Time is counted in forwards of one layer on one steady chunk, from FLOPs: a
real machine is slower where a product is small, and messages take time too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from comet_megatron.chunking import ChunkPlan, plan_chunks
from comet_megatron.config.schema import Architecture, Config, MemorySizes
from comet_megatron.data.cuts import Cuts
from comet_megatron.errors import ConfigError
from comet_megatron.parallel.schedule import (
    Kind,
    Op,
    Workload,
    plan_schedule,
    plan_whole_sequences,
    recompute_everything,
    recompute_nothing,
    without_needless_recompute,
)
from comet_megatron.parallel.simulator import Cost, Timeline, lower_bound, replay
from comet_megatron.planning.activations import Shards
from comet_megatron.planning.balance import (
    ChunkCosts,
    chunk_costs,
    resolve_layers_per_stage,
    stage_layers,
    steady_chunk,
)
from comet_megatron.planning.costs import layer_flops, plan_costs
from comet_megatron.planning.cutting import FULL_CHUNKS, Cutting
from comet_megatron.planning.footprint import RankBytes, StageSetup, most_live_bytes, rank_bytes
from comet_megatron.planning.memory import (
    BYTES,
    Parameters,
    StateBytes,
    count_parameters,
    message_bytes,
    state_bytes,
)

Plans = Sequence[Sequence[ChunkPlan]]  # chunks of each sequence


@dataclass(frozen=True)
class StageReport:
    """One stage, on one of its ranks.

    Attributes:
        layers: 0-based numbers in the whole model.
        parameters: on this rank.
        state: weights, gradients, optimizer.
        bytes: at the moment of a step that needs most; where cuts are drawn, of the worst for each item.
        live_chunks: most chunks held at once, between forward and backward.
        checkpoint_bytes: most that recomputation keeps of live chunks at once, or would keep.
        share_of_work: work of the stage / mean of all stages.
    """

    layers: range
    parameters: Parameters
    state: StateBytes
    bytes: RankBytes
    live_chunks: int
    checkpoint_bytes: int
    share_of_work: float


@dataclass(frozen=True)
class PipelineReport:
    """One step of one pipeline.

    Attributes:
        tokens: text tokens of each sequence.
        chunks: of each sequence.
        costs: of a steady chunk, by which layers are split.
        timeline: of the step; time in forwards of one layer on a steady chunk.
        bound: no order of the ops is faster, same time.
        whole_sequences: of ordinary 1F1B, with sequences as microbatches that know no chunks.
        links: between neighbouring stages.
        messages: over each link in a step, each way.
        link_bytes: of them in a step, each way, for one rank.
        cuts_are_drawn: times are of one draw, bytes of the worst.
    """

    tokens: tuple[int, ...]
    chunks: tuple[int, ...]
    costs: ChunkCosts
    timeline: Timeline
    bound: float
    whole_sequences: Timeline
    stages: tuple[StageReport, ...]
    links: int
    messages: int
    link_bytes: int
    cuts_are_drawn: bool = False

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        return tuple(len(stage.layers) for stage in self.stages)

    @property
    def efficiency(self) -> float:
        """Of the fastest order there can be."""
        return self.bound / self.timeline.makespan


def plan_pipeline(
    config: Config,
    architecture: Architecture,
    memory: MemorySizes,
    tokens: Sequence[int],
    *,
    longest: int,
    dp: int = 1,
    cuts: Sequence[Cuts] | None = None,
    cutting: Cutting = FULL_CHUNKS,
    on_cuda: bool = False,
) -> PipelineReport:
    """Simulate one step of one pipeline. Every text token but a sequence's first is a label.

    Args:
        config: valid for this model (config/rules.py).
        tokens: text tokens of each sequence of the step.
        longest: text tokens of the longest sequence of all steps, by which training splits the layers.
        dp: data-parallel ranks, which share the optimizer's state with parallel.zero1.
        cuts: of each sequence; None: full chunks.
        cutting: what they were drawn from.
        on_cuda: the memory is that of a GPU's tensors.

    Raises:
        ConfigError: no sequence, one without a label, or more stages than layers.
    """
    check_sequences(tokens)
    recompute = config.train.recompute == "full"
    # The last token has no label and no influence on the loss: training leaves it out.
    plans = [plan_chunks(count - 1, memory) for count in tokens]
    if cuts is not None:
        plans = [
            plan_chunks(count - 1, memory, lengths=cut.lengths, stride=cut.stride)
            for count, cut in zip(tokens, cuts, strict=True)
        ]
    costs = chunk_costs(architecture, memory, tokens=longest, recompute=recompute, cutting=cutting)
    split = resolve_layers_per_stage(
        config.parallel.layers_per_stage,
        architecture,
        memory,
        num_stages=config.parallel.pp,
        tokens=longest,
        recompute=recompute,
        cutting=cutting,
    )
    flops = plan_costs(architecture, plans, [[plan.num_text for plan in sequence] for sequence in plans], split)
    unit = layer_flops(architecture, steady_chunk(memory, tokens=longest))

    def cost(op: Op) -> float:
        return flops(op) / unit

    work = _workload(config, plans, len(split))
    work, timeline = simulate(work, plan_schedule(work, slack=config.parallel.slack), cost=cost)
    whole = replace(work, whole_messages=True, recompute=recompute_everything if recompute else recompute_nothing)
    _, whole_sequences = simulate(whole, plan_whole_sequences(whole), cost=cost)

    shards = config.parallel.tp if config.parallel.sequence_parallel else 1
    sizes = {"dtype_bytes": BYTES[config.model.precision], "sequence_shards": shards}
    return PipelineReport(
        tokens=tuple(tokens),
        chunks=work.chunks,
        costs=costs,
        timeline=timeline,
        bound=lower_bound(work, cost=cost),
        whole_sequences=whole_sequences,
        stages=_report_stages(
            config,
            architecture,
            memory,
            [(plans, timeline), *_worst_cuts(config, memory, tokens, cutting, len(split))],
            split,
            dp=dp,
            on_cuda=on_cuda,
        ),
        links=len(split) - 1,
        messages=sum(work.chunks),
        link_bytes=sum(message_bytes(architecture, plan, **sizes) for sequence in plans for plan in sequence),
        cuts_are_drawn=cutting.draws(memory),
    )


def check_sequences(tokens: Sequence[int]) -> None:
    """
    Raises:
        ConfigError: no sequence, or one without a label.
    """
    if not tokens:
        raise ConfigError("a step without sequences has nothing to plan", way_out="give the length of one or more")
    if too_short := [count for count in tokens if count < 2]:
        what = f"a sequence of {too_short[0]} tokens has no chunk to train on: a label needs a token before it"
        raise ConfigError(what, way_out="give sequences of 2 tokens or more")


def simulate(
    work: Workload, op_lists: Sequence[Sequence[Op]], *, cost: Cost, latency: float = 0.0
) -> tuple[Workload, Timeline]:
    """The timeline of op lists as training runs them, without needless recomputation; and the work that this leaves."""
    kept_lists = [without_needless_recompute(ops) for ops in op_lists]
    kept = {(op.stage, op.sequence, op.chunk) for ops in kept_lists for op in ops if op.kind is Kind.RECOMPUTE}

    def is_recomputed(stage: int, sequence: int, chunk: int) -> bool:
        return (stage, sequence, chunk) in kept

    work = replace(work, recompute=is_recomputed)
    return work, replay(kept_lists, work, cost=cost, latency=latency)


def _workload(config: Config, plans: Plans, num_stages: int) -> Workload:
    return Workload(
        num_stages=num_stages,
        chunks=tuple(map(len, plans)),
        bptt_chunks=None if isinstance(config.train.bptt_chunks, str) else config.train.bptt_chunks,
        recompute=recompute_everything if config.train.recompute == "full" else recompute_nothing,
    )


def _worst_cuts(
    config: Config, memory: MemorySizes, tokens: Sequence[int], cutting: Cutting, num_stages: int
) -> list[tuple[Plans, Timeline]]:
    """Where cuts are drawn: full chunks at the model's stride, of which one is largest, and chunks as short as can be,
    which keep the most of a sequence."""
    if not cutting.draws(memory):
        return []
    found: list[tuple[Plans, Timeline]] = []
    for length in {memory.chunk_size, cutting.shortest(memory)}:
        plans = [plan_chunks(n - 1, memory, lengths=(length,) * -(-n // length)) for n in tokens]
        work = _workload(config, plans, num_stages)
        # How long chunks live hardly depends on costs.
        _, timeline = simulate(work, plan_schedule(work, slack=config.parallel.slack), cost=lambda op: 1.0)
        found.append((plans, timeline))
    return found


def _report_stages(
    config: Config,
    architecture: Architecture,
    memory: MemorySizes,
    cases: Sequence[tuple[Plans, Timeline]],
    split: Sequence[int],
    *,
    dp: int,
    on_cuda: bool,
) -> tuple[StageReport, ...]:
    """Times are those of the first case; of each item of bytes it is the case that needs most."""
    parallel, train = config.parallel, config.train
    timeline = cases[0][1]
    mean_work = sum(timeline.busy) / len(split)
    reports = []
    for stage, layers in enumerate(stage_layers(split)):
        ends = {"is_first": stage == 0, "is_last": stage == len(split) - 1}
        parameters = count_parameters(
            architecture, memory, len(layers), tp=parallel.tp, trainable=train.trainable, **ends
        )
        state = state_bytes(parameters, precision=config.model.precision, dp=dp, zero1=parallel.zero1)
        setup = StageSetup(
            architecture,
            memory,
            len(layers),
            **ends,
            dtype_bytes=BYTES[config.model.precision],
            shards=Shards(parallel.tp, parallel.sequence_parallel, on_cuda),
            recompute=train.recompute == "full",
            slice_tokens=train.loss_slice_tokens,
            slack=parallel.slack,
            trains_backbone=train.trainable == "all",
        )
        found = [rank_bytes(setup, state, plans, lived, stage, dp=dp, zero1=parallel.zero1) for plans, lived in cases]
        reports.append(
            StageReport(
                layers=layers,
                parameters=parameters,
                state=state,
                bytes=RankBytes.worst(found),
                live_chunks=timeline.live_chunks(stage),
                checkpoint_bytes=max(_kept(setup, plans, lived, stage) for plans, lived in cases),
                share_of_work=timeline.busy[stage] / mean_work,
            )
        )
    return tuple(reports)


def _kept(setup: StageSetup, plans: Plans, timeline: Timeline, stage: int) -> int:
    kept = {plan: setup.checkpoint_bytes(plan) for plan in chain(*plans)}
    return most_live_bytes(timeline, stage, lambda op: kept[plans[op.sequence][op.chunk]])
