"""Sync-Point Drop (SPD) for tensor-parallel language models.

Importing the package imports nothing heavy: the parts are reached by their own modules
(``megatron_spd.plan``, ``megatron_spd.layers.spec``, ...).
"""

__version__ = "0.1.0"
