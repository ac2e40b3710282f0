"""What a run will cost, before it runs: time of stages, bytes of ranks, messages of links. Pure, no torch."""
