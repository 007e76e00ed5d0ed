"""Resolve a model given as hub id, folder or GGUF file to a folder that can be read block by block.

The reader needs safetensors files whose tensors are named as in the transformers model. Most checkpoints
already have this form and are used in place; the others are converted (`fedprllm.models.conversion`).
"""

from __future__ import annotations

import re
from pathlib import Path

from fedprllm.errors import ModelError, did_you_mean
from fedprllm.models.conversion import (
    PICKLED,
    SAFETENSORS,
    convert_folder,
    convert_gguf,
    converted,
    fits,
    weight_files,
)
from fedprllm.models.find import find_blocks
from fedprllm.models.guards import refuse_structure
from fedprllm.models.library import quiet, reason, some_of
from fedprllm.models.probe import probe_blocks
from fedprllm.models.side_files import PATTERNS, TERMS, side_files
from fedprllm.models.skeleton import build_skeleton
from fedprllm.progress import Progress, silent

__all__ = ["is_cached", "is_hub_id", "is_offline", "resolve_model"]

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


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
        return converted(path, [path], convert_gguf, cache_dir, progress)
    with quiet():
        skeleton = build_skeleton(path)
    refuse_structure(skeleton)
    files = weight_files(path, SAFETENSORS)
    if files and fits(skeleton, files):
        return path
    files = files or weight_files(path, PICKLED)
    if not files:
        raise ModelError(
            f"{path} contains no weights: expected {SAFETENSORS} or {PICKLED} (or an index of their "
            f"parts), found {some_of(sorted(other.name for other in path.iterdir()))}. "
            "Download the model again"
        )
    with quiet():
        probe_blocks(skeleton, find_blocks(skeleton)[1])
    beside = [path / name for name in side_files(path)]
    return converted(path, [*files, *beside], convert_folder, cache_dir, progress)


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
            with quiet():
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
            f"from the hub: {reason(error)}. Offline? Give a local folder or a GGUF file"
        ) from error
    return folder
