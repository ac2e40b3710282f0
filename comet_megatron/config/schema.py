"""What can be configured: frozen dataclasses, one per YAML section, and what a checkpoint says of its model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Union

REQUIRED = "???"  # OmegaConf's marker for a value the user must give


@dataclass(frozen=True)
class ModelSection:
    path: str = REQUIRED  # checkpoint folder to start from (tools/convert_from_hf.py writes it)
    init_from: str = ""  # instead of path: hf:DIR, a Hugging Face model; see the section memory
    precision: str = "fp32"  # fp32 | bf16 | fp8 (bf16 and fp8 keep fp32 master weights and gradients)
    backend: str = "auto"  # te (Transformer Engine) | torch | auto: te where it can be used
    fp8_recipe: str = "auto"  # tensorwise | blockwise | mxfp8 | auto: mxfp8 on Blackwell, else tensorwise
    fp8_bf16_layers: int = 1  # layers at each end of the model whose products stay in bf16


@dataclass(frozen=True)
class MemorySection:
    """Of the memory that a model without one gets (model.init_from). auto: the paper's, or what the model has."""

    chunk_size: Union[int, str] = "auto"  # text tokens a chunk
    global_slots: Union[int, str] = "auto"  # 0: no global memory
    stride: Union[int, str] = "auto"  # text tokens per beacon; -1: no temporary memory
    budget: Union[int, str] = "auto"  # temporary slots kept
    adapter_rank: Union[int, str] = "auto"  # of the memory nets


@dataclass(frozen=True)
class ParallelSection:
    tp: int = 1  # tensor-parallel size
    pp: int = 1  # pipeline stages; data-parallel size = processes / (tp * pp)
    layers_per_stage: Union[str, tuple[int, ...]] = "auto"  # auto: so that the stages cost the same; or [8, 8, 6]
    slack: int = 1  # chunks that a stage runs ahead per stage behind it, beyond what it must: absorbs ragged lengths
    timeout_s: float = 600.0  # an op or collective that takes longer ends the run, saying who waits for whom
    sequence_parallel: bool = False  # shard the residual stream over tp along the sequence
    zero1: bool = True  # shard the optimizer state over the data-parallel ranks


@dataclass(frozen=True)
class DataSection:
    """Where data lies: folders of shards (tools/prepare_data.py writes them), URLs of such, patterns, or JSONL."""

    train: Union[str, tuple[Union[str, tuple[str, float]], ...]] = REQUIRED  # a place, or [[place, weight], ...]
    eval: str = ""  # held-out data; empty: no evaluation
    seed: int = 1234  # of the order of samples, and of what is drawn of their cuts
    chunks: str = "fixed"  # ways to cut: fixed | right | uniform | random | sentence, or a mix: fixed:0.7, right:0.3
    max_stride: int = 0  # strides are drawn: the model's, twice, four times that ... up to this; 0: the model's
    pack_tokens: int = 0  # documents share a sequence of at most so many tokens; 0: one document a sequence
    sequence_length: int = 32768  # of JSONL, which is prepared on first use: tokens of the longest sample
    on_bad_sample: str = "stop"  # stop | skip, when a row of JSONL is bad or a sample damaged
    workers: Union[int, str] = "auto"  # processes of a rank that read ahead; auto: one where data is behind a URL

    @property
    def sources(self) -> tuple[tuple[str, float], ...]:
        """Places to train on, each with its weight."""
        given = (self.train,) if isinstance(self.train, str) else self.train
        return tuple((one, 1.0) if isinstance(one, str) else one for one in given)


@dataclass(frozen=True)
class OptimizerSection:
    lr: float = 5e-5
    min_lr: float = 0.0  # cosine decay ends here
    warmup_steps: int = 10
    decay_steps: Union[int, str] = "auto"  # step at which min_lr is reached; auto: train.steps
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # never on vectors
    clip_grad: float = 1.5  # of the gradient's norm over all parameters; 0: off
    memory_lr_mult: float = 5.0  # learning rate of the memory nets / of the backbone


@dataclass(frozen=True)
class TrainSection:
    output: str = REQUIRED  # run folder: checkpoints/, tensorboard/, log.txt, config.yaml
    steps: int = REQUIRED  # type: ignore[assignment]  # optimizer steps in all
    global_batch_size: int = 8  # sequences a step, over all ranks
    trainable: str = "all"  # all | memory (memory nets and new embedding rows)
    bptt_chunks: Union[int, str] = "all"  # chunks that gradients flow through the memory, or all
    recompute: str = "none"  # none | full (recompute each chunk in its backward)
    loss_slice_tokens: int = 1024  # rows of logits that exist at once
    seed: int = 1234  # of everything random but the data order
    save_every: int = 0  # steps; 0: only at the end
    async_save: bool = True  # files are written while training goes on; needs host memory for a copy of the state
    keep_last: int = 0  # checkpoints that stay when a new one is whole, itself included; 0: all
    keep_every: int = 0  # checkpoints of its multiples stay beyond keep_last; 0: none
    on_failed_save: str = "go_on"  # go_on | stop, when a checkpoint cannot be written; the last one always stops
    on_nonfinite: str = "stop"  # stop | skip the step, when the loss or the gradient is not finite
    spike_guard: float = 0.0  # skip a step whose gradient norm is so many standard deviations too large; 0: off
    max_skips: int = 10  # steps skipped in a row that stop the run
    eval_every: int = 0  # steps; 0: never
    eval_sequences: int = 32  # held-out sequences of one evaluation
    device: str = "auto"  # cuda | cpu | auto: cuda where there is one
    cpu_threads: Union[int, str] = "auto"  # per process, on CPU; auto: cores / processes on this machine
    fuse_weight_gradients: bool = False  # add them to fp32 inside the product: Transformer Engine's layers only


@dataclass(frozen=True)
class LoggingSection:
    tensorboard: bool = True
    log_every: int = 1  # steps between lines on stdout; the log file has every step


@dataclass(frozen=True)
class ProfileSection:
    timeline: bool = False  # record the ops of one step: a picture and a trace under RUN/profile
    timeline_step: int = 2  # which step; the first one also warms up


@dataclass(frozen=True)
class Config:
    """A whole training run."""

    model: ModelSection = field(default_factory=ModelSection)
    memory: MemorySection = field(default_factory=MemorySection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    train: TrainSection = field(default_factory=TrainSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    profile: ProfileSection = field(default_factory=ProfileSection)


@dataclass(frozen=True)
class RopeScaling:
    """How a model's rotary frequencies were stretched for longer texts (transformers' keys, in rope_scaling)."""

    rope_type: str  # linear | llama3
    factor: float
    low_freq_factor: float = 1.0  # llama3's
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """Sizes of the backbone, as a checkpoint states them."""

    family: str  # Hugging Face model_type: qwen3, qwen2, llama, mistral; what differs is in the fields below
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int  # rows of the embedding, new tokens included; TP may pad it further
    norm_eps: float
    rope_theta: float
    tie_embeddings: bool
    init_std: float = 0.02
    max_positions: int = 32768  # of the original model, or its sliding window; a chunk and its slots must fit
    qk_norm: bool = True  # queries and keys are normed, per head
    qkv_bias: bool = False  # their projections and the values' have biases
    rope_scaling: RopeScaling | None = None


@dataclass(frozen=True)
class MemorySizes:
    """Sizes of the two memories and the ids of the tokens that write them, as a checkpoint states them."""

    chunk_size: int  # text tokens a chunk
    stride: int  # text tokens per beacon; -1: no temporary memory
    budget: int  # slots of the temporary FIFO
    memory_token_id: int  # stands for a slot where a position needs an id (placeholder_id); -1: none
    beacon_id: int  # -1: none
    global_beacon_ids: tuple[int, ...]  # empty: no global memory
    first_new_id: int  # ids from here on were added for CoMeT: trainable rows of the plug-in
    adapter_rank: int = 8

    @property
    def global_slots(self) -> int:
        return len(self.global_beacon_ids)

    @property
    def new_ids(self) -> range:
        """Ids added for CoMeT: the memory token, the global beacons, the beacon, in any order."""
        return range(self.first_new_id, 1 + max(self.memory_ids, default=self.first_new_id - 1))

    @property
    def memory_ids(self) -> tuple[int, ...]:
        """Ids that are no text."""
        return tuple(i for i in (self.memory_token_id, *self.global_beacon_ids, self.beacon_id) if i >= 0)


_JSON_TYPES = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,)}
_NESTED = {"RopeScaling | None": RopeScaling}


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """Build a dataclass from JSON data, ignoring nothing: an unknown or missing key or a wrong type is a TypeError."""
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise TypeError(f"unknown keys {unknown} for {kind.__name__}")
    for f in fields(kind):
        wanted = _JSON_TYPES.get(str(f.type))
        if wanted and f.name in values and type(values[f.name]) not in wanted:
            raise TypeError(f"{f.name}={values[f.name]!r} is no {f.type}")
    nested = {str(f.name): _NESTED[str(f.type)] for f in fields(kind) if str(f.type) in _NESTED}
    values = {k: from_dict(nested[k], v) if k in nested and v is not None else v for k, v in values.items()}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def to_dict(value: Any) -> dict[str, Any]:
    """Plain JSON data of a dataclass."""
    return asdict(value)
