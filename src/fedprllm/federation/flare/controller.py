"""The coordinator's adapter to FLARE: transports messages and passes them to the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedprllm.federation.flare.kits import FEDERATION_FILE
from fedprllm.federation.keys.revoked import RevokedFile
from fedprllm.federation.plan import Plan, RunPlan
from fedprllm.files import read_json

__all__ = ["MESSAGE", "TOPIC", "CoordinatorController"]

TOPIC = "fedprllm"
MESSAGE = "message"
RUNS = "runs"

log = logging.getLogger(__name__)


class _FlareChannel:
    """Sends requests from the server's job process to those of the sites."""

    def __init__(self, engine: Any, fl_ctx: FLContext) -> None:
        self._engine, self._fl_ctx = engine, fl_ctx

    def present(self) -> set[str]:
        return {client.name for client in self._engine.get_clients()}

    def ask(self, names: Sequence[str], message: bytes, timeout_s: float) -> dict[str, bytes]:
        present = self.present()
        targets = [name for name in names if name in present]
        if not targets:
            return {}
        request = Shareable()
        request[MESSAGE] = message
        replies = self._engine.send_aux_request(
            targets=targets,
            topic=TOPIC,
            request=request,
            timeout=timeout_s,
            fl_ctx=self._fl_ctx,
            optional=True,
        )
        answers = {}
        for name, reply in replies.items():
            content = reply.get(MESSAGE) if isinstance(reply, Shareable) else None
            if reply.get_return_code() == ReturnCode.OK and isinstance(content, bytes):
                answers[name] = content
        return answers


class CoordinatorController(Controller):  # type: ignore[misc]
    """The controller that FLARE runs in the server's job process.

    Args:
        plan: The fields of a `RunPlan`, from JSON.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__()
        self._plan = plan

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing: the run folder records where to continue."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing: the run folder holds all state."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Conduct the run until it is complete or cannot continue."""
        from fedprllm.federation.coordinator.job import conduct_run

        kit = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_ROOT))
        federation = Plan(**read_json(kit / "local" / FEDERATION_FILE))
        outcome = conduct_run(
            RunPlan(**self._plan),
            federation.participants,
            kit / RUNS,
            fl_ctx.get_job_id(),
            _FlareChannel(fl_ctx.get_engine(), fl_ctx),
            stopped=lambda: abort_signal.triggered,
            max_message_mb=federation.max_message_mb,
            revoked=RevokedFile(kit).names,
        )
        log.info("the job ended: %s", outcome)

    def process_result_of_unknown_task(
        self,
        client: Client,
        task_name: str,
        client_task_id: str,  # noqa: ARG002
        result: Shareable,  # noqa: ARG002
        fl_ctx: FLContext,  # noqa: ARG002
    ) -> None:
        """Ignore the result: runs use no FLARE tasks."""
        log.warning("ignored a result of task %s from %s", task_name, client.name)
