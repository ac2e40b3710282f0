#!/usr/bin/env bash
# From a Hugging Face model to a Hugging Face model: prepare data, convert, fine-tune with two processes, export, generate.
# Real input: the sources of this machine's Python standard library. Minutes on two cores; nothing is downloaded.
#   make demo                 sets up .venv and runs this
#   bash examples/demo.sh     in an environment that has the package
#   RUN=DIR NPROC=2 bash examples/demo.sh train.steps=200 ...   settings replace the config's
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/demo-$(date +%Y%m%d-%H%M%S)}
NPROC=${NPROC:-2}
TOKENIZER=tokenizers/python_stdlib_4k
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_VISIBLE_DEVICES=  # the demo runs on CPU

step() {
  printf '\n== %s\n' "$1"
  shift
  printf '$ %s\n' "$*"
  "$@"
}

step "1. text to shards" \
  python tools/prepare_data.py --input python-stdlib --tokenizer "$TOKENIZER" --output "$RUN/data" --sequence-length 2048
step "2. a small Qwen3 to start from" \
  python examples/make_small_model.py --tokenizer "$TOKENIZER" --output "$RUN/qwen3_small"
step "3. Hugging Face to Megatron, with CoMeT's memory" \
  python tools/convert_from_hf.py --hf "$RUN/qwen3_small" --output "$RUN/start" \
  --chunk-size 256 --global-slots 16 --stride 8 --budget 64
step "4. fine-tune with $NPROC processes, a pipeline stage each" \
  torchrun --standalone --nproc-per-node "$NPROC" -m comet_megatron.train --config examples/configs/demo.yaml \
  parallel.pp="$NPROC" model.path="$RUN/start" data.train="$RUN/data/train" data.eval="$RUN/data/eval" train.output="$RUN/train" "$@"
LAST=$(find "$RUN/train/checkpoints" -maxdepth 1 -name 'step_*' | sort | tail -n 1)
step "5. Megatron to Hugging Face" \
  python tools/convert_to_hf.py --checkpoint "$LAST" --output "$RUN/hf" --verify
step "6. the model writes" \
  python tools/generate.py --model "$RUN/hf" --prompt 'def __init__(self, ' --max-new-tokens 80 --temperature 0.6
printf '\nloss curve:  %s\nthe stages:  %s\ncurves:      tensorboard --logdir %s\nthe model:   %s\n' \
  "$RUN/train/loss_curve.png" "$RUN/train/profile/timeline_step_2.png" "$RUN/train/tensorboard" "$RUN/hf"
