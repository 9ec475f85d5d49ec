"""The sizes that a stepper tells, against the tensors that it holds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mambabench.backends.hybrid import Mamba2HybridBackend
from mambabench.backends.plugin import Mamba2HybridConfig
from mambabench.backends.state import KVCache, State
from mambabench.backends.stepper import HybridStepper

SHAPES = [(1, 1, 1), (3, 17, 5)]


@pytest.fixture(params=[(True, "float64", ()), (True, "float32", (0, 1, 2, 3)), (False, "bfloat16", (1, 3))])
def model(
    request: pytest.FixtureRequest, make_llama: Callable[..., Path], tmp_path: Path
) -> tuple[HybridStepper, Mamba2HybridBackend, Path]:
    tied, dtype, keep = request.param
    backend = Mamba2HybridBackend(Mamba2HybridConfig(d_conv=3))
    backend.convert(make_llama(tie_word_embeddings=tied), keep, tmp_path / "artifact", 0)
    return backend.load(tmp_path / "artifact", "cpu", dtype), backend, tmp_path / "artifact"


def held(state: State) -> tuple[int, int]:
    """Bytes of the caches and of the recurrent states."""
    sizes = [0, 0]
    for layer in state.layers:
        sizes[not isinstance(layer, KVCache)] += sum(tensor.nbytes for tensor in layer.tensors())
    return sizes[0], sizes[1]


@pytest.mark.parametrize(("batch", "context", "steps"), SHAPES)
def test_what_is_held_is_what_open_takes(model, batch: int, context: int, steps: int) -> None:
    cost = model[0].cost(batch, context, steps)
    assert (cost.held_kv_bytes, cost.held_state_bytes) == held(model[0].open(batch, context, steps))


def test_weights_are_held_with_their_embedding_in_the_dtype_that_is_loaded(model) -> None:
    stepper, backend, artifact = model
    cost = stepper.cost(1, 1, 1)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in stepper.model.parameters()}
    assert cost.held_weight_bytes == sum(storages.values())
    dtype = getattr(torch, stepper.dtype)
    others = [p for p in stepper.model.parameters() if p.dtype != dtype]
    on_disk = backend.describe(artifact)["weight_bytes"] * dtype.itemsize / torch.float32.itemsize
    assert cost.held_weight_bytes == on_disk + sum(p.nbytes - p.numel() * dtype.itemsize for p in others)
    embedding = 0 if stepper.config.tie_word_embeddings else stepper.model.model.embed_tokens.weight.nbytes
    assert cost.weight_bytes == cost.held_weight_bytes - embedding


@pytest.mark.parametrize(("batch", "context", "steps"), SHAPES)
def test_traffic_and_arithmetic_are_those_of_one_advance(model, batch: int, context: int, steps: int) -> None:
    stepper = model[0]
    config, cost = stepper.config, stepper.cost(batch, context, steps)
    state = stepper.open(batch, context, steps)
    kv = read_and_written = 0
    flops = (
        2
        * batch
        * steps
        * sum(
            p.numel()
            for name, p in stepper.model.named_parameters(remove_duplicate=True)
            if config.tie_word_embeddings or "embed_tokens" not in name
        )
    )
    heads, width = config.num_attention_heads, config.head_dim
    for layer in state.layers:
        if isinstance(layer, KVCache):
            kv += layer.keys.nbytes + layer.values.nbytes
            # q k and p v: a multiplication and an addition for each head, position and channel.
            flops += 2 * 2 * batch * steps * heads * (context + steps) * width
        else:
            read_and_written += 2 * layer.state.nbytes + 2 * steps * layer.inputs[:, 0].nbytes
            # Replayed and run anew: decay, input, and the product with C.
            flops += 8 * batch * steps * heads * width * width
    assert (cost.kv_bytes, cost.state_bytes, cost.flops) == (kv, read_and_written, flops)
