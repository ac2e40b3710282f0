"""Silence the warnings of libraries that a user cannot act on, before those libraries are imported."""

from __future__ import annotations

import logging
import warnings

from comet_megatron.backend.environment import set_quiet


def quiet_libraries() -> None:
    """Hide warnings and progress bars of torch, Megatron-Core and transformers; errors stay."""
    warnings.filterwarnings("ignore")
    set_quiet()
    for name in ("megatron", "torch.distributed.run", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
