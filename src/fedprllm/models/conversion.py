"""Convert checkpoints once to safetensors with the names of the transformers model, and keep them in a cache.

<cache>/models/<name>-<digest of the source>/    a finished conversion, never changed again
<cache>/models/<name>-<digest>.partial/          one being written, or left behind by a killed process
<cache>/models/convert.lock                      held by the process that is converting
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedprllm.errors import ModelError, RunError
from fedprllm.models.library import quiet, reason, some_of
from fedprllm.models.names import stored_tensors
from fedprllm.models.side_files import side_files
from fedprllm.models.skeleton import build_skeleton
from fedprllm.progress import Progress

__all__ = [
    "PICKLED",
    "SAFETENSORS",
    "convert_folder",
    "convert_gguf",
    "converted",
    "fits",
    "weight_files",
]

_CONVERTER_VERSION = 2  # increment when conversions change their output
SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files that contain the weights, a single one or those of an index; empty if there are none.

    Where there are both, transformers ignores the index.
    """
    index = folder / f"{name}.index.json"
    if (folder / name).is_file() or not index.is_file():
        return [folder / name] if (folder / name).is_file() else []
    try:
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index} is not a valid index of weights: {reason(error)}. Download it again"
        ) from error
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing:
        raise ModelError(f"{folder} is incomplete, download it again: {some_of(missing)} missing")
    return [folder / part for part in parts]


def fits(model: Any, files: list[Path]) -> bool:
    """Whether the files contain every tensor of the model by name and shape; reads only their headers."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except PermissionError as error:
            raise ModelError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is corrupted: {reason(error)}. Download it again") from error
    return contains_all(model, shapes)


def contains_all(model: Any, shapes: Mapping[str, list[int]]) -> bool:
    """Whether stored tensors, given by name and shape, are all that the model has; tied ones count once."""
    stored = stored_tensors(model, shapes)
    state = model.state_dict(keep_vars=True)
    fitting = {
        id(state[name])
        for name, place in stored.items()
        if list(state[name].shape) == place.shape(shapes[place.key])
    }
    return all(id(tensor) in fitting for tensor in state.values())


def _own_tensors(model: Any) -> dict[str, Any]:
    """The state dict without the second names of tied tensors."""
    first = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in first}


def converted(
    source: Path,
    files: list[Path],
    convert: Callable[[Path, Path], None],
    cache_dir: Path | None,
    progress: Progress,
) -> Path:
    """The cache folder that ``convert(source, folder)`` fills now or has filled before.

    Args:
        source: Folder or GGUF file.
        files: The files that the conversion depends on.
        convert: Fills a folder.
        cache_dir: As in `fedprllm.models.source.resolve_model`.
        progress: Reports the conversion.

    Raises:
        ModelError: A file cannot be read.
        RunError: The cache cannot be written.
    """
    import platformdirs
    from filelock import FileLock

    root = cache_dir or os.environ.get("FEDPRLLM_CACHE") or platformdirs.user_cache_dir("fedprllm")
    cache = Path(root, "models").absolute()
    name = source.resolve().name.removesuffix(".gguf")[:80]
    target = cache / f"{name}-{_digest(files)}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "convert.lock"):
            for stale in cache.glob("*.partial"):
                shutil.rmtree(stale)
            if not target.is_dir():
                with progress(f"converting {name}", 1) as advance:
                    with quiet():
                        _fill(target, lambda folder: convert(source, folder))
                    advance(1)
    except OSError as error:
        raise RunError(
            f"the model cache {cache} cannot be written: {reason(error)}. Free some disk space, or set "
            "FEDPRLLM_CACHE to another folder"
        ) from error
    return target


def _fill(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder, and rename it to ``target`` when it is complete."""
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir()
    try:
        write(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _digest(files: Iterable[Path]) -> str:
    whole = hashlib.sha256(f"fedprllm conversion {_CONVERTER_VERSION}".encode())
    for file in files:
        whole.update(file.name.encode())
        try:
            with file.open("rb") as content:
                whole.update(hashlib.file_digest(content, "sha256").digest())
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {reason(error)}. Check its permissions") from error
    return whole.hexdigest()[:20]


def convert_folder(source: Path, folder: Path) -> None:
    """Convert a model folder; raises `ModelError` if it is corrupted or incomplete."""
    for file in side_files(source):
        (folder / file.parent).mkdir(exist_ok=True)
        shutil.copyfile(source / file, folder / file)
    if not _keep_names(source, folder):
        _write(_loaded(source, source, dtype="auto"), folder)


def _keep_names(source: Path, folder: Path) -> bool:
    """Write pickled weights as they are to safetensors; False if there are none or they do not fit.

    Names and precisions stay as they are, so that every version of transformers that loads the source loads
    the result.
    """
    import torch

    if weight_files(source, SAFETENSORS):
        return False
    state: dict[str, Any] = {}
    try:
        for file in weight_files(source, PICKLED):
            state |= torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # from unpickling, which may do anything
        raise ModelError(
            f"{source} cannot be read: {reason(error)}. It is corrupted; download it again"
        ) from error
    if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        return False
    skeleton = build_skeleton(source)
    if not contains_all(skeleton, {name: list(tensor.shape) for name, tensor in state.items()}):
        return False
    own = _own_tensors(skeleton)
    stored = stored_tensors(skeleton, state)
    _save(state, folder, [place.key for name, place in stored.items() if name not in own])
    return True


def convert_gguf(source: Path, folder: Path) -> None:
    """Convert a GGUF file and its tokenizer; raises `ModelError` if it is corrupted or incomplete."""
    import torch
    import transformers

    # Newer versions may keep the weights packed unless told otherwise; older ones do not have this class.
    config = getattr(transformers, "GgufConfig", None)
    how = {"quantization_config": config(dequantize=True)} if config else {}
    # A bare name would be looked up in the working folder first.
    file = str(source.absolute())
    model = _loaded(source, source.parent, gguf_file=file, dtype=torch.float32, **how)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=file)
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {source} cannot be read: {reason(error)}. Download the file again, or give "
            "the folder of the original model"
        ) from error
    tokenizer.save_pretrained(folder)
    _write(model, folder)


def _loaded(source: Path, folder: Path, **how: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **how,
        )
    except Exception as error:
        raise ModelError(
            f"{source} cannot be read: {reason(error)}. It is corrupted, or this version of transformers "
            "does not support it; download it again or update transformers"
        ) from error
    if report["mismatched_keys"]:
        name, found, expected = min(report["mismatched_keys"], key=lambda entry: str(entry[0]))
        raise ModelError(
            f"{source}: the weights do not fit config.json: '{name}' has the shape {list(found)}, and "
            f"config.json says {list(expected)} (a vocabulary of another size, for instance); use the "
            "config.json that belongs to the weights"
        )
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise ModelError(f"{source} is incomplete, download it again: {some_of(missing)} missing")
    return model


def _write(model: Any, folder: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    skeleton = build_skeleton(folder)
    state = model.state_dict()
    _save(state, folder, sorted(state.keys() - _own_tensors(model).keys()))
    assert fits(skeleton, weight_files(folder, SAFETENSORS))


def _save(state: dict[str, Any], folder: Path, second_names: list[str]) -> None:
    """Save tensors; of those that share memory, second names are left out."""
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    kept = {name: tensor for name, tensor in state.items() if name not in second_names}
    if any(_is_part(tensor) for tensor in kept.values()):
        # A file holds whole tensors, each once.
        state, second_names = {name: tensor.clone() for name, tensor in kept.items()}, []
    try:
        save_torch_state_dict(state, folder, shared_tensors_to_discard=second_names)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    for file in weight_files(folder, SAFETENSORS):  # safetensors creates files that only their owner can read
        shutil.copymode(folder / "config.json", file)


def _is_part(tensor: Any) -> bool:
    """Whether a tensor is a view of more than itself."""
    return bool(tensor.untyped_storage().nbytes() != tensor.nbytes)
