"""Running op lists: what is kept and for how long, when gradients are complete, how long ops take."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from comet_megatron.chunking import next_token_labels
from comet_megatron.model.build import build_stage
from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.activity import Activity
from comet_megatron.parallel.executor import BackwardSettings, Executor
from comet_megatron.parallel.p2p import LocalTransport, Message
from comet_megatron.parallel.schedule import (
    Kind,
    Op,
    Workload,
    live_chunks_bound,
    plan_whole_sequences,
    recompute_everything,
)
from comet_megatron.parallel.simulator import Span
from comet_megatron.testing.tiny import (
    build_oracle,
    gradients,
    layout_alone,
    load_hf_tensors,
    oracle_tensors,
    tiny_architecture,
    tiny_memory,
    tiny_sequences,
)
from comet_megatron.train.model import build_trainable

SPLIT = (1, 1, 1)
LENGTHS = (75, 40, 9)  # 5, 3 and 1 chunks


def build_stages() -> dict[int, CometStage]:
    """Three stages in this process, with the oracle's weights."""
    tensors = oracle_tensors(build_oracle(tiny_architecture(), tiny_memory()))
    stages = {}
    for number in range(len(SPLIT)):
        stages[number] = build_stage(
            tiny_architecture(), tiny_memory(), layout_alone().groups, stage=number, layers_per_stage=SPLIT
        )
        load_hf_tensors(stages[number], tensors)
    return stages


def batch_of(executor: Executor, lengths=LENGTHS):
    return [executor.microbatch(ids[None], next_token_labels(ids)[None]) for ids in tiny_sequences(lengths)]


class SpiedTransport(LocalTransport):
    """Knows what was sent, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Message] = []

    def send(self, message, tensor) -> None:
        assert not tensor.requires_grad or tensor.is_leaf  # no graph leaves a stage
        self.sent.append(message)
        super().send(message, tensor)


def test_gradients_of_a_stage_are_complete_when_it_says_so_while_stages_before_it_still_work():
    stages, transport = build_stages(), SpiedTransport()
    executor = Executor(stages, transport=transport)
    said: list[tuple[int, int]] = []
    complete: dict[int, list[torch.Tensor]] = {}

    def note(stage: int) -> None:
        gradients_sent = sum(m.is_gradient and m.boundary == 0 for m in transport.sent)
        said.append((stage, gradients_sent))
        complete[stage] = [p.grad.clone() for p in stages[stage].parameters()]

    executor.train(batch_of(executor), scale=1.0, settings=BackwardSettings(), after_last_backward=note)
    assert [stage for stage, _ in said] == [2, 1, 0]
    assert said[0][1] < 9 and said[1][1] == 9  # stage 0 has yet to receive some when stage 2 is done
    for number, grads in complete.items():
        assert all(torch.equal(g, p.grad) for g, p in zip(grads, stages[number].parameters(), strict=True))


def test_the_reduction_is_started_for_every_stage_even_without_any_work():
    model = build_trainable(build_stages(), layout_alone(), zero1=False)
    started = []
    right = model.start_reduction
    with model.accumulating():
        (one_token,) = batch_of(model.executor, (1,))
        results = model.executor.train(
            [one_token],
            scale=1.0,
            settings=BackwardSettings(),
            after_last_backward=lambda stage: (started.append(stage), right(stage)),
        )
    model.finish_reduction(layout_alone())
    assert sorted(started) == [0, 1, 2]
    assert results[0].labels == () and len(results[0].losses) == 0
    assert not any(g.any() for g in gradients(model.stages).values())


@pytest.mark.parametrize("slack", [0, 1, 2])
def test_no_stage_holds_more_chunks_than_the_plan_says(slack, monkeypatch):
    from comet_megatron.parallel import executor as module

    most: dict[int, int] = dict.fromkeys(range(3), 0)
    right = module._Run.do

    def do(run, op: Op) -> None:
        right(run, op)
        live = sum(stage == op.stage for stage, _, _ in run.records)
        most[op.stage] = max(most[op.stage], live)

    monkeypatch.setattr(module._Run, "do", do)
    executor = Executor(build_stages())
    settings = BackwardSettings(recompute=True, slack=slack)
    executor.train(batch_of(executor), scale=1.0, settings=settings)
    work = Workload(3, (5, 3, 1), recompute=recompute_everything)
    bounds = {stage: live_chunks_bound(work, stage, slack=slack) for stage in range(3)}
    assert all(0 < most[stage] <= bounds[stage] for stage in range(3))
    assert most[2] == 5  # the longest sequence: the last stage runs ahead of nobody


def test_another_order_of_ops_gives_the_same_losses_and_nearly_the_same_gradients():
    """Only the order in which a stage adds up its gradients differs."""
    found = []
    for planner in (None, lambda work, stage, slack: plan_whole_sequences(work)[stage]):
        stages = build_stages()
        executor = Executor(stages)
        executor.planner = planner or executor.planner
        results = executor.train(batch_of(executor), scale=1.0, settings=BackwardSettings())
        found.append((torch.cat([r.losses for r in results]), gradients(list(stages.values()))))
    (losses, grads), (other_losses, other_grads) = found
    assert torch.equal(losses, other_losses)
    for name, grad in grads.items():
        assert torch.allclose(grad, other_grads[name], rtol=0, atol=1e-5 * grad.abs().max().item()), name


def test_evaluation_between_two_steps_changes_neither():
    stages = build_stages()
    executor = Executor(stages)
    batch = batch_of(executor)
    executor.train(batch, scale=1.0, settings=BackwardSettings())
    want = gradients(list(stages.values()))
    for stage in stages.values():
        stage.zero_grad(set_to_none=True)
    evaluated = executor.evaluate(batch, settings=BackwardSettings())
    assert all(p.grad is None for stage in stages.values() for p in stage.parameters())
    results = executor.train(batch, scale=1.0, settings=BackwardSettings())
    assert all(torch.equal(want[name], grad) for name, grad in gradients(list(stages.values())).items())
    for one, other in zip(results, evaluated, strict=True):
        assert torch.allclose(one.losses, other.losses, atol=1e-5)


def test_spans_are_the_ops_without_their_waiting():
    class Clock(Activity):
        """Each look at the clock is a second after the one before."""

        now = 0.0

        def mark(self) -> float:
            self.now += 1.0
            return self.now

    activity = Clock()
    op = Op(Kind.FORWARD, 1, 0, 0)
    activity.clear()  # at 2
    with activity.op(op):  # at 3
        with activity.waiting("hidden states"):  # from 4
            activity.now += 9.0  # to 14
        activity.now += 5.0
        with activity.waiting("room", after_work=True):  # from 20
            activity.now += 9.0  # to 30
    (span,) = activity.spans()  # to 31
    assert span == Span(op, start=3 + 10 - 2, end=31 - 10 - 2)


def test_an_activity_says_what_is_done_and_waited_for_and_what_was_done_last():
    activity = Activity()
    assert "between steps" in activity.describe() and "nothing yet" in activity.describe()
    op = Op(Kind.BACKWARD, 2, 1, 5)
    with activity.op(op):
        assert activity.describe().startswith("in backward of sequence 1 chunk 5 on stage 2 for 0 s")
        with activity.waiting(Message(True, 2, 1, 5)):
            told = activity.describe()
        assert activity.state.limited
    assert told.startswith("the backward of sequence 1 chunk 5 on stage 2 waits for the hidden gradient of sequence 1 ")
    assert "from stage 3" in told
    with activity.phase("saving a checkpoint", limited=False):
        assert not activity.state.limited
        assert "saving a checkpoint" in activity.describe() and "backward of sequence 1" in activity.describe()


def test_labels_and_ids_are_kept_only_where_they_are_needed(monkeypatch):
    from comet_megatron.parallel import executor as module

    seen = {}
    right = module._Run.do

    def do(run, op: Op) -> None:
        right(run, op)
        for (stage, _, _), record in run.records.items():
            seen.setdefault(stage, record.chunk)

    monkeypatch.setattr(module._Run, "do", do)
    executor = Executor(build_stages())
    executor.train(batch_of(executor), scale=1.0, settings=BackwardSettings())
    assert seen[0].ids is not None and seen[1].ids is None and seen[2].ids is None
    assert [seen[s].num_labels > 0 for s in range(3)] == [False, False, True]
    assert np.prod(seen[1].labels.shape) == 0
