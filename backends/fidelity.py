"""The suite `init-fidelity`: how near a converted model is to its teacher, layer by layer and at the end.

Each converted layer reads the teacher's own hidden states, so that no layer is judged by the errors of those before it;
the divergence of the logits then says what the errors of all of them come to.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness.documents import encode_document, read_documents
from ..harness.interfaces import Artifact, Bench, MambabenchError, Unsupported
from .mixers import MAMBAS
from .model import HybridForCausalLM
from .plugin import InitFidelityConfig


@dataclass(slots=True)
class Distance:
    """Sums over tokens of one layer's outputs y beside the attention's outputs a."""

    tokens: int = 0
    cosines: float = 0.0
    squares: float = 0.0
    """Of a."""
    errors: float = 0.0
    """Squares of y - a."""

    def add(self, own: Tensor, theirs: Tensor) -> None:
        """own and theirs [M, E], a row for each real token."""
        own, theirs = own.double(), theirs.double()
        self.tokens += own.shape[0]
        self.cosines += float(F.cosine_similarity(own, theirs, dim=-1).sum())
        self.squares += float(theirs.square().sum())
        self.errors += float((own - theirs).square().sum())

    @property
    def cosine(self) -> float:
        """Mean over tokens of the cosine between y and a."""
        return self.cosines / self.tokens

    @property
    def relative_error(self) -> float:
        """|y - a| / |a|, norms over all tokens."""
        return float((self.errors / self.squares) ** 0.5)


class InitFidelity:
    """Emits KL(teacher || model) of every document as a sample, cosine and relative error of every layer as facts."""

    def __init__(self, config: InitFidelityConfig) -> None:
        self.config = config

    @torch.inference_mode()
    def run(self, bench: Bench) -> None:
        config, artifact = self.config, bench.subject.artifact
        tokenizer = artifact.backend.tokenizer(artifact.path)
        read = itertools.islice(read_documents(bench.data[config.data]), config.documents)
        texts = [(document.item, encode_document(document, tokenizer)[0][: config.context]) for document in read]
        texts = [(item, ids) for item, ids in texts if len(ids) > 1]
        if not texts:
            raise MambabenchError(f"{bench.data[config.data]}: no documents of two tokens or more")
        student, teacher = (_module(model, bench.subject.device) for model in (artifact, bench.models[config.teacher]))
        watches = watch(teacher, student)
        for first in range(0, len(texts), config.batch):
            bench.emit("progress", done=first, total=len(texts), unit="documents")
            batch = texts[first : first + config.batch]
            ids, real = _pad([ids for _, ids in batch], bench.subject.device)
            for each in watches.values():
                each.real = real
            hidden = [model.model(input_ids=ids, attention_mask=real).last_hidden_state for model in (teacher, student)]
            for (item, text), theirs, own in zip(batch, *hidden, strict=True):
                count = len(text) - 1
                value = divergence(teacher.lm_head(theirs[:count]), student.lm_head(own[:count]))
                bench.emit(
                    "sample",
                    task=config.data,
                    item=item,
                    metric="kl_per_token",
                    value=value,
                    weight=count,
                    better="lower",
                )
        for index, each in watches.items():
            bench.emit("fact", name="cosine", value=each.sums.cosine, arm=f"layer {index}")
            bench.emit("fact", name="relative_error", value=each.sums.relative_error, arm=f"layer {index}")
        bench.emit("progress", done=len(texts), total=len(texts), unit="documents")


class Watch:
    """Runs the converted layer on what the teacher's layer reads, whenever the teacher runs."""

    def __init__(self, theirs: Any, own: Any) -> None:
        self.own, self.sums = own, Distance()
        self.real: Tensor
        """int64 [B, L], 0 on padding."""
        theirs.register_forward_pre_hook(self._before)
        theirs.mixer.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.hidden = args[0]

    def _after(self, mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        mixed = self.own.mixer(self.own.input_layernorm(self.hidden), *args[1:], **kwargs)
        real = self.real.bool()
        self.sums.add(mixed[real], out[real])


def watch(teacher: HybridForCausalLM, student: HybridForCausalLM) -> dict[int, Watch]:
    """A watch for each layer in which the teacher has attention and the student a Mamba mixer."""
    ours, sizes = (teacher.config, student.config), ("num_hidden_layers", "hidden_size", "vocab_size")
    for name in sizes:
        one, other = (getattr(config, name) for config in ours)
        if one != other:
            raise Unsupported(f"init-fidelity: the teacher has {name} {one}, the model {other}")
    return {
        index: Watch(teacher.model.layers[index], student.model.layers[index])
        for index, (theirs, own) in enumerate(zip(teacher.config.mixers, student.config.mixers, strict=True))
        if theirs == "attention" and own in MAMBAS
    }


def divergence(theirs: Tensor, own: Tensor) -> float:
    """KL(teacher || student) in nat, summed over tokens, of logits [L, V] each."""
    wanted, got = theirs.double().log_softmax(-1), own.double().log_softmax(-1)
    return float(F.kl_div(got, wanted, reduction="sum", log_target=True))


def _module(artifact: Artifact, device: str) -> HybridForCausalLM:
    module = artifact.backend.module(artifact.path)
    if not isinstance(module, HybridForCausalLM):
        raise Unsupported(f"init-fidelity: {artifact.name} is no model whose layers can be told apart")
    model: Any = module.eval()
    return model.to(device)


def _pad(texts: Sequence[Sequence[int]], device: str) -> tuple[Tensor, Tensor]:
    """int64 [B, L], right-padded, and a mask int64 [B, L] of the real tokens."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    real = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
    return ids.to(device), real.to(device)
