"""The order of samples."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comet_megatron.data import sampler
from comet_megatron.data.sampler import Order, _permutation, plan_positions, sample_index
from comet_megatron.errors import ConfigError

SEEDS = st.integers(0, 2**63)
SIZES = st.integers(1, 200)
GOLDEN_FIRST = [224, 201, 28, 296, 262, 320, 623, 614]
GOLDEN_LATER = [864, 345, 218, 54, 862, 699, 550, 348]  # in the third epoch


def plan_batch(step: int, *, num_samples: int, seed: int, **ranks: int) -> list[int]:
    """Numbers of the samples of one data set that a rank trains on in a step."""
    return [sample_index(p, num_samples=num_samples, seed=seed)[1] for p in plan_positions(step, **ranks)]


@given(num_samples=SIZES, seed=SEEDS, epoch=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    positions = range(epoch * num_samples, (epoch + 1) * num_samples)
    found = [sample_index(position, num_samples=num_samples, seed=seed) for position in positions]
    assert {e for e, _ in found} == {epoch}
    assert sorted(index for _, index in found) == list(range(num_samples))


@given(
    num_samples=SIZES, seed=SEEDS, step=st.integers(0, 10_000), dp_size=st.integers(1, 8), per_rank=st.integers(1, 6)
)
def test_the_ranks_together_take_what_one_rank_would(num_samples, seed, step, dp_size, per_rank) -> None:
    options = {"global_batch_size": dp_size * per_rank, "num_samples": num_samples, "seed": seed}
    alone = plan_batch(step, dp_rank=0, dp_size=1, **options)
    parts = [plan_batch(step, dp_rank=rank, dp_size=dp_size, **options) for rank in range(dp_size)]
    assert [len(part) for part in parts] == [per_rank] * dp_size
    assert sum(parts, []) == alone


@given(num_samples=SIZES, seed=SEEDS, batch=st.integers(1, 50), steps=st.integers(1, 30))
def test_steps_follow_each_other_without_gap_or_repeat(num_samples: int, seed: int, batch: int, steps: int) -> None:
    options = {"global_batch_size": batch, "dp_rank": 0, "dp_size": 1, "num_samples": num_samples, "seed": seed}
    planned = sum((plan_batch(step, **options) for step in range(steps)), [])
    assert planned == [sample_index(p, num_samples=num_samples, seed=seed)[1] for p in range(steps * batch)]


def test_resume_gives_the_same_samples_in_a_new_process_and_after_dp_changes() -> None:
    options = {"global_batch_size": 8, "num_samples": 101, "seed": 1234}
    going_on = [plan_batch(step, dp_rank=0, dp_size=1, **options) for step in range(40)][30:]
    program = (
        "from comet_megatron.data.sampler import plan_positions, sample_index\n"
        f"{inspect.getsource(plan_batch)}\n"
        f"print([sum((plan_batch(s, dp_rank=r, dp_size=4, **{options}) for r in range(4)), []) for s in range(30, 40)])"
    )
    resumed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert resumed.strip() == str(going_on)


def test_the_order_never_changes_between_versions() -> None:
    assert plan_batch(0, global_batch_size=8, dp_rank=0, dp_size=1, num_samples=1000, seed=1234) == GOLDEN_FIRST
    assert plan_batch(300, global_batch_size=8, dp_rank=0, dp_size=1, num_samples=1000, seed=1234) == GOLDEN_LATER


def test_another_seed_and_another_epoch_give_another_order() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [sample_index(epoch * 100 + p, num_samples=100, seed=seed)[1] for p in range(100)]

    orders = [tuple(order(seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == len(orders)
    assert tuple(range(100)) not in orders


def test_each_sample_is_about_equally_often_first() -> None:
    counts = [0] * 5
    for seed in range(1000):
        counts[sample_index(0, num_samples=5, seed=seed)[1]] += 1
    assert min(counts) > 150 and max(counts) < 250  # 200 expected, standard deviation 13


def test_the_order_is_not_made_anew_for_every_sample(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(sampler, "_permutation", lambda *given: made.append(given) or _permutation(*given))
    order = Order(100, seed=0)
    for position in range(320):
        order.at(position)
    assert [epoch for _, _, epoch in made] == [0, 1, 2, 3]
    with pytest.raises(ValueError):
        _permutation(100, 0, 0)[0] = 1  # nobody can spoil what is kept


def test_the_sampler_needs_no_torch() -> None:
    program = "import sys, comet_megatron.data.sampler, comet_megatron.data.dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"dp_size": 3}, "use 1, 2, 4, 8 data-parallel ranks"),
        ({"dp_size": 0}, "not a multiple"),
        ({"dp_rank": 2}, "not a rank"),
        ({"dp_rank": -1}, "not a rank"),
        ({"global_batch_size": 0}, "global_batch_size=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"seed": -1}, "seed=-1"),
        ({"step": -1}, "step -1"),
    ],
)
def test_values_out_of_range_are_refused(changed: dict[str, int], complaint: str) -> None:
    values = {"step": 0, "global_batch_size": 8, "dp_rank": 0, "dp_size": 2, "num_samples": 10, "seed": 0, **changed}
    with pytest.raises(ConfigError, match=complaint):
        plan_batch(values.pop("step"), **values)


@given(num_samples=SIZES, seed=SEEDS, positions=st.lists(st.integers(0, 1000), max_size=30))
def test_what_an_order_says_does_not_depend_on_what_it_was_asked_before(num_samples, seed, positions) -> None:
    order = Order(num_samples, seed=seed)
    for position in positions:
        assert order.at(position) == sample_index(position, num_samples=num_samples, seed=seed)
