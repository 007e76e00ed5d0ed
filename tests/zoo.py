"""A tiny random model of every causal language model type that the installed transformers has.

The defaults of each configuration are shrunk by the names of their entries, so a type that a later version
adds needs no work unless its entries depend on each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["VOCABULARY", "model_types", "tiny_config", "windows_of"]

VOCABULARY = 128
_N_LAYERS = 4
_BY_SIZE: dict[int, str] = {
    VOCABULARY: """
        vocab_size vocab_size_per_layer_input unpadded_vocab_size audio_vocab_size
        ngram_vocab_size_base encoder_hash_byte_group_vocab shape_vocab_size
        pronunciation_vocab_size shape_embed_dim pronunciation_embed_dim
    """,
    64: """
        max_position_embeddings n_positions max_seq_len n_ctx model_max_length context_length
        max_target_positions max_source_positions sliding_window_size floor_scale
    """,
    48: """
        intermediate_size ffn_dim d_ff n_inner dff dim_ff ffn_hidden_size d_inner decoder_ffn_dim
        encoder_ffn_dim feed_forward_size intermediate_size_mlp dense_intermediate_size
    """,
    32: """
        hidden_size n_embd d_model emb_dim word_embed_proj_dim attention_hidden_size embedding_dim
        lru_width hidden_size_global embedding_size input_embedding_size output_embedding_size
        output_channels shared_intermediate_size num_position_embeddings out_hidden_size image_size
        vision_output_dim projector_input_dim projector_output_dim mamba_d_ssm
    """,
    16: """
        moe_intermediate_size q_lora_rank kv_lora_rank o_lora_rank expert_ffn_hidden_size
        qk_head_dim shared_expert_intermediate_size moe_shared_expert_intermediate_size
        shared_experts_intermediate_size index_head_dim router_hidden_size hc_lowrank mamba_d_state
    """,
    8: """
        head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim swa_head_dim global_head_dim
        num_experts num_local_experts n_routed_experts moe_num_experts sliding_window
        attention_window_size window_size linear_key_head_dim linear_value_head_dim linear_head_dim
        mamba_d_head mamba_head_dim ssm_state_size hidden_size_per_layer_input attention_chunk_size
        chunk_size mamba_chunk_size local_attention keep_window_size index_topk kv_channels dim_head
        d_kv attention_head_size rotary_dim laurel_rank query_pre_attn_scalar d_rel rel_extent
        gated_norm_rank adapter_rank block_multiple_of d_head state_size time_step_rank
        mamba_dt_rank patch_size
    """,
    _N_LAYERS: """
        num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_decoder_layers num_encoder_layers depth num_attention_heads n_head n_heads num_heads
        decoder_attention_heads encoder_attention_heads attention_heads num_encoder_attention_heads
        num_decoder_attention_heads swa_num_attention_heads linear_num_heads linear_num_value_heads
        linear_num_key_heads mamba_n_heads mamba_num_heads index_n_heads num_blocks
    """,
    2: """
        num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_experts_per_tok
        num_experts_per_token moe_topk moe_top_k moe_k top_k n_group topk_group n_groups
        mamba_n_groups num_expert_group o_groups zero_expert_num n_mamba_heads
        global_attn_every_n_layers sliding_window_pattern _sliding_window_pattern layer_group_size
        num_random_blocks num_global_layers num_kv_shared_layers
    """,
    1: """
        n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace
        num_dense_layers moe_layer_start_index max_window_layers mamba_ngroups hash_moe_layers
    """,
}
_SIZES = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
_NUMBERS_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LEFT_OUT = {"per_layer_config", "transformers_version"}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# What the defaults' names do not say.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16},
    "granitemoehybrid": {"mamba_d_head": 16},
    "mamba2": {"head_dim": 16},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": None,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gemma3n_text": {"intermediate_size": [48] * 4},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4, "n_mamba_heads": 2},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
    },
}


def model_types() -> list[str]:
    """All types of causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of a type in which everything is small."""
    kind = CONFIG_MAPPING[model_type]
    values = kind().to_dict()
    values.pop("model_type", None)
    return kind(**(_shrunk(values) | _OWN.get(model_type, {})))


def _shrunk(values: Mapping[str, Any]) -> dict[str, Any]:
    lengths = {values.get(name) for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")} - {
        None
    }
    small = {name: _small(name, value, lengths) for name, value in values.items() if name not in _LEFT_OUT}
    if "qk_rope_head_dim" in values:  # latent attention has as many heads for keys as for queries
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _small(name: str, value: Any, n_layers: set[Any]) -> Any:
    if name == "head_dim" and value is None:
        return _SIZES[name]
    if name in ("id2label", "label2id"):
        return value
    if isinstance(value, Mapping):
        # What a rotary embedding is told about its base has no size.
        return dict(value) if "rope" in name else _shrunk(value)
    if isinstance(value, list) and len(value) in n_layers:
        kinds = list(dict.fromkeys(map(_hashable, value)))
        return [kinds[index % len(kinds)] for index in range(_N_LAYERS)]
    if name in _TOKENS:
        return _TOKENS[name]
    if name.endswith(("token_id", "token_index")) and isinstance(value, int):
        return 3
    if name in _SIZES and isinstance(value, int) and not isinstance(value, bool):
        return min(value, _SIZES[name])
    return value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def windows_of(participant: int, n: int = 2, length: int = 16) -> torch.Tensor:
    """Random token windows of a participant, [n, length]."""
    generator = torch.Generator().manual_seed(1000 + participant)
    return torch.randint(4, VOCABULARY, (n, length), generator=generator)
