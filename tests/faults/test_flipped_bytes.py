"""A flipped byte in a shard, an index, a manifest or a file of a checkpoint: the commands find it and name the file."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from comet_megatron.checkpoint.checksums import CHECKSUMS, read_checksums
from comet_megatron.checkpoint.run_folder import checkpoint_folder, complete_checkpoints, step_of
from comet_megatron.data.shards import load_index, load_manifest
from comet_megatron.testing.runs import run_command, write_config

TOOLS = Path(__file__).parents[2] / "tools"


def flip(path: Path, at: int | None = None) -> None:
    """Change one bit of a byte, by default the middle one."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 0x04
    path.write_bytes(content)


def tool(name: str, *arguments: str | Path) -> tuple[int, str]:
    """Exit code and stderr of one of tools/."""
    spec = importlib.util.spec_from_file_location(f"flipped_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = module.main([str(a) for a in arguments])
    return code, err.getvalue()


def tool_on_a_rank(process, name: str, *arguments: str) -> tuple[int, str]:
    return tool(name, *arguments)


@pytest.fixture
def place(start, tmp_path) -> Path:
    """A copy of start/ and data/ to spoil, and c.yaml."""
    for name in ("start", "data"):
        shutil.copytree(start / name, tmp_path / name)
    write_config(tmp_path / "c.yaml", tmp_path, train={"steps": 4, "global_batch_size": 10})
    return tmp_path


def in_the_ids(folder: Path) -> Path:
    """The ids of the last sample; a global batch reads all ten."""
    manifest = load_manifest(folder / "data")
    index = load_index(folder / "data", manifest=manifest)
    path = folder / "data" / manifest.shards[int(index.shard[-1])].name
    flip(path, int(index.ids_offset[-1] + index.ids_size[-1]) - 2)
    return path


def in_the_middle(name: str) -> Callable[[Path], Path]:
    def spoil(folder: Path) -> Path:
        flip(folder / name)
        return folder / name

    return spoil


DATA = {
    "a shard": in_the_ids,
    "the index": in_the_middle("data/index.npz"),
    "the manifest": in_the_middle("data/manifest.json"),
    "the weights of the start": in_the_middle("start/weights/__0_0.distcp"),
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", DATA)
def test_training_names_the_file_with_a_flipped_byte(name, world, place, pool):
    path = DATA[name](place)
    results = pool(world).run(run_command, "--config", str(place / "c.yaml"))
    assert {code for code, _, _ in results} == {2}
    message = results[0][2]
    assert path.name in message and str(path.parent.parent if "start" in name else path.parent) in message, message
    assert "Traceback" not in message and all("Traceback" not in err for _, _, err in results)
    assert not complete_checkpoints(place / "run")


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory, pool) -> Path:
    """A run of one process with one checkpoint."""
    folder = tmp_path_factory.mktemp("flipped")
    config = write_config(folder / "c.yaml", start, train={"output": str(folder / "run"), "steps": 2})
    assert pool(1).run(run_command, "--config", str(config))[0][0] == 0
    return folder


def files(finished: Path) -> list[str]:
    """All that the checkpoint consists of."""
    sums = read_checksums(checkpoint_folder(finished / "run", 2))
    assert sums is not None
    return [*sums, CHECKSUMS, "complete"]


def test_a_resume_names_whatever_file_has_a_flipped_byte(finished, tmp_path, pool):
    names = files(finished)
    assert len(names) > 8
    for number, name in enumerate(names):
        run = tmp_path / f"run{number}"
        shutil.copytree(finished / "run", run)
        folder = checkpoint_folder(run, 2)
        flip(folder / name)
        arguments = ("--config", str(finished / "c.yaml"), f"train.output={run}", "train.steps=3")
        for mode in (("--resume",), ("--resume", "auto")):
            code, _, message = pool(1).run(run_command, *arguments, *mode)[0]
            assert code == 2 and "Traceback" not in message, (name, message)
            assert name in message and str(folder) in message, (name, message)
        assert [step_of(path) for path in complete_checkpoints(run)] == [2]
        code, message = tool("inspect_checkpoint", folder)
        assert code == 2 and name in message and "Traceback" not in message


def test_an_export_of_weights_with_a_flipped_byte_is_refused(finished, tmp_path, pool):
    shutil.copytree(finished / "run", tmp_path / "run")
    folder = checkpoint_folder(tmp_path / "run", 2)
    path = sorted((folder / "weights").glob("*.distcp"))[0]
    flip(path)
    arguments = ("--checkpoint", str(folder), "--output", str(tmp_path / "hf"))
    code, message = pool(1).run(tool_on_a_rank, "convert_to_hf", *arguments)[0]
    assert code == 2 and path.name in message and "Traceback" not in message
    assert not (tmp_path / "hf").exists()
