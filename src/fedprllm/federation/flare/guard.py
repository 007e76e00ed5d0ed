"""A guard that checks every `nvflare` message before FLARE processes it.

FLARE trusts the origin address in a message, relays between sites, and decodes and answers anything that has
a handler. The guard refuses a message unless

* it arrived over the connection that belongs to its origin,
* its origin may send this kind of message to its destination (`policy`),
* a reply answers a request that this process sent to that origin,
* its size, and the total its sender has in flight on the topic, are within the topic's limit.

A stream is checked at its first chunk and counted chunk by chunk, so that a stream over the limit is refused
before the rest of it is received.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey as Header
from nvflare.fuel.f3.cellnet.defs import MessageType, ReturnCode, ReturnReason
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.byte_receiver import RxTask
from nvflare.fuel.f3.streaming.stream_const import (
    STREAM_ACK_TOPIC,
    STREAM_CHANNEL,
    STREAM_DATA_TOPIC,
    STREAM_ERROR_TOPIC,
    StreamDataType,
    StreamHeaderKey,
)
from nvflare.fuel.f3.streaming.stream_types import StreamError

from fedprllm.federation.flare.policy import (
    MAX_OPEN_STREAMS,
    UPDATE,
    Party,
    limit,
    may_talk,
    party,
    root,
)
from fedprllm.federation.flare.request_log import Notes, Refused

__all__ = ["Guard", "Refusal"]

_ANSWERS = "return_only"
_SIGNAL_BYTES = 16 * 1024

log = logging.getLogger(__name__)


class Refusal(Exception):  # noqa: N818  the reason sent to the sender, not a defect
    """The reason a message is refused."""


class _Impostor(Refusal):
    """A message with a forged origin; the participant it names is not notified."""


@dataclass
class _Stream:
    what: str
    request: str | None
    declared: int = 0
    received: int = 0

    @property
    def n_bytes(self) -> int:
        return max(self.declared, self.received)


@dataclass
class _Streams:
    """Streams in flight to this process and the memory they may take."""

    awaited: Callable[[str, str], bool]
    _open: dict[tuple[str, int], _Stream] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def admit(self, origin: str, number: int, piece: _Stream, most: int) -> None:
        """Count one chunk of a stream.

        Args:
            origin: Address of the sender.
            number: The sender's number for the stream.
            piece: Topic and size of the chunk.
            most: Limit for the topic, in bytes.

        Raises:
            Refusal: The stream, or the sender's streams on this topic in total, exceed the limit.
        """
        with self._lock:
            known = self._open.get((origin, number))
            if known is None:
                self._forget_unawaited()
                self._check_count(origin)
                known = _Stream(piece.what, piece.request)
            if known.what != piece.what:
                raise Refusal("the topic of a stream cannot change")
            n_bytes = max(known.declared, piece.declared, known.received + piece.received)
            if n_bytes > most:
                raise Refusal(f"a message of {n_bytes} bytes exceeds configured limit {most}")
            others = sum(
                other.n_bytes
                for (sender, _), other in self._open.items()
                if other is not known and other.what == piece.what and root(sender) == root(origin)
            )
            if others + n_bytes > most:
                raise Refusal(f"{others + n_bytes} bytes in flight at once exceed configured limit {most}")
            known.declared = max(known.declared, piece.declared)
            known.received += piece.received
            self._open[origin, number] = known

    def release(self, origin: object, number: object) -> None:
        """Stop counting a stream that has ended and whose message has been handled."""
        with self._lock:
            self._open.pop((origin, number), None)  # type: ignore[arg-type]  # never added if unhashable

    def _forget_unawaited(self) -> None:
        """Stop counting replies that this process no longer waits for."""
        for key, stream in list(self._open.items()):
            if stream.request is not None and not self.awaited(stream.request, key[0]):
                del self._open[key]

    def _check_count(self, origin: str) -> None:
        n_open = sum(root(sender) == root(origin) for sender, _ in self._open)
        if n_open >= MAX_OPEN_STREAMS:
            raise Refusal(f"more than {MAX_OPEN_STREAMS} streams open at once")


class Guard:
    """Checks the messages that arrive at one process.

    Args:
        cell: FLARE's endpoint of this process (a `CoreCell`).
        max_update_bytes: Agreed maximum size of an update or a decision, in bytes.
        coordinator: Common name in the coordinator's certificate.
        notes: Log of refused messages and of the server turning this participant away.
    """

    def __init__(self, cell: Any, max_update_bytes: int, coordinator: str, notes: Notes) -> None:
        self._cell = cell
        self._here = str(cell.my_info.fqcn)
        self._max_update_bytes = max_update_bytes
        self._coordinator = coordinator
        self._notes = notes
        self.streams = _Streams(self._is_awaited)
        # The streaming endpoint, which FLARE creates around the cell later.
        self.stream_cell: Any = None
        # Called at a participant whenever the server turns it away.
        self.when_turned_away: Callable[[], None] = lambda: None

    def admits(self, endpoint: Any, peer: str | None, message: Message) -> bool:
        """Check a message. A refusal is logged, and sent to the sender where that is safe.

        Args:
            endpoint: FLARE's endpoint at the other end of the connection.
            peer: Common name in the peer's certificate, if FLARE knows it.
            message: The message as received, not decoded.

        Returns:
            Whether the message is accepted.
        """
        try:
            self._judge(str(endpoint.name), peer, message)
        except Refusal as refusal:
            self._refuse(endpoint, message, str(refusal), tell=not isinstance(refusal, _Impostor))
            return False
        except Exception as error:  # noqa: BLE001  a malformed message can raise anything
            self._refuse(endpoint, message, f"malformed ({type(error).__name__})", tell=False)
            return False
        return True

    def turn_away(self, endpoint: Any, message: Message, reason: str) -> None:
        """Refuse a message because of its sender, and send the reason back."""
        self._refuse(endpoint, message, reason, tell=True, code=ReturnCode.UNAUTHENTICATED)

    # Checking ----------------------------------------------------------------------------------

    def _judge(self, endpoint: str, peer: str | None, message: Message) -> None:
        headers = message.headers
        origin, destination = headers[Header.ORIGIN], headers[Header.DESTINATION]
        self._check_way(endpoint, peer, origin)
        if not may_talk(destination, origin):
            raise Refusal(f"{_short(origin)} may not send messages to {_short(destination)}")
        if headers.get(Header.SECURE) or headers.get(Header.ENCRYPTED):
            raise Refusal("expected no encryption inside TLS")
        n_bytes = len(message.payload) if message.payload else 0
        if headers[Header.MSG_TYPE] == MessageType.REQ:
            self._judge_request(origin, destination, headers, n_bytes)
        elif headers[Header.MSG_TYPE] in (MessageType.REPLY, MessageType.RETURN):
            self._judge_reply(origin, destination, headers)
        else:
            raise Refusal("expected a request or a reply")

    def _check_way(self, endpoint: str, peer: str | None, origin: str) -> None:
        """Check that a message arrived over the connection that belongs to its origin.

        Raises:
            Refusal: The connection belongs to another origin.
        """
        here, there, claimed = root(self._here), root(endpoint), root(origin)
        kind = party(self._here)
        if kind is Party.SERVER:
            fits = there == claimed and self._is_certified(endpoint, peer)
        elif kind is Party.SERVER_JOB:
            fits = endpoint == "server"
        else:
            fits = claimed == there if there == "server" else there == here and claimed in (here, "server")
        if not fits:
            raise _Impostor(f"{_short(endpoint)} cannot speak for {_short(origin)}")

    def _is_certified(self, endpoint: str, peer: str | None) -> bool:
        """Whether the certificate matches the address; FLARE accepts a coordinator's address from any."""
        if party(endpoint) is Party.COORDINATOR:
            return peer == self._coordinator
        return root(endpoint) == "server" or peer == root(endpoint)

    def _judge_request(self, origin: str, destination: str, headers: dict[str, Any], n_bytes: int) -> None:
        channel, topic = headers[Header.CHANNEL], headers[Header.TOPIC]
        if channel != STREAM_CHANNEL:
            most = self._limit(destination, origin, f"{channel}/{topic}")
            if n_bytes > most:
                raise Refusal(f"a message of {n_bytes} bytes exceeds configured limit {most}")
        elif topic == STREAM_DATA_TOPIC:
            self._judge_piece(origin, destination, headers, n_bytes)
        elif topic not in (STREAM_ACK_TOPIC, STREAM_ERROR_TOPIC) or n_bytes > _SIGNAL_BYTES:
            raise Refusal("unknown stream topic")

    def _judge_piece(self, origin: str, destination: str, headers: dict[str, Any], n_bytes: int) -> None:
        channel, topic = headers[StreamHeaderKey.CHANNEL], headers[StreamHeaderKey.TOPIC]
        answer = channel == _ANSWERS
        what = topic.replace(":", "/", 1) if answer else f"{channel}/{topic}"
        most = self._limit(destination, origin, what, answer=answer)
        if destination != self._here:
            return
        request = headers.get(StreamHeaderKey.STREAM_REQ_ID) if answer else None
        if answer and not self._is_awaited(request, origin):
            raise Refusal("an unsolicited reply")
        declared = headers.get(StreamHeaderKey.SIZE) or 0
        number = headers[StreamHeaderKey.STREAM_ID]
        if not (isinstance(declared, int) and isinstance(number, int) and declared >= 0):
            raise Refusal("the size and number of a stream must be non-negative integers")
        piece = _Stream(("answer " if answer else "") + what, request, declared, n_bytes)
        self.streams.admit(origin, number, piece, most)

    def _judge_reply(self, origin: str, destination: str, headers: dict[str, Any]) -> None:
        if destination != self._here:
            return
        requests = headers[Header.REQ_ID]
        for request in [requests] if isinstance(requests, str) else requests:
            waiter = self._cell.waiters.get(request)
            if waiter is None:
                raise Refusal("an unsolicited reply")
            # An undeliverable message is returned by the process that failed to deliver it.
            if headers[Header.MSG_TYPE] == MessageType.REPLY and origin not in waiter.targets:
                raise Refusal("a reply from a process that was not asked")
        if headers.get(Header.RETURN_CODE) == ReturnCode.UNAUTHENTICATED and party(self._here) is Party.SITE:
            self._notes.note_turned_away("server", _short(headers.get(Header.ERROR), 200))
            self.when_turned_away()

    def _is_awaited(self, request: str | None, origin: str) -> bool:
        waiter = self.stream_cell.requests_dict.get(request) if self.stream_cell is not None else None
        return waiter is not None and waiter.target == origin

    def _limit(self, receiver: str, sender: str, what: str, *, answer: bool = False) -> int:
        most = limit(receiver, sender, what, answer=answer)
        if most is None:
            raise Refusal("not on the list of messages that a run needs")
        return self._max_update_bytes if most == UPDATE else most

    # Refusing ----------------------------------------------------------------------------------

    def _refuse(
        self,
        endpoint: Any,
        message: Message,
        reason: str,
        *,
        tell: bool,
        code: str = ReturnCode.INVALID_REQUEST,
    ) -> None:
        headers = message.headers if isinstance(message.headers, dict) else {}
        refused = Refused(_short(endpoint.name), _subject(headers), reason)
        log.warning("refused %s from %s: %s", refused.what, refused.sender, reason)
        self._notes.note_refused(refused)
        if not tell or headers.get(Header.MSG_TYPE) != MessageType.REQ:
            return
        try:
            self._tell(endpoint, headers, reason, code)
        except Exception as error:  # noqa: BLE001  the refusal stands even if the sender cannot be told
            log.warning("could not tell %s: %s", refused.sender, type(error).__name__)

    def _tell(self, endpoint: Any, headers: dict[str, Any], reason: str, code: str) -> None:
        """Tell a sender not to wait for a reply."""
        if headers.get(Header.CHANNEL) == STREAM_CHANNEL:
            self._end_stream(headers, f"refused: {reason}")
        elif headers.get(Header.REPLY_EXPECTED):
            self._cell._send_reply(self._refusal_reply(endpoint, headers, reason, code), endpoint)

    def _end_stream(self, headers: dict[str, Any], reason: str) -> None:
        task = RxTask.rx_task_map.get((headers[Header.ORIGIN], headers[StreamHeaderKey.STREAM_ID]))
        if task is not None:
            task.stop(StreamError(reason))
        elif headers.get(StreamHeaderKey.SEQUENCE) == 0:
            kept = (StreamHeaderKey.STREAM_ID, StreamHeaderKey.CHANNEL, StreamHeaderKey.TOPIC)
            told = {key: headers[key] for key in (*kept, StreamHeaderKey.STREAM_REQ_ID) if key in headers}
            told |= {
                StreamHeaderKey.DATA_TYPE: StreamDataType.ERROR,
                StreamHeaderKey.ERROR_MSG: reason,
                StreamHeaderKey.FAILED_DESTINATION: headers[Header.DESTINATION],
            }
            target = headers[Header.ORIGIN]
            self._cell.fire_and_forget(
                STREAM_CHANNEL, STREAM_ERROR_TOPIC, target, Message(told), optional=True
            )

    def _refusal_reply(self, endpoint: Any, headers: dict[str, Any], reason: str, code: str) -> Message:
        """The reply to a refused request; FLARE expects a message for another process to be returned."""
        reply = make_reply(code, error=f"refused: {reason}")
        forwarding = headers[Header.DESTINATION] != self._here
        reply.add_headers(
            {
                Header.CHANNEL: headers[Header.CHANNEL],
                Header.TOPIC: headers[Header.TOPIC],
                Header.FROM_CELL: self._here,
                Header.TO_CELL: endpoint.name,
                Header.ORIGIN: self._here,
                Header.DESTINATION: headers[Header.ORIGIN],
                Header.REQ_ID: [headers.get(Header.REQ_ID, "")],
                Header.MSG_TYPE: MessageType.RETURN if forwarding else MessageType.REPLY,
                Header.ROUTE: [(self._here, time.time())],
            }
        )
        if forwarding:
            reply.set_header(Header.ORIGINAL_HEADERS, {Header.DESTINATION: headers[Header.DESTINATION]})
            reply.set_header(Header.RETURN_REASON, ReturnReason.CANT_FORWARD)
        return reply


def _subject(headers: dict[str, Any]) -> str:
    """Channel and topic of a message, shortened for the log."""
    if headers.get(Header.CHANNEL) == STREAM_CHANNEL and headers.get(Header.TOPIC) == STREAM_DATA_TOPIC:
        parts = headers.get(StreamHeaderKey.CHANNEL), headers.get(StreamHeaderKey.TOPIC)
    else:
        parts = headers.get(Header.CHANNEL), headers.get(Header.TOPIC)
    return "/".join(_short(part) for part in parts)


def _short(value: object, longest: int = 64) -> str:
    """Text from a sender, reduced to a little printable ASCII for our log."""
    text = "".join(letter for letter in str(value)[:longest] if letter.isascii() and letter.isprintable())
    return text or "?"
