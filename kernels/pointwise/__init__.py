"""What a layer does to each number between its matrix products: the gate of its MLP, and rotary positions."""

from torch import Tensor

from ..support import chosen
from . import fused, reference

__all__ = ["rotate", "swiglu", "swiglu_packed"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape. On a GPU it is one pass, and only the two are kept for backward."""
    if chosen("swiglu", fused.supports_swiglu(gate, up)):
        return fused.swiglu(gate, up)
    return reference.swiglu(gate, up)


def swiglu_packed(both: Tensor) -> Tensor:
    """silu(gate) * up of gate and up side by side, [..., 2 W] -> [..., W]; without gradients."""
    if chosen("swiglu_packed", fused.supports_packed(both)):
        return fused.swiglu_packed(both)
    return reference.swiglu(*both.chunk(2, dim=-1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., L, H, P] by cos, sin [..., L, 1, P], whose halves are alike (half-split layout of Llama)."""
    if chosen("rotate", fused.supports_rotate(x, cos, sin)):
        return fused.rotate(x, cos, sin)
    return reference.rotate(x, cos, sin)
