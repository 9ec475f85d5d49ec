"""The short causal depthwise convolution in front of a Mamba scan."""

from .reference import conv, conv_few, conv_loop, window_at

__all__ = ["conv", "conv_few", "conv_loop", "window_at"]
