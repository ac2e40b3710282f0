"""The rules between Hugging Face and Megatron tensors: each is a bijection, whole and cut over tensor parallelism."""

import pytest
import torch

from comet_megatron.checkpoint.hf_rules import plan_rules, to_hf, to_megatron
from comet_megatron.testing.tiny import build_oracle, oracle_tensors, tiny_architecture, tiny_memory

SWITCHES = [{}, {"global_slots": 0}, {"stride": -1}, {"global_slots": 0, "stride": -1}]


@pytest.mark.parametrize("memory", SWITCHES, ids=["both", "no global", "no temporary", "none"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_every_tensor_goes_to_megatron_and_back_bit_equal(tie, memory):
    architecture, sizes = tiny_architecture(tie_embeddings=tie), tiny_memory(**memory)
    tensors = oracle_tensors(build_oracle(architecture, sizes))
    rules = plan_rules(architecture, sizes)
    assert sorted(name for rule in rules for name in rule.hf) == sorted(tensors)
    back = to_hf(rules, to_megatron(rules, tensors))
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_of_tensor_parallel_ranks_join_to_the_whole(size):
    architecture, sizes = tiny_architecture(), tiny_memory()
    rules = plan_rules(architecture, sizes)
    whole = to_megatron(rules, oracle_tensors(build_oracle(architecture, sizes)))
    for rule in rules:
        parts = [rule.partition(whole[rule.megatron], rank=rank, size=size) for rank in range(size)]
        assert len({part.shape for part in parts}) == 1
        assert torch.equal(rule.join(parts), whole[rule.megatron]), rule.megatron


def test_a_rank_of_linear_qkv_holds_whole_groups_of_queries_and_their_key_and_value():
    architecture = tiny_architecture()
    rules = plan_rules(architecture, None)
    rule = next(r for r in rules if r.megatron.endswith("layers.0.self_attention.linear_qkv.weight"))
    d, heads, groups = architecture.head_dim, architecture.num_attention_heads, architecture.num_query_groups
    # Each row tells which projection (0, 1, 2) and which head it comes from.
    tensors = [
        torch.tensor([[kind, i // d] for i in range(n * d)]) for kind, n in ((0, heads), (1, groups), (2, groups))
    ]
    part = rule.partition(rule.to_megatron(tensors), rank=1, size=2)
    per_group = heads // groups
    want = []
    for group in range(groups // 2, groups):
        want += [[0, h] for h in range(group * per_group, (group + 1) * per_group)] + [[1, group], [2, group]]
    assert part[::d].tolist() == want
