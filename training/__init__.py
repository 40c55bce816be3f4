"""Turns a run config into a trained run folder: stages, assembly, loop, parallelism, checkpoints.

`training.run.run(config)` is the story from top to bottom. torch.distributed appears in this room
only, and nothing here imports the command-line parser except `training.command_line`.
"""
