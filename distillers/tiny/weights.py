"""Where the teacher of the tiny world lies: a transformers folder beside this file, with its tokenizer.

`recipe.json` in it says which model of which plan it is the artifact of, and where that ran.
"""

from __future__ import annotations

from pathlib import Path

from ..plugin import TinyTeacherConfig


def folder(config: TinyTeacherConfig) -> Path:
    return Path(__file__).parent / "teacher"
