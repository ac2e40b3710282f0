"""Ways of cutting a sequence into chunks: whole, bounded, seeded; and the plan that follows from them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_megatron.chunking import plan_chunks
from comet_megatron.data.cuts import WAYS, CutPlan, parse_ways, sentence_end_ids
from comet_megatron.data.tokenizer import load_tokenizer
from comet_megatron.errors import ConfigError
from comet_megatron.testing.tiny import tiny_memory

IDS = np.arange(100, dtype=np.int32)


def plan(ways="fixed", *, chunk_size=16, stride=4, max_stride=0, ends=(), seed=1):
    return CutPlan(parse_ways(ways), chunk_size, stride, seed, max_stride, frozenset(ends))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(WAYS)), st.integers(1, 200), st.integers(1, 40), st.integers(0, 1000))
def test_every_way_gives_all_tokens_in_chunks_that_are_not_too_long(way, tokens, chunk_size, sample):
    ids = np.random.default_rng(sample).integers(0, 50, tokens)
    cuts = plan(way, chunk_size=chunk_size, ends=range(0, 50, 7)).cut(ids, epoch=0, sample=sample)
    assert sum(cuts.lengths) == tokens and min(cuts.lengths) >= 1 and max(cuts.lengths) <= chunk_size


def test_each_way_in_an_example():
    assert plan("fixed").cut(IDS[:40], epoch=0, sample=0).lengths == (16, 16, 8)
    assert plan("right").cut(IDS[:40], epoch=0, sample=0).lengths == (8, 16, 16)
    assert plan("uniform").cut(IDS[:40], epoch=0, sample=0).lengths == (13, 13, 14)
    drawn = plan("random").cut(IDS, epoch=0, sample=0).lengths
    assert min(drawn[:-1]) >= 8 and len(set(drawn)) > 1


def test_sentences_end_chunks_where_they_end_late_enough():
    # 10 and 12 end in the first chunk's second half, the later counts; then none ends before the chunk is full.
    assert plan("sentence", ends=(3, 10, 12)).cut(IDS[:40], epoch=0, sample=0).lengths == (13, 16, 11)


def test_a_mix_draws_each_way_as_often_as_asked_and_the_same_again():
    mixed = plan("fixed:0.5, right:0.5")
    found = [mixed.cut(IDS[:40], epoch=0, sample=i).lengths for i in range(2000)]
    counted = Counter(found)
    assert set(counted) == {(16, 16, 8), (8, 16, 16)} and abs(counted[16, 16, 8] - 1000) < 100
    assert found == [mixed.cut(IDS[:40], epoch=0, sample=i).lengths for i in range(2000)]
    assert found != [mixed.cut(IDS[:40], epoch=1, sample=i).lengths for i in range(2000)]
    assert found != [plan("fixed:0.5, right:0.5", seed=2).cut(IDS[:40], epoch=0, sample=i).lengths for i in range(2000)]


def test_strides_are_drawn_as_powers_of_two_up_to_the_largest():
    found = {plan(stride=4, max_stride=32).cut(IDS, epoch=0, sample=i).stride for i in range(200)}
    assert found == {4, 8, 16, 32}
    assert plan(stride=-1, max_stride=32).cut(IDS, epoch=0, sample=0).stride == -1
    assert plan().is_fixed and not plan(max_stride=8).is_fixed and not plan("right").is_fixed


def test_the_chunk_plan_follows_the_cuts_and_the_stride():
    sizes = tiny_memory(stride=4, budget=12, chunk_size=16)
    chunks = plan_chunks(40, sizes, lengths=(8, 16, 16), stride=8)
    assert [(c.text_start, c.text_end, c.num_beacons) for c in chunks] == [(0, 8, 1), (8, 24, 2), (24, 40, 1)]
    assert [c.temporary_slots for c in chunks] == [0, 1, 3]
    assert plan_chunks(40, sizes, lengths=(16, 16, 8)) == plan_chunks(40, sizes)
    assert [c.num_text for c in plan_chunks(20, sizes, lengths=(8, 16, 16))] == [8, 12]  # the labels end there


@pytest.mark.parametrize(
    "text", ["", "fix", "fixed:0", "fixed:-1", "fixed:x", "fixed, fixed", "fixed:inf", "right;fixed"]
)
def test_an_unknown_way_is_refused_with_those_there_are(text):
    with pytest.raises(ConfigError, match="data.chunks=.*\n.*sentence"):
        parse_ways(text)


def test_tokens_that_end_a_sentence_are_found_in_a_vocabulary():
    tokenizer = load_tokenizer("tokenizers/python_stdlib_4k")
    found = sentence_end_ids(tokenizer)
    assert tokenizer.convert_tokens_to_ids(".") in found and tokenizer.convert_tokens_to_ids("\n") in found
    assert tokenizer.convert_tokens_to_ids("a") not in found
