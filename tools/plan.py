"""Plan training before it runs: who holds which layers, how long stages wait, bytes of each rank; or the best layouts.

python tools/plan.py --config FILE                            the first step's sequences, from data.train
python tools/plan.py --config FILE --tokens 131072 131072     sequences of these lengths in a step of one pipeline
python tools/plan.py --config FILE --tokens 131072 --timeline diagonal.png parallel.pp=8 train.recompute=full
python tools/plan.py --advise --model qwen3-8b --tokens 131072 --sequences 8 --gpus 8 --gpu h100
python tools/plan.py --recipes                                the tables of docs/scaling.md

No weights are read: only model.json of model.path, or of model.init_from its config, tokenizer and the weights' names;
or the published sizes of a model (--model). Nothing is started. Without --advise times are FLOPs, simulated with the
op lists that training runs; with it seconds, from a roofline of published GPU figures (docs/planning.md): what a
machine makes of them is measured, not planned.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from comet_megatron.checkpoint.model_folder import ModelDescription
from comet_megatron.checkpoint.start import open_start
from comet_megatron.config.load import LoadedConfig, load_config
from comet_megatron.config.rules import check_config, check_layout, check_start, require
from comet_megatron.config.schema import REQUIRED, Architecture, Config, MemorySizes
from comet_megatron.data.cuts import Cuts
from comet_megatron.data.dataset import ShardDataset, joined
from comet_megatron.data.sampler import plan_positions
from comet_megatron.data.sources import TRAIN, find_source
from comet_megatron.data.training_data import TrainingData
from comet_megatron.errors import CometError, ConfigError, DataError, OutputError, report_user_errors
from comet_megatron.new_folder import make_folder
from comet_megatron.parallel.timeline import draw_timeline, write_chrome_trace
from comet_megatron.planning.advice import describe_advice
from comet_megatron.planning.advise import Question, advise
from comet_megatron.planning.balance import describe_split
from comet_megatron.planning.cutting import Cutting
from comet_megatron.planning.devices import GPUS, find_gpu
from comet_megatron.planning.recipes import recipe_tables
from comet_megatron.planning.report import PipelineReport, check_sequences, plan_pipeline
from comet_megatron.planning.shapes import BACKBONES, named_shape
from comet_megatron.planning.time import Efficiency
from comet_megatron.planning.told import aligned, counted, listed, scaled, size, unit_of

NOT_GIVEN = "(not given)"
# A plan does without these: what stands in for them where the file gives no value.
MOST_TOKENS = 100_000_000
MOST = {"gpus": 1_000_000, "best": 1000, "sequences": 10_000_000, "memory_gib": 1_000_000}  # what is no slip of the pen
STAND_INS = {"train.output": NOT_GIVEN, "train.steps": "1000000", "data.train": NOT_GIVEN, "data.eval": NOT_GIVEN}
UNIT_OF_TIME = "one layer's forward of a full chunk"
GIVE_TOKENS = "state the lengths of a step's sequences: --tokens 131072 131072"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file (examples/configs/)")
    parser.add_argument(
        "--tokens", nargs="+", default=[], metavar="N", help="length of each sequence of a step of one pipeline"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="of the run (parallel.tp * parallel.pp)")
    parser.add_argument(
        "--timeline", type=Path, metavar="FILE", help="draw the simulated step: .png, or .json for ui.perfetto.dev"
    )
    parser.add_argument("--recipes", action="store_true", help="print the tables of docs/scaling.md")
    advice = parser.add_argument_group("the best layouts of a number of GPUs")
    advice.add_argument("--advise", action="store_true", help="look at every layout")
    advice.add_argument(
        "--model", metavar="NAME", help=f"a checkpoint, a Hugging Face folder, or one of {', '.join(BACKBONES)}"
    )
    advice.add_argument("--sequences", type=int, metavar="N", help="of a step (train.global_batch_size)")
    advice.add_argument("--gpus", type=int, default=8, metavar="N", help="8 if not given")
    advice.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(GPUS)}; h100 if not given")
    advice.add_argument("--memory-gib", type=float, metavar="G", help="of one GPU; that of its kind if not given")
    advice.add_argument("--best", type=int, default=3, metavar="N", help="layouts that are told; 3 if not given")
    advice.add_argument(
        "--efficiency",
        default="",
        metavar="gemm=S,...",
        help="shares of published peaks, not those assumed",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    given = parser.parse_intermixed_args(arguments)
    # argparse gives all words after --tokens to it, the settings too.
    given.overrides += [word for word in given.tokens if "=" in word]
    given.tokens = [word for word in given.tokens if "=" not in word]
    return given


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = parse_arguments(arguments)
    if given.recipes:
        print("\n".join(recipe_tables()))
        return 0
    stated = read_lengths(given.tokens)
    if given.advise:
        print("\n".join(advise_on(given, stated)))
        return 0
    if given.config is None:
        raise ConfigError("--config FILE is missing", way_out="give one, or --advise with --model")
    if given.timeline and given.timeline.suffix not in (".png", ".json"):
        raise ConfigError(f"--timeline {given.timeline} is neither a .png nor a .json file")
    loaded = load_config(given.config, [*stand_ins(given.config), *given.overrides])
    config = loaded.config
    processes = config.parallel.tp * config.parallel.pp if given.processes is None else given.processes
    if given.processes is not None and processes < 1:
        raise ConfigError(f"--processes {processes} must be 1 or more")
    description = check(loaded, processes=processes)
    dp = processes // (config.parallel.tp * config.parallel.pp)
    cutting, memory = Cutting.of(config.data), description.memory
    lengths, longest = (stated, max(stated)) if stated else first_batch(config, dp=dp)
    report = plan_pipeline(
        config,
        description.architecture,
        memory,
        lengths,
        longest=longest,
        dp=dp,
        cuts=draw_cuts(cutting, memory, lengths, seed=config.data.seed) if cutting.draws(memory) else None,
        cutting=cutting,
    )
    print("\n".join(describe(report, config, description, processes=processes, dp=dp)))
    if given.timeline:
        write_timeline(report, given.timeline)
    return 0


def read_lengths(words: Sequence[str]) -> list[int]:
    """--tokens as numbers.

    Raises:
        ConfigError: a word is no whole number, or a sequence has nothing to train on.
    """
    try:
        lengths = [int(word) for word in words]
    except ValueError:
        raise ConfigError(f"--tokens {' '.join(words)}: a length is a whole number", way_out=GIVE_TOKENS) from None
    if lengths:
        check_sequences(lengths)
        if max(lengths) > MOST_TOKENS:
            raise ConfigError(f"--tokens {max(lengths)} is more than the {MOST_TOKENS:,} that are planned")
    return lengths


def advise_on(given: argparse.Namespace, lengths: Sequence[int]) -> list[str]:
    """The best layouts, in lines.

    Raises:
        ConfigError: the model, the GPUs or the sequences are missing or wrong.
    """
    if len(lengths) != 1:
        what = f"--advise plans sequences of one length, and --tokens gives {len(lengths) or 'none'}"
        raise ConfigError(what, way_out="state one: --tokens 131072")
    for name in ("gpus", "best", "sequences", "memory_gib"):
        value = getattr(given, name)
        if value is not None and not 0 < value <= MOST[name]:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be above 0 and at most {MOST[name]:,}")
    config, (architecture, memory), model = read_model(given)
    gpu = find_gpu(given.gpu)
    if config.model.precision == "fp8" and not gpu.fp8_flops:
        raise ConfigError(f"model.precision=fp8, and {gpu.name} has no FP8", way_out="use model.precision=bf16")
    question = Question(
        architecture,
        memory,
        tokens=lengths[0],
        sequences=given.sequences or config.train.global_batch_size,
        num_gpus=given.gpus,
        gpu=gpu,
        memory_bytes=gpu.memory_bytes if given.memory_gib is None else int(given.memory_gib * 2**30),
        precision=config.model.precision,
        trainable=config.train.trainable,
        slice_tokens=config.train.loss_slice_tokens,
        slack=config.parallel.slack,
        efficiency=Efficiency.parse(given.efficiency),
    )
    return describe_advice(question, advise(question, best=given.best), model=model)


def read_model(given: argparse.Namespace) -> tuple[Config, tuple[Architecture, MemorySizes], str]:
    """Settings, sizes and name of the model that --model or --config names; bf16 unless the settings say otherwise."""
    if given.model is None and given.config is None:
        raise ConfigError("--advise needs a model", way_out=f"give --config FILE, or --model {', '.join(BACKBONES)}")
    named = given.model is not None and given.model.lower() in BACKBONES
    words = stand_ins(given.config) if given.config else [f"{key}={value}" for key, value in STAND_INS.items()]
    if given.model is not None:
        is_hf = (Path(given.model) / "config.json").exists()
        words.append(f"model.init_from=hf:{given.model}" if is_hf else f"model.path={given.model}")
    with tempfile.TemporaryDirectory() as folder:
        path = given.config or Path(folder) / "settings.yaml"
        if not given.config:
            path.write_text("model: {precision: bf16}")
        loaded = load_config(path, [*words, *given.overrides])
    require(check_config(loaded.config, where=loaded.where))
    if named:
        return loaded.config, named_shape(given.model), given.model
    if given.model is not None and not Path(given.model).exists():
        known = ", ".join(BACKBONES)
        raise ConfigError(f"--model {given.model} is no folder", way_out=f"give one, or one of {known}")
    description = open_start(loaded.config).description
    return loaded.config, (description.architecture, description.memory), given.model or str(given.config)


def stand_ins(path: Path) -> list[str]:
    """Overrides for what a plan does without and the file leaves open. What is wrong with it, load_config tells."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    found = []
    for key, value in STAND_INS.items():
        section, _, name = key.partition(".")
        default = getattr(getattr(Config(), section), name)
        inner = content.get(section) if isinstance(content, dict) else None
        if (inner.get(name, default) if isinstance(inner, dict) else default) in (REQUIRED, ""):
            found.append(f"{key}={value}")
    return found


def check(loaded: LoadedConfig, *, processes: int) -> ModelDescription:
    """The model.

    Raises:
        ConfigError: all problems of the configuration, the model and the layout together.
    """
    config, where = loaded.config, loaded.where
    problems: list[CometError] = list(check_config(config, where=where))
    description = None
    try:
        if not check_start(config, where):
            description = open_start(config).description
            problems += check_layout(
                config, description.architecture, description.memory, world_size=processes, where=where
            )
    except CometError as error:
        problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    require(problems)
    assert description is not None
    return description


def first_batch(config: Config, *, dp: int) -> tuple[list[int], int]:
    """Text tokens of the sequences of the first step on the first data-parallel rank, and of the longest of all steps.

    Sequences without a label are left out, as in training.

    Raises:
        ConfigError: the data are not there.
    """
    if config.data.train == NOT_GIVEN:
        raise ConfigError("data.train has no value, so the sequences of a step are not known", way_out=GIVE_TOKENS)
    try:
        data = open_shards(config)
    except DataError as error:
        what = f"the sequences of a step are not known: {error.what}"
        raise ConfigError(what, where=error.where, way_out=GIVE_TOKENS) from error
    positions = plan_positions(0, global_batch_size=config.train.global_batch_size, dp_rank=0, dp_size=dp)
    lengths = [length for position in positions for length in data.lengths_at(position)]
    return [length for length in lengths if length > 1], data.longest


def open_shards(config: Config) -> TrainingData:
    """The data of training; only indexes are read.

    Raises:
        DataError: they are not there, or not prepared yet.
    """
    datasets, weights = [], []
    for place, weight in config.data.sources:
        source = find_source(place, part=TRAIN, key="data.train")
        if source.texts is not None:
            raise DataError(f"data.train={place} is JSONL, whose tokens are not counted before the run has prepared it")
        datasets.append(joined([ShardDataset(folder) for folder in source.shards], place=place))
        weights.append(weight)
    return TrainingData(datasets, weights=weights, seed=config.data.seed, pack_tokens=config.data.pack_tokens)


def draw_cuts(cutting: Cutting, memory: MemorySizes, lengths: Sequence[int], *, seed: int) -> list[Cuts]:
    """One draw of each sequence's cuts, as training draws them; without the texts no sentence ends are known."""
    plan = cutting.plan(memory, seed=seed)
    return [plan.cut(np.zeros(count, dtype=np.int64), epoch=0, sample=n) for n, count in enumerate(lengths)]


def write_timeline(report: PipelineReport, path: Path) -> None:
    """The simulated step as a picture or as a trace."""
    make_folder(path.parent)
    told = f"timeline {path}"
    try:
        if path.suffix == ".json":
            write_chrome_trace(report.timeline, path, seconds_per_unit=1e-3)
            told += f": open it at ui.perfetto.dev; a millisecond stands for {UNIT_OF_TIME}"
        else:
            stages, sequences = counted(len(report.stages), "stage"), counted(len(report.chunks), "sequence")
            title = f"A step of {sequences} on {stages}, simulated"
            draw_timeline(report.timeline, path, title=title, time_label=f"time ({UNIT_OF_TIME} = 1)")
    except OSError as error:
        raise OutputError(f"the timeline cannot be written: {error.strerror or error}", where=str(path)) from error
    print(told)


# --- what is told ----------------------------------------------------------------------------------------------------


def describe(
    report: PipelineReport, config: Config, description: ModelDescription, *, processes: int, dp: int
) -> list[str]:
    """The plan in lines."""
    return [
        *_describe_run(config, description, processes=processes, dp=dp),
        *_describe_schedule(report, config),
        "",
        *_stage_table(report, config),
        "",
        *_remarks(report, config),
    ]


def _describe_run(config: Config, description: ModelDescription, *, processes: int, dp: int) -> list[str]:
    architecture, memory, parallel = description.architecture, description.memory, config.parallel
    temporary = f"a beacon every {memory.stride} tokens, budget {memory.budget}" if memory.stride > 0 else "no beacons"
    tensor = f"TP {parallel.tp}{' with sequence parallelism' if parallel.sequence_parallel else ''}"
    return [
        f"model    {config.model.path or config.model.init_from}: {architecture.family}, "
        f"{counted(architecture.num_layers, 'layer')}, "
        f"hidden {architecture.hidden_size}, vocabulary {architecture.vocab_size}",
        f"memory   chunks of {memory.chunk_size} tokens, {memory.global_slots} global slots, {temporary}",
        f"layout   {counted(processes, 'process')}: {tensor}, PP {parallel.pp}, DP {dp}"
        f"{', ZeRO-1' if parallel.zero1 else ''}; {config.model.precision}, recompute {config.train.recompute}",
    ]


def _describe_schedule(report: PipelineReport, config: Config) -> list[str]:
    chunks = counted(sum(report.chunks), "chunk")
    if len(report.chunks) > 1:
        chunks += f" ({listed(report.chunks, ' + ')})"
    lines = [
        describe_split(report.layers_per_stage, report.costs, setting=config.parallel.layers_per_stage),
        f"step     {counted(len(report.tokens), 'sequence')}, {sum(report.tokens):,} tokens: {chunks}",
    ]
    if report.links:
        unequal = 1 - 1 / max(stage.share_of_work for stage in report.stages)
        longer = report.whole_sequences.makespan / report.timeline.makespan
        lines += [
            f"schedule slack {config.parallel.slack}: bubble {report.timeline.bubble:.1%}, of which "
            f"{unequal:.1%} as stages' work is unequal; {report.efficiency:.1%} as fast as the lower bound",
            f"         1F1B of whole sequences: bubble {report.whole_sequences.bubble:.1%}, "
            f"a step {longer:.2f} times as long",
            f"links    {report.links}, each carries {counted(report.messages, 'message')}, {size(report.link_bytes)} "
            f"in a step each way{', on each TP rank' if config.parallel.tp > 1 else ''}",
        ]
    return lines


def _stage_table(report: PipelineReport, config: Config) -> list[str]:
    """Aligned columns, one line a stage; bytes in one unit."""
    kept = "checkpoints" if config.train.recompute == "full" else "graphs"
    unit = unit_of(max(stage.bytes.total for stage in report.stages))
    counted_bytes = ("weights", "gradients", "optimizer", kept, "in work", "buffers", "in all")
    rows = [["stage", "layers", "weights M", "work", "live chunks", *(f"{what} {unit}" for what in counted_bytes)]]
    for number, stage in enumerate(report.stages):
        needs = stage.bytes
        columns = (needs.weights, needs.gradients, needs.optimizer, needs.chunks, needs.in_work, needs.buffers)
        row = [
            str(number),
            f"{len(stage.layers)} ({stage.layers.start}-{stage.layers.stop - 1})",
            f"{stage.parameters.all / 1e6:,.1f}",
            f"{stage.share_of_work:.2f}",
            str(stage.live_chunks),
            *(scaled(count, unit) for count in (*columns, needs.total)),
        ]
        rows.append(row)
    return aligned(rows)


def _remarks(report: PipelineReport, config: Config) -> list[str]:
    """What the table counts and what not."""
    lines = [
        "Bytes are of one rank, where a step needs most (docs/planning.md). Not counted: interpreter and libraries, a",
        "GPU's context, a checkpoint being written, what an allocator loses between tensors.",
    ]
    if config.train.recompute != "full":
        most = max(stage.checkpoint_bytes for stage in report.stages)
        lines.append(
            "Without recomputation each live chunk keeps its whole graph; "
            f"train.recompute=full would keep {size(most)} of them at most, and one graph."
        )
    if report.cuts_are_drawn:
        lines.append(
            f"Cuts are drawn (data.chunks={config.data.chunks}, data.max_stride={config.data.max_stride}): layers are "
            "split by expected costs, times are of one draw, bytes of the worst."
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
