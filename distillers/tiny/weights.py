"""Where the teacher of the tiny world lies: a folder of transformers beside this file, with its tokenizer.

It was trained by plans/gpu/tiny-teacher.toml, seed 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def folder(config: Any) -> Path:
    return Path(__file__).parent / "teacher"
