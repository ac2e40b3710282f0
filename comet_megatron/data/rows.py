"""One line of JSONL as a document: a text, or a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comet_megatron.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
ROW_FORMS = '"messages" (a list, or a JSON string of one), "prompt" and "response", or "text"'
_WAY_OUT = f"every line must be one JSON object in UTF-8 with {ROW_FORMS}"
_MESSAGE_FORM = '{"role": "user", "content": "..."}'


@dataclass(frozen=True)
class Document:
    """One text; its name says where it came from and decides whether it is held out."""

    name: str
    text: str


@dataclass(frozen=True)
class Chat:
    """One conversation, checked: known roles, texts for contents, an assistant's turn.

    Attributes:
        name: as a document's.
        messages: each with `role`, `content` and what else the row has for the chat template.
        tools: descriptions of tools for the chat template; None: the row has none.
        is_pair: it was given as prompt and response, so that it can do without a chat template.
    """

    name: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] | None = None
    is_pair: bool = False


def parse_row(line: bytes, *, name: str, where: str) -> Document | Chat:
    """The document of one line: its messages if it has them, else prompt and response, else text.

    Args:
        where: file and line, for messages.

    Raises:
        DataError: the line is not UTF-8 or not JSON, or has not what a document needs.
    """
    row = _json_of(line, what="the line", where=where)
    if not isinstance(row, dict):
        raise _bad(f"the line is a JSON {type(row).__name__}, not an object", where)
    if "messages" in row:
        return _chat_of(row, name=name, where=where)
    if "prompt" in row or "response" in row:
        for key in ("prompt", "response"):
            _check_text(row, key, where=where)
        messages = ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]})
        return Chat(name, messages, is_pair=True)
    _check_text(row, "text", where=where)
    return Document(name, row["text"])


def _chat_of(row: Mapping[str, Any], *, name: str, where: str) -> Chat:
    messages, tools = row["messages"], row.get("tools")
    if isinstance(messages, str):
        messages = _json_of(messages, what='the string in "messages"', where=where)
    if isinstance(tools, str):
        tools = _json_of(tools, what='the string in "tools"', where=where)
    if not isinstance(messages, list):
        raise _bad(f'"messages" is a {type(messages).__name__}, not a list', where)
    if not messages:
        raise _bad("the conversation is empty", where)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _bad('"tools" is not a list of objects', where)
    for number, message in enumerate(messages, start=1):
        _check_message(message, number, where)
    if not any(message["role"] == "assistant" for message in messages):
        raise _bad("the conversation has no turn of the assistant, so no token would carry loss", where)
    return Chat(name, tuple(messages), tuple(tools) if tools else None)


def _check_message(message: Any, number: int, where: str) -> None:
    if not isinstance(message, dict):
        raise _bad(f"message {number} is a {type(message).__name__}, not an object like {_MESSAGE_FORM}", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        found = f"the role {role!r}" if "role" in message else "no role"
        raise _bad(f"message {number} has {found}; known roles are {', '.join(ROLES)}", where)
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return
    if not isinstance(content, str):
        found = f'"content" is a {type(content).__name__}, not a text' if "content" in message else 'no "content"'
        raise _bad(f"message {number}: {found}", where)
    check_is_unicode(content, what=f"message {number}", where=where)


def _check_text(row: Mapping[str, Any], key: str, *, where: str) -> None:
    if not isinstance(text := row.get(key), str):
        found = f'"{key}" is a {type(text).__name__}' if key in row else f'no "{key}", only {sorted(row)[:8]}'
        raise _bad(f"the line has {found}", where)
    check_is_unicode(text, what="the text", where=where)


def check_is_unicode(text: str, *, what: str, where: str) -> None:
    """
    Raises:
        DataError: it holds half of a surrogate pair, as JSON may.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _bad(f"{what} is not Unicode: {error.reason} at {error.start}", where) from error


def _json_of(content: bytes | str, *, what: str, where: str) -> Any:
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of the decoding and of the JSON
        raise _bad(f"{what} is not JSON: {error}", where) from error


def _bad(what: str, where: str) -> DataError:
    return DataError(what, where=where, way_out=_WAY_OUT)
