"""The one model of the harness: a Llama-type pre-norm decoder whose layers mix tokens by attention or by Mamba.

A checkpoint is a plain transformers folder; importing this module registers it, so that `AutoModelForCausalLM` loads
it. Everything that a teacher has keeps its Llama name; the mixer of a converted layer is `model.layers.N.mamba`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from ..harness.interfaces import Unsupported
from ..kernels.few_rows import Projection, Stream, add_projected, project
from ..kernels.pointwise import swiglu, swiglu_packed
from .attention import Attention, Weights, fuse_linears, needs_no_mask, product_dtype
from .calls import AttentionStep, Fill, MambaStep
from .config import HybridConfig
from .mamba import Mamba
from .mixers import MIXERS, PREFIXES
from .norm import RMSNorm
from .packed import Packed
from .rope import Rope
from .state import LayerState


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self._fused: Weights | None = None

    def fuse(self) -> None:
        """Lays gate and up out in one storage."""
        self._fused = fuse_linears(self.gate_proj, self.up_proj)

    def forward(self, x: Tensor) -> Tensor:
        if self._fused is None:
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(swiglu_packed(F.linear(x, *self._fused)))

    def ends(self) -> tuple[Weights, Weights]:
        """Gate and up, laid out for inference, and down."""
        assert self._fused is not None
        return self._fused, (self.down_proj.weight, self.down_proj.bias)


class HybridLayer(GradientCheckpointingLayer):
    """h += mixer(norm(h)), where there is a mixer; h += mlp(norm(h)), where there is an MLP."""

    def __init__(self, config: HybridConfig, index: int) -> None:
        super().__init__()
        name = config.mixers[index]
        self.mixer_name = PREFIXES.get(name, "")
        window = config.windows[index]
        if self.mixer_name:
            self.add_module(self.mixer_name, Attention(config, window) if window else MIXERS[name](config))
        self.mlp = MLP(config) if config.intermediate_size else None
        if self.mixer_name:
            self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.mlp is not None:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._mixing: tuple[Projection, Projection] | None = None
        self._inner: tuple[Projection, Projection] | None = None

    @property
    def mixer(self) -> Any:
        """The attention or Mamba module; None where the layer has none."""
        return self._modules.get(self.mixer_name)

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        keep: Tensor | None,
        documents: Packed | None = None,
    ) -> Tensor:
        if self.mixer is not None:
            h = h + self.mixer(self.input_layernorm(h), cos, sin, mask, keep, documents)
        if self.mlp is not None:
            h = h + self.mlp(self.post_attention_layernorm(h))
        return h

    def fill(self, h: Tensor, added: Tensor | None, cache: LayerState, call: Fill) -> tuple[Tensor, Tensor | None]:
        """The same of prompts [n, L, E], on a state. What the layer before has still to add to h is `added`, and what
        this one has is returned beside h: each sum is made with the norm that follows it."""
        if self.mixer is not None:
            h, normed = self.input_layernorm.add(h, added)
            added = self.mixer.prefill(normed, cache, call)
        if self.mlp is not None:
            h, normed = self.post_attention_layernorm.add(h, added)
            added = self.mlp(normed)
        return h, added

    def step(self, stream: Stream, cache: LayerState, call: AttentionStep | MambaStep | None) -> Stream:
        """The same of a few tokens of each row [B * T, E]."""
        if self._mixing is not None:
            into, out = self._mixing
            projected, stream = project(into, stream)
            stream = add_projected(out, self.mixer.mix(projected, cache, call), stream)
        if self._inner is not None:
            into, out = self._inner
            inner, stream = project(into, stream)
            stream = add_projected(out, inner, stream)
        return stream

    def fuse(self) -> None:
        """Gets ready for inference: projections with one input share one storage. Once, if models share the layer."""
        if self._mixing or self._inner:
            return
        if self.mixer is not None:
            self.mixer.fuse()
            self._mixing = _ends(self.mixer.ends(), self.input_layernorm)
        if self.mlp is not None:
            self.mlp.fuse()
            self._inner = _ends(self.mlp.ends(), self.post_attention_layernorm, gated=True)


def _ends(weights: tuple[Weights, Weights], norm: RMSNorm, gated: bool = False) -> tuple[Projection, Projection]:
    """What reads the residual stream behind a norm, and what adds to it."""
    into, out = weights
    return Projection(*into, norm.weight, norm.eps, gated), Projection(*out)


class HybridPreTrainedModel(PreTrainedModel):
    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["HybridLayer"]  # noqa: RUF012
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mamba):
            module.initialise()


class HybridModel(HybridPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HybridLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        max_documents: int | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """input_ids int64 [B, L] (or inputs_embeds [B, L, E]); attention_mask [B, L], 0 on padding at either side
        or between documents; position_ids int64 [B, L], counted from the first real token if not given: one that does
        not continue the one before starts a document, which sees nothing of those before it. Hidden states [B, L, E].

        cu_seq_lens_q int32 [documents + 1] and max_length_q, as transformers' collators make them, say of position_ids
        what the host would otherwise wait for: where documents begin among the tokens of all rows, and how long the
        longest is. max_documents, those of the row that has most, spares some mixers room for more.
        """
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = h.shape[1]
        keep = real = documents = None
        padded = causal = False
        if attention_mask is not None:
            padded, causal = padding(attention_mask)
        if attention_mask is not None and padded:
            if attention_mask.shape != h.shape[:2]:
                raise Unsupported(
                    f"attention_mask: shape {list(attention_mask.shape)} is not served, only [batch, length]"
                )
            real = attention_mask.bool()
            keep = real.unsqueeze(-1)
        if position_ids is not None:
            positions = position_ids.expand(h.shape[:2])
            if cu_seq_lens_q is None or max_length_q is None or real is not None:
                documents = Packed.of(positions, real)
            else:
                documents = Packed.known(positions, cu_seq_lens_q.int(), int(max_length_q), max_documents)
        elif real is not None:
            position_ids = (real.long().cumsum(1) - 1).clamp(min=0)
        else:
            position_ids = torch.arange(length, device=h.device).unsqueeze(0)
        if (real is None or causal) and needs_no_mask(h, self.config.head_dim):
            mask = None
        else:
            mask = attention_mask_of(length, h.device, real, documents)
        self.rope.check(position_ids)
        cos, sin = (part.to(product_dtype(h)) for part in self.rope(position_ids, h))
        for layer in self.layers:
            h = layer(h, cos, sin, mask, keep, documents)
        return BaseModelOutput(last_hidden_state=self.norm(h))


def padding(mask: Tensor) -> tuple[bool, bool]:
    """Whether there is any in attention_mask [B, L], and whether all of it is at the right, where what is causal does
    not see it. The host waits once."""
    real = mask.bool()
    some, right = torch.stack((~real.all(), (real[..., 1:] <= real[..., :-1]).all())).tolist()
    return some, right


def attention_mask_of(
    length: int, device: torch.device, real: Tensor | None, documents: Packed | None
) -> Tensor | None:
    """bool [B, 1, L, L]: what each token may read. real bool [B, L] (padding reads itself). None where that is all
    before it."""
    if real is None and documents is None:
        return None
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril().unsqueeze(0)
    if documents is not None:
        mask = mask & (documents.index.unsqueeze(1) == documents.index.unsqueeze(2))
    if real is not None:
        mask = (mask & real.unsqueeze(1)) | torch.eye(length, dtype=torch.bool, device=device)
    return mask.unsqueeze(1)


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """The decoder with its head, as transformers, TRL and lm-eval expect it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        max_documents: int | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits [B, L, V] and, with labels [B, L] (-100: ignored), the cross-entropy of the next token in nat.

        The loss is the mean over tokens; with `num_items_in_batch` it is their sum over that number, so that
        accumulated batches weigh every token alike. `logits_to_keep` > 0 computes only the last ones.
        """
        if past_key_values is not None or use_cache:
            raise Unsupported(
                "HybridForCausalLM.forward keeps no cache: pass use_cache=False, or decode through the backend's load()"
            )
        h = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cu_seq_lens_q=cu_seq_lens_q,
            max_length_q=max_length_q,
            max_documents=max_documents,
        ).last_hidden_state
        part = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, part])
        loss = None if labels is None else next_token_loss(logits, labels, num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


def next_token_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of labels[:, t + 1] under logits[:, t], in nat: mean over tokens, or sum / items.

    logits [B, L, V], labels int64 [B, L] with -100 where nothing is to be predicted. A scalar in fp32 or better.
    """
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat = logits[:, :-1].flatten(0, 1).to(kind), labels[:, 1:].flatten().to(logits.device)
    if items is None:
        return F.cross_entropy(*flat)
    return F.cross_entropy(*flat, reduction="sum") / items


AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModel.register(HybridConfig, HybridModel, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
