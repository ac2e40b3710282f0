"""Whether a run fits the memory that is there, and what would, before anything is loaded. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from comet_megatron.config.schema import Architecture, Config, MemorySizes
from comet_megatron.errors import ConfigError
from comet_megatron.planning.advise import Question, advise
from comet_megatron.planning.cutting import Cutting
from comet_megatron.planning.devices import GPUS, Gpu, find_gpu
from comet_megatron.planning.footprint import RankBytes
from comet_megatron.planning.report import StageReport, plan_pipeline
from comet_megatron.planning.told import size

MORE = (2, 4, 8, 16, 32, 64)  # times as many GPUs that are looked at where no layout fits


def plan_run(
    config: Config,
    architecture: Architecture,
    memory: MemorySizes,
    *,
    longest: int,
    dp: int,
    on_cuda: bool,
) -> tuple[StageReport, ...]:
    """The stages of a run in a step that needs most: of the longest sequences. Two a pipeline keep as much as more do.

    Args:
        longest: text tokens of the longest sequence.
    """
    sequences = min(2, max(1, config.train.global_batch_size // dp))
    tokens = [max(longest, 2)] * sequences
    cutting = Cutting.of(config.data)
    report = plan_pipeline(
        config, architecture, memory, tokens, longest=tokens[0], dp=dp, cutting=cutting, on_cuda=on_cuda
    )
    return report.stages


def neediest(stages: Sequence[StageReport]) -> tuple[int, RankBytes]:
    """Number of the stage that needs most, and its bytes."""
    return max(((number, stage.bytes) for number, stage in enumerate(stages)), key=lambda found: found[1].total)


def check_fits_device(
    stages: Sequence[StageReport], available_bytes: int, *, device: str, way_out: str = ""
) -> ConfigError | None:
    """The problem of a device that is too small; None where the plan fits.

    Args:
        available_bytes: free memory of the smallest device.
        device: what it is called.
        way_out: what would fit (`what_fits`).
    """
    number, needs = neediest(stages)
    if needs.total <= available_bytes:
        return None
    items = [(name, getattr(needs, name)) for name in ("weights", "gradients", "optimizer", "chunks", "buffers")]
    items.append(("chunk in work", needs.in_work))
    told = ", ".join(f"{name} {size(count)}" for name, count in items if count)
    where = f"stage {number}" if len(stages) > 1 else "a rank"
    what = f"{where} needs {size(needs.total)} and {device} has {size(available_bytes)} free: {told}"
    return ConfigError(what, way_out=way_out)


def what_fits(
    config: Config,
    architecture: Architecture,
    memory: MemorySizes,
    *,
    longest: int,
    world_size: int,
    available_bytes: int,
    gpu: str = "h100",
) -> str:
    """The first thing to change: recomputation if that is enough, else another layout, else more GPUs."""
    dp = world_size // (config.parallel.tp * config.parallel.pp)
    if config.train.recompute != "full":
        recomputed = replace(config, train=replace(config.train, recompute="full"))
        stages = plan_run(recomputed, architecture, memory, longest=longest, dp=dp, on_cuda=True)
        if (most := neediest(stages)[1].total) <= available_bytes:
            return f"train.recompute=full would need {size(most)}"
    question = Question(
        architecture,
        memory,
        tokens=max(longest, 2),
        sequences=config.train.global_batch_size,
        num_gpus=world_size,
        gpu=_kind(gpu),
        memory_bytes=available_bytes,
        precision=config.model.precision,
        trainable=config.train.trainable,
        slice_tokens=config.train.loss_slice_tokens,
        slack=config.parallel.slack,
    )
    if options := advise(question, best=1).options:
        return f"{options[0].layout.settings} would need {size(options[0].needs.total)}"
    for times in MORE:
        if options := advise(replace(question, num_gpus=times * world_size), best=1).options:
            more = f"{times * world_size} GPUs like this with {options[0].layout.settings}"
            return f"no layout of {world_size} fits; {more} would need {size(options[0].needs.total)} each"
    return "no layout fits, with no number of GPUs like this: use a smaller model, chunk_size or sequence"


def _kind(name: str) -> Gpu:
    """Of the table; another GPU's speed only orders the layouts."""
    try:
        return find_gpu(name)
    except ConfigError:
        return GPUS["h100"]
