"""The selective scan of Mamba-1 over whole sequences: training, scoring and prompts."""

from .reference import selective_scan, selective_scan_loop, step_sizes

__all__ = ["selective_scan", "selective_scan_loop", "step_sizes"]
