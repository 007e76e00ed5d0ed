"""Packing a model into one file, and unpacking it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fedprllm.cli.console import console

if TYPE_CHECKING:
    from fedprllm.packing.archive import Packed

__all__ = ["pack_command", "unpack_command"]


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


def _show(done: str, path: Path, found: Packed) -> None:
    share = found.n_packed_bytes / max(found.n_bytes, 1)
    console.print(f"{done}  {escape(str(path))}", soft_wrap=True)
    console.print(
        f"{found.n_files} files, {found.n_bytes / 1e6:,.1f} MB; packed {found.n_packed_bytes / 1e6:,.1f} MB, "
        f"{share:.1%} of it"
    )
