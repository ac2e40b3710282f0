# The GPU image: NVIDIA's PyTorch, Transformer Engine and apex as they come, fitting each other, and this project.
#
#   docker build -t comet-megatron .
#   docker run --gpus all --shm-size 16g --ulimit memlock=-1 --user "$(id -u):$(id -g)" -e HOME=/tmp -v "$PWD:/workspace" \
#     -e MODEL=models/Qwen3-4B -e DATA=data/texts -e OUTPUT=runs/comet_128k comet-megatron \
#     bash /opt/comet-megatron/examples/finetune_comet_128k.sh
#
# What is built is checked while it is built: no install may change torch, Transformer Engine or apex, and nothing may be
# missing. On a machine without a Docker engine the steps were rehearsed one by one (docs/gpu.md); the image itself has
# not been built yet.
#
# The tag: Megatron-Core 0.16 wants Transformer Engine >= 2.9 and < 2.12. By public reports of what runs in the images,
# 25.11 has Transformer Engine 2.9.0+70f53666, torch 2.10.0a0+b558c986e8.nv25.11 and CUDA 13.0, 25.12 has 2.10.0+769ed778
# and, by its release notes (docs.nvidia.com/deeplearning/frameworks/pytorch-release-notes/rel-25-12.html), CUDA 13.1.
# Not verified here: whether 25.11 has apex with its compiled modules, which is why they are looked for below.
FROM nvcr.io/nvidia/pytorch:25.11-py3

WORKDIR /opt/comet-megatron

# apex only if its compiled modules are not there, and never the package of that name in the public index. The commit is
# one that was reported to build with torch 2.11 and CUDA 13; with this image it has not been tried.
ARG APEX_COMMIT=becbb77cea4cb54f2929f7c938a0a6f7dd1fdc39
RUN if ! python -c "import importlib.util as i, sys; \
      sys.exit(any(i.find_spec(m) is None for m in ('amp_C', 'fused_weight_gradient_mlp_cuda')))"; then \
      APEX_CPP_EXT=1 APEX_CUDA_EXT=1 PIP_CONSTRAINT='' pip install --no-cache-dir --no-build-isolation --no-deps \
        "git+https://github.com/NVIDIA/apex@${APEX_COMMIT}"; \
    fi

COPY setup.py pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY comet_megatron comet_megatron
COPY tools tools
COPY examples examples
COPY tokenizers tokenizers

# PIP_CONSTRAINT names the image's own list, which pins packages that this project has other versions of.
RUN PYTHONPATH=. python tools/doctor.py --freeze /tmp/image.json \
    && PIP_CONSTRAINT='' pip install --no-cache-dir --no-build-isolation -c constraints/ngc.txt . \
    && python tools/doctor.py --unchanged /tmp/image.json \
    && python tools/doctor.py --strict --no-gpu \
    && rm -rf /tmp/image.json build ./*.egg-info

RUN useradd --uid 10001 --create-home --shell /bin/bash comet \
    && mkdir -p /workspace \
    && chown comet:comet /workspace
USER 10001
WORKDIR /workspace
