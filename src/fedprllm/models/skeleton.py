"""The transformers model of a folder without weights."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedprllm.errors import ModelError
from fedprllm.models.experts import unfuse
from fedprllm.models.library import reason, some_of

__all__ = ["build_skeleton"]


def build_skeleton(folder: Path, dtype: Any = None) -> Any:
    """Build the transformers model of a folder without weights: empty, tied parameters and real buffers.

    Only ``config.json`` is read.

    Args:
        folder: Model folder.
        dtype: Precision of the parameters that will be filled in later; None takes it from the configuration.

    Raises:
        ModelError: The folder has no usable configuration, or one of a model that cannot be pruned.
    """
    if not (folder / "config.json").is_file():
        others = sorted(other.name for other in folder.glob("*.gguf"))
        hint = f"; to use a GGUF file, give the file itself: {some_of(others)}" if others else ""
        if (folder / "model" / "config.json").is_file():
            hint = f"; the model of this run is in {folder / 'model'}"
        raise ModelError(f"{folder} is not a model folder: it has no config.json{hint}")
    # A run opens a model several times: to see whether its files fit, and to walk through it.
    return copy.deepcopy(_pristine_skeleton(folder, (folder / "config.json").read_bytes(), dtype))


@lru_cache(maxsize=4)
def _pristine_skeleton(folder: Path, config_json: bytes, dtype: Any) -> Any:  # noqa: ARG001  part of the key
    """Build a skeleton that nothing changes afterwards."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from fedprllm.models.empty import LeaveEmpty

    # On values they do not know, transformers' many configurations and models raise exceptions of any type.
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{folder / 'config.json'} cannot be read: {reason(error)}. Download it again or update "
            "transformers; models that need code of their own are not supported"
        ) from error
    masked = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    if config.is_encoder_decoder or masked:
        family = "an encoder-decoder" if config.is_encoder_decoder else "an encoder"
        raise ModelError(
            f"{folder} is {family} model ({config.model_type}): only decoder-only models can be pruned"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{folder} is quantized: give the unquantized checkpoint, or a GGUF file")
    try:
        with init_empty_weights(include_buffers=False), LeaveEmpty():
            model = _loader(config).from_config(config, trust_remote_code=False, dtype=dtype)
    except Exception as error:
        raise ModelError(
            f"{folder} ({config.model_type}) is not a decoder-only language model that this version of "
            f"transformers supports: {reason(error)}. Use another model or update transformers"
        ) from error
    # Ties made during construction are lost if there are no weights.
    model.tie_weights()
    unfuse(model)
    return model


def _loader(config: Any) -> Any:
    """The class that builds a configuration's model: a language model or, failing that, a multimodal one."""
    import transformers

    # Older versions of transformers lack the second one.
    names = ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText")
    loaders = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    return next((one for one in loaders if type(config) in one._model_mapping), loaders[0])
