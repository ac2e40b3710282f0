#!/usr/bin/env bash
""":"
# Fine-tune CoMeT on sequences of 131,072 tokens. This file is read by the shell and by Python, so all of these work:
#
#   bash examples/finetune_comet_128k.sh                                 a process for each GPU; on CPU two
#   torchrun examples/finetune_comet_128k.sh                             one process
#   torchrun --nproc-per-node N examples/finetune_comet_128k.sh
#   torchrun --nnodes 2 --node-rank R --rdzv-endpoint HOST:PORT --nproc-per-node 8 examples/finetune_comet_128k.sh
#   torchrun --no-python --nproc-per-node N examples/finetune_comet_128k.sh
#
# With no settings it is the recipe of the paper: Qwen3-4B, chunks of 2048 tokens, 512 global slots, stride 8, budget
# 2048; whatever is missing is told, with the way to get it. On CPU, the same length with a tiny model, in minutes:
#
#   CONFIG=examples/configs/tiny_128k.yaml bash examples/finetune_comet_128k.sh
#
# Settings, by environment: CONFIG, MODEL, DATA, OUTPUT, TP, PP (--help explains them); for bash alone also NPROC, the
# number of processes. Arguments: key=value replaces a setting of the configuration, --resume goes on with the run in
# OUTPUT/train, --check only looks for problems. With several machines OUTPUT must be on a file system they share.
set -euo pipefail

python=${PYTHON:-$(command -v python || command -v python3 || true)}
if [ -z "$python" ]; then
  echo "there is no python: activate the environment that has the package, or set PYTHON" >&2
  exit 2
fi
if [ -n "${RANK:-}" ]; then  # started by torchrun --no-python
  exec "$python" -u "$0" "$@"
fi

number() {  # TP or PP as the shell can multiply it; Python says what is wrong with it
  case "${1:-}" in
    '' | *[!0-9]*) echo 1 ;;
    *) echo "$((10#$1))" ;;
  esac
}
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -cE '^([0-9]|GPU-|MIG-)' || true)
elif command -v nvidia-smi > /dev/null; then
  gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)
else
  gpus=0
fi
processes=$gpus
if [ "$gpus" -eq 0 ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # processes that share the cores must not fight for them
  processes=$(($(number "${TP:-}") * $(number "${PP:-}")))
  if [ "$processes" -lt 2 ]; then
    processes=2
  fi
fi
processes=${NPROC:-$processes}
case "$processes" in
  '' | *[!0-9]* | 0)
    echo "NPROC=$processes is not a number of processes: use 1 or more" >&2
    exit 2
    ;;
esac

alone() {  # one process that counts as all of them: it looks for problems and starts nothing
  WORLD_SIZE=$processes LOCAL_WORLD_SIZE=$processes "$python" "$0" "$@"
}
for argument in "$@"; do
  case "$argument" in
    --check | --help | -h)
      alone "$@"
      exit
      ;;
  esac
done
alone --check "$@" > /dev/null  # what is missing is told here, without the report that torchrun adds
if [ -z "${PYTHON:-}" ] && command -v torchrun > /dev/null; then
  exec torchrun --standalone --nproc-per-node "$processes" "$0" "$@"
fi
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" "$0" "$@"
: << '# end of the Python part'
":"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    try:
        import comet_megatron  # noqa: F401
    except ImportError:  # not installed: a checkout is enough
        sys.path.insert(0, str(REPOSITORY))
    try:
        from comet_megatron.launch.main import main
    except ModuleNotFoundError as error:
        print(f"{error}: install what the project needs, see README.md, in {REPOSITORY}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(repository=REPOSITORY))
# end of the Python part
