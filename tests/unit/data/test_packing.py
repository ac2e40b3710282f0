"""Which documents share a sequence: each once, within the limit, the same for the same seed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from comet_megatron.data.packing import Packs

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=200)


@given(LENGTHS, st.integers(1, 120), st.integers(0, 5))
def test_every_document_is_in_one_sequence_and_no_sequence_of_several_exceeds_the_limit(lengths, limit, seed) -> None:
    packs = Packs(np.asarray(lengths), limit=limit, seed=seed)
    sequences = [packs[n] for n in range(len(packs))]
    assert sorted(sum(sequences, [])) == list(range(len(lengths)))
    sums = [sum(lengths[d] for d in documents) for documents in sequences]
    assert all(total <= limit or len(documents) == 1 for total, documents in zip(sums, sequences, strict=True))
    # None was closed early: the first document of the next one would not have fitted.
    heads = [lengths[documents[0]] for documents in sequences[1:]]
    assert all(total + head > limit for total, head in zip(sums, heads, strict=False))


def test_the_seed_decides_who_shares_a_sequence() -> None:
    lengths = np.full(100, 10)
    first, again, other = (Packs(lengths, limit=50, seed=seed) for seed in (1, 1, 2))
    assert [first[n] for n in range(20)] == [again[n] for n in range(20)] != [other[n] for n in range(20)]
    assert len(first) == 20
