"""The runs that docs/scaling.md gives recipes for, and its tables: models, lengths and numbers of GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from comet_megatron.planning.advise import Question, Refusal, advise
from comet_megatron.planning.balance import told_layers
from comet_megatron.planning.devices import GPUS
from comet_megatron.planning.shapes import named_shape
from comet_megatron.planning.told import markdown

GB = 1e9
MODELS = ("qwen3-4b", "qwen3-8b", "qwen3-32b")
GPU_KINDS = ("h100", "h200")
SEQUENCES = {131_072: {8: 8, 64: 64, 256: 256}, 1_048_576: {8: 2, 64: 8, 256: 32}}  # tokens -> GPUs -> a step's
HEAD = ("model", "GPUs", "layout", "layers of the stages", "GB of a rank", "step, s", "tokens/s/GPU", "MFU", "bubble")


@dataclass(frozen=True)
class Recipe:
    """One row."""

    model: str
    tokens: int
    sequences: int
    num_gpus: int
    gpu: str

    @property
    def command(self) -> str:
        """That plans it and prints the runners-up too."""
        return (
            f"python tools/plan.py --advise --model {self.model} --tokens {self.tokens} "
            f"--sequences {self.sequences} --gpus {self.num_gpus} --gpu {self.gpu}"
        )

    def row(self) -> tuple[str, ...]:
        """The fastest layout, or what the nearest would need."""
        architecture, memory = named_shape(self.model)
        gpu = GPUS[self.gpu]
        question = Question(
            architecture, memory, self.tokens, self.sequences, self.num_gpus, gpu, memory_bytes=gpu.memory_bytes
        )
        advice = advise(question, best=1)
        start = (self.model, f"{self.num_gpus} {self.gpu}")
        if not advice.options:
            return (*start, nearest(advice.refusals, question.usable_bytes), "", "", "", "", "", "")
        option = advice.options[0]
        return (
            *start,
            str(option.layout),
            told_layers(option.layers),
            f"{option.needs.total / GB:.1f}",
            f"{option.seconds:.1f}",
            f"{option.tokens_per_second:,.0f}",
            f"{option.mfu:.0%}",
            f"{option.bubble:.0%}",
        )


def nearest(refusals: tuple[Refusal, ...], usable_bytes: int) -> str:
    """Of layouts that do not fit, the one that needs least."""
    too_large = [refusal for refusal in refusals if refusal.needed_bytes]
    if not too_large:
        return "none possible"
    least = min(too_large, key=lambda refusal: refusal.needed_bytes)
    return f"none fits: {least.layout} needs {least.needed_bytes / GB:.1f} GB of {usable_bytes / GB:.1f}"


def recipes(tokens: int) -> list[Recipe]:
    """Of one length."""
    return [
        Recipe(model, tokens, sequences, num_gpus, gpu)
        for model in MODELS
        for num_gpus, sequences in SEQUENCES[tokens].items()
        for gpu in GPU_KINDS
    ]


def recipe_tables() -> list[str]:
    """Markdown, a table for each length."""
    lines: list[str] = []
    for tokens, batches in SEQUENCES.items():
        told = ", ".join(f"{sequences} on {num_gpus}" for num_gpus, sequences in batches.items())
        rows = [recipe.row() for recipe in recipes(tokens)]
        lines += [f"### {tokens:,} tokens", "", f"Sequences a step: {told} GPUs.", "", *markdown([HEAD, *rows]), ""]
    return lines[:-1]
