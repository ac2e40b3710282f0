"""What a recipe needs of the GPUs: one for each process, with roughly so much memory."""

from __future__ import annotations

from comet_megatron.errors import ConfigError
from comet_megatron.parallel.process import ProcessRank
from comet_megatron.planning.memory import Parameters, state_bytes

GB = 1e9


def state_gb(parameters: float, *, model_parallel: int, data_parallel: int = 1) -> float:
    """GB a GPU holds of weights, gradients and optimizer state in bf16 with ZeRO-1, if all hold the same share."""
    share = round(parameters / model_parallel)
    return state_bytes(Parameters(all=share, trained=share), precision="bf16", dp=data_parallel).total / GB


def describe_need(parameters: float, *, tp: int, pp: int, processes: int) -> str:
    """The estimate for this layout."""
    each = state_gb(parameters, model_parallel=tp * pp, data_parallel=max(processes // (tp * pp), 1))
    return f"about {each:.0f} GB of each GPU, and activations"


def advise(parameters: float, *, chunks: int, tiny: str) -> str:
    """What the recipe needs, for a user whose machine has too little.

    Args:
        chunks: of a full sequence.
        tiny: the recipe that needs no GPU.
    """
    shares = ", ".join(f"{state_gb(parameters, model_parallel=n):.0f} GB on {n}" for n in (1, 2, 4, 8))
    return (
        f"roughly, {parameters / 1e9:.1f} billion weights with gradients and optimizer state take, of each GPU,\n"
        f"  {shares}; beside them it holds the activations of one chunk and\n"
        f"  the memories of {chunks}. Start no more processes than GPUs. The same length on CPU, with a tiny model:\n"
        f"  CONFIG={tiny}"
    )


def check_gpus(process: ProcessRank, *, advice: str = "") -> list[ConfigError]:
    """This machine has a GPU for each of its processes. Initialises no device."""
    import torch

    found, wanted = torch.cuda.device_count(), process.local_world_size
    if found >= wanted:
        return []
    sees = "none" if found == 0 else str(found)
    what = f"the recipe needs a GPU for each process, {wanted} on this machine, and torch sees {sees}"
    return [ConfigError(what, way_out=advice)]
