"""Small hybrids of random weights."""

import torch
from mambabench.backends.config import HybridConfig
from mambabench.backends.model import HybridForCausalLM
from mambabench.backends.stepper import HybridStepper
from mambabench.harness.mockmodel import MockTokenizer

MIXERS = {"a": "attention", "2": "mamba2", "1": "mamba", "-": "none"}
LETTERS = "abcdefgh"


def hybrid(
    mixers: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    *,
    letters: str = LETTERS,
    seed: int = 0,
    graphs: bool | None = None,
    **config: object,
) -> HybridStepper:
    """A letter of `mixers` is a layer; a letter of `letters` a token, the end of the text one more."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "chunk": 8, "initializer_range": 0.4, **config}
    torch.manual_seed(seed)
    model = HybridForCausalLM(
        HybridConfig(
            vocab_size=len(letters) + 1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            mixers=[MIXERS[mixer] for mixer in mixers],
            **sizes,
        )
    )
    return HybridStepper(model.to(device, dtype), MockTokenizer(letters), graphs=graphs)
