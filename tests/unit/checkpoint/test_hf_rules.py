"""The rules between Hugging Face and Megatron tensors: each is a bijection, whole and cut over tensor parallelism."""

import pytest
import torch

from comet_megatron.checkpoint.hf_rules import Whole, plan_rules, to_hf, to_megatron
from comet_megatron.testing.tiny import FAMILIES, build_oracle, oracle_tensors, tiny_architecture, tiny_memory

SWITCHES = [{}, {"global_slots": 0}, {"stride": -1}, {"global_slots": 0, "stride": -1}]


@pytest.mark.parametrize("memory", SWITCHES, ids=["both", "no global", "no temporary", "none"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_every_tensor_goes_to_megatron_and_back_bit_equal(tie, family, memory):
    architecture, sizes = tiny_architecture(family, tie_embeddings=tie), tiny_memory(**memory)
    tensors = oracle_tensors(build_oracle(architecture, sizes))
    rules = plan_rules(architecture, sizes)
    shapes = {name: shape for rule in rules for name, shape in zip(rule.hf, rule.shapes, strict=True)}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    back = to_hf(rules, to_megatron(rules, tensors))
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_of_tensor_parallel_ranks_join_to_the_whole(size, family):
    architecture, sizes = tiny_architecture(family), tiny_memory()
    whole = Whole(oracle_tensors(build_oracle(architecture, sizes)))
    for rule in plan_rules(architecture, sizes):
        parts = [rule.load(whole, rank=rank, size=size) for rank in range(size)]
        assert len({part.shape for part in parts}) == 1
        for name, joined in zip(rule.hf, rule.join(parts), strict=True):
            assert torch.equal(joined, whole[name]), name


def test_a_rank_reads_its_own_part_of_every_tensor_and_nothing_else():
    class Counted(Whole):
        read = 0

        def part(self, *where):
            found = super().part(*where)
            self.read += found.numel()
            return found

    architecture = tiny_architecture()
    for rule in plan_rules(architecture, tiny_memory()):
        whole = Counted(oracle_tensors(build_oracle(architecture, tiny_memory())))
        share = sum(whole[name].numel() for name in rule.hf)
        rule.load(whole, rank=1, size=2)
        if rule.partition_axis is None:
            assert whole.read == share
        else:  # the last rank's part of the vocabulary is smaller: padding is not read
            assert whole.read <= share / 2 + architecture.hidden_size * 128


def test_a_rank_of_linear_qkv_holds_whole_groups_of_queries_and_their_key_and_value():
    architecture = tiny_architecture()
    rules = plan_rules(architecture, None)
    rule = next(r for r in rules if r.megatron.endswith("layers.0.self_attention.linear_qkv.weight"))
    d, heads, groups = architecture.head_dim, architecture.num_attention_heads, architecture.num_query_groups
    # Each row tells which projection (0, 1, 2) and which head it comes from.
    tensors = [
        torch.tensor([[kind, i // d] for i in range(n * d)]) for kind, n in ((0, heads), (1, groups), (2, groups))
    ]
    tensors = [tensor[len(tensor) // 2 :] for tensor in tensors]  # what the second of two ranks reads
    part = rule.to_megatron(tensors)
    per_group = heads // groups
    want = []
    for group in range(groups // 2, groups):
        want += [[0, h] for h in range(group * per_group, (group + 1) * per_group)] + [[1, group], [2, group]]
    assert part[::d].tolist() == want
