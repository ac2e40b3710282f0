"""What precision, backend and FP8 recipe must obey, before it is known what the machine has (backend/precision.py).

Problems are words and the keys they are about; rules.py says where those stand.
"""

from __future__ import annotations

from comet_megatron.config.schema import Architecture, Config

FP8_RECIPES = ("tensorwise", "blockwise", "mxfp8", "delayed")
# Numbers of rows, and widths of matrices, come in multiples of it in an FP8 product.
FP8_MULTIPLES = {"tensorwise": 16, "mxfp8": 32, "blockwise": 128}
Problem = tuple[str, tuple[str, ...]]


def precision_problems(config: Config) -> list[Problem]:
    """Settings that do not go together."""
    model, train = config.model, config.train
    problems: list[Problem] = []
    if model.precision == "fp8" and model.backend == "torch":
        what = "model.precision=fp8 is computed by Transformer Engine, and model.backend=torch has none; "
        what += "use model.backend=te or auto, or model.precision=bf16"
        problems.append((what, ("model.precision", "model.backend")))
    if model.precision == "fp32" and model.backend == "te":
        what = "model.backend=te has no attention kernel for model.precision=fp32; "
        what += "use model.precision=bf16 or fp8, or model.backend=torch"
        problems.append((what, ("model.backend", "model.precision")))
    if model.precision != "fp8" and model.fp8_recipe != "auto":
        what = f"model.fp8_recipe={model.fp8_recipe} changes nothing with model.precision={model.precision}; "
        what += "use model.precision=fp8, or leave fp8_recipe out"
        problems.append((what, ("model.fp8_recipe", "model.precision")))
    elif model.fp8_recipe == "delayed":
        what = "model.fp8_recipe=delayed is not right in a loop over chunks: its scales come from the calls before, a "
        what += "module is called once for each chunk, recomputation calls in the opposite order, and ranks with other "
        what += "numbers of chunks would wait for each other's maxima; use auto, tensorwise, blockwise or mxfp8"
        problems.append((what, ("model.fp8_recipe",)))
    if train.device == "cpu" and (model.precision == "fp8" or model.backend == "te"):
        key, value = ("model.precision", "fp8") if model.precision == "fp8" else ("model.backend", "te")
        what = f"{key}={value} needs a GPU, and train.device=cpu; use train.device=auto, or bf16 or fp32 with torch"
        problems.append((what, (key, "train.device")))
    if train.fuse_weight_gradients and model.backend == "torch":
        what = "train.fuse_weight_gradients=true is for Transformer Engine's layers, and model.backend=torch has none; "
        what += "use model.backend=te, or false"
        problems.append((what, ("train.fuse_weight_gradients", "model.backend")))
    return problems


def fp8_size_problems(config: Config, architecture: Architecture) -> list[Problem]:
    """Some layer is computed in FP8, and each rank's part of its matrices has sizes that FP8 products take."""
    model, tp = config.model, config.parallel.tp
    if model.precision != "fp8" or tp < 1:
        return []
    problems: list[Problem] = []
    layers, at_each_end = architecture.num_layers, model.fp8_bf16_layers
    if 2 * at_each_end >= layers >= 1:
        what = f"model.fp8_bf16_layers={at_each_end} at each end leave none of {layers} layers in FP8; "
        what += f"use {(layers - 1) // 2} or fewer, or model.precision=bf16"
        problems.append((what, ("model.fp8_bf16_layers", "model.precision")))
    multiple = FP8_MULTIPLES.get(model.fp8_recipe, FP8_MULTIPLES["mxfp8"])  # auto may become it
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    widths = {
        "hidden": architecture.hidden_size,
        "queries, keys and values": (heads + 2 * groups) * architecture.head_dim // tp,
        "heads": heads * architecture.head_dim // tp,
        "feed-forward": architecture.ffn_hidden_size // tp,
    }
    if wrong := [f"{name} {width}" for name, width in widths.items() if width % multiple]:
        of_rank = f" on each of parallel.tp={tp} ranks" if tp > 1 else ""
        what = (
            f"an FP8 product takes widths in multiples of {multiple}, and the model has: {'; '.join(wrong)}{of_rank}; "
        )
        problems.append((what + "use model.precision=bf16", ("model.precision", "parallel.tp")))
    return problems
