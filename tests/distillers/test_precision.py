"""What runs in which precision when trained weights are fp32, frozen ones bf16, and autocast is on."""

import pytest
import torch
from mambabench.distillers.batches import known, read
from mambabench.distillers.fused import summed_losses, without_head
from mambabench.distillers.losses import Distillation, shifted
from mambabench.distillers.mixers import choose_trained
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.linear.default")


class Watch(TorchDispatchMode):
    """Notes the dtypes that enter matrix products, and which tensors are cast from fp32 to bf16, by shape."""

    def __init__(self):
        super().__init__()
        self.products, self.casts = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) in PRODUCTS:
            self.products |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        if str(function) == "aten._to_copy.default" and (args[0].dtype, made.dtype) == (torch.float32, torch.bfloat16):
            self.casts.append(tuple(made.shape))
        return made


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.mark.parametrize("trained", [("mixers",), ("all",)], ids=str)
def test_products_run_in_bf16_and_each_trained_weight_is_cast_once(hybrid, teacher, trained, device):
    student, guide = (artifact.backend.module(artifact.path) for artifact in (hybrid, teacher))
    choose_trained(student, trained, "half")
    guide.requires_grad_(False)
    for parameter in (*student.parameters(), *guide.parameters()):
        if not parameter.requires_grad and parameter.dim() > 0:
            parameter.data = parameter.data.bfloat16()
    student, guide = student.to(device), guide.to(device)
    positions = torch.stack([torch.arange(24), torch.arange(24) % 9])
    ids = torch.arange(48).view(2, 24) % student.config.vocab_size
    batch = known(ids, positions)
    inputs = {"input_ids": ids, **batch}
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    stream = []
    for layer in student.model.layers:
        layer.register_forward_hook(lambda module, given, made: stream.append(made.dtype))
    targets = shifted(ids.to(device)).flatten()[inputs["counted"]]
    with Watch() as watch, torch.autocast(device.type, torch.bfloat16):
        with without_head(student) as head, without_head(guide) as theirs:
            said = student(**read(student, inputs)).logits.flatten(0, 1)[inputs["counted"]]
            with torch.no_grad():
                told = guide(**read(guide, inputs)).logits.flatten(0, 1)[inputs["counted"]]
        total, _ = summed_losses(Distillation(1.0, 0.5), targets, said, head, told, theirs)
        total.backward()
    assert watch.products == {torch.bfloat16}
    assert total.dtype == torch.float32
    # The residual stream has the precision of the embedding.
    assert set(stream) == {torch.bfloat16 if trained == ("mixers",) else torch.float32}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.dim() == 2 and "embed" not in name and "proj" in name:
            shapes = [p.shape for p in student.parameters() if p.requires_grad].count(parameter.shape)
            assert watch.casts.count(tuple(parameter.shape)) == shapes, name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32, name
