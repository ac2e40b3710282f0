"""How CoMeT goes on with a text: `generate` with the options of transformers, in constant memory.

It stands apart from transformers' own loop because a text's state is no cache of all its tokens: a full chunk closes
into the memory. The rows of a batch therefore go in groups of one length, each of which reads and writes in lockstep.

Shapes: B batch (or the rows of a group), S text tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

TRAINING, OFFICIAL = "training", "official"
LAYOUTS = {
    TRAINING: "as in training; a full chunk closes and the next one opens, also while writing",
    OFFICIAL: "as the authors' code generates; the last chunk of the prompt grows without limit",
}
DEFAULT_NEW_TOKENS = 20  # transformers', where neither the call nor the generation config says a number
DEFAULT_TOP_K = 50  # transformers', too
UNSET_MAX_LENGTH = (None, 20)  # transformers 4 writes the default into every generation config
# Temperature and repetition penalty: beyond, logits that are divided by both may leave fp32.
LEAST_FACTOR, MOST_FACTOR = 1e-15, 1e15
MOST_TOKENS = 2**31 - 1

SUPPORTED = (
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "eos_token_id",
    "pad_token_id",
    "stop_strings",
)
# They change nothing here: there is one cache, no token types, and the prompt holds its own first token.
IGNORED = ("use_cache", "token_type_ids", "bos_token_id", "transformers_version")
SWITCHED_OFF_BY_ONE = (
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "typical_p",
    "length_penalty",
    "encoder_repetition_penalty",
    "guidance_scale",
)


class OpenText:
    """Texts of one length, read and written in lockstep: an open chunk, and what of the texts it does not hold yet.

    Its size is constant: memory slots and one chunk's keys and values, whatever was read or written; in the official
    layout the chunk grows with what is written.

    Attributes:
        chunk: holds all text but the pending token.
        last_BD: normed output at the last token in it; None before any.
        pending_B: the token that was written last, which is read when more comes.
    """

    def __init__(self, model: Any, layout: str = TRAINING) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"generation_layout={layout!r} must be one of {', '.join(LAYOUTS)}")
        self.model, self.layout = model, layout
        self.chunk = model.model.open_chunk()
        self.last_BD: Tensor | None = None
        self.pending_B: Tensor | None = None

    def read(self, text_BS: Tensor, *, only_last: bool = True) -> Iterator[tuple[Tensor, int]]:
        """Append text.

        Yields, chunk by chunk and after the state has taken them in: the normed outputs at the last token [B, 1, D], or
        at all [B, S, D], and how many tokens were read.
        """
        self._read_pending()
        for text_BSD, chunk, tokens in self.model.model.stream(
            text_BS, self.chunk, layout=self.layout, only_last=only_last
        ):
            self.chunk = chunk
            self.last_BD = text_BSD[:, -1].clone()  # a view would keep the whole chunk
            yield text_BSD, tokens

    def scores(self, is_done_B: Tensor | None = None) -> Tensor:
        """Logits [B, V] of the next token, in fp32, also in rows that are done."""
        self._read_pending()
        return self.model.lm_head(self.last_BD).float()

    def write(self, token_B: Tensor) -> None:
        """Append a token a text. Its turn to be read comes with the next text or scores."""
        self.pending_B = token_B

    def _read_pending(self) -> None:
        if self.pending_B is not None:
            self.last_BD, self.chunk = self.model.model.decode(self.pending_B, self.chunk, layout=self.layout)
            self.pending_B = None


class OpenBatch:
    """Texts of any lengths, the rows of a batch: those of one length are one OpenText, and all take each step together.

    Every row is so computed as it is alone; rows of different lengths are at different places of their chunks.
    """

    def __init__(self, model: Any, input_ids: Tensor, lengths_B: Tensor, layout: str) -> None:
        self.groups: list[tuple[Tensor, OpenText]] = []
        for length in lengths_B.unique().tolist():
            rows, text = (lengths_B == length).nonzero()[:, 0], OpenText(model, layout)
            for _ in text.read(input_ids[rows, input_ids.shape[1] - length :]):
                pass
            self.groups.append((rows, text))
        self.scores_BV = torch.zeros(len(input_ids), model.config.vocab_size, device=input_ids.device)

    def scores(self, is_done_B: Tensor) -> Tensor:
        """Logits [B, V] of the next tokens, in fp32; old ones in rows that are done."""
        for rows, text in self.groups:
            if not bool(is_done_B[rows].all()):
                self.scores_BV[rows] = text.scores()
        return self.scores_BV

    def write(self, token_B: Tensor) -> None:
        for rows, text in self.groups:
            text.write(token_B[rows])


@dataclass(frozen=True)
class GenerationOptions:
    """What to write: how many tokens, chosen how, until when."""

    new_tokens: int
    do_sample: bool
    warpers: LogitsProcessorList  # temperature, top-k, top-p
    repetition_penalty: float
    end_ids: tuple[int, ...]
    pad_id: int
    stop_strings: tuple[StopStringCriteria, ...]  # none or one

    def choose(
        self,
        scores_BV: Tensor,
        ids_BS: Tensor,
        *,
        banned_ids: Sequence[int],
        seen_BV: Tensor | None,
        generator: torch.Generator | None,
        processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    ) -> Tensor:
        """The next tokens [B].

        Args:
            ids_BS: what `processors` are given; they come between the repetition penalty and the ban.
            banned_ids: never chosen.
            seen_BV: True at the ids that the repetition penalty makes less likely.
            generator: source of the draws, on any device; one draw over the batch, row after row.
        """
        if seen_BV is not None and self.repetition_penalty != 1:
            penalised_BV = torch.where(
                scores_BV < 0, scores_BV * self.repetition_penalty, scores_BV / self.repetition_penalty
            )
            scores_BV = torch.where(seen_BV, penalised_BV, scores_BV)
        for processor in processors:
            scores_BV = processor(ids_BS, scores_BV)
        scores_BV = scores_BV.index_fill(1, ids_BS.new_tensor(banned_ids, dtype=torch.long), -torch.inf)
        if not self.do_sample:
            return scores_BV.argmax(dim=-1)
        probabilities_BV = self.warpers(ids_BS, scores_BV).softmax(dim=-1)
        if generator is not None:
            probabilities_BV = probabilities_BV.to(generator.device)
        return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0].to(scores_BV.device)

    def ends(self, ids_BS: Tensor) -> Tensor:
        """[B], True where the last id ends the text or completes a stop string."""
        is_end_B = torch.isin(ids_BS[:, -1], ids_BS.new_tensor(self.end_ids))
        for stops in self.stop_strings:
            is_end_B = is_end_B | stops(ids_BS, None)
        return is_end_B


def write_tokens(
    text: OpenText | OpenBatch,
    wanted: GenerationOptions,
    ids_BS: Tensor,
    length: int,
    *,
    banned_ids: Sequence[int],
    seen_BV: Tensor | None = None,
    generator: torch.Generator | None = None,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    criteria: StoppingCriteriaList | None = None,
) -> Iterator[Tensor]:
    """Write into `ids_BS` [B, S] from column `length` on, until it is full or every row has ended.

    Args:
        text: what was read so far; when a token is yielded, `text` holds it as its pending one.
        seen_BV: is brought up to date.

    Yields the tokens [B] of each step; the pad id in rows that had ended.
    """
    is_done_B = torch.zeros(len(ids_BS), dtype=torch.bool, device=ids_BS.device)
    while length < ids_BS.shape[1] and not bool(is_done_B.all()):
        scores_BV = text.scores(is_done_B)
        token_B = wanted.choose(
            scores_BV,
            ids_BS[:, :length],
            banned_ids=banned_ids,
            seen_BV=seen_BV,
            generator=generator,
            processors=processors,
        ).masked_fill(is_done_B, wanted.pad_id)
        text.write(token_B)
        ids_BS[:, length] = token_B
        length += 1
        if seen_BV is not None:
            seen_BV.scatter_(1, token_B[:, None], True)
        yield token_B
        is_done_B = is_done_B | wanted.ends(ids_BS[:, :length])
        if criteria:
            is_done_B = is_done_B | criteria(ids_BS[:, :length], None)


def resolve_options(
    model: Any,
    generation_config: GenerationConfig | None,
    given: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    prompt_length: int = 0,
) -> GenerationOptions:
    """The options of a call; what it gives wins over its generation config, or without one over the model's.

    Of the model's own generation config, what is not built here is ignored with a warning: it came with the backbone.

    Raises:
        ValueError: options that are not built here, are out of range, or would have no effect.
    """
    own = model.generation_config
    config = own if generation_config is None else generation_config
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config={config!r} must be a GenerationConfig")
    asked = config.to_diff_dict()
    # A pipeline passes a changed copy of the model's own: what is the same in both is still the model's.
    inherited = asked if config is own else _common(asked, own.to_diff_dict())
    refuse_unsupported({**{name: value for name, value in asked.items() if name not in inherited}, **given})
    if ignored := find_unsupported({name: value for name, value in inherited.items() if name not in given}):
        warnings.warn(
            f"the model's generation config asks for {', '.join(ignored)}, which generate does not support: ignored",
            stacklevel=2,
        )
    options = {name: getattr(config, name, None) for name in SUPPORTED}
    if options["max_length"] in UNSET_MAX_LENGTH:
        options["max_length"] = None
    if given.get("max_length") is not None:
        options["max_new_tokens"] = None
    options.update({name: value for name, value in given.items() if name in SUPPORTED})
    do_sample = bool(options["do_sample"])
    shaping = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if not do_sample and any(given.get(name) not in (None, neutral) for name, neutral in shaping.items()):
        raise ValueError("temperature, top_k and top_p shape a distribution to draw from: set do_sample=True")
    penalty = 1.0 if options["repetition_penalty"] is None else options["repetition_penalty"]
    end_ids = _end_ids(options["eos_token_id"])
    pads = (options["pad_token_id"], model.config.pad_token_id, *end_ids, 0)
    return GenerationOptions(
        new_tokens=_new_tokens(options, prompt_length),
        do_sample=do_sample,
        warpers=_build_warpers(options) if do_sample else LogitsProcessorList(),
        repetition_penalty=_number("repetition_penalty", penalty, LEAST_FACTOR, MOST_FACTOR),
        end_ids=end_ids,
        pad_id=next(_whole_number("pad_token_id", pad, -1) for pad in pads if pad is not None),
        stop_strings=_build_stop_strings(options["stop_strings"], tokenizer),
    )


def refuse_unsupported(options: Mapping[str, Any]) -> None:
    """Refuse options that would change what is written but are not built here.

    Raises:
        ValueError: names them all.
    """
    if unsupported := find_unsupported(options):
        raise ValueError(f"generate does not support {', '.join(unsupported)}; it knows {', '.join(SUPPORTED)}")


def find_unsupported(options: Mapping[str, Any]) -> list[str]:
    """Options that would change what is written but are not built here, as name=value."""
    return [
        name if isinstance(value, Tensor) else f"{name}={value!r}"
        for name, value in options.items()
        if name not in (*SUPPORTED, *IGNORED) and not name.startswith("_") and not _is_off(name, value)
    ]


def _is_off(name: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        return False
    return value in (None, False, 0, "", [], {}) or (name in SWITCHED_OFF_BY_ONE and value == 1)


def _common(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in one.items()
        if name in other and not isinstance(value, Tensor) and value == other[name]
    }


def _number(name: str, value: Any, least: float, most: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor
        number = math.nan
    if not least <= number <= most:
        raise ValueError(f"{name}={value!r} must be a number from {least:g} to {most:g}")
    return number


def _whole_number(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= MOST_TOKENS:
        raise ValueError(f"{name}={value!r} must be a whole number from {least} to {MOST_TOKENS}")
    return number


def _end_ids(eos: Any) -> tuple[int, ...]:
    if eos is None:
        return ()
    try:
        ids = torch.as_tensor(eos).flatten()
    except (TypeError, ValueError, OverflowError, RuntimeError):  # whatever torch has for what is no tensor
        ids = None
    if ids is None or (ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        raise ValueError(f"eos_token_id={eos!r} must be an id, several, or None")
    return tuple(ids.tolist())


def _new_tokens(options: Mapping[str, Any], prompt_length: int) -> int:
    if options["max_new_tokens"] is not None:
        return _whole_number("max_new_tokens", options["max_new_tokens"], 1)
    if options["max_length"] is None:
        return DEFAULT_NEW_TOKENS
    max_length = _whole_number("max_length", options["max_length"], 1)
    if max_length <= prompt_length:
        raise ValueError(f"max_length={max_length} leaves no token after a prompt of {prompt_length}")
    return max_length - prompt_length


def _build_warpers(options: Mapping[str, Any]) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if options["temperature"] is not None:
        temperature = _number("temperature", options["temperature"], LEAST_FACTOR, MOST_FACTOR)
        warpers.append(TemperatureLogitsWarper(temperature))
    top_k = _whole_number("top_k", DEFAULT_TOP_K if options["top_k"] is None else options["top_k"], 0)
    if top_k != 0:
        warpers.append(TopKLogitsWarper(top_k))
    if options["top_p"] is not None:
        warpers.append(TopPLogitsWarper(_number("top_p", options["top_p"], 0, 1)))
    return warpers


def _build_stop_strings(stop_strings: Any, tokenizer: Any) -> tuple[StopStringCriteria, ...]:
    if not stop_strings:
        return ()
    strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop_strings={stop_strings!r} must be a string or a list of strings, none of them empty")
    if tokenizer is None:
        raise ValueError("stop_strings needs the tokenizer that shows where they end: tokenizer=...")
    return (StopStringCriteria(tokenizer, list(strings)),)


def text_lengths(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Text tokens [B] of each row, whose pads all stand at the left.

    Raises:
        ValueError: pads at the right or within the text, or a row of pads alone.
    """
    if attention_mask is None:
        return input_ids.new_full((input_ids.shape[0],), input_ids.shape[1])
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids {tuple(input_ids.shape)}"
        )
    mask_BS = attention_mask.bool().to(input_ids.device)
    if not bool(mask_BS.any(dim=1).all()):
        raise ValueError("attention_mask leaves a row without any text; give every row at least one token")
    if not bool(mask_BS[:, -1].all()) or bool((mask_BS[:, :-1] & ~mask_BS[:, 1:]).any()):
        raise ValueError(
            "attention_mask has pads at the right or within a text; pad at the left: tokenizer.padding_side='left'"
        )
    return mask_BS.sum(dim=1)


def mark_seen(input_ids: Tensor, lengths_B: Tensor, vocab_size: int) -> Tensor:
    """[B, V], True at the ids of each row's text."""
    seen_BV = torch.zeros(len(input_ids), vocab_size, dtype=torch.bool, device=input_ids.device)
    for row, length in enumerate(lengths_B.tolist()):
        seen_BV[row, input_ids[row, -length:]] = True
    return seen_BV


class CometGenerationMixin(GenerationMixin):
    """`generate`, for a model with `model.open_chunk`, `model.stream`, `model.decode` and `lm_head`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        generation_layout: str = TRAINING,
        **options: Any,
    ) -> Tensor:
        """Continue texts token by token, as transformers' `generate` does.

        Args:
            inputs: text ids [batch, tokens], or `input_ids`.
            generation_config: defaults of the options; otherwise the model's own, of which what is not built here is
                ignored with a warning.
            logits_processor: called with the ids so far and the logits, before temperature, top_k and top_p.
            stopping_criteria: called with the ids so far; True ends a row.
            attention_mask: 0 at pads, all at the left; the rows of a batch may so differ in length. None: no pads.
            streamer: `put` receives the prompt, then every new token; then `end`.
            generator: source of the draws. There is one draw a step for the whole batch, row after row, so that a row
                that is sampled alone from the same generator comes out differently. Greedy rows do not.
            tokenizer: that of `stop_strings`.
            generation_layout: "training": beacons as in training, new chunks as the text grows. "official": as the
                authors' code generates, token for token; its state grows with what is written.
            options: max_new_tokens (text tokens) or max_length, do_sample, temperature, top_k, top_p,
                repetition_penalty, eos_token_id (one, several or None), pad_token_id, stop_strings.

        Returns: [batch, tokens + new tokens] ids, no beacon among the new ones; a row that ended early is filled up
            with the pad id.

        Raises:
            ValueError: the text is empty, holds ids beyond the vocabulary or beacons, or the options do not fit.
        """
        if (inputs is None) == (input_ids is None):
            raise ValueError("generate needs the text ids once, as its first argument or as input_ids")
        input_ids = inputs if input_ids is None else input_ids
        self._check_text(input_ids, None, None)
        lengths_B = text_lengths(input_ids, attention_mask)
        self._refuse_memory_tokens(input_ids, lengths_B)
        length = input_ids.shape[1]
        wanted = resolve_options(self, generation_config, options, tokenizer=tokenizer, prompt_length=length)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        batch = OpenBatch(self, input_ids, lengths_B, generation_layout)
        ids_BS = torch.nn.functional.pad(input_ids, (0, wanted.new_tokens), value=wanted.pad_id)
        seen_BV = mark_seen(input_ids, lengths_B, self.config.vocab_size) if wanted.repetition_penalty != 1 else None
        steps = write_tokens(
            batch,
            wanted,
            ids_BS,
            length,
            banned_ids=self.config.memory_token_ids,
            seen_BV=seen_BV,
            generator=generator,
            processors=logits_processor or (),
            criteria=StoppingCriteriaList(stopping_criteria or ()),
        )
        for token_B in steps:
            length += 1
            if streamer is not None:
                streamer.put(token_B.cpu())
        if streamer is not None:
            streamer.end()
        return ids_BS[:, :length].clone()

    def _refuse_memory_tokens(self, input_ids: Tensor, lengths_B: Tensor) -> None:
        is_text_BS = torch.arange(input_ids.shape[1], 0, -1, device=input_ids.device) <= lengths_B[:, None]
        wrong = input_ids[is_text_BS & torch.isin(input_ids, input_ids.new_tensor(self.config.memory_token_ids))]
        if wrong.numel():
            raise ValueError(f"input_ids holds {int(wrong[0])}, a beacon or the placeholder; give text alone")
