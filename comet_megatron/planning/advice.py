"""What tools/plan.py --advise says: the fastest layouts item by item, what to type, why the others are not used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from comet_megatron.planning.advise import NOT_PLANNED, Advice, Option, Question, Refusal
from comet_megatron.planning.balance import told_layers
from comet_megatron.planning.told import aligned, counted

GB = 1e9
PLAN_ONLY = "A plan: nothing of it was run. What is counted and what is assumed: docs/planning.md."
_SLOWER, _TOO_LARGE = "takes", "does not fit"


def describe_advice(question: Question, advice: Advice, *, model: str) -> list[str]:
    """In lines."""
    lines = [*_question(question, model), ""]
    if advice.options:
        first = advice.options[0]
        lines += [*_table(advice.options), "", f"use      {first.layout.settings}", f"         {_stages(first)}", ""]
    else:
        lines += ["No layout of these GPUs fits.", ""]
    return [*lines, "not used", *_refusals(question, advice.refusals), "", PLAN_ONLY]


def _question(question: Question, model: str) -> list[str]:
    a, memory, gpu, share = question.architecture, question.memory, question.gpu, question.efficiency
    return [
        f"model    {model}: {a.family}, {counted(a.num_layers, 'layer')}, hidden {a.hidden_size}, vocabulary "
        f"{a.vocab_size:,}; chunks of {memory.chunk_size}, {memory.global_slots} global slots, stride {memory.stride}",
        f"step     {counted(question.sequences, 'sequence')} of {question.tokens:,} tokens, {question.precision}",
        f"GPUs     {question.num_gpus} x {gpu.name}, {gpu.per_machine} a machine: {question.memory_bytes / GB:.1f} GB "
        f"each, of which {question.usable_bytes / GB:.1f} are planned ({NOT_PLANNED:.0%} for context, NCCL, allocator)",
        f"assumed  {share.gemm:.0%} of the dense peak in products, {share.attention:.0%} in attention, "
        f"{share.memory:.0%} of the memory's and {share.links:.0%} of the links' bandwidth",
    ]


def _table(options: Sequence[Option]) -> list[str]:
    items = ("weights", "gradients", "optimizer", "chunks", "in work", "buffers", "in all GB")
    rows = [["layout", "step s", "tokens/s/GPU", "MFU", "bubble", *items]]
    for option in options:
        needs = option.needs
        parts = (needs.weights, needs.gradients, needs.optimizer, needs.chunks, needs.in_work, needs.buffers)
        rows.append(
            [
                str(option.layout),
                f"{option.seconds:.1f}",
                f"{option.tokens_per_second:,.0f}",
                f"{option.mfu:.1%}",
                f"{option.bubble:.1%}",
                *(f"{part / GB:.1f}" for part in (*parts, needs.total)),
            ]
        )
    return aligned(rows)


def _stages(option: Option) -> str:
    after = f"{option.reduction_seconds + option.update_seconds:.2f} s of the step are reduction and update"
    return f"{told_layers(option.layers)} layers; {after}"


def _refusals(question: Question, refusals: Sequence[Refusal]) -> list[str]:
    """One line a reason."""
    by_reason: dict[str, list[Refusal]] = defaultdict(list)
    for refusal in refusals:
        by_reason[_SLOWER if refusal.reason.startswith(_SLOWER) else refusal.reason].append(refusal)
    lines = []
    if too_large := by_reason.pop(_TOO_LARGE, []):
        nearest = min(too_large, key=lambda refusal: refusal.needed_bytes)
        lines.append(
            f"  {_layouts(too_large)} not fit; the nearest, {nearest.layout}, needs {nearest.needed_bytes / GB:.1f} GB "
            f"of {question.usable_bytes / GB:.1f}"
        )
    if slower := by_reason.pop(_SLOWER, []):
        lines.append(f"  {counted(len(slower), 'layout')} slower: {slower[0].layout} {slower[0].reason}")
    return [*lines, *(f"  {reason} ({counted(len(found), 'layout')})" for reason, found in by_reason.items())]


def _layouts(found: Sequence[Refusal]) -> str:
    return f"{counted(len(found), 'layout')} do{'es' if len(found) == 1 else ''}"
