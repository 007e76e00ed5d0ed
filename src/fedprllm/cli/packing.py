"""Packing a model into one file, unpacking it, and what a run gives other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fedprllm.cli.console import console

if TYPE_CHECKING:
    from fedprllm.packing.archive import Packed

__all__ = ["export_command", "pack_command", "unpack_command"]


def pack_command(
    folder: Annotated[Path, typer.Argument(help="folder of a model: RUN/model")],
    out: Annotated[Path | None, typer.Option(help=escape("file to write [default: FOLDER.fedpack]"))] = None,
) -> None:
    """Pack a model into one file in which a zero takes one bit; nothing is lost."""
    from fedprllm.packing.archive import pack

    target = out or folder.resolve().with_name(f"{folder.resolve().name}.fedpack")
    _show("packed", target, pack(folder, target))
    console.print(f"unpack it with: fedprllm unpack {escape(str(target))} FOLDER", soft_wrap=True)


def unpack_command(
    packed: Annotated[Path, typer.Argument(help="file that 'fedprllm pack' wrote")],
    out: Annotated[Path, typer.Argument(help="folder to write, which does not exist yet", metavar="FOLDER")],
) -> None:
    """Unpack a model, bit by bit as it was packed."""
    from fedprllm.packing.archive import unpack

    _show("unpacked", out, unpack(packed, out))


def export_command(
    run: Annotated[Path, typer.Argument(help="folder of a finished run in which participants shared sums")],
    imatrix: Annotated[Path, typer.Option(help="importance matrix to write, a GGUF file for llama-quantize")],
    architecture: Annotated[
        str | None,
        typer.Option(help=escape("the model's architecture in GGUF files [default: by the model's type]")),
    ] = None,
) -> None:
    """Export the participants' sums, so that a quantizer follows everybody's text."""
    from fedprllm.export.imatrix import export_importance_matrix

    found = export_importance_matrix(run, imatrix, architecture)
    console.print(f"exported  {escape(str(found.path))}", soft_wrap=True)
    console.print(f"{found.n_weights} weights, {found.n_tokens:,} tokens or more behind each")
    if found.n_unreached:
        console.print(f"{found.n_unreached} matrices of experts that no text reached have no importances")
    for name in found.left_out:
        console.print(f"left out, since llama.cpp has no name for it: {escape(name)}", soft_wrap=True)
    console.print(
        f"use it with: llama-quantize --imatrix {escape(str(found.path))} MODEL.gguf OUT.gguf Q4_K_M",
        soft_wrap=True,
    )


def _show(done: str, path: Path, found: Packed) -> None:
    share = found.n_packed_bytes / max(found.n_bytes, 1)
    console.print(f"{done}  {escape(str(path))}", soft_wrap=True)
    console.print(
        f"{found.n_files} files, {found.n_bytes / 1e6:,.1f} MB; packed {found.n_packed_bytes / 1e6:,.1f} MB, "
        f"{share:.1%} of it"
    )
