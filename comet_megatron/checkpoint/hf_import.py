"""From a Hugging Face folder into a stage: planned from config and tokenizer, then read by each rank, its part only.

A plain model gets CoMeT's tokens, their embedding rows and memory nets. What is drawn depends on the seed and the
parameter's name alone, so that every layout starts from the same weights.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from comet_megatron.checkpoint.families import is_comet
from comet_megatron.checkpoint.hf_config import architecture_of, memory_of, read_hf_config
from comet_megatron.checkpoint.hf_folder import HfTensors, raise_problems
from comet_megatron.checkpoint.hf_rules import HEAD, Vocabulary, is_memory_net, plan_rules
from comet_megatron.checkpoint.model_folder import ModelDescription
from comet_megatron.checkpoint.sharded import save_checkpoint
from comet_megatron.config.rules import check_architecture, check_memory_sizes, check_stride_divides, require
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.data.tokenizer import check_has_ids, load_tokenizer, tokenizer_fingerprint
from comet_megatron.errors import CheckpointError, CometError, ConfigError
from comet_megatron.model.build import build_stage
from comet_megatron.model.stage import CometStage
from comet_megatron.new_folder import told_of_a_full_disk
from comet_megatron.parallel.layout import Layout
from tokenizers import AddedToken

# Distance of a new row from the mean of the old ones, in their standard deviations: near enough to the mean that a
# softmax over tied rows hardly notices, far enough apart that beacons start as different tokens.
NEW_ROW_SPREAD = 0.01
VOCABULARY_MULTIPLE = 256
BLOCK_ROWS = 1024  # of a vocabulary, read at once
DTYPES_READ = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class AskedMemory:
    """Memory sizes a user asks for; the token ids follow from the tokenizer. auto: the paper's, or what the model has.

    Attributes:
        global_slots: 0: no global memory.
        stride: text tokens per beacon; -1: no temporary memory.
    """

    chunk_size: int | str = "auto"
    global_slots: int | str = "auto"
    stride: int | str = "auto"
    budget: int | str = "auto"
    adapter_rank: int | str = "auto"

    def resolved(self) -> dict[str, int]:
        """Numbers for a model that has no memory yet: where none is asked for, the paper's."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: PAPER_SIZES[name] if value == "auto" else value for name, value in given.items()}

    def check_is_of(self, memory: MemorySizes, *, where: str) -> None:
        """
        Raises:
            ConfigError: the model has a memory of other sizes than were asked for.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        others = [
            f"{name} {getattr(memory, name)}, not {value}"
            for name, value in given.items()
            if value not in ("auto", getattr(memory, name))
        ]
        if others:
            raise ConfigError(
                f"the model has a memory of its own, with {'; '.join(others)}",
                where=where,
                way_out="leave the sizes out: they come from its config.json",
            )


# Of the script that the paper's authors train with.
PAPER_SIZES = {"chunk_size": 2048, "global_slots": 512, "stride": 8, "budget": 2048, "adapter_rank": 8}


@dataclass(frozen=True)
class ImportPlan:
    """What will be made of a Hugging Face folder. Nothing but names and shapes of its weights has been read.

    Attributes:
        stored: dtypes of the tensors in the folder, in safetensors' words.
        backbone: its sizes as they are in the folder; `description` has the vocabulary grown.
        has_memory: it is a CoMeT model already.
        tokenizer: with CoMeT's tokens.
        seed: of new rows and memory nets.
    """

    source: Path
    description: ModelDescription
    stored: frozenset[str]
    backbone: Architecture
    has_memory: bool
    tokenizer: Any = field(repr=False)
    seed: int = 1234

    @property
    def precision(self) -> str:
        """As which a starting checkpoint stores its weights: bf16 if all are, else fp32, which holds any of them."""
        return "bf16" if self.stored == {"BF16"} else "fp32"

    @torch.no_grad()
    def load_weights(self, stage: CometStage) -> None:
        """Fill a stage: reads this rank's part of its tensors. Communicates on no axis.

        Raises:
            CheckpointError: a file is cut off or unreadable.
        """
        names, group = stage.global_names(), stage.tp_group
        memory = self.description.memory if self.has_memory else None
        rules = {rule.megatron: rule for rule in plan_rules(self.backbone, memory)}
        with HfTensors(self.source) as tensors:
            for name, param in stage.named_parameters():
                rule = rules.get(names[name])
                if rule is None:
                    self._draw(names[name], param)
                elif isinstance(rule, Vocabulary):
                    rows = replace(rule, shapes=((self.description.architecture.vocab_size, *param.shape[1:]),))
                    self._fill_vocabulary(param, tensors, rule.hf[0], rows.rows_of(group.rank(), group.size()))
                else:
                    param.copy_(rule.load(tensors, rank=group.rank(), size=group.size()))

    def _draw(self, name: str, param: nn.Parameter) -> None:
        """A parameter of a memory net: norms are ones, projections normal(0, initializer_range), as the authors'."""
        assert is_memory_net(name), name
        if param.dim() == 1:
            param.fill_(1.0)
        else:
            drawn = torch.randn(param.shape, generator=self._generator(name))
            param.copy_(drawn * self.backbone.init_std)

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def _fill_vocabulary(self, param: nn.Parameter, tensors: HfTensors, name: str, rows: range) -> None:
        """Old rows from the file; new ones around the mean of all old ones; zeros where Megatron pads.

        Every row from the first new id on is new, also where the old matrix had room: those were never trained.
        """
        memory, end = self.description.memory, self.description.architecture.vocab_size
        old = self.backbone.vocab_size if self.has_memory else min(memory.first_new_id, self.backbone.vocab_size)
        for begin in range(rows.start, min(rows.stop, old), BLOCK_ROWS):
            block = tensors.part(name, 0, begin, min(begin + BLOCK_ROWS, rows.stop, old))
            param[begin - rows.start : begin - rows.start + len(block)].copy_(block)
        first, last = (min(max(i, rows.start), rows.stop) for i in (old, end))
        if first < last:
            mean, std = _mean_and_std(tensors, name, old)
            noise = torch.randn(end - old, len(mean), generator=self._generator(name))
            new = mean + NEW_ROW_SPREAD * std * noise
            param[first - rows.start : last - rows.start].copy_(new[first - old : last - old])
        param[max(end - rows.start, 0) :].zero_()

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer, with CoMeT's tokens, so that AutoTokenizer of transformers 4 and 5 loads it.

        5 names its general class TokenizersBackend, which 4 does not know; both know its old name.
        """
        self.tokenizer.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2) + "\n")


def _mean_and_std(tensors: HfTensors, name: str, rows: int) -> tuple[Tensor, Tensor]:
    """Of the first rows of a matrix, per column: fp32, the same on every rank."""
    total = squares = torch.zeros((), dtype=torch.float64)
    for begin in range(0, rows, BLOCK_ROWS):
        block = tensors.part(name, 0, begin, min(begin + BLOCK_ROWS, rows)).double()
        total, squares = total + block.sum(0), squares + block.square().sum(0)
    mean = total / rows
    return mean.float(), ((squares / rows - mean.square()).clamp(min=0) * (rows / max(rows - 1, 1))).sqrt().float()


def import_hf(
    source: Path, output: Path, asked: AskedMemory | None, layout: Layout, *, seed: int = 1234
) -> ModelDescription:
    """Write the starting checkpoint of a fine-tuning run. Every rank calls it, and reads its part.

    Args:
        output: new folder.

    Raises:
        CheckpointError, DataError, ConfigError: see `plan_import`; nothing is written then.
    """
    plan = _on_all_ranks(lambda: plan_import(source, asked, seed=seed), layout)
    description = plan.description
    layers = description.architecture.num_layers
    if layout.pp > layers:
        what = f"{layout.pp} processes are more than the model's {layers} layers, and each holds some of them"
        raise ConfigError(what, way_out=f"start {layers} or fewer")
    split = [layers * (i + 1) // layout.pp - layers * i // layout.pp for i in range(layout.pp)]
    stage = build_stage(
        description.architecture,
        description.memory,
        layout.groups,
        stage=layout.pp_rank,
        layers_per_stage=split,
        precision=plan.precision,
    )
    plan.load_weights(stage)
    with tempfile.TemporaryDirectory() as folder:
        with told_of_a_full_disk(folder):
            plan.save_tokenizer(Path(folder))
        save_checkpoint(output, stage, layout, description=description, tokenizer=Path(folder))
    return description


def _on_all_ranks(make: Callable[[], ImportPlan], layout: Layout) -> ImportPlan:
    """What `make` gives on this rank, once it has gone well on all. Communicates on the world."""
    plan: ImportPlan | None = None
    problem: CometError | None = None
    try:
        plan = make()
    except CometError as error:
        problem = error
    found: list[CometError | None] = [problem]
    if layout.world_size > 1:
        found = [None] * layout.world_size
        dist.all_gather_object(found, problem)
    if first := next((error for error in found if error is not None), None):
        raise first
    assert plan is not None
    return plan


def plan_import(source: Path, asked: AskedMemory | None = None, *, seed: int = 1234) -> ImportPlan:
    """Check a folder and plan its import; no weight is read.

    Args:
        source: folder with config.json, safetensors and a tokenizer; of a plain model, an export of ours, or a
            checkpoint of CoMeT's authors.
        seed: of new rows and memory nets.

    Raises:
        CheckpointError, DataError, ConfigError: the model, its tokenizer or the sizes asked for.
    """
    asked = asked or AskedMemory()
    hf_config = read_hf_config(source)
    where = str(source / "config.json")
    has_memory = is_comet(hf_config)
    backbone = architecture_of(hf_config, where=where)
    require(check_architecture(backbone, where=where))
    memory = memory_of(hf_config, where=where) if has_memory else None
    if memory is not None:
        asked.check_is_of(memory, where=where)
        require(check_memory_sizes(memory, backbone, where=where))
    with HfTensors(source) as tensors:
        check_tensors(tensors, backbone, memory)
        stored = frozenset(tensors.dtype(name) for name in tensors)
    tokenizer = load_tokenizer(source)
    architecture = backbone
    if memory is None:
        check_ids_fit(tokenizer, backbone, where=str(source))
        sizes = asked.resolved()
        if sizes["global_slots"] < 0:
            raise ConfigError(f"global-slots {sizes['global_slots']} must be 0 or more; 0: no global memory")
        text_tokenizer = tokenizer_fingerprint(tokenizer)
        memory = add_tokens(tokenizer, sizes, where=str(source))
        rows = max(backbone.vocab_size, len(tokenizer))
        architecture = replace(backbone, vocab_size=-(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
        asked_for = "the sizes asked for"
        require(
            check_memory_sizes(memory, architecture, where=asked_for) + check_stride_divides(memory, where=asked_for)
        )
    else:
        check_has_ids(tokenizer, memory.memory_ids, where=str(source))
        text_tokenizer = tokenizer_fingerprint(tokenizer, below=memory.first_new_id)
    description = ModelDescription(architecture, memory, hf_config, text_tokenizer, read_generation_config(source))
    return ImportPlan(source, description, stored, backbone, has_memory, tokenizer, seed)


def check_ids_fit(tokenizer: Any, backbone: Architecture, *, where: str) -> None:
    """
    Raises:
        CheckpointError: the tokenizer makes ids that have no row in the model.
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= backbone.vocab_size:
        raise CheckpointError(
            f"the tokenizer makes ids up to {highest}, and the model has {backbone.vocab_size} rows",
            where=where,
            way_out="copy the tokenizer that belongs to this model",
        )


def add_tokens(tokenizer: Any, sizes: dict[str, int], *, where: str) -> MemorySizes:
    """Add CoMeT's tokens to a tokenizer: the memory token, a beacon per global slot, the beacon, in this order.

    Raises:
        CheckpointError: the tokenizer has such tokens already.
    """
    names = ["<|memory|>", *(f"<beacon_{i}>" for i in range(sizes["global_slots"])), "<beacon>"]
    vocabulary = tokenizer.get_vocab()
    if present := [name for name in names if name in vocabulary]:
        raise CheckpointError(
            f"the tokenizer has CoMeT's tokens already: {', '.join(present[:3])}",
            where=where,
            way_out="convert the original model, without memory",
        )
    first = max(len(tokenizer), 1 + max(vocabulary.values()))
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(names)
    assert ids == list(range(first, first + len(names))), (first, ids[:3])
    return MemorySizes(
        chunk_size=sizes["chunk_size"],
        stride=sizes["stride"],
        budget=sizes["budget"],
        memory_token_id=ids[0],
        beacon_id=ids[-1],
        global_beacon_ids=tuple(ids[1:-1]),
        first_new_id=first,
        adapter_rank=sizes["adapter_rank"],
    )


def read_generation_config(source: Path) -> dict[str, Any]:
    """generation_config.json of a folder; empty where there is none. The version of transformers is left out.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path = source / "generation_config.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        return {k: v for k, v in content.items() if k not in ("transformers_version", "_from_model_config")}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"no JSON object: {error}", where=str(path), way_out="copy the model again") from error


def check_tensors(tensors: HfTensors, backbone: Architecture, memory: MemorySizes | None) -> None:
    """
    Raises:
        CheckpointError: tensors are missing, unexpected, or of another shape than the config says.
    """
    rules = plan_rules(backbone, memory)
    expected = {name: shape for rule in rules for name, shape in zip(rule.hf, rule.shapes, strict=True)}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    known = {*expected, HEAD}  # some tied models hold their head as well
    problems += [f"{name} is unknown" for name in tensors if name not in known and not _is_buffer(name)]
    for name, want in expected.items():
        if name in tensors and tensors.shape(name) != want:
            problems.append(f"{name} has shape {tensors.shape(name)}, not {want}")
    raise_problems(problems, what="weights do not fit config.json", where=str(tensors.folder))
    if odd := sorted({tensors.dtype(name) for name in tensors} - set(DTYPES_READ)):
        raise CheckpointError(
            f"weights of dtype {', '.join(odd)} are not read, only {', '.join(DTYPES_READ)}",
            where=str(tensors.folder),
            way_out="use the original model: quantised weights cannot be trained",
        )


def _is_buffer(name: str) -> bool:
    """Tables of positions that old versions of transformers saved; they are computed."""
    return name.endswith("rotary_emb.inv_freq")
