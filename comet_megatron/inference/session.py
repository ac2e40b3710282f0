"""A text that is fed and continued piece by piece, today and tomorrow, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comet_megatron.errors import CheckpointError, ConfigError, DataError
from comet_megatron.hf.generation_comet import TRAINING, GenerationOptions, OpenText, resolve_options, write_tokens
from comet_megatron.hf.modeling_comet import LayerMemory, OpenChunk
from comet_megatron.inference.session_file import (
    describe_model,
    read_session_file,
    refuse_other_model,
    write_session_file,
)


class CometSession:
    """One text: feed it in pieces of any size, let the model continue it, save it, go on.

    The state is memory slots and one chunk's keys and values, however much was fed or generated; with the official
    layout the last chunk grows with what is generated. The last generated token is *pending*: it is read when more
    comes.

    Args:
        model: CometForCausalLM, from this package or from an export.
        generation_layout: "training" | "official", as in the model's `generate`.
        seed: of the session's own generator of draws, which is saved with it; None: another one each time.

    Raises:
        ConfigError: there is no such layout, or no such seed.
        CheckpointError: the model is no CoMeT model, or one of an earlier version of the code.
    """

    def __init__(self, model: Any, *, generation_layout: str = TRAINING, seed: int | None = None) -> None:
        if not hasattr(getattr(model, "model", None), "decode"):
            raise CheckpointError(
                f"{type(model).__name__} cannot stream a text: it is no CoMeT model, or an earlier version of its code",
                way_out="export it again: python tools/convert_to_hf.py --checkpoint DIR --output DIR",
            )
        self.model = model
        self.generator = torch.Generator()  # on the CPU, so that a session draws the same on every device
        if seed is None:
            self.generator.seed()
        else:
            try:
                self.generator.manual_seed(seed)
            except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # torch's, by the kind of number
                raise ConfigError(
                    f"seed={seed!r} is none", way_out="give a whole number from 0 to 2**63 - 1"
                ) from error
        self._begin(generation_layout)

    def _begin(self, generation_layout: str) -> None:
        try:
            with torch.no_grad():
                self._text = OpenText(self.model, generation_layout)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._seen_V = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self.model.device)
        self.tokens_fed = 0
        self.tokens_generated = 0
        self.last_id: int | None = None  # fed or generated

    def reset(self) -> None:
        """Forget the text; the generator of draws goes on where it is."""
        self._begin(self.generation_layout)

    @property
    def generation_layout(self) -> str:
        return self._text.layout

    @property
    def state_bytes(self) -> int:
        """What the session holds beside the model."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @torch.no_grad()
    def feed(
        self,
        ids: Sequence[int] | Tensor,
        *,
        return_logits: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Tensor | None:
        """Append text.

        Args:
            ids: text ids, a sequence or a tensor [tokens] or [1, tokens].
            return_logits: also compute the logits of every fed token; without it the head does not run.
            on_progress: called after every chunk with the tokens of this call that are read, and all of them.
            should_stop: asked after every chunk; True: the rest is not read.

        Returns: [tokens, vocabulary] logits of what was read, if asked for.

        Raises:
            DataError: no ids, ids beyond the vocabulary, or beacons, which are no text; nothing is fed then.
        """
        text_1S = self._check_ids(ids)
        logits, done = [], 0
        for text_1SD, tokens in self._text.read(text_1S, only_last=not return_logits):
            new = text_1S[0, done : done + tokens]
            done += tokens
            self._seen_V[new] = True
            self.tokens_fed += len(new)
            self.last_id = int(new[-1])
            if return_logits:
                logits.append(self.model.lm_head(text_1SD[0]))
            if on_progress is not None:
                on_progress(done, text_1S.shape[1])
            if should_stop is not None and should_stop():
                break
        return torch.cat(logits) if return_logits else None

    @torch.no_grad()
    def generate(
        self,
        max_new_tokens: int | None = None,
        *,
        streamer: Any = None,
        tokenizer: Any = None,
        should_stop: Callable[[], bool] | None = None,
        **options: Any,
    ) -> list[int]:
        """Let the model go on.

        Args:
            max_new_tokens: text tokens at most; None: as the model's generation config says, or 20.
            streamer: `put` receives an empty prompt, then every new token; then `end`.
            tokenizer: that of `stop_strings`, which are looked for in the new tokens.
            should_stop: asked after every token; True: no more are written.
            options: as the model's `generate` takes them (do_sample, temperature, top_k, top_p, repetition_penalty,
                eos_token_id, stop_strings, generation_config); draws come from the session's generator.

        Returns: the new ids, with the one that ended the text.

        Raises:
            ConfigError: the options do not fit.
            DataError: nothing was fed yet.
        """
        if self.last_id is None:
            raise DataError("there is no text to continue", way_out="feed at least one token first")
        wanted = self._resolve(max_new_tokens, tokenizer, options)
        ids_1S = torch.zeros(1, wanted.new_tokens, dtype=torch.long, device=self.model.device)
        new: list[int] = []
        if streamer is not None:
            streamer.put(ids_1S[:, :0].cpu())
        steps = write_tokens(
            self._text,
            wanted,
            ids_1S,
            0,
            banned_ids=self.model.config.memory_token_ids,
            seen_BV=self._seen_V[None],
            generator=self.generator,
        )
        for token_1 in steps:
            self.last_id = int(token_1)
            self.tokens_generated += 1
            new.append(self.last_id)
            if streamer is not None:
                streamer.put(token_1.cpu())
            if should_stop is not None and should_stop():
                break
        if streamer is not None:
            streamer.end()
        return new

    def check_options(self, max_new_tokens: int | None = None, *, tokenizer: Any = None, **options: Any) -> None:
        """Refuse what `generate` would refuse, before a long text is fed.

        Raises:
            ConfigError: the options do not fit.
        """
        self._resolve(max_new_tokens, tokenizer, options)

    def _resolve(self, max_new_tokens: int | None, tokenizer: Any, options: dict[str, Any]) -> GenerationOptions:
        given = {**options} if max_new_tokens is None else {**options, "max_new_tokens": max_new_tokens}
        config = given.pop("generation_config", None)
        try:
            return resolve_options(self.model, config, given, tokenizer=tokenizer)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def save(self, path: str | Path) -> None:
        """Write the session to a file, which appears complete or not at all and replaces an older session.

        Raises:
            OutputError: the file cannot be written, or is there and is no session.
        """
        header = {
            "generation_layout": self.generation_layout,
            "tokens_fed": self.tokens_fed,
            "tokens_generated": self.tokens_generated,
            "last_id": self.last_id,
            "text_tokens_in_chunk": self._text.chunk.text_tokens,
            "model": describe_model(self.model),
        }
        write_session_file(path, header, self._tensors())

    @classmethod
    def load(cls, path: str | Path, model: Any) -> CometSession:
        """The session of a file, which goes on with exactly the tokens it would have gone on with.

        Raises:
            CheckpointError: the file is missing, damaged, of another version, or of another model.
        """
        header, tensors = read_session_file(path)
        session = cls(model)
        refuse_other_model(path, header, model)
        try:
            session._begin(header["generation_layout"])
            session._restore(header, {name: t.to(model.device) for name, t in tensors.items() if name != "generator"})
            session.generator.set_state(tensors["generator"])
        except (KeyError, TypeError, RuntimeError, ConfigError) as error:
            raise CheckpointError(f"the session file lacks a part: {error}", where=str(path)) from error
        return session

    def _check_ids(self, ids: Sequence[int] | Tensor) -> Tensor:
        """[1, tokens], on the model's device."""
        try:
            text = torch.as_tensor(ids)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # torch's, by what it is
            raise DataError(f"these are no ids: {error}", way_out="give integers, or a tensor of them") from error
        text = text[0] if text.ndim == 2 and len(text) == 1 else text
        if text.ndim != 1 or text.numel() == 0:
            raise DataError(f"ids of shape {tuple(text.shape)} are no text", way_out="give at least one id, in one row")
        if text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
            raise DataError(f"ids of dtype {text.dtype} are no text", way_out="give integers")
        text = text.long()  # a narrow dtype cannot be compared with all ids
        config = self.model.config
        if (wrong := text[(text < 0) | (text >= config.vocab_size)]).numel():
            raise DataError(
                f"id {int(wrong[0])} is beyond the model's vocabulary of {config.vocab_size}",
                way_out="use the tokenizer of the model's own folder",
            )
        if (wrong := text[torch.isin(text, text.new_tensor(config.memory_token_ids))]).numel():
            raise DataError(
                f"id {int(wrong[0])} is a beacon or the placeholder of the model's memory, which are no text",
                way_out="feed text alone; the model lays its beacons itself",
            )
        return text.to(self.model.device)[None]

    def _tensors(self) -> dict[str, Tensor]:
        """The state by name; what is not there yet is left out."""
        text = self._text
        parts: dict[str, Tensor | None] = {"last": text.last_BD, "pending": text.pending_B}
        parts |= {"seen": self._seen_V.to(torch.uint8), "generator": self.generator.get_state()}
        layers = zip(text.chunk.memory, text.chunk.keys_values, text.chunk.beacons, strict=True)
        for number, (memory, key_value, beacons) in enumerate(layers):
            key, value = key_value or (None, None)
            parts |= {
                f"layer{number}.global_state": memory.global_state_BGD,
                f"layer{number}.temporary": memory.temporary_BTD,
                f"layer{number}.key": key,
                f"layer{number}.value": value,
                f"layer{number}.beacons": beacons,
            }
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def _restore(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        memory, keys_values, beacons = [], [], []
        for number in range(self.model.config.num_hidden_layers):
            part = {kind: tensors.get(f"layer{number}.{kind}") for kind in ("global_state", "temporary", "beacons")}
            key, value = tensors.get(f"layer{number}.key"), tensors.get(f"layer{number}.value")
            memory.append(LayerMemory(part["global_state"], part["temporary"]))
            keys_values.append(None if key is None or value is None else (key, value))
            beacons.append(part["beacons"])
        self._text.chunk = OpenChunk(header["text_tokens_in_chunk"], tuple(memory), tuple(keys_values), tuple(beacons))
        self._text.last_BD, self._text.pending_B = tensors.get("last"), tensors.get("pending")
        self._seen_V = tensors["seen"].bool()
        self.tokens_fed, self.tokens_generated = header["tokens_fed"], header["tokens_generated"]
        self.last_id = header["last_id"]
