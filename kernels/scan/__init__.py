"""The selective scan of Mamba-2 over whole sequences: training, scoring and prompts."""

from .reference import scan, scan_loop

__all__ = ["scan", "scan_loop"]
