"""CoMeT (arXiv 2602.01766) on Megatron-Core: constant memory, linear time, any sequence length."""

__version__ = "0.1.0"
