"""Who computes what: ranks, process groups, and (with the pipeline) the schedule."""
