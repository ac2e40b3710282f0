"""The plain-torch CoMeT beyond the golden data: layouts, switches, batches, generation, exports, refusals."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from comet_megatron.hf.configuration_comet import CometConfig
from comet_megatron.hf.modeling_comet import CometForCausalLM, Row, plan_rows

TEXT_IDS, PLACEHOLDER, BEACON = 80, 80, 81
BACKBONE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,  # large, so that the memory shows in the logits
    "tie_word_embeddings": False,
}
GLOBAL = {"global_beacon_ids": [82, 83]}
TEMPORARY = {"temp_beacon_id": BEACON, "temp_beacon_stride": 3, "temp_mem_budget": 4}
SWITCHES = {"both": {**GLOBAL, **TEMPORARY}, "global": GLOBAL, "temporary": TEMPORARY, "neither": {}}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,  # so low that all three bands of wavelengths occur in a head of 8
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "qwen3": (Qwen3Config, {}, {}),
    "qwen2": (Qwen2Config, {}, {"qk_norm": False, "qkv_bias": True}),
    "llama": (LlamaConfig, {"rope_parameters": LLAMA3}, {"qk_norm": False}),
    "llama, linear scaling": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        {"qk_norm": False},
    ),
    "mistral": (MistralConfig, {"sliding_window": None}, {"qk_norm": False}),
}

every_switch = pytest.mark.parametrize("switch", SWITCHES)


def build_model(switch="both", seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {**BACKBONE, "chunk_size": 7, "placeholder_id": PLACEHOLDER, **SWITCHES[switch], **changes}
    return CometForCausalLM(CometConfig(**sizes)).eval()


def random_text(tokens, batch=1, seed=1):
    return torch.randint(TEXT_IDS, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def assert_near(value, want, atol=1e-5):
    torch.testing.assert_close(value, want, atol=atol, rtol=0)


class TestLayout:
    def test_a_beacon_ends_every_group_and_the_global_beacons_end_the_chunk(self):
        rows = plan_rows(text_before=0, text_new=7, stride=3, global_slots=2, closes=True)
        assert "".join("tbg"[row] for row in rows) == "tttbtttbtbgg"

    def test_an_open_chunk_has_no_beacon_that_nobody_reads(self):
        rows = plan_rows(text_before=0, text_new=6, stride=3, global_slots=2, closes=False)
        assert "".join("tbg"[row] for row in rows) == "tttbttt"

    @pytest.mark.parametrize("stride", [-1, 1, 2, 3, 7, 9])
    @pytest.mark.parametrize("closes", [False, True])
    def test_text_that_comes_in_pieces_is_laid_as_at_once(self, stride, closes):
        sizes = {"stride": stride, "global_slots": 2}
        for tokens in range(1, 9):
            whole = plan_rows(text_before=0, text_new=tokens, closes=closes, **sizes)
            for first in range(tokens + 1):
                pieces = plan_rows(text_before=0, text_new=first, closes=False, **sizes)
                pieces += plan_rows(text_before=first, text_new=tokens - first, closes=closes, **sizes)
                assert pieces == whole

    def test_a_last_group_without_its_beacon_and_a_phase_move_beacons_only(self):
        sizes = {"text_before": 0, "text_new": 7, "stride": 3, "global_slots": 2, "closes": True}
        rows = plan_rows(**sizes, ends_last_group=False)
        assert "".join("tbg"[row] for row in rows) == "tttbtttbtgg"
        rows = plan_rows(
            **{**sizes, "text_before": 4, "closes": False}, phase=2
        )  # 2 + 4, 2 + 7 and 2 + 10 begin groups
        assert "".join("tbg"[row] for row in rows) == "btttbtttbt"

    @pytest.mark.parametrize("stride", [1, 2, 3, 7, 9])
    def test_a_closed_chunk_has_a_beacon_for_every_group_a_partial_one_too(self, stride):
        for tokens in range(1, 20):
            rows = plan_rows(text_before=0, text_new=tokens, stride=stride, global_slots=5, closes=True)
            assert rows.count(Row.BEACON) == -(-tokens // stride)
            assert rows.count(Row.TEXT) == tokens
            assert rows[-5:] == [Row.GLOBAL_BEACON] * 5


class TestForward:
    @pytest.mark.parametrize("switch", ["global", "neither"])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_text_shorter_than_a_chunk_is_the_backbone_alone(self, family, switch, tied):
        kind, given, ours = FAMILIES[family]
        torch.manual_seed(0)
        if "rope_parameters" in given and transformers.__version__.startswith("4."):  # it knows them as two keys
            scaling = {**given["rope_parameters"]}
            theirs = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
        else:
            theirs = given
        backbone = AutoModelForCausalLM.from_config(kind(**{**BACKBONE, "tie_word_embeddings": tied, **theirs})).eval()
        for name, parameter in backbone.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        written = backbone.config.to_dict()  # transformers 4 has the plain keys
        rope = written.get("rope_parameters") or {
            **given.get("rope_parameters", {}),
            "rope_theta": written["rope_theta"],
        }
        model = build_model(switch, chunk_size=50, tie_word_embeddings=tied, rope_parameters=rope, **ours)
        weights = {k.replace(".self_attn", ".inner_layer.self_attn"): v for k, v in backbone.state_dict().items()}
        for part in ("mlp", "input_layernorm", "post_attention_layernorm"):
            weights = {k.replace(f".{part}.", f".inner_layer.{part}."): v for k, v in weights.items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and all("global_memory_net" in key for key in missing)
        text = random_text(41, batch=2)
        assert_near(model(text).logits, backbone(text).logits)

    @every_switch
    def test_the_past_reaches_the_next_chunk_through_the_memory_alone(self, switch):
        model = build_model(switch)
        text = random_text(14)
        changed = text.clone()
        changed[0, 2] = (changed[0, 2] + 1) % TEXT_IDS
        effect = (model(text).logits - model(changed).logits)[:, 7:].abs().max()
        assert effect == 0 if switch == "neither" else effect > 1e-2

    @every_switch
    def test_a_memory_that_is_off_has_no_net(self, switch):
        names = dict(build_model(switch).named_parameters())
        for net, key in (("global_memory_net", "global"), ("temp_memory_net", "temporary")):
            assert any(net in name for name in names) == (switch in (key, "both"))

    @every_switch
    def test_the_state_has_a_constant_size(self, switch):
        model = build_model(switch)
        for tokens in (14, 21, 70):
            for layer in model(random_text(tokens), return_memory=True, return_logits=False).memory:
                sizes = [None if state is None else tuple(state.shape) for state in layer]
                assert sizes[0] == ((1, 2, 32) if switch in ("global", "both") else None)
                assert sizes[1] == ((1, 4, 32) if switch in ("temporary", "both") else None)

    @every_switch
    def test_a_batch_equals_its_rows_alone(self, switch):
        model = build_model(switch)
        text = random_text(25, batch=3)
        together = model(text, return_memory=True)
        for row in range(3):
            alone = model(text[row : row + 1], return_memory=True)
            assert_near(together.logits[row], alone.logits[0])
            for layer, layer_alone in zip(together.memory, alone.memory, strict=True):
                for state, state_alone in zip(layer, layer_alone, strict=True):
                    if state is not None:
                        assert_near(state[row], state_alone[0])

    @every_switch
    def test_a_text_read_on_from_its_memory_equals_the_text_read_at_once(self, switch):
        model = build_model(switch)
        text = random_text(30)
        first = model(text[:, :14], return_memory=True)
        second = model(text[:, 14:], memory=first.memory)
        assert_near(torch.cat([first.logits, second.logits], dim=1), model(text).logits)

    def test_bfloat16_runs_with_a_memory_in_fp32_near_the_fp32_model(self):
        model = build_model()
        text = random_text(40)
        want = model(text).logits
        output = model.to(torch.bfloat16)(text, labels=text, return_memory=True)
        assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
        assert all(state.dtype == torch.float32 for layer in output.memory for state in layer)
        assert F.cosine_similarity(output.logits.float().flatten(), want.flatten(), dim=0) > 0.99
        output.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert model.generate(text, max_new_tokens=12).shape == (1, 52)

    def test_autocast_leaves_the_memory_nets_in_fp32(self):
        model, text, seen = build_model(), random_text(30), []
        for layer in model.model.layers:
            layer.global_memory_net.g_proj.register_forward_hook(lambda *call: seen.append(call[2].dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(text, labels=text).loss.backward()
        assert seen and set(seen) == {torch.float32}

    def test_initialisation_draws_matrices_and_sets_norms_to_one(self):
        model = build_model(hidden_size=128, memory_adapter_rank=16)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                assert (parameter == 1).all(), name
            else:
                assert abs(parameter.std().item() / 0.2 - 1) < 0.15, name


class TestLoss:
    def test_it_is_the_mean_over_the_shifted_labels(self):
        model, text = build_model(), random_text(30, batch=2)
        labels = text.clone()
        labels[0, 3:9] = -100
        output = model(text, labels=labels)
        want = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        assert_near(output.loss, want)
        assert_near(model(text, labels=labels, return_logits=False).loss, want)

    def test_chunks_without_labels_have_no_head_and_still_pass_gradients_on(self):
        model, text, rows = build_model(), random_text(30), []
        labels = torch.full_like(text, -100)
        labels[:, 25:] = text[:, 25:]
        model.lm_head.register_forward_hook(lambda *call: rows.append(call[2].shape[:-1].numel()))
        loss = model(text, labels=labels, return_logits=False).loss
        assert rows == [0, 0, 0, 4, 1]  # of 7, 7, 7, 7, 2: text 24 is the first that predicts a label
        loss.backward()
        assert model.model.layers[0].global_memory_net.g_proj.weight.grad.abs().max() > 0

    def test_a_text_without_labels_has_loss_zero_and_zero_gradients(self):
        model, text = build_model(), random_text(20)
        loss = model(text, labels=torch.full_like(text, -100)).loss
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def generate_with_logits(model, text, **options):
    steps = []
    hook = model.lm_head.register_forward_hook(lambda *call: steps.append(call[2].clone()))
    ids = model.generate(text, **options)
    hook.remove()
    return ids, steps


class TestGenerate:
    @pytest.mark.parametrize(
        ("switch", "stride"),
        [("neither", -1), ("global", -1), *((s, n) for s in ("both", "temporary") for n in (1, 3, 7, 9))],
    )
    def test_every_greedy_step_equals_the_whole_text_read_anew(self, switch, stride):
        model = build_model(switch, temp_beacon_stride=stride)
        for tokens in (1, 6, 7, 13, 22):
            text = random_text(tokens, batch=2, seed=tokens)
            ids, steps = generate_with_logits(model, text, max_new_tokens=17)  # over two or three borders of chunks
            assert ids.shape == (2, tokens + 17) and len(steps) == 17
            for step, logits in enumerate(steps):
                grown = ids[:, : tokens + step]
                want = model(grown).logits[:, -1]
                assert_near(logits, want)
                want[:, model.config.memory_token_ids] = -torch.inf
                assert (ids[:, tokens + step] == want.argmax(-1)).all()

    def test_control_a_cache_that_forgets_a_beacon_differs(self, monkeypatch):
        model, text = build_model(), random_text(13)
        _, steps = generate_with_logits(model, text, max_new_tokens=17)
        monkeypatch.setattr(
            "comet_megatron.hf.modeling_comet.plan_rows",
            lambda **sizes: plan_rows(**{**sizes, "stride": -1 if sizes["text_before"] else sizes["stride"]}),
        )
        _, wrong = generate_with_logits(model, text, max_new_tokens=17)
        assert max((a - b).abs().max().item() for a, b in zip(steps, wrong, strict=True)) > 1e-2

    def test_the_cache_stays_within_a_chunk_and_its_slots(self):
        model = build_model()
        chunk, longest = model.model.open_chunk(), 0
        for token in random_text(60)[0]:
            ((_, chunk, _),) = model.model.stream(token[None, None], chunk)
            longest = max(longest, chunk.keys_values[0][0].shape[2])
        assert longest == 2 + 4 + 7 + 2  # global and temporary slots, text, beacons but the last

    @pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"do_sample": True, "top_k": 3}])
    def test_beacons_and_the_placeholder_are_never_generated(self, options):
        model = build_model()

        def prefer_memory_tokens(module, inputs, logits):
            logits[:, [PLACEHOLDER, BEACON, 82, 83]] += 1000
            return logits

        model.lm_head.register_forward_hook(prefer_memory_tokens)
        new = model.generate(random_text(10), max_new_tokens=40, **options)[:, 10:]
        assert not torch.isin(new, torch.tensor(model.config.memory_token_ids)).any()
        assert model.config.memory_token_ids == [80, 81, 82, 83]

    def test_sampling_follows_its_generator_and_its_limits(self):
        model, text = build_model(), random_text(10)

        def draw(seed, **options):
            source = torch.Generator().manual_seed(seed)
            return model.generate(text, max_new_tokens=20, do_sample=True, generator=source, **options)

        assert draw(1).equal(draw(1)) and not draw(1).equal(draw(2))
        greedy = model.generate(text, max_new_tokens=20)
        assert draw(1, top_k=1).equal(greedy) and draw(1, top_p=1e-6).equal(greedy)
        assert draw(1, temperature=1e-4).equal(greedy) and not draw(1).equal(greedy)

    def test_a_text_that_ends_is_filled_up_with_pads_while_others_go_on(self):
        model, text = build_model(pad_token_id=0), random_text(10, batch=2)
        free = model.generate(text, max_new_tokens=12)
        end = int(next(token for token in free[0, 10:] if token not in free[1, 10:]))
        stop = free[0, 10:].tolist().index(end)
        ids = model.generate(text, max_new_tokens=12, eos_token_id=end)
        assert ids[1].equal(free[1])
        assert ids[0, : 11 + stop].equal(free[0, : 11 + stop]) and not ids[0, 11 + stop :].any()
        assert model.generate(text[:1], max_new_tokens=12, eos_token_id=[end, 95]).shape == (1, 11 + stop)

    def test_stop_tokens_come_from_the_model_unless_given(self):
        text = random_text(10)
        free = build_model().generate(text, max_new_tokens=12)
        model = build_model(eos_token_id=int(free[0, 12]))
        assert model.generate(text, max_new_tokens=12).shape[1] <= 13
        assert model.generate(text, max_new_tokens=12, eos_token_id=None).equal(free)

    def test_a_streamer_receives_the_prompt_then_every_token_then_the_end(self):
        class Recorder:
            def __init__(self):
                self.received, self.ended = [], False

            def put(self, value):
                self.received.append(value)

            def end(self):
                self.ended = True

        model, text, recorder = build_model(), random_text(10), Recorder()
        ids = model.generate(text, max_new_tokens=9, streamer=recorder)
        assert recorder.ended and len(recorder.received) == 10
        assert torch.cat([recorder.received[0][0], *recorder.received[1:]]).equal(ids[0])


CODE_FILES = {"modeling_comet.py", "generation_comet.py", "configuration_comet.py"}
LOAD_ANEW = """
    import sys, torch
    from pathlib import Path
    from transformers import AutoModelForCausalLM
    for folder in sys.argv[1:]:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert "comet_megatron" not in sys.modules, "the export needs our package"
        assert model.config.rope_theta == 12345.0
        want = torch.load(Path(folder) / "want.pt")
        with torch.no_grad():
            assert model(want["text"]).logits.equal(want["logits"])
        assert model.generate(want["text"], max_new_tokens=10).equal(want["ids"])
        official = model.generate(want["text"], max_new_tokens=10, generation_layout="official")
        assert official.equal(want["official"]) and not official.equal(want["ids"])
        model.save_pretrained(Path(folder) / "again")
"""


class TestExport:
    def test_a_fresh_process_loads_and_generates_from_the_folder_alone(self, tmp_path):
        text = random_text(17)
        folders = [tmp_path / name for name in ("tied", "untied", "temporary_only")]
        for folder in folders:
            switch = "temporary" if folder.name == "temporary_only" else "both"
            model = build_model(switch, tie_word_embeddings=folder.name == "tied", rope_theta=12345.0)
            model.save_pretrained(folder)
            assert set(os.listdir(folder)) >= CODE_FILES
            want = {"text": text, "logits": model(text).logits.detach(), "ids": model.generate(text, max_new_tokens=10)}
            want["official"] = model.generate(text, max_new_tokens=10, generation_layout="official")
            torch.save(want, folder / "want.pt")
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", textwrap.dedent(LOAD_ANEW), *map(str, folders)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        for folder in folders:  # an export of an export is one too
            assert set(os.listdir(folder / "again")) >= CODE_FILES
            again = CometForCausalLM.from_pretrained(folder / "again")
            assert again(text).logits.equal(torch.load(folder / "want.pt")["logits"])
            assert again.config.auto_map == build_model().config.auto_map

    @pytest.mark.parametrize("tied", [False, True])
    def test_the_head_is_tied_exactly_when_the_config_says_so(self, tied, tmp_path):
        build_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
        model = CometForCausalLM.from_pretrained(tmp_path)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)

    def test_the_dtype_of_the_weights_survives(self, tmp_path):
        build_model().to(torch.bfloat16).save_pretrained(tmp_path)
        assert CometForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16

    def test_the_class_is_not_found_without_trust(self, tmp_path):
        build_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


class TestConfig:
    @pytest.mark.parametrize("given", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}])
    def test_rope_theta_is_one_plain_key_however_it_was_given(self, given, tmp_path):
        config = CometConfig(**BACKBONE, **given)
        config.save_pretrained(tmp_path)
        loaded = CometConfig.from_pretrained(tmp_path)
        assert config.rope_theta == loaded.rope_theta == loaded.to_dict()["rope_theta"] == 5e5

    def test_rope_theta_that_is_not_given_is_that_of_transformers(self):
        plain = Qwen3Config(**BACKBONE).to_dict()
        theirs = plain.get("rope_theta") or plain["rope_parameters"]["rope_theta"]
        assert CometConfig(**BACKBONE).rope_theta == CometConfig(**plain, chunk_size=7).rope_theta == theirs == 1e4

    @every_switch
    def test_every_key_survives_a_round_trip(self, switch, tmp_path):
        config = build_model(switch, eos_token_id=[1, 2], pad_token_id=3, memory_adapter_rank=5).config
        config.save_pretrained(tmp_path)
        loaded = CometConfig.from_pretrained(tmp_path)
        keys = {*BACKBONE, *GLOBAL, *TEMPORARY, "chunk_size", "placeholder_id", "memory_adapter_rank", "eos_token_id"}
        assert {key: getattr(loaded, key) for key in keys} == {key: getattr(config, key) for key in keys}

    def test_the_config_of_a_qwen3_backbone_is_taken_as_it_is(self):
        qwen = Qwen3Config(**BACKBONE, rope_theta=5e5).to_dict()
        config = CometConfig(**qwen, chunk_size=7)
        assert config.rope_theta == 5e5 and config.model_type == "comet" and config.hidden_size == 32

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"chunk_size": 0}, "chunk_size=0"),
            ({"temp_beacon_stride": 0}, "temp_beacon_stride=0"),
            ({"temp_mem_budget": 0}, "temp_mem_budget=0"),
            ({"temp_beacon_id": None}, "temp_beacon_id is missing"),
            ({"global_beacon_ids": [82, 96]}, r"\[96\] are beyond vocab_size=96"),
            ({"global_beacon_ids": [82, 82]}, "twice"),
            ({"memory_adapter_rank": 0}, "memory_adapter_rank=0"),
            ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
            ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
            ({"attention_bias": True}, "attention_bias=True"),
            ({"use_sliding_window": True}, "use_sliding_window=True"),
            ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
            ({"rope_scaling": {"type": "llama3", "factor": 4.0}}, "rope_type='llama3' needs the key low_freq_factor"),
        ],
    )
    def test_sizes_that_contradict_each_other_are_refused_by_name(self, changes, named):
        with pytest.raises(ValueError, match=named):
            build_model(**changes)

    def test_all_problems_are_told_at_once(self):
        with pytest.raises(ValueError, match="chunk_size=0.*hidden_act='gelu'"):
            build_model(chunk_size=0, hidden_act="gelu")


class TestRefusals:
    @pytest.mark.parametrize("method", ["forward", "generate"])
    @pytest.mark.parametrize(
        ("text", "named"),
        [
            (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
            (torch.zeros(5, dtype=torch.long), r"\[batch, tokens\]"),
            (torch.tensor([[1, 96]]), "96, beyond the vocabulary of 96"),
            (torch.tensor([[1, -1]]), "-1, beyond the vocabulary"),
        ],
    )
    def test_a_text_that_is_none_is_refused(self, method, text, named):
        options = {"max_new_tokens": 3} if method == "generate" else {}
        with pytest.raises(ValueError, match=named):
            getattr(build_model(), method)(text, **options)

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens=0"),
            ({"max_new_tokens": 3, "temperature": 0.5}, "do_sample=True"),
            ({"max_new_tokens": 3, "do_sample": True, "temperature": 0.0}, "temperature"),
            ({"max_new_tokens": 3, "do_sample": True, "top_p": 1.5}, "top_p"),
            ({"max_new_tokens": 3, "attention_mask": torch.tensor([[1, 0]])}, "attention_mask"),
        ],
    )
    def test_options_that_cannot_hold_are_refused(self, options, named):
        with pytest.raises(ValueError, match=named):
            build_model().generate(torch.tensor([[1, 2]]), **options)

    def test_padding_is_refused_and_a_mask_of_ones_is_not(self):
        model, text = build_model(), random_text(10)
        assert model(text, attention_mask=torch.ones_like(text)).logits.equal(model(text).logits)
        with pytest.raises(ValueError, match="attention_mask"):
            model(text, attention_mask=torch.tensor([[0] + [1] * 9]))

    def test_labels_and_memory_of_another_shape_are_refused(self):
        model, text = build_model(), random_text(10)
        with pytest.raises(ValueError, match="labels"):
            model(text, labels=text[:, 1:])
        memory = model(text, return_memory=True).memory
        with pytest.raises(ValueError, match="memory"):
            model(random_text(10, batch=2), memory=memory)
        with pytest.raises(ValueError, match="memory"):
            model(text, memory=memory[:1])
