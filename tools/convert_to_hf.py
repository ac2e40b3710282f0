"""Export a checkpoint as a Hugging Face folder. It needs nothing but the checkpoint, saved on any layout.

python tools/convert_to_hf.py --checkpoint RUN/checkpoints/step_0000100 --output DIR
  --format comet       config, safetensors, tokenizer and the modeling code (default)
  --format official    loads into the class of CoMeT's authors
  --format backbone    the plain model, without its memory
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.checkpoint.hf_config import FORMATS
from comet_megatron.errors import report_user_errors
from comet_megatron.new_folder import check_is_new

if TYPE_CHECKING:
    from comet_megatron.checkpoint.hf_export import Export

NEXT = {
    "comet": 'AutoModelForCausalLM.from_pretrained("{0}", trust_remote_code=True), or\n'
    '  python tools/generate.py --model {0} --prompt "def "',
    "official": 'MemQwen3ForCausalLM.from_pretrained("{0}") with the code of CoMeT\'s authors',
    "backbone": 'AutoModelForCausalLM.from_pretrained("{0}")',
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="one checkpoint's folder")
    parser.add_argument("--output", required=True, type=Path, help="new folder for the model")
    parser.add_argument("--format", choices=FORMATS, default="comet", help="default %(default)s")
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: as it is stored (default)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare with the Megatron model, layer by layer; both in memory in fp32"
    )
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

        def check(folder: Path, export: Export) -> None:
            from comet_megatron.checkpoint.verify import require_equal, verify

            verdict = verify(given.checkpoint, folder, export, layout)
            print("\n".join(verdict.lines()), flush=True)
            require_equal(verdict)

        export = export_hf(
            given.checkpoint,
            given.output,
            layout,
            form=given.format,
            dtype=given.dtype,
            check=check if given.verify else None,
        )
    size, files = sum(export.files.values()) / 1e6, len(export.files)
    print(
        f"model {given.output}: {size:.1f} MB of weights in {files} file{'s' * (files > 1)}, "
        f"{str(export.dtype).removeprefix('torch.')}\n"
        f"next: {NEXT[given.format].format(given.output)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
