"""The participant's keys: made here, certified by the coordinator, renewed before they expire."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fedprllm.cli.console import console, errors, need_keys
from fedprllm.errors import ConfigError

if TYPE_CHECKING:
    from fedprllm.federation.keys.identity import OpenRequest

__all__ = ["app", "compare", "warn_of_expiry"]

app = typer.Typer(
    name="identity",
    help="Your key for federations: made on this machine, where it stays.",
    no_args_is_help=True,
)
Identity = Annotated[Path, typer.Argument(help="folder of your identity", metavar="FOLDER")]


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="your name in the coordinator's plan")],
    out: Annotated[Path | None, typer.Option(help=escape("folder for the identity [default: NAME]"))] = None,
) -> None:
    """Make a private key, and a request to send to the coordinator."""
    need_keys()
    from fedprllm.federation.keys.identity import new_identity

    folder = out or Path(name)
    _show_request(folder, new_identity(name, folder))


@app.command("accept")
def accept(
    folder: Identity,
    kit: Annotated[Path, typer.Argument(help="kit that the coordinator sent: NAME.kit", metavar="KIT_FILE")],
    fingerprint: Annotated[
        str | None, typer.Option(help="the authority's fingerprint as the coordinator told you")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="accept without comparing the fingerprint")] = False,
) -> None:
    """Put the coordinator's kit beside your key."""
    need_keys()
    from fedprllm.federation.keys import identity

    offer = identity.examine(folder, kit)
    console.print(f"server       {escape(offer.address['target'])}", soft_wrap=True)
    console.print(f"certificate  until {offer.certificate.not_valid_after_utc:%Y-%m-%d}")
    console.print(f"authority    {offer.fingerprint}", highlight=False)
    if not offer.known_authority:
        compare(
            offer.fingerprint,
            fingerprint,
            "Does the coordinator read out the same groups for the authority?",
            agreed=yes,
        )
    identity.accept(folder, offer)
    console.print(f"next         fedprllm participate {escape(str(folder))} --data TEXT", soft_wrap=True)


@app.command("renew")
def renew(
    folder: Identity,
    new_key: Annotated[
        bool,
        typer.Option("--new-key", help="make a new key; the old one ends when the new kit is accepted"),
    ] = False,
) -> None:
    """Request a new certificate before yours expires; until it arrives, yours works."""
    need_keys()
    from fedprllm.federation.keys import identity

    _show_request(folder, identity.renew(folder, with_new_key=new_key))


@app.command("show")
def show(folder: Identity) -> None:
    """Show the fingerprints and dates of an identity."""
    need_keys()
    from fedprllm.federation.keys import identity
    from fedprllm.federation.keys.certificates import fingerprint, key_of, read_certificate

    for request in identity.open_requests(folder):
        console.print(f"request      {request.fingerprint}  ({escape(str(request.path))})", highlight=False)
    path = folder / "startup" / "client.crt"
    if not path.exists():
        if not identity.open_requests(folder):
            raise ConfigError(f"{folder} holds no identity: make one with 'fedprllm identity new NAME'")
        return
    certificate = read_certificate(path)
    authority = read_certificate(path.with_name("rootCA.pem"))
    console.print(f"key          {fingerprint(key_of(certificate))}", highlight=False)
    console.print(f"certificate  until {certificate.not_valid_after_utc:%Y-%m-%d}")
    console.print(
        f"authority    {fingerprint(key_of(authority))}  until {authority.not_valid_after_utc:%Y-%m-%d}",
        highlight=False,
    )


def _show_request(folder: Path, request: OpenRequest) -> None:
    where = escape(str(folder))
    console.print(f"key          {request.fingerprint}", highlight=False)
    console.print(
        f"send         {escape(str(request.path))} to the coordinator; it holds no secret", soft_wrap=True
    )
    console.print(f"keep         {where}: it holds your private key, which nobody else needs", soft_wrap=True)
    console.print(
        f"next         fedprllm identity accept {where} {request.name}.kit, when the kit has come back",
        soft_wrap=True,
    )


def compare(found: str, told: str | None, question: str, *, agreed: bool) -> None:
    """Compare a fingerprint with what the other side sees, or ask the user to.

    Raises:
        ConfigError: They differ, or there is nobody to ask.
    """
    from fedprllm.federation.keys.certificates import same_fingerprint

    if told is not None:
        if not same_fingerprint(found, told):
            raise ConfigError(
                f"the fingerprint is {found}, and you were told {told}: somebody may have replaced the "
                "file on its way. Nothing was done; ask for it again on another way"
            )
        return
    if agreed:
        return
    if not sys.stdin.isatty():
        raise ConfigError(
            "there is no terminal on which to ask: pass the fingerprint that you were told with "
            "--fingerprint, or --yes to skip the comparison"
        )
    if not typer.confirm(question, err=True):
        raise ConfigError(
            "the fingerprints differ, so nothing was done: ask for the file again on another way"
        )


def warn_of_expiry(whose: str, days: float, command: str) -> None:
    """Tell in good time that a certificate must be renewed."""
    from fedprllm.federation.keys.certificates import WARN_DAYS

    if days < WARN_DAYS:
        left = f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} hours"
        errors.print(f"[yellow]{whose} expires in {left}[/]; to renew it: {escape(command)}", soft_wrap=True)
