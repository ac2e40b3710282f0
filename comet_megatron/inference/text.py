"""Text to the ids that a model is fed."""

from __future__ import annotations

from typing import Any

from comet_megatron.errors import CheckpointError, DataError


def check_tokenizer(tokenizer: Any, config: Any, *, where: str = "") -> None:
    """Refuse a tokenizer that does not know the model's beacons as tokens of their own.

    Raises:
        CheckpointError: names the ids.
    """
    added = set(tokenizer.get_added_vocab().values())
    unknown = [i for i in config.memory_token_ids if i not in added]
    if unknown:
        raise CheckpointError(
            f"the tokenizer lacks the beacon tokens: {len(tokenizer)} tokens, and none of its added ones has the ids "
            f"{', '.join(map(str, unknown[:8]))}{' ...' if len(unknown) > 8 else ''}",
            where=where,
            way_out="use the tokenizer that tools/convert_to_hf.py wrote next to the model",
        )


def encode_text(tokenizer: Any, text: str, config: Any, *, add_special_tokens: bool) -> list[int]:
    """The ids of a text.

    Args:
        add_special_tokens: with the tokens that the tokenizer puts around a text, such as one at its beginning.

    Raises:
        DataError: the text holds a token of the model's memory.
    """
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    found = set(config.memory_token_ids).intersection(ids)
    if found:
        names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(found)))
        raise DataError(
            f"the text holds {names}, a token of the model's memory",
            way_out="take it out; the model lays its beacons itself",
        )
    return ids
