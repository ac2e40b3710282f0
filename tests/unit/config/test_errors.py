"""What a user sees of an error: one message, exit code 2, no traceback."""

import subprocess
import sys

import pytest

from comet_megatron.errors import (
    USER_ERROR_EXIT_CODE,
    CheckpointError,
    CometError,
    ConfigError,
    DataError,
    TrainingError,
    report_user_errors,
)


def test_a_message_says_what_where_and_the_way_out():
    error = ConfigError("lr=0 must be above 0", where="my.yaml:3", way_out="use 5e-5")
    assert str(error) == "lr=0 must be above 0 (my.yaml:3)\n  use 5e-5"


def test_a_message_without_place_or_way_out_has_no_empty_parentheses():
    assert str(ConfigError("lr=0 must be above 0")) == "lr=0 must be above 0"


def test_collecting_one_problem_gives_that_problem_itself():
    only = ConfigError("what", where="here", way_out="so")
    collected = ConfigError.collect([only])
    assert (collected.what, collected.where, collected.way_out) == ("what", "here", "so")


def test_collecting_several_problems_counts_and_keeps_them_all_in_order():
    text = str(ConfigError.collect([ConfigError("first", where="a:1"), ConfigError("second", way_out="do this")]))
    assert text == "2 problems:\n- first (a:1)\n- second\n  do this"


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, TrainingError])
def test_every_user_error_becomes_exit_code_2_and_one_message_on_stderr(kind, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    @report_user_errors
    def main():
        raise kind("it is wrong", where="here")

    assert main() == USER_ERROR_EXIT_CODE == 2
    captured = capsys.readouterr()
    assert captured.err == f"{kind.kind}: it is wrong (here)\n"
    assert captured.out == ""


def test_the_kinds_of_error_have_different_names_for_the_user():
    kinds = [CometError, ConfigError, DataError, CheckpointError, TrainingError]
    assert len({kind.kind for kind in kinds}) == len(kinds)


def test_a_command_that_succeeds_returns_0_or_its_own_code():
    assert report_user_errors(lambda: None)() == 0
    assert report_user_errors(lambda: 3)() == 3


def test_our_own_mistakes_keep_their_traceback():
    @report_user_errors
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        main()


def test_only_rank_0_reports_an_error_that_all_ranks_have(capsys, monkeypatch):
    @report_user_errors
    def main():
        raise DataError("no shards")

    monkeypatch.setenv("RANK", "3")
    assert main() == 2
    assert capsys.readouterr().err == ""


def test_arguments_reach_the_wrapped_command_and_its_name_is_kept():
    @report_user_errors
    def main(code, *, extra):
        """Doc."""
        return code + extra

    assert main(1, extra=4) == 5
    assert main.__name__ == "main"


def test_a_real_process_exits_with_2_without_traceback_and_without_torch(tmp_path):
    code = (
        "import sys\n"
        "from comet_megatron.config.load import load_config\n"
        "from comet_megatron.config import rules\n"
        "from comet_megatron.errors import report_user_errors\n"
        "assert 'torch' not in sys.modules\n"
        f"sys.exit(report_user_errors(lambda: load_config({str(tmp_path / 'none.yaml')!r}, []) and 0)())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("configuration error: the configuration file does not exist")
    assert "Traceback" not in done.stderr
