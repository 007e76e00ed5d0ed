"""The participant's adapter to FLARE: transports messages and passes them to `federation.site.site`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.apis.utils.fl_context_utils import add_job_audit_event

from fedprllm.errors import DiskFull, RunError, UpdateError
from fedprllm.federation.flare.configuration import kit_of
from fedprllm.federation.flare.controller import MESSAGE, TOPIC
from fedprllm.federation.flare.request_log import REQUESTS, RequestLog
from fedprllm.federation.protocol.messages import pack, read_request
from fedprllm.federation.site.site import NO_SPACE, Site, settings_path, work_folder

__all__ = ["ParticipantExecutor"]


class ParticipantExecutor(Executor):  # type: ignore[misc]
    """The executor that FLARE runs in a participant's job process; it accepts no arguments from a job."""

    def __init__(self) -> None:
        super().__init__()
        self._site: Site | None = None
        self._requests: RequestLog | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Accept messages from the start of the job to its end."""
        if event_type == EventType.START_RUN:
            kit = kit_of(Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_ROOT)))
            self._requests = RequestLog(work_folder(kit) / REQUESTS)
            self._site = Site(
                fl_ctx.get_identity_name(),
                settings_path(kit),
                work_folder(kit),
                sent=lambda what: add_job_audit_event(fl_ctx, msg=f"fedprllm sent {what}"),
            )
            fl_ctx.get_engine().register_aux_message_handler(TOPIC, self._answer)
        elif event_type in (EventType.ABORT_TASK, EventType.END_RUN) and self._site is not None:
            self._site.close()

    def _answer(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:  # noqa: ARG002
        message = request.get(MESSAGE)
        if self._site is None or self._requests is None or not isinstance(message, bytes):
            return make_reply(ReturnCode.BAD_REQUEST_DATA)
        try:
            self._requests.note("server", **_described(message))
        except DiskFull as error:
            print(error, file=sys.stderr)
            reply = make_reply(ReturnCode.OK)
            reply[MESSAGE] = pack(NO_SPACE)
            return reply
        except RunError as error:
            print(error, file=sys.stderr)
            return make_reply(ReturnCode.HANDLER_EXCEPTION)
        reply = make_reply(ReturnCode.OK)
        reply[MESSAGE] = self._site.answer(message)
        return reply

    def execute(
        self,
        task_name: str,  # noqa: ARG002
        shareable: Shareable,  # noqa: ARG002
        fl_ctx: FLContext,  # noqa: ARG002
        abort_signal: Signal,  # noqa: ARG002
    ) -> Shareable:
        """Refuse the task: runs use messages, not FLARE tasks."""
        return make_reply(ReturnCode.TASK_UNKNOWN)


def _described(message: bytes) -> dict[str, Any]:
    """Describe a request for the participant's log."""
    try:
        request, payload = read_request(message)
    except UpdateError:
        return {"what": "an unreadable message"}
    described: dict[str, Any] = {"what": request.op, "run": request.run}
    if request.op in ("fetch", "refused", "decision"):
        described["block"] = request.block
    if request.op == "left out":
        described["why"] = request.reason
    if request.op == "start":
        described["model"] = request.model[:200]
    if len(payload):
        described["bytes"] = len(payload)
    return described
