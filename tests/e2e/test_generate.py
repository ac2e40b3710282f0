"""tools/generate.py as a user types it: prompts from everywhere, chat, sessions, layouts, bad input."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from comet_megatron.hf.configuration_comet import CometConfig
from comet_megatron.hf.modeling_comet import CometForCausalLM

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = REPOSITORY / "tokenizers" / "python_stdlib_4k"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LONG = "for line in file:\n    print(line)\n" * 20


def build_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["<|memory|>", "<beacon_0>", "<beacon_1>", "<beacon>"], special_tokens=True)
    return tokenizer


def build_model(tokenizer, seed=0):
    first = tokenizer.convert_tokens_to_ids("<|memory|>")
    torch.manual_seed(seed)
    config = CometConfig(
        vocab_size=4352,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        chunk_size=16,
        placeholder_id=first,
        temp_beacon_id=first + 3,
        global_beacon_ids=[first + 1, first + 2],
        temp_beacon_stride=4,
        temp_mem_budget=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CometForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """Exports: `hf`, `other` (other weights), `plain` (its tokenizer lacks the beacons)."""
    folder = tmp_path_factory.mktemp("generate")
    for name, seed in (("hf", 0), ("other", 1), ("plain", 0)):
        tokenizer = build_tokenizer()
        build_model(tokenizer, seed).save_pretrained(folder / name)
        (AutoTokenizer.from_pretrained(TOKENIZER) if name == "plain" else tokenizer).save_pretrained(folder / name)
    (folder / "long.txt").write_text(LONG)
    (folder / "template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def generate(ready, monkeypatch):
    """Run the tool in this process: exit code, stdout, stderr."""
    spec = importlib.util.spec_from_file_location("tool_generate", REPOSITORY / "tools" / "generate.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments, stdin="", model="hf"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = tool.main(["--model", str(ready / model), *map(str, arguments)])
        return code, out.getvalue(), err.getvalue()

    transformers_logging.disable_progress_bar()  # a command does so before it imports transformers
    yield run
    transformers_logging.enable_progress_bar()


def answer(ready, prompt, tokens, **options):
    """What the model's own generate says."""
    tokenizer = AutoTokenizer.from_pretrained(ready / "hf")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = CometForCausalLM.from_pretrained(ready / "hf").eval().generate(ids, max_new_tokens=tokens, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("layout", ["training", "official"])
def test_a_prompt_from_anywhere_gets_the_models_answer(ready, generate, layout):
    typed = ("--max-new-tokens", 20, "--generation-layout", layout)
    want = answer(ready, LONG, 20, generation_layout=layout)
    assert want.strip()
    code, out, err = generate("--prompt", LONG, *typed)
    assert (code, out) == (0, LONG + want + "\n")
    for source, stdin in ((ready / "long.txt", ""), ("-", LONG)):
        code, out, err = generate("--prompt-file", source, *typed, stdin=stdin)
        assert (code, out) == (0, want + "\n"), err
    assert "read " in err and "tokens/s); wrote 20 tokens" in err


def test_control_another_layout_and_another_prompt_get_another_answer(ready):
    answers = {answer(ready, LONG, 20), answer(ready, LONG, 20, generation_layout="official"), answer(ready, "x", 20)}
    assert len(answers) == 3


def test_sampling_follows_the_seed_and_its_limits(generate):
    def out(*typed):
        return generate("--prompt", "def ", "--max-new-tokens", 12, *typed)[1]

    hot = ("--temperature", 1.5, "--top-p", 1)
    assert out(*hot, "--seed", 1) == out(*hot, "--seed", 1) != out(*hot, "--seed", 2)
    assert out(*hot, "--top-k", 1) == out() != out(*hot)


def test_a_stop_string_ends_the_answer(ready, generate):
    want = answer(ready, LONG, 12)
    stop = want[-3:]
    code, out, _ = generate(
        "--prompt-file", ready / "long.txt", "--max-new-tokens", 30, "--stop", stop, "--stop", "zzzz"
    )
    assert code == 0 and stop in out and len(out) <= len(want) + 2


def test_a_saved_session_goes_on_as_if_it_had_never_stopped(generate, tmp_path):
    hot = ("--temperature", 1.2)
    session = tmp_path / "s"
    whole = generate("--prompt", "def f(x):", "--max-new-tokens", 30, *hot)[1]
    first = generate("--prompt", "def f(x):", "--max-new-tokens", 12, *hot, "--save-session", session)
    second = generate("--load-session", session, "--max-new-tokens", 18, *hot, "--save-session", session)
    assert first[0] == second[0] == 0 and "saved the session" in second[2]
    assert first[1].rstrip("\n") + second[1] == whole
    code, out, err = generate("--load-session", session, "--prompt", " # more", "--max-new-tokens", 5)
    assert code == 0 and out.startswith(" # more") and "read " in err
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_text_can_be_read_today_and_answered_tomorrow(ready, generate, tmp_path):
    code, out, _ = generate(
        "--prompt-file", ready / "long.txt", "--max-new-tokens", 0, "--save-session", tmp_path / "s"
    )
    assert (code, out) == (0, "")
    assert generate("--load-session", tmp_path / "s", "--max-new-tokens", 20)[1] == answer(ready, LONG, 20) + "\n"


def test_a_chat_of_several_turns_is_one_session(ready, generate, tmp_path):
    typed = ("--chat", "--chat-template", ready / "template.jinja", "--max-new-tokens", 10)
    code, out, err = generate(*typed, "--system", "brief", stdin="one\n\ntwo\n/exit\nthree\n")
    assert code == 0 and err.count("wrote") == 2, err
    assert generate(*typed, "--system", "brief", stdin="one\ntwo")[1] == out
    first = generate(*typed, "--system", "brief", "--save-session", tmp_path / "s", stdin="one\n")[1]
    second = generate(*typed, "--load-session", tmp_path / "s", stdin="two\n")[1]
    assert first + second == out
    assert generate(*typed, stdin="one\ntwo\n")[1] != out


def test_the_tool_runs_as_a_command_with_a_pipe(ready):
    done = subprocess.run(
        [sys.executable, "tools/generate.py", "--model", ready / "hf", "--prompt-file", "-", "--max-new-tokens", "20"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        input=LONG,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer(ready, LONG, 20) + "\n"
    assert "Traceback" not in done.stderr and done.stderr.startswith("read ")


BAD = {
    "nothing to continue": ((), "nothing to continue"),
    "a prompt that holds a beacon": (("--prompt", "a <beacon> b"), "holds <beacon>, a token of the model's memory"),
    "an empty stdin": (("--prompt-file", "-"), "prompt is empty"),
    "no such prompt file": (("--prompt-file", "{0}/none"), "cannot read the prompt"),
    "a chat without a template": (("--chat",), "no chat template"),
    "a system's turn without a chat": (("--prompt", "x", "--system", "y"), "add --chat"),
    "a negative top-k": (("--prompt", "x", "--top-k", "-1"), "--top-k -1"),
    "an empty stop string": (("--prompt", "x", "--stop", ""), "--stop ''"),
    "no session there": (("--load-session", "{0}/none"), "does not exist"),
    "a session that is none": (("--load-session", "{0}/long.txt"), "damaged, or no session"),
    "a session to be saved nowhere": (("--prompt", "x", "--save-session", "{0}/none/s"), "folder is missing"),
    "a session in the place of another file": (("--prompt", "x", "--save-session", "{0}/long.txt"), "not replaced"),
    "another layout than the session's": (
        ("--load-session", "{0}/s", "--generation-layout", "official"),
        "the session has training",
    ),
    "a cut session": (("--load-session", "{0}/cut"), "damaged"),
}


@pytest.fixture
def place(ready, tmp_path, generate):
    """A session, a cut one and a text file."""
    assert generate("--prompt", "def ", "--max-new-tokens", 3, "--save-session", tmp_path / "s")[0] == 0
    (tmp_path / "cut").write_bytes((tmp_path / "s").read_bytes()[:-100])
    shutil.copyfile(ready / "long.txt", tmp_path / "long.txt")
    return tmp_path


def assert_refused(result, says):
    code, _, err = result
    assert code == 2 and says in err and "Traceback" not in err, err
    assert err.split(":")[0] in ("configuration error", "checkpoint error", "data error", "output error")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_message_and_writes_nothing(name, place, generate):
    typed, says = BAD[name]
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    assert_refused(generate(*(t.format(place) for t in typed)), says)
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before


def test_another_models_session_and_a_tokenizer_without_beacons_are_refused(place, generate):
    assert_refused(generate("--load-session", place / "s", model="other"), "the weights do not")
    assert_refused(
        generate("--load-session", place / "s", "--dtype", "bf16"), "dtype torch.float32, here torch.bfloat16"
    )
    assert_refused(generate("--prompt", "x", model="plain"), "lacks the beacon tokens")


def test_folders_with_other_models_are_refused(ready, place, generate):
    shutil.copytree(ready / "hf", place / "pickled")
    (place / "pickled" / "model.safetensors").unlink()
    torch.save({}, place / "pickled" / "pytorch_model.bin")
    assert_refused(generate("--prompt", "x", model=place / "pickled"), "cannot be loaded")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=4352, num_key_value_heads=1, **sizes)).save_pretrained(place / "qwen")
    build_tokenizer().save_pretrained(place / "qwen")
    assert_refused(generate("--prompt", "x", model=place / "qwen"), "holds a qwen3 model, not a CoMeT model")


def test_a_damaged_state_in_a_sound_file_is_refused(place, generate):
    save_file({"x": torch.ones(1)}, place / "v", metadata={"comet_session": json.dumps({"version": 7})})
    assert_refused(generate("--load-session", place / "v"), "version 7, this code reads 1")
