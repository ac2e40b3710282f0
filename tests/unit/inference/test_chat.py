"""A chat feeds every turn once: the fed text is the expected concatenation, whatever the template does with history."""

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from comet_megatron.data.tokenizer import check_has_ids
from comet_megatron.errors import CheckpointError, ConfigError, DataError
from comet_megatron.hf.configuration_comet import CometConfig
from comet_megatron.hf.modeling_comet import CometForCausalLM
from comet_megatron.inference import CometChat, CometSession
from comet_megatron.inference.text import encode_text

TOKENIZER = Path(__file__).parents[3] / "tokenizers" / "python_stdlib_4k"
END = "<|endoftext|>"
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Drops the thinking of older replies, as Qwen3's does.
REWRITES = PLAIN.replace(
    "{{ m.content }}", "{{ m.content if m.role != 'assistant' or loop.last else m.content.split('</think>')[-1] }}"
)
HIDES = "{% for m in messages if m.role == 'user' %}[user]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["<|memory|>", "<beacon_0>", "<beacon_1>", "<beacon>"], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    first = tokenizer.convert_tokens_to_ids("<|memory|>")
    torch.manual_seed(0)
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
    )
    return CometForCausalLM(config).eval()


class Listener(CometSession):
    """A session that writes what it is told to, and keeps all ids in order."""

    def __init__(self, model, replies):
        super().__init__(model)
        self.heard, self.replies = [], iter(replies)

    def feed(self, ids, **options):
        self.heard += ids
        return super().feed(ids, **options)

    def generate(self, *args, **options):
        reply = next(self.replies)
        self.heard += reply
        self.last_id = reply[-1]
        return reply


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("template", [PLAIN.replace("[", " ["), PLAIN])
@pytest.mark.parametrize("first_ends_itself", [True, False])
def test_the_session_holds_the_conversation_as_one_rendered_text(tokenizer, model, template, first_ends_itself):
    first = ids_of(tokenizer, "x = 1" + END * first_ends_itself)
    session = Listener(model, [first, ids_of(tokenizer, "y")])
    chat = CometChat(session, tokenizer, chat_template=template, system="be brief")
    assert chat.say("def f():") == "x = 1"
    assert chat.say("more") == "y"
    open_ = "[assistant]" if template == PLAIN else " [assistant]"
    user, system = open_.replace("assistant", "user"), open_.replace("assistant", "system")
    want = [
        *ids_of(tokenizer, f"{system}be brief{END}\n{user}def f():{END}\n{open_}"),
        *ids_of(tokenizer, "x = 1"),
        *ids_of(tokenizer, f"{END}\n{user}more{END}\n{open_}"),
        *ids_of(tokenizer, "y"),
    ]
    assert session.heard == want


def test_a_template_that_rewrites_history_changes_nothing_in_the_session(tokenizer, model):
    replies = [ids_of(tokenizer, text) for text in ("<think>so</think>a long reply", "another" + END, "last")]
    heard = []
    for template in (PLAIN, REWRITES):
        session = Listener(model, replies)
        chat = CometChat(session, tokenizer, chat_template=template)
        for turn in ("one", "two", "three"):
            chat.say(turn)
        heard.append(session.heard)
    assert heard[0] == heard[1]
    text = tokenizer.decode(heard[0])
    assert text == (
        f"[user]one{END}\n[assistant]<think>so</think>a long reply{END}\n[user]two{END}\n[assistant]another{END}\n"
        f"[user]three{END}\n[assistant]last"
    )


def test_control_the_rewriting_template_does_rewrite(tokenizer):
    messages = [{"role": r, "content": c} for r, c in (("user", "u"), ("assistant", "no</think>yes"), ("user", "v"))]
    rendered = [tokenizer.apply_chat_template(messages, chat_template=t, tokenize=False) for t in (PLAIN, REWRITES)]
    assert "no</think>yes" in rendered[0] and "no" not in rendered[1] and "yes" in rendered[1]


def test_a_first_token_of_the_tokenizer_comes_once(tokenizer, model):
    begins = AutoTokenizer.from_pretrained(TOKENIZER)
    begins.add_tokens(["<|memory|>", "<beacon_0>", "<beacon_1>", "<beacon>"], special_tokens=True)
    first = begins.eos_token_id
    begins.backend_tokenizer.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, first)])
    assert encode_text(begins, "x", model.config, add_special_tokens=True)[0] == first
    session = Listener(model, [ids_of(tokenizer, "a"), ids_of(tokenizer, "b")])
    chat = CometChat(session, begins, chat_template="{{ '<|endoftext|>' }}" + PLAIN.replace(END, ""))
    chat.say("one")
    chat.say("two")
    assert session.heard.count(first) == 1 and session.heard[0] == first


def test_turns_go_on_in_one_session_and_in_a_loaded_one(tokenizer, model, tmp_path):
    def talk(turns, session):
        chat = CometChat(session, tokenizer, chat_template=PLAIN)
        return [chat.say(turn, max_new_tokens=12) for turn in turns]

    session = CometSession(model)
    today = talk(["one", "two"], session)
    session.save(tmp_path / "s")
    chat = CometChat(session, tokenizer, chat_template=PLAIN)
    tomorrow = chat.say("three", max_new_tokens=12)
    whole = CometSession(model)
    assert talk(["one", "two", "three"], whole) == [*today, tomorrow]
    assert talk(["three"], CometSession.load(tmp_path / "s", model)) == [tomorrow]
    assert whole.tokens_fed == session.tokens_fed


def test_what_cannot_be_is_refused(tokenizer, model):
    with pytest.raises(ConfigError, match="no chat template\n  give one: --chat-template FILE"):
        CometChat(CometSession(model), tokenizer)
    begun = CometSession(model)
    begun.feed([1, 2])
    with pytest.raises(ConfigError, match="the session has begun"):
        CometChat(begun, tokenizer, chat_template=PLAIN, system="x")
    with pytest.raises(ConfigError, match="does not show the last reply"):
        CometChat(begun, tokenizer, chat_template=HIDES).say("x")
    with pytest.raises(ConfigError, match="cannot be rendered: .*no system"):
        CometChat(
            CometSession(model), tokenizer, chat_template="{{ raise_exception('no system turns') }}", system="x"
        ).say("x")
    with pytest.raises(DataError, match="holds <beacon_1>, a token of the model's memory"):
        CometChat(CometSession(model), tokenizer, chat_template=PLAIN).say("a <beacon_1> b")


def test_a_failed_turn_leaves_the_conversation_as_it_was(tokenizer, model):
    session = CometSession(model)
    chat = CometChat(session, tokenizer, chat_template=PLAIN)
    chat.say("one", max_new_tokens=4)
    fed = session.tokens_fed
    with pytest.raises(DataError):
        chat.say("<beacon>")
    assert session.tokens_fed == fed and chat.say("two", max_new_tokens=4) is not None


def test_options_that_do_not_fit_are_refused_before_the_turn_is_read(tokenizer, model):
    session = CometSession(model)
    chat = CometChat(session, tokenizer, chat_template=PLAIN)
    with pytest.raises(ConfigError, match="num_beams=2"):
        chat.say("one", num_beams=2)
    assert session.tokens_fed == 0
    again = CometChat(CometSession(model), tokenizer, chat_template=PLAIN)
    assert chat.say("one", max_new_tokens=6) == again.say("one", max_new_tokens=6)


@pytest.mark.parametrize("stops_after", [1, 2, 4, 7])
def test_a_turn_that_is_cut_while_read_or_written_is_ended_by_the_next_one(tokenizer, model, stops_after):
    session, asked = CometSession(model), []
    fed = []
    feed = session.feed
    session.feed = lambda ids, **options: fed.append(ids) or feed(ids, **options)
    chat = CometChat(session, tokenizer, chat_template=PLAIN)
    cut = chat.say("x = 1\n" * 8, max_new_tokens=10, should_stop=lambda: asked.append(1) or len(asked) >= stops_after)
    assert (session.tokens_generated == 0) == (cut == "") and session.tokens_generated < 10
    assert session.tokens_fed == min(16 * stops_after, len(fed[0])) and session.tokens_fed > 0
    chat.say("two", max_new_tokens=4)
    assert tokenizer.decode(fed[1]) == f"{END}\n[user]two{END}\n[assistant]"


def test_a_turn_that_breaks_off_in_the_middle_is_ended_by_the_next_one(tokenizer, model):
    def break_off(**options):
        raise KeyboardInterrupt

    session = Listener(model, [])
    session.generate = break_off
    chat = CometChat(session, tokenizer, chat_template=PLAIN)
    with pytest.raises(KeyboardInterrupt):
        chat.say("one")
    heard = len(session.heard)
    with pytest.raises(KeyboardInterrupt):
        chat.say("two")
    assert tokenizer.decode(session.heard[heard:]) == f"{END}\n[user]two{END}\n[assistant]"


def test_text_that_is_no_utf8_is_refused(tokenizer, model):
    for text, place in (("a\udcff", "character 2 is '\\\\udcff'"), ("\ud83d", "character 1")):
        with pytest.raises(DataError, match=f"the text is no UTF-8: {place}"):
            encode_text(tokenizer, text, model.config, add_special_tokens=False)
    assert encode_text(tokenizer, "\U0001f600", model.config, add_special_tokens=False)


def test_a_tokenizer_without_the_beacons_is_refused_by_their_ids(tokenizer, model):
    ids = model.config.memory_token_ids
    check_has_ids(tokenizer, ids, where="")
    check_has_ids(tokenizer, [5], where="")  # any entry of the vocabulary: some backbones reserve some
    plain = AutoTokenizer.from_pretrained(TOKENIZER)
    with pytest.raises(
        CheckpointError, match=r"lacks the beacon tokens: it has 4096 ids, and not 4096, .*, 4099 \(x\)"
    ):
        check_has_ids(plain, ids, where="x")
    with pytest.raises(CheckpointError, match=r"and not 4096, 4097, 4098, 4099, 4100, \.\.\. \(x\)"):
        check_has_ids(plain, range(4090, 4110), where="x")
    plain.add_tokens(["<|memory|>", "<beacon_0>"])
    with pytest.raises(CheckpointError, match="it has 4098 ids, and not 4098, 4099"):
        check_has_ids(plain, ids, where="")
    assert encode_text(tokenizer, "x <b", model.config, add_special_tokens=True) == ids_of(tokenizer, "x <b")
