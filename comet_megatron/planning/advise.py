"""Which layouts of a number of GPUs fit a model, which of them are fastest, and why the others are not used. Pure.

Every layout of tensor-parallel size, stages and data-parallel size is looked at, with and without recomputation, with
sequence parallelism where there is tensor parallelism, and with ZeRO-1. Those that fit are simulated, the most
promising first, until no other can be faster. The beginning of a step is simulated (two sequences of some chunks a
stage); what follows takes as long as the busiest stage works.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

from comet_megatron.chunking import ChunkPlan, plan_chunks
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.parallel.schedule import (
    Kind,
    Op,
    Workload,
    plan_schedule,
    recompute_everything,
    recompute_nothing,
)
from comet_megatron.planning.activations import Shards
from comet_megatron.planning.balance import split_layers
from comet_megatron.planning.costs import head_flops, layer_flops
from comet_megatron.planning.devices import Gpu
from comet_megatron.planning.footprint import RankBytes, StageSetup
from comet_megatron.planning.memory import BYTES, Parameters, count_parameters, state_bytes
from comet_megatron.planning.report import simulate
from comet_megatron.planning.time import Efficiency, Roofline

SIMULATED_SEQUENCES = 2
SIMULATED_CHUNKS, CHUNKS_PER_STAGE = 16, 2  # of a sequence: so many, and so many more for each stage
# Of a GPU's memory: its context, NCCL's buffers, what the allocator loses between tensors. Assumed.
NOT_PLANNED = 0.08


@dataclass(frozen=True)
class Question:
    """A training step to find a layout for.

    Attributes:
        tokens: text tokens of each sequence.
        sequences: of a step, over all ranks.
        memory_bytes: of one GPU, all of it.
        trainable, slice_tokens, slack: as in the config.
    """

    architecture: Architecture
    memory: MemorySizes
    tokens: int
    sequences: int
    num_gpus: int
    gpu: Gpu
    memory_bytes: int
    precision: str = "bf16"
    trainable: str = "all"
    slice_tokens: int = 1024
    slack: int = 1
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def usable_bytes(self) -> int:
        """Of one GPU, for what is planned."""
        return int(self.memory_bytes * (1 - NOT_PLANNED))


@dataclass(frozen=True)
class Layout:
    """One way to use the GPUs."""

    tp: int
    pp: int
    dp: int
    recompute: bool

    def __str__(self) -> str:
        return f"TP {self.tp}, PP {self.pp}, DP {self.dp}, recompute {'full' if self.recompute else 'none'}"

    @property
    def settings(self) -> str:
        """As overrides of a config."""
        words = [f"parallel.tp={self.tp}", f"parallel.pp={self.pp}"]
        words += ["parallel.sequence_parallel=true"] if self.tp > 1 else []
        return " ".join([*words, f"train.recompute={'full' if self.recompute else 'none'}"])


@dataclass(frozen=True)
class Option:
    """A layout that fits.

    Attributes:
        needs: of the stage that needs most.
        layers: of each stage.
        seconds: of a step.
        bubble: share of the stages' time in which they wait, reduction and update left out.
        reduction_seconds, update_seconds: of these seconds.
        tokens_per_second: text tokens, of one GPU.
        mfu: FLOPs of the model, without recomputation, over the dense bf16 peak.
    """

    layout: Layout
    needs: RankBytes
    layers: tuple[int, ...]
    seconds: float
    bubble: float
    reduction_seconds: float
    update_seconds: float
    tokens_per_second: float
    mfu: float


@dataclass(frozen=True)
class Refusal:
    """A layout that is not used.

    Attributes:
        needed_bytes: of a rank, where it does not fit; else 0.
    """

    layout: Layout
    reason: str
    needed_bytes: int = 0


@dataclass(frozen=True)
class Advice:
    """The fastest layouts, fastest first, and all others."""

    options: tuple[Option, ...]
    refusals: tuple[Refusal, ...]


def advise(question: Question, *, best: int = 3) -> Advice:
    """Look at every layout of the GPUs and keep the `best` fastest."""
    fitting: list[_Candidate] = []
    refusals = []
    for layout in _layouts(question):
        if reason := _impossible(layout, question):
            refusals.append(Refusal(layout, reason))
            continue
        candidate = _Candidate.build(layout, question)
        if candidate.needs.total > question.usable_bytes:
            refusals.append(Refusal(layout, "does not fit", candidate.needs.total))
        else:
            fitting.append(candidate)
    options: list[Option] = []
    for candidate in sorted(fitting, key=lambda one: one.least_seconds):
        if len(options) >= best and options[best - 1].seconds <= candidate.least_seconds:
            refusals.append(Refusal(candidate.layout, f"takes {candidate.least_seconds:.1f} s or more"))
            continue
        options = sorted([*options, candidate.simulated()], key=lambda option: option.seconds)
    refusals += [Refusal(option.layout, f"takes {option.seconds:.1f} s") for option in options[best:]]
    return Advice(tuple(options[:best]), tuple(refusals))


def _layouts(question: Question) -> Iterator[Layout]:
    for tp in _divisors(question.num_gpus):
        for pp in _divisors(question.num_gpus // tp):
            for recompute in (False, True):
                yield Layout(tp, pp, question.num_gpus // tp // pp, recompute)


def _impossible(layout: Layout, question: Question) -> str:
    """Why it cannot be, before anything is counted; "" where it can."""
    a = question.architecture
    shared = {
        "query heads": a.num_attention_heads,
        "key-value heads": a.num_query_groups,
        "feed-forward width": a.ffn_hidden_size,
    }
    if layout.tp > question.gpu.per_machine:
        return f"TP {layout.tp} is more than the {question.gpu.per_machine} GPUs of a machine"
    if indivisible := [f"{count} {name}" for name, count in shared.items() if count % layout.tp]:
        return f"TP {layout.tp} does not divide {' and '.join(indivisible)}"
    if layout.pp > a.num_layers:
        return f"PP {layout.pp} is more stages than {a.num_layers} layers"
    if question.sequences % layout.dp:
        return f"DP {layout.dp} does not divide {question.sequences} sequences a step"
    return ""


@dataclass(frozen=True)
class _Candidate:
    """A layout that can be, with what is known of it without a simulation.

    Attributes:
        chunks: of a sequence.
        split: layers of each stage.
        needs: of the stage that needs most.
        reduction, update: seconds after the last backward.
    """

    layout: Layout
    question: Question
    roofline: Roofline
    chunks: tuple[ChunkPlan, ...]
    split: tuple[int, ...]
    needs: RankBytes
    reduction: float
    update: float

    @classmethod
    def build(cls, layout: Layout, question: Question) -> _Candidate:
        a, memory = question.architecture, question.memory
        shards = Shards(layout.tp, sequence_parallel=layout.tp > 1, on_cuda=True)
        roofline = Roofline(a, memory, question.gpu, question.precision, shards, question.efficiency)
        chunks = _chunks(question.tokens - 1, memory)
        steady = _steady(chunks)
        forward, backward = roofline.layer_seconds(steady)
        layer, head = (1 + layout.recompute) * forward + backward, roofline.head_seconds(steady.num_text)
        split = split_layers(a.num_layers, layout.pp, layer=layer, last=head)
        parameters = [
            count_parameters(a, memory, count, tp=layout.tp, trainable=question.trainable, **_ends(split, number))
            for number, count in enumerate(split)
        ]
        far = layout.tp * layout.dp > question.gpu.per_machine  # ranks are counted along TP, then DP, then PP
        return cls(
            layout,
            question,
            roofline,
            chunks,
            split,
            needs=max(
                (_needs(layout, question, shards, split, n, p, chunks) for n, p in enumerate(parameters)),
                key=lambda needs: needs.total,
            ),
            reduction=max(
                roofline.reduction_seconds(p, dp=layout.dp, zero1=True, between_machines=far) for p in parameters
            ),
            update=max(roofline.update_seconds(p, dp=layout.dp, zero1=True) for p in parameters),
        )

    @property
    def per_pipeline(self) -> int:
        """Sequences that one pipeline works on in a step."""
        return self.question.sequences // self.layout.dp

    def _work(self, chunks: Sequence[ChunkPlan]) -> list[float]:
        """Seconds that each stage works on a sequence."""
        layer = head = 0.0
        for plan, count in shapes_of(tuple(chunks)).items():
            forward, backward = self.roofline.layer_seconds(plan)
            layer += count * ((1 + self.layout.recompute) * forward + backward)
            head += count * self.roofline.head_seconds(plan.num_text)
        if self.layout.recompute:  # but not the last chunk: its backward follows its forward
            layer -= self.roofline.layer_seconds(chunks[-1])[0]
        return [count * layer + (head if n == len(self.split) - 1 else 0.0) for n, count in enumerate(self.split)]

    @property
    def least_seconds(self) -> float:
        """The busiest stage's work, and the first chunk's way to the last stage and back."""
        forward, backward = self.roofline.layer_seconds(self.chunks[0])
        way = (sum(self.split) - max(self.split)) * (forward + backward)
        return self.per_pipeline * max(self._work(self.chunks)) + way + self.reduction + self.update

    def simulated(self) -> Option:
        """Simulate the beginning of a step."""
        question, layout = self.question, self.layout
        some = _chunks(
            min(question.tokens - 1, question.memory.chunk_size * (SIMULATED_CHUNKS + CHUNKS_PER_STAGE * layout.pp)),
            question.memory,
        )
        sequences = min(SIMULATED_SEQUENCES, self.per_pipeline)
        makespan = self._simulate(some, sequences)
        work = self._work(self.chunks)
        makespan += self.per_pipeline * max(work) - sequences * max(self._work(some))
        seconds = makespan + self.reduction + self.update
        flops = question.sequences * model_flops(question.architecture, self.chunks)
        return Option(
            layout=layout,
            needs=self.needs,
            layers=self.split,
            seconds=seconds,
            bubble=max(0.0, 1 - self.per_pipeline * sum(work) / len(work) / makespan),
            reduction_seconds=self.reduction,
            update_seconds=self.update,
            tokens_per_second=question.sequences * question.tokens / seconds / question.num_gpus,
            mfu=flops / seconds / question.num_gpus / question.gpu.bf16_flops,
        )

    def _simulate(self, chunks: Sequence[ChunkPlan], sequences: int) -> float:
        """Makespan of a step of so many sequences."""
        question = self.question

        @cache
        def seconds(kind: Kind, stage: int, plan: ChunkPlan) -> float:
            op = Op(kind, stage, 0, 0)
            return self.roofline.op_seconds(op, plan, layers=self.split[stage], has_head=stage == len(self.split) - 1)

        shapes = [shape_of(plan) for plan in chunks]
        work = Workload(
            num_stages=self.layout.pp,
            chunks=(len(chunks),) * sequences,
            recompute=recompute_everything if self.layout.recompute else recompute_nothing,
        )
        far = question.num_gpus > question.gpu.per_machine
        _, timeline = simulate(
            work,
            plan_schedule(work, slack=question.slack),
            cost=lambda op: seconds(op.kind, op.stage, shapes[op.chunk]),
            latency=self.roofline.message_seconds(_steady(chunks), between_machines=far),
        )
        return timeline.makespan


def _needs(
    layout: Layout,
    question: Question,
    shards: Shards,
    split: Sequence[int],
    number: int,
    parameters: Parameters,
    chunks: Sequence[ChunkPlan],
) -> RankBytes:
    """Of a rank of a stage; of live chunks the most that the schedule allows (schedule.live_chunks_bound)."""
    setup = StageSetup(
        question.architecture,
        question.memory,
        split[number],
        **_ends(split, number),
        dtype_bytes=BYTES[question.precision],
        shards=shards,
        recompute=layout.recompute,
        slice_tokens=question.slice_tokens,
        slack=question.slack,
        trains_backbone=question.trainable == "all",
    )
    state = state_bytes(parameters, precision=question.precision, dp=layout.dp, zero1=True)
    shapes = shapes_of(tuple(chunks))
    kept = sum(count * setup.kept_bytes(plan) for plan, count in shapes.items())
    if question.sequences > layout.dp:
        kept += (1 + question.slack) * (layout.pp - 1 - number) * max(map(setup.kept_bytes, shapes))
    return setup.needs(state, kept=kept, plans=list(shapes), dp=layout.dp, zero1=True)


def _ends(split: Sequence[int], number: int) -> dict[str, bool]:
    return {"is_first": number == 0, "is_last": number == len(split) - 1}


def _steady(chunks: Sequence[ChunkPlan]) -> ChunkPlan:
    return chunks[-2] if len(chunks) > 1 else chunks[0]


@lru_cache(maxsize=64)
def _chunks(tokens: int, memory: MemorySizes) -> tuple[ChunkPlan, ...]:
    return plan_chunks(tokens, memory)


@lru_cache(maxsize=64)
def shapes_of(chunks: tuple[ChunkPlan, ...]) -> Counter[ChunkPlan]:
    """Chunks that cost the same, and how many there are of each."""
    return Counter(map(shape_of, chunks))


def shape_of(plan: ChunkPlan) -> ChunkPlan:
    """Equal for chunks that cost the same."""
    return replace(plan, index=0, text_start=0, text_end=plan.num_text)


def model_flops(architecture: Architecture, chunks: Sequence[ChunkPlan]) -> float:
    """Forward and backward of one sequence, without recomputation: three times the forward."""
    layers = sum(count * layer_flops(architecture, plan) for plan, count in shapes_of(tuple(chunks)).items())
    return 3 * (architecture.num_layers * layers + head_flops(architecture, sum(plan.num_text for plan in chunks)))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
