"""CoMeT, the Collaborative Memory Transformer (arXiv 2602.01766), in plain torch: the definition of what it computes.

A text of any length is cut into *chunks*. Inside a chunk attention is causal, and nothing but the memory crosses
from one chunk to the next, so that cost is linear in the text and the state is constant. Every layer has its own:

- *global memory*: the layer's outputs at the *global beacons* at the end of a chunk, gated into a state that lasts;
- *temporary memory*: its outputs at the *beacons* after every `stride` text tokens, in a first-in first-out queue.

In the next chunk each memory vector, a *slot*, stands before the text at the input of the same layer. Its output would
be thrown away, so it takes part as a key and a value only: no query, no output projection, no MLP, no head.

    chunk 0:                                 [text, a beacon after every `stride` tokens] [global beacons]
    chunk i: [global slots] [temporary slots] [text, a beacon after every `stride` tokens] [global beacons]

Shapes: B batch, S text tokens, C chunk rows (text and beacons), M memory slots, G global slots, T temporary slots,
N beacons, P rows before the new ones (slots included), D hidden, H heads, K key-value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_comet import CometConfig
from .generation_comet import OFFICIAL, TRAINING, CometGenerationMixin

ATTENTION_BLOCK = 384  # query rows that attend at once behind a mask
GLOBAL_NORM_EPS = 1.1920929e-07  # torch's default for fp32, in every dtype
TEMPORARY_NORM_EPS = 1e-12
NO_LABEL = -100


class LayerMemory(NamedTuple):
    """What one layer carries from chunk to chunk, in fp32; None where nothing was written yet or the memory is off."""

    global_state_BGD: Tensor | None = None  # before its adapter
    temporary_BTD: Tensor | None = None  # oldest slot first


Memory = tuple[LayerMemory, ...]  # one a layer
KeyValue = tuple[Tensor, Tensor]  # [B, K, rows, E] each


class OpenChunk(NamedTuple):
    """A chunk that can still grow: what its next rows and the memory after it need of the past. Tuples are by layer."""

    text_tokens: int
    memory: Memory  # as it entered the chunk
    keys_values: tuple[KeyValue | None, ...]  # of the slots, then of the rows so far
    beacons: tuple[Tensor | None, ...]  # outputs at the beacons so far, [B, N, D]

    @property
    def slots(self) -> int:
        """Memory slots before the text."""
        return sum(state.shape[1] for state in self.memory[0] if state is not None)


class ReadText(NamedTuple):
    """What came of the text that a chunk gained."""

    text_BSD: Tensor  # normed outputs there, or at its last token [B, 1, D]
    after: OpenChunk | Memory  # the chunk to go on with; after a text's end that closes, the memory instead
    tokens: int


class Row(IntEnum):
    TEXT = 0
    BEACON = 1
    GLOBAL_BEACON = 2


def plan_rows(
    *,
    text_before: int,
    text_new: int,
    stride: int,
    global_slots: int,
    closes: bool,
    ends_last_group: bool = True,
    phase: int = 0,
) -> list[Row]:
    """Layout of a chunk: the rows it gains when `text_new` tokens follow its first `text_before`.

    Every group of `stride` text tokens ends in a beacon, which is laid when the next text token comes. A chunk that
    closes gets the beacon of its last group, whole or not, and the global beacons. Nobody reads those of a text's last
    chunk, which therefore stays open. `stride=-1`: no beacons.

    Args:
        ends_last_group: False: the last group of a chunk that closes gets no beacon (the authors' generation).
        phase: counts as that many text tokens before the chunk's first, where groups are cut (theirs, too).
    """
    rows: list[Row] = []
    for index in range(text_before, text_before + text_new):
        if stride > 0 and index > 0 and (phase + index) % stride == 0:
            rows.append(Row.BEACON)
        rows.append(Row.TEXT)
    if closes:
        if ends_last_group and stride > 0 and text_before + text_new > 0:
            rows.append(Row.BEACON)
        rows += [Row.GLOBAL_BEACON] * global_slots
    return rows


def build_causal_mask(rows: int, before: int, like: Tensor) -> Tensor:
    """[C, P + C], 0 where a row may look: at all rows before the new ones and causally among these; else -inf.

    Added to the scores: attention would make this of a mask of booleans again in every layer.
    """
    may_look = torch.ones(rows, before + rows, dtype=torch.bool, device=like.device).tril(before)
    return torch.zeros_like(may_look, dtype=like.dtype).masked_fill_(~may_look, -torch.inf)


def rotary_frequencies(config: CometConfig, device: torch.device) -> Tensor:
    """Radians per position [E/2], fp32. Llama 3's scaling divides low frequencies by `factor`, leaves high ones as they
    are, and blends between the two wavelengths (source: transformers, modeling_rope_utils)."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies, scaling = 1.0 / config.rope_theta**exponents, config.rotary_scaling
    if scaling is None:
        return frequencies
    kept = torch.zeros_like(frequencies)
    if scaling["rope_type"] == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * ((1 - kept) / scaling["factor"] + kept)


def build_rotary(start: int, rows: int, config: CometConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [rows, E/2], fp32, of positions start, start + 1, ... within the chunk."""
    positions = torch.arange(start, start + rows, device=device, dtype=torch.float32)
    angles = torch.outer(positions, rotary_frequencies(config, device))
    return angles.cos(), angles.sin()


def rotate(x_BHCE: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on the two halves of each head, in fp32."""
    cos, sin = rotary
    first, second = x_BHCE.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHCE.dtype)


class CometRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Fp32Linear(nn.Linear):
    """Computes in fp32, whatever the dtype of its weight or of autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(device_type=x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class LowRankAdapter(nn.Module):
    """x + up(down(x)), in fp32."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down_proj = Fp32Linear(hidden_size, rank, bias=False)
        self.up_proj = Fp32Linear(rank, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up_proj(self.down_proj(x))


class GlobalMemoryNet(nn.Module):
    """Gates a chunk's global beacons into the state of the global memory, and reads the state as slots."""

    def __init__(self, config: CometConfig) -> None:
        super().__init__()
        self.norm = CometRMSNorm(config.hidden_size, GLOBAL_NORM_EPS)
        self.g_proj = Fp32Linear(2 * config.hidden_size, 1, bias=False)
        self.o_proj = LowRankAdapter(config.hidden_size, config.memory_adapter_rank)

    def forward(self, beacons_BGD: Tensor, state_BGD: Tensor | None) -> Tensor:
        """The next state; the first chunk's is its beacons alone. One gate a slot."""
        new_BGD = self.norm(beacons_BGD.float())
        if state_BGD is None:
            return new_BGD
        gate_BG1 = torch.sigmoid(self.g_proj(torch.cat([new_BGD, state_BGD], dim=-1)))
        return gate_BG1 * state_BGD + (1 - gate_BG1) * new_BGD

    def read(self, state_BGD: Tensor) -> Tensor:
        return self.o_proj(state_BGD)


class CometAttention(nn.Module):
    """Grouped-query attention over given keys and values and its own: Qwen3's, Qwen2's, Llama's and Mistral's."""

    def __init__(self, config: CometConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.group_size = config.num_attention_heads // config.num_key_value_heads
        query_size, key_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = CometRMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = CometRMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def _split_heads(self, x_BCF: Tensor) -> Tensor:
        return x_BCF.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def key_value(self, x_BCD: Tensor, rotary: tuple[Tensor, Tensor]) -> KeyValue:
        key_BKCE = rotate(self.k_norm(self._split_heads(self.k_proj(x_BCD))), rotary)
        return key_BKCE, self._split_heads(self.v_proj(x_BCD))

    def forward(
        self,
        x_BCD: Tensor,
        before: KeyValue | None,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        asking: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Outputs of all rows, or of those in `asking` (ascending, of which `mask` is then), and all keys and values.

        Without a mask rows are plainly causal, after nothing; a single one sees everything.
        """
        key, value = self.key_value(x_BCD, rotary)
        if before is not None:
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        if asking is not None:
            x_BCD, rotary = x_BCD[:, asking], (rotary[0][asking], rotary[1][asking])
        query_BHCE = rotate(self.q_norm(self._split_heads(self.q_proj(x_BCD))), rotary)
        rows = query_BHCE.shape[2]
        if rows == 1 and mask is None:  # so the query heads of a key head may stand as rows of one head
            query_BKgE = query_BHCE[:, :, 0].unflatten(1, (-1, self.group_size))
            out_BKgE = F.scaled_dot_product_attention(query_BKgE, key, value)
            return self.o_proj(out_BKgE.flatten(1)[:, None]), (key, value)
        # Heads are repeated by hand: with a mask, not every attention kernel can share a key among queries.
        keys, values = (t.repeat_interleave(self.group_size, dim=1) for t in (key, value))
        if mask is None:
            out_BHCE = F.scaled_dot_product_attention(query_BHCE, keys, values, is_causal=True)
        else:  # in blocks, as what is masked is computed, too: no block sees the rows behind it
            blocks, last = [], keys.shape[2]
            for begin in range(0, rows, ATTENTION_BLOCK):
                end = min(begin + ATTENTION_BLOCK, rows)
                seen = last if asking is not None else last - rows + end
                blocks.append(
                    F.scaled_dot_product_attention(
                        query_BHCE[:, :, begin:end],
                        keys[:, :, :seen],
                        values[:, :, :seen],
                        attn_mask=mask[begin:end, :seen],
                    )
                )
            out_BHCE = torch.cat(blocks, dim=2)
        return self.o_proj(out_BHCE.transpose(1, 2).flatten(2)), (key, value)


class CometMLP(nn.Module):
    def __init__(self, config: CometConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BackboneLayer(nn.Module):
    """A decoder layer of the backbone: attention, then MLP, each behind a norm and added to its input."""

    def __init__(self, config: CometConfig) -> None:
        super().__init__()
        self.self_attn = CometAttention(config)
        self.mlp = CometMLP(config)
        self.input_layernorm = CometRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = CometRMSNorm(config.hidden_size, config.rms_norm_eps)

    def slots_key_value(self, slots_BMD: Tensor, rotary: tuple[Tensor, Tensor]) -> KeyValue:
        """All that a slot takes part with."""
        slots_BMD = slots_BMD.to(self.input_layernorm.weight.dtype)
        return self.self_attn.key_value(self.input_layernorm(slots_BMD), rotary)

    def forward(
        self,
        x_BCD: Tensor,
        before: KeyValue | None,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        asking: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Outputs of all rows, or of those in `asking`: the others are then keys and values only."""
        attended_BCD, key_value = self.self_attn(self.input_layernorm(x_BCD), before, rotary, mask, asking)
        x_BCD = (x_BCD if asking is None else x_BCD[:, asking]) + attended_BCD
        return x_BCD + self.mlp(self.post_attention_layernorm(x_BCD)), key_value


class CometLayer(nn.Module):
    """A layer of the backbone with the nets of its two memories; a memory that is off has no net."""

    def __init__(self, config: CometConfig) -> None:
        super().__init__()
        self.temporary_slots = config.temp_mem_budget
        self.inner_layer = BackboneLayer(config)
        if config.has_global_memory:
            self.global_memory_net = GlobalMemoryNet(config)
        if config.has_temporary_memory:
            self.temp_memory_net = nn.Sequential(
                CometRMSNorm(config.hidden_size, TEMPORARY_NORM_EPS),
                LowRankAdapter(config.hidden_size, config.memory_adapter_rank),
            )

    def read_memory(self, memory: LayerMemory) -> Tensor | None:
        """The slots [B, M, D] that stand before a chunk: global, then temporary. None without any."""
        slots = []
        if memory.global_state_BGD is not None:
            slots.append(self.global_memory_net.read(memory.global_state_BGD))
        if memory.temporary_BTD is not None:
            slots.append(memory.temporary_BTD)
        return torch.cat(slots, dim=1) if slots else None

    def write_memory(self, memory: LayerMemory, beacons_BND: Tensor | None, globals_BGD: Tensor) -> LayerMemory:
        """The memory after a chunk, from this layer's outputs at all its beacons and at its global beacons."""
        state_BGD, queue_BTD = memory
        if globals_BGD.shape[1]:
            state_BGD = self.global_memory_net(globals_BGD, state_BGD)
        if beacons_BND is not None:
            new_BND = self.temp_memory_net(beacons_BND.float())
            queue_BTD = new_BND if queue_BTD is None else torch.cat([queue_BTD, new_BND], dim=1)
            queue_BTD = queue_BTD[:, -self.temporary_slots :]
        return LayerMemory(state_BGD, queue_BTD)


class CometPreTrainedModel(PreTrainedModel):
    config_class = CometConfig
    base_model_prefix = "model"
    _no_split_modules = ["CometLayer"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, CometRMSNorm):
            nn.init.ones_(module.weight)


class CometModel(CometPreTrainedModel):
    """The layers, run chunk by chunk."""

    def __init__(self, config: CometConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([CometLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = CometRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def open_chunk(self, memory: Memory | None = None) -> OpenChunk:
        """A chunk that holds the slots of `memory` and no text yet. Positions start at 0 and count the slots."""
        memory = memory or tuple(LayerMemory() for _ in self.layers)
        slots = [layer.read_memory(m) for layer, m in zip(self.layers, memory, strict=True)]
        keys_values: list[KeyValue | None] = [None] * len(self.layers)
        if slots[0] is not None:
            rotary = build_rotary(0, slots[0].shape[1], self.config, slots[0].device)
            keys_values = [
                layer.inner_layer.slots_key_value(slots_BMD, rotary)
                for layer, slots_BMD in zip(self.layers, slots, strict=True)
            ]
        return OpenChunk(0, memory, tuple(keys_values), (None,) * len(self.layers))

    def forward_chunk(
        self,
        text_BS: Tensor,
        chunk: OpenChunk,
        *,
        closes: bool,
        ends_last_group: bool = True,
        phase: int = 0,
        only_last: bool = False,
    ) -> tuple[Tensor, OpenChunk | Memory]:
        """Append text, which may be none, to a chunk; its rows as plan_rows lays them.

        Args:
            only_last: of the text, the output at the last token alone is asked for. The last layer then computes
                keys and values for the rest of it and no more: nothing else of it is read.

        Returns: the normed outputs [B, S, D] at the new text (or [B, 1, D]), and the grown chunk, or if it closes the
            memory after it.
        """
        rows = plan_rows(
            text_before=chunk.text_tokens,
            text_new=text_BS.shape[1],
            stride=self.config.temp_beacon_stride,
            global_slots=len(self.config.global_beacon_ids),
            closes=closes,
            ends_last_group=ends_last_group,
            phase=phase,
        )
        at_text, at_beacons, at_globals = (
            torch.tensor([i for i, row in enumerate(rows) if row == kind], dtype=torch.long, device=text_BS.device)
            for kind in Row
        )
        ids_BC = text_BS.new_full((text_BS.shape[0], len(rows)), self.config.temp_beacon_id or 0)
        ids_BC[:, at_text] = text_BS
        ids_BC[:, at_globals] = text_BS.new_tensor(self.config.global_beacon_ids[: len(at_globals)])
        x_BCD = self.embed_tokens(ids_BC)
        before = 0 if chunk.keys_values[0] is None else chunk.keys_values[0][0].shape[2]
        rotary = build_rotary(before, len(rows), self.config, x_BCD.device)
        asking, only_last = None, only_last and len(rows) > 1
        mask = build_causal_mask(len(rows), before, x_BCD) if len(rows) > 1 and (before or only_last) else None
        keys_values, beacons, memory = [], [], []
        for layer, layer_memory, key_value, beacons_BND in zip(self.layers, *chunk[1:], strict=True):
            if only_last and layer is self.layers[-1]:
                asking = torch.cat([at_text[-1:], at_beacons, at_globals]).sort().values
                at_text, at_beacons, at_globals = (
                    torch.searchsorted(asking, at) for at in (at_text[-1:], at_beacons, at_globals)
                )
            if rows:  # none where a chunk closes without any beacon
                needed = mask[asking] if asking is not None else mask if before else None
                x_BCD, key_value = layer.inner_layer(x_BCD, key_value, rotary, needed, asking)
            if len(at_beacons):
                new_BND = x_BCD[:, at_beacons]
                beacons_BND = new_BND if beacons_BND is None else torch.cat([beacons_BND, new_BND], dim=1)
            if closes:
                memory.append(layer.write_memory(layer_memory, beacons_BND, x_BCD[:, at_globals]))
            else:
                keys_values.append(key_value)
                beacons.append(beacons_BND)
        text_BSD = self.norm(x_BCD[:, at_text])
        if closes:
            return text_BSD, tuple(memory)
        text_tokens = chunk.text_tokens + text_BS.shape[1]
        return text_BSD, OpenChunk(text_tokens, chunk.memory, tuple(keys_values), tuple(beacons))

    def stream(
        self,
        text_BS: Tensor,
        chunk: OpenChunk,
        *,
        closes: bool = False,
        layout: str = TRAINING,
        only_last: bool = False,
    ) -> Iterator[ReadText]:
        """Append text of any length: whenever a chunk is full and more text comes, it closes and the next one opens.

        Args:
            closes: close the last chunk, too.
            layout: "training", or "official": no closing chunk ends its last group in a beacon.
            only_last: the outputs at the last new token of each chunk are enough.

        Yields what came of the text in every chunk that gains some.
        """
        while text_BS.shape[1]:
            room = max(self.config.chunk_size - chunk.text_tokens, 0)  # decoding "officially" overfills a chunk
            new_BS, text_BS = text_BS[:, :room], text_BS[:, room:]
            is_end = text_BS.shape[1] == 0
            text_BSD, after = self.forward_chunk(
                new_BS, chunk, closes=closes or not is_end, ends_last_group=layout != OFFICIAL, only_last=only_last
            )
            if not is_end:
                after = chunk = self.open_chunk(after)
            if new_BS.shape[1]:
                yield ReadText(text_BSD, after, new_BS.shape[1])

    def decode(self, token_B: Tensor, chunk: OpenChunk, *, layout: str = TRAINING) -> tuple[Tensor, OpenChunk]:
        """Append one generated token [B] a text.

        Args:
            layout: "training": as any text. "official", as the authors' code generates: the chunk grows without limit,
                and its slots count as text where groups are cut.

        Returns: the normed outputs [B, D] there, and the chunk to go on with.
        """
        if layout == OFFICIAL:
            text_B1D, after = self.forward_chunk(token_B[:, None], chunk, closes=False, phase=chunk.slots)
        else:
            ((text_B1D, after, _),) = self.stream(token_B[:, None], chunk)
        return text_B1D[:, 0], after


@dataclass
class CometOutput(ModelOutput):
    loss: Tensor | None = None  # sum of the cross entropies over the number of labels, fp32
    logits: Tensor | None = None  # [batch, tokens, vocabulary], at text only
    memory: Memory | None = None  # after the last chunk


class CometForCausalLM(CometPreTrainedModel, CometGenerationMixin):
    """CoMeT with its language-model head. Takes and gives text only: chunks, beacons and memory are its own affair."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    if transformers.__version__.startswith("4."):
        _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config: CometConfig) -> None:
        super().__init__(config)
        self.model = CometModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        memory: Memory | None = None,
        return_memory: bool = False,
        return_logits: bool = True,
    ) -> CometOutput:
        """Read a text of any length, in chunks of `config.chunk_size` tokens, the last as long as what is left.

        Args:
            input_ids: text ids [batch, tokens], no beacons.
            labels: of the same shape, usually the same ids; shifted here (the first is dropped), -100 is ignored.
            attention_mask: all ones; texts of different lengths are not batched.
            memory: of an earlier text that this one continues, in a new chunk.
            return_memory: also close the last chunk and return the memory after it.
            return_logits: False: the loss alone, with the head only where a label is.

        Raises:
            ValueError: the text is empty or holds ids beyond the vocabulary, or the arguments do not fit together.
        """
        self._check_text(input_ids, attention_mask, memory)
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels {tuple(labels.shape)} must have the shape of input_ids {tuple(input_ids.shape)}")
        targets_BS = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=NO_LABEL)
        logits, losses, done = [], [], 0
        chunk = self.model.open_chunk(memory)
        for text_BSD, after, _ in self.model.stream(input_ids, chunk, closes=return_memory):  # noqa: B007 (used below)
            if return_logits:
                logits.append(self.lm_head(text_BSD))
            if targets_BS is not None:
                chunk_targets_BS = targets_BS[:, done : done + text_BSD.shape[1]]
                is_label_BS = chunk_targets_BS != NO_LABEL
                labelled = logits[-1][is_label_BS] if return_logits else self.lm_head(text_BSD[is_label_BS])
                losses.append(F.cross_entropy(labelled.float(), chunk_targets_BS[is_label_BS], reduction="sum"))
            done += text_BSD.shape[1]
        loss = None
        if targets_BS is not None:  # a text without any label has the loss 0
            loss = torch.stack(losses).sum() / (targets_BS != NO_LABEL).sum().clamp(min=1)
        return CometOutput(
            loss=loss,
            logits=torch.cat(logits, dim=1) if return_logits else None,
            memory=after if return_memory else None,
        )

    def _check_text(self, input_ids: Tensor, attention_mask: Tensor | None, memory: Memory | None) -> None:
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must be [batch, tokens] with at least one token, not {tuple(input_ids.shape)}")
        if (wrong := input_ids[(input_ids < 0) | (input_ids >= self.config.vocab_size)]).numel():
            raise ValueError(f"input_ids holds {int(wrong[0])}, beyond the vocabulary of {self.config.vocab_size} ids")
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            raise ValueError("attention_mask must be all ones: give texts of one length, without padding")
        batches = {state.shape[0] for layer in memory or () for state in layer if state is not None}
        if batches - {input_ids.shape[0]} or (memory and len(memory) != self.config.num_hidden_layers):
            raise ValueError("memory is of another model, or of another batch than input_ids")


CometForCausalLM.register_for_auto_class("AutoModelForCausalLM")
