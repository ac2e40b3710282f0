"""What this process can compute with: GPUs, Transformer Engine, apex, FP8; and why not, where it cannot.

The only place that tries out optional packages. Nothing here needs them, nor a GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache

# Of Megatron-Core 0.16's own metadata.
TE_WANTED = ">= 2.9, < 2.12"
APEX_SYMBOLS = ("amp_C", "fused_weight_gradient_mlp_cuda")  # the optimizer's, the fused weight gradient's


@dataclass(frozen=True)
class Found:
    """Something that may be there.

    Attributes:
        is_there: it can be used.
        version: "" where it has none or is not there.
        why_not: where it is not there, in words.
    """

    is_there: bool
    version: str = ""
    why_not: str = ""


@dataclass(frozen=True)
class Gpu:
    """One that this process sees.

    Attributes:
        capability: compute capability, for example (9, 0) for Hopper, (10, 0) for Blackwell.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class Capabilities:
    """Of this process.

    Attributes:
        cuda: a device, and the version torch was built for.
        te: Transformer Engine, importable.
        apex_optimizer, apex_gradients: the compiled parts of NVIDIA's apex.
        fp8: by recipe; what Transformer Engine says of this GPU.
        apex_would_fail: Megatron-Core finds apex's optimizer, of which the compiled part is missing.
    """

    cuda: Found
    gpus: tuple[Gpu, ...]
    te: Found
    apex_optimizer: Found
    apex_gradients: Found
    fp8: dict[str, Found]
    apex_would_fail: bool = False

    @property
    def adamw(self) -> str:
        """Which AdamW Megatron-Core takes, in words: it prefers Transformer Engine's, then apex's, then torch's."""
        if self.te.is_there:
            return "AdamW: Transformer Engine's, fused"
        if self.apex_optimizer.is_there:
            return "AdamW: apex's, fused"
        why = f"no Transformer Engine ({self.te.why_not}), no apex ({self.apex_optimizer.why_not})"
        return f"AdamW: torch's{', fused' if self.cuda.is_there else ''}; {why}"


@cache
def probe_capabilities() -> Capabilities:
    """Try everything out once. Imports torch, and Transformer Engine where it is installed."""
    cuda, gpus = _probe_gpus()
    te = probe_te()
    symbols = [probe_apex(symbol) for symbol in APEX_SYMBOLS]
    would_fail = not te.is_there and not symbols[0].is_there and _can_import("apex.optimizers", "FusedAdam")
    return Capabilities(cuda, gpus, te, *symbols, fp8=_probe_fp8(cuda, te), apex_would_fail=would_fail)


def _can_import(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except Exception:
        return False


def _probe_gpus() -> tuple[Found, tuple[Gpu, ...]]:
    import torch

    if torch.version.cuda is None:
        return Found(False, why_not=f"torch {torch.__version__} is built without CUDA"), ()
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or count == 0:
        why_not = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but sees no GPU"
        return Found(False, why_not=f"{why_not} (nvidia-smi, CUDA_VISIBLE_DEVICES)"), ()
    properties = [torch.cuda.get_device_properties(i) for i in range(count)]
    gpus = tuple(Gpu(p.name, (p.major, p.minor), p.total_memory) for p in properties)
    return Found(True, torch.version.cuda), gpus


def probe_te() -> Found:
    """Import Transformer Engine. One built for another torch or CUDA fails in many ways, none of them its own.

    After a failure it counts as not installed in this process: Megatron-Core, which imports it as well, expects an
    ImportError and nothing else.
    """
    try:
        version = importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec("transformer_engine") is None:
            return Found(False, why_not="not installed")
        version = "of unknown version"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # ImportError, OSError, RuntimeError, FileNotFoundError, AssertionError were seen
        import torch

        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # an import is a ModuleNotFoundError now
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        built = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
        why_not = f"{version} is installed and cannot be imported: {reason[:300]}; it must be built for {built}"
        return Found(False, version, why_not)
    return Found(True, version)


def probe_apex(symbol: str) -> Found:
    """A compiled part of NVIDIA's apex. The package called `apex` in the public index is another one."""
    try:
        importlib.import_module("apex")
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "apex"
        return Found(False, why_not="not installed" if missing else f"apex cannot be imported: {error}")
    try:
        importlib.import_module(symbol)
    except Exception as error:
        return Found(False, why_not=f"a package apex is installed, but not its compiled {symbol}: {error}")
    return Found(True)


def _probe_fp8(cuda: Found, te: Found) -> dict[str, Found]:
    recipes = ("tensorwise", "blockwise", "mxfp8")
    if not (cuda.is_there and te.is_there):
        missing = te.why_not if cuda.is_there else cuda.why_not
        return dict.fromkeys(recipes, Found(False, why_not=missing))
    manager = importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
    asked = (manager.is_fp8_available, manager.is_fp8_block_scaling_available, manager.is_mxfp8_available)
    found = {}
    for recipe, ask in zip(recipes, asked, strict=True):
        is_there, why_not = ask()
        found[recipe] = Found(bool(is_there), why_not=why_not)
    return found
