"""From what the user wrote (hub id, folder, GGUF file) to a folder that can be read block by block.

The reader needs safetensors whose tensor names are those of the transformers model. Most checkpoints
are that already and are used where they lie; the others are converted once and kept in a cache::

    <cache>/models/<name>-<digest of the source>/    a finished conversion, never changed again
    <cache>/models/<name>-<digest>.partial/          one being written, or left behind by a killed process
    <cache>/models/convert.lock                      held by the one process that converts
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedprllm.errors import ModelError, RunError, did_you_mean
from fedprllm.progress import Progress, silent

__all__ = ["build_skeleton", "is_hub_id", "resolve_model"]

_CONVERTER_VERSION = 1  # raise it when a conversion writes something else than before
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer
_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"


def resolve_model(model: str | Path, *, cache_dir: Path | None = None, progress: Progress = silent) -> Path:
    """Return a local folder with ``config.json`` and safetensors named as in the transformers model.

    A tensor that is tied to another one may be absent, and names may lack the prefix of the base model
    (``h.0.ln_1.weight`` for ``transformer.h.0.ln_1.weight``). A conversion holds the model in memory.

    Args:
        model: Id on the Hugging Face hub, local folder, or GGUF file.
        cache_dir: Where conversions are kept [default: $FEDPRLLM_CACHE, or the user's cache folder].
        progress: Told of a download and of a conversion (see `fedprllm.progress`).

    Raises:
        ModelError: There is no such model, it is no decoder-only language model, or its files are
            incomplete or corrupted.
        RunError: The cache cannot be written.
    """
    path = _local_path(model) or _download(str(model), progress)
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise ModelError(f"{path} is a file but no GGUF file: give the folder of the model")
    if path.is_file():
        return _converted(path, [path], _convert_gguf, cache_dir, progress)
    with _quiet():
        skeleton = build_skeleton(path)
    weight_files = _weight_files(path, _SAFETENSORS)
    if weight_files and _fits(skeleton, weight_files):
        return path
    weight_files = weight_files or _weight_files(path, _PICKLED)
    if not weight_files:
        raise ModelError(
            f"{path} holds no weights: expected {_SAFETENSORS} or {_PICKLED} (or the index of their "
            f"parts), found {_names(sorted(other.name for other in path.iterdir()))}"
        )
    return _converted(path, [*weight_files, *_side_files(path)], _convert_folder, cache_dir, progress)


def is_hub_id(name: str) -> bool:
    """Whether a name can be an id on the hub, and so the same model everywhere; a path cannot."""
    return bool(_HUB_ID.fullmatch(name)) and not name.lower().endswith(".gguf")


def _local_path(model: str | Path) -> Path | None:
    """The existing file or folder; None if the text can only be an id on the hub."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    if isinstance(model, str) and is_hub_id(model) and (path.parent == Path() or not path.parent.is_dir()):
        return None
    raise ModelError(f"there is no model at {path}: {_neighbours(path)}")


def _neighbours(path: Path) -> str:
    """What there is instead of a path that does not exist."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    models = sorted(
        other.name
        for other in path.parent.iterdir()
        if other.suffix.lower() == ".gguf" or (other / "config.json").is_file()
    )
    return did_you_mean(path.name, models) if models else f"no models in {path.parent.absolute()}"


def _download(model: str, progress: Progress) -> Path:
    """The snapshot of a hub model: only what is needed, pickled weights only if there are no others."""
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(weights: str) -> Path:
        patterns = [*_SIDE_FILES, weights]
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns, ignore_patterns="*/*"))

    try:
        with progress(f"fetching {model}", 1) as advance:
            with _quiet():
                folder = fetch("model*.safetensors")
                if not any(folder.glob("*.safetensors")):
                    folder = fetch("pytorch_model*.bin")
            advance(1)
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{model} is gated: accept its terms on the hub, then log in with 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{model} is neither here ({_neighbours(Path(model))}) nor on the hub; if it is private there, "
            "log in with 'hf auth login'"
        ) from error
    except Exception as error:  # of the hub's client, of the network library below it, of the disk
        raise ModelError(
            f"{model} is not here ({_neighbours(Path(model))}) and could not be fetched from the hub. "
            f"Offline? Give a local folder or a GGUF file. {_reason(error)}"
        ) from error
    return folder


def build_skeleton(folder: Path, dtype: Any = None) -> Any:
    """The transformers model of a folder, without weights: empty parameters, tied, and real buffers.

    Only ``config.json`` is read; ``dtype`` is that of the parameters to come.
    """
    if not (folder / "config.json").is_file():
        others = sorted(other.name for other in folder.glob("*.gguf"))
        hint = f"; for a GGUF file give the file: {_names(others)}" if others else ""
        raise ModelError(f"{folder} is no model folder: it has no config.json{hint}")
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    # transformers raises whatever its thousand configurations and models raise on values they do not know.
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {_reason(error)}") from error
    masked = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    if config.is_encoder_decoder or masked:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "an encoder"
        raise ModelError(f"{folder} is {kind} ({config.model_type}): only decoder-only models can be pruned")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{folder} is quantised: give the checkpoint from before the quantisation, or a GGUF"
        )
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype)
    except Exception as error:
        raise ModelError(
            f"{folder} ({config.model_type}) is not a decoder-only language model that this version of "
            f"transformers knows: {_reason(error)}"
        ) from error
    # Without weights a tie made during construction is lost.
    model.tie_weights()
    return model


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The files that hold the weights, in one piece or as an index lists them; empty if there are none."""
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [folder / name] if (folder / name).is_file() else []
    try:
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weights: download it again. {_reason(error)}") from error
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing:
        raise ModelError(f"{folder} is incomplete, download it again: {_names(missing)} missing")
    return [folder / part for part in parts]


def _fits(model: Any, weight_files: list[Path]) -> bool:
    """Whether the files hold every tensor of the model by its name and shape; reads their headers only."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in weight_files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is corrupted, download it again: {_reason(error)}") from error
    prefix = f"{model.base_model_prefix}."
    return all(
        list(tensor.shape) == shapes.get(name, shapes.get(name.removeprefix(prefix)))
        for name, tensor in _own_tensors(model).items()
    )


def _own_tensors(model: Any) -> dict[str, Any]:
    """The state dict without the second names of tied tensors."""
    first = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in first}


def _converted(
    source: Path,
    files: list[Path],
    convert: Callable[[Path, Path], None],
    cache_dir: Path | None,
    progress: Progress,
) -> Path:
    """The folder in the cache that ``convert(source, folder)`` filled, now or earlier."""
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
                    with _quiet():
                        _fill(target, lambda folder: convert(source, folder))
                    advance(1)
    except OSError as error:
        raise RunError(
            f"the model cache {cache} cannot be written: {_reason(error)}. Free some space, or set "
            "FEDPRLLM_CACHE to another folder"
        ) from error
    return target


def _fill(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder that takes the name ``target`` when it is complete."""
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
            raise ModelError(f"{file} cannot be read: {_reason(error)}") from error
    return whole.hexdigest()[:20]


def _side_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [path for path in files if any(fnmatch.fnmatch(path.name, pattern) for pattern in _SIDE_FILES)]


def _convert_folder(source: Path, folder: Path) -> None:
    for file in _side_files(source):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    _write(_loaded(source, source, dtype="auto"), folder)


def _convert_gguf(source: Path, folder: Path) -> None:
    import torch
    import transformers

    # Newer versions may keep the weights packed unless told otherwise; older ones have no such class.
    config = getattr(transformers, "GgufConfig", None)
    how = {"quantization_config": config(dequantize=True)} if config else {}
    # A bare name would be looked up in the working folder first.
    file = str(source.absolute())
    model = _loaded(source, source.parent, gguf_file=file, dtype=torch.float32, **how)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=file)
    except Exception as error:
        raise ModelError(f"the tokenizer in {source} cannot be read: {_reason(error)}") from error
    tokenizer.save_pretrained(folder)
    _write(model, folder)


def _loaded(source: Path, folder: Path, **how: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, output_loading_info=True, **how
        )
    except Exception as error:
        raise ModelError(
            f"{source} cannot be read, it is corrupted or of a kind that this version of transformers does "
            f"not know: {_reason(error)}"
        ) from error
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise ModelError(f"{source} is incomplete, download it again: {_names(missing)} missing")
    return model


def _write(model: Any, folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    skeleton = build_skeleton(folder)
    state = model.state_dict()
    second_names = sorted(state.keys() - _own_tensors(skeleton).keys())
    try:
        save_torch_state_dict(state, folder, shared_tensors_to_discard=second_names)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    weight_files = _weight_files(folder, _SAFETENSORS)
    for file in weight_files:  # safetensors lets only the owner read what it writes
        shutil.copymode(folder / "config.json", file)
    assert _fits(skeleton, weight_files)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries: messages, warnings and progress bars."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as transformers

    levels = [(logging, logging.get_verbosity()) for logging in (hub, transformers)]
    try:
        for logging, _ in levels:
            logging.set_verbosity_error()
        # The bar over the tensors of a GGUF ignores the switch of transformers for its bars.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logging, level in levels:
            logging.set_verbosity(level)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
