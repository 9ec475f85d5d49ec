"""A few layers of a model as a model of its own: a draft, to be trained by what it was made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from . import checkpoint, drawn
from .convert import check_parent, kept
from .hybrid import TeacherBackend
from .plugin import ShrunkConfig
from .shrink import shrunk_config
from .weights import Weights, write

LAYER = re.compile(r"^model\.layers\.(\d+)\.")


class ShrunkBackend(TeacherBackend):
    """The parent's embeddings, norm and head, and some of its layers between them."""

    def __init__(self, config: ShrunkConfig) -> None:
        self.options = config

    def convert(self, parent: Path, keep: Sequence[int], out: Path, seed: int) -> None:
        """Layers outside `keep` are left out whole; those in it are as they were, whatever their mixers."""
        layers = sorted(keep)
        old = check_parent(parent)
        config = shrunk_config(old, layers)
        if drawn.is_drawn(parent):
            drawn.take_along(parent, out)
        else:
            write(out, _numbered(kept(old, Weights(parent)), layers))
        checkpoint.save_config(config, out)
        checkpoint.copy_side_files(parent, out)


def _numbered(tensors: Iterator[tuple[str, Tensor]], layers: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """Without the tensors of other layers; the names of those that stay have their new numbers."""
    places = {layer: place for place, layer in enumerate(layers)}
    for name, tensor in tensors:
        found = LAYER.match(name)
        if found is None:
            yield name, tensor
        elif (layer := int(found[1])) in places:
            yield f"model.layers.{places[layer]}.{name[found.end() :]}", tensor
