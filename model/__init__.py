"""The networks: the decoder, its heads, generation, and checkpoints in and out."""
