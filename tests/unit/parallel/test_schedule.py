"""The order of ops on every stage: complete, the same along the pipeline, with few live chunks and a small bubble."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_megatron.errors import ConfigError
from comet_megatron.parallel.schedule import (
    Kind,
    Op,
    Workload,
    live_chunks_bound,
    max_in_flight_of,
    plan_forwards,
    plan_schedule,
    plan_whole_sequences,
    recompute_everything,
    recompute_nothing,
    without_needless_recompute,
)
from comet_megatron.parallel.simulator import cost_by_kind, replay

LETTERS = {
    Kind.FORWARD: "F",
    Kind.RECOMPUTE: "R",
    Kind.BACKWARD: "B",
    Kind.HIDDEN_GRADIENT: "H",
    Kind.WEIGHT_GRADIENT: "W",
}
PASSES_GRADIENT_ON = (Kind.BACKWARD, Kind.HIDDEN_GRADIENT)
RAGGED = (64, 32, 16, 64, 8, 40)


@dataclass(frozen=True)
class RecomputeSome:
    """Chunks that are computed again, without any regularity along stages, sequences or chunks."""

    pattern: tuple[bool, ...]

    def __call__(self, stage: int, sequence: int, chunk: int) -> bool:
        return self.pattern[(5 * stage + 3 * sequence + chunk) % len(self.pattern)]


workloads = st.builds(
    Workload,
    num_stages=st.integers(1, 9),
    chunks=st.lists(st.integers(1, 24), min_size=1, max_size=5).map(tuple),
    bptt_chunks=st.none() | st.integers(1, 6),
    recompute=st.builds(RecomputeSome, st.lists(st.booleans(), min_size=1, max_size=11).map(tuple)),
    split_backward=st.booleans(),
)
slacks = st.integers(0, 3)
thorough = settings(max_examples=100, deadline=None)


def in_letters(ops) -> str:
    """F01: the forward of sequence 0's chunk 1."""
    return " ".join(f"{LETTERS[op.kind]}{op.sequence}{op.chunk}" for op in ops)


def windows(work: Workload) -> list[list[tuple[int, int]]]:
    """The (sequence, chunk) pairs of every window, in order, by counting."""
    found = []
    for sequence, length in enumerate(work.chunks):
        for chunk in range(length):
            if chunk % (work.bptt_chunks or length) == 0:
                found.append([])
            found[-1].append((sequence, chunk))
    return found


def makespan_and_bubble(work: Workload, plan, **costs: float) -> tuple[float, float]:
    timeline = replay(plan, work, cost=cost_by_kind({Kind[name.upper()]: cost for name, cost in costs.items()}))
    return timeline.makespan, timeline.bubble


# --- the order -------------------------------------------------------------------------------------------------------


@thorough
@given(workloads, slacks)
def test_every_stage_does_each_of_its_ops_once_and_no_other(work, slack):
    for stage, ops in enumerate(plan_schedule(work, slack=slack)):
        expected = Counter()
        for sequence, length in enumerate(work.chunks):
            for chunk in range(length):
                letters = "F" + ("HW" if work.split_backward else "B")
                letters += "R" if work.recompute(stage, sequence, chunk) else ""
                expected += Counter((letter, stage, sequence, chunk) for letter in letters)
        assert Counter((LETTERS[op.kind], *op[1:]) for op in ops) == expected
        assert Counter(work.ops(stage)) == Counter(ops)


@thorough
@given(workloads, slacks)
def test_forwards_go_up_and_backwards_walk_each_window_in_reverse_alike_on_every_stage(work, slack):
    """So that what a link carries in one direction arrives in the order in which it is needed."""
    forwards = [pair for window in windows(work) for pair in window]
    backwards = [pair for window in windows(work) for pair in reversed(window)]
    for ops in plan_schedule(work, slack=slack):
        assert [op[2:] for op in ops if op.kind is Kind.FORWARD] == forwards
        assert [op[2:] for op in ops if op.kind in PASSES_GRADIENT_ON] == backwards


@thorough
@given(workloads, slacks)
def test_a_stage_runs_ahead_by_the_share_of_the_next_window_and_its_lead_and_no_further(work, slack):
    for stage, ops in enumerate(plan_schedule(work, slack=slack)):
        lead = (1 + slack) * (work.num_stages - 1 - stage)
        lengths = [len(window) for window in windows(work)]
        expected = []
        for number, length in enumerate(lengths):
            following = lengths[number + 1] if number + 1 < len(lengths) else 0
            for done in range(length):
                ahead = sum(lengths[: number + 1]) + done * following // length + lead
                expected.append(min(sum(lengths), ahead))
        done_forwards, found = 0, []
        for op in ops:
            done_forwards += op.kind is Kind.FORWARD
            if op.kind in PASSES_GRADIENT_ON:
                found.append(done_forwards)
        assert found == expected


@thorough
@given(workloads, slacks)
def test_a_chunk_is_recomputed_right_before_its_backward(work, slack):
    """Not earlier, for its graph is large; and not after the wait for the gradient, which can be long."""
    for ops in plan_schedule(work, slack=slack):
        for op, following in pairwise(ops):
            if op.kind is Kind.RECOMPUTE:
                assert following.kind in PASSES_GRADIENT_ON and following[1:] == op[1:]


def test_without_slack_the_order_for_equal_sequences_is_that_of_seq1f1b():
    first, last = plan_schedule(Workload(2, (2, 2)), slack=0)
    assert in_letters(first) == "F00 F01 F10 B01 F11 B00 B11 B10"
    assert in_letters(last) == "F00 F01 B01 F10 B00 F11 B11 B10"


def test_a_window_is_worked_off_before_the_chunks_after_it():
    (ops,) = plan_schedule(Workload(1, (4,), bptt_chunks=2))
    assert in_letters(ops) == "F00 F01 B01 F02 B00 F03 B03 B02"


def test_the_ops_of_a_backward_are_recomputation_then_the_hidden_gradient_then_the_weight_gradient():
    (ops,) = plan_schedule(Workload(1, (2,), recompute=recompute_everything, split_backward=True))
    assert in_letters(ops) == "F00 F01 R01 H01 W01 R00 H00 W00"


def test_whole_sequences_are_1f1b_with_a_sequence_as_microbatch():
    first, last = plan_whole_sequences(Workload(2, (2, 1, 1)))
    assert in_letters(first) == "F00 F01 F10 B01 B00 F20 B10 B20"
    assert in_letters(last) == "F00 F01 B01 B00 F10 B10 F20 B20"


def test_evaluation_is_the_forwards_in_order_on_every_stage():
    plans = plan_forwards(Workload(3, (2, 1), recompute=recompute_everything))
    assert [in_letters(ops) for ops in plans] == ["F00 F01 F10"] * 3
    assert [{op.stage for op in ops} for ops in plans] == [{0}, {1}, {2}]


# --- live chunks -----------------------------------------------------------------------------------------------------


def most_live(ops) -> int:
    """Chunks after their forward's start and before their last op's end, counted as a set."""
    last_position = {op[1:]: position for position, op in enumerate(ops)}
    live, most = set(), 0
    for position, op in enumerate(ops):
        live.add(op[1:])
        most = max(most, len(live))
        if last_position[op[1:]] == position:
            live.remove(op[1:])
    return most


@thorough
@given(workloads, slacks)
def test_a_stage_never_holds_more_chunks_than_the_bound(work, slack):
    for stage, ops in enumerate(plan_schedule(work, slack=slack)):
        assert most_live(ops) <= live_chunks_bound(work, stage, slack=slack)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.booleans(), slacks)
def test_equal_windows_reach_the_bound_of_live_chunks(num_stages, length, windowed, slack):
    """One sequence of many windows or many sequences: length + (1 + slack) * (stages behind) chunks are live."""
    many = 1 + -(-(1 + slack) * (num_stages - 1) // length)
    work = Workload(num_stages, (length * many,) if windowed else (length,) * many, length if windowed else None)
    for stage, ops in enumerate(plan_schedule(work, slack=slack)):
        expected = length + (1 + slack) * (num_stages - 1 - stage)
        assert most_live(ops) == live_chunks_bound(work, stage, slack=slack) == expected


# --- needless recomputation ------------------------------------------------------------------------------------------


def shortened(work: Workload, slack: int = 1) -> tuple[list[list[Op]], list[list[Op]]]:
    """The lists without needless recomputation, and on each stage what was left out."""
    plan = plan_schedule(work, slack=slack)
    short = [without_needless_recompute(ops) for ops in plan]
    left_out = []
    for ops, fewer in zip(plan, short, strict=True):
        remaining = iter([*fewer, None])
        expected = next(remaining)
        left_out.append([])
        for op in ops:
            if op == expected:
                expected = next(remaining)
            else:
                left_out[-1].append(op)
        assert expected is None  # what stayed is in the order it had
    return short, left_out


@thorough
@given(workloads, slacks)
def test_the_last_stage_recomputes_all_but_the_last_chunk_of_each_window(work, slack):
    stage = work.num_stages - 1
    ends = [window[-1] for window in windows(work) if work.recompute(stage, *window[-1])]
    assert shortened(work, slack)[1][-1] == [Op(Kind.RECOMPUTE, stage, *end) for end in ends]


@thorough
@given(workloads, slacks)
def test_a_stage_with_others_behind_it_can_keep_no_graph_but_that_of_the_very_last_chunk(work, slack):
    last = (len(work.chunks) - 1, work.chunks[-1] - 1)
    for stage, left_out in enumerate(shortened(work, slack)[1][:-1]):
        assert left_out in ([], [Op(Kind.RECOMPUTE, stage, *last)])


def test_stages_before_the_last_keep_the_very_last_graph_only_if_its_forward_was_not_done_earlier():
    several = Workload(3, (4, 4), recompute=recompute_everything)
    assert [in_letters(left_out) for left_out in shortened(several)[1]] == ["", "", "R03 R13"]
    one = Workload(3, (4,), recompute=recompute_everything)
    assert [in_letters(left_out) for left_out in shortened(one)[1]] == ["R03"] * 3


@thorough
@given(workloads, slacks)
def test_the_shortened_lists_are_a_schedule_of_the_work_that_recomputes_less(work, slack):
    short, left_out = shortened(work, slack)
    kept_graphs = {op[1:] for ops in left_out for op in ops}

    def recompute(stage: int, sequence: int, chunk: int) -> bool:
        return work.recompute(stage, sequence, chunk) and (stage, sequence, chunk) not in kept_graphs

    less = Workload(work.num_stages, work.chunks, work.bptt_chunks, recompute, work.split_backward)
    assert short == plan_schedule(less, slack=slack)
    spans = replay(short, less, cost=lambda op: 1).spans
    assert [[span.op for span in process] for process in spans] == short


# --- the bubble ------------------------------------------------------------------------------------------------------

SIZES = [(4, 16, 1), (8, 64, 1), (8, 64, 4), (8, 512, 1), (16, 64, 2), (4, 16, 8), (8, 16, 8)]


def bubble_of_whole_sequences(num_stages: int, length: int, sequences: int) -> float:
    work = Workload(num_stages, (length,) * sequences, whole_messages=True)
    return makespan_and_bubble(work, plan_whole_sequences(work), forward=1, backward=2)[1]


def bubble_fused(num_stages: int, length: int, sequences: int) -> float:
    work = Workload(num_stages, (length,) * sequences)
    return makespan_and_bubble(work, plan_schedule(work), forward=1, backward=3)[1]


def bubble_recompute_first(num_stages: int, length: int, sequences: int) -> float:
    work = Workload(num_stages, (length,) * sequences, recompute=recompute_everything)
    return makespan_and_bubble(work, plan_schedule(work), forward=1, recompute=1, backward=2)[1]


def bubble_split(num_stages: int, length: int, sequences: int) -> float:
    work = Workload(num_stages, (length,) * sequences, recompute=recompute_everything, split_backward=True)
    plan = plan_schedule(work)
    return makespan_and_bubble(work, plan, forward=1, recompute=1, hidden_gradient=1, weight_gradient=1)[1]


@pytest.mark.parametrize(
    ("bubble", "percents"),
    [
        (bubble_of_whole_sequences, [75.0, 87.5, 63.6, 87.5, 88.2, 27.3, 46.7]),
        (bubble_fused, [15.8, 9.9, 2.7, 1.4, 10.5, 2.3, 5.2]),
        (bubble_recompute_first, [12.3, 7.6, 2.0, 1.0, 8.1, 1.7, 3.9]),
        (bubble_split, [8.6, 5.2, 1.4, 0.7, 5.5, 1.2, 2.7]),
    ],
)
def test_the_bubble_in_percent_of_known_sizes(bubble, percents):
    """Stages, chunks of a sequence, sequences. The two 1.4 are 1.349: hence the tolerance."""
    assert [100 * bubble(*sizes) for sizes in SIZES] == pytest.approx(percents, abs=0.06)


@thorough
@given(
    num_stages=st.integers(1, 9),
    length=st.integers(1, 16),
    sequences=st.integers(1, 5),
    slack=slacks,
    costs=st.tuples(*[st.integers(1, 5)] * 4),
)
def test_equal_sequences_take_the_time_of_the_closed_form_whatever_the_costs(
    num_stages, length, sequences, slack, costs
):
    """All of a stage's work and what the first chunk's way there and back takes the other stages."""
    forward, recompute, hidden, weight = costs
    chunks, hops = (length,) * sequences, num_stages - 1
    all_work = length * sequences * sum(costs)

    fused = Workload(num_stages, chunks)
    backward = recompute + hidden + weight
    makespan, _ = makespan_and_bubble(fused, plan_schedule(fused, slack=slack), forward=forward, backward=backward)
    assert makespan == all_work + hops * (forward + backward)

    first = Workload(num_stages, chunks, recompute=recompute_everything)
    kinds = {"forward": forward, "recompute": forward, "backward": hidden + weight}
    makespan, _ = makespan_and_bubble(first, plan_schedule(first, slack=slack), **kinds)
    assert makespan == all_work + length * sequences * (forward - recompute) + hops * (forward + hidden + weight)

    split = Workload(num_stages, chunks, recompute=recompute_everything, split_backward=True)
    kinds = {"forward": forward, "recompute": forward, "hidden_gradient": hidden, "weight_gradient": weight}
    makespan, bubble = makespan_and_bubble(split, plan_schedule(split, slack=slack), **kinds)
    busy, lost = length * sequences * (2 * forward + hidden + weight), hops * (forward + hidden)
    assert makespan == busy + lost
    assert bubble == pytest.approx(lost / (busy + lost))


def test_slack_more_than_halves_the_bubble_of_ragged_sequences():
    work = Workload(8, RAGGED, recompute=recompute_everything)
    kinds = {"forward": 1, "recompute": 1, "backward": 2}
    tight, slack = (makespan_and_bubble(work, plan_schedule(work, slack=slack), **kinds)[1] for slack in (0, 1))
    assert (100 * tight, 100 * slack) == pytest.approx((16.8, 5.6), abs=0.06)
    assert slack < tight / 2


@thorough
@given(workloads, slacks)
def test_a_single_stage_never_waits(work, slack):
    work = Workload(1, work.chunks, work.bptt_chunks, work.recompute, work.split_backward)
    assert replay(plan_schedule(work, slack=slack), work, cost=lambda op: 1, latency=3).bubble == 0


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_stages": 0}, "a pipeline of 0 stages"),
        ({"num_stages": -2}, "a pipeline of -2 stages"),
        ({"chunks": (3, 0, 2)}, "sequence 1 has 0 chunks"),
        ({"chunks": (-1,)}, "sequence 0 has -1 chunks"),
        ({"bptt_chunks": 0}, "a backpropagation window of 0 chunks"),
        ({"bptt_chunks": -5}, "a backpropagation window of -5 chunks"),
    ],
)
def test_an_impossible_workload_is_refused_with_the_value(values, message):
    with pytest.raises(ConfigError) as caught:
        Workload(**{"num_stages": 2, "chunks": (3, 1)} | values)
    assert str(caught.value).startswith(message)


def test_several_impossible_values_are_all_named():
    with pytest.raises(ConfigError) as caught:
        Workload(-1, (4, 0), bptt_chunks=-3)
    message = str(caught.value)
    assert message.startswith("3 problems:")
    for problem in ("a pipeline of -1 stages", "sequence 1 has 0 chunks", "a backpropagation window of -3 chunks"):
        assert problem in message


def test_the_smallest_values_are_allowed():
    (ops,) = plan_schedule(Workload(1, (1,), bptt_chunks=1), slack=0)
    assert in_letters(ops) == "F00 B00"


def test_a_slack_below_zero_is_refused_with_the_value():
    with pytest.raises(ConfigError, match="slack of -1 is below 0"):
        plan_schedule(Workload(2, (3,), recompute=recompute_nothing), slack=-1)


# --- messages on their way -------------------------------------------------------------------------------------------


class Stage:
    """One process that sends without waiting only while at most `window` messages of a direction are unread."""

    def __init__(self, number: int, ops, last: int) -> None:
        self.number, self.ops, self.last = number, ops, last
        self.place, self.is_sending = 0, False

    def neighbour(self, op: Op, *, sends: bool) -> int | None:
        """The stage that an op's message goes to or comes from."""
        if op.kind is not Kind.FORWARD and op.kind not in PASSES_GRADIENT_ON:
            return None
        other = self.number + (1 if (op.kind is Kind.FORWARD) == sends else -1)
        return other if 0 <= other <= self.last else None

    def moves(self, sent: Counter, read: Counter, window: int) -> bool:
        """Do the next op, or find room for its message; whether either could be done."""
        if self.place == len(self.ops):
            return False
        op = self.ops[self.place]
        target, source = self.neighbour(op, sends=True), self.neighbour(op, sends=False)
        if not self.is_sending:
            if source is not None:
                if read[source, self.number] == sent[source, self.number]:
                    return False
                read[source, self.number] += 1
            self.is_sending = True
            if target is not None:
                sent[self.number, target] += 1
        if target is not None and sent[self.number, target] - read[self.number, target] > window:
            return False
        self.place, self.is_sending = self.place + 1, False
        return True


def finish(plan, window: int) -> bool:
    """Whether all stages come to their end."""
    found = [Stage(number, ops, len(plan) - 1) for number, ops in enumerate(plan)]
    sent, read = Counter(), Counter()
    while any(stage.moves(sent, read, window) for stage in found):
        pass
    return all(stage.place == len(stage.ops) for stage in found)


@thorough
@given(workloads, slacks)
def test_no_stages_lock_each_other_when_few_messages_may_be_on_their_way(work, slack):
    plan = plan_schedule(work, slack=slack)
    assert finish(plan, max_in_flight_of(slack))
    assert finish(plan, slack + 1)  # the least that the argument in max_in_flight_of allows


def test_fewer_messages_than_a_stage_runs_ahead_would_lock_it():
    plan = plan_schedule(Workload(4, (8, 8)), slack=3)
    assert finish(plan, 4) and not finish(plan, 0)
