"""A run goes on at other numbers of ranks: the same samples, the same loss at once, and little drift after 50 steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch import Tensor

from comet_megatron.checkpoint.run_folder import checkpoint_folder
from comet_megatron.testing.runs import run_and_record, weights_of, write_config, write_data, write_start
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory, tiny_sequences
from comet_megatron.train.callbacks.curve import read_metrics

BEFORE, AFTER, BATCH = 10, 50, 4
LENGTHS = (80, 75, 130, 140, 9, 16, 137, 144, 50, 33, 61)  # 11 samples: an epoch ends every 2.75 steps
FIRST_LOSS, DRIFT = 1e-5, 1e-3  # relative

Batches = dict[int, list[str]]  # by step, the global batch in its order

# Each part: processes, steps to go on to, settings. What follows DP 2, on which the first ten steps are trained.
LAYOUTS: dict[str, list[tuple[int, int, tuple[str, ...]]]] = {
    "DP 1": [(1, BEFORE + AFTER, ())],
    "DP 1, then DP 4": [(1, BEFORE + 5, ()), (4, BEFORE + AFTER, ())],
    "TP 2": [(2, BEFORE + AFTER, ("parallel.tp=2", "parallel.sequence_parallel=true"))],
    "PP 2": [(2, BEFORE + AFTER, ("parallel.pp=2",))],
    "TP 2 x PP 2": [(4, BEFORE + AFTER, ("parallel.tp=2", "parallel.pp=2"))],
}


def train(pool, world: int, config: Path, *arguments: str) -> Batches:
    """Run the command; what all its ranks were given to train on."""
    results = pool(world).run(run_and_record, "--config", str(config), *arguments, timeout_s=250)
    assert {code for code, _, _, _ in results} == {0}, results[0][1]
    of_ranks: dict[int, Batches] = {}
    for _, _, dp_rank, read in results:
        assert of_ranks.setdefault(dp_rank, read) == read, f"the ranks of DP rank {dp_rank} read different samples"
    steps = next(iter(of_ranks.values()))
    return {step: [sample for rank in sorted(of_ranks) for sample in of_ranks[rank][step]] for step in steps}


@pytest.fixture(scope="module")
def config(tmp_path_factory, pool) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    write_data(folder / "data", tiny_sequences(LENGTHS))
    pool(1).run(write_start, folder / "start", tiny_architecture(num_layers=2), tiny_memory())
    steps = BEFORE + AFTER
    return write_config(
        folder / "c.yaml",
        folder,
        data={"chunks": "fixed:0.5, right:0.2, random:0.3", "max_stride": 8},
        train={"steps": steps, "global_batch_size": BATCH, "save_every": BEFORE},
    )


@pytest.fixture(scope="module")
def undisturbed(config, pool) -> tuple[Path, Batches]:
    """All steps on DP 2, and what was read for them."""
    batches = train(pool, 2, config)
    assert sorted(batches) == list(range(1, BEFORE + AFTER + 1))
    assert all(len(batch) == BATCH for batch in batches.values())
    return config.parent / "run", batches


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(run)}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of all weights over their norm."""
    square = sum(float((one[name].double() - other[name].double()).square().sum()) for name in other)
    return (square / sum(float(value.double().square().sum()) for value in other.values())) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_on_another_layout_the_samples_are_the_same_and_fifty_steps_drift_little(
    name, undisturbed, config, tmp_path, pool
):
    (whole, wanted), run = undisturbed, tmp_path / "run"
    shutil.copytree(whole, run)
    for step in range(2 * BEFORE, BEFORE + AFTER + 1, BEFORE):
        shutil.rmtree(checkpoint_folder(run, step))
    found: Batches = {}
    for world, last, settings in LAYOUTS[name]:
        steps = (f"train.steps={last}", f"optimizer.decay_steps={BEFORE + AFTER}", f"train.output={run}")
        found |= train(pool, world, config, "--resume", *steps, *settings)
    assert found == {step: wanted[step] for step in range(BEFORE + 1, BEFORE + AFTER + 1)}
    ours, theirs = losses(run), losses(whole)
    drift = {step: abs(ours[step] / theirs[step] - 1) for step in found}
    before, after, reached = (
        pool(1).run(weights_of, checkpoint_folder(folder, step))[0]
        for folder, step in ((whole, BEFORE), (whole, BEFORE + AFTER), (run, BEFORE + AFTER))
    )
    moved, weights = distance(before, after), distance(reached, after)
    print(
        f"\nDP 2 -> {name:<16} relative differences: loss of the first step {drift[BEFORE + 1]:.1e}, "
        f"of step {BEFORE + AFTER} {drift[BEFORE + AFTER]:.1e}, largest {max(drift.values()):.1e}; "
        f"weights {weights:.1e} (trained by {moved:.1e})"
    )
    assert drift[BEFORE + 1] < FIRST_LOSS
    assert max(drift.values()) < DRIFT
    assert weights < DRIFT < moved


def test_the_next_batches_are_the_same_samples_on_one_and_on_four_ranks(config, tmp_path, pool):
    """The order alone, for a few steps; the test above trains on it."""
    steps = ("train.steps=4", "train.save_every=2")
    wanted = train(pool, 2, config, *steps, f"train.output={tmp_path / 'whole'}")
    for world in (1, 4):
        run = tmp_path / f"run{world}"
        shutil.copytree(tmp_path / "whole", run)
        shutil.rmtree(checkpoint_folder(run, 4))
        found = train(pool, world, config, *steps, f"train.output={run}", "--resume")
        assert found == {step: wanted[step] for step in (3, 4)}
        assert losses(run)[3] == pytest.approx(losses(tmp_path / "whole")[3], rel=FIRST_LOSS)
