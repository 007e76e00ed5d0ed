"""Tiny random models of the architectures that the walk must understand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        **_COMMON, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=False
    ),
    "llama-tied": lambda: LlamaConfig(
        **_COMMON, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "qwen2": lambda: Qwen2Config(**_COMMON, intermediate_size=48, num_key_value_heads=2),
    "gemma3": lambda: Gemma3TextConfig(
        **(_COMMON | {"num_hidden_layers": 4}),
        intermediate_size=48,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": lambda: GPT2Config(
        vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**_COMMON, intermediate_size=48),
    "phi": lambda: PhiConfig(**_COMMON, intermediate_size=48),
    "bloom": lambda: BloomConfig(
        vocab_size=128, hidden_size=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "falcon": lambda: FalconConfig(**_COMMON, new_decoder_architecture=False, multi_query=True),
}


# Options of the ways of sharing by which whole parts are removed instead of single weights.
STRUCTURES = {
    "channels": {"structure": "mlp=0.3"},
    "heads": {"structure": "heads=2"},
    "parts": {"structure": "mlp=0.3,heads=2"},
    "influence": {"structure": "depth=1"},
}


def save_tiny(make_config: Callable[[], PreTrainedConfig], folder: Path) -> None:
    """Save a model with random weights, biases included, so that nothing is zero by accident."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)


def save_one_block(name: str, folder: Path) -> None:
    """Save a tiny model with the first block only, for what blocks do alike and many times."""
    config = ARCHITECTURES[name]()
    config.num_hidden_layers = 1
    save_tiny(lambda: config, folder)
