"""Silence the warnings of libraries that a user cannot act on, before those libraries are imported."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Hide warnings and progress bars of torch, Megatron-Core and transformers; errors stay."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("megatron", "torch.distributed.run", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
