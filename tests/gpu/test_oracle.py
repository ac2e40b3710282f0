"""On a GPU, losses and gradients equal the fp32 oracle: closely in fp32, as far as bf16 goes in bf16."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from comet_megatron.inference import CometSession
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.testing.gpu import ARCHITECTURE, MEMORY, batch
from comet_megatron.testing.tiny import build_oracle, gather_zero1_gradients, gradients, layout_alone, whole_tensors
from comet_megatron.train.step import accumulate_gradients, evaluate


@cache
def wanted() -> tuple[float, dict[str, torch.Tensor]]:
    """The oracle's, in fp32 on the GPU."""
    oracle = build_oracle(ARCHITECTURE, MEMORY).cuda()
    sequences = batch()
    count, total = sum(len(s) - 1 for s in sequences), 0.0
    for ids in sequences:
        row = torch.from_numpy(ids.astype(np.int64))[None].cuda()
        total = total + oracle(row, labels=row).loss * (len(ids) - 1) / count
    total.backward()
    return total.item(), {n: p.grad.cpu() for n, p in oracle.named_parameters()}


def found_by(model, **settings) -> tuple[float, dict[str, torch.Tensor]]:
    result = accumulate_gradients(model, batch(), layout_alone(), settings=BackwardSettings(**settings), step=1)
    gather_zero1_gradients(model)
    whole = whole_tensors(model.stages, gradients(model.stages))
    return result.loss, {name: tensor.float().cpu() for name, tensor in whole.items()}


@pytest.mark.parametrize("split", [(), (1, 3)])
@pytest.mark.parametrize("recompute", [False, True])
def test_fp32_equals_the_oracle(recompute, split, build):
    want_loss, want = wanted()
    loss, found = found_by(build("torch", "fp32", split=split), recompute=recompute)
    assert loss == pytest.approx(want_loss, abs=1e-4)
    for name, grad in want.items():
        assert (found[name] - grad).abs().max() < 1e-3 * grad.abs().max(), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["torch", "te"])
def test_bf16_is_near_the_oracle(backend, recompute, build):
    want_loss, want = wanted()
    loss, found = found_by(build(backend, "bf16"), recompute=recompute)
    assert loss == pytest.approx(want_loss, rel=0.01)
    for name, grad in want.items():
        likeness = torch.cosine_similarity(found[name].flatten(), grad.flatten(), dim=0)
        assert likeness > 0.98, f"{name}: {likeness:.4f}"


@pytest.mark.parametrize("backend", ["torch", "te"])
def test_evaluation_gives_the_loss_of_training(backend, build):
    model = build(backend, "bf16")
    settings = BackwardSettings()
    evaluated = evaluate(model.executor, batch(), layout_alone(), settings=settings)
    trained = accumulate_gradients(model, batch(), layout_alone(), settings=settings, step=1)
    assert evaluated.loss == pytest.approx(trained.loss, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_session_on_the_gpu_equals_the_oracle_on_the_cpu(precision):
    oracle = build_oracle(ARCHITECTURE, MEMORY).eval()
    ids = torch.from_numpy(batch()[0].astype(np.int64))
    with torch.no_grad():
        want = CometSession(oracle).feed(ids, return_logits=True)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        session = CometSession(build_oracle(ARCHITECTURE, MEMORY).eval().to("cuda", dtype))
        found = torch.cat([session.feed(piece, return_logits=True) for piece in ids.cuda().split(100)])
    error = (found.float().cpu() - want).abs().max() / want.abs().max()
    assert error < (1e-4 if precision == "fp32" else 0.05)
    if precision == "fp32":
        other = CometSession(oracle)
        other.feed(ids)
        assert session.generate(20) == other.generate(20)
