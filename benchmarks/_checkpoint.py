"""Checkpoints with random weights, written block by block: larger than what one would hold in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fedprllm.files import write_json

__all__ = ["Split", "as_it_is", "write_random"]

# Maps a tensor of the transformers model to those that are stored, by their names in the files.
Split = Callable[[str, torch.Tensor], Iterator[tuple[str, torch.Tensor]]]


def as_it_is(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor as transformers holds it."""
    yield name, tensor


def write_random(folder: Path, config: PreTrainedConfig, split: Split) -> int:
    """Write a model in bfloat16, a shard for each block and one for the rest. Returns its weights' bytes.

    Args:
        folder: Folder to write to.
        config: Configuration of the model.
        split: What is stored of each tensor.
    """
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    prefixes = [f"{model.base_model_prefix}.layers.{block}." for block in range(config.num_hidden_layers)]
    weight_map: dict[str, str] = {}
    for shard, prefix in enumerate([*prefixes, ""]):
        generator = torch.Generator().manual_seed(shard)
        tensors = {
            name: _random(part, generator)
            for key, tensor in model.state_dict().items()
            if key.startswith(prefix) and (prefix or not key.startswith(tuple(prefixes)))
            for name, part in split(key, tensor)
        }
        file = f"model-{shard + 1:05d}-of-{len(prefixes) + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    made = torch.ones(like.shape, dtype=torch.bfloat16)
    return made if like.ndim == 1 else made.normal_(0, 0.02, generator=generator)
