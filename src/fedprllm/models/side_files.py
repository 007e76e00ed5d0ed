"""Which files beside the weights belong to a model: those named here, and nothing else.

A folder with a model also collects logs, notebooks, training states, texts and keys. Whatever is not known to
belong to the model stays where it is.
"""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path

__all__ = ["PATTERNS", "TERMS", "left_out", "side_files"]

TERMS = ("license*", "licence*", "copying*", "notice*", "use_policy*", "usage_policy*", "gemma_terms*")
# Relative paths; matched without regard to case.
PATTERNS = (
    "config.json",
    "generation_config.json",
    # Tokenizers
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "merges.txt",
    "normalizer.json",
    "spiece.model",
    "spm.model",
    "sentencepiece*.model",
    "bpe.model",
    "source.spm",
    "target.spm",
    "*.tiktoken",
    "tekken.json",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    "tokenizer/*.model",
    # Templates
    "chat_template.json",
    "chat_template*.jinja",
    "additional_chat_templates/*.jinja",
    # Inputs other than text
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    *TERMS,
)
_TERMS_SUFFIXES = {"", ".txt", ".md", ".rst", ".pdf", ".html"}
# Made anew with the pruned model.
_REPLACED = ("readme*", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", ".gitattributes")
_SETTINGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import|^\s*from\s+\.\s+import\s+(\w+)", re.MULTILINE)


def side_files(folder: Path) -> list[Path]:
    """Files of a model folder that belong to the model besides its weights, as sorted relative paths.

    Code is among them if a configuration names it (``auto_map``); it is never run here.
    """
    found = {path for path in _files(folder) if _belongs(path)}
    return sorted(found | _code(folder))


def left_out(folder: Path) -> list[str]:
    """Names of files and folders beside the model that are not part of it, hidden ones excepted."""
    kept = side_files(folder)
    whole = {path.parts[0] for path in kept}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in whole and not path.name.startswith(".") and not _matches(path.name, _REPLACED)
    )


def _files(folder: Path) -> list[Path]:
    """Files in the folder and in the subfolders that the patterns name."""
    subfolders = sorted({pattern.rpartition("/")[0] for pattern in PATTERNS})
    places = [folder / name for name in subfolders if (folder / name).is_dir()]
    return [
        path.relative_to(folder) for place in places for path in sorted(place.iterdir()) if path.is_file()
    ]


def _belongs(path: Path) -> bool:
    name = path.as_posix().lower()
    if _matches(name, TERMS) and path.suffix.lower() not in _TERMS_SUFFIXES:
        return False
    # A pattern for the folder itself must not reach into a subfolder.
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in PATTERNS
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _code(folder: Path) -> set[Path]:
    """The modules that configurations name, and those of the same folder that these import."""
    todo = {module for name in _SETTINGS for module in _named_modules(folder / name)}
    found: set[Path] = set()
    while todo:
        path = Path(f"{todo.pop()}.py")
        if path in found or not (folder / path).is_file():
            continue
        found.add(path)
        text = (folder / path).read_text(encoding="utf-8", errors="replace")
        todo |= {part for match in _IMPORT.finditer(text) for part in match.groups() if part}
    return found


def _named_modules(settings: Path) -> set[str]:
    """Modules of this folder in ``auto_map``; entries of other repositories contain ``--``."""
    try:
        named = json.loads(settings.read_text(encoding="utf-8")).get("auto_map") or {}
        entries = list(named.values()) if isinstance(named, dict) else []
    except (OSError, ValueError, AttributeError):
        return set()
    flat = [part for entry in entries for part in (entry if isinstance(entry, list) else [entry])]
    names = [part.partition(".")[0] for part in flat if isinstance(part, str) and "--" not in part]
    return {name for name in names if re.fullmatch(r"\w+", name)}
