"""Training the memory only: gradients equal the oracle's, and the new embedding rows lie where they belong."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from comet_megatron.config.schema import MemorySizes, OptimizerSection
from comet_megatron.model.build import build_stage
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.testing.tiny import (
    build_oracle,
    gather_zero1_gradients,
    layout_of,
    load_hf_tensors,
    oracle_tensors,
    tiny_architecture,
    tiny_memory,
    tiny_sequences,
)
from comet_megatron.train.model import build_trainable
from comet_megatron.train.optimizer import build_optimizer
from comet_megatron.train.step import train_step

TOLERANCE = 1e-5  # of each tensor's largest value; of the norm
# Longer than the FIFO's budget; exactly two chunks; ragged; shorter than a chunk.
LENGTHS = (75, 32, 50, 9)


@dataclass(frozen=True)
class Case:
    """One layout; `world` processes."""

    world: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    zero1: bool = False
    layers_per_stage: tuple[int, ...] = (3,)


CASES = {
    "TP1": Case(),
    "TP2": Case(world=2, tp=2),
    "TP2+SP": Case(world=2, tp=2, sequence_parallel=True),
    "DP2 ZeRO-1": Case(world=2, zero1=True),
    "PP2": Case(world=2, layers_per_stage=(1, 2)),
    "TP2+SP x PP2": Case(world=4, tp=2, sequence_parallel=True, layers_per_stage=(2, 1)),
    "PP2 x DP2 ZeRO-1": Case(world=4, zero1=True, layers_per_stage=(2, 1)),
}


def one_step(process, case: Case, tie_embeddings: bool, tensors: dict[str, Tensor], sequences):
    """On each rank: the batch's loss, the gradient's norm, and the gradient of every trained parameter."""
    layout = layout_of(process, tp=case.tp, pp=len(case.layers_per_stage))
    stage = build_stage(
        tiny_architecture(tie_embeddings=tie_embeddings),
        tiny_memory(),
        layout.groups,
        stage=layout.pp_rank,
        layers_per_stage=case.layers_per_stage,
        sequence_parallel=case.sequence_parallel,
    )
    load_hf_tensors(stage, tensors)
    stage.freeze_backbone()
    model = build_trainable({layout.pp_rank: stage}, layout, zero1=case.zero1)
    section = OptimizerSection(clip_grad=1e9)  # the norm is computed, nothing is clipped
    optimizer = build_optimizer(model, section, precision="fp32", zero1=case.zero1)
    mine = np.array_split(np.arange(len(sequences)), layout.dp)[layout.dp_rank]
    batch = [sequences[i] for i in mine]
    result = train_step(model, optimizer, batch, layout, settings=BackwardSettings(), step=1)
    if case.zero1:
        gather_zero1_gradients(model)
    names = stage.global_names()
    grads = {names[n]: p.main_grad.clone() for n, p in stage.named_parameters() if p.requires_grad}
    of_stages: list[dict[str, Tensor]] = [{}] * layout.pp
    dist.all_gather_object(of_stages, grads, group=layout.groups.pp)
    assert all(torch.equal(grads.setdefault(n, g), g) for other in of_stages for n, g in other.items())
    return result.loss, result.grad_norm, grads


def oracle_loss_and_gradients(oracle, sequences) -> tuple[float, dict[str, Tensor]]:
    """By our names: of the memory nets, and of the beacons' rows where they are embedded (not in a tied head)."""
    oracle.lm_head.weight = torch.nn.Parameter(oracle.lm_head.weight.detach().clone())
    count = sum(len(s) - 1 for s in sequences)
    total = 0.0
    for ids in sequences:
        row = torch.from_numpy(ids.astype(np.int64))[None]
        total = total + oracle(row, labels=row).loss * (len(ids) - 1) / count
    total.backward()
    new = tiny_memory().new_ids
    nets = {n: p.grad for n, p in oracle.named_parameters() if "_memory_net." in n}
    grads = {n.replace("model.layers", "decoder.layers"): grad for n, grad in nets.items()}
    return total.item(), {**grads, "new_rows": oracle.model.embed_tokens.weight.grad[new.start : new.stop]}


@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CASES)
def test_the_memory_alone_gets_the_gradient_it_has_in_the_oracle(name, tie_embeddings, pool):
    case = CASES[name]
    oracle = build_oracle(tiny_architecture(tie_embeddings=tie_embeddings), tiny_memory())
    tensors = {n: t.clone() for n, t in oracle_tensors(oracle).items()}
    sequences = tiny_sequences(LENGTHS)
    want_loss, want = oracle_loss_and_gradients(oracle, sequences)
    want_norm = torch.stack([grad.double().square().sum() for grad in want.values()]).sum().sqrt().item()
    for loss, norm, found in pool(case.world).run(one_step, case, tie_embeddings, tensors, sequences):
        assert loss == pytest.approx(want_loss, abs=TOLERANCE)
        assert norm == pytest.approx(want_norm, rel=TOLERANCE)
        assert found.keys() == want.keys()
        for parameter, grad in want.items():
            assert (found[parameter] - grad).abs().max() < TOLERANCE * grad.abs().max(), parameter
        assert not found["new_rows"][0].any()  # the memory token itself is never embedded
        assert found["new_rows"][1:].any(dim=1).all()


def memory_with_new_ids_from(first: int) -> MemorySizes:
    """As `tiny_memory`, its ids moved."""
    sizes = tiny_memory()
    last = first + 1 + sizes.global_slots
    return replace(
        sizes,
        first_new_id=first,
        memory_token_id=first,
        beacon_id=last,
        global_beacon_ids=tuple(range(first + 1, last)),
    )


def read_and_write_rows(process, tp: int, first_new_id: int, value_of_row: Tensor, trained: Tensor):
    """On each rank: `new_rows` as read from an embedding of known values, and the whole embedding after a write."""
    layout = layout_of(process, tp=tp)
    stage = build_stage(tiny_architecture(), memory_with_new_ids_from(first_new_id), layout.groups)
    weight = stage.embedding.word_embeddings.weight
    with torch.no_grad():
        weight.copy_(value_of_row.chunk(tp)[layout.groups.tp.rank()])
    stage.freeze_backbone()
    read = stage.new_rows.detach().clone()
    with torch.no_grad():
        stage.new_rows.copy_(trained)
    stage.write_new_rows()
    parts = [torch.empty_like(weight) for _ in range(tp)]
    dist.all_gather(parts, weight.detach(), group=layout.groups.tp)
    stage.read_new_rows()
    return read, torch.cat(parts), stage.new_rows.detach()


PADDED_VOCABULARY = 256  # at TP2, 128 rows a rank


@pytest.mark.parametrize("first_new_id", [200, 100, 125, 120, 128], ids=lambda i: f"ids from {i}")
@pytest.mark.parametrize("tp", [1, 2], ids=["TP1", "TP2"])
def test_every_new_row_is_read_from_its_own_place_and_written_there(tp, first_new_id, pool):
    new = memory_with_new_ids_from(first_new_id).new_ids
    values = torch.arange(PADDED_VOCABULARY * 64.0).view(PADDED_VOCABULARY, 64)
    trained = -1.0 - torch.arange(len(new) * 64.0).view(len(new), 64)
    want = values.clone()
    want[new.start : new.stop] = trained
    for read, written, read_again in pool(tp).run(read_and_write_rows, tp, first_new_id, values, trained):
        assert torch.equal(read, values[new.start : new.stop])
        assert torch.equal(written, want)
        assert torch.equal(read_again, trained)
