"""tools/generate.py as a user types it: prompts from everywhere, chat, sessions, layouts, bad input."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from comet_megatron.hf.configuration_comet import CometConfig
from comet_megatron.hf.modeling_comet import CometForCausalLM
from comet_megatron.inference.session_file import read_session_header

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

    def run(*arguments, stdin="", model="hf", out=None):
        if isinstance(stdin, (str, bytes)):
            content = stdin.encode() if isinstance(stdin, str) else stdin
            stdin = io.TextIOWrapper(io.BytesIO(content), encoding="ascii")  # no locale has a say
        monkeypatch.setattr(sys, "stdin", stdin)
        out, err = out or io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = tool.main(["--model", str(ready / model), *map(str, arguments)])
        return code, out.getvalue(), err.getvalue()

    run.tool = tool
    transformers_logging.disable_progress_bar()  # a command does so before it imports transformers
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is ignored
    yield run
    signal.signal(signal.SIGINT, before)
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


def chat_options(ready, *more):
    return ("--chat", "--chat-template", ready / "template.jinja", "--max-new-tokens", 10, *more)


def test_a_turn_that_cannot_be_answered_is_reported_and_the_chat_goes_on(ready, generate, tmp_path):
    want = generate(*chat_options(ready), stdin="one\ntwo\n")[1]
    bad = b"say <beacon> now\n", b"caf\xe9\n"
    code, out, err = generate(*chat_options(ready, "--save-session", tmp_path / "s"), stdin=b"one\n%b%btwo\n" % bad)
    assert (code, out) == (0, want) and "Traceback" not in err
    assert "data error: the text holds <beacon>, a token of the model's memory" in err
    assert "data error: the user's turn is no UTF-8: byte 4 is 0xe9 (stdin)" in err
    assert err.rstrip().endswith(f"saved the session: --load-session {tmp_path / 's'}")
    assert read_session_header(tmp_path / "s")["tokens_generated"] == 20


class InterruptedOut(io.StringIO):
    """Ctrl-C, and an impatient second one, at the n-th piece of text that is written."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def write(self, text):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_ends_a_reply_which_stays_in_the_session(ready, generate, tmp_path):
    whole = generate(*chat_options(ready), stdin="one\n")[1]
    cut = generate(*chat_options(ready, "--save-session", tmp_path / "1"), stdin="one\n", out=InterruptedOut(5))
    header = read_session_header(tmp_path / "1")
    assert cut[0] == 0 and whole.startswith(cut[1].rstrip("\n")) and 0 < header["tokens_generated"] < 10
    typed = chat_options(ready, "--save-session", tmp_path / "2")
    code, out, _ = generate(*typed, stdin="one\ntwo\n", out=InterruptedOut(5))
    assert code == 0 and out.startswith(cut[1]) and len(out) > len(cut[1])
    assert read_session_header(tmp_path / "2")["tokens_generated"] == header["tokens_generated"] + 10
    follow_up = generate(*chat_options(ready, "--load-session", tmp_path / "1"), stdin="two\n")
    assert cut[1] + follow_up[1] == out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_the_prompt_ends_the_chat_and_the_session_is_saved(ready, generate, tmp_path):
    lines = iter([b"one\n"])

    def readline():
        if (line := next(lines, None)) is None:
            signal.raise_signal(signal.SIGINT)
        return line

    stdin = SimpleNamespace(buffer=SimpleNamespace(readline=readline), isatty=lambda: True)
    code, out, err = generate(*chat_options(ready, "--save-session", tmp_path / "s"), stdin=stdin)
    assert code == 0 and out == generate(*chat_options(ready), stdin="one\n")[1]
    assert err.count("you> ") == 2 and read_session_header(tmp_path / "s")["tokens_generated"] == 10


def test_ctrl_c_saves_a_session_of_what_was_read_and_written(ready, generate, tmp_path, monkeypatch):
    typed = ("--prompt-file", ready / "long.txt", "--max-new-tokens", 30)
    code, out, err = generate(*typed, "--save-session", tmp_path / "s", out=InterruptedOut(6))
    header = read_session_header(tmp_path / "s")
    assert code == 130 and "Traceback" not in err and 0 < header["tokens_generated"] < 30
    rest = generate("--load-session", tmp_path / "s", "--max-new-tokens", 30 - header["tokens_generated"])
    assert out.rstrip("\n") + rest[1] == generate(*typed)[1]
    on_progress = generate.tool.Progress.__call__

    def interrupt_after_32(self, done, total):
        on_progress(self, done, total)
        if done == 32:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generate.tool.Progress, "__call__", interrupt_after_32)
    code, out, err = generate(*typed, "--save-session", tmp_path / "r")
    header = read_session_header(tmp_path / "r")
    assert (code, out, header["tokens_fed"], header["tokens_generated"]) == (130, "", 32, 0)
    assert "interrupted: 32 of " in err and "saved the session" in err


def test_a_failure_in_the_middle_saves_what_was_read_and_one_before_it_saves_nothing(ready, generate, tmp_path):
    class ClosedOut(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        generate("--prompt", "def ", "--save-session", tmp_path / "s", out=ClosedOut())
    assert read_session_header(tmp_path / "s")["tokens_fed"] > 0
    assert_refused(generate("--prompt", "<beacon>", "--save-session", tmp_path / "n"), "holds <beacon>")
    code, _, err = generate(*chat_options(ready, "--save-session", tmp_path / "n"), stdin="/exit\n")
    assert code == 0 and err == "nothing was read, so no session is saved\n" and not (tmp_path / "n").exists()


def test_a_signal_from_outside_ends_a_reply_of_the_command(ready, tmp_path):
    typed = [str(t) for t in chat_options(ready, "--max-new-tokens", 100_000, "--save-session", tmp_path / "s")]
    process = subprocess.Popen(
        [sys.executable, "tools/generate.py", "--model", str(ready / "hf"), *typed],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "LC_ALL": "C"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's is ignored
    )
    process.stdin.write(b"one\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(b"", timeout=120)
    assert process.returncode == 0 and b"Traceback" not in err, err
    assert 0 < read_session_header(tmp_path / "s")["tokens_generated"] < 100_000


def test_options_are_refused_before_a_long_prompt_is_read(ready, generate, monkeypatch):
    def read_nothing(*args, **options):
        raise AssertionError("it was read")

    monkeypatch.setattr("comet_megatron.inference.session.CometSession.feed", read_nothing)
    monkeypatch.setattr(generate.tool, "check_arguments", lambda given: None)
    for typed in (("--prompt", "x"), ("--chat", "--chat-template", ready / "template.jinja")):
        assert_refused(generate(*typed, "--max-new-tokens", -1, stdin="one\n"), "max_new_tokens=-1")


def test_the_models_generation_config_adds_nothing_but_its_stops(ready, generate, tmp_path):
    shutil.copytree(ready / "hf", tmp_path / "m")
    config = {"min_p": 0.3, "repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0, "num_beams": 2}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(config))
    typed = ("--prompt-file", ready / "long.txt", "--max-new-tokens", 20)
    want = generate(*typed)[1]
    assert generate(*typed, model=tmp_path / "m")[:2] == (0, want)
    penalised = generate(*typed, "--repetition-penalty", 5, model=tmp_path / "m")[1]
    assert penalised == answer(ready, LONG, 20, repetition_penalty=5.0) + "\n" != want


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
def test_bytes_that_are_no_utf8_are_refused_and_utf8_is_read_in_every_locale(ready, locale):
    def run(*typed, stdin=b""):
        return subprocess.run(
            [sys.executable, "tools/generate.py", "--model", ready / "hf", *typed, "--max-new-tokens", "2"],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "LC_ALL": locale},
            input=stdin,
            capture_output=True,
            timeout=120,
        )

    done = run("--prompt-file", "-", stdin="caf\xe9".encode())
    assert done.returncode == 0, done.stderr
    done = run("--prompt-file", "-", stdin=b"caf\xe9")
    assert done.returncode == 2 and done.stderr.startswith(
        b"data error: the prompt is no UTF-8: byte 4 is 0xe9 (stdin)"
    )
    if locale == "C":
        done = run("--prompt", b"a\xff")
        assert done.returncode == 2 and done.stderr.startswith(
            b"data error: the text is no UTF-8: character 2 is '\\udcff'"
        )


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
    "an infinite temperature": (
        ("--prompt", "x", "--temperature", "inf"),
        "--temperature inf must be 0, or from 0.001",
    ),
    "no temperature at all": (("--prompt", "x", "--temperature", "nan"), "--temperature nan"),
    "nearly no temperature": (("--prompt", "x", "--temperature", "1e-45"), "--temperature 1e-45"),
    "no repetition penalty at all": (("--prompt", "x", "--repetition-penalty", "0"), "--repetition-penalty 0.0"),
    "a seed beyond all": (("--prompt", "x", "--seed", "99999999999999999999"), "--seed 99999999999999999999"),
    "a negative seed": (("--prompt", "x", "--seed", "-1"), "--seed -1"),
    "a folder as a session": (("--load-session", "{0}"), "this is a folder, no session file"),
    "a file that is no UTF-8": (("--prompt-file", "{0}/latin"), "the prompt is no UTF-8: byte 2 is 0xe9"),
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
    (tmp_path / "latin").write_bytes(b"x\xe9")
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
