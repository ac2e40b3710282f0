"""Let an exported model continue a text of any length, or talk.

python tools/generate.py --model DIR --prompt "def "
python tools/generate.py --model DIR --prompt-file LONG.txt --max-new-tokens 200 --temperature 0.8
cat LONG.txt | python tools/generate.py --model DIR --prompt-file - --save-session TODAY.session
python tools/generate.py --model DIR --load-session TODAY.session --prompt "And then"
python tools/generate.py --model DIR --chat --system "You are brief."

The answer goes to stdout as it is written (after the prompt itself, if that was given with --prompt); progress and
speed go to stderr. In a chat every line is a turn; /exit or the end of the input ends it. Ctrl-C ends a reply where it
is, and at the prompt the chat; without --chat it ends the command with the exit code 130. The session is saved anyway.
"""

from __future__ import annotations

import argparse
import io
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.errors import CometError, ConfigError, DataError, report_user_errors

DEFAULT_SEED = 1234
MOST_SEED = 2**63 - 1
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.001, 1000.0  # beyond: the likeliest token, or any token
INTERRUPTED_EXIT_CODE = 130  # of a shell, for SIGINT


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder that tools/convert_to_hf.py wrote")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-file", type=Path, help="file with the text to continue, of any length; -: stdin")
    prompt.add_argument("--chat", action="store_true", help="a conversation: the user's turns from stdin, one a line")
    parser.add_argument("--system", help="text of the system's turn, with --chat")
    parser.add_argument("--chat-template", type=Path, help="Jinja file instead of the tokenizer's own chat template")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="of an answer; default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=0.95, help="when sampling (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="when sampling; 0: all tokens (default)")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: tokens of the text less likely (default 1: off)"
    )
    parser.add_argument("--seed", type=int, help=f"when sampling (default {DEFAULT_SEED}; a loaded session goes on)")
    parser.add_argument("--stop", action="append", metavar="STRING", help="end an answer here; may be repeated")
    parser.add_argument(
        "--generation-layout",
        choices=("training", "official"),
        help="training (default): constant memory; official: token for token as the authors' code",
    )
    parser.add_argument("--save-session", type=Path, metavar="FILE", help="write the session here at the end")
    parser.add_argument("--load-session", type=Path, metavar="FILE", help="go on with this session")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto (default): as stored")
    return parser.parse_args(arguments)


def check_arguments(given: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before the model is loaded.

    Raises:
        ConfigError: names the option.
    """
    least = 0 if given.save_session and not given.chat else 1  # reading alone is of use if it is kept
    for wrong, option, value, must in (
        (given.max_new_tokens < least, "--max-new-tokens", given.max_new_tokens, f"{least} or more"),
        (
            given.temperature != 0 and not LEAST_TEMPERATURE <= given.temperature <= MOST_TEMPERATURE,
            "--temperature",
            given.temperature,
            f"0, or from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}",
        ),
        (not 0 < given.top_p <= 1, "--top-p", given.top_p, "above 0 and at most 1"),
        (given.top_k < 0, "--top-k", given.top_k, "0 or more"),
        (
            not 0 < given.repetition_penalty < math.inf,
            "--repetition-penalty",
            given.repetition_penalty,
            "above 0 and finite",
        ),
        (not 0 <= (given.seed or 0) <= MOST_SEED, "--seed", given.seed, f"from 0 to {MOST_SEED}"),
        ("" in (given.stop or ()), "--stop", repr(""), "a string with at least one character"),
    ):
        if wrong:
            raise ConfigError(f"{option} {value} must be {must}")
    if (given.system is not None or given.chat_template) and not given.chat:
        raise ConfigError("--system and --chat-template belong to a conversation", way_out="add --chat")
    if given.prompt is None and given.prompt_file is None and not given.chat and given.load_session is None:
        raise ConfigError(
            "there is nothing to continue", way_out="give --prompt, --prompt-file, --chat or --load-session"
        )


def read_text(path: Path, *, what: str) -> str:
    """The text of a file, or of stdin if the path is `-`; in UTF-8, whatever the locale.

    Raises:
        DataError: it cannot be read.
    """
    is_stdin = str(path) == "-"
    try:
        content = sys.stdin.buffer.read() if is_stdin else path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the {what}: {error}", where=str(path)) from error
    return decode(content, what=what, where="stdin" if is_stdin else str(path))


def decode(content: bytes, *, what: str, where: str) -> str:
    """The text, its ends of lines as Python has them.

    Raises:
        DataError: it is no UTF-8.
    """
    try:
        return io.StringIO(content.decode("utf-8"), newline=None).read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"the {what} is no UTF-8: byte {error.start + 1} is 0x{content[error.start]:02x}",
            where=where,
            way_out="convert it: iconv -f latin1 -t utf-8",
        ) from error


class Interrupt:
    """Ctrl-C, heard at once at a prompt, and else by who asks between two steps of the model.

    Anywhere else it could cut a step in two, and leave a session that holds half of it.
    """

    def __init__(self) -> None:
        self.was_asked = self.is_at_prompt = False

    def __call__(self) -> bool:
        """As `should_stop` of a session."""
        return self.was_asked

    def __enter__(self) -> Interrupt:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores Ctrl-C
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        if signal.getsignal(signal.SIGINT) == self._ask:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, *of_signal: object) -> None:
        self.was_asked = True
        if self.is_at_prompt:
            raise KeyboardInterrupt


def read_turn(interrupt: Interrupt) -> str | None:
    """The user's next turn; None at /exit, at the end of the input and at Ctrl-C.

    Raises:
        DataError: it is no UTF-8.
    """
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("you> ", end="", file=sys.stderr, flush=True)
        try:
            interrupt.is_at_prompt = True
            line = b"" if interrupt.was_asked else sys.stdin.buffer.readline()
        except KeyboardInterrupt:
            return None
        finally:
            interrupt.is_at_prompt = False
        turn = decode(line, what="user's turn", where="stdin").rstrip("\n")
        if not line or turn.strip() == "/exit":
            return None
        if turn.strip():
            return turn


class Progress:
    """A bar over the reading of a text, on a terminal, and the speed of reading and writing at the end, on stderr."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.started = time.perf_counter()
        self.read_tokens, self.read_s = 0, 0.0

    def __call__(self, done: int, total: int) -> None:
        """As `on_progress` of a session's feed."""
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=total, unit="token", unit_scale=True, desc="reading", leave=False, disable=None)
        self.bar.update(done - self.bar.n)
        self.read_tokens, self.read_s = done, time.perf_counter() - self.started
        if done == total:
            self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def report(self, new_tokens: int) -> None:
        """One line."""
        self._close()
        write_s = time.perf_counter() - self.started - self.read_s
        speeds = [
            f"{did} {tokens} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.0f} tokens/s)"
            for did, tokens, seconds in (("read", self.read_tokens, self.read_s), ("wrote", new_tokens, write_s))
            if tokens
        ]
        print("; ".join(speeds), file=sys.stderr, flush=True)


def continue_text(
    session: Any, tokenizer: Any, prompt: str | None, interrupt: Interrupt, *, echo: bool, **options: Any
) -> None:
    """Feed the prompt if there is one, and stream the answer to stdout; an interrupt ends either where it is.

    Raises:
        ConfigError: the options do not fit the model.
        DataError: the prompt holds a token of the model's memory, or no text for this tokenizer.
    """
    from transformers import TextStreamer

    from comet_megatron.inference.text import encode_text

    progress, before = Progress(), session.tokens_generated
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    if options["max_new_tokens"]:
        session.check_options(tokenizer=tokenizer, **options)  # before a long text is read
    if prompt is not None:
        is_first = session.last_id is None
        ids = encode_text(tokenizer, prompt, session.model.config, add_special_tokens=is_first)
        session.feed(ids, on_progress=progress, should_stop=interrupt)
        if progress.read_tokens < len(ids):
            print(f"interrupted: {progress.read_tokens} of {len(ids)} tokens were read", file=sys.stderr)
        if echo and not interrupt.was_asked:
            import torch

            streamer.put(torch.tensor(ids))
    if options["max_new_tokens"] and not interrupt.was_asked:
        session.generate(streamer=streamer, tokenizer=tokenizer, should_stop=interrupt, **options)
    elif echo:
        streamer.end()
    progress.report(session.tokens_generated - before)


def converse(session: Any, tokenizer: Any, given: argparse.Namespace, interrupt: Interrupt, **options: Any) -> None:
    """A reply to every turn, streamed to stdout; a turn that cannot be answered is reported, and the next one comes.

    Raises:
        ConfigError: the options do not fit the model.
    """
    from transformers import TextStreamer

    from comet_megatron.inference.chat import CometChat

    template = None if given.chat_template is None else read_text(given.chat_template, what="chat template")
    chat = CometChat(session, tokenizer, chat_template=template, system=given.system)
    session.check_options(tokenizer=tokenizer, **options)
    while True:
        try:
            turn = read_turn(interrupt)
            if turn is None:
                return
            progress, before = Progress(), session.tokens_generated
            streamer = TextStreamer(tokenizer, skip_special_tokens=True)
            chat.say(turn, on_progress=progress, streamer=streamer, should_stop=interrupt, **options)
            progress.report(session.tokens_generated - before)
        except CometError as error:
            print(f"{error.kind}: {error}", file=sys.stderr, flush=True)
        interrupt.was_asked = False  # it was meant for this reply


def open_session(model: Any, given: argparse.Namespace) -> Any:
    """A new session, or the one to go on with.

    Raises:
        CheckpointError, ConfigError: it does not fit the model or the options.
    """
    from comet_megatron.inference.session import CometSession

    if given.load_session is None:
        seed = DEFAULT_SEED if given.seed is None else given.seed
        return CometSession(model, generation_layout=given.generation_layout or "training", seed=seed)
    session = CometSession.load(given.load_session, model)
    if given.generation_layout not in (None, session.generation_layout):
        raise ConfigError(
            f"--generation-layout {given.generation_layout}, but the session has {session.generation_layout}",
            where=str(given.load_session),
            way_out="leave it out, or begin a new session",
        )
    if given.seed is not None:
        session.generator.manual_seed(given.seed)
    return session


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = parse_arguments(arguments)
    check_arguments(given)
    prompt = given.prompt if given.prompt_file is None else read_text(given.prompt_file, what="prompt")
    if prompt == "":
        raise DataError("the prompt is empty", way_out="give at least one character")
    quiet_libraries()
    from comet_megatron.inference.loading import load_model
    from comet_megatron.inference.session_file import check_session_path, read_session_header

    if given.load_session is not None:  # before the model, which takes longer
        read_session_header(given.load_session)
    if given.save_session is not None:
        check_session_path(given.save_session)
    model, tokenizer = load_model(given.model, dtype=given.dtype)
    session = open_session(model, given)
    # All that shapes the choice is said here, so that the model's generation config adds nothing unseen but its stops.
    options = {
        "max_new_tokens": given.max_new_tokens,
        "do_sample": given.temperature > 0,
        "repetition_penalty": given.repetition_penalty,
        "stop_strings": given.stop,
    }
    if given.temperature > 0:
        options |= {"temperature": given.temperature, "top_p": given.top_p, "top_k": given.top_k}
    before = session.tokens_fed + session.tokens_generated
    with Interrupt() as interrupt:
        try:
            if given.chat:
                converse(session, tokenizer, given, interrupt, **options)
            else:
                continue_text(session, tokenizer, prompt, interrupt, echo=given.prompt is not None, **options)
        finally:  # whatever ends it: what was read may have taken hours
            has_grown = session.tokens_fed + session.tokens_generated > before
            if given.save_session is not None and has_grown:
                session.save(given.save_session)
                print(f"saved the session: --load-session {given.save_session}", file=sys.stderr, flush=True)
    if given.save_session is not None and not has_grown:
        print("nothing was read, so no session is saved", file=sys.stderr)
    return INTERRUPTED_EXIT_CODE if interrupt.was_asked and not given.chat else 0


if __name__ == "__main__":
    sys.exit(main())
