"""Let an exported model continue a text of any length, or talk.

python tools/generate.py --model DIR --prompt "def "
python tools/generate.py --model DIR --prompt-file LONG.txt --max-new-tokens 200 --temperature 0.8
cat LONG.txt | python tools/generate.py --model DIR --prompt-file - --save-session TODAY.session
python tools/generate.py --model DIR --load-session TODAY.session --prompt "And then"
python tools/generate.py --model DIR --chat --system "You are brief."

The answer goes to stdout as it is written (after the prompt itself, if that was given with --prompt); progress and
speed go to stderr. In a chat every line is a turn; /exit or the end of the input ends it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.errors import ConfigError, DataError, report_user_errors

DEFAULT_SEED = 1234


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
        (not given.temperature >= 0, "--temperature", given.temperature, "0 or more"),
        (not 0 < given.top_p <= 1, "--top-p", given.top_p, "above 0 and at most 1"),
        (given.top_k < 0, "--top-k", given.top_k, "0 or more"),
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
    """The text of a file, or of stdin if the path is `-`.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the {what}: {error}", where=str(path)) from error


def read_turns() -> Iterator[str]:
    """The user's turns, until /exit or the end of the input."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("you> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        except UnicodeDecodeError as error:
            raise DataError(f"cannot read the user's turn: {error}", where="stdin") from error
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.rstrip("\n")


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
        if done == total:
            self.bar.close()
            self.bar = None
            self.read_tokens, self.read_s = total, time.perf_counter() - self.started

    def report(self, new_tokens: int) -> None:
        """One line."""
        write_s = time.perf_counter() - self.started - self.read_s
        speeds = [
            f"{did} {tokens} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.0f} tokens/s)"
            for did, tokens, seconds in (("read", self.read_tokens, self.read_s), ("wrote", new_tokens, write_s))
            if tokens
        ]
        print("; ".join(speeds), file=sys.stderr, flush=True)


def continue_text(session: Any, tokenizer: Any, prompt: str | None, *, echo: bool, **options: Any) -> None:
    """Feed the prompt if there is one, and stream the answer to stdout.

    Raises:
        DataError: the prompt holds a token of the model's memory, or no text for this tokenizer.
    """
    from transformers import TextStreamer

    from comet_megatron.inference.text import encode_text

    progress, before = Progress(), session.tokens_generated
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    if prompt is not None:
        is_first = session.last_id is None
        ids = encode_text(tokenizer, prompt, session.model.config, add_special_tokens=is_first)
        session.feed(ids, on_progress=progress)
        if echo:
            import torch

            streamer.put(torch.tensor(ids))
    if options["max_new_tokens"]:
        session.generate(streamer=streamer, tokenizer=tokenizer, **options)
    progress.report(session.tokens_generated - before)


def converse(session: Any, tokenizer: Any, given: argparse.Namespace, **options: Any) -> None:
    """A reply to every turn, streamed to stdout."""
    from transformers import TextStreamer

    from comet_megatron.inference.chat import CometChat

    template = None if given.chat_template is None else read_text(given.chat_template, what="chat template")
    chat = CometChat(session, tokenizer, chat_template=template, system=given.system)
    for turn in read_turns():
        progress, before = Progress(), session.tokens_generated
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        chat.say(turn, on_progress=progress, streamer=streamer, **options)
        progress.report(session.tokens_generated - before)


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
    options = {"max_new_tokens": given.max_new_tokens, "do_sample": given.temperature > 0, "stop_strings": given.stop}
    if given.temperature > 0:
        options |= {"temperature": given.temperature, "top_p": given.top_p, "top_k": given.top_k}
    if given.chat:
        converse(session, tokenizer, given, **options)
    else:
        continue_text(session, tokenizer, prompt, echo=given.prompt is not None, **options)
    if given.save_session is not None:
        session.save(given.save_session)
        print(f"saved the session: --load-session {given.save_session}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
