"""The data of a run: found, prepared where it is not yet, opened, and held against the model and the run's past."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from comet_megatron.checkpoint.start import Start
from comet_megatron.config.schema import Config
from comet_megatron.data.cuts import CutPlan, parse_ways, sentence_end_ids
from comet_megatron.data.dataset import Samples, ShardDataset, joined
from comet_megatron.data.first_use import prepare_source, prepared_folder, settings_of, shards_in
from comet_megatron.data.sources import EVAL, TRAIN, Source, find_source
from comet_megatron.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from comet_megatron.data.training_data import TrainingData
from comet_megatron.errors import DataError
from comet_megatron.parallel.hand_over import HandOver, await_folders
from comet_megatron.parallel.process import ProcessRank


@dataclass(frozen=True)
class RunSources:
    """What a configuration names, as it was found."""

    train: tuple[Source, ...]
    held_out: Source | None

    @property
    def all(self) -> tuple[Source, ...]:
        return (*self.train, *([self.held_out] if self.held_out else []))

    @property
    def have_texts(self) -> bool:
        """Shards have to be there or to be made before they can be opened."""
        return any(source.texts is not None for source in self.all)


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        held_out: None: no evaluation.
        workers: processes of each rank that read ahead.
        bad_rows: of JSONL, that were left out; known to the first process.
    """

    train: TrainingData
    held_out: Samples | None
    workers: int = 0
    bad_rows: int = 0


def find_data(config: Config) -> RunSources:
    """
    Raises:
        DataError: a place holds no data.
    """
    train = [find_source(place, part=TRAIN, key="data.train", weight=w) for place, w in config.data.sources]
    evaluates = config.data.eval and config.train.eval_every
    return RunSources(tuple(train), find_source(config.data.eval, part=EVAL, key="data.eval") if evaluates else None)


def open_data(
    config: Config, start: Start, sources: RunSources, process: ProcessRank, hand_over: HandOver | None
) -> RunData:
    """Training and held-out data; JSONL is made into shards by the first process, for which the others wait.

    Args:
        hand_over: where there are texts and several processes.

    Raises:
        DataError: missing or damaged data, or shards made with another tokenizer than the model's.
        ConfigError: data.chunks names no way of cutting.
        PeerError: the process that prepares is gone.
    """
    cuts, own = plan_cuts(config, start), cache(lambda: tokenizer_fingerprint(load_tokenizer(start.tokenizer)))
    folders, bad_rows = _prepare_together(sources.all, config, start, process, hand_over)
    workers = config.data.workers
    if workers == "auto":
        workers = int(any(source.is_remote for source in sources.train))
    return RunData(
        TrainingData(
            [_open(source, folders, start, own) for source in sources.train],
            weights=[source.weight for source in sources.train],
            seed=config.data.seed,
            cuts=cuts,
            pack_tokens=config.data.pack_tokens,
        ),
        _open(sources.held_out, folders, start, own) if sources.held_out else None,
        int(workers),
        bad_rows,
    )


def _open(source: Source, folders: dict[Source, str], start: Start, own: Callable[[], str]) -> Samples:
    found = [ShardDataset(folder) for folder in (source.shards or (folders[source],))]
    for dataset in found:
        check_fits(dataset, source.key, start, own)
    return joined(found, place=source.place)


def _prepare_together(
    sources: Sequence[Source], config: Config, start: Start, process: ProcessRank, hand_over: HandOver | None
) -> tuple[dict[Source, str], int]:
    """The folders of shards of all sources that are texts, made where they are not there yet; bad rows left out."""
    texts = [source for source in sources if source.texts is not None]
    if not texts:
        return {}, 0
    tokenizer, settings = load_tokenizer(start.tokenizer), settings_of(config.data)
    memory = start.description.memory
    # Where text ids lie among the memory's, a model's text may have these too.
    ids = memory.memory_ids if set(memory.new_ids) == set(memory.memory_ids) else ()
    reserved = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in ids}
    folders = {s: prepared_folder(s, run=config.train.output, tokenizer=tokenizer, settings=settings) for s in texts}
    if hand_over is not None and process.rank > 0:
        try:
            say = _say if process.local_rank == 0 else (lambda text: None)
            if hand_over.wait(say, what_for="process 0, which prepares data") is None:
                raise DataError("process 0 could not prepare the data", way_out="its message says why")
        finally:
            hand_over.take_back(readers=process.world_size)
        await_folders(
            [str(folder) for folder in folders.values()], settings="data.train and the parent of train.output"
        )
        return {source: shards_in(folder) for source, folder in folders.items()}, 0
    bad_rows = 0
    try:
        for source, folder in folders.items():
            bad_rows += prepare_source(
                source, folder, tokenizer=tokenizer, settings=settings, reserved=reserved, say=_say
            )
    except BaseException:
        if hand_over is not None:
            hand_over.give_up()
            hand_over.take_back(readers=process.world_size, wait_s=10)
        raise
    if hand_over is not None:
        hand_over.tell(True)
        hand_over.take_back(readers=process.world_size)
    return {source: shards_in(folder) for source, folder in folders.items()}, bad_rows


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


def check_fits(data: ShardDataset, key: str, start: Start, own: Callable[[], str]) -> None:
    """
    Args:
        own: the fingerprint of the start's tokenizer, made only when it is asked for.

    Raises:
        DataError: no samples, or ids that another tokenizer than the model's made.
    """
    again = "prepare the data again with the model's tokenizer (tools/prepare_data.py)"
    if len(data) == 0:
        raise DataError(f"{key}={data.place} holds no samples", way_out=again)
    made_with, description = data.manifest.tokenizer_fingerprint, start.description
    # The checkpoint's own tokenizer has CoMeT's tokens too; it makes the same text ids.
    if made_with != description.text_tokenizer and made_with != own():
        raise DataError(
            f"{key}={data.place} was made with another tokenizer of {data.manifest.vocab_size} ids, "
            f"the model's text has {description.memory.first_new_id}",
            way_out=again,
        )
