"""A checkpoint that cannot be written, whatever the reason and the rank: all ranks know, the one before it is whole."""

from __future__ import annotations

import errno
import resource
import shutil
from pathlib import Path
from unittest import mock

import pytest

from comet_megatron.checkpoint.checksums import check_quickly, check_sums, read_checksums
from comet_megatron.checkpoint.run_folder import checkpoint_folder, complete_checkpoints, step_of
from comet_megatron.checkpoint.saving import Saving
from comet_megatron.testing.runs import run_command, write_config

FULL = OSError(errno.ENOSPC, "No space left on device")
TP2 = {"tp": 2, "zero1": False}  # both ranks write weights


@pytest.fixture
def config(start, tmp_path) -> Path:
    train = {"output": str(tmp_path / "run"), "steps": 6, "save_every": 2}
    optimizer = {"decay_steps": 6}
    return write_config(tmp_path / "c.yaml", start, train=train, optimizer=optimizer, parallel=TP2)


def run_with_small_files(process, limit: int, rank: int, *arguments: str):
    """The command while no file that one rank writes for a checkpoint can be larger than `limit` bytes."""
    real = Saving._write

    def write(self, *given):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if process.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            real(self, *given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with mock.patch.object(Saving, "_write", write):
        return run_command(process, *arguments)


def run_with_a_fault(process, target: str, rank: int, calls: tuple[int, ...], *arguments: str):
    """The command while some calls of `target`, counted from 1, find a full disk on one rank."""
    import importlib

    module, _, name = target.rpartition(".")
    owner = importlib.import_module(module)
    real, count = getattr(owner, name), 0

    def faulty(*given, **named):
        nonlocal count
        count += 1
        if process.rank == rank and (count in calls or not calls):
            raise FULL
        return real(*given, **named)

    with mock.patch.object(owner, name, faulty):
        return run_command(process, *arguments)


def assert_whole(run: Path, *steps: int) -> None:
    assert [step_of(path) for path in complete_checkpoints(run)] == list(steps)
    for path in complete_checkpoints(run):
        check_quickly(path)
        check_sums(path, read_checksums(path), read_checksums(path))
    assert not list((run / "checkpoints").glob(".step*"))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("saving", ["async", pytest.param("sync", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_does_not_stop_training_until_its_last_checkpoint(rank, saving, config, tmp_path, pool):
    run = tmp_path / "run"
    assert {code for code, _, _ in pool(2).run(run_command, "--config", str(config), "train.steps=2")} == {0}
    arguments = ("--config", str(config), "--resume", f"train.async_save={saving == 'async'}")
    results = pool(2).run(run_with_small_files, 1 << 14, rank, *arguments)
    assert {code for code, _, _ in results} == {2}
    out, message = results[0][1], results[0][2]
    assert "step 4/6  NOT SAVED (1 in all), training goes on: the checkpoint cannot be written: " in out
    assert "step 6/6  loss" in out
    assert "output error: the checkpoint cannot be written: " in message and "File too large" in message
    assert "free space on the disk" in message and "Traceback" not in message
    assert (" (rank 1)" in message) == (rank == 1)
    assert_whole(run, 2)
    results = pool(2).run(run_command, "--config", str(config), "--resume")
    assert {code for code, _, _ in results} == {0}
    assert_whole(run, 2, 4, 6)


SAVING = "comet_megatron.checkpoint.saving"
STAGES = {
    "the folder": (f"{SAVING}.make_folder", 0),
    "the weights of another rank": (f"{SAVING}.sum_file", 1),
    "Megatron's metadata": (f"{SAVING}.save_config", 0),
    "the description": (f"{SAVING}.write_description", 0),
    "the config": (f"{SAVING}.save_settings", 0),
    "the tokenizer": (f"{SAVING}.copy_files", 0),
    "the checksums": (f"{SAVING}.write_checksums", 0),
}


@pytest.mark.parametrize("name", STAGES)
def test_wherever_a_save_fails_all_ranks_go_on_and_nothing_is_left_of_it(name, config, tmp_path, pool):
    target, rank = STAGES[name]
    calls = (3,) if rank else (2,)  # the save of step 4; the weights of a rank are two files
    results = pool(2).run(run_with_a_fault, target, rank, calls, "--config", str(config))
    assert {code for code, _, _ in results} == {0}, results[0][2]
    out = results[0][1]
    assert "step 4/6  NOT SAVED (1 in all)" in out and "No space left on device" in out
    assert_whole(tmp_path / "run", 2, 6)


def test_a_failed_save_stops_training_where_that_is_asked_for(config, tmp_path, pool):
    arguments = ("--config", str(config), "train.on_failed_save=stop", "train.async_save=false")
    results = pool(2).run(run_with_a_fault, f"{SAVING}.write_checksums", 0, (2,), *arguments)
    assert {code for code, _, _ in results} == {2}
    assert "No space left on device" in results[0][2] and "step 5/6" not in results[0][1]
    assert_whole(tmp_path / "run", 2)


def test_a_folder_that_cannot_be_made_any_more_leaves_the_run_going(config, tmp_path, pool):
    """What a file system does that was mounted anew, read-only; root may write to any folder, so here it is a file."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("not a folder")
    (run / "log.txt").touch()
    results = pool(2).run(run_command, "--config", str(config), "--resume", "auto", "train.steps=3")
    assert {code for code, _, _ in results} == {2}
    assert "step 2/3  NOT SAVED (1 in all)" in results[0][1] and "step 3/3  loss" in results[0][1]
    assert "cannot be made" in results[0][2] and "Traceback" not in results[0][2]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(config, tmp_path, pool):
    module = "comet_megatron.train.saver.delete_old"
    results = pool(2).run(run_with_a_fault, module, 0, (), "--config", str(config), "train.keep_last=1")
    assert {code for code, _, _ in results} == {0}, results[0][2]
    assert "WARNING  an old checkpoint cannot be deleted" in results[0][1]
    shutil.rmtree(checkpoint_folder(tmp_path / "run", 2))
    assert_whole(tmp_path / "run", 4, 6)
