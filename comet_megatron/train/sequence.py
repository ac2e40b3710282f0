"""One sequence through a model that is whole in this process: the executor with a single stage."""

from __future__ import annotations

import numpy as np

from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.executor import BackwardSettings, Executor, SequenceResult


def train_sequence(
    stage: CometStage, token_ids: np.ndarray, labels: np.ndarray, *, scale: float, settings: BackwardSettings
) -> SequenceResult:
    """Accumulate the gradient of `scale` * (summed loss) in the stage's parameters.

    Args:
        token_ids: [b, tokens], text ids.
        labels: [b, tokens], next-token labels (chunking.next_token_labels).
        scale: of the loss; 1 / labels makes it their mean.
    """
    executor = Executor({0: stage})
    return executor.train([executor.microbatch(token_ids, labels)], scale=scale, settings=settings)[0]


def evaluate_sequence(
    stage: CometStage, token_ids: np.ndarray, labels: np.ndarray, *, settings: BackwardSettings
) -> SequenceResult:
    """Losses of a sequence without gradients; memory and time as in `train_sequence`'s forward."""
    executor = Executor({0: stage})
    return executor.evaluate([executor.microbatch(token_ids, labels)], settings=settings)[0]
