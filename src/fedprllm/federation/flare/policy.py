"""Which messages each process of a federation accepts, and from whom; enforced by `federation.flare.guard`.

FLARE registers some forty handlers in every process (shell, deletion, log configuration, changing the
server's address, ...) and relays messages between sites. A run needs only the few in this table. Anything
else is refused, so handlers added by later versions of FLARE stay closed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from importlib.metadata import version

from fedprllm.errors import RunError

__all__ = [
    "ADMIN",
    "ALLOWED",
    "GUARDED",
    "MAX_FRAME_BYTES",
    "MAX_OPEN_STREAMS",
    "MB",
    "RESULT_CHANNEL",
    "RESULT_TOPIC",
    "SITE_ORDERS",
    "TESTED_VERSIONS",
    "UPDATE",
    "Party",
    "check_version",
    "is_job_id",
    "limit",
    "may_talk",
    "opens",
    "party",
    "root",
]

# FLARE versions whose handlers and connections were reviewed and attacked with this guard in place.
TESTED_VERSIONS = ("2.9.0",)

# Common name in the coordinator's certificate.
ADMIN = "coordinator@fedprllm.local"

# Module that runs a FLARE module behind the guard.
GUARDED = "fedprllm.federation.flare.guarded"

KB, MB = 1024, 1024 * 1024
# Longer messages are streamed in chunks of 1 MiB, so no honest frame is longer than this. The drivers refuse
# a longer frame by its announced length, before allocating memory for it.
MAX_FRAME_BYTES = 2 * MB
# Streams that one sender may have open at once; an honest sender has a handful.
MAX_OPEN_STREAMS = 64
# Stands for the agreed limit, `max_message_mb`.
UPDATE = -1

# Where participants ask the server for results.
RESULT_CHANNEL = "fedprllm"
RESULT_TOPIC = "result"

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ADMIN_PREFIX = "_admin_"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class Party(Enum):
    """The types of process in a federation."""

    SERVER = "server"
    SERVER_JOB = "server's job process"
    SITE = "site"
    SITE_JOB = "site's job process"
    COORDINATOR = "coordinator"


_BYE = {"cellnet.channel/bye": 4 * KB}
_REGISTER = {"task/challenge": 64 * KB, "task/register": 64 * KB, "task/quit": 64 * KB}

# (receiver, sender): the messages the receiver accepts, as channel/topic, and their maximum size in bytes.
ALLOWED: Mapping[tuple[Party, Party], Mapping[str, int]] = {
    (Party.SERVER, Party.SITE): {
        **_BYE,
        **_REGISTER,
        "task/heart_beat": 64 * KB,
        f"{RESULT_CHANNEL}/{RESULT_TOPIC}": 64 * KB,
        "task/report_job_failure": 64 * KB,
    },
    (Party.SERVER, Party.SITE_JOB): _BYE,
    (Party.SERVER, Party.SERVER_JOB): {
        **_BYE,
        "server_parent_listener/get_clients": 64 * KB,
        "server_parent_listener/heartbeat": 64 * KB,
        "server_parent_listener/update_run_status": 64 * KB,
    },
    (Party.SERVER, Party.COORDINATOR): {
        **_BYE,
        **_REGISTER,
        "hci_channel/command": 1 * MB,
        # A job is submitted as a file in chunks of 1 MiB.
        "aux_communication/ObjectStreamer.Request": 2 * MB,
        "aux_communication/ObjectStreamer.Abort": 64 * KB,
    },
    (Party.SERVER_JOB, Party.SERVER): {
        **_BYE,
        "server_command/abort": 64 * KB,
        "server_command/handle_dead_job": 64 * KB,
    },
    (Party.SERVER_JOB, Party.SITE_JOB): {
        "server_command/get_task": 64 * KB,
        "aux_communication/__sync_runner__": 64 * KB,
        "aux_communication/__job_heartbeat__": 64 * KB,
    },
    # Of the orders on this channel, a site follows only those in SITE_ORDERS.
    (Party.SITE, Party.SERVER): {**_BYE, "admin/admin": 1 * MB},
    (Party.SITE, Party.SITE_JOB): {**_BYE, "admin/train.notify_job_status": 64 * KB},
    (Party.SITE_JOB, Party.SITE): {**_BYE, "client_command/abort": 64 * KB},
    (Party.SITE_JOB, Party.SERVER): _BYE,
    (Party.SITE_JOB, Party.SERVER_JOB): {
        "aux_communication/fedprllm": UPDATE,
        "aux_communication/__end_run__": 64 * KB,
    },
    (Party.COORDINATOR, Party.SERVER): {**_BYE, "hci_channel/SESSION_EXPIRED": 64 * KB},
}

# Replies that may be longer than the 1 MiB allowed for all others.
_LONG_ANSWERS = {
    "aux_communication/fedprllm": UPDATE,
    f"{RESULT_CHANNEL}/{RESULT_TOPIC}": UPDATE,
    "hci_channel/command": 16 * MB,
}
_ANSWER_BYTES = 1 * MB

# The server's orders that a site follows: confirm capacity for a run (it always does), receive the run, start
# it, stop it, and learn how it ended.
SITE_ORDERS = frozenset(
    {
        "scheduler.check_resource",
        "scheduler.cancel_resource",
        "train.deploy",
        "train.start_job",
        "train.abort",
        "train.notify_job_status",
    }
)


def check_version(installed: str | None = None) -> None:
    """Refuse a version of FLARE that the guard was not tested with.

    Args:
        installed: Version of FLARE; the installed one by default.

    Raises:
        RunError: The version is not one of `TESTED_VERSIONS`.
    """
    found = installed or version("nvflare")
    if found not in TESTED_VERSIONS:
        tested = ", ".join(TESTED_VERSIONS)
        raise RunError(
            f"NVIDIA FLARE {found} is installed, but fedprllm was tested only with {tested}: another version "
            "may open new ways into this machine. Nothing was started. "
            f"Install the tested version: pip install 'nvflare=={TESTED_VERSIONS[-1]}'"
        )


def is_job_id(value: object) -> bool:
    """Whether a job id is a UUID; it becomes a folder name and a command-line argument."""
    return isinstance(value, str) and _UUID.fullmatch(value) is not None


def root(address: str) -> str:
    """The machine part of an address: ``north`` for ``north.JOB``."""
    return address.partition(".")[0]


def party(address: str) -> Party | None:
    """The type of process at an address; None if a federation uses no such address."""
    machine, dot, job = address.partition(".")
    if dot and not is_job_id(job):
        return None
    if machine == "server":
        return Party.SERVER_JOB if dot else Party.SERVER
    if machine.startswith(_ADMIN_PREFIX):
        return Party.COORDINATOR if is_job_id(machine.removeprefix(_ADMIN_PREFIX)) and not dot else None
    if _NAME.fullmatch(machine):
        return Party.SITE_JOB if dot else Party.SITE
    return None


def _related(one: str, other: str) -> bool:
    """Whether two addresses belong together: not two sites, and not the processes of two jobs."""
    kinds = {party(one), party(other)}
    if kinds <= {Party.SITE, Party.SITE_JOB} and root(one) != root(other):
        return False
    jobs = {address.partition(".")[2] for address in (one, other)} - {""}
    return len(jobs) < 2


def may_talk(receiver: str, sender: str) -> bool:
    """Whether either process accepts any message from the other."""
    kinds = party(receiver), party(sender)
    if None in kinds or not _related(receiver, sender):
        return False
    return kinds in ALLOWED or kinds[::-1] in ALLOWED


def opens(receiver: str, channel: str, topic: str) -> bool:
    """Whether ``receiver`` accepts this channel and topic (``*``: any topic) from any sender."""
    kind = party(receiver)
    known = {what for (whose, _), allowed in ALLOWED.items() if whose is kind for what in allowed}
    if topic == "*":
        return any(what.startswith(f"{channel}/") for what in known)
    return f"{channel}/{topic}" in known


def limit(receiver: str, sender: str, what: str, *, answer: bool = False) -> int | None:
    """The largest message, in bytes, that ``receiver`` accepts from ``sender``; None if it accepts none.

    Args:
        receiver: Address of the receiving process.
        sender: Address of the sending process.
        what: ``channel/topic`` of a request or, for a reply, of the request it answers.
        answer: Whether the message is a reply to a request from the receiver.

    Returns:
        The limit in bytes, or `UPDATE` for the agreed limit.
    """
    if not may_talk(receiver, sender):
        return None
    asked, asking = (sender, receiver) if answer else (receiver, sender)
    allowed = ALLOWED.get((party(asked), party(asking)), {})  # type: ignore[arg-type]  # both are known here
    if what not in allowed:
        return None
    return _LONG_ANSWERS.get(what, _ANSWER_BYTES) if answer else allowed[what]
