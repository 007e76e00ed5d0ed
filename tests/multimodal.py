"""Tiny multimodal models of several architectures, whose towers have more blocks than the text decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForMultimodalLM,
    AyaVisionConfig,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    Mistral3Config,
    PaliGemmaConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
    VoxtralConfig,
)

_TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
_IMAGES = {**_TOWER, "image_size": 8, "patch_size": 4}
_QWEN = {"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
_SOUND = {**_TOWER, "num_mel_bins": 8, "max_source_positions": 16}


def _text(model_type: str, **others: object) -> dict[str, object]:
    return {"model_type": model_type, **_TEXT, **others}


def _positions(**others: object) -> dict[str, object]:
    return {**_TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], **others}}


def _images(model_type: str, **others: object) -> dict[str, object]:
    return {"model_type": model_type, **_IMAGES, **others}


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llava": lambda: LlavaConfig(
        text_config=_text("llama"), vision_config=_images("clip_vision_model"), image_token_index=120
    ),
    "llava_next": lambda: LlavaNextConfig(
        text_config=_text("mistral"),
        vision_config=_images("clip_vision_model"),
        image_token_index=120,
        image_grid_pinpoints=[[8, 8]],
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=_text("mistral"), vision_config=_images("pixtral", head_dim=8), image_token_index=120
    ),
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config=_positions(), vision_config={**_QWEN, "embed_dim": 16, "hidden_size": 32}
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config=_positions(), vision_config={**_QWEN, "out_hidden_size": 32}
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config=_positions(),
        vision_config={**_QWEN, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
    ),
    "gemma3": lambda: Gemma3Config(
        text_config=_text("gemma3_text"), vision_config=_images("siglip_vision_model"), mm_tokens_per_image=4
    ),
    "paligemma": lambda: PaliGemmaConfig(
        text_config=_text("gemma"), vision_config=_images("siglip_vision_model"), image_token_index=120
    ),
    "idefics3": lambda: Idefics3Config(
        text_config=_text("llama"), vision_config=_IMAGES, image_token_id=120, scale_factor=1
    ),
    "smolvlm": lambda: SmolVLMConfig(
        text_config=_text("llama"), vision_config=_IMAGES, image_token_id=120, scale_factor=1
    ),
    "internvl": lambda: InternVLConfig(
        text_config=_text("qwen2"),
        vision_config={**_TOWER, "image_size": [8, 8], "patch_size": [4, 4]},
        image_token_id=120,
        downsample_ratio=0.5,
    ),
    "aya_vision": lambda: AyaVisionConfig(
        text_config=_text("cohere2"),
        vision_config=_images("siglip_vision_model"),
        image_token_index=120,
        downsample_factor=1,
    ),
    "voxtral": lambda: VoxtralConfig(text_config=_text("llama"), audio_config=_SOUND, audio_token_id=120),
}


def save_multimodal(name: str, folder: Path) -> None:
    """Save a tiny model with random weights."""
    torch.manual_seed(0)
    AutoModelForMultimodalLM.from_config(CONFIGS[name]()).save_pretrained(folder)
