"""Engines that serve SPD exports. Nothing here imports megatron-core or deepspeed."""
