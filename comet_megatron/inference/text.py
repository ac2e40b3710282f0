"""Text to the ids that a model is fed."""

from __future__ import annotations

from typing import Any

from comet_megatron.errors import DataError


def encode_text(tokenizer: Any, text: str, config: Any, *, add_special_tokens: bool) -> list[int]:
    """The ids of a text.

    Args:
        add_special_tokens: with the tokens that the tokenizer puts around a text, such as one at its beginning.

    Raises:
        DataError: the text holds a token of the model's memory, or a byte that was no UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half a pair of surrogates, as Python keeps bytes that it cannot read
        raise DataError(
            f"the text is no UTF-8: character {error.start + 1} is {ascii(text[error.start])}",
            way_out="give it in UTF-8",
        ) from error
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    found = set(config.memory_token_ids).intersection(ids)
    if found:
        names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(found)))
        raise DataError(
            f"the text holds {names}, a token of the model's memory",
            way_out="take it out; the model lays its beacons itself",
        )
    return ids
