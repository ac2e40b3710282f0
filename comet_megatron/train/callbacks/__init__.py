"""Small things that happen beside training, one job each."""
