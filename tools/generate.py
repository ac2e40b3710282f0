"""Let an exported model continue a prompt.

python tools/generate.py --model DIR --prompt "def "
python tools/generate.py --model DIR --prompt-file FILE --max-new-tokens 200 --temperature 0.8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.errors import CheckpointError, ConfigError, DataError, report_user_errors


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder that tools/convert_to_hf.py wrote")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-file", type=Path, help="file with the text to continue, of any length")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=0.95, help="when sampling (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="when sampling (default %(default)s)")
    return parser.parse_args(arguments)


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = parse_arguments(arguments)
    if not (given.model / "config.json").is_file():
        raise CheckpointError(
            f"{given.model} is no exported model: it has no config.json",
            way_out="export one: python tools/convert_to_hf.py --checkpoint DIR --output DIR",
        )
    for wrong, option, value, must in (
        (given.max_new_tokens < 1, "--max-new-tokens", given.max_new_tokens, "1 or more"),
        (not given.temperature >= 0, "--temperature", given.temperature, "0 or more"),
        (not 0 < given.top_p <= 1, "--top-p", given.top_p, "above 0 and at most 1"),
    ):
        if wrong:
            raise ConfigError(f"{option} {value} must be {must}")
    prompt = given.prompt
    if given.prompt_file is not None:
        try:
            prompt = given.prompt_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the prompt: {error}", where=str(given.prompt_file)) from error
    if not prompt:
        raise DataError("the prompt is empty", way_out="give at least one character")
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM, TextStreamer

    from comet_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(given.model)
    try:
        model = AutoModelForCausalLM.from_pretrained(given.model, trust_remote_code=True).eval()
    except Exception as error:  # whatever is wrong in the folder, transformers has an exception of its own for it
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the model cannot be loaded: {type(error).__name__} {reason}",
            where=str(given.model),
            way_out="export it again: python tools/convert_to_hf.py --checkpoint DIR --output DIR",
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
    sampling = {}
    if given.temperature > 0:
        generator = torch.Generator(device=device).manual_seed(given.seed)
        sampling = {
            "do_sample": True,
            "temperature": given.temperature,
            "top_p": given.top_p,
            "generator": generator,
        }
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.to(device).generate(ids, max_new_tokens=given.max_new_tokens, streamer=streamer, **sampling)
    return 0


if __name__ == "__main__":
    sys.exit(main())
