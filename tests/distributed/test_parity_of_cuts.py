"""Sequences cut in other ways and with other strides: loss and gradients equal the oracle fed piece by piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from comet_megatron.chunking import next_token_labels
from comet_megatron.model.build import build_stage
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.testing.tiny import (
    build_oracle,
    gradients,
    layout_of,
    load_hf_tensors,
    oracle_tensors,
    tiny_architecture,
    tiny_memory,
    tiny_sequences,
    whole_tensors,
)
from comet_megatron.train.model import build_trainable

CUTS = {  # of 50 tokens in chunks of at most 16; the model's stride is 4
    "right": ((2, 16, 16, 16), None),
    "random, longer strides": ((9, 16, 11, 14), 8),
    "a chunk shorter than the stride": ((16, 3, 16, 15), 16),
}


def oracle_loss_and_gradients(oracle, ids, lengths, stride):
    """Each piece is a chunk of its own; what it predicts may lie in the next."""
    if stride is not None:
        oracle.config.temp_beacon_stride = stride
    text, labels = torch.from_numpy(ids.astype(np.int64))[None], torch.from_numpy(next_token_labels(ids))
    memory, total, start = None, 0.0, 0
    for number, length in enumerate(lengths):
        piece = text[:, start : start + length]
        out = oracle(piece, memory=memory, return_memory=number < len(lengths) - 1)
        total = total + F.cross_entropy(out.logits[0], labels[start : start + length], reduction="sum")
        memory, start = out.memory, start + length
    loss = total / (len(ids) - 1)
    loss.backward()
    return loss.item(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in oracle.named_parameters()}


def loss_and_gradients(process, tensors, ids, lengths, stride, pp):
    layout = layout_of(process, pp=pp)
    layers = (3,) if pp == 1 else (2, 1)
    stage = build_stage(
        tiny_architecture(), tiny_memory(), layout.groups, stage=layout.pp_rank, layers_per_stage=layers
    )
    load_hf_tensors(stage, tensors)
    model = build_trainable({layout.pp_rank: stage}, layout, zero1=False)
    model.zero_gradients()
    batch = [model.executor.microbatch(ids[None], next_token_labels(ids)[None], chunk_lengths=lengths, stride=stride)]
    with model.accumulating():
        results = model.executor.train(
            batch,
            scale=1 / (len(ids) - 1),
            settings=BackwardSettings(),
            after_last_backward=model.start_reduction,
        )
    model.finish_reduction(layout)
    return float(results[0].losses.sum()) / (len(ids) - 1), whole_tensors(stage, gradients(stage))


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("name", CUTS)
def test_loss_and_gradients_equal_the_oracle_fed_piece_by_piece(name, pp, pool):
    lengths, stride = CUTS[name]
    oracle = build_oracle(tiny_architecture(), tiny_memory())
    ids = tiny_sequences((50,))[0]
    tensors = {n: t.clone() for n, t in oracle_tensors(oracle).items()}
    want_loss, want = oracle_loss_and_gradients(oracle, ids, lengths, stride)
    results = pool(pp).run(loss_and_gradients, tensors, ids, lengths, stride, pp)
    assert results[-1][0] == pytest.approx(want_loss, abs=1e-5)
    for _, found in results:
        for parameter, gradient in want.items():
            scale = gradient.abs().max().item() or 1.0
            assert (found[parameter] - gradient).abs().max().item() / scale < 1e-5, parameter
