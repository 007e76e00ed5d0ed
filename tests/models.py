"""Tiny random models of the architectures that the walk must understand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
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

_MIXTURE = _COMMON | {"num_hidden_layers": 2, "num_key_value_heads": 2}

# Mixtures of experts: names of their own for each expert or fused tensors, routers as Linears or parameters,
# shared experts, dense first blocks, biases, experts without a gate.
MIXTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(
        **_MIXTURE, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **_MIXTURE,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "deepseek-v3": lambda: DeepseekV3Config(
        **(_MIXTURE | {"num_hidden_layers": 3, "num_key_value_heads": 4}),
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt-oss": lambda: GptOssConfig(
        **_MIXTURE,
        head_dim=8,
        intermediate_size=24,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "granitemoe": lambda: GraniteMoeConfig(
        **_MIXTURE, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2
    ),
    "nemotron-h": lambda: NemotronHConfig(
        **_MIXTURE,
        hybrid_override_pattern="ME*",
        layers_block_type=["mamba", "moe", "attention"],
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=8,
    ),
    "olmoe": lambda: OlmoeConfig(**_MIXTURE, intermediate_size=16, num_experts=8, num_experts_per_tok=2),
}


# Options of the ways of sharing by which whole parts are removed instead of single weights.
STRUCTURES = {
    "channels": {"structure": "mlp=0.3"},
    "heads": {"structure": "heads=2"},
    "parts": {"structure": "mlp=0.3,heads=2"},
    "influence": {"structure": "depth=1"},
    "experts": {"structure": "experts=2"},
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
