"""Export a checkpoint as a Hugging Face folder: config, safetensors, tokenizer, modeling code.

python tools/convert_to_hf.py --checkpoint RUN/checkpoints/step_0000100 --output DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.errors import report_user_errors
from comet_megatron.new_folder import check_is_new


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="one checkpoint's folder")
    parser.add_argument("--output", required=True, type=Path, help="new folder for the model")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: as it is stored")
    return parser.parse_args(arguments)


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = parse_arguments(arguments)
    check_is_new(given.output)
    quiet_libraries()
    from comet_megatron.checkpoint.hf_export import export_hf
    from comet_megatron.parallel.alone import alone

    with alone() as layout:
        export_hf(given.checkpoint, given.output, layout, dtype=given.dtype)
    size = sum(f.stat().st_size for f in given.output.glob("*.safetensors"))
    print(
        f"model {given.output}: {size / 1e6:.1f} MB of weights\n"
        f'next: AutoModelForCausalLM.from_pretrained("{given.output}", trust_remote_code=True), or\n'
        f'  python tools/generate.py --model {given.output} --prompt "def "'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
