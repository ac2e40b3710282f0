"""Whether a run is over is told from its newest checkpoint and from what it was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from comet_megatron.launch import is_over
from comet_megatron.parallel.process import store_generation


@pytest.mark.parametrize(
    "steps, done, code",
    [(10, 0, 1), (10, 9, 1), (10, 10, 0), (10, 12, 0)],
)
def test_a_run_is_over_when_the_steps_asked_for_are_done(steps, done, code, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(f"train: {{steps: {steps}}}")
    monkeypatch.setattr(is_over, "steps_done", lambda run: done)
    assert is_over.main([str(tmp_path)]) == code
    assert capsys.readouterr().out == f"{tmp_path}: {done} of {steps} steps are done\n"


def test_a_configuration_that_cannot_be_read_and_a_missing_folder_are_told(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("train: 3")
    assert is_over.main([str(tmp_path)]) == 2
    assert is_over.main([]) == 2
    told = capsys.readouterr().err
    assert "config.yaml cannot be read" in told and "name OUTPUT/train" in told and "Traceback" not in told
    assert is_over.main([str(Path(tmp_path) / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("shared, generation", [("True", 2), ("False", 0), (None, 0)])
def test_starts_are_counted_only_where_they_share_a_store(shared, generation, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    if shared is not None:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    assert store_generation() == generation
