"""Megatron-Core 0.16's checkpoints on CPU: written by a thread of this process, with few copies of the state.

On a GPU the copy to the host is the one that frees the state for training. On CPU every copy takes memory and the time
of training, so each is counted here. Line numbers are of megatron-core 0.16.1.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_KEYS = ("param", "exp_avg", "exp_avg_sq")  # of the distributed optimizer's state


def replace_checkpoint_writer() -> None:
    """Write checkpoint files in this process, out of copies that are nobody else's.

    filesystem_async.py:310 forks a writer per file out of a process that has gloo and OpenMP threads, and :50 starts
    a Manager with `spawn`, which imports the caller's main module again.
    """
    from megatron.core.dist_checkpointing.strategies import async_utils
    from megatron.core.dist_checkpointing.strategies import filesystem_async as files

    writer = files.FileSystemWriterAsync
    prepare_write_data = writer.prepare_write_data

    class NoCount:  # a forked writer would report its end through a JoinableQueue
        def get(self) -> None:
            pass

        def task_done(self) -> None:
            pass

    def write(transforms, use_msc, rank, write_buckets, results_queue):
        results = {}
        for number, bucket in enumerate(write_buckets):
            done = queue.Queue()
            writer.write_preloaded_data(transforms, number, bucket, done, NoCount(), use_fsync=True, use_msc=use_msc)
            _, result = done.get()
            if isinstance(result, Exception):
                results = result
                break
            results[number] = result
        results_queue.put(results)

    def prepare(self, plan, planner):  # :74 copies views only
        given, resolve_data = set(), planner.resolve_data

        def resolve_and_note(item):
            if isinstance(data := resolve_data(item), Tensor):
                given.add(data.untyped_storage().data_ptr())
            return data

        planner.resolve_data = resolve_and_note
        try:
            prepare_write_data(self, plan, planner)
        finally:
            del planner.resolve_data
        self.write_buckets = [
            (path, key, (data, [(item, _apart(tensor, given)) for item, tensor in tensors]))
            for path, key, (data, tensors) in self.write_buckets
        ]

    def preload(write_buckets, non_blocking=True):  # :224 `.to("cpu")` is no copy here; `prepare` has made it
        return write_buckets

    def schedule(self, request):  # async_utils.py:214 forks; a thread on the copies is enough
        if request.async_fn is None:
            return
        args = list(request.async_fn_args)
        if request.preload_fn:
            args[1] = request.preload_fn()
        self.start_time = time.time()
        self.process = threading.Thread(target=request.async_fn, args=args, kwargs=request.async_fn_kwargs)
        self.process.start()

    async_utils.TemporalAsyncCaller.schedule_async_call = schedule
    writer.prepare_write_data = prepare
    writer.preload_tensors = staticmethod(preload)
    writer.write_preloaded_data_multiproc = staticmethod(write)
    files._get_write_results_queue = queue.Queue
    if not files.HAVE_PSUTIL:  # :636 raises without psutil, in the child, and the parent waits for ever
        raise RuntimeError("psutil is not installed; Megatron's checkpoint writer needs it (pip install psutil)")


def _apart(tensor: Tensor, given: set[int]) -> Tensor:
    """The tensor, if its memory is none of the given ones: then it is a copy already."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.untyped_storage().data_ptr() in given else tensor


def gather_optimizer_state_in_one_copy() -> None:
    """Put each rank's shard of the optimizer's state where it is gathered, at once.

    distrib_optimizer.py:977 copies it into a buffer of zeros, gathers these into others, concatenates them, and copies
    that into a third of zeros: four copies, each into memory of its own.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    get_parameter_state = DistributedOptimizer.get_parameter_state_dp_zero

    def gather(self, use_gloo_comm=True, empty_data=False, return_on_all_ranks=False):
        if empty_data or not return_on_all_ranks:  # as while loading
            return get_parameter_state(self, use_gloo_comm, empty_data, return_on_all_ranks)
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for number, of_types in enumerate(self.gbuf_ranges):
            ((dtype, ranges),) = of_types.items()
            buffer = self.buffers[number]
            state[number] = {dtype: _gather_buffer(self, buffer, ranges)}
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = gather


def _gather_buffer(optimizer: Any, buffer: Any, ranges: Any) -> dict[str, Any]:
    """The state of all parameters of a buffer, one tensor [numel_unpadded] a key. Communicates on DP.

    What lies between two parameters is left as it is: nobody reads it.
    """
    group = optimizer.data_parallel_group
    whole = {key: torch.empty(buffer.numel_unpadded, dtype=torch.float32) for key in _KEYS}
    start = 0
    for bucket, of_rank in zip(buffer.buckets, ranges, strict=True):
        shard = bucket.grad_data.numel() // group.size()
        end = start + bucket.numel_unpadded
        starts = range(start, start + shard * group.size(), shard)
        for key, target in whole.items():
            # The last shards may end behind the unpadded end of the bucket: these are gathered apart.
            parts = [target[at : at + shard] if at + shard <= end else torch.empty(shard) for at in starts]
            own = parts[0] if group.size() == 1 else torch.empty(shard)
            for param, place in of_rank["param_map"].items():
                state = optimizer._get_main_param_and_optimizer_states(param)[key]
                own[place["gbuf_local"].start : place["gbuf_local"].end].copy_(state.detach())
            if group.size() > 1:
                dist.all_gather(parts, own, group=group)
            for at, part in zip(starts, parts, strict=True):
                if at + shard > end > at:
                    target[at:end].copy_(part[: end - at])
        start = end
    return {**whole, "numel_unpadded": buffer.numel_unpadded}
