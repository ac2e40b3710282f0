"""Fine-tune by a recipe: model and data are prepared where they are not yet, then the train command runs.

Settings, by environment:
  CONFIG  recipe, a YAML file (examples/configs/comet_128k.yaml: the paper's; tiny_128k.yaml: on CPU)
  MODEL   Hugging Face folder, or a checkpoint of this project, which keeps its own memory sizes
  DATA    text, .jsonl, a folder of them, shards of tools/prepare_data.py or their URL, the word
          python-stdlib, or [[A, 0.7], [B, 0.3]]: shards or .jsonl with weights
  OUTPUT  folder: start/, data/ and train/; with several machines on a file system that all of them share
  TP, PP  tensor-parallel size, pipeline stages; data parallelism takes the rest of the processes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from comet_megatron.errors import USER_ERROR_EXIT_CODE, CometError, report_user_errors
from comet_megatron.launch.order import Order
from comet_megatron.launch.plan import Plan, make_plan, override
from comet_megatron.launch.prepare import describe_data, make_data, make_start, tokenizer_of
from comet_megatron.launch.requirements import check_gpus
from comet_megatron.launch.sources import is_list
from comet_megatron.parallel.hand_over import HandOver, await_folders
from comet_megatron.parallel.process import ProcessRank
from comet_megatron.train.continuation import AUTO, LAST, NO
from comet_megatron.train.main import resume_as_one


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="finetune_comet_128k.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--resume",
        choices=(NO, LAST, AUTO),
        default=NO,
        metavar="auto",
        help="continue the run in OUTPUT/train; auto: or start it, if it has no checkpoint yet",
    )
    parser.add_argument("--check", action="store_true", help="only say what is missing or wrong; nothing is written")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    return parser.parse_intermixed_args(resume_as_one(sys.argv[1:] if arguments is None else arguments))


@report_user_errors
def main(arguments: Sequence[str] | None = None, *, repository: Path) -> int:
    """Run the command; its exit code.

    Args:
        repository: where the recipes and the defaults of MODEL, DATA and OUTPUT are.
    """
    given = parse_arguments(arguments)
    process = ProcessRank.from_environment()

    def plan_launch() -> Plan:
        return make_plan(process, given.overrides, resume=given.resume, repository=repository, only_check=given.check)

    if given.check:
        if process.rank == 0:
            plan_launch()
            print("nothing is missing")
        return 0
    if process.world_size == 1:
        return _train(_prepare(plan_launch()))
    hand_over = HandOver("launch")
    if process.rank > 0:
        return _follow(hand_over, process)
    try:
        order = _prepare(plan_launch())
    except BaseException:
        hand_over.give_up()
        raise
    hand_over.tell(asdict(order))
    return _train(order)


def _prepare(plan: Plan) -> Order:
    """Make what is not there yet; what every process does then."""
    for left in sorted(plan.output.glob(".*.partial-*")):
        print(f"left over  {left}, of a launch that was stopped; delete it if none runs", flush=True)
    start = make_start(plan.model, plan.file.recipe, plan.output)
    train, held_out = make_data(plan.data, plan.file.recipe, plan.output, tokenizer=tokenizer_of(plan.model))
    print(f"data       {describe_data(train, held_out)}", flush=True)
    evaluation = []
    is_asked = plan.loaded.config.train.eval_every > 0
    if held_out is not None:
        evaluation = [override("data.eval", held_out)]
    elif is_asked and not any(text.startswith("data.eval=") for text in plan.overrides):
        print("data       there are no held-out documents (data.eval): there is no evaluation", flush=True)
        evaluation = ["train.eval_every=0"]
    arguments = [
        *([f"--resume={plan.resume}"] if plan.resume != NO else []),
        override("model.path", start),
        f"data.train={train}" if is_list(train) else override("data.train", train),
        f"data.sequence_length={plan.file.recipe.sequence_length}",  # of JSONL in a list
        *evaluation,
        override("train.output", plan.output / "train"),
        f"parallel.tp={plan.tp}",
        f"parallel.pp={plan.pp}",
        *plan.overrides,
    ]
    return Order(
        config=str(plan.file.path),
        arguments=tuple(arguments),
        folders=(str(start), *(plan.data.folders or [train]), str(plan.file.path)),
        needs_gpu=plan.file.recipe.needs_gpu,
    )


def _follow(hand_over: HandOver, process: ProcessRank) -> int:
    """Every process but the first. Of each machine one talks."""

    def say(text: str) -> None:
        if process.local_rank == 0 or process.rank == 1:
            print(text, file=sys.stderr, flush=True)

    try:
        told = hand_over.wait(say, what_for="process 0, which prepares model and data in OUTPUT")
        if told is None:
            return USER_ERROR_EXIT_CODE
        order = Order.of(told)
        _check_this_machine(order, process)
    except CometError as error:
        say(f"{error.kind}: {error}")
        raise
    return _train(order)


def _check_this_machine(order: Order, process: ProcessRank) -> None:
    """
    Raises:
        CometError: this machine does not see what process 0 prepared, or has too few GPUs.
    """
    await_folders(order.folders, settings="CONFIG, MODEL, DATA and OUTPUT")
    if order.needs_gpu and (problems := check_gpus(process)):
        raise problems[0]


def _train(order: Order) -> int:
    """The train command."""
    from comet_megatron.train.main import main as train

    return train(["--config", order.config, *order.arguments])
