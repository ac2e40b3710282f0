"""The sequences of a run: what stands at each position of its order, out of one data set or several, and its cuts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from comet_megatron.chunking import next_token_labels
from comet_megatron.data.cuts import CutPlan
from comet_megatron.data.dataset import Samples
from comet_megatron.data.mixture import BLOCK, Mixture
from comet_megatron.data.packing import Packs


@dataclass(frozen=True)
class TrainingSequence:
    """One document, read from its beginning: memory, attention and positions start afresh with it.

    Attributes:
        ids: int32 [tokens].
        labels: next-token labels, int64 [tokens]; tokens without loss are no labels.
        chunk_lengths: text tokens of each chunk; None: full chunks.
        stride: text tokens per beacon; None: the model's.
    """

    ids: np.ndarray
    labels: np.ndarray
    chunk_lengths: tuple[int, ...] | None = None
    stride: int | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Place:
    """A document of a sequence."""

    source: int
    epoch: int
    sample: int


class TrainingData:
    """Data sets, mixed by weights. May be pickled, for processes that read ahead.

    Args:
        datasets: at least one.
        weights: one each, above 0: shares of the sequences.
        seed: of the order, of the cuts and of which documents share a sequence.
        cuts: None: every document in full chunks.
        pack_tokens: documents share a sequence of at most so many tokens; 0: one document a sequence.

    Raises:
        ConfigError: weights that do not fit.
    """

    def __init__(
        self,
        datasets: Sequence[Samples],
        *,
        weights: Sequence[float] = (1.0,),
        seed: int,
        cuts: CutPlan | None = None,
        pack_tokens: int = 0,
    ) -> None:
        self.datasets, self.pack_tokens = tuple(datasets), pack_tokens
        self.packs = [Packs(d.lengths, limit=pack_tokens, seed=seed) for d in datasets] if pack_tokens else None
        self.mixture = Mixture(tuple(len(d) for d in self.packs or datasets), tuple(weights), seed)
        self.cuts = None if cuts is None or cuts.is_fixed else cuts

    def __len__(self) -> int:
        """Sequences of an epoch of all data sets."""
        return sum(self.mixture.lengths)

    @property
    def num_documents(self) -> int:
        """Of all data sets."""
        return sum(len(dataset) for dataset in self.datasets)

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return sum(int(dataset.lengths.sum()) for dataset in self.datasets)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(int(dataset.lengths.max()) for dataset in self.datasets)

    @property
    def fingerprint(self) -> str:
        """Of what is read, in which proportions, how packed and how cut; the data set's where there is no more."""
        if len(self.datasets) == 1 and self.cuts is None and not self.pack_tokens:
            return self.datasets[0].fingerprint
        shares = zip(self.datasets, self.mixture.shares, strict=True)
        parts = [f"{dataset.fingerprint}:{share}" for dataset, share in shares]
        if self.cuts is not None:
            parts.append(f"cut {sorted(self.cuts.ways.items())} max_stride {self.cuts.max_stride}")
        if self.pack_tokens:
            parts.append(f"pack {self.pack_tokens}")
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def describe(self) -> str:
        """Where it lies, for the user."""
        if len(self.datasets) == 1:
            return self.datasets[0].place
        parts = zip(self.datasets, self.mixture.shares, strict=True)
        return " + ".join(f"{share / BLOCK:.2%} {dataset.place}" for dataset, share in parts)

    def at(self, position: int) -> list[TrainingSequence]:
        """The documents of the sequence at a position, counted since the start of training over all ranks.

        Raises:
            DataError: a shard is damaged.
        """
        return [read() for read in self.readers_at(position)]

    def readers_at(self, position: int) -> list[Callable[[], TrainingSequence]]:
        """One for each of those documents, to be read one by one: another may be damaged."""
        return [partial(self._read, place) for place in self._places(position)]

    def lengths_at(self, position: int) -> list[int]:
        """Tokens of those documents; nothing is read."""
        return [int(self.datasets[place.source].lengths[place.sample]) for place in self._places(position)]

    def _places(self, position: int) -> list[_Place]:
        source, epoch, number = self.mixture.at(position)
        samples = [number] if self.packs is None else self.packs[source][number]
        return [_Place(source, epoch, sample) for sample in samples]

    def _read(self, place: _Place) -> TrainingSequence:
        sequence = sequence_of(self.datasets[place.source], place.sample)
        if self.cuts is None:
            return sequence
        # Data sets have samples of the same numbers: what is drawn for them must differ.
        number = place.sample * len(self.datasets) + place.source
        cuts = self.cuts.cut(sequence.ids, epoch=place.epoch, sample=number)
        return TrainingSequence(sequence.ids, sequence.labels, cuts.lengths, cuts.stride)


def sequence_of(dataset: Samples, sample: int) -> TrainingSequence:
    """A sample in full chunks.

    Raises:
        DataError: a shard is damaged.
    """
    ids = dataset[sample]
    return TrainingSequence(ids, next_token_labels(ids, dataset.loss_mask(sample)))
