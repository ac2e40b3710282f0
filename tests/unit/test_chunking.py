"""The layout of chunks: every text token stands once, beacons where they belong, slots as many as were written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comet_megatron.chunking import IGNORE_LABEL, live_tokens, next_token_labels, plan_chunks
from comet_megatron.config.schema import MemorySizes


def sizes(chunk_size=32, stride=4, budget=16, global_slots=8) -> MemorySizes:
    return MemorySizes(
        chunk_size=chunk_size,
        stride=stride,
        budget=budget,
        memory_token_id=1000,
        beacon_id=1001 + global_slots,
        global_beacon_ids=tuple(range(1001, 1001 + global_slots)),
        first_new_id=1000,
    )


any_sizes = st.builds(
    sizes,
    chunk_size=st.integers(1, 40),
    stride=st.one_of(st.just(-1), st.integers(1, 45)),
    budget=st.integers(1, 50),
    global_slots=st.integers(0, 6),
)


def written_out(num_text: int, stride: int, *, with_last_beacon: bool) -> str:
    """A chunk's rows, one letter each, by counting: t text, b beacon."""
    rows = ""
    for token in range(num_text):
        rows += "t"
        last = token == num_text - 1
        if stride > 0 and ((token + 1) % stride == 0 or last) and (with_last_beacon or not last):
            rows += "b"
    return rows


@given(any_sizes, st.integers(1, 300), st.booleans())
def test_rows_are_text_with_a_beacon_after_each_group_then_the_global_beacons(memory, num_tokens, keep):
    tokens = np.arange(num_tokens)
    plans = plan_chunks(num_tokens, memory, keep_last_memory=keep)
    assert len(plans) == -(-num_tokens // memory.chunk_size)
    seen = []
    for plan in plans:
        last = plan is plans[-1] and not keep
        rows = written_out(plan.num_text, memory.stride, with_last_beacon=not last)
        rows += "" if last else "g" * memory.global_slots
        ids = plan.row_ids(tokens, memory)
        kinds = {memory.beacon_id: "b", **dict.fromkeys(memory.global_beacon_ids, "g")}
        assert "".join(kinds.get(i, "t") for i in ids.tolist()) == rows
        assert plan.num_rows == len(rows)
        seen += ids[plan.text_rows].tolist()
    assert seen == tokens.tolist()


@given(any_sizes, st.integers(1, 300))
def test_the_slots_entering_a_chunk_are_what_the_chunks_before_wrote_within_the_budget(memory, num_tokens):
    temporary = 0
    for plan in plan_chunks(num_tokens, memory):
        assert plan.temporary_slots == temporary
        assert plan.global_slots == (memory.global_slots if plan.index else 0)
        if memory.stride > 0:
            temporary = min(memory.budget, temporary + -(-plan.num_text // memory.stride))


def test_the_sizes_of_a_known_case():
    """160 tokens, S 32, stride 4, G 8, B 16: 48, 64, 72, 72 positions ; a last chunk without dead beacons."""
    plans = plan_chunks(160, sizes())
    assert [p.num_slots + p.num_rows for p in plans[:4]] == [48, 64, 72, 72]
    assert plans[4].num_slots + plans[4].num_rows == 72 - 8 - 1


def test_the_last_beacon_of_a_sequence_is_left_out_and_computed_when_its_memory_is_asked_for():
    (plan,) = plan_chunks(8, sizes())
    assert (plan.num_rows, plan.writes_memory) == (9, False)
    (plan,) = plan_chunks(8, sizes(), keep_last_memory=True)
    assert (plan.num_rows, plan.writes_memory) == (8 + 2 + 8, True)


@pytest.mark.parametrize("masked", [False, True])
def test_a_label_is_the_next_text_token(masked):
    ids = np.array([5, 6, 7, 8])
    mask = np.array([True, False, True, True]) if masked else None
    assert next_token_labels(ids, mask).tolist() == [IGNORE_LABEL if masked else 6, 7, 8, IGNORE_LABEL]


@pytest.mark.parametrize("labels,live", [([], 0), ([-100, -100], 0), ([3, -100, 4, -100], 3), ([1, 2], 2)])
def test_tokens_after_the_last_label_are_not_live(labels, live):
    assert live_tokens(np.array(labels, dtype=np.int64)) == live
