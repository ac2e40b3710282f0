"""An exported model with its tokenizer, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from comet_megatron.data.tokenizer import check_has_ids, load_tokenizer
from comet_megatron.errors import CheckpointError

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}
EXPORT_AGAIN = "export it again: python tools/convert_to_hf.py --checkpoint DIR --output DIR"


def load_model(folder: Path, *, dtype: str = "auto") -> tuple[Any, Any]:
    """The model, on the GPU if there is one, and the tokenizer. Runs the code in the folder; reads safetensors only.

    Args:
        dtype: auto (as stored) | fp32 | bf16.

    Raises:
        CheckpointError, DataError: the folder holds no CoMeT model, a damaged one, or a tokenizer that does not fit.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is no exported model: it has no config.json",
            way_out="export one: python tools/convert_to_hf.py --checkpoint DIR --output DIR",
        )
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, use_safetensors=True, dtype=DTYPES[dtype]
        ).eval()
    except Exception as error:  # whatever is wrong in the folder, transformers has an exception of its own for it
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the model cannot be loaded: {type(error).__name__} {reason}", where=str(folder), way_out=EXPORT_AGAIN
        ) from error
    if model.config.model_type != "comet":
        raise CheckpointError(
            f"the folder holds a {model.config.model_type} model, not a CoMeT model",
            where=str(folder),
            way_out="import it first: python tools/convert_from_hf.py --hf DIR --output DIR",
        )
    check_has_ids(tokenizer, model.config.memory_token_ids, where=str(folder))
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
