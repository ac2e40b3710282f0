"""The search over layouts: what it keeps fits and is fastest, and what it leaves out has a reason."""

from dataclasses import replace

import pytest

from comet_megatron.chunking import plan_chunks
from comet_megatron.parallel.schedule import Workload, plan_schedule, recompute_everything
from comet_megatron.planning.advice import describe_advice
from comet_megatron.planning.advise import Question, _Candidate, advise
from comet_megatron.planning.devices import GPUS
from comet_megatron.planning.report import simulate
from comet_megatron.planning.shapes import named_shape

MODEL, MEMORY = named_shape("qwen3-8b")


def question(*, tokens=32768, sequences=8, num_gpus=8, gpu="h100", **changes):
    kind = GPUS[gpu]
    return Question(
        MODEL, MEMORY, tokens, sequences, num_gpus, kind, changes.pop("memory_bytes", kind.memory_bytes), **changes
    )


def test_every_layout_is_either_kept_or_refused_and_what_is_kept_fits_fastest_first():
    asked = question()
    advice = advise(asked)
    layouts = [one.layout for one in (*advice.options, *advice.refusals)]
    assert len(set(layouts)) == len(layouts) == 2 * (4 + 3 + 2 + 1)  # TP 1, 2, 4, 8 with what divides the rest
    assert all(option.needs.total <= asked.usable_bytes for option in advice.options)
    seconds = [option.seconds for option in advice.options]
    assert seconds == sorted(seconds) and len(seconds) == 3
    assert all(
        refusal.needed_bytes > asked.usable_bytes for refusal in advice.refusals if refusal.reason == "does not fit"
    )


def test_keeping_all_options_finds_none_faster_than_the_best():
    few, all_ = advise(question(), best=1), advise(question(), best=100)
    assert few.options[0] == all_.options[0]
    assert len(all_.options) > 3 and not any(refusal.reason.startswith("takes") for refusal in all_.refusals)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_gpus": 16}, "TP 16 is more than the 8 GPUs of a machine"),
        ({"num_gpus": 64, "sequences": 64}, "PP 64 is more stages than 36 layers"),
        ({"sequences": 4}, "DP 8 does not divide 4 sequences a step"),
        ({"num_gpus": 3, "sequences": 3}, "TP 3 does not divide 32 query heads and 8 key-value heads"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_its_reason(changes, reason):
    assert reason in {refusal.reason for refusal in advise(question(**changes)).refusals}


def test_less_memory_leaves_fewer_layouts_and_at_last_none():
    def count(gigabytes):
        return len(advise(question(memory_bytes=int(gigabytes * 1e9)), best=100).options)

    assert count(141) > count(40) > count(10) == 0


@pytest.mark.parametrize(("tokens", "pp", "sequences"), [(65536 * 2, 8, 3), (65536 * 4, 4, 1), (65536, 2, 5)])
def test_the_beginning_of_a_step_says_how_long_the_whole_takes(tokens, pp, sequences):
    asked = question(tokens=tokens + 1, sequences=sequences, num_gpus=pp, memory_bytes=10**12)
    option = next(o for o in advise(asked, best=100).options if (o.layout.pp, o.layout.recompute) == (pp, True))
    candidate = _Candidate.build(option.layout, asked)
    whole = candidate._simulate(plan_chunks(tokens, MEMORY), sequences) + candidate.reduction + candidate.update
    assert option.seconds == pytest.approx(whole, rel=0.02)
    assert candidate.least_seconds <= option.seconds * 1.005


def test_live_chunks_are_not_more_than_planned():
    """Of one sequence all; of several the schedule's lead more."""
    chunks = len(plan_chunks(32767, MEMORY))
    work = Workload(4, (chunks,) * 3, recompute=recompute_everything)
    _, timeline = simulate(work, plan_schedule(work), cost=lambda op: 1.0)
    for stage in range(4):
        assert timeline.live_chunks(stage) <= chunks + 2 * (3 - stage)


def test_the_advice_tells_items_settings_and_reasons():
    asked = question()
    text = "\n".join(describe_advice(asked, advise(asked), model="qwen3-8b"))
    assert "8 x h100" in text and "use      parallel.tp=" in text
    assert "layouts do not fit; the nearest" in text
    assert "A plan: nothing of it was run" in text
    none = replace(asked, memory_bytes=10**9)
    assert "No layout of these GPUs fits." in describe_advice(none, advise(none), model="qwen3-8b")
