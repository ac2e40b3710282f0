"""CoMeT in Megatron-Core layers: hidden states and memory in, hidden states and memory out."""
