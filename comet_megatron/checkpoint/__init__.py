"""Weights in and out: Megatron's sharded checkpoints, Hugging Face folders, and the rules between them."""
