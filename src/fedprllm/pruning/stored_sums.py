"""The sums of squares of a block's inputs over all participants, kept for what can be made of them later.

A safetensors file holds one tensor float64 [in] for each distinct input of the block's Linears, named after
the first Linear that reads it. The file's metadata holds ``n_tokens``, the number of tokens that were summed
over, and ``inputs``, a JSON object that maps the name of each weight to the name of its input's tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedprllm.errors import RunError
from fedprllm.files import save_tensors
from fedprllm.models.block import Linear

__all__ = ["InputSums", "read_sums", "save_sums"]


@dataclass(frozen=True)
class InputSums:
    """The sums of squares that the Linears of a block read.

    Attributes:
        of_weight: ``sum_x x_j^2`` over all tokens, float64 [in], by weight name.
        n_tokens: Number of these tokens, over all participants.
    """

    of_weight: dict[str, Float[Tensor, " in"]]
    n_tokens: int


def save_sums(
    path: Path, squares: Mapping[str, Tensor], linears: Mapping[str, Linear], n_tokens: int
) -> None:
    """Write a block's sums atomically; without sums, no file is written.

    Args:
        path: The file.
        squares: Sums of squares [in] by the name of the first Linear that reads the input.
        linears: The Linears of the block.
        n_tokens: Number of tokens that were summed over.
    """
    if squares:
        inputs = {name: linear.source for name, linear in linears.items()}
        tensors = {name: sums.detach().cpu().to(torch.float64) for name, sums in squares.items()}
        save_tensors(path, tensors, {"n_tokens": str(n_tokens), "inputs": json.dumps(inputs)})


def read_sums(path: Path) -> InputSums:
    """Read what `save_sums` wrote.

    Raises:
        RunError: The file is not one of sums.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            about = opened.metadata()
            inputs, n_tokens = json.loads(about["inputs"]), int(about["n_tokens"])
            sums = {name: opened.get_tensor(name).clone() for name in set(inputs.values())}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"{path} does not contain sums ({error}): restore it, or run again in another folder"
        ) from None
    return InputSums({name: sums[source] for name, source in inputs.items()}, n_tokens)
