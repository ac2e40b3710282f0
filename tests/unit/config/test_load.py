"""Reading a configuration: values, places, and every problem at once."""

import dataclasses
import re
import string

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from comet_megatron.config.load import COMMAND_LINE, field_types, load_config, save_config
from comet_megatron.config.schema import (
    Config,
    DataSection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    TrainSection,
)
from comet_megatron.errors import ConfigError

MINIMAL = """\
model:
  path: base
data:
  train: shards
train:
  output: run
  steps: 20
"""
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def load(tmp_path):
    """load(text, *overrides): the configuration of a file demo.yaml with this text."""

    def load_text(text, *overrides):
        path = tmp_path / "demo.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load_text


@pytest.fixture
def problems(load):
    """problems(text, *overrides): the message of the ConfigError that loading raises."""

    def load_wrong(text, *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return load_wrong


# --- values ----------------------------------------------------------------------------------------------------------


def test_values_come_from_the_file_and_the_rest_are_the_defaults(load):
    config = load(MINIMAL).config
    assert config == Config(
        model=ModelSection(path="base"), data=DataSection(train="shards"), train=TrainSection(output="run", steps=20)
    )


def test_the_result_is_the_frozen_dataclasses_with_a_tuple_of_betas(load):
    config = load(MINIMAL, "optimizer.betas=[0.8, 0.95]").config
    assert type(config) is Config and type(config.optimizer) is OptimizerSection
    assert config.optimizer.betas == (0.8, 0.95) and type(config.optimizer.betas) is tuple
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optimizer.lr = 1.0


def test_an_override_wins_over_the_file_and_the_last_override_wins(load):
    loaded = load(MINIMAL, "train.steps=30", "train.steps=40")
    assert loaded.config.train.steps == 40
    assert loaded.where["train.steps"] == COMMAND_LINE


def test_where_names_the_line_of_every_given_value_and_no_default(load):
    where = load(MINIMAL, "optimizer.lr=1e-3").where
    assert where == {
        "model.path": "demo.yaml:2",
        "data.train": "demo.yaml:4",
        "train.output": "demo.yaml:6",
        "train.steps": "demo.yaml:7",
        "optimizer.lr": "command line",
    }


@pytest.mark.parametrize("text", ["5e-5", "5.0e-5", "0.00005", "5E-05"])
def test_every_spelling_of_a_small_learning_rate_is_a_number(load, text):
    assert load(MINIMAL + f"optimizer:\n  lr: {text}\n").config.optimizer.lr == 5e-5
    assert load(MINIMAL, f"optimizer.lr={text}").config.optimizer.lr == 5e-5


def test_a_whole_number_for_a_float_becomes_a_float(load):
    lr = load(MINIMAL, "optimizer.lr=1").config.optimizer.lr
    assert lr == 1.0 and type(lr) is float


@pytest.mark.parametrize(("text", "value"), [("1e3", 1000), ("1.0e1", 10), ("10", 10), ("10.0", 10), ("'10'", 10)])
def test_a_whole_number_may_be_spelt_as_a_float(load, text, value):
    steps = load(MINIMAL, f"train.steps={text}").config.train.steps
    assert steps == value and type(steps) is int


@pytest.mark.parametrize("text", ["1.5", "ten", "true", "null", "[10]", "{a: 1}", "inf", "1e999", "1:30", ""])
def test_what_is_no_whole_number_is_refused(problems, text):
    message = problems(MINIMAL, f"train.steps={text}")
    assert message.startswith("train.steps=") and "is not a whole number (command line)" in message


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("yes", True), ("off", False)])
def test_yaml_spellings_of_booleans_are_understood(load, text, value):
    assert load(MINIMAL, f"parallel.zero1={text}").config.parallel.zero1 is value


@pytest.mark.parametrize("text", ["1", "0", "2", "nope", "1.0"])
def test_a_number_or_another_word_is_no_boolean(problems, text):
    assert "is not true or false" in problems(MINIMAL, f"parallel.zero1={text}")


@pytest.mark.parametrize("text", ["no", "007", "2024-01-01", "1e3", "3", "true", "a:b", "~/runs/x"])
def test_text_fields_keep_what_was_typed(load, text):
    assert load(MINIMAL.replace("shards", text)).config.data.train == text
    assert load(MINIMAL, f"data.train={text}").config.data.train == text


@pytest.mark.parametrize("text", ["{", "@x", "run #1", "*star", "'", "k=v", "a:b", "%", "- x: ["])
def test_text_on_the_command_line_needs_no_yaml_quoting(load, text):
    assert load(MINIMAL, f"train.output={text}").config.train.output == text


def test_quotes_that_the_shell_left_on_the_command_line_are_yaml_quotes(load):
    assert load(MINIMAL, "train.output='a: b'").config.train.output == "a: b"


def test_an_empty_override_clears_a_text_field(load):
    text = MINIMAL.replace("  train: shards\n", "  train: shards\n  eval: held-out\n")
    assert load(text).config.data.eval == "held-out"
    assert load(text, "data.eval=").config.data.eval == ""


def test_a_text_field_without_value_is_refused_and_told_how_to_be_empty(problems):
    message = problems(MINIMAL.replace("shards", "shards\n  eval:"))
    assert message == 'data.eval=nothing is not text (write "" for none) (demo.yaml:5)'


@pytest.mark.parametrize(("text", "value"), [("4", 4), ("all", "all"), ("1e1", 10), ("none", "none")])
def test_a_field_of_a_number_or_a_word_takes_both(load, text, value):
    chunks = load(MINIMAL, f"train.bptt_chunks={text}").config.train.bptt_chunks
    assert chunks == value and type(chunks) is type(value)
    assert load(MINIMAL + f"  cpu_threads: {text}\n").config.train.cpu_threads == value


def test_a_field_of_a_number_or_a_word_refuses_a_list_and_nothing(problems):
    assert "is not a whole number or a word" in problems(MINIMAL, "train.bptt_chunks=[1]")
    assert "is not a whole number or a word" in problems(MINIMAL, "train.cpu_threads=null")


@pytest.mark.parametrize("text", ["[0.9]", "[0.9, 0.99, 0.999]", "0.9", "[0.9, high]", "{a: 0.9}"])
def test_betas_are_two_numbers(problems, text):
    assert "is not a list of 2 numbers such as [0.9, 0.9] (command line)" in problems(
        MINIMAL, f"optimizer.betas={text}"
    )


def test_a_section_may_have_all_its_lines_commented_out(load):
    assert load(MINIMAL + "optimizer:\n  # lr: 1\n").config.optimizer == OptimizerSection()


def test_a_byte_order_mark_is_no_part_of_the_first_key(load):
    assert load("\ufeff" + MINIMAL).config.model.path == "base"


# --- interpolation ---------------------------------------------------------------------------------------------------


def test_values_may_refer_to_the_environment_and_to_other_values(load, monkeypatch):
    monkeypatch.setenv("COMET_TEST_SCRATCH", "/scratch")
    monkeypatch.setenv("COMET_TEST_STEPS", "1e2")
    text = MINIMAL.replace("output: run", "output: ${oc.env:COMET_TEST_SCRATCH}/${model.path}")
    config = load(text, "train.steps=${oc.env:COMET_TEST_STEPS}", "train.save_every=${train.steps}").config
    assert config.train.output == "/scratch/base"
    assert config.train.steps == 100
    assert config.train.save_every == 100


def test_a_reference_to_a_default_has_its_value(load):
    assert load(MINIMAL, "optimizer.min_lr=${optimizer.lr}").config.optimizer.min_lr == 5e-5


@pytest.mark.parametrize(
    "text", ["${nope.x}", "${oc.env:COMET_TEST_UNSET}", "${train.output}", "${train}", "a${b", "${train.steps"]
)
def test_a_reference_to_nothing_is_a_problem_with_its_place(problems, text):
    message = problems(MINIMAL.replace("output: run", f"output: '{text}'"))
    assert message.startswith("train.output=") and "refers to nothing" in message and "demo.yaml:6" in message


def test_a_reference_to_the_wrong_type_is_a_problem(problems):
    message = problems(MINIMAL, "train.save_every=${model.path}")
    assert message == "train.save_every='${model.path}' is 'base', not a whole number (command line)"


# --- problems --------------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_together_each_with_its_place(problems):
    message = problems(
        """\
modle:
  path: base
train:
  steps: many
  stesp: 3
  output: run
  output: other
""",
        "train.seed",
        "optimizer.lrr=1",
        "parallel.tp=2.5",
    )
    assert message.splitlines()[0] == "9 problems:"
    for expected in (
        "unknown key modle (demo.yaml:1)\n  did you mean model?",
        "train.steps='many' is not a whole number (demo.yaml:4)",
        "unknown key train.stesp (demo.yaml:5)\n  did you mean train.steps?",
        "train.output is given twice (demo.yaml:6 and demo.yaml:7)",
        "'train.seed' is not an override (command line)",
        "unknown key optimizer.lrr (command line)\n  did you mean optimizer.lr?",
        "parallel.tp=2.5 is not a whole number (command line)",
        "model.path has no value (demo.yaml)",
        "data.train has no value (demo.yaml)",
    ):
        assert expected in message


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(problems):
    assert "did you mean optimizer.lr?" in problems(MINIMAL, "train.lr=1")
    assert "did you mean train.steps?" in problems(MINIMAL, "steps=1")


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("[5, 5, 1]", (5, 5, 1)), ("[7]", (7,)), ("[]", ()), ("[2.0, 1e1]", (2, 10))]
)
def test_a_list_of_whole_numbers_or_a_word(load, text, value):
    assert load(MINIMAL, f"parallel.layers_per_stage={text}").config.parallel.layers_per_stage == value


def test_a_list_of_anything_else_is_refused(problems):
    message = problems(MINIMAL, "parallel.layers_per_stage=[1, 2.5]")
    assert "parallel.layers_per_stage=[1, 2.5] is not a list of whole numbers or a word" in message


@pytest.mark.parametrize("path", ["", "  path: ???\n"], ids=["absent", "left open"])
def test_a_model_to_start_from_stands_for_the_path(path, load):
    text = MINIMAL.replace("  path: base\n", path or "  precision: fp32\n")
    config = load(text, "model.init_from=hf:/models/qwen").config
    assert (config.model.path, config.model.init_from) == ("", "hf:/models/qwen")


def test_a_key_like_no_other_is_answered_with_the_keys_there_are(problems):
    assert "parallel has: tp, pp, layers_per_stage, slack, timeout_s, sequence_parallel, zero1" in problems(
        MINIMAL, "parallel.qqqq=1"
    )
    assert "the sections are: model, memory, parallel, data, optimizer, train, logging, profile" in problems(
        MINIMAL, "qqqq.wwww=1"
    )


def test_leading_dashes_of_an_override_are_a_misspelling(problems):
    assert "unknown key --train.steps (command line)\n  did you mean train.steps?" in problems(
        MINIMAL, "--train.steps=1"
    )


def test_a_dotted_key_in_yaml_is_told_to_nest(problems):
    message = problems(MINIMAL + "optimizer.lr: 1\n")
    assert "unknown key optimizer.lr (demo.yaml:8)" in message
    assert "write lr inside the section optimizer" in message


@pytest.mark.parametrize("text", ["???", "'???'"])
def test_a_required_marker_left_in_the_file_has_no_value_and_may_be_overridden(load, problems, text):
    text = MINIMAL.replace("base", text)
    message = problems(text)
    assert message.startswith("model.path has no value (demo.yaml:2)")
    assert "model.path=... on the command line" in message
    assert load(text, "model.path=other").config.model.path == "other"


def test_a_value_where_a_section_belongs_is_a_problem(problems):
    assert "train=5, but train is a section (command line)" in problems(MINIMAL, "train=5")
    assert "logging=[1], but logging is a section (demo.yaml:8)\n  it has: tensorboard, log_every" in problems(
        MINIMAL + "logging: [1]\n"
    )


def test_a_section_given_twice_is_a_problem(problems):
    assert "train is given twice (demo.yaml:5 and demo.yaml:8)" in problems(MINIMAL + "train:\n  steps: 3\n")


@pytest.mark.parametrize("override", ["train.steps", "=3", "", "="])
def test_an_override_without_key_or_equals_sign_is_a_problem(problems, override):
    assert "write an override as section.key=value" in problems(MINIMAL, override)


def test_a_missing_file_is_a_problem_beside_those_of_the_overrides(tmp_path):
    (tmp_path / "demo.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "demmo.yaml", ["train.stepz=1"])
    message = str(caught.value)
    assert "does not exist" in message and "demo.yaml?" in message
    assert "did you mean train.steps?" in message
    assert "has no value" not in message  # the file may well give it


def test_a_missing_folder_is_a_problem(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "no" / "such.yaml", [])


def test_a_folder_instead_of_a_file_is_a_problem(tmp_path):
    with pytest.raises(ConfigError, match="a folder, not a YAML file"):
        load_config(tmp_path, [])


def test_a_file_that_is_not_text_is_a_problem(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load_config(tmp_path / "weights.bin", [])


@pytest.mark.parametrize("text", ["", "# nothing\n", "null\n", "{}\n", "---\n"])
def test_an_empty_file_is_a_problem(problems, text):
    assert "the configuration file is empty" in problems(text)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "3\n"])
def test_a_file_that_is_no_mapping_is_a_problem(problems, text):
    assert "the configuration is not a mapping" in problems(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1,\nb: 2\n", 3),
        ("train:\n\tsteps: 1\n", 2),
        ("a: 'open\n", 2),
        ("a: *unknown\n", 1),
        ("a: 1\n---\nb: 2\n", 2),
    ],
)
def test_what_is_not_yaml_is_a_problem_with_its_line(problems, text, line):
    assert re.search(rf"not valid YAML: .+ \(demo\.yaml:{line}\)", problems(text))


def test_deep_nesting_is_a_problem_and_no_crash(problems):
    assert "nested too deeply" in problems("a: " + "[" * 20000)


@pytest.mark.parametrize("text", ["? [a]\n: 1\n", "? {a: 1}\n: 1\n"])
def test_a_list_or_mapping_as_a_key_is_a_problem(problems, text):
    assert "is not a key (demo.yaml:8)" in problems(MINIMAL + text)


def test_a_tag_that_would_build_a_python_object_is_only_text(load):
    text = MINIMAL.replace("shards", "!!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="data.train="):
        load(text)


# --- properties ------------------------------------------------------------------------------------------------------

KEYS = list(field_types())


@QUICK
@given(data=st.data(), key=st.sampled_from(KEYS))
def test_a_misspelt_key_is_always_a_config_error_naming_it_and_usually_the_right_one(load, data, key):
    at = data.draw(st.integers(0, len(key)))
    letter = data.draw(st.sampled_from(string.ascii_lowercase))
    misspelt = data.draw(st.sampled_from([key[:at] + letter + key[at:], key[:at] + letter + key[at + 1 :]]))
    assume(misspelt not in KEYS)
    with pytest.raises(ConfigError) as caught:
        load(MINIMAL, f"{misspelt}=1")
    assert f"unknown key {misspelt} (command line)\n  " in str(caught.value)


@QUICK
@given(key=st.text(min_size=1, max_size=20), value=st.text(max_size=20))
def test_no_override_raises_anything_but_a_config_error(load, key, value):
    try:
        load(MINIMAL, f"{key}={value}", key, f"train.steps={value}", f"optimizer.betas={value}", f"data.eval={value}")
    except ConfigError as error:
        assert str(error)


@QUICK
@given(text=st.text(alphabet="abtrain: steps\n-[]{}'\"#&*!|>%@`$?,0123456789", max_size=60))
def test_no_file_raises_anything_but_a_config_error(load, text):
    with pytest.raises(ConfigError):
        load(text)  # required values are always missing from so short a text


# --- saving ----------------------------------------------------------------------------------------------------------

# PyYAML itself writes U+0085, a line break of IBM's, so that it reads back as a space.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=20) | st.sampled_from(
    ["no", "007", "1e3", "null", "~", "a${b", "${x}", r"\${x}", r"c:\\${x", "2024-01-01", " padded ", "# x", "$", "é"]
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
CONFIGS = st.builds(
    Config,
    model=st.builds(ModelSection, path=TEXT, precision=TEXT),
    parallel=st.builds(ParallelSection, tp=st.integers(), sequence_parallel=st.booleans(), zero1=st.booleans()),
    data=st.builds(DataSection, train=TEXT, eval=TEXT, seed=st.integers()),
    optimizer=st.builds(OptimizerSection, lr=FLOATS, eps=FLOATS, betas=st.tuples(FLOATS, FLOATS)),
    train=st.builds(
        TrainSection,
        output=TEXT,
        steps=st.integers(),
        bptt_chunks=st.integers() | st.sampled_from(["all", "auto"]),
        cpu_threads=st.integers() | st.sampled_from(["all", "auto"]),
    ),
    logging=st.builds(LoggingSection, tensorboard=st.booleans()),
)


@QUICK
@given(config=CONFIGS)
def test_a_saved_configuration_loads_back_equal(tmp_path, config):
    path = tmp_path / "config.yaml"
    save_config(config, path)
    assert load_config(path, []).config == config


def test_saving_keeps_the_order_of_the_schema_and_leaves_no_other_file(load, tmp_path):
    save_config(load(MINIMAL).config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    sections = [line.rstrip(":") for line in text.splitlines() if re.fullmatch(r"\w+:", line)]
    assert sections == [f.name for f in dataclasses.fields(Config)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "demo.yaml"]


def test_a_failed_save_is_a_problem_and_keeps_the_old_file(load, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    save_config(load(MINIMAL).config, path)
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("comet_megatron.config.load.os.replace", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        save_config(load(MINIMAL, "train.steps=99").config, path)
    assert path.read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "demo.yaml"]


def test_saving_into_a_missing_folder_is_a_problem(load, tmp_path):
    with pytest.raises(ConfigError, match="cannot write the configuration"):
        save_config(load(MINIMAL).config, tmp_path / "none" / "config.yaml")


def test_infinities_do_not_load(problems):
    assert "is not a number" in problems(MINIMAL, "optimizer.lr=.inf")


def test_a_launchers_section_is_passed_over_in_a_file_only(load, problems):
    assert load(MINIMAL + "recipe:\n  chunk_size: 1\n").config == load(MINIMAL).config
    assert "unknown key recipe.chunk_size" in problems(MINIMAL, "recipe.chunk_size=1")
