"""Training: the step, the optimizer, the loop, and what is told to the user."""
