"""Several tokens from a state that can be taken back: the decoding step of a Mamba-2 layer."""

from .reference import multistep, multistep_loop, visible

__all__ = ["multistep", "multistep_loop", "visible"]
