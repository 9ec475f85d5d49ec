"""Several tokens from a state that can be taken back: the decoding step of a Mamba-2 and of a Mamba-1 layer."""

from .reference import multistep, multistep_loop, visible
from .ring import Plan, Ring, Rotation, convolve, folded, ring_multistep, ring_supports
from .selective import selective_multistep, selective_multistep_loop
from .selective_ring import Channels, Projected, selective_ring_multistep, selective_ring_supports

__all__ = [
    "Channels",
    "Plan",
    "Projected",
    "Ring",
    "Rotation",
    "convolve",
    "folded",
    "multistep",
    "multistep_loop",
    "ring_multistep",
    "ring_supports",
    "selective_multistep",
    "selective_multistep_loop",
    "selective_ring_multistep",
    "selective_ring_supports",
    "visible",
]
