"""Render a chat by its template, as token ids with a loss mask: only what the assistant says carries loss.

A template with `{% generation %}` marks says itself where that is. Any other is asked: the conversation is rendered a
second time with a marker in place of each reply, and what stands between two markers is looked for in the first text.
So a reply is all that the template writes from its generation prompt to the end of the turn, thinking and tool calls
too, as far as the template keeps them, and the text trained on is the template's, whatever it makes of older turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from comet_megatron.data.rows import Chat, check_is_unicode
from comet_megatron.data.token_bytes import TokenBytes
from comet_megatron.data.tokenizer import encode, plain_backend
from comet_megatron.errors import ConfigError, DataError

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKER = "the-reply-is-here"  # no white space around it and nothing a template might look for in it

Span = tuple[int, int]  # of characters: first, behind the last


class ChatEncoder:
    """Token ids and loss masks of chats.

    Args:
        tokenizer: a fast one (it must tell which characters a token stands for), if there is a template.
        chat_template: Jinja text instead of the tokenizer's own.

    Raises:
        ConfigError: there is a template, but the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: str | None = chat_template or (
            tokenizer.get_chat_template() if tokenizer.chat_template else None
        )
        if self.template is None:
            return
        if not tokenizer.is_fast:
            raise ConfigError(
                "chats need a fast tokenizer, which tells the characters of each token",
                where=str(getattr(tokenizer, "name_or_path", "")),
                way_out="give a folder with a tokenizer.json",
            )
        self._has_generation_marks = bool(_GENERATION_MARK.search(self.template))
        added = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._end_token = re.compile(r"\s*(?:" + "|".join(map(re.escape, added)) + ")") if added else None
        self._generation_prompt = self._find_generation_prompt()

    def encode(self, chat: Chat, *, where: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids, int32 [tokens], and which of them carry loss, bool [tokens].

        No token is added to the template's text: it has its own first and last ones. A pair without a template is
        prompt, response and the end-of-text token, one after the other.

        Args:
            where: file and line, for messages.

        Raises:
            ConfigError: there is no template, and no way to do without.
            DataError: the template refuses the chat, its replies cannot be found in the text, or none is in it.
        """
        if self.template is None:
            return self._encode_plainly(chat, where=where)
        if self._has_generation_marks:
            text, spans = self._marked_spans(chat, where=where)
            check_is_unicode(text, what="the rendered chat", where=where)
        else:
            replaced, marks = _with_marks_for_replies(chat)
            text, rest = self._render([chat.messages, replaced], chat.tools, where=where)
            check_is_unicode(text, what="the rendered chat", where=where)
            spans = self._found_spans(text, rest, marks, where=where)
        ids, mask = self._tokens_of(text, spans)
        if not mask.any():
            raise DataError("no token of the chat carries loss: its replies are empty", where=where)
        return ids, mask

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    def _tokens_of(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """The ids, int32 [tokens], and which of them hold characters of the spans, bool [tokens]."""
        backend = plain_backend(self.tokenizer, split_special_tokens=self.tokenizer.split_special_tokens)
        if self._token_bytes.is_known:
            ids = np.asarray(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.int32)
            ends = self._token_bytes.ends(ids, text.encode("utf-8"))
            if ends is not None:
                return ids, tokens_over_bytes(ends, spans, text)
        encoding = backend.encode_batch([text], add_special_tokens=False)[0]  # `encode` takes longer
        ids = np.asarray(encoding.ids, dtype=np.int32)
        return ids, tokens_in_spans(encoding, spans, num_tokens=len(ids))

    def _encode_plainly(self, chat: Chat, *, where: str) -> tuple[np.ndarray, np.ndarray]:
        if not chat.is_pair:
            raise ConfigError(
                "the data has chats, and the tokenizer has no chat template",
                where=where,
                way_out="give one with --chat-template FILE, or a tokenizer of a chat model",
            )
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-text token to end a response with", where=where)
        prompt, response = (encode(self.tokenizer, message["content"]) for message in chat.messages)
        ids = np.asarray([*prompt, *response, self.tokenizer.eos_token_id], dtype=np.int32)
        return ids, np.arange(len(ids)) >= len(prompt)

    def _render(
        self, conversations: Sequence[Sequence[Any]], tools: Sequence[Any] | None, *, where: str, **options: Any
    ) -> list[str]:
        """The text of each conversation; one call, since what it does besides rendering takes longer than that."""
        try:
            return self.tokenizer.apply_chat_template(
                [list(messages) for messages in conversations],
                tools=list(tools) if tools else None,
                chat_template=self.template,
                tokenize=False,
                **options,
            )
        except Exception as error:  # Jinja, or what the template raises itself
            raise DataError(f"the chat template refuses the conversation: {_reason(error)}", where=where) from error

    def _find_generation_prompt(self) -> str:
        """What the template adds for the model to go on; empty if it adds nothing, or cannot be asked this way."""
        question = [[{"role": "user", "content": "question"}]]
        try:
            (without,) = self._render(question, None, where="")
            (with_prompt,) = self._render(question, None, where="", add_generation_prompt=True)
        except DataError:
            return ""
        return with_prompt.removeprefix(without) if with_prompt.startswith(without) else ""

    def _marked_spans(self, chat: Chat, *, where: str) -> tuple[str, list[Span]]:
        """The text of the chat, and what the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                # Keys without a value are left out as apply_chat_template does, so that the text is the same.
                conversations=[[{k: v for k, v in message.items() if v is not None} for message in chat.messages]],
                tools=list(chat.tools) if chat.tools else None,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise DataError(f"the chat template refuses the conversation: {_reason(error)}", where=where) from error
        return texts[0], [(int(start), int(end)) for start, end in spans[0]]

    def _found_spans(self, text: str, rest: str, marks: Sequence[str], *, where: str) -> list[Span]:
        """The replies in the rendered text, each with the token that ends its turn.

        Args:
            rest: the text with marks in the place of the replies.
        """
        between = self._texts_between_replies(rest, marks, where=where)
        spans = []
        for start, end in spans_between(text, between, where=where):
            found = self._end_token.match(text, end) if self._end_token else None
            spans.append((start, found.end() if found else end))
        return spans

    def _texts_between_replies(self, rest: str, marks: Sequence[str], *, where: str) -> list[str]:
        """What the template writes before the first reply, between two, and after the last; generation prompts too."""
        texts = []
        for mark in marks:
            before, found, after = rest.partition(mark)
            if not found:  # the template leaves this turn out
                continue
            if mark in after:
                raise DataError("the chat template shows a reply twice, so its place is not certain", where=where)
            prompt_at = before.rfind(self._generation_prompt) if self._generation_prompt else -1
            # What follows the prompt is the reply's: an empty thought here may be a full one in the text.
            texts.append(before if prompt_at < 0 else before[: prompt_at + len(self._generation_prompt)])
            rest = after
        if not texts:
            raise DataError("the chat template leaves every reply out", where=where)
        return [*texts, rest]


def _with_marks_for_replies(chat: Chat) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The messages with a mark in the place of each reply; the marks, which are in no message."""
    marker = _MARKER
    # A string is looked at as it is: printing one with quotes and escapes takes longer than to find nothing in it.
    while any(marker in (v if isinstance(v, str) else str(v)) for m in chat.messages for kv in m.items() for v in kv):
        marker += "-"
    messages, marks = [], []
    for message in chat.messages:
        if message["role"] == "assistant":
            marks.append(f"{marker}{len(marks)}:")
            message = {"role": "assistant", "content": marks[-1]}
        messages.append(message)
    return messages, marks


def spans_between(text: str, between: Sequence[str], *, where: str) -> list[Span]:
    """What lies between known parts of a text: the first part begins it, the last one ends it.

    Raises:
        DataError: the parts are not in the text in this order, or may be in more than one way.
    """
    first, *middle, last = between
    tail = len(text) - len(last)
    if not text.startswith(first) or not text.endswith(last):
        raise _not_found(where)
    forward, position = [], len(first)
    for part in middle:
        position = text.find(part, position, tail)
        if position < 0:
            raise _not_found(where)
        forward.append(position)
        position += len(part)
    backward, position = [], tail
    for part in reversed(middle):
        position = text.rfind(part, len(first), position)
        backward.append(position)
    if forward != backward[::-1] or tail < len(first):
        raise DataError(
            "a message holds what the chat template writes between two turns, so replies cannot be told apart",
            where=where,
            way_out="leave this conversation out (--on-bad-sample skip), or clean its text",
        )
    starts = [len(first), *(p + len(part) for p, part in zip(forward, middle, strict=True))]
    return list(zip(starts, [*forward, tail], strict=True))


def tokens_over_bytes(ends: np.ndarray, spans: Sequence[Span], text: str) -> np.ndarray:
    """As tokens_in_spans, bool [tokens].

    Args:
        ends: of the tokens in the text, in bytes, int64 [tokens].
    """
    mask = np.zeros(len(ends), dtype=np.bool_)
    byte_of, characters, num_bytes = {}, 0, 0
    for border in sorted({border for span in spans for border in span}):
        num_bytes += len(text[characters:border].encode("utf-8"))
        byte_of[border] = num_bytes
        characters = border
    for start, end in spans:
        if start < end:
            first, last = np.searchsorted(ends, [byte_of[start], byte_of[end] - 1], side="right")
            mask[first : last + 1] = True
    return mask


def tokens_in_spans(encoding: Any, spans: Sequence[Span], *, num_tokens: int) -> np.ndarray:
    """Which tokens hold characters of one of the spans, bool [num_tokens].

    A token that begins before a span and reaches into it counts: it may be all there is of a short reply.

    Args:
        encoding: of the package tokenizers. It is asked about the ends of the spans alone: a list of the characters
            of all tokens takes a quarter of the time that tokenising does.
    """
    mask = np.zeros(num_tokens, dtype=np.bool_)
    for start, end in spans:
        # White space may be in no token.
        first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
        last = next((t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None), None)
        if first is None or last is None:
            continue
        while last + 1 < num_tokens and encoding.token_to_chars(last + 1)[0] < end:
            last += 1  # a character of several tokens
        mask[first : last + 1] = True
    return mask


def _not_found(where: str) -> DataError:
    return DataError(
        "the replies cannot be found in the text that the chat template makes",
        where=where,
        way_out="give a template with {% generation %} marks: --chat-template FILE",
    )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
