"""A conversation of many turns in one session: every turn is fed once, whatever the template makes of older ones."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from comet_megatron.errors import ConfigError
from comet_megatron.inference.session import CometSession
from comet_megatron.inference.text import encode_text


class CometChat:
    """Turns of a user and of the model.

    The first turn feeds the rendered template. A later one feeds what the template puts after the model's last reply,
    which the session holds as the model wrote it: the end of its turn, unless it wrote that itself, and the user's.
    So a template that changes or drops parts of older replies changes nothing in the session.

    Args:
        session: a new one, or one that holds a conversation up to and with a reply.
        chat_template: Jinja text instead of the tokenizer's own.
        system: text of the system's turn, only for a new session.

    Raises:
        ConfigError: there is no chat template, or a system's turn for a session that has begun.
    """

    def __init__(
        self, session: CometSession, tokenizer: Any, *, chat_template: str | None = None, system: str | None = None
    ) -> None:
        if not (chat_template or tokenizer.chat_template):
            raise ConfigError("the tokenizer has no chat template", way_out="give one: --chat-template FILE")
        has_begun = session.last_id is not None
        if has_begun and system is not None:
            raise ConfigError(
                "a system's turn comes first, but the session has begun", way_out="leave --system out, or begin anew"
            )
        self.session, self.tokenizer, self.chat_template = session, tokenizer, chat_template
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        if has_begun:  # what was said before is in the session; a template wants turns that alternate
            self._messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]

    def say(
        self,
        text: str,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        streamer: Any = None,
        should_stop: Callable[[], bool] | None = None,
        **options: Any,
    ) -> str:
        """The user's turn, then the model's.

        Args:
            on_progress: as in the session's `feed`.
            streamer, options: as in the session's `generate`.
            should_stop: as in both. A turn that is cut stays in the session as far as it was read or written; the
                next one ends it.

        Returns: the reply, without special tokens.

        Raises:
            ConfigError: the template cannot be rendered, or does not show the replies; the options do not fit.
            DataError: the text holds a token of the model's memory, or is no UTF-8.
            After either, the session is as it was before.
        """
        turn = {"role": "user", "content": text}
        ids = self._ids_of_turn(turn)
        self.session.check_options(tokenizer=self.tokenizer, **options)
        fed_before, said = self.session.tokens_fed, ""
        try:
            if ids:
                self.session.feed(ids, on_progress=on_progress, should_stop=should_stop)
            if should_stop is None or not should_stop():
                reply = self.session.generate(
                    tokenizer=self.tokenizer, streamer=streamer, should_stop=should_stop, **options
                )
                said = self.tokenizer.decode(reply, skip_special_tokens=True)
        finally:  # whatever ends it: a turn that the session holds has to be ended by the next one
            if said or self.session.tokens_fed > fed_before:
                self._messages += [turn, {"role": "assistant", "content": said}]
        return said

    def _ids_of_turn(self, turn: dict[str, str]) -> list[int]:
        """What of the conversation is not in the session yet."""
        config = self.session.model.config
        if not self._messages or self._messages[-1]["role"] != "assistant":
            rendered = self._render([*self._messages, turn])
            return encode_text(self.tokenizer, rendered, config, add_special_tokens=False)
        marker = f"reply-{uuid.uuid4().hex}"  # stands for the last reply, to find what follows it
        rendered = self._render([*self._messages[:-1], {"role": "assistant", "content": marker}, turn])
        _, found, rest = rendered.partition(marker)
        if not found or marker in rest:
            raise ConfigError("the chat template does not show the last reply once, so its end cannot be found")
        ids = encode_text(self.tokenizer, rest, config, add_special_tokens=False)
        wrote_its_end = self.session.last_id in self._end_ids()
        return ids[1:] if wrote_its_end and ids[:1] == [self.session.last_id] else ids

    def _end_ids(self) -> set[int]:
        eos = self.session.model.generation_config.eos_token_id
        return {*self.tokenizer.all_special_ids, *([eos] if isinstance(eos, int) else eos or ())}

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # Jinja, or what the template raises itself
            raise ConfigError(f"the chat template cannot be rendered: {error}") from error
