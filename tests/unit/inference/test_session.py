"""A session: pieces equal the whole, constant memory, tomorrow equals today, refusals; golden generations."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from comet_megatron.errors import CheckpointError, ConfigError, DataError, OutputError
from comet_megatron.hf.configuration_comet import CometConfig
from comet_megatron.hf.modeling_comet import CometForCausalLM
from comet_megatron.inference import CometSession, session_file

GOLDEN = Path(__file__).parents[2] / "golden"
SWITCHES = {
    "both": {},
    "global": {"temp_beacon_stride": -1},
    "temporary": {"global_beacon_ids": []},
    "neither": {"temp_beacon_stride": -1, "global_beacon_ids": []},
}
LAYOUTS = ("training", "official")


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


def random_text(tokens, seed=1):
    return torch.randint(80, (tokens,), generator=torch.Generator().manual_seed(seed))


@cache
def read_case(case):
    golden = json.loads((GOLDEN / case / "golden.json").read_text())
    model = CometForCausalLM(CometConfig.from_dict(golden["hf_config"]))
    model.load_state_dict(load_file(GOLDEN / case / "weights.safetensors"), strict=True)
    return golden, model.eval()


def split(text, sizes):
    """Pieces of the given sizes, again and again, until the text is used up."""
    pieces, at, turn = [], 0, 0
    while at < len(text):
        pieces.append(text[at : at + sizes[turn % len(sizes)]])
        at, turn = at + len(pieces[-1]), turn + 1
    return pieces


class TestFeed:
    @pytest.mark.parametrize("case", ["caseA", "caseC", "caseG"])
    def test_the_official_layout_writes_the_authors_tokens_from_pieces(self, case):
        golden, model = read_case(case)
        for theirs in golden["gen"].values():
            session = CometSession(model, generation_layout="official")
            for piece in split(theirs["prompt_ids"], [1, 31, 5, 40]):
                session.feed(piece)
            want = theirs["output_without_beacons"]
            assert session.generate(len(want) // 2, eos_token_id=None) == want[: len(want) // 2]
            rest = len(want) - len(want) // 2  # the pending token goes on by the rules of writing
            assert session.generate(rest, eos_token_id=None) == want[len(want) // 2 :]

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("switch", SWITCHES)
    def test_pieces_of_any_sizes_give_the_logits_and_the_tokens_of_the_whole(self, switch, layout):
        model = build_model(**SWITCHES[switch], initializer_range=0.1)  # more would amplify rounding beyond 1e-5
        text = random_text(45)
        whole = CometSession(model, generation_layout=layout)
        want = whole.feed(text, return_logits=True)
        if layout == "training":
            torch.testing.assert_close(want, model(text[None]).logits[0], atol=1e-5, rtol=0)
        new = whole.generate(20)

        @settings(max_examples=12, deadline=None, derandomize=True)
        @given(st.lists(st.integers(1, 17), min_size=1, max_size=6))
        def pieces_are_the_whole(sizes):
            session = CometSession(model, generation_layout=layout)
            logits = [session.feed(piece, return_logits=True) for piece in split(text, sizes)]
            torch.testing.assert_close(torch.cat(logits), want, atol=1e-5, rtol=0)
            assert session.generate(20) == new

        pieces_are_the_whole()

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("case", ["caseA", "caseC", "caseG"])
    def test_pieces_give_the_logits_of_the_whole_on_the_golden_models(self, case, layout):
        _, model = read_case(case)
        text = torch.randint(300, (150,), generator=torch.Generator().manual_seed(1))
        want = CometSession(model, generation_layout=layout).feed(text, return_logits=True)
        for sizes in ([1, 5, 40, 2], [33], [7, 64]):
            session = CometSession(model, generation_layout=layout)
            logits = [session.feed(piece, return_logits=True) for piece in split(text, sizes)]
            torch.testing.assert_close(torch.cat(logits), want, atol=1e-5, rtol=0)

    def test_control_beacons_that_every_other_piece_forgets_are_seen(self):
        model, text = build_model(initializer_range=0.1), random_text(30)
        want = CometSession(model).feed(text, return_logits=True)
        stride = model.config.temp_beacon_stride
        session, logits = CometSession(model), []
        for piece in split(text, [5]):
            model.config.temp_beacon_stride = stride if len(logits) % 2 else -1
            logits.append(session.feed(piece, return_logits=True))
        assert (torch.cat(logits) - want).abs().max() > 1e-2

    def test_generated_text_that_is_followed_by_more_equals_all_of_it_fed(self):
        model, session = build_model(), CometSession(build_model())
        first, second = random_text(11), random_text(12, seed=2)
        session.feed(first)
        new = session.generate(9)
        logits = session.feed(second, return_logits=True)
        everything = torch.cat([first, torch.tensor(new), second])
        torch.testing.assert_close(logits, model(everything[None]).logits[0, -12:], atol=1e-5, rtol=0)
        assert (session.tokens_fed, session.tokens_generated, session.last_id) == (23, 9, int(second[-1]))

    def test_it_writes_what_the_models_generate_writes(self):
        model, text = build_model(), random_text(30)
        for layout in LAYOUTS:
            session = CometSession(model, generation_layout=layout)
            session.feed(text)
            want = model.generate(text[None], max_new_tokens=25, generation_layout=layout)[0, 30:].tolist()
            assert session.generate(10) + session.generate(15) == want

    def test_the_head_runs_for_generated_tokens_alone(self):
        model, rows = build_model(), []
        model.lm_head.register_forward_hook(lambda *call: rows.append(call[2].shape[:-1].numel()))
        session = CometSession(model)
        session.feed(random_text(50))
        assert rows == []
        session.generate(3)
        assert rows == [1, 1, 1]

    def test_progress_is_told_after_every_chunk(self):
        told = []
        CometSession(build_model()).feed(random_text(17), on_progress=lambda *at: told.append(at))
        assert told == [(7, 17), (14, 17), (17, 17)]

    @pytest.mark.parametrize("switch", SWITCHES)
    def test_the_state_has_a_bound_whatever_is_fed_and_generated(self, switch):
        model = build_model(**SWITCHES[switch])
        session, sizes = CometSession(model), []
        for turn in range(40):
            session.feed(random_text(1 + turn % 9, seed=turn))
            sizes.append(session.state_bytes)
            session.generate(1 + turn % 5, eos_token_id=None)
            sizes.append(session.state_bytes)
        assert session.tokens_fed > 100 and session.tokens_generated > 100
        assert max(sizes[20:]) <= max(sizes[:20])  # every filling of the chunk was there early
        config = model.config
        slots = len(config.global_beacon_ids) + (4 if config.temp_beacon_stride > 0 else 0)
        beacons = 2 if config.temp_beacon_stride > 0 else 0  # after 3 and 6 of 7 text tokens
        floats = 2 * ((slots + 7 + beacons) * 2 * 2 * 8 + (slots + beacons) * 32) + 32
        beside = 96 + torch.Generator().get_state().nbytes + 8  # ids seen, generator, pending id
        assert max(sizes) <= 4 * floats + beside

    def test_control_the_official_layout_grows_with_what_is_generated(self):
        session = CometSession(build_model(), generation_layout="official")
        session.feed(random_text(9))
        session.generate(10)
        size = session.state_bytes
        session.generate(30)
        assert session.state_bytes > 2 * size - 10_000

    def test_text_after_an_overfull_official_chunk_opens_a_new_one(self):
        session = CometSession(build_model(), generation_layout="official")
        session.feed(random_text(5))
        session.generate(30)
        logits = session.feed(random_text(9, seed=3), return_logits=True)
        assert logits.shape == (9, 96) and logits.isfinite().all()
        assert session._text.chunk.text_tokens == 2

    def test_a_reset_session_is_a_new_one(self):
        session = CometSession(build_model())
        session.feed(random_text(20))
        want = session.generate(8)
        session.reset()
        assert session.tokens_fed == session.tokens_generated == 0
        with pytest.raises(DataError, match="no text to continue"):
            session.generate(1)
        session.feed(random_text(20))
        assert session.generate(8) == want


class TestGenerate:
    def test_it_ends_after_an_end_id_which_stays_pending(self):
        model, text = build_model(), random_text(20)
        session = CometSession(model)
        session.feed(text)
        free = session.generate(12)
        again = CometSession(model)
        again.feed(text)
        assert again.generate(12, eos_token_id=[95, free[5]]) == free[: free.index(free[5]) + 1]
        rest = again.generate(12 - free.index(free[5]) - 1)
        assert rest == free[free.index(free[5]) + 1 :]

    def test_sampling_follows_the_seed(self):
        def draw(seed):
            session = CometSession(build_model(), seed=seed)
            session.feed(random_text(20))
            return session.generate(20, do_sample=True, temperature=1.3, top_k=0)

        assert draw(1) == draw(1) != draw(2)

    def test_a_streamer_receives_every_token(self):
        class Recorder:
            received, ended = [], False

            def put(self, value):
                self.received.append(value.tolist())

            def end(self):
                self.ended = True

        session, recorder = CometSession(build_model()), Recorder()
        session.feed(random_text(10))
        new = session.generate(5, streamer=recorder)
        assert recorder.received == [[[]], *([token] for token in new)] and recorder.ended

    def test_a_repetition_penalty_sees_all_that_was_fed_and_generated(self):
        model, text = build_model(), random_text(30)
        session = CometSession(model)
        session.feed(text[:10])
        session.feed(text[10:])
        new = session.generate(10, repetition_penalty=1e6) + session.generate(10, repetition_penalty=1e6)
        assert new == model.generate(text[None], max_new_tokens=20, repetition_penalty=1e6)[0, 30:].tolist()
        assert len({*new, *text.tolist()}) == 20 + len(set(text.tolist()))

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens=0"),
            ({"max_new_tokens": 3, "num_beams": 2}, "num_beams=2"),
            ({"max_new_tokens": 3, "top_p": 0.5}, "do_sample=True"),
            ({"max_new_tokens": "5"}, "max_new_tokens='5' must be a whole number from 1"),
            ({"max_new_tokens": 3, "eos_token_id": "x"}, "eos_token_id='x' must be an id, several, or None"),
            ({"do_sample": True, "temperature": math.inf}, "temperature=inf"),
        ],
    )
    def test_options_that_do_not_fit_are_a_configuration_error_before_anything_is_fed_too(self, options, named):
        session = CometSession(build_model())
        with pytest.raises(ConfigError, match=named):
            session.check_options(**options)
        session.feed(random_text(5))
        with pytest.raises(ConfigError, match=named):
            session.generate(**options)
        assert session.tokens_generated == 0

    def test_checked_options_change_nothing(self):
        sessions = [CometSession(build_model(), seed=1), CometSession(build_model(), seed=1)]
        options = {"do_sample": True, "generation_config": GenerationConfig(temperature=1.3)}
        sessions[0].check_options(9, **options)
        for session in sessions:
            session.feed(random_text(9))
        assert sessions[0].generate(9, **options) == sessions[1].generate(9, **options)

    @pytest.mark.parametrize("seed", [2**70, "x", 1.5])
    def test_a_seed_that_is_none_is_refused(self, seed):
        with pytest.raises(ConfigError, match=f"seed={seed!r} is none"):
            CometSession(build_model(), seed=seed)

    def test_it_stops_where_it_is_told_to_and_goes_on_from_there(self):
        model, text = build_model(), random_text(30)
        whole, session, asked = CometSession(model), CometSession(model), []

        def every_third():
            asked.append(1)
            return len(asked) % 3 == 0

        assert session.feed(text, return_logits=True, should_stop=every_third).shape[0] == 21 == session.tokens_fed
        session.feed(text[21:], should_stop=lambda: False)
        whole.feed(text)
        asked.clear()
        assert session.generate(9, should_stop=every_third) + session.generate(6) == whole.generate(9)
        assert session.tokens_generated == 9


class TestRefusals:
    @pytest.mark.parametrize(
        ("ids", "named"),
        [
            ([], "no text"),
            (torch.zeros(2, 3, dtype=torch.long), r"shape \(2, 3\)"),
            ([1.5], "dtype"),
            ([1, 96], "id 96 is beyond the model's vocabulary of 96"),
            ([-1], "id -1 is beyond"),
            ([1, 82], "id 82 is a beacon or the placeholder"),
            ([80], "id 80 is a beacon or the placeholder"),
            (None, "these are no ids"),
            (["a"], "these are no ids"),
            ("abc", "these are no ids"),
            ([2**70], "these are no ids"),
            (5, r"shape \(\)"),
            (torch.ones(2, dtype=torch.complex64), "dtype"),
            (torch.tensor([1, 200], dtype=torch.uint8), "id 200 is beyond"),
        ],
    )
    def test_what_is_no_text_is_refused_and_nothing_is_fed(self, ids, named):
        session = CometSession(build_model())
        with pytest.raises(DataError, match=named):
            session.feed(ids)
        assert session.tokens_fed == 0 and session.last_id is None

    def test_another_model_and_another_layout_are_refused(self):
        with pytest.raises(CheckpointError, match="Linear cannot stream"):
            CometSession(torch.nn.Linear(2, 2))
        with pytest.raises(ConfigError, match="generation_layout='x'"):
            CometSession(build_model(), generation_layout="x")


def begun_session(model, layout="training"):
    session = CometSession(model, generation_layout=layout, seed=7)
    session.feed(random_text(24))
    session.generate(8, do_sample=True, temperature=1.2)
    return session


class TestFile:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("switch", SWITCHES)
    def test_tomorrow_goes_on_exactly_as_today_greedy_and_sampled(self, switch, layout, tmp_path):
        model = build_model(**SWITCHES[switch])
        for generated in (0, 1, 13):
            session = CometSession(model, generation_layout=layout, seed=3)
            session.feed(random_text(18))
            if generated:
                session.generate(generated, do_sample=True, temperature=1.2)
            session.save(tmp_path / "s")
            loaded = CometSession.load(tmp_path / "s", build_model(**SWITCHES[switch]))
            assert loaded.generation_layout == layout and loaded.state_bytes == session.state_bytes
            for session_ in (session, loaded):
                session_.results = [
                    session_.generate(9),
                    session_.generate(9, do_sample=True, temperature=1.3, top_k=0),
                    session_.feed(random_text(9, seed=5), return_logits=True).tolist(),
                    session_.generate(9, repetition_penalty=2.0),
                    (session_.tokens_fed, session_.tokens_generated, session_.last_id),
                ]
            assert loaded.results == session.results

    def test_control_another_seed_and_another_past_go_on_differently(self, tmp_path):
        model = build_model()
        session = begun_session(model)
        session.save(tmp_path / "s")
        want = session.generate(20, do_sample=True, temperature=1.3)
        loaded = CometSession.load(tmp_path / "s", model)
        loaded.generator.manual_seed(1)
        assert loaded.generate(20, do_sample=True, temperature=1.3) != want
        reset = CometSession.load(tmp_path / "s", model)
        reset.reset()
        reset.feed([session.last_id])
        assert reset.generate(20, do_sample=True, temperature=1.3) != want

    def test_a_bfloat16_session_is_saved_too(self, tmp_path):
        model = build_model().to(torch.bfloat16)
        session = begun_session(model)
        session.save(tmp_path / "s")
        assert CometSession.load(tmp_path / "s", model).generate(12) == session.generate(12)

    def test_a_session_that_has_not_begun_is_saved_too(self, tmp_path):
        model = build_model()
        CometSession(model).save(tmp_path / "s")
        loaded = CometSession.load(tmp_path / "s", model)
        loaded.feed(random_text(20))
        fresh = CometSession(model)
        fresh.feed(random_text(20))
        assert loaded.generate(9) == fresh.generate(9)

    def test_the_file_is_plain_safetensors_and_replaces_an_older_session_alone(self, tmp_path):
        session = begun_session(build_model())
        session.save(tmp_path / "s")
        with safe_open(tmp_path / "s", "pt") as file:
            header = json.loads(file.metadata()["comet_session"])
        assert header["version"] == 1 and header["tokens_fed"] == 24 and header["tokens_generated"] == 8
        session.generate(1)
        session.save(tmp_path / "s")
        assert CometSession.load(tmp_path / "s", session.model).tokens_generated == 9
        save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
        with pytest.raises(OutputError, match="is no session file, so it is not replaced"):
            session.save(tmp_path / "model.safetensors")
        with pytest.raises(OutputError, match="folder is missing"):
            session.save(tmp_path / "none" / "s")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "s"]

    def test_a_disk_that_is_full_leaves_the_old_session_and_nothing_else(self, tmp_path, monkeypatch):
        session = begun_session(build_model())
        session.save(tmp_path / "s")
        old = (tmp_path / "s").read_bytes()

        def fail(tensors, path, metadata):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(session_file, "save_file", fail)
        with pytest.raises(OutputError, match="No space left"):
            session.save(tmp_path / "s")
        assert [p.name for p in tmp_path.iterdir()] == ["s"] and (tmp_path / "s").read_bytes() == old

    @pytest.mark.parametrize(
        ("other", "named"),
        [
            ({"temp_mem_budget": 5}, "temp_mem_budget 4, here 5"),
            ({"rope_theta": 5e5}, "rope_theta 10000.0, here 500000.0"),
            ({"seed": 1}, "the sizes agree, the weights do not"),
        ],
    )
    def test_a_session_of_another_model_is_refused_with_what_differs(self, other, named, tmp_path):
        begun_session(build_model()).save(tmp_path / "s")
        with pytest.raises(CheckpointError, match=named):
            CometSession.load(tmp_path / "s", build_model(**other))
        with pytest.raises(CheckpointError, match=r"dtype torch.float32, here torch.bfloat16"):
            CometSession.load(tmp_path / "s", build_model().to(torch.bfloat16))

    def test_a_damaged_file_is_refused_wherever_the_damage_is(self, tmp_path):
        model = build_model()
        begun_session(model).save(tmp_path / "s")
        whole = (tmp_path / "s").read_bytes()
        places = range(0, len(whole), max(1, len(whole) // 60))
        damages = [whole[:at] for at in places] + [
            whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in places
        ]
        for damaged in damages:
            (tmp_path / "d").write_bytes(damaged)
            with pytest.raises(CheckpointError):
                CometSession.load(tmp_path / "d", model)

    def test_other_files_are_refused(self, tmp_path):
        model = build_model()
        with pytest.raises(CheckpointError, match="does not exist"):
            CometSession.load(tmp_path / "none", model)
        with pytest.raises(CheckpointError, match="this is a folder, no session file"):
            CometSession.load(tmp_path, model)
        for header in ("[]", "5", "null", "not json"):
            save_file({"x": torch.ones(1)}, tmp_path / "h", metadata={"comet_session": header})
            with pytest.raises(CheckpointError, match="damaged, or no session"):
                CometSession.load(tmp_path / "h", model)
        (tmp_path / "text").write_text("x" * 100)
        with pytest.raises(CheckpointError, match="damaged, or no session"):
            CometSession.load(tmp_path / "text", model)
        begun_session(model).save(tmp_path / "s")
        header, tensors = session_file.read_session_file(tmp_path / "s")
        session_file.write_session_file(
            tmp_path / "v", {k: v for k, v in header.items() if k not in ("last_id", "sha256")}, tensors
        )
        with pytest.raises(CheckpointError, match="lacks a part: 'last_id'"):
            CometSession.load(tmp_path / "v", model)
        whose = {k: v for k, v in header.items() if k != "sha256"}
        session_file.write_session_file(tmp_path / "m", {**whose, "model": []}, tensors)
        with pytest.raises(CheckpointError, match="of another model: vocab_size None, here 96"):
            CometSession.load(tmp_path / "m", model)
        save_file(tensors, tmp_path / "v", metadata={"comet_session": json.dumps({**header, "version": 9})})
        with pytest.raises(CheckpointError, match="version 9, this code reads 1"):
            CometSession.load(tmp_path / "v", model)
