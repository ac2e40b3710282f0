#!/usr/bin/env bash
# One machine of a run on several: torchrun, for schedulers that end a job and start it again.
#
#   [RUN=OUTPUT/train] bash examples/torchrun_node.sh TORCHRUN_ARGUMENTS ... SCRIPT ARGUMENTS ...
#
# SIGTERM or SIGUSR1 to this script asks the run to stop: the training processes of all machines write a checkpoint
# together at the next step border and end. torchrun itself dies of SIGUSR1, and of SIGTERM it gives its processes 30 s,
# which a step and a checkpoint of a long run may not fit in. So it is told nothing: its processes get SIGUSR1, again and
# again, for before training has begun they do not listen. How long it may take, the scheduler decides.
#
# Exit code: torchrun's. If that is 0, and RUN is given and has steps left to do: 143, as of a process that was ended, so
# that a scheduler starts it again, on this machine whether the request came here or to another.
#
# A machine that is lost: with --max-restarts the others start again from the newest whole checkpoint (--resume auto) as
# soon as another takes its place. Each start then has a store of its own, as TORCH_DISABLE_SHARE_RDZV_TCP_STORE asks.
set -uo pipefail

python=${PYTHON:-python}
resend_s=5
agent='' asked=''

# shellcheck disable=SC2329  # for the trap below
processes() {  # of the agent, the training processes
  cat /proc/"$agent"/task/*/children 2> /dev/null
}
# shellcheck disable=SC2329
ask_to_stop() {
  if [ -n "$asked" ] || [ -z "$agent" ]; then
    return
  fi
  asked=yes
  echo "asked to stop: the run writes a checkpoint and ends" >&2
  (
    trap '' USR1 TERM  # some schedulers signal every process of a step
    while kill -0 "$agent" 2> /dev/null; do
      # shellcheck disable=SC2046  # one word for each process
      kill -USR1 $(processes) 2> /dev/null
      sleep "$resend_s"
    done
  ) &
}

trap '' USR1  # whatever is started from here ignores it, torchrun too, until training listens
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "$python" -m torch.distributed.run "$@" &
agent=$!
trap ask_to_stop TERM USR1
while kill -0 "$agent" 2> /dev/null; do
  wait "$agent"  # a signal ends it early
done
wait "$agent"
code=$?
if [ "$code" -eq 0 ] && [ -n "${RUN:-}" ]; then
  "$python" -m comet_megatron.launch.is_over "$RUN" >&2
  if [ $? -eq 1 ]; then  # steps are left; where it cannot be told, nothing is started again for ever
    code=143
  fi
fi
exit "$code"
