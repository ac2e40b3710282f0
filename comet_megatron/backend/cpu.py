"""Megatron-Core 0.16 on CPU with gloo: the same code, device names replaced.

`run_megatron_on_cpu()` is called once, before the first Megatron object is built, and refuses where there is a CUDA
device. It costs nothing per torch call. Three kinds of change, each beside the Megatron line that needs it:

1. attributes of `torch.cuda`, which nothing else can use on a machine without a device;
2. the string constants 'cuda' and 'torch.cuda.XTensor' in the functions of the modules listed below;
3. a few Megatron functions: CUDA generators, torch's Adam in the distributed optimizer (torch_adam.py), and what writes
   checkpoints (checkpoints_cpu.py).

Line numbers are of megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import types
from collections.abc import Iterator
from typing import Any

import torch

from comet_megatron.backend.checkpoints_cpu import gather_optimizer_state_in_one_copy, replace_checkpoint_writer
from comet_megatron.backend.torch_adam import mend_torch_adam

_MODULES_WITH_DEVICE_LITERALS = (
    "megatron.core.utils",  # 656, 1207
    "megatron.core.optimizer.optimizer",  # 473, 481, 485, 671, 690 (Tensor.type()), 907
    "megatron.core.optimizer.distrib_optimizer",  # 361, 420, 582 (Tensor.type())
    "megatron.core.optimizer.clip_grads",  # 90, 103, 115, 167 (Tensor.type()), 174, 207
    "megatron.core.optimizer.grad_scaler",  # 15, 88, 91, 94
    "megatron.core.tensor_parallel.data",  # 37
    "megatron.core.pipeline_parallel.schedules",  # 596, 983, 2138 (total_num_tokens)
    "megatron.core.distributed.param_and_grad_buffer",  # 768
    "megatron.core.transformer.utils",  # 35, 40 (causal masks)
    "megatron.core.dist_checkpointing.exchange_utils",  # 98, 104, 106, 110, 326
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",  # 204
)
_already_done = False


def run_megatron_on_cpu() -> None:
    """Make Megatron-Core run on CPU. A second call is free.

    Raises:
        RuntimeError: there is a CUDA device, or the installed Megatron-Core is not 0.16.
    """
    global _already_done
    if torch.cuda.is_available():
        raise RuntimeError("run_megatron_on_cpu() is for machines without a CUDA device")
    if _already_done:
        return
    import megatron.core

    if not megatron.core.__version__.startswith("0.16."):
        raise RuntimeError(f"the CPU backend knows megatron-core 0.16, not {megatron.core.__version__}")
    _already_done = True
    _replace_torch_cuda()
    for name in _MODULES_WITH_DEVICE_LITERALS:
        _replace_device_literals(importlib.import_module(name))
    _replace_generators()
    replace_checkpoint_writer()
    mend_torch_adam()
    gather_optimizer_state_in_one_copy()


def _on_cpu(constant: Any) -> Any:
    """A code constant with its device names replaced, nested code objects and tuples included."""
    if isinstance(constant, str):
        if constant == "cuda":
            return "cpu"
        if constant.startswith("torch.cuda.") and constant.endswith("Tensor"):
            return "torch." + constant.removeprefix("torch.cuda.")
    elif isinstance(constant, types.CodeType):
        constants = tuple(_on_cpu(c) for c in constant.co_consts)
        return constant if constants == constant.co_consts else constant.replace(co_consts=constants)
    elif isinstance(constant, tuple):
        return tuple(_on_cpu(c) for c in constant)
    return constant


def _functions_defined_in(owner: Any, module_name: str) -> Iterator[types.FunctionType]:
    """Every function of a module or class, methods, properties and decorated ones included."""
    for value in list(vars(owner).values()):
        value = getattr(value, "__func__", value)  # staticmethod, classmethod
        value = getattr(value, "fget", value)  # property
        if inspect.isclass(value) and value.__module__ == module_name:
            yield from _functions_defined_in(value, module_name)
            continue
        while value is not None:
            if inspect.isfunction(value) and value.__module__ == module_name:
                yield value
            value = getattr(value, "__wrapped__", None)


def _replace_device_literals(module: types.ModuleType) -> None:
    for function in _functions_defined_in(module, module.__name__):
        function.__code__ = _on_cpu(function.__code__)


class _NoStream:
    """A stream on a device that has none: all work is already in order. A class, as libraries name it in types."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _replace_torch_cuda() -> None:
    def nothing(*args: object, **kwargs: object) -> None:
        pass

    cpu, stream, cuda = torch.device("cpu"), _NoStream(), torch.cuda
    # device= of about 40 buffers (layers.py:261,552,597,873,899; mappings.py:91; param_and_grad_buffer.py:783; ...)
    cuda.current_device = lambda: cpu
    cuda.synchronize = nothing  # async_utils:212; filesystem_async:230; timers:152
    cuda.empty_cache = nothing
    # overlapped DDP takes streams (distributed_data_parallel.py:230, param_and_grad_buffer.py:417-422)
    cuda.Stream = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda s: contextlib.nullcontext()
    # CudaRNGStatesTracker (random.py:235-238, 422): there is one generator, the CPU one
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.nvtx.range_push = cuda.nvtx.range_pop = nothing  # utils.py:2186, 2215
    # .cuda(): tensor_parallel/data.py:84, grad_scaler.py:140, exchange_utils.py:336,499
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _replace_generators() -> None:
    from megatron.core.tensor_parallel import random

    # random.py:41, 75 reach into torch.cuda.default_generators
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # random.py:275 warns each time the "GPU" generator moved the CPU one: here they are one
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
