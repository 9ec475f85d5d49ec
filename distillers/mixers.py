"""Where the mixers of a hybrid are, and how one of them can do the work of another.

A mixer is a child of a layer, `….layers.N.mamba` or `….layers.N.self_attn`, and both are called alike. So a converted
layer can run the attention that it replaced, without a change to weights, names or checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..harness.interfaces import MambabenchError, Unsupported

PLACE = re.compile(r"(?:^|\.)layers\.(\d+)\.(mamba|self_attn)$")


def mixers(model: nn.Module, kind: str) -> dict[int, nn.Module]:
    """Layer -> mixer, of the layers that have a `mamba` or a `self_attn`."""
    found = {}
    for name, module in model.named_modules():
        place = PLACE.search(name)
        if place and place[2] == kind:
            found[int(place[1])] = module
    return found


def replaced(student: nn.Module, teacher: nn.Module) -> dict[int, tuple[nn.Module, nn.Module]]:
    """Layer -> (Mamba mixer, the attention that it replaced), of all layers where the teacher has attention.

    Raises Unsupported where the two models are of different classes, since their mixers are called differently then.
    """
    if type(student) is not type(teacher):
        raise Unsupported(
            f"a {type(student).__name__} cannot borrow attention from a {type(teacher).__name__}; it needs one class"
        )
    new, old = mixers(student, "mamba"), mixers(teacher, "self_attn")
    return {layer: (mixer, old[layer]) for layer, mixer in new.items() if layer in old}


def lend(mixer: nn.Module, attention: nn.Module) -> None:
    """From now on `mixer` computes what `attention` does."""
    mixer.forward = attention.forward


def give_back(mixer: nn.Module) -> None:
    """Ends `lend`, if there was one."""
    mixer.__dict__.pop("forward", None)


@contextmanager
def compared(pairs: Mapping[int, tuple[nn.Module, nn.Module]]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Fills a mapping with what each mixer and its attention make of the same input, while the model goes on with the
    attention's output: so all layers see the hidden states of the model as it was before."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def both(layer: int, own: Callable[..., Tensor], attention: nn.Module) -> Callable[..., Tensor]:
        def forward(*arguments: Any) -> Tensor:
            with torch.no_grad():
                output: Tensor = attention(*arguments)
            seen[layer] = own(*arguments), output
            return output

        return forward

    for layer, (mixer, attention) in pairs.items():
        mixer.forward = both(layer, mixer.forward, attention)
    try:
        yield seen
    finally:
        for mixer, _ in pairs.values():
            give_back(mixer)


def choose_trained(model: nn.Module, wanted: Sequence[str], name: str) -> int:
    """Leaves only the parameters of `wanted` to be trained; returns how many numbers those are.

    An entry is `mixers` (all of the Mamba mixers), `all`, or a glob over names of parameters, such as
    `*.layers.3.mlp.*`. Raises MambabenchError, for the model called `name`, where one fits nothing.
    """
    parameters = dict(model.named_parameters())
    chosen: set[str] = set()
    for entry in wanted:
        glob = {"mixers": "*.mamba.*", "all": "*"}.get(entry, entry)
        fitting = {parameter for parameter in parameters if fnmatchcase(parameter, glob)}
        if not fitting:
            raise MambabenchError(
                f"{name} has no Mamba mixers, so there is nothing to train"
                if entry == "mixers"
                else f"train: no parameter of {name} is called {entry!r}, such as {next(iter(parameters))!r}"
            )
        chosen |= fitting
    for parameter, tensor in parameters.items():
        tensor.requires_grad_(parameter in chosen)
    return sum(parameters[parameter].numel() for parameter in chosen)
