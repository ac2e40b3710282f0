"""Doctor's judgement on made-up facts: a whole machine is ok in every line, and each fault shows in its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from comet_megatron.doctor.checks import GIB, check_machine, check_software
from comet_megatron.doctor.facts import ApexFacts, Gpu, Machine, Software, TeFacts, TorchFacts
from comet_megatron.doctor.gather import project_requirements
from comet_megatron.doctor.lines import MISSING, OK, WRONG, Line, exit_code, merge_hosts, show, summarize

REQUIREMENTS, GPU_REQUIREMENTS = project_requirements()
H200 = Gpu("NVIDIA H200", 141 * GIB, 90)
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 90)
VERSIONS = {
    "torch": "2.10.0a0+b558c986e8.nv25.11",
    "megatron-core": "0.16.1",
    "transformer-engine": "2.9.0+70f53666",
    "flash-attn": "2.7.4.post1",
    "psutil": "7.2.2",
    "transformers": "5.23.0",
    "huggingface-hub": "2.4.0",
    "safetensors": "0.8.0",
    "sentencepiece": "0.2.3",
    "tokenizers": "0.23.3",
    "webdataset": "1.0.2",
    "omegaconf": "2.4.0",
    "pyyaml": "6.0.3",
    "numpy": "2.4.6",
    "tensorboard": "2.21.0",
    "matplotlib": "3.11.2",
    "fsspec": "2026.9.0",
    "tqdm": "4.70.1",
    "packaging": "26.3",
}
IMAGE = Software(
    python=(3, 12, 3),
    requirements=REQUIREMENTS,
    gpu_requirements=GPU_REQUIREMENTS,
    versions=VERSIONS,
    torch=TorchFacts(cuda="13.0", nccl="2.28.8", has_flash=True),
    apex=ApexFacts(is_there=True, is_nvidias=True, symbols=("amp_C", "fused_weight_gradient_mlp_cuda")),
)
NODE = Machine(
    host="node1",
    devices=8,
    driver="580.95.05",
    driver_cuda="13.0",
    gpus=(H200,) * 8,
    processes=8,
    shared_bytes=64 * GIB,
    open_files=1 << 20,
    has_rdma=True,
)
LAPTOP = Machine(host="laptop", shared_bytes=8 * GIB, open_files=1024, locked_bytes=8 << 20)


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in VERSIONS.items() if name not in names}


def lines_of(software: Software, machine: Machine) -> dict[str, Line]:
    """By name."""
    return {line.name: line for line in (*check_software(software), *check_machine(machine, software))}


def test_a_whole_machine_is_ok_in_every_line():
    lines = lines_of(IMAGE, NODE)
    assert {name: line.what for name, line in lines.items() if line.state != OK} == {}
    assert exit_code(list(lines.values()), strict=True) == 0
    assert lines["GPUs"].what == "8 x NVIDIA H200, 141 GiB, compute capability 9.0"


def test_a_laptop_lacks_only_what_is_for_gpus_and_that_is_no_failure_unless_strict():
    software = replace(
        IMAGE, torch=TorchFacts(), apex=ApexFacts(), versions=without("transformer-engine", "flash-attn")
    )
    lines = list(lines_of(software, LAPTOP).values())
    missing = [line.name for line in lines if line.state == MISSING]
    assert missing == ["CUDA", "NCCL", "Transformer Engine", "apex", "flash attention", "driver", "GPUs"]
    assert not [line for line in lines if line.state == WRONG]
    assert (exit_code(lines, strict=False), exit_code(lines, strict=True)) == (0, 1)
    assert "on CPU everything runs" in summarize(lines, strict=False)
    assert "to mend: CUDA, NCCL" in summarize(lines, strict=True)


Change = Callable[[Software, Machine], tuple[Software, Machine]]


def software(**changes: object) -> Change:
    return lambda s, m: (replace(s, **changes), m)


def machine(**changes: object) -> Change:
    return lambda s, m: (s, replace(m, **changes))


def versions(**changes: str) -> Change:
    return software(versions={**VERSIONS, **{name.replace("_", "-"): version for name, version in changes.items()}})


UNDEFINED = "ImportError: transformer_engine_torch.so: undefined symbol: _ZN3c10"

FAULTS = {
    "old python": (software(python=(3, 10, 4)), "Python", WRONG, "3.10.4", "python3.11"),
    "old torch": (versions(torch="2.5.1"), "torch", WRONG, "2.5.1 is not >=2.6", "torch>=2.6"),
    "no torch": (software(versions=without("torch")), "torch", MISSING, "not installed", "pip install 'torch>=2.6'"),
    "broken torch": (software(torch=TorchFacts(error="libfoo.so")), "torch", WRONG, "libfoo.so", "--force-reinstall"),
    "other megatron": (versions(megatron_core="0.19.2"), "megatron-core", WRONG, "0.19.2 is not", "<0.17,>=0.16.1"),
    "no psutil": (
        software(versions=without("psutil")),
        "psutil",
        MISSING,
        "wait for ever",
        "pip install 'psutil>=5.9'",
    ),
    "another package": (
        software(versions={**without("tqdm"), "tokenizers": "0.21"}),
        "other packages",
        WRONG,
        "tokenizers 0.21 is not >=0.22; tqdm not installed",
        "'tokenizers>=0.22' 'tqdm>=4.66'",
    ),
    "new te": (versions(transformer_engine="2.12.0"), "Transformer Engine", WRONG, "2.12.0 is not", "<2.12,>=2.9"),
    "te of another cuda": (
        software(te=TeFacts(core_cuda=("12",))),
        "Transformer Engine",
        WRONG,
        "is for CUDA 12, and torch is for CUDA 13.0",
        "--no-build-isolation",
    ),
    "te of another torch": (
        software(te=TeFacts(error=UNDEFINED)),
        "Transformer Engine",
        WRONG,
        "was built for another torch",
        "--force-reinstall --no-deps",
    ),
    "te that fails": (software(te=TeFacts(error="oh")), "Transformer Engine", WRONG, "cannot be imported: oh", "pip"),
    "unrelated apex": (
        software(apex=ApexFacts(is_there=True)),
        "apex",
        WRONG,
        "unrelated one",
        "pip uninstall -y apex",
    ),
    "uncompiled apex": (
        software(apex=ApexFacts(is_there=True, is_nvidias=True, symbols=("amp_C",))),
        "apex",
        MISSING,
        "without its compiled fused_weight_gradient_mlp_cuda (gradients",
        "docker build",
    ),
    "old driver": (machine(driver_cuda="12.4"), "driver", WRONG, "torch is built for CUDA 13.0", "cuda-drivers"),
    "no driver": (machine(driver="", gpus=()), "driver", MISSING, "none, for 8 GPUs", "cuda-drivers"),
    "gpus unseen": (machine(gpus=()), "GPUs", WRONG, "8 are built in, and torch sees none", "--gpus all"),
    "torch for cpu": (
        lambda s, m: (replace(s, torch=TorchFacts()), replace(m, gpus=())),
        "GPUs",
        WRONG,
        "as it is built for CPU",
        "docker build",
    ),
    "mixed gpus": (
        machine(gpus=(H200, H100, H200)),
        "GPUs",
        WRONG,
        "of different kinds: 1 x NVIDIA H100 80GB HBM3, 80 GiB, 2 x NVIDIA H200, 141 GiB",
        "CUDA_VISIBLE_DEVICES=0,2",
    ),
    "too many processes": (machine(processes=9), "processes", WRONG, "which has 8 GPUs", "--nproc-per-node 8"),
    "docker's shared memory": (machine(shared_bytes=64 << 20), "shared memory", WRONG, "64 MiB", "--shm-size 16g"),
    "no shared memory": (machine(shared_bytes=None), "shared memory", WRONG, "no /dev/shm", "mount"),
    "few files": (machine(open_files=1024), "open files", WRONG, "1,024; 16,384 are needed", "ulimit -n"),
    "locked memory": (machine(locked_bytes=8 << 20), "locked memory", WRONG, "RDMA", "ulimit -l unlimited"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows_in_its_own_line_with_the_command_that_mends_it(fault):
    change, name, state, what, mend = FAULTS[fault]
    line = lines_of(*change(IMAGE, NODE))[name]
    assert line.state == state, line
    assert what in line.what
    assert mend in line.mend
    assert exit_code([line], strict=True) == 1
    assert exit_code([line], strict=False) == int(state == WRONG or line.is_needed)
    assert name in show([line]) and mend in show([line])


def test_where_an_image_is_built_te_cannot_load_for_want_of_a_driver_and_that_is_no_fault():
    error = "OSError: libcuda.so.1: cannot open shared object file"
    line = lines_of(replace(IMAGE, te=TeFacts(error=error)), NODE)["Transformer Engine"]
    assert (line.state, line.what) == (OK, "2.9.0+70f53666; not loaded, as there is no driver")


def test_what_mends_neighbours_stands_once():
    lines = [Line(MISSING, "a", "x", "m"), Line(MISSING, "b", "x", "m"), Line(WRONG, "c", "x", "n"), Line(OK, "d", "x")]
    shown = show(lines).splitlines()
    assert [line.split()[-1] for line in shown] == ["x", "x", "m", "x", "n", "x"]


def test_machines_are_told_apart_only_where_they_differ():
    same, first, second = Line(OK, "Python", "3.12"), Line(OK, "driver", "580"), Line(WRONG, "driver", "535", "mend")
    merged = merge_hosts({"node1": [same, first], "node2": [same, second]})
    assert merged == [same, Line(OK, "driver", "node1: 580"), Line(WRONG, "driver", "node2: 535", "mend")]
