"""Resolve a model given as hub id, folder or GGUF file to a folder that can be read block by block.

The reader needs safetensors files whose tensors are named as in the transformers model. Most checkpoints
already have this form and are used in place; the others are converted once and kept in a cache::

    <cache>/models/<name>-<digest of the source>/    a finished conversion, never changed again
    <cache>/models/<name>-<digest>.partial/          one being written, or left behind by a killed process
    <cache>/models/convert.lock                      held by the process that is converting
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedprllm.errors import ModelError, RunError, did_you_mean
from fedprllm.models.experts import unfuse
from fedprllm.models.find import find_blocks
from fedprllm.models.guards import refuse_structure
from fedprllm.models.names import stored_tensors
from fedprllm.models.probe import probe_blocks
from fedprllm.models.side_files import PATTERNS, TERMS, side_files
from fedprllm.progress import Progress, silent

__all__ = ["build_skeleton", "is_cached", "is_hub_id", "is_offline", "resolve_model"]

_CONVERTER_VERSION = 2  # increment when conversions change their output
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"


def resolve_model(model: str | Path, *, cache_dir: Path | None = None, progress: Progress = silent) -> Path:
    """Return a local folder with ``config.json`` and safetensors with all tensors of the transformers model.

    Tensors that are tied to others may be absent, and names may be others than the model's
    (`fedprllm.models.names`). Models that cannot be pruned are refused before a conversion, which holds the
    whole model in memory.

    Args:
        model: Id on the Hugging Face hub, local folder, or GGUF file.
        cache_dir: Folder for conversions [default: $FEDPRLLM_CACHE, or the user's cache folder].
        progress: Reports downloads and conversions (see `fedprllm.progress`).

    Raises:
        ModelError: The model does not exist, is not a decoder-only language model, or has incomplete or
            corrupted files.
        RunError: The cache cannot be written.
    """
    if not isinstance(model, (str, Path)):
        raise ModelError(f"the model must be a hub id or a path, found {type(model).__name__}")
    try:
        return _resolved(model, cache_dir, progress)
    except OSError as error:
        raise ModelError(
            f"{error.filename or model} cannot be read ({error.strerror or error}): check its permissions"
        ) from None


def _resolved(model: str | Path, cache_dir: Path | None, progress: Progress) -> Path:
    path = _local_path(model) or _download(str(model), progress)
    if path.is_dir():
        _check_links(path)
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise ModelError(
            f"{path} is a file, but not a GGUF file: expected a model folder, a GGUF file or a hub id; give "
            "the folder that contains it"
        )
    if path.is_file():
        return _converted(path, [path], _convert_gguf, cache_dir, progress)
    with _quiet():
        skeleton = build_skeleton(path)
    refuse_structure(skeleton)
    weight_files = _weight_files(path, _SAFETENSORS)
    if weight_files and _fits(skeleton, weight_files):
        return path
    weight_files = weight_files or _weight_files(path, _PICKLED)
    if not weight_files:
        raise ModelError(
            f"{path} contains no weights: expected {_SAFETENSORS} or {_PICKLED} (or an index of their "
            f"parts), found {_names(sorted(other.name for other in path.iterdir()))}. "
            "Download the model again"
        )
    with _quiet():
        probe_blocks(skeleton, find_blocks(skeleton)[1])
    beside = [path / name for name in side_files(path)]
    return _converted(path, [*weight_files, *beside], _convert_folder, cache_dir, progress)


def is_hub_id(name: str) -> bool:
    """Whether a name can be a hub id, which means the same model everywhere, unlike a path."""
    return bool(_HUB_ID.fullmatch(name)) and not name.lower().endswith(".gguf")


def _check_links(folder: Path) -> None:
    """Refuse a folder in which a file is a link to nothing, as in a cache that was cleared in part.

    Raises:
        ModelError: Names the link.
    """
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.exists():
            raise ModelError(
                f"{file} is a link to {file.readlink()}, which does not exist: the folder is a part of a "
                "cache that was cleared or moved; download the model again"
            )


def is_cached(name: str) -> bool:
    """Whether a model of the hub has been fetched before."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def is_offline() -> bool:
    """Whether the hub may not be asked (``HF_HUB_OFFLINE``)."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _local_path(model: str | Path) -> Path | None:
    """The existing file or folder; None if the text can only be a hub id."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    if path.is_symlink():
        raise ModelError(f"{path} is a link to {path.readlink()}, which does not exist: correct the link")
    if isinstance(model, str) and is_hub_id(model) and (path.parent == Path() or not path.parent.is_dir()):
        return None
    raise ModelError(f"there is no model at {path}: {_neighbors(path)}")


def _neighbors(path: Path) -> str:
    """Describe what exists near a path that does not exist."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    models = sorted(
        other.name
        for other in path.parent.iterdir()
        if other.suffix.lower() == ".gguf" or (other / "config.json").is_file()
    )
    return did_you_mean(path.name, models) if models else f"{path.parent.absolute()} contains no models"


def _download(model: str, progress: Progress) -> Path:
    """Download a hub model: only the files needed, and pickled weights only if there are no others."""
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(weights: str) -> Path:
        patterns = [*PATTERNS, *map(str.upper, TERMS), "*.py", weights, f"{weights}.index.json"]
        # A star also matches folders.
        ignored = [
            f"*/{ending}" for ending in ("*.safetensors", "*.bin", "*.index.json", "*.py", "*.tiktoken")
        ]
        return Path(
            huggingface_hub.snapshot_download(model, allow_patterns=patterns, ignore_patterns=ignored)
        )

    try:
        with progress(f"downloading {model}", 1) as advance:
            with _quiet():
                folder = fetch("model*.safetensors")
                if not any(folder.glob("*.safetensors")):
                    folder = fetch("pytorch_model*.bin")
            advance(1)
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the model {model} is gated: accept its terms on the hub, then log in with 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no model {model} locally ({_neighbors(Path(model))}) or on the hub: check its name; "
            "if it is private, log in with 'hf auth login'"
        ) from error
    except Exception as error:  # from the hub's client, the network library below it, or the disk
        raise ModelError(
            f"there is no model {model} locally ({_neighbors(Path(model))}), and it could not be downloaded "
            f"from the hub: {_reason(error)}. Offline? Give a local folder or a GGUF file"
        ) from error
    return folder


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
        hint = f"; to use a GGUF file, give the file itself: {_names(others)}" if others else ""
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
            f"{folder / 'config.json'} cannot be read: {_reason(error)}. Download it again or update "
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
            f"transformers supports: {_reason(error)}. Use another model or update transformers"
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


def _weight_files(folder: Path, name: str) -> list[Path]:
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
            f"{index} is not a valid index of weights: {_reason(error)}. Download it again"
        ) from error
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing:
        raise ModelError(f"{folder} is incomplete, download it again: {_names(missing)} missing")
    return [folder / part for part in parts]


def _fits(model: Any, weight_files: list[Path]) -> bool:
    """Whether the files contain every tensor of the model by name and shape; reads only their headers."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in weight_files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except PermissionError as error:
            raise ModelError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is corrupted: {_reason(error)}. Download it again") from error
    return _contains_all(model, shapes)


def _contains_all(model: Any, shapes: Mapping[str, list[int]]) -> bool:
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


def _converted(
    source: Path,
    files: list[Path],
    convert: Callable[[Path, Path], None],
    cache_dir: Path | None,
    progress: Progress,
) -> Path:
    """The cache folder that ``convert(source, folder)`` fills now or has filled before."""
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
            f"the model cache {cache} cannot be written: {_reason(error)}. Free some disk space, or set "
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
            raise ModelError(f"{file} cannot be read: {_reason(error)}. Check its permissions") from error
    return whole.hexdigest()[:20]


def _convert_folder(source: Path, folder: Path) -> None:
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

    if _weight_files(source, _SAFETENSORS):
        return False
    state: dict[str, Any] = {}
    try:
        for file in _weight_files(source, _PICKLED):
            state |= torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # from unpickling, which may do anything
        raise ModelError(
            f"{source} cannot be read: {_reason(error)}. It is corrupted; download it again"
        ) from error
    if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        return False
    skeleton = build_skeleton(source)
    if not _contains_all(skeleton, {name: list(tensor.shape) for name, tensor in state.items()}):
        return False
    own = _own_tensors(skeleton)
    stored = stored_tensors(skeleton, state)
    _save(state, folder, [place.key for name, place in stored.items() if name not in own])
    return True


def _convert_gguf(source: Path, folder: Path) -> None:
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
            f"the tokenizer in {source} cannot be read: {_reason(error)}. Download the file again, or give "
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
            f"{source} cannot be read: {_reason(error)}. It is corrupted, or this version of transformers "
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
        raise ModelError(f"{source} is incomplete, download it again: {_names(missing)} missing")
    return model


def _write(model: Any, folder: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    skeleton = build_skeleton(folder)
    state = model.state_dict()
    _save(state, folder, sorted(state.keys() - _own_tensors(model).keys()))
    assert _fits(skeleton, _weight_files(folder, _SAFETENSORS))


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
    for file in _weight_files(
        folder, _SAFETENSORS
    ):  # safetensors creates files that only their owner can read
        shutil.copymode(folder / "config.json", file)


def _is_part(tensor: Any) -> bool:
    """Whether a tensor is a view of more than itself."""
    return bool(tensor.untyped_storage().nbytes() != tensor.nbytes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' messages, warnings and progress bars."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as transformers

    levels = [(logging, logging.get_verbosity()) for logging in (hub, transformers)]
    try:
        for logging, _ in levels:
            logging.set_verbosity_error()
        # The progress bar over the tensors of a GGUF file ignores transformers' setting for progress bars.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logging, level in levels:
            logging.set_verbosity(level)


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first.rstrip('.')}"


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
