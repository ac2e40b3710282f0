"""What a configuration must obey: ranges and combinations, on the config alone, and with a model and processes.

Every check_ function is pure and returns all problems it finds; require() raises them as one ConfigError.
`where` is LoadedConfig.where: it says which line of the YAML file a value comes from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from comet_megatron.config.precision import FP8_RECIPES, fp8_size_problems, precision_problems
from comet_megatron.config.schema import REQUIRED, Architecture, Config, MemorySizes, to_dict
from comet_megatron.errors import ConfigError

MAX_SEED = 2**32 - 1  # the largest that NumPy takes
HF_PREFIX = "hf:"  # of model.init_from

_CHOICES = {
    "model.precision": ("fp32", "bf16", "fp8"),
    "model.backend": ("te", "torch", "auto"),
    "model.fp8_recipe": ("auto", *FP8_RECIPES),
    "train.device": ("auto", "cuda", "cpu"),
    "train.trainable": ("all", "memory"),
    "train.recompute": ("none", "full"),
    "train.on_failed_save": ("go_on", "stop"),
    "train.on_nonfinite": ("stop", "skip"),
    "data.on_bad_sample": ("stop", "skip"),
}
# Smallest whole number allowed.
_AT_LEAST = {
    "parallel.tp": 1,
    "parallel.pp": 1,
    "parallel.slack": 0,
    "optimizer.warmup_steps": 0,
    "data.max_stride": 0,
    "data.pack_tokens": 0,
    "data.sequence_length": 32,
    "model.fp8_bf16_layers": 0,
    "train.steps": 1,
    "train.global_batch_size": 1,
    "train.loss_slice_tokens": 1,
    "train.save_every": 0,
    "train.keep_last": 0,
    "train.keep_every": 0,
    "train.max_skips": 1,
    "train.eval_every": 0,
    "train.eval_sequences": 1,
    "logging.log_every": 1,
    "profile.timeline_step": 1,
}
_ABOVE_ZERO = ("parallel.timeout_s", "optimizer.lr", "optimizer.eps", "optimizer.memory_lr_mult")
_ZERO_OR_MORE = ("optimizer.min_lr", "optimizer.weight_decay", "optimizer.clip_grad", "train.spike_guard")
_COUNT_OR_WORD = {
    "train.bptt_chunks": "all",
    "train.cpu_threads": "auto",
    "optimizer.decay_steps": "auto",
    "memory.chunk_size": "auto",
    "memory.budget": "auto",
    "memory.adapter_rank": "auto",
}
_NOT_EMPTY = ("train.output",)
_SHOWN_AT_MOST = 10  # values in a list of what would work

Where = Mapping[str, str]


def require(problems: Iterable[ConfigError]) -> None:
    """Raise all `problems` as one ConfigError, each once; do nothing if there are none."""
    unique = {str(problem): problem for problem in problems}
    if unique:
        raise ConfigError.collect(list(unique.values()))


def check_config(config: Config, *, where: Where | None = None) -> list[ConfigError]:
    """Problems of the configuration alone: each value's range, and values that do not go together."""
    where = where or {}
    values = {f"{section}.{k}": v for section, inner in to_dict(config).items() for k, v in inner.items()}
    if missing := [key for key, value in values.items() if value == REQUIRED]:
        return [_problem(f"{key} has no value; give one", where, key) for key in missing]
    return _check_ranges(values, where) + _check_combinations(config, where)


def _check_ranges(values: Mapping[str, Any], where: Where) -> list[ConfigError]:
    problems = []

    def refuse(key: str, must: str) -> None:
        problems.append(_problem(f"{key}={values[key]!r} must be {must}", where, key))

    for key in _NOT_EMPTY:
        if not values[key].strip():
            refuse(key, "the path of a folder")
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            refuse(key, " or ".join(choices))
    for key, least in _AT_LEAST.items():
        if values[key] < least:
            refuse(key, f"{least} or more")
    for key in _ABOVE_ZERO:
        if not 0 < values[key] < math.inf:  # also refuses nan
            refuse(key, "a number above 0")
    for key in _ZERO_OR_MORE:
        if not 0 <= values[key] < math.inf:
            refuse(key, "0 or a number above")
    for key, word in _COUNT_OR_WORD.items():
        if values[key] != word and (isinstance(values[key], str) or values[key] < 1):
            refuse(key, f"{word}, or 1 or more")
    if (workers := values["data.workers"]) != "auto" and (isinstance(workers, str) or workers < 0):
        refuse("data.workers", "auto, or 0 or more")
    if not all(0 <= beta < 1 for beta in values["optimizer.betas"]):
        refuse("optimizer.betas", "two numbers from 0 up to, but not, 1")
    for key in ("data.seed", "train.seed"):
        if not 0 <= values[key] <= MAX_SEED:
            refuse(key, f"from 0 to {MAX_SEED}")
    return problems


def _check_combinations(config: Config, where: Where) -> list[ConfigError]:
    problems = []
    optimizer, train = config.optimizer, config.train
    problems += check_start(config, where)
    problems += _check_sources(config, where)
    problems += [_problem(what, where, *keys) for what, keys in precision_problems(config)]
    if 0 < optimizer.lr < optimizer.min_lr:
        what = f"optimizer.min_lr={optimizer.min_lr:g} is above optimizer.lr={optimizer.lr:g}; use at most that"
        problems.append(_problem(what, where, "optimizer.min_lr", "optimizer.lr"))
    automatic = isinstance(optimizer.decay_steps, str)
    end, end_key = (train.steps, "train.steps") if automatic else (optimizer.decay_steps, "optimizer.decay_steps")
    if 1 <= end < optimizer.warmup_steps:
        what = f"optimizer.warmup_steps={optimizer.warmup_steps} is more than {end_key}={end}; use {end} or fewer"
        problems.append(_problem(what, where, "optimizer.warmup_steps", end_key))
    if config.parallel.sequence_parallel and config.parallel.tp == 1:
        what = "parallel.sequence_parallel=true shards over tensor-parallel ranks, and parallel.tp=1 is one; "
        what += "use parallel.tp=2 or more, or sequence_parallel=false"
        problems.append(_problem(what, where, "parallel.sequence_parallel", "parallel.tp"))
    if train.eval_every > 0 and not config.data.eval.strip():
        what = f"train.eval_every={train.eval_every} needs held-out shards; set data.eval, or train.eval_every=0"
        problems.append(_problem(what, where, "train.eval_every", "data.eval"))
    problems += _check_keeping(config, where)
    if config.profile.timeline and config.profile.timeline_step > max(train.steps, 1):
        what = (
            f"profile.timeline_step={config.profile.timeline_step} comes after the last of train.steps={train.steps}; "
        )
        what += f"use {train.steps} or fewer"
        problems.append(_problem(what, where, "profile.timeline_step", "train.steps"))
    return problems + _check_layers_per_stage(config, where)


def _check_sources(config: Config, where: Where) -> list[ConfigError]:
    """Each place is named once, with a weight above 0."""
    key, sources, found = "data.train", config.data.sources, []
    form = "write data.train=PATH, or a list such as [[PATH, 0.7], [PATH, 0.3]]"
    if not sources:
        found.append(f"{key}=[] names no data; {form}")
    places = [place.strip() for place, _ in sources]
    if "" in places:
        advice = "" if isinstance(config.data.train, str) else f"; {form}"
        found.append(f"{key}={_shown_train(config)} must be the path of a folder{advice}")
    listed = not isinstance(config.data.train, str)
    if numbers := [place for place in places if listed and _is_number(place)]:
        advice = f"a weight goes with its path: {form}; a folder of that name is ./{numbers[0]}"
        found.append(f"{key} has {numbers[0]} where a path must be; {advice}")
    for place, weight in sources:
        if not 0 < weight < math.inf:
            found.append(f"{key}: the weight {weight:g} of {place} must be a number above 0")
    absolute = [place if "://" in place else os.path.abspath(place) for place in places if place]
    if twice := sorted({place for place in absolute if absolute.count(place) > 1}):
        found.append(f"{key} names {twice[0]} more than once; add its weights")
    return [_problem(what, where, key) for what in found]


def _shown_train(config: Config) -> str:
    train = config.data.train
    return repr(train) if isinstance(train, str) else f"[{', '.join(repr(place) for place, _ in config.data.sources)}]"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_keeping(config: Config, where: Where) -> list[ConfigError]:
    """keep_every does something: there are checkpoints of its steps, and others that are deleted."""
    train, problems = config.train, []
    every, save_every = train.keep_every, train.save_every
    if every > 0 and train.keep_last == 0:
        what = f"train.keep_every={every} changes nothing, as train.keep_last=0 keeps all checkpoints; "
        what += "set train.keep_last=1 or more, or train.keep_every=0"
        problems.append(_problem(what, where, "train.keep_every", "train.keep_last"))
    if every > 0 and (save_every <= 0 or every % save_every):
        fitting = "set train.save_every" if save_every <= 0 else f"use a multiple of {save_every}"
        what = f"train.keep_every={every} is for steps that are saved, and train.save_every={save_every}; {fitting}"
        problems.append(_problem(what, where, "train.keep_every", "train.save_every"))
    return problems


def check_start(config: Config, where: Where) -> list[ConfigError]:
    """One model to start from; the section memory is for a model that has none."""
    path, origin = config.model.path.strip(), config.model.init_from.strip()
    if not origin:
        problems = []
        if not path:
            what = f"model.path={config.model.path!r} must be the path of a folder; or give model.init_from=hf:DIR"
            problems.append(_problem(what, where, "model.path"))
        if given := [f"memory.{k}" for k, v in to_dict(config.memory).items() if v != "auto"]:
            what = f"{_listed(given, 'and')} would change nothing: a checkpoint (model.path) has its sizes; "
            problems.append(_problem(what + "leave the section memory out, or use model.init_from", where, *given))
        return problems
    problems = []
    if path:
        what = f"model.path={path!r} and model.init_from={origin!r} are two models to start from; give one"
        problems.append(_problem(what, where, "model.path", "model.init_from"))
    if not origin.startswith(HF_PREFIX) or not origin.removeprefix(HF_PREFIX):
        what = f"model.init_from={origin!r} must be hf:DIR, DIR a Hugging Face model; a checkpoint goes in model.path"
        problems.append(_problem(what, where, "model.init_from"))
    for key, least in (("global_slots", 0), ("stride", 1)):
        value = getattr(config.memory, key)
        off = " or -1" if key == "stride" else ""
        if value != "auto" and (isinstance(value, str) or (value < least and not (off and value == -1))):
            what = f"memory.{key}={value!r} must be auto, or {least} or more{off}"
            problems.append(_problem(what, where, f"memory.{key}"))
    return problems


def _check_layers_per_stage(config: Config, where: Where) -> list[ConfigError]:
    """A word or one whole number above 0 for each stage."""
    key, layers, pp = "parallel.layers_per_stage", config.parallel.layers_per_stage, config.parallel.pp
    if isinstance(layers, str):
        what = f"{key}={layers!r} must be auto, or a list of numbers such as [8, 8, 6]"
        return [] if layers == "auto" else [_problem(what, where, key)]
    problems = []
    if len(layers) != pp:
        stages = "1 stage" if pp == 1 else f"{pp} stages"
        what = f"{key}={_shown(layers)} is for {len(layers)} stages, and parallel.pp={pp} is {stages}; "
        problems.append(_problem(what + f"give {pp} number{'s' * (pp > 1)}, or auto", where, key, "parallel.pp"))
    if any(count < 1 for count in layers):
        what = f"{key}={_shown(layers)} leaves a stage without a layer; give each 1 or more"
        problems.append(_problem(what, where, key))
    return problems


def check_layout(
    config: Config,
    architecture: Architecture,
    memory: MemorySizes,
    *,
    world_size: int,
    where: Where | None = None,
) -> list[ConfigError]:
    """Problems of this configuration with this checkpoint on `world_size` processes; check_config is not repeated.

    The checkpoint's own sizes are checked too. The vocabulary has no rule: it is padded until tp divides it.
    """
    where = where or {}
    origin = config.model.path or config.model.init_from.removeprefix(HF_PREFIX)
    problems = check_architecture(architecture, where=origin)
    problems += check_memory_sizes(memory, architecture, where=origin)
    if config.train.trainable == "memory" and memory.global_slots == 0 and memory.stride == -1:
        what = "train.trainable=memory, but the model has no memory; use train.trainable=all"
        problems.append(_problem(what, where, "train.trainable"))
    elif config.train.trainable == "memory" and set(memory.new_ids) != set(memory.memory_ids):
        what = "train.trainable=memory, but there are text ids among the model's beacon ids; use train.trainable=all"
        problems.append(_problem(what, where, "train.trainable"))
    tp, pp = config.parallel.tp, config.parallel.pp
    problems += [_problem(what, where, *keys) for what, keys in fp8_size_problems(config, architecture)]
    if tp < 1 or pp < 1 or world_size < 1:
        return problems  # check_config says it of tp and pp; nothing can be divided
    problems += _check_stages(config, architecture, where)
    if pp > 1:
        problems += _check_tp(tp, architecture, tp, where)
        problems += _check_world(tp, pp, world_size, where, layers=architecture.num_layers)
    else:
        problems += _check_tp(tp, architecture, world_size, where)
    return problems + _check_batch(config, world_size, where)


def _check_stages(config: Config, architecture: Architecture, where: Where) -> list[ConfigError]:
    """Every layer is on one stage, and every stage has one."""
    pp, layers, given = config.parallel.pp, architecture.num_layers, config.parallel.layers_per_stage
    key = "parallel.layers_per_stage"
    if pp > layers >= 1:
        what = f"parallel.pp={pp} stages are more than the model's {layers} layer{'s' * (layers > 1)}; "
        return [_problem(what + f"use parallel.pp={layers} or fewer", where, "parallel.pp")]
    if not isinstance(given, str) and len(given) == pp and sum(given) != layers:
        what = f"{key}={_shown(given)} are {sum(given)} layers, and the model has {layers}; "
        return [_problem(what + f"give numbers that add up to {layers}, or auto", where, key)]
    return []


def _check_world(tp: int, pp: int, world_size: int, where: Where, *, layers: int) -> list[ConfigError]:
    """tp * pp divides the processes."""
    if world_size % (tp * pp) == 0:
        return []
    what = f"parallel.tp={tp} x parallel.pp={pp} = {tp * pp} does not divide the {_processes(world_size)}; "
    below, above = world_size // (tp * pp) * tp * pp, (world_size // (tp * pp) + 1) * tp * pp
    start = f"start {above} processes" if below == 0 else f"start {below} or {above} processes"
    fitting = [n // tp for n in _divisors(world_size) if n % tp == 0 and n // tp <= layers]
    other = f", or use parallel.pp={_some(fitting, near=pp)}" if fitting else ""
    return [_problem(what + start + other, where, "parallel.pp", "parallel.tp")]


def _check_tp(tp: int, architecture: Architecture, world_size: int, where: Where) -> list[ConfigError]:
    """tp divides what it shards, and the processes."""
    shared = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
    sizes = {name: getattr(architecture, name) for name in shared}
    if min(sizes.values()) < 1:
        return []  # check_architecture says it
    problems = []
    fitting = _divisors(math.gcd(*sizes.values()))
    if wrong := [f"{name}={size}" for name, size in sizes.items() if size % tp]:
        what = f"parallel.tp={tp} does not divide the model's {_listed(wrong, 'and')}; use {_some(fitting, near=tp)}"
        problems.append(_problem(what, where, "parallel.tp"))
    fitting_here = _some([n for n in fitting if world_size % n == 0], near=tp)
    if world_size < tp:
        what = f"parallel.tp={tp} needs at least {tp} processes, and there {_are(world_size)}; "
        problems.append(_problem(what + f"start {tp}, or use parallel.tp={fitting_here}", where, "parallel.tp"))
    elif world_size % tp:
        below, above = world_size // tp * tp, (world_size // tp + 1) * tp
        what = f"parallel.tp={tp} does not divide the {world_size} processes; use parallel.tp={fitting_here}, "
        what += f"or start {below} or {above} processes"
        problems.append(_problem(what, where, "parallel.tp"))
    return problems


def _check_batch(config: Config, world_size: int, where: Where) -> list[ConfigError]:
    """Every data-parallel rank gets the same number of sequences."""
    tp, pp, batch = config.parallel.tp, config.parallel.pp, config.train.global_batch_size
    dp = world_size // (tp * pp)
    if dp == 0 or world_size % (tp * pp) or batch < 1 or batch % dp == 0:
        return []
    divided = f"{world_size} processes / parallel.tp={tp}" + (f" / parallel.pp={pp}" if pp > 1 else "")
    fitting = [n for n in (batch // dp * dp, (batch // dp + 1) * dp) if n]
    what = (
        f"train.global_batch_size={batch} cannot be shared evenly by {dp} data-parallel ranks "
        f"({divided}); use {_listed(fitting)}"
    )
    keys = ("parallel.tp", "parallel.pp") if pp > 1 else ("parallel.tp",)
    return [_problem(what, where, "train.global_batch_size", *keys)]


def check_architecture(architecture: Architecture, *, where: str = "") -> list[ConfigError]:
    """Problems of a backbone's sizes; `where` names the checkpoint they come from."""
    problems = []
    counts = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim")
    for name in (*counts, "vocab_size", "max_positions"):
        if getattr(architecture, name) < 1:
            problems.append(ConfigError(f"{name}={getattr(architecture, name)} must be 1 or more", where=where))
    for name in ("norm_eps", "rope_theta", "init_std"):
        if not 0 < getattr(architecture, name) < math.inf:
            problems.append(ConfigError(f"{name}={getattr(architecture, name)} must be above 0", where=where))
    head_dim, heads, groups = architecture.head_dim, architecture.num_attention_heads, architecture.num_query_groups
    if head_dim > 0 and head_dim % 2:
        fitting = [n for n in (head_dim - 1, head_dim + 1) if n]
        what = f"head_dim={head_dim} must be even, for rotary positions turn pairs; use {_listed(fitting)}"
        problems.append(ConfigError(what, where=where))
    if heads > 0 and groups > 0 and heads % groups:
        what = f"num_query_groups={groups} does not divide num_attention_heads={heads}; "
        problems.append(ConfigError(what + f"use {_some(_divisors(heads), near=groups)}", where=where))
    return problems


def check_memory_sizes(sizes: MemorySizes, architecture: Architecture, *, where: str = "") -> list[ConfigError]:
    """Problems of the memories' sizes and token ids on this backbone; `where` names the checkpoint."""
    chunk, stride = sizes.chunk_size, sizes.stride
    found = []
    if chunk < 1:
        found.append(f"chunk_size={chunk} must be 1 or more")
    if stride != -1 and stride < 1:
        found.append(f"stride={stride} must be 1 or more, or -1 for no temporary memory")
    if stride > 0 and sizes.budget < 1:
        found.append(f"budget={sizes.budget} must be 1 or more; for no temporary memory use stride=-1")
    if sizes.adapter_rank < 1:
        found.append(f"adapter_rank={sizes.adapter_rank} must be 1 or more")
    found += _check_ids(sizes, architecture.vocab_size)
    if not found:
        found += _check_positions(sizes, architecture.max_positions)
    return [ConfigError(what, where=where) for what in found]


def check_stride_divides(sizes: MemorySizes, *, where: str = "") -> list[ConfigError]:
    """A new model's stride divides its chunk size, so that every beacon stands for as many tokens.

    The model itself computes any sizes, and a checkpoint made elsewhere may have them.
    """
    chunk, stride = sizes.chunk_size, sizes.stride
    if stride < 1 or chunk < 1 or chunk % stride == 0:
        return []
    what = f"stride={stride} does not divide chunk_size={chunk}; use {_some(_divisors(chunk), near=stride)}"
    return [ConfigError(what, where=where)]


def _check_ids(sizes: MemorySizes, vocab_size: int) -> list[str]:
    """Each token that writes memory is one of its own, and has a row in the embedding."""
    found = []
    ids = sizes.global_beacon_ids
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        found.append(
            f"global_beacon_ids has {_listed(twice[:3], 'and')} more than once; each global slot needs its own id"
        )
    if sizes.stride > 0 and sizes.beacon_id in ids:
        found.append(f"beacon_id={sizes.beacon_id} is one of global_beacon_ids; it needs an id of its own")
    last = vocab_size - 1
    if outside := [i for i in ids if not 0 <= i <= last]:
        such = f"{outside[0]} is" if len(outside) == 1 else f"{len(outside)} ids, {outside[0]} for one, are"
        found.append(f"global_beacon_ids: {such} outside the vocabulary; use 0 to {last}")
    if sizes.stride > 0 and not 0 <= sizes.beacon_id <= last:
        found.append(f"beacon_id={sizes.beacon_id} is outside the vocabulary; use 0 to {last}")
    if (sizes.stride > 0 or ids) and not 0 <= sizes.memory_token_id <= last:
        found.append(f"memory_token_id={sizes.memory_token_id} is outside the vocabulary; use 0 to {last}")
    if not 0 <= sizes.first_new_id <= vocab_size:
        found.append(f"first_new_id={sizes.first_new_id} is outside the vocabulary; use 0 to {vocab_size}")
    return found


def _check_positions(sizes: MemorySizes, max_positions: int) -> list[str]:
    """A full chunk with all its slots and beacons fits in the positions the backbone was made for."""
    parts = {"text": sizes.chunk_size}
    if sizes.stride > 0:
        parts |= {"beacons": math.ceil(sizes.chunk_size / sizes.stride), "temporary slots": sizes.budget}
    if sizes.global_slots:
        parts |= {"global beacons": sizes.global_slots, "global slots": sizes.global_slots}
    needed = sum(parts.values())
    if needed <= max_positions:
        return []
    told = " + ".join(f"{count} {name}" for name, count in parts.items())
    advice = "use a smaller chunk_size, budget or number of global beacons"
    return [f"a chunk needs {needed} positions ({told}), and the model has max_positions={max_positions}; {advice}"]


# --- messages --------------------------------------------------------------------------------------------------------


def _problem(what: str, where: Where, *keys: str) -> ConfigError:
    """A problem placed at the lines that give `keys`; values left at their default have no line."""
    return ConfigError(what, where=", ".join(dict.fromkeys(where[key] for key in keys if key in where)))


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _some(values: Sequence[int], *, near: int) -> str:
    """All the values if they are few, else those around `near`."""
    if len(values) <= _SHOWN_AT_MOST:
        return _listed(values)
    around = [n for n in values if n <= near][-2:] + [n for n in values if n > near][:2]
    return f"{_listed(around)} (or another divisor)"


def _listed(values: Sequence[object], joint: str = "or") -> str:
    """1, 2 or 4."""
    *most, last = [str(value) for value in values]
    return f"{', '.join(most)} {joint} {last}" if most else last


def _shown(numbers: Sequence[int]) -> str:
    """[5, 5, 1]."""
    return f"[{', '.join(map(str, numbers))}]"


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _are(processes: int) -> str:
    return "is 1" if processes == 1 else f"are {processes}"
