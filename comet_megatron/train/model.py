"""The stages that a process trains: Megatron's DDP around each, their executor, the reduction of gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.executor import Executor
from comet_megatron.parallel.layout import Layout


class TrainableModel:
    """A process's stages, ready to be trained.

    Attributes:
        parts: by stage number; gradients are fp32, summed (not averaged) over data-parallel ranks.
        executor: runs the stages.
    """

    def __init__(self, parts: Mapping[int, DistributedDataParallel], executor: Executor) -> None:
        self.parts, self.executor = dict(parts), executor

    @property
    def stages(self) -> list[CometStage]:
        """The bare stages."""
        return list(self.executor.stages.values())

    def zero_gradients(self) -> None:
        """Before a step."""
        for part in self.parts.values():
            part.zero_grad_buffer()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Backwards inside only add to the gradients; Megatron starts no reduction by itself.

        Its hooks count the calls of each parameter and reduce when as many have come as in the first step; here the
        number of calls differs with the number of chunks.
        """
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.no_sync())
            yield

    def start_reduction(self, stage: int) -> None:
        """After the last backward of a stage: start to sum its gradients over data parallelism; does not wait."""
        part = self.parts[stage]
        for group in part.bucket_groups:
            group.is_first_batch = False  # else finish_grad_sync starts a second one
        part.start_grad_sync()

    def finish_reduction(self, layout: Layout) -> None:
        """Wait for the sums over data parallelism, then sum what is partial over tensor parallelism, and what the
        first and last stage share."""
        finalize_model_grads(list(self.parts.values()), pg_collection=layout.groups)
        shared = [p for stage in self.stages if (p := stage.shared_parameter()) is not None and p.requires_grad]
        if len(shared) == 2:  # both stages are in this process
            shared[0].main_grad.add_(shared[1].main_grad)
            shared[1].main_grad.copy_(shared[0].main_grad)
        elif shared and layout.pp > 1 and self.stages[0].new_rows is not None:
            dist.all_reduce(shared[0].main_grad, group=layout.groups.embd)

    def write_new_rows(self) -> None:
        """After an update: see CometStage.write_new_rows."""
        for stage in self.stages:
            stage.write_new_rows()


def build_trainable(stages: Mapping[int, CometStage] | CometStage, layout: Layout, *, zero1: bool) -> TrainableModel:
    """Wrap the stages of this process in DDP.

    Args:
        stages: by number: one of layout.pp, or all of a pipeline within this process; or a whole model.
        zero1: each data-parallel rank gets the sum of its share of the gradients, to update that share.
    """
    if isinstance(stages, CometStage):
        stages = {0: stages}
    # Overlapped, so that start_grad_sync does not wait; when it is called is up to us.
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=zero1, overlap_grad_reduce=True
    )
    parts = {
        number: DistributedDataParallel(stage.config, config, stage, pg_collection=stage.pg_collection)
        for number, stage in sorted(stages.items())
    }
    executor = Executor(stages, num_stages=max(layout.pp, len(stages)), transport=layout.build_transport())
    return TrainableModel(parts, executor)
