"""The sequences of a run: what stands at each position of its order, out of one data set or several, and its cuts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from comet_megatron.chunking import next_token_labels
from comet_megatron.data.cuts import CutPlan
from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.mixture import Mixture


@dataclass(frozen=True)
class TrainingSequence:
    """One sequence.

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


class TrainingData:
    """Data sets, mixed by weights.

    Args:
        datasets: folders of shards.
        weights: one each, above 0.
        seed: of the order and of the cuts.
        cuts: None: every sequence in full chunks.

    Raises:
        ConfigError: weights that do not fit.
    """

    def __init__(
        self,
        datasets: Sequence[ShardDataset],
        *,
        weights: Sequence[float] = (1.0,),
        seed: int,
        cuts: CutPlan | None = None,
    ) -> None:
        self.datasets = tuple(datasets)
        self.mixture = Mixture(tuple(len(d) for d in datasets), tuple(weights), seed)
        self.cuts = None if cuts is None or cuts.is_fixed else cuts

    def __len__(self) -> int:
        """Samples of all data sets."""
        return sum(len(dataset) for dataset in self.datasets)

    @property
    def num_tokens(self) -> int:
        """Of all samples."""
        return sum(dataset.num_tokens for dataset in self.datasets)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(int(dataset.lengths.max()) for dataset in self.datasets)

    @property
    def fingerprint(self) -> str:
        """Of what is read, in which proportions and how it is cut; that of the data set where there is no more."""
        if len(self.datasets) == 1 and self.cuts is None:
            return self.datasets[0].manifest.fingerprint
        shares = zip(self.datasets, self.mixture.shares, strict=True)
        parts = [f"{dataset.manifest.fingerprint}:{share}" for dataset, share in shares]
        if self.cuts is not None:
            parts.append(f"cut {sorted(self.cuts.ways.items())} max_stride {self.cuts.max_stride}")
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def describe(self) -> str:
        """Where it lies, for the user."""
        if len(self.datasets) == 1:
            return str(self.datasets[0].place)
        total = sum(self.mixture.weights)
        parts = zip(self.datasets, self.mixture.weights, strict=True)
        return " + ".join(f"{weight / total:.1%} {dataset.place}" for dataset, weight in parts)

    def at(self, position: int) -> TrainingSequence:
        """The sequence at a position, counted since the start of training over all ranks.

        Raises:
            DataError: a shard is damaged.
        """
        source, epoch, sample = self.mixture.at(position)
        sequence = sequence_of(self.datasets[source], sample)
        if self.cuts is None:
            return sequence
        # Data sets have samples of the same numbers: what is drawn for them must differ.
        cuts = self.cuts.cut(sequence.ids, epoch=epoch, sample=sample * len(self.datasets) + source)
        return TrainingSequence(sequence.ids, sequence.labels, cuts.lengths, cuts.stride)


def sequence_of(dataset: ShardDataset, sample: int) -> TrainingSequence:
    """A sample in full chunks.

    Raises:
        DataError: a shard is damaged.
    """
    ids = dataset[sample]
    return TrainingSequence(ids, next_token_labels(ids, dataset.loss_mask(sample)))
