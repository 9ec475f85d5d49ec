"""The short causal depthwise convolution in front of a Mamba scan."""

from .reference import conv, conv_few, conv_loop

__all__ = ["conv", "conv_few", "conv_loop"]
