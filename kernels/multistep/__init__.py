"""Several tokens from a state that can be taken back: the decoding step of a Mamba-2 layer."""

from .reference import Indices, indices, multistep, multistep_loop, replay

__all__ = ["Indices", "indices", "multistep", "multistep_loop", "replay"]
