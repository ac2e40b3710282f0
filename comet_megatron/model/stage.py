"""One pipeline stage: a range of layers, with or without the embedding before and the head after them.

Parameter names are Megatron's GPTModel's. Works on one chunk at a time; the loop over chunks is the caller's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from comet_megatron.backend.precision import Visit
from comet_megatron.config.precision import FP8_MULTIPLES
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.model.architectures import padded_vocabulary
from comet_megatron.model.chunk_tensors import ChunkTensors, SequenceShards, take_rows
from comet_megatron.model.memory import LayerMemory, WrittenMemory
from comet_megatron.model.rotary import RotaryTable
from comet_megatron.model.specs import norm_of

EXTRA_STATE = "_extra_state"  # Transformer Engine's key for the scales of a module, which our recipes have none of


class Decoder(MegatronModule):
    """The stage's layers, and the final norm where the head is."""

    def __init__(
        self,
        config: TransformerConfig,
        spec: ModuleSpec,
        *,
        layers: range,
        has_final_norm: bool,
        pg_collection: ProcessGroupCollection,
        **layer_arguments: object,
    ) -> None:
        super().__init__(config=config)
        self.layer_range = layers
        self.tp_group = pg_collection.tp
        self.layers = nn.ModuleList(
            build_module(spec, config=config, layer_number=i + 1, pg_collection=pg_collection, **layer_arguments)
            for i in layers
        )
        norm = norm_of(spec)
        self.final_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon) if has_final_norm else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Keys carry the layer's number in the whole model, so that another split over stages loads them."""

        states: ShardedStateDict = {}
        for local, (number, layer) in enumerate(zip(self.layer_range, self.layers, strict=True)):
            own = f"{prefix}layers.{local}."
            state = layer.sharded_state_dict(own, sharded_offsets, metadata)
            replace_prefix_for_sharding(state, own, f"{prefix}layers.{number}.")
            states.update(state)
        if self.final_layernorm is not None:
            states.update(
                sharded_state_dict_default(
                    self.final_layernorm,
                    f"{prefix}final_layernorm.",
                    sharded_offsets,
                    metadata,
                    tp_group=self.tp_group,
                )
            )
        return states


class CometStage(MegatronModule):
    """A stage of a CoMeT model.

    Args:
        config: Megatron's config; its num_layers is the whole model's.
        spec: of one layer (model/specs.py).
        layers: 0-based numbers of this stage's layers in the whole model.
        has_embedding: this is the first stage.
        has_head: this is the last stage.
        pg_collection: process groups; only its tensor-parallel group communicates here.
    """

    NEW_ROWS = "new_rows"

    def __init__(
        self,
        config: TransformerConfig,
        spec: ModuleSpec,
        architecture: Architecture,
        memory_sizes: MemorySizes,
        *,
        layers: range,
        has_embedding: bool,
        has_head: bool,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.architecture, self.memory_sizes, self.pg_collection = architecture, memory_sizes, pg_collection
        self.tp_group = pg_collection.tp
        self.share_embeddings_and_output_weights = architecture.tie_embeddings
        self.device = torch.device(torch.cuda.current_device())
        tp = pg_collection.tp.size()
        self.shards = (
            SequenceShards(
                tp, pg_collection.tp.rank(), pg_collection.tp, FP8_MULTIPLES[config.fp8_recipe] if config.fp8 else 1
            )
            if config.sequence_parallel
            else SequenceShards()
        )
        self.padded_vocab_size = padded_vocabulary(architecture.vocab_size, tp=tp)
        # A tied head needs its copy of the embedding also where the embedding itself is on another stage.
        self.has_embedding, self.has_head = has_embedding, has_head
        self.embedding = None
        if has_embedding or (has_head and architecture.tie_embeddings):
            self.embedding = LanguageModelEmbedding(
                config, self.padded_vocab_size, 0, position_embedding_type="none", tp_group=pg_collection.tp
            )
            self._mark_shared(self.embedding.word_embeddings.weight)
        self.new_rows: nn.Parameter | None = None  # see freeze_backbone
        self.decoder = Decoder(
            config,
            spec,
            layers=layers,
            has_final_norm=has_head,
            pg_collection=pg_collection,
            memory_sizes=memory_sizes,
            shards=self.shards,
        )
        self.output_layer = self._build_head() if has_head else None
        self.rotary = RotaryTable(
            theta=architecture.rope_theta,
            scaling=architecture.rope_scaling,
            head_dim=architecture.head_dim,
            dtype=config.params_dtype,
            device=self.device,
        )

    def _build_head(self) -> tensor_parallel.ColumnParallelLinear:
        config = copy.copy(self.config)
        config.sequence_parallel = False  # the head is fed whole rows picked by take_rows
        return tensor_parallel.ColumnParallelLinear(
            config.hidden_size,
            self.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=self.share_embeddings_and_output_weights,
            tp_group=self.tp_group,
        )

    @property
    def num_layers(self) -> int:
        return len(self.decoder.layers)

    @property
    def holds_a_copy(self) -> bool:
        """Its embedding is a tied head's copy of the one on the first stage."""
        return self.embedding is not None and not self.has_embedding

    def _mark_shared(self, param: nn.Parameter) -> None:
        """Tell Megatron that a parameter is on two stages: its shards lie alike there, and its norm counts once."""
        if self.share_embeddings_and_output_weights and self.has_embedding != self.has_head:
            param.shared_embedding = True
            param.shared = self.holds_a_copy

    @property
    def pre_process(self) -> bool:
        """Megatron's name for it."""
        return self.has_embedding

    def shared_embedding_or_output_weight(self) -> nn.Parameter | None:
        """Megatron's name for what it sums over the first and the last stage: a tied embedding, if it is trained."""
        weight = None if self.embedding is None else self.embedding.word_embeddings.weight
        return weight if weight is not None and weight.requires_grad else None

    def shared_parameter(self) -> nn.Parameter | None:
        """What is on the first and the last stage and gathers a gradient on both: a tied embedding's trained part."""
        if self.embedding is None or not self.share_embeddings_and_output_weights:
            return None
        return self.embedding.word_embeddings.weight if self.new_rows is None else self.new_rows

    def global_names(self) -> dict[str, str]:
        """Parameter name on this stage -> in the whole model, where layers have other numbers."""
        first = self.decoder.layer_range.start

        def in_whole_model(name: str) -> str:
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + first)
            return ".".join(parts)

        return {name: in_whole_model(name) for name, _ in self.named_parameters()}

    def freeze_backbone(self) -> None:
        """Leave only the memory nets and the embedding rows of the ids added for CoMeT trainable.

        Those rows become a parameter of their own, `new_rows`, so that the embedding itself is frozen and has no
        gradient and no optimizer state. Its rows follow by `write_new_rows` after each optimizer step. A tied head
        reads them there and gives them no gradient: beacons are never predicted.
        """
        for name, param in self.named_parameters():
            param.requires_grad = "_memory_net." in name
        if self.embedding is not None:
            rows = torch.empty(len(self.memory_sizes.new_ids), self.config.hidden_size, dtype=self.config.params_dtype)
            self.new_rows = nn.Parameter(rows.to(self.device))
            self.new_rows.sequence_parallel = self.config.sequence_parallel  # then each rank has a part of its gradient
            self._mark_shared(self.new_rows)
            self.read_new_rows()

    def _own_new_rows(self) -> tuple[Tensor, slice]:
        """Those of the new rows that this rank's part of the embedding holds: in the embedding, in `new_rows`."""
        weight, new_ids = self.embedding.word_embeddings.weight, self.memory_sizes.new_ids
        first = self.tp_group.rank() * len(weight)
        begin, end = (min(max(i - first, 0), len(weight)) for i in (new_ids.start, new_ids.stop))
        start = begin + first - new_ids.start if end > begin else 0
        return weight[begin:end], slice(start, start + end - begin)

    @torch.no_grad()
    def read_new_rows(self) -> None:
        """Copy the embedding's rows into `new_rows`. Communicates on the tensor-parallel axis."""
        if self.new_rows is not None:
            in_embedding, own = self._own_new_rows()
            self.new_rows.zero_()
            self.new_rows[own] = in_embedding
            torch.distributed.all_reduce(self.new_rows, group=self.tp_group)

    @torch.no_grad()
    def write_new_rows(self) -> None:
        """Copy `new_rows` into the embedding; nothing where the backbone is trainable."""
        if self.new_rows is not None:
            in_embedding, own = self._own_new_rows()
            in_embedding.copy_(self.new_rows[own])

    def embed(self, chunk: ChunkTensors) -> Tensor:
        """Embedding of a chunk's rows: [rows / sequence shards, b, h]."""
        hidden = self.embedding(chunk.ids, None)
        if self.new_rows is None:
            return hidden
        beacons = self.new_rows[chunk.beacon_numbers][:, None].expand(-1, hidden.shape[1], -1)
        return hidden.index_copy(0, chunk.beacon_rows.local, beacons)

    def begin_pass(self) -> None:
        """Before the first chunk of a batch: weights may have changed, so FP8 copies of them are made anew."""
        self.set_is_first_microbatch()

    def fuse_weight_gradients(self) -> None:
        """Let Transformer Engine add the gradients of its trained matrices to fp32 `main_grad`s inside the product.

        Not linear_qkv's: a part of it also makes the slots' keys and values, and Megatron's hook takes a gradient that
        was added inside for the only one. Needs DDP's buffers.
        """
        for layer in self.decoder.layers:
            for module in (layer.self_attention.linear_proj, layer.mlp.linear_fc1, layer.mlp.linear_fc2):
                assert hasattr(module, "fuse_wgrad_accumulation"), "only Transformer Engine's modules can"
                module.fuse_wgrad_accumulation = module.weight.requires_grad

    def empty_memory(self) -> list[LayerMemory]:
        """Memory before the first chunk, one per layer of this stage."""
        return [LayerMemory()] * self.num_layers

    def forward(
        self,
        chunk: ChunkTensors,
        memory: Sequence[LayerMemory],
        hidden: Tensor | None = None,
        *,
        visit: Visit = Visit.ONLY,
    ) -> tuple[Tensor, list[WrittenMemory]]:
        """One chunk through the stage's layers.

        Args:
            memory: what each layer carries into the chunk.
            hidden: [rows / sequence shards, b, h] from the stage before; None where the embedding is.
            visit: whether this chunk comes, or has come, another time in this pass.

        Returns:
            Hidden states, like `hidden` (before the final norm), and what each layer wrote.
        """
        if hidden is None:
            hidden = self.embed(chunk)
        rotary = self.rotary.first(chunk.plan.num_slots + chunk.num_rows)
        written = []
        for layer, carried in zip(self.decoder.layers, memory, strict=True):
            hidden, new = layer(hidden, rotary=rotary, memory=carried, chunk=chunk, visit=visit)
            written.append(new)
        return hidden, written

    def labelled_hidden(self, hidden: Tensor, chunk: ChunkTensors) -> Tensor:
        """Final norm of the rows that have a label: [labelled, b, h], whole on every tensor-parallel rank."""
        if self.shards.size == 1:
            return self.decoder.final_layernorm(take_rows(hidden, chunk.labelled_rows, self.shards))
        return take_rows(self.decoder.final_layernorm(hidden), chunk.labelled_rows, self.shards)

    def head_weight(self) -> Tensor:
        """This rank's rows of the head: [padded vocabulary / tp, h]."""
        if self.share_embeddings_and_output_weights:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, b, h] -> this rank's logits [rows, b, padded vocabulary / tp]; padded entries are -inf."""
        logits, _ = self.output_layer(hidden, weight=self.head_weight())
        first_padded = self.architecture.vocab_size - self.tp_group.rank() * logits.shape[-1]
        if first_padded < logits.shape[-1]:
            with torch.no_grad():  # the gradient of these entries is zero by itself
                logits[..., max(first_padded, 0) :] = -torch.inf
        return logits

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's sharded state of the stage's weights."""
        states = self.decoder.sharded_state_dict(f"{prefix}decoder.", sharded_offsets, metadata)
        if self.embedding is not None:
            states.update(
                self._second_if_copy(
                    self.embedding.sharded_state_dict(f"{prefix}embedding.", sharded_offsets, metadata)
                )
            )
        if self.output_layer is not None and not self.share_embeddings_and_output_weights:
            states.update(self.output_layer.sharded_state_dict(f"{prefix}output_layer.", sharded_offsets, metadata))
            # as the embedding: another tensor-parallel size pads the vocabulary to another size
            states[f"{prefix}output_layer.weight"].allow_shape_mismatch = True
        if self.new_rows is not None:
            new_rows = make_sharded_tensors_for_checkpoint(
                {self.NEW_ROWS: self.new_rows},
                prefix,
                sharded_offsets=sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=self.pg_collection.dp_cp,
            )
            states.update(self._second_if_copy(new_rows))
        return {key: state for key, state in states.items() if not key.endswith(EXTRA_STATE)}

    def load_state_dict(self, state_dict: Mapping[str, object], strict: bool = True, assign: bool = False) -> object:
        """As torch's, but extra state need not be there: it is never stored."""
        extra = dict.fromkeys(key for key in self.state_dict() if key.endswith(EXTRA_STATE))
        return super().load_state_dict({**extra, **state_dict}, strict=strict, assign=assign)

    def _second_if_copy(self, states: ShardedStateDict) -> ShardedStateDict:
        """A tied head's copy is loaded like the embedding, and never the one that is saved."""
        if self.holds_a_copy:
            for tensor in states.values():
                tensor.replica_id = (1, *tensor.replica_id[1:])
        return states
