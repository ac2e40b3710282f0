"""Who computes what, when and where: layout, process groups, the pipeline's schedule and its execution."""
