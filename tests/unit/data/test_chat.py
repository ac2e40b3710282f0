"""Chats: golden ids and masks for templates in use, and every bad row refused by file and line."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from comet_megatron.data.chat import ChatEncoder, spans_between, tokens_in_spans
from comet_megatron.data.rows import Chat, Document, parse_row
from comet_megatron.errors import ConfigError, DataError
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

HERE = "rows.jsonl:7"

# Qwen3's, without the part that describes tools.
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not\
(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n')\
.split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n')\
 + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

# Llama 3's, whole.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# With marks, as TRL writes them; the end token is inside.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)

# Like Llama 2's and Mistral's: no generation prompt, a space before the end token.
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def word_tokenizer(words: list[str], specials: list[str], template: str | None, **named: str) -> Any:
    """Every word, space and run of line breaks is a token; its id is its place in specials + words."""
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(specials + words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+| |[^\s]+"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.add_special_tokens({"additional_special_tokens": specials})
    fast.chat_template = template
    return fast


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*messages: dict[str, Any], **more: Any) -> Chat:
    return Chat("rows.jsonl:7", messages, **more)


def encoded(tokenizer: Any, *messages: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The ids, and those of them that carry loss with 0 for the others."""
    ids, mask = ChatEncoder(tokenizer).encode(chat(*messages), where=HERE)
    assert ids.dtype == np.int32 and mask.dtype == np.bool_ and ids.shape == mask.shape
    return list(ids), list(np.where(mask, ids, 0))


@pytest.fixture(scope="module")
def qwen3() -> Any:
    specials = ["<none>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
    specials += ["<tool_response>", "</tool_response>"]  # to id 8
    words = ["\n", "\n\n", " ", "system", "user", "assistant", "Be", "kind", "Hi", "Hello", "And", "now?", "Hm", "Bye"]
    words += ['{"name":', '"f",', '"arguments":', "{}}", "42", "<unk>"]  # 9 to 28
    return word_tokenizer(words, specials, QWEN3, eos_token="<|im_end|>", unk_token="<unk>")


def test_qwen3_many_turns(qwen3: Any) -> None:
    messages = [turn("system", "Be kind"), turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "And now?")]
    ids, labels = encoded(qwen3, *messages, turn("assistant", "Bye"))
    # <|im_start|>system\nBe kind<|im_end|>\n
    expected = [1, 12, 9, 15, 11, 16, 2, 9]
    # <|im_start|>user\nHi<|im_end|>\n                and the reply, with its end: Hello<|im_end|>
    expected += [1, 13, 9, 17, 2, 9, 1, 14, 9] + [18, 2] + [9]
    # <|im_start|>user\nAnd now?<|im_end|>\n          <think>\n\n</think>\n\nBye<|im_end|>
    expected += [1, 13, 9, 19, 11, 20, 2, 9, 1, 14, 9] + [3, 10, 4, 10, 22, 2] + [9]
    assert ids == expected
    assert labels == [0] * 8 + [0] * 9 + [18, 2] + [0] + [0] * 11 + [3, 10, 4, 10, 22, 2] + [0]


def test_qwen3_drops_the_thinking_of_older_turns_and_what_is_left_carries_loss(qwen3: Any) -> None:
    first = turn("assistant", "<think>\nHm\n</think>\n\nHello")
    ids, labels = encoded(qwen3, turn("user", "Hi"), first, turn("user", "Hi"), turn("assistant", "Hello"))
    expected = [1, 13, 9, 17, 2, 9, 1, 14, 9, 18, 2, 9]
    assert ids == expected + [1, 13, 9, 17, 2, 9, 1, 14, 9, 3, 10, 4, 10, 18, 2, 9]
    assert labels == [0] * 9 + [18, 2, 0] + [0] * 9 + [3, 10, 4, 10, 18, 2, 0]
    ids, labels = encoded(qwen3, turn("user", "Hi"), first)
    # <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n  <think>\nHm\n</think>\n\nHello<|im_end|>
    assert ids == [1, 13, 9, 17, 2, 9, 1, 14, 9] + [3, 9, 21, 9, 4, 10, 18, 2] + [9]
    assert labels == [0] * 9 + [3, 9, 21, 9, 4, 10, 18, 2] + [0]
    thought_apart = turn("assistant", "Hello", reasoning_content="Hm")
    assert encoded(qwen3, turn("user", "Hi"), thought_apart) == (ids, labels)


def test_qwen3_a_call_of_a_tool_carries_loss_and_its_answer_does_not(qwen3: Any) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    ids, labels = encoded(qwen3, turn("user", "Hi"), call, turn("tool", "42"), turn("assistant", "Hello"))
    # <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>
    called = [5, 9, 23, 11, 24, 11, 25, 11, 26, 9, 6, 2]
    # \n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n
    answered = [9, 1, 13, 9, 7, 9, 27, 9, 8, 2, 9, 1, 14, 9]
    replied = [3, 10, 4, 10, 18, 2]
    assert ids == [1, 13, 9, 17, 2, 9, 1, 14, 9] + called + answered + replied + [9]
    assert labels == [0] * 9 + called + [0] * 14 + replied + [0]


@pytest.fixture(scope="module")
def llama3() -> Any:
    specials = ["<none>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    words = [
        "\n\n",
        " ",
        "system",
        "user",
        "assistant",
        "Be",
        "kind",
        "Hi",
        "Hello",
        "there",
        "Bye",
        "<unk>",
    ]  # 5 to 16
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "unk_token": "<unk>"}
    fast = word_tokenizer(words, specials, LLAMA3, **names)
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)]
    )
    return fast


def test_llama3_many_turns_with_one_begin_of_text(llama3: Any) -> None:
    assert llama3("Hi")["input_ids"] == [1, 12], "asked plainly, this tokenizer adds one"
    messages = [turn("system", "Be kind"), turn("user", " Hi\n"), turn("assistant", "\nHello there ")]
    ids, labels = encoded(llama3, *messages, turn("user", "Hi"), turn("assistant", "Bye"))
    # <|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>
    expected = [1, 2, 7, 3, 5, 10, 6, 11, 4]
    # the user's turn, trimmed; the assistant's header; Hello there<|eot_id|>
    expected += [2, 8, 3, 5, 12, 4] + [2, 9, 3, 5] + [13, 6, 14, 4]
    expected += [2, 8, 3, 5, 12, 4] + [2, 9, 3, 5] + [15, 4]
    assert ids == expected
    assert labels == [0] * 9 + [0] * 10 + [13, 6, 14, 4] + [0] * 10 + [15, 4]


def test_marks_of_a_template_say_what_carries_loss() -> None:
    specials, words = ["<none>", "<|im_start|>", "<|im_end|>"], ["\n", "user", "assistant", "Hi", "Hello", "<unk>"]
    marked = word_tokenizer(words, specials, MARKED, eos_token="<|im_end|>", unk_token="<unk>")
    ids, labels = encoded(marked, turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Hi"))
    assert ids == [1, 4, 3, 6, 2, 3] + [1, 5, 3, 7, 2, 3] + [1, 4, 3, 6, 2, 3]
    assert labels == [0] * 6 + [0, 0, 0, 7, 2, 0] + [0] * 6
    with_null = {**turn("assistant", "Hello"), "tool_calls": None}  # as if the key were not there
    assert encoded(marked, turn("user", "Hi"), with_null, turn("user", "Hi")) == (ids, labels)


def test_a_template_without_a_generation_prompt() -> None:
    specials, words = ["<none>", "<s>", "</s>"], [" ", "[INST]", "[/INST]", "Hi", "Hello", "<unk>"]
    inst = word_tokenizer(words, specials, INST, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    twice = [turn("user", "Hi"), turn("assistant", "Hello")] * 2
    ids, labels = encoded(inst, *twice)
    # [INST] Hi [/INST]  and  _Hello_</s>: the spaces belong to the reply, which the model has to write
    assert ids == [1] + [4, 3, 6, 3, 5, 3, 7, 3, 2] * 2
    after = [0] * 5 + [0, 7, 3, 2]
    assert labels == [0] + after * 2
    with pytest.raises(DataError, match="refuses the conversation: Only user and assistant") as caught:
        encoded(inst, turn("system", "Hi"), *twice)
    assert caught.value.where == HERE


def test_a_pair_without_a_template_is_prompt_response_and_end(tokenizer: Any) -> None:
    row = parse_row(b'{"prompt": "def f", "response": "(x): pass"}', name="n", where=HERE)
    ids, mask = ChatEncoder(tokenizer).encode(row, where=HERE)
    assert tokenizer.decode(ids) == "def f(x): pass<|endoftext|>"
    assert tokenizer.decode(ids[mask]) == "(x): pass<|endoftext|>" and mask[-1] and not mask[0]
    with pytest.raises(ConfigError, match="no chat template"):
        ChatEncoder(tokenizer).encode(chat(turn("assistant", "a")), where=HERE)


def test_a_pair_and_messages_as_a_string_are_the_same_chat(qwen3: Any) -> None:
    messages = [turn("user", "Hi"), turn("assistant", "Hello")]
    rows = [
        {"prompt": "Hi", "response": "Hello"},
        {"messages": messages},
        {"uniq_id": "7", "messages": json.dumps(messages)},
    ]
    found = []
    for row in rows:
        parsed = parse_row(json.dumps(row).encode(), name="n", where=HERE)
        ids, mask = ChatEncoder(qwen3).encode(parsed, where=HERE)
        found.append((list(ids), list(mask)))
    assert found[0] == found[1] == found[2]


def test_replies_that_cannot_be_told_apart_are_refused(qwen3: Any) -> None:
    forged = "Hello<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nBye"
    messages = [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Hi"), turn("assistant", forged)]
    with pytest.raises(DataError, match="cannot be told apart"):
        encoded(qwen3, *messages)


def test_a_chat_that_holds_the_marker_itself_is_read_as_any_other(qwen3: Any) -> None:
    ids, labels = encoded(qwen3, turn("user", "the-reply-is-here0:"), turn("assistant", "Hello"))
    assert labels[-3:] == [18, 2, 0] and not any(labels[:9])


def test_a_template_that_shows_other_text_for_other_replies_is_refused() -> None:
    counting = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] | length | string + ' ' }}{% endfor %}"
    fast = word_tokenizer(["user", "assistant", " ", "<unk>"], ["<none>"], counting, unk_token="<unk>")
    with pytest.raises(DataError, match="leaves every reply out"):
        encoded(fast, turn("user", "Hi"), turn("assistant", "Hello"))
    fast.chat_template = "{{ messages[1]['content'] | length }} {{ messages[1]['content'] }}"
    with pytest.raises(DataError, match="cannot be found"):
        encoded(fast, turn("user", "Hi"), turn("assistant", "Hello"))


def test_an_empty_reply_still_teaches_to_end_and_one_without_an_end_is_refused(qwen3: Any) -> None:
    assert encoded(qwen3, turn("user", "Hi"), turn("assistant", ""))[1][-6:] == [3, 10, 4, 10, 2, 0]
    fast = word_tokenizer(["Hi", "<unk>"], ["<none>"], "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(DataError, match="no token of the chat carries loss"):
        encoded(fast, turn("user", "Hi"), turn("assistant", ""))


@settings(deadline=None)
@given(
    replies=st.lists(st.text("ab \n", max_size=6), min_size=1, max_size=5),
    turns=st.lists(st.sampled_from(["|", "|x|", "|xx|", "[y]"]), min_size=6, max_size=6),
)
def test_spans_between_known_parts_are_the_replies(replies: list[str], turns: list[str]) -> None:
    between = turns[: len(replies) + 1]
    text = between[0] + "".join(r + part for r, part in zip(replies, between[1:], strict=True))
    spans = spans_between(text, between, where="")
    assert [text[start:end] for start, end in spans] == replies


class Offsets:
    """What tokenizers.Encoding says of the characters of its tokens."""

    def __init__(self, *offsets: tuple[int, int]) -> None:
        self.offsets = offsets

    def char_to_token(self, character: int) -> int | None:
        return next((n for n, (start, end) in enumerate(self.offsets) if start <= character < end), None)

    def token_to_chars(self, token: int) -> tuple[int, int]:
        return self.offsets[token]


def test_trimmed_white_space_before_a_reply_carries_no_loss_and_all_tokens_of_a_character_do() -> None:
    found = Offsets((0, 4), (5, 5), (5, 8), (8, 8), (9, 12), (12, 13))  # a space is in no token, or in an empty one
    assert list(tokens_in_spans(found, [(4, 12)], num_tokens=6)) == [False, False, True, True, True, False]
    assert not tokens_in_spans(found, [(5, 5), (4, 5)], num_tokens=6).any()
    emoji = Offsets((0, 1), (1, 2), (1, 2), (1, 2), (2, 3))
    assert list(tokens_in_spans(emoji, [(1, 2)], num_tokens=5)) == [False, True, True, True, False]


def test_a_token_of_the_last_of_the_header_and_the_first_of_the_reply_carries_loss(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    ids, labels = encoded(tokenizer, turn("user", "x"), turn("assistant", "b"))
    assert tokenizer.decode([i for i in labels if i]) == " b<|endoftext|>"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{broken", "not JSON"),
        ("[1]", "is a JSON list"),
        ('{"other": 1}', "no \"text\", only \\['other'\\]"),
        ('{"text": null}', '"text" is a NoneType'),
        ('{"prompt": "a"}', 'no "response"'),
        ('{"prompt": "a", "response": ["b"]}', '"response" is a list'),
        ('{"messages": 5}', '"messages" is a int'),
        ('{"messages": []}', "conversation is empty"),
        ('{"messages": "[]"}', "conversation is empty"),
        ('{"messages": "[{"}', 'string in "messages" is not JSON'),
        ('{"messages": ["hi"]}', "message 1 is a str"),
        ('{"messages": [{"content": "a"}]}', "message 1 has no role"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', "the role 'usr'; known roles are system, user"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "the role"),
        ('{"messages": [{"role": "user"}]}', 'message 1: no "content"'),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', '"content" is a list'),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no turn of the assistant"),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "message 1 is not Unicode"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": "x"}', '"tools" is not JSON'),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": ["x"]}', "not a list of objects"),
        ('{"messages": ' + "[" * 100_000, "not JSON"),
        ('{"text": ' + "1" * 5000 + "}", "not JSON"),
        ('{"text": "\udcff"}', "not JSON"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(row: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        parse_row(row.encode("utf-8", "surrogateescape"), name="n", where=HERE)
    assert caught.value.where == HERE and "messages" in caught.value.way_out


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=8,
)
ROWS = st.dictionaries(st.sampled_from(["messages", "prompt", "response", "text", "tools"]), JSON_VALUES)


@settings(deadline=None)
@given(st.binary(max_size=60) | ROWS.map(lambda row: json.dumps(row).encode()) | st.text().map(str.encode))
def test_whatever_a_line_holds_it_is_a_document_or_an_error_with_its_place(line: bytes) -> None:
    try:
        found = parse_row(line, name="n", where=HERE)
    except DataError as error:
        assert error.where == HERE
    else:
        assert isinstance(found, (Document, Chat))


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "assistant", "tool"]),
            "content": st.text(st.sampled_from(list("ab\n <|>")), max_size=8)
            | st.sampled_from(["<|im_end|>\n", "<think>", "</think>", "<|im_end|>\n<|im_start|>user\n"]),
        }
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(messages=MESSAGES)
def test_whatever_is_said_each_label_is_of_a_reply_or_the_chat_is_refused(qwen3: Any, messages: list[dict]) -> None:
    row = json.dumps({"messages": messages}).encode()
    try:
        ids, mask = ChatEncoder(qwen3).encode(parse_row(row, name="n", where=HERE), where=HERE)
    except DataError as error:
        assert error.where == HERE
        return
    assert mask.any() and len(ids) == len(mask)
    begins = np.flatnonzero(mask & ~np.r_[False, mask[:-1]])
    for begin in begins:  # <|im_start|>assistant and a line break stand before each reply, or break and reply are one
        assert 14 in ids[begin - 2 : begin]
