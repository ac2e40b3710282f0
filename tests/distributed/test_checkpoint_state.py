"""What a checkpoint keeps beside the weights, which ones are kept, and what a run goes on from."""

from __future__ import annotations

import importlib.util
import json
import shutil
import zlib
from pathlib import Path

import pytest

from comet_megatron.checkpoint.checksums import CHECKSUMS, read_checksums, write_checksums
from comet_megatron.checkpoint.model_folder import PROGRESS_VERSION, read_progress, read_saved_with
from comet_megatron.checkpoint.run_folder import checkpoint_folder, complete_checkpoints, step_of
from comet_megatron.config.load import load_config
from comet_megatron.errors import ConfigError
from comet_megatron.testing.runs import run_command, write_config, write_data, write_start
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory, tiny_sequences
from comet_megatron.train.callbacks.curve import read_metrics

LENGTHS = (80, 75, 130, 140, 9, 16, 137, 144, 50, 33)
TOOL = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"


def inspect(*arguments: str | Path) -> int:
    spec = importlib.util.spec_from_file_location("inspect_checkpoint", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.main([str(a) for a in arguments])


def train(pool, world: int, config: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run the command; output of the main process, all of which end with the code."""
    results = pool(world).run(run_command, "--config", str(config), *arguments)
    assert {c for c, _, _ in results} == {code}, results[0]
    return results[0][1], results[0][2]


@pytest.fixture(scope="module")
def start(tmp_path_factory, pool) -> Path:
    """A folder with start/ and data/."""
    folder = tmp_path_factory.mktemp("start")
    write_data(folder / "data", tiny_sequences(LENGTHS))
    pool(1).run(write_start, folder / "start", tiny_architecture(num_layers=2), tiny_memory())
    return folder


@pytest.fixture(scope="module")
def finished(start, pool) -> Path:
    """The output of two processes, six steps, a checkpoint after every second one."""
    config = write_config(start / "finished.yaml", start, train={"steps": 6, "save_every": 2}, optimizer=DECAY)
    train(pool, 2, config, f"train.output={start / 'finished'}")
    return start / "finished"


DECAY = {"decay_steps": 10}


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it to spoil, in tmp_path/run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def config(start, tmp_path) -> Path:
    """Of the run in tmp_path/run, to eight steps."""
    sections = {"train": {"output": str(tmp_path / "run"), "steps": 8, "save_every": 2}, "optimizer": DECAY}
    return write_config(tmp_path / "c.yaml", start, **sections)


def flip(path: Path, *, place: float = 0.5) -> None:
    """Change one byte, not the size."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x5A
    path.write_bytes(content)


def weights_file(checkpoint: Path) -> Path:
    return sorted((checkpoint / "weights").glob("*.distcp"))[0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


class TestContents:
    def test_a_checkpoint_says_with_what_it_was_saved_and_holds_the_config(self, finished):
        folder = checkpoint_folder(finished, 4)
        kept = read_saved_with(folder)
        assert kept.layout == {"processes": 2, "tp": 1, "pp": 1, "dp": 2}
        assert {"torch", "megatron-core", "transformers", "comet_megatron"} <= set(kept.versions)
        assert load_config(folder / "config.yaml").config.train.save_every == 2
        assert read_progress(folder).step == 4 and len(read_progress(folder).recent_norms) == 4

    def test_every_file_has_a_checksum(self, finished):
        folder = checkpoint_folder(finished, 4)
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert files - set(read_checksums(folder)) == {CHECKSUMS, "complete"}
        assert any(name.endswith("_0.distcp") for name in files)

    def test_progress_of_the_first_version_still_loads_and_a_newer_one_is_refused_by_name(self, run, config, pool):
        for step in (2, 4, 6):
            path = checkpoint_folder(run, step) / "progress.json"
            content = json.loads(path.read_text())
            for key in ("skipped", "skipped_in_a_row", "recent_norms"):
                del content[key]
            path.write_text(json.dumps({**content, "format_version": 1}))
            for name in ("saved_with.json", "config.yaml", CHECKSUMS):
                (path.parent / name).unlink()
            (path.parent / "complete").write_text("")
        out, _ = train(pool, 1, config, "--resume", "train.steps=7")
        assert "resume   after step 6" in out
        path.write_text(json.dumps({**content, "format_version": PROGRESS_VERSION + 1}))
        shutil.rmtree(checkpoint_folder(run, 7))
        _, message = train(pool, 1, config, "--resume", code=2)
        assert f"format version {PROGRESS_VERSION + 1}" in message and "progress.json" in message

    @pytest.mark.parametrize("name", ["model.json", "progress.json", "saved_with.json", CHECKSUMS])
    def test_a_file_of_a_newer_version_is_refused_by_name(self, name, run, capsys):
        folder = checkpoint_folder(run, 6)
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "format_version": 9}))
        if name != CHECKSUMS:  # as the version that wrote it would have summed it up
            write_checksums(folder, {})
        else:
            (folder / "complete").write_text(f"{zlib.crc32((folder / name).read_bytes()):08x}\n")
        assert inspect(folder) == 2
        message = capsys.readouterr().err
        assert "format version 9" in message and str(folder / name) in message and "Traceback" not in message

    def test_a_config_with_a_setting_of_a_newer_version_is_refused_by_name(self, finished, tmp_path):
        path = tmp_path / "config.yaml"
        path.write_text((checkpoint_folder(finished, 6) / "config.yaml").read_text() + "later:\n  setting: 1\n")
        with pytest.raises(ConfigError, match="later"):
            load_config(path)

    def test_the_tool_prints_it_and_verifies_it(self, finished, capsys):
        assert inspect(checkpoint_folder(finished, 6)) == 0
        out = capsys.readouterr().out
        assert "step       6, of which 0 skipped" in out and "processes 2, tp 1, pp 1, dp 2" in out
        assert "torch " in out and "weights/__0_0.distcp" in out and "whole: " in out
        assert inspect(finished) == 0
        out = capsys.readouterr().out
        assert out.count("whole: ") == 3 and "--resume takes step_0000006" in out


FILES = ("weights/__0_0.distcp", "weights/.metadata", "weights/common.pt", "model.json", "progress.json", CHECKSUMS)
FILES += ("complete", "config.yaml", "saved_with.json", "weights/metadata.json")


class TestDamage:
    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("place", [0.0, 0.9])
    def test_the_tool_names_a_file_with_a_flipped_byte(self, name, place, run, capsys):
        folder = checkpoint_folder(run, 6)
        flip(folder / name, place=place)
        assert inspect(folder) == 2
        message = capsys.readouterr().err
        assert name in message and str(folder) in message and "Traceback" not in message
        assert inspect(run) == 2
        message = capsys.readouterr().err
        assert "1 of 3 checkpoints are damaged" in message and f"--resume takes {checkpoint_folder(run, 4)}" in message

    @pytest.mark.parametrize("mode", ["--resume", "--resume auto"])
    @pytest.mark.parametrize(
        "spoil", [flip, cut, Path.unlink], ids=["a flipped byte", "a file cut short", "a missing file"]
    )
    def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(self, spoil, mode, run, config, pool):
        damaged = weights_file(checkpoint_folder(run, 6))
        spoil(damaged)
        out, _ = train(pool, 2, config, *mode.split())
        (line,) = [line for line in out.splitlines() if line.startswith("DAMAGED")]
        assert str(checkpoint_folder(run, 6)) in line and damaged.name in line
        assert "resume   after step 4" in out
        assert [step_of(path) for path in complete_checkpoints(run)] == [2, 4, 6, 8]
        assert (run / "checkpoints" / "replaced_step_0000006_1").exists()  # kept, and not taken for a checkpoint
        assert inspect(run) == 0

    @pytest.mark.parametrize("mode", ["--resume", "--resume auto"])
    def test_with_all_damaged_the_run_is_refused_and_every_one_is_named(self, mode, run, config, pool):
        flip(weights_file(checkpoint_folder(run, 2)))
        cut(weights_file(checkpoint_folder(run, 4)))
        (checkpoint_folder(run, 6) / "complete").unlink()
        _, message = train(pool, 2, config, *mode.split(), code=2)
        assert all(checkpoint_folder(run, step).name in message for step in (2, 4, 6))
        assert "--fresh" in message and "Traceback" not in message

    def test_what_a_killed_run_left_half_written_is_deleted(self, run, config, pool):
        for name in (".step_0000008.unfinished", ".step_0000001.deleted"):
            (run / "checkpoints" / name / "weights").mkdir(parents=True)
        train(pool, 1, config, "--resume")
        assert not list((run / "checkpoints").glob(".step_*"))


class TestWhatARunGoesOnFrom:
    def test_auto_starts_a_new_run_and_says_so_then_goes_on(self, tmp_path, config, pool):
        out, _ = train(pool, 2, config, "--resume", "auto", "train.steps=3")
        assert out.startswith("NEW RUN") and "starts from step 0" in out
        out, _ = train(pool, 2, config, "--resume", "auto", "train.steps=4")
        assert "resume   after step 3" in out and "NEW RUN" not in out
        out, _ = train(pool, 2, config, "--resume", "auto", "train.steps=4")
        assert "nothing to do: the run has done 4 of 4 steps" in out

    def test_auto_starts_in_the_folder_of_a_run_killed_before_its_first_checkpoint(self, run, config, pool):
        shutil.rmtree(run / "checkpoints")
        out, _ = train(pool, 1, config, "--resume", "auto", "train.steps=1")
        assert out.startswith("NEW RUN")

    def test_auto_does_not_start_among_files_that_are_no_runs(self, tmp_path, config, pool):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").write_text("mine")
        _, message = train(pool, 1, config, "--resume", "auto", code=2)
        assert "thesis.tex" in message

    def test_fresh_starts_anew_and_keeps_what_was_there(self, run, config, pool):
        before = (run / "metrics.jsonl").read_text()
        out, _ = train(pool, 2, config, "--fresh", "train.steps=1")
        assert "--fresh: starts from step 0" in out and "step 1/1" in out
        assert [step_of(path) for path in complete_checkpoints(run)] == [1]
        aside = run / "before_fresh_1"
        assert [step_of(path) for path in complete_checkpoints(aside)] == [2, 4, 6]
        assert (aside / "metrics.jsonl").read_text() == before
        train(pool, 1, config, "--fresh", "train.steps=1")
        assert [step_of(path) for path in complete_checkpoints(run / "before_fresh_2")] == [1]

    def test_fresh_counts_once_when_torchrun_starts_the_run_again(self, run):
        from comet_megatron.train.continuation import AUTO, NO, plan_continuation

        assert plan_continuation(run, resume=AUTO, fresh=True, restarts=0).sets_aside
        for resume in (AUTO, NO):
            again = plan_continuation(run, resume=resume, fresh=True, restarts=1)
            assert again.newest == checkpoint_folder(run, 6) and not again.sets_aside

    def test_resume_and_fresh_contradict_each_other(self, run, config, pool):
        _, message = train(pool, 1, config, "--fresh", "--resume", code=2)
        assert "give one of the two" in message


class TestKeeping:
    def test_old_checkpoints_are_deleted_but_those_of_certain_steps(self, tmp_path, config, pool):
        keep = ("train.steps=7", "train.save_every=1", "train.keep_last=2", "train.keep_every=3")
        train(pool, 2, config, *keep)
        assert [step_of(path) for path in complete_checkpoints(tmp_path / "run")] == [3, 6, 7]
        assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {
            "step_0000003",
            "step_0000006",
            "step_0000007",
        }

    def test_a_run_with_asynchronous_saves_writes_the_same_checkpoints(self, finished, tmp_path, config, pool):
        train(pool, 2, config, "train.async_save=false", "train.steps=6")
        for step in (2, 4, 6):
            first, second = (checkpoint_folder(folder, step) for folder in (finished, tmp_path / "run"))
            sums = [read_checksums(folder) for folder in (first, second)]
            assert all(sums[0][name] == total for name, total in sums[1].items() if name.endswith(".distcp"))
        losses = [[r["loss"] for r in read_metrics(f)] for f in (finished, tmp_path / "run")]
        assert losses[0] == losses[1]
