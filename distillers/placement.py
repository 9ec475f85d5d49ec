"""Where the weights of a model lie while it is trained, and in which precision; and whole ones again at the end.

Trained weights are fp32, under bf16 autocast on a GPU. Frozen ones are bf16 there, half the memory, and nothing that is
saved depends on them: what is written at the end has the parent's own values wherever nothing was trained. Several GPUs
hold all weights each (DDP) or parts of them (FSDP2), as accelerate and transformers have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..harness.interfaces import Artifact, MambabenchError


def lighten(model: nn.Module, device: str) -> None:
    """Casts the frozen weights to bf16 for a GPU. Modules that keep some of theirs exact do so in their `_apply`."""
    if device == "cpu":
        return

    def cast(tensor: Tensor) -> Tensor:
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad and tensor.is_floating_point()
        return tensor.to(torch.bfloat16) if frozen else tensor

    with torch.no_grad():
        model._apply(cast)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained, by name, a shared one once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over ranks, which must all ask for it then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held(tensor: Tensor) -> int:
    """How many numbers of a tensor this rank has."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()


def like(tensor: Tensor, place: Tensor) -> Tensor:
    """A whole tensor as `place` is: on its device and, where that is spread over ranks, spread alike."""
    tensor = tensor.to(place.device)
    if not isinstance(place, DTensor):
        return tensor
    return distribute_tensor(tensor, place.device_mesh, place.placements)


def gather(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The trained weights, whole, on the CPU; all ranks take part, those that do not `keep` them get none."""
    found = {}
    for name, weight in trained(model).items():
        tensor = whole(weight.detach())
        if keep:
            # Not even a view of a weight, which training would go on to change.
            found[name] = tensor.to("cpu", copy=True).contiguous()
    return found


@torch.no_grad()
def spread(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives the trained weights the values that `gather` found."""
    places = trained(model)
    if tensors.keys() != places.keys():
        odd = min(tensors.keys() ^ places.keys())
        raise MambabenchError(f"the checkpoint is of another training: {odd} is trained in only one of them")
    for name, tensor in tensors.items():
        places[name].copy_(like(tensor, places[name]))


def restored(parent: Artifact, tensors: dict[str, Tensor]) -> nn.Module:
    """The parent with what was trained in place of its own, on the CPU."""
    model = parent.backend.module(parent.path)
    unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown:
        raise MambabenchError(f"{parent.path}: has no {unknown[0]}, which was trained")
    return model


def gather_states(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """The optimiser's `state_dict` with whole tensors on the CPU, the same however many ranks share them."""
    state = optimizer.state_dict()
    moments: dict[Any, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            value = whole(value) if isinstance(value, Tensor) else value
            if keep:
                moments.setdefault(number, {})[name] = value.cpu() if isinstance(value, Tensor) else value
    return {**state, "state": moments}


def spread_states(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Gives an optimiser what `gather_states` found, spread as its weights are."""
    weights = list(_weights(optimizer))
    moments = {
        number: {
            name: like(value, weights[number])
            if isinstance(value, Tensor) and value.shape == weights[number].shape
            else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _weights(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """In the order in which a `state_dict` numbers them."""
    for group in optimizer.param_groups:
        yield from group["params"]


def sharding() -> dict[str, Any]:
    """What transformers is told for FSDP2: whole layers, as the model names them, are sharded."""
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True},
    }


def exact_policy() -> MixedPrecisionPolicy:
    """Nothing is cast when weights are put together: autocast does it where they are used, as on one GPU, and leaves
    alone what must stay fp32, such as the decay of a Mamba mixer. accelerate's own policy would round that to bf16, and
    sum gradients in it."""
    return MixedPrecisionPolicy()
