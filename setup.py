"""Packaging. Ranges are stated here; the exact versions every make target uses are in constraints/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "comet_megatron" / "__init__.py").read_text()).group(1)

REQUIRES = [
    "torch>=2.6",  # tensors, autograd, torchrun
    "megatron-core>=0.16.1,<0.17",  # tensor parallelism, DDP, ZeRO-1, sharded checkpoints
    "transformers>=4.57,<6",  # Hugging Face models and tokenizers, in and out
    "huggingface-hub>=0.34",  # writes safetensors in files of bounded size with an index
    "safetensors>=0.5",  # weights of Hugging Face folders; never pickle
    "sentencepiece>=0.2",  # training tokenizers
    "tokenizers>=0.22",  # what a trained tokenizer is exported to
    "webdataset>=0.2.111",  # the tar shards' convention, and what any other program reads them with
    "fsspec>=2024.2",  # shards behind URLs; torch and huggingface-hub bring it
    "omegaconf>=2.3",  # YAML with dotted overrides on dataclasses
    "PyYAML>=6",  # line numbers of a configuration's keys, for messages
    "numpy>=1.26",  # token arrays, the index of shards
    "tensorboard>=2.16",  # training curves
    "matplotlib>=3.8",  # the loss curve as PNG
    "tqdm>=4.66",  # progress bars
    "psutil>=5.9",  # Megatron's checkpoint writer waits for ever without it; peak memory on CPU
    "packaging>=23",  # Megatron-Core imports it without requiring it
]
EXTRAS = {
    "gpu": ["transformer-engine[pytorch]>=2.9,<2.12"],  # what Megatron-Core 0.16 names in its own metadata
    "s3": ["fsspec[s3]>=2024.2"],  # shards on object stores
    "zst": ["zstandard>=0.22"],  # .jsonl.zst as input of prepare_data
    "dev": [
        "zstandard>=0.22",  # its tests
        "pytest>=8",  # tests
        "pytest-timeout>=2.3",  # a test that hangs must fail
        "hypothesis>=6.100",  # properties of the pure parts
        "ruff>=0.6",  # lint and format
    ],
}

setup(
    name="comet-megatron",
    version=VERSION,
    description="CoMeT (Collaborative Memory Transformer) on Megatron-Core: language models on very long contexts",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["comet_megatron", "comet_megatron.*"]),
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
