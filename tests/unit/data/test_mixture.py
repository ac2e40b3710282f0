"""Several data sets mixed by weights: deterministic, every sample once an epoch, shares as asked."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_megatron.data.mixture import BLOCK, Mixture
from comet_megatron.data.sampler import sample_index
from comet_megatron.errors import ConfigError


def test_one_data_set_has_the_order_it_has_alone():
    mixture = Mixture((10,), (3.0,), seed=7)
    for position in range(35):
        epoch, sample = sample_index(position, num_samples=10, seed=7)
        assert mixture.at(position) == (0, epoch, sample)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=2, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_every_data_set_is_read_in_order_without_a_gap_or_a_repeat(lengths, seed, data):
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(lengths), max_size=len(lengths)))
    mixture = Mixture(tuple(lengths), tuple(weights), seed)
    start = data.draw(st.integers(0, 3)) * BLOCK
    for block_start in range(0, start + 1, BLOCK):
        places = [mixture.at(block_start + i) for i in range(0, BLOCK)]
    seen = {source: [p[1:] for p in places if p.source == source] for source in range(len(lengths))}
    for source, found in seen.items():
        first = (start // BLOCK) * mixture.shares[source]
        want = [sample_index(first + i, num_samples=lengths[source], seed=seed + source) for i in range(len(found))]
        assert found == want


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.2, 0.1), (1000.0, 1.0), (1e9, 1e-9)])
def test_shares_are_those_of_the_weights_to_one_part_in_a_block(weights):
    mixture = Mixture((100,) * len(weights), weights, seed=1)
    assert sum(mixture.shares) == BLOCK
    counted = Counter(mixture.at(i).source for i in range(BLOCK))
    for source, weight in enumerate(weights):
        assert counted[source] == mixture.shares[source]
        assert abs(counted[source] - BLOCK * weight / sum(weights)) <= 1


def test_the_places_of_a_block_depend_on_the_seed_and_on_the_block():
    first = [Mixture((9, 9), (1, 1), seed=1).at(i).source for i in range(200)]
    assert first != [Mixture((9, 9), (1, 1), seed=2).at(i).source for i in range(200)]
    assert first != [Mixture((9, 9), (1, 1), seed=1).at(BLOCK + i).source for i in range(200)]


@pytest.mark.parametrize(
    ("lengths", "weights"),
    [((), ()), ((3, 0), (1, 1)), ((3,), (1, 1)), ((3, 3), (1, 0)), ((3, 3), (1, float("nan"))), ((3,), (-1.0,))],
)
def test_what_is_no_mixture_is_refused(lengths, weights):
    with pytest.raises(ConfigError):
        Mixture(lengths, weights, seed=0)
