"""The tokenizer of a plain backbone: the checkpoint's own, without the tokens that were added for CoMeT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comet_megatron.new_folder import copy_files


def write_text_tokenizer(source: Path, target: Path, *, first_new_id: int) -> None:
    """Copy a tokenizer folder, leaving out every added token from `first_new_id` on."""
    added = set(_added_tokens(source, first_new_id))

    def is_kept(token: Any) -> bool:
        return (token.get("content") if isinstance(token, dict) else token) not in added

    edits: dict[str, Callable[[dict[str, Any]], None]] = {
        "tokenizer.json": lambda c: c.update(added_tokens=[t for t in c.get("added_tokens", []) if is_kept(t)]),
        "tokenizer_config.json": lambda c: _edit_config(c, is_kept),
        "special_tokens_map.json": lambda c: _edit_config(c, is_kept),
        "added_tokens.json": lambda c: [c.pop(token) for token in list(c) if not is_kept(token)],  # type: ignore
    }
    for path in source.iterdir():
        if path.is_dir():
            copy_files(path, target / path.name)
        elif path.name in edits:
            content = json.loads(path.read_text(encoding="utf-8"))
            edits[path.name](content)
            (target / path.name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, target / path.name)


def _added_tokens(folder: Path, first_new_id: int) -> list[str]:
    found: dict[str, int] = {}
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if name == "added_tokens.json":
            found |= content
        found |= {t["content"]: t["id"] for t in content.get("added_tokens", []) if name == "tokenizer.json"}
        found |= {t["content"]: int(i) for i, t in content.get("added_tokens_decoder", {}).items()}
    return [token for token, number in found.items() if number >= first_new_id]


def _edit_config(content: dict[str, Any], is_kept: Callable[[Any], bool]) -> None:
    """Of tokenizer_config.json or special_tokens_map.json."""
    if "added_tokens_decoder" in content:
        decoder = content["added_tokens_decoder"]
        content["added_tokens_decoder"] = {i: token for i, token in decoder.items() if is_kept(token)}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(content.get(key), list):
            content[key] = [token for token in content[key] if is_kept(token)]
