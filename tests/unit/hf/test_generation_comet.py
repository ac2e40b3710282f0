"""`generate` as users of transformers know it: golden generations, batches, options, stops, pipeline, refusals."""

import copy
import json
import math
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessor, TextStreamer, pipeline

import comet_megatron.hf.modeling_comet as modeling
from comet_megatron.hf.configuration_comet import CometConfig
from comet_megatron.hf.generation_comet import DEFAULT_TOP_K, mark_seen, text_lengths
from comet_megatron.hf.modeling_comet import CometForCausalLM, plan_rows

REPOSITORY = Path(__file__).parents[3]
GOLDEN = REPOSITORY / "tests" / "golden"
PROMPTS = [
    ("caseA", "160"),
    ("caseA", "150"),
    ("caseA", "140"),
    ("caseA", "20"),
    ("caseA", "32"),
    ("caseC", "150"),
    ("caseC", "97"),
    ("caseC", "139"),
    ("caseC", "3"),
    ("caseG", "150"),
]
LOGITS_TOLERANCE = 1e-5  # absolute
LAYOUTS = ("training", "official")


@cache
def read_case(case):
    golden = json.loads((GOLDEN / case / "golden.json").read_text())
    model = CometForCausalLM(CometConfig.from_dict(golden["hf_config"]))
    model.load_state_dict(load_file(GOLDEN / case / "weights.safetensors"), strict=True)
    return golden, load_file(GOLDEN / case / "outputs.safetensors"), model.eval()


def build_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,  # large, so that the memory shows
        "chunk_size": 7,
        "placeholder_id": 80,
        "temp_beacon_id": 81,
        "global_beacon_ids": [82, 83],
        "temp_beacon_stride": 3,
        "temp_mem_budget": 4,
    }
    return CometForCausalLM(CometConfig(**{**sizes, **changes})).eval()


def random_text(tokens, batch=1, seed=1):
    return torch.randint(80, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def pad_left(rows, pad=79):
    """Rows of any lengths as ids and mask."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    return ids, mask


def source(seed=0):
    return torch.Generator().manual_seed(seed)


class TestGolden:
    def test_every_generation_of_the_authors_is_compared(self):
        assert sorted(PROMPTS) == sorted((c, n) for c in ("caseA", "caseC", "caseG") for n in read_case(c)[0]["gen"])

    @pytest.mark.parametrize(("case", "name"), PROMPTS)
    def test_the_official_layout_writes_the_authors_tokens_from_their_logits(self, case, name):
        golden, outputs, model = read_case(case)
        theirs = golden["gen"][name]
        at_text = [i for i, token in enumerate(theirs["output_with_beacons"]) if token != model.config.temp_beacon_id]
        want = [theirs["output_with_beacons"][i] for i in at_text]  # their list without beacons may lack the last one
        prompt, steps = torch.tensor([theirs["prompt_ids"]]), []
        hook = model.lm_head.register_forward_hook(lambda *call: steps.append(call[2][0].clone()))
        ids = model.generate(prompt, max_new_tokens=len(want), generation_layout="official", eos_token_id=None)
        hook.remove()
        new = ids[0, prompt.shape[1] :].tolist()
        assert new == want
        assert new[: len(theirs["output_without_beacons"])] == theirs["output_without_beacons"]
        error = (torch.stack(steps) - outputs[f"gen{name}/step_logits"][at_text]).abs().max()
        assert error < LOGITS_TOLERANCE

    def test_control_the_training_layout_writes_something_else(self):
        same = 0
        for case, name in PROMPTS:
            golden, _, model = read_case(case)
            want = golden["gen"][name]["output_without_beacons"]
            prompt = torch.tensor([golden["gen"][name]["prompt_ids"]])
            same += (
                model.generate(prompt, max_new_tokens=len(want), eos_token_id=None)[0, prompt.shape[1] :].tolist()
                == want
            )
        assert same <= 1  # the prompt of three tokens opens no chunk and has no slots: nearly the same layout

    @pytest.mark.parametrize("changed", ["phase", "ends_last_group"])
    def test_control_each_of_the_two_rules_of_the_official_layout_is_needed(self, changed, monkeypatch):
        neutral = {"phase": 0, "ends_last_group": True}[changed]
        monkeypatch.setattr(modeling, "plan_rows", lambda **sizes: plan_rows(**{**sizes, changed: neutral}))
        differ = 0
        for case, name in PROMPTS:
            golden, _, model = read_case(case)
            want = golden["gen"][name]["output_without_beacons"]
            prompt = torch.tensor([golden["gen"][name]["prompt_ids"]])
            ids = model.generate(prompt, max_new_tokens=len(want), generation_layout="official", eos_token_id=None)
            differ += ids[0, prompt.shape[1] :].tolist() != want
        assert differ >= 3

    def test_the_official_layout_opens_no_chunk_while_it_writes(self):
        model, opened = build_model(), []
        before = model.model.open_chunk
        model.model.open_chunk = lambda *memory: opened.append(1) or before(*memory)
        model.generate(random_text(5), max_new_tokens=40, generation_layout="official")
        assert len(opened) == 1
        model.generate(random_text(5), max_new_tokens=40)
        assert len(opened) == 2 + 44 // 7  # the 40th token is not read


class TestAttention:
    def test_one_row_gives_what_it_gives_among_others(self):
        model = build_model(num_attention_heads=8, num_key_value_heads=2)
        text = random_text(6)
        chunk = model.model.open_chunk()
        _, chunk = model.model.forward_chunk(text[:, :4], chunk, closes=False)
        one, _ = model.model.forward_chunk(text[:, 4:5], chunk, closes=False)
        many, _ = model.model.forward_chunk(text[:, 4:], chunk, closes=False)
        torch.testing.assert_close(one[:, 0], many[:, 0], atol=1e-5, rtol=0)


class TestBatches:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_row_of_a_left_padded_batch_is_what_it_is_alone(self, layout):
        model = build_model()
        rows = [random_text(n, seed=n)[0] for n in (1, 6, 7, 8, 13, 14, 22, 8)]  # at, before and after chunk borders
        ids, mask = pad_left(rows)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=15, generation_layout=layout)
        assert out.shape == (8, 37) and out[:, :22].equal(ids)
        for row, text in enumerate(rows):
            alone = model.generate(text[None], max_new_tokens=15, generation_layout=layout)
            assert out[row, 22:].equal(alone[0, len(text) :]), len(text)

    def test_control_pads_that_are_read_as_text_change_a_row(self):
        model = build_model()
        ids, mask = pad_left([random_text(9)[0], random_text(20, seed=2)[0]])
        with_mask = model.generate(ids, attention_mask=mask, max_new_tokens=15)
        without = model.generate(ids, max_new_tokens=15)
        assert with_mask[1].equal(without[1]) and not with_mask[0].equal(without[0])

    def test_rows_that_end_are_filled_up_while_others_go_on(self):
        model = build_model(pad_token_id=3)
        rows = [random_text(n, seed=n)[0] for n in (5, 12, 12)]
        ids, mask = pad_left(rows)
        free = model.generate(ids, attention_mask=mask, max_new_tokens=20)[:, 12:]
        end = int(free[0, 4])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=20, eos_token_id=[end, 95])[:, 12:]
        for want, got in zip(free.tolist(), out.tolist(), strict=True):
            kept = want[: want.index(end) + 1] if end in want else want
            assert got == (kept + [3] * 20)[: len(got)]

    def test_lengths_are_those_of_the_text(self):
        mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
        assert text_lengths(torch.zeros(2, 3, dtype=torch.long), mask).tolist() == [1, 3]

    @pytest.mark.parametrize(
        ("mask", "named"),
        [
            ([[1, 1, 0]], "pad at the left"),
            ([[1, 0, 1]], "pad at the left"),
            ([[0, 0, 0]], "a row without any text"),
            ([[1, 1]], "shape of input_ids"),
        ],
    )
    def test_other_padding_is_refused(self, mask, named):
        with pytest.raises(ValueError, match=named):
            build_model().generate(random_text(3), attention_mask=torch.tensor(mask), max_new_tokens=2)


class TestOptions:
    def test_max_new_tokens_counts_text_and_no_beacon_is_among_it(self):
        model = build_model(temp_beacon_stride=1)
        for layout in LAYOUTS:
            new = model.generate(random_text(10), max_new_tokens=30, generation_layout=layout)[0, 10:]
            assert len(new) == 30 and not torch.isin(new, torch.tensor(model.config.memory_token_ids)).any()

    def test_max_length_counts_the_prompt_and_yields_to_max_new_tokens(self):
        model, text = build_model(), random_text(10)
        assert model.generate(text, max_length=13).shape == (1, 13)
        assert model.generate(text, max_length=13, max_new_tokens=5).shape == (1, 15)
        assert model.generate(text).shape == (1, 30)  # transformers' 20
        model.generation_config.max_new_tokens = 4
        assert model.generate(text).shape == (1, 14) and model.generate(text, max_length=12).shape == (1, 12)
        with pytest.raises(ValueError, match="max_length=10 leaves no token after a prompt of 10"):
            model.generate(text, max_length=10)

    def test_defaults_come_from_the_generation_config_and_the_call_wins(self):
        model, text = build_model(), random_text(10)
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.5, top_k=20, top_p=0.9, max_new_tokens=25
        )
        drawn = model.generate(text, generator=source())
        named = build_model().generate(
            text, do_sample=True, temperature=1.5, top_k=20, top_p=0.9, max_new_tokens=25, generator=source()
        )
        greedy = build_model().generate(text, max_new_tokens=25)
        assert drawn.equal(named) and not drawn.equal(greedy)
        assert model.generate(text, do_sample=False).equal(greedy)
        assert model.generate(text, top_k=1, generator=source()).equal(greedy)
        other = model.generate(text, generation_config=GenerationConfig(max_new_tokens=3))
        assert other.equal(greedy[:, :13])

    def test_top_k_is_that_of_transformers_unless_given(self):
        model, text = build_model(initializer_range=0.02), random_text(4)  # nearly uniform over 92 ids
        options = {"max_new_tokens": 60, "do_sample": True}
        drawn = [
            model.generate(text, generator=source(), **options, **top_k) for top_k in ({}, {"top_k": 50}, {"top_k": 0})
        ]
        assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])
        assert DEFAULT_TOP_K == 50

    def test_repeated_ids_become_less_likely(self):
        model, text = build_model(), random_text(4)
        free = model.generate(text, max_new_tokens=30)
        kept = model.generate(text, max_new_tokens=30, repetition_penalty=1e6)
        assert len(set(kept[0].tolist())) == len(set(text[0].tolist())) + 30 > len(set(free[0].tolist()))
        assert mark_seen(torch.tensor([[7, 1, 1]]), torch.tensor([2]), 9).nonzero().tolist() == [[0, 1]]

    def test_processors_and_criteria_of_the_user_take_part(self):
        class OnlySeven(LogitsProcessor):
            def __call__(self, input_ids, scores):
                return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

        text = random_text(9, batch=2)
        out = build_model().generate(
            text,
            logits_processor=[OnlySeven()],
            stopping_criteria=[lambda ids, scores, **rest: torch.full((2,), ids.shape[1] == 13)],
            max_new_tokens=20,
        )
        assert out[:, 9:].tolist() == [[7] * 4] * 2

    def test_draws_are_the_same_from_the_same_generator_also_on_two_rows(self):
        model, (ids, mask) = build_model(), pad_left([random_text(9)[0], random_text(12)[0]])
        options = {"attention_mask": mask, "do_sample": True, "max_new_tokens": 20}
        first = model.generate(ids, generator=source(3), **options)
        assert first.equal(model.generate(ids, generator=source(3), **options))
        assert not first.equal(model.generate(ids, generator=source(4), **options))

    def test_ids_may_come_under_either_name_but_once(self):
        model, text = build_model(), random_text(5)
        want = model.generate(text, max_new_tokens=3)
        assert model.generate(input_ids=text, max_new_tokens=3).equal(want)
        assert model.generate(inputs=text, max_new_tokens=3).equal(want)
        for wrong in ({}, {"inputs": text, "input_ids": text}):
            with pytest.raises(ValueError, match="text ids once"):
                model.generate(**wrong, max_new_tokens=3)

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"num_beams": 4}, "num_beams=4"),
            ({"num_return_sequences": 2, "min_p": 0.1}, "num_return_sequences=2, min_p=0.1"),
            ({"past_key_values": (1,)}, "past_key_values"),
            ({"inputs_embeds": torch.ones(1, 2)}, "inputs_embeds"),
            ({"no_such_option": 1}, "no_such_option=1"),
            ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams=2"),
            ({"stop_strings": "x"}, "tokenizer"),
            ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
            ({"repetition_penalty": math.inf}, "repetition_penalty=inf"),
            ({"do_sample": True, "temperature": math.inf}, "temperature=inf must be a number from 1e-15 to 1e\\+15"),
            ({"do_sample": True, "temperature": math.nan}, "temperature=nan"),
            ({"do_sample": True, "temperature": 1e-45}, "temperature=1e-45"),
            ({"do_sample": True, "temperature": 0.0}, "temperature=0.0"),
            ({"do_sample": True, "temperature": [1]}, r"temperature=\[1\]"),
            ({"do_sample": True, "top_p": 2}, "top_p=2"),
            ({"do_sample": True, "top_k": -1}, "top_k=-1"),
            ({"do_sample": True, "top_k": 2.5}, "top_k=2.5"),
            ({"max_new_tokens": "5"}, "max_new_tokens='5' must be a whole number from 1"),
            ({"max_new_tokens": 10**20}, "max_new_tokens=1"),
            ({"max_length": 7.5}, "max_length=7.5"),
            ({"eos_token_id": "x"}, "eos_token_id='x' must be an id, several, or None"),
            ({"eos_token_id": [1.5]}, "eos_token_id"),
            ({"eos_token_id": 2**70}, "eos_token_id"),
            ({"pad_token_id": "x"}, "pad_token_id='x'"),
            ({"stop_strings": ["x", 5]}, "stop_strings=.* must be a string or a list of strings"),
            ({"generation_config": {"max_new_tokens": 3}}, "must be a GenerationConfig"),
            ({"generation_layout": "other"}, "generation_layout='other' must be one of training, official"),
        ],
    )
    def test_what_is_not_built_is_refused_by_name(self, options, named):
        with pytest.raises(ValueError, match=named):
            build_model().generate(random_text(5), **options)

    @pytest.mark.parametrize("extreme", [1e-15, 1e15])
    def test_the_most_extreme_factors_still_draw(self, extreme):
        for penalty in (1e-15, 1e15):
            options = {"do_sample": True, "temperature": extreme, "repetition_penalty": penalty, "top_k": 0}
            out = build_model().generate(random_text(5), max_new_tokens=9, **options)
            assert not torch.isin(out, torch.tensor([80, 81, 82, 83])).any()

    def test_options_may_be_tensors_of_one_number(self):
        model, text = build_model(), random_text(5)
        end = model.generate(text, max_new_tokens=4)[0, -1]
        options = {"max_new_tokens": torch.tensor(9), "eos_token_id": end[None]}
        assert model.generate(text, **options).equal(model.generate(text, max_new_tokens=9, eos_token_id=int(end)))

    def test_what_the_models_own_config_asks_for_and_is_not_built_is_ignored_with_one_warning(self, tmp_path):
        want = build_model().generate(random_text(5), max_new_tokens=9)
        build_model().save_pretrained(tmp_path)
        own = {"min_p": 0.25, "num_beams": 3, "max_new_tokens": 9, "suppress_tokens": [1]}
        (tmp_path / "generation_config.json").write_text(json.dumps(own))
        model = CometForCausalLM.from_pretrained(tmp_path).eval()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            for _ in range(3):
                assert model.generate(random_text(5)).equal(want)
        (message,) = [str(w.message) for w in warned if "generation config" in str(w.message)]
        assert message.startswith("the model's generation config asks for ") and message.endswith("support: ignored")
        for named in ("min_p=0.25", "num_beams=3", "suppress_tokens=[1]"):
            assert named in message

    def test_what_the_call_gives_is_refused_also_where_the_models_own_config_asks_for_it(self):
        model = build_model()
        model.generation_config = GenerationConfig(min_p=0.25)
        copied = copy.deepcopy(model.generation_config)  # as a pipeline passes it
        copied.max_new_tokens = 3
        with pytest.warns(UserWarning, match="min_p=0.25"):
            assert model.generate(random_text(5), generation_config=copied).shape == (1, 8)
        for given in ({"min_p": 0.25}, {"generation_config": GenerationConfig(min_p=0.5)}):
            with pytest.raises(ValueError, match="does not support min_p=0"):
                model.generate(random_text(5), **given)

    def test_neutral_values_of_what_is_not_built_pass(self):
        model, text = build_model(), random_text(5)
        neutral = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "min_p": None, "output_scores": False}
        assert model.generate(text, token_type_ids=torch.zeros_like(text), **neutral).equal(model.generate(text))

    def test_beacons_in_the_prompt_are_refused(self):
        with pytest.raises(ValueError, match="holds 81, a beacon"):
            build_model().generate(torch.tensor([[1, 81, 2]]), max_new_tokens=2)
        ids, mask = torch.tensor([[81, 1, 2]]), torch.tensor([[0, 1, 1]])  # as a pad it is none
        assert build_model().generate(ids, attention_mask=mask, max_new_tokens=2).shape == (1, 5)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "tokenizers" / "python_stdlib_4k")
    tokenizer.add_tokens(["<|memory|>", "<beacon_0>", "<beacon_1>", "<beacon>"], special_tokens=True)
    return tokenizer


def build_model_for(tokenizer, **changes):
    first = tokenizer.convert_tokens_to_ids("<|memory|>")
    ids = {"placeholder_id": first, "global_beacon_ids": [first + 1, first + 2], "temp_beacon_id": first + 3}
    return build_model(vocab_size=4352, **ids, **changes)


class TestWithATokenizer:
    def test_a_stop_string_ends_a_text_where_it_is_complete(self, tokenizer):
        model = build_model_for(tokenizer)
        ids = tokenizer("def main(", return_tensors="pt").input_ids
        free = model.generate(ids, max_new_tokens=20)[0, ids.shape[1] :].tolist()
        text = tokenizer.decode(free[:8])
        stop = text[-3:]
        if stop in tokenizer.decode(free[:7]):
            pytest.fail("the stop string comes earlier; choose another seed")
        out = model.generate(ids, max_new_tokens=20, stop_strings=[stop, "never seen"], tokenizer=tokenizer)
        assert out[0, ids.shape[1] :].tolist() == free[:8]

    def test_a_text_streamer_prints_the_text_without_any_beacon(self, tokenizer, capsys):
        model = build_model_for(tokenizer)
        ids = tokenizer("for x in y:", return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=25, streamer=TextStreamer(tokenizer))
        printed = capsys.readouterr().out
        assert printed.rstrip("\n") == tokenizer.decode(out[0]).rstrip("\n")
        assert "beacon" not in printed and "|memory|" not in printed

    def test_transformers_pipeline_writes_what_generate_writes(self, tokenizer):
        model = build_model_for(tokenizer, pad_token_id=tokenizer.pad_token_id)
        tokenizer.padding_side = "left"
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        prompts = ["def main(", "for line in file:\n    print(line)\n" * 3]
        want = []
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            want.append(tokenizer.decode(model.generate(ids, max_new_tokens=12)[0], skip_special_tokens=True))
        alone = write(prompts, max_new_tokens=12, do_sample=False)
        model.generation_config.min_p = 0.25  # of a backbone's own generation config
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        batched = write(prompts, max_new_tokens=12, do_sample=False, batch_size=2)
        assert [one["generated_text"] for (one,) in alone] == want
        assert [one["generated_text"] for (one,) in batched] == want
