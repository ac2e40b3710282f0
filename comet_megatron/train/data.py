"""The data of a run: found, prepared where it is not yet, opened, and held against the model and the run's past."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from comet_megatron.checkpoint.start import Start
from comet_megatron.config.schema import Config
from comet_megatron.data.cuts import CutPlan, parse_ways, sentence_end_ids
from comet_megatron.data.dataset import Samples, ShardDataset, joined
from comet_megatron.data.first_use import prepare_source, prepared_folder, shards_in
from comet_megatron.data.prepare import PrepareSettings
from comet_megatron.data.sources import EVAL, TRAIN, Source, find_source
from comet_megatron.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from comet_megatron.data.training_data import TrainingData
from comet_megatron.errors import DataError
from comet_megatron.parallel.hand_over import HandOver
from comet_megatron.parallel.process import ProcessRank


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        held_out: None: no evaluation.
        workers: processes of each rank that read ahead.
    """

    train: TrainingData
    held_out: Samples | None
    workers: int = 0


def open_data(config: Config, start: Start, process: ProcessRank) -> RunData:
    """Training and held-out data; JSONL is made into shards by the first process, for which the others wait.

    Raises:
        DataError: missing or damaged data, or shards made with another tokenizer than the model's.
        ConfigError: data.chunks names no way of cutting.
        PeerError: the process that prepares is gone.
    """
    cuts = plan_cuts(config, start)
    train = [find_source(place, part=TRAIN, key="data.train", weight=w) for place, w in config.data.sources]
    held_out = []
    if config.data.eval and config.train.eval_every:
        held_out = [find_source(config.data.eval, part=EVAL, key="data.eval")]
    folders = _prepare_together([*train, *held_out], config, start, process)
    workers = config.data.workers
    if workers == "auto":
        workers = int(any(source.is_remote for source in train))
    return RunData(
        TrainingData(
            [_open(source, folders, start) for source in train],
            weights=[source.weight for source in train],
            seed=config.data.seed,
            cuts=cuts,
            pack_tokens=config.data.pack_tokens,
        ),
        _open(held_out[0], folders, start) if held_out else None,
        int(workers),
    )


def _open(source: Source, folders: dict[Source, str], start: Start) -> Samples:
    found = [ShardDataset(folder) for folder in (source.shards or (folders[source],))]
    for dataset in found:
        check_fits(dataset, source.key, start)
    return joined(found, place=source.place)


def _prepare_together(
    sources: Sequence[Source], config: Config, start: Start, process: ProcessRank
) -> dict[Source, str]:
    """The folders of shards of all sources that are texts, made where they are not there yet."""
    texts = [source for source in sources if source.texts is not None]
    if not texts:
        return {}
    tokenizer = load_tokenizer(start.tokenizer)
    settings = PrepareSettings(
        sequence_length=config.data.sequence_length, eval_fraction=0, on_bad_sample=config.data.on_bad_sample
    )
    run = Path(config.train.output)
    folders = {s: prepared_folder(s, run=run, tokenizer=tokenizer, settings=settings) for s in texts}

    def prepare() -> None:
        for source, folder in folders.items():
            prepare_source(source, folder, tokenizer=tokenizer, settings=settings, say=_say)

    if process.world_size == 1:
        prepare()
    else:
        _by_the_first(prepare, process)
    return {source: shards_in(folder) for source, folder in folders.items()}


def _by_the_first(prepare: Callable[[], None], process: ProcessRank) -> None:
    """Let the first process do it while the others wait."""
    hand_over = HandOver("data")
    try:
        if process.rank > 0:
            if hand_over.wait(lambda text: None, what_for="process 0, which prepares data") is None:
                raise DataError("process 0 could not prepare the data", way_out="its message says why")
            return
        try:
            prepare()
        except BaseException:
            hand_over.give_up()
            raise
        hand_over.tell(True)
    finally:
        hand_over.take_back(readers=process.world_size)


def _say(text: str) -> None:
    sys.stdout.write(f"data     {text}\n")
    sys.stdout.flush()


def plan_cuts(config: Config, start: Start) -> CutPlan:
    """How the run's sequences are cut into chunks.

    Raises:
        ConfigError: data.chunks names no way of cutting.
    """
    ways, memory = parse_ways(config.data.chunks), start.description.memory
    ends = sentence_end_ids(load_tokenizer(start.tokenizer)) if "sentence" in ways else frozenset()
    return CutPlan(ways, memory.chunk_size, memory.stride, config.data.seed, config.data.max_stride, ends)


def check_fits(data: ShardDataset, key: str, start: Start) -> None:
    """
    Raises:
        DataError: no samples, or ids that another tokenizer than the model's made.
    """
    again = "prepare the data again with the model's tokenizer (tools/prepare_data.py)"
    if len(data) == 0:
        raise DataError(f"{key}={data.place} holds no samples", way_out=again)
    made_with, description = data.manifest.tokenizer_fingerprint, start.description
    # The checkpoint's own tokenizer has CoMeT's tokens too; it makes the same text ids.
    if made_with != description.text_tokenizer and made_with != tokenizer_fingerprint(load_tokenizer(start.tokenizer)):
        raise DataError(
            f"{key}={data.place} was made with another tokenizer of {data.manifest.vocab_size} ids, "
            f"the model's text has {description.memory.first_new_id}",
            way_out=again,
        )
