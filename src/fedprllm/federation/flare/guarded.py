"""``python -m fedprllm.federation.flare.guarded MODULE ARGUMENTS``: run a FLARE process behind the guard.

The server, the sites and their job processes are all started through this module. `install` lists the changes
made to FLARE; docs/decisions/flare-guard.md gives the reason for each.
"""

from __future__ import annotations

import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedprllm.errors import FedprllmError
from fedprllm.federation.flare import orders
from fedprllm.federation.flare.configuration import (
    DEFAULT_MESSAGE_MB,
    HARDENING,
    kit_of,
    max_message_mb,
    site_configuration,
)
from fedprllm.federation.flare.policy import (
    ADMIN,
    GUARDED,
    MAX_FRAME_BYTES,
    MB,
    SITE_ORDERS,
    check_version,
    opens,
)
from fedprllm.federation.flare.request_log import REQUESTS, Notes, Refused, RequestLog, Unwritten
from fedprllm.federation.flare.turned_away import TurnedAway, close_soon
from fedprllm.federation.keys.revoked import RevokedFile
from fedprllm.federation.site.site import work_folder
from fedprllm.files import read_json
from fedprllm.lean import start_lean

__all__ = ["install", "main", "recall"]

# Received frames that wait for a thread. Connections block while more than this is waiting.
_MAX_WAITING_BYTES = 16 * MB

_installed = False


def install(
    communication: dict[str, Any],
    requests: RequestLog | None,
    turned_away: TurnedAway | None = None,
    made: Callable[[Any], object] = lambda cell: None,  # noqa: ARG005
) -> None:
    """Patch FLARE in this process; call it before a cell is created. Further calls do nothing.

    Args:
        communication: Content of FLARE's ``comm_config.json``.
        requests: Log of refusals and of the server's orders; None in the coordinator's process.
        turned_away: The server's check for revoked participants; None in all other processes.
        made: Callback that receives every endpoint (a `Cell`) of this process.

    Raises:
        RunError: The guard was not tested with this version of FLARE.
    """
    global _installed
    check_version()
    if _installed:
        return
    _installed = True
    _fix_communication(communication)
    _limit_frames()
    _guard_cells(int(communication["streaming_max_blob_size"]), requests or Unwritten(), turned_away, made)
    _close_handlers()
    _refuse_super()
    _guard_job_processes()
    if requests is not None:
        _limit_orders(requests)
        _end_jobs_when_turned_away()


def _fix_communication(communication: dict[str, Any]) -> None:
    """Set the configuration: FLARE would search its whole workspace for it, including a job's files."""
    from nvflare.fuel.f3.comm_config import CommConfigurator

    CommConfigurator._configuration = communication
    CommConfigurator._config_loaded = True


def _limit_frames() -> None:
    """Make every driver refuse a frame by its announced length, before allocating memory for it."""
    from nvflare.fuel.f3.drivers import aio_conn, aio_grpc_driver, aio_http_driver, grpc_driver, socket_conn
    from nvflare.fuel.f3.sfm.conn_manager import ConnManager

    for driver in (aio_conn, aio_http_driver, socket_conn):
        driver.MAX_FRAME_SIZE = MAX_FRAME_BYTES
    for driver in (aio_grpc_driver, grpc_driver):
        driver.GRPC_DEFAULT_OPTIONS = [
            ("grpc.max_send_message_length", MAX_FRAME_BYTES),
            ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
        ]
    waiting = _Waiting(_MAX_WAITING_BYTES)
    process_frame, process_frame_task = ConnManager.process_frame, ConnManager.process_frame_task

    def queue(self: Any, connection: Any, frame: Any) -> None:
        waiting.enter(len(frame))
        process_frame(self, connection, frame)

    def begin(self: Any, connection: Any, frame: Any) -> None:
        waiting.leave(len(frame))
        process_frame_task(self, connection, frame)

    ConnManager.process_frame, ConnManager.process_frame_task = queue, begin


class _Waiting:
    """Limits the number of waiting bytes. A connection that brings more blocks, for at most a minute."""

    def __init__(self, most: int) -> None:
        self._most, self._n_bytes = most, 0
        self._changed = threading.Condition()

    def enter(self, n_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._n_bytes + n_bytes <= self._most, timeout=60.0)
            self._n_bytes += n_bytes

    def leave(self, n_bytes: int) -> None:
        with self._changed:
            self._n_bytes -= n_bytes
            self._changed.notify_all()


def _guard_cells(
    max_update_bytes: int,
    notes: Notes,
    turned_away: TurnedAway | None,
    made: Callable[[Any], object],
) -> None:
    from nvflare.fuel.f3.cellnet.cell import Adapter, Cell
    from nvflare.fuel.f3.cellnet.core_cell import CoreCell
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
    from nvflare.fuel.f3.drivers.driver_params import DriverParams
    from nvflare.fuel.f3.sfm.conn_manager import NullConnection
    from nvflare.fuel.f3.streaming.byte_receiver import RxTask

    from fedprllm.federation.flare.guard import Guard

    make_core, make_cell = CoreCell.__init__, Cell.__init__
    process, call, stop = CoreCell.process_message, Adapter.call, RxTask.stop

    def core(self: Any, *arguments: Any, **options: Any) -> None:
        self.fedprllm_guard = None  # a message that arrives before the guard exists fails
        make_core(self, *arguments, **options)
        self.fedprllm_guard = Guard(self, max_update_bytes, ADMIN, notes)

    def cell(self: Any, *arguments: Any, **options: Any) -> None:
        make_cell(self, *arguments, **options)
        self.core_cell.fedprllm_guard.stream_cell = self
        made(self)

    def receive(self: Any, endpoint: Any, connection: Any, app_id: int, message: Any) -> None:
        if not isinstance(connection, NullConnection):  # a process's messages to itself have none
            peer = connection.get_conn_properties().get(DriverParams.PEER_CN.value)
            reason = turned_away.reason(str(endpoint.name), connection) if turned_away is not None else None
            if reason is not None:
                self.fedprllm_guard.turn_away(endpoint, message, reason)
                close_soon(connection)
                return
            recall(self, endpoint, connection)
            if not self.fedprllm_guard.admits(endpoint, peer, message):
                return
        process(self, endpoint, connection, app_id, message)

    def answer(self: Any, future: Any, *arguments: Any, **options: Any) -> None:
        try:
            call(self, future, *arguments, **options)
        finally:
            origin = future.headers.get(MessageHeaderKey.ORIGIN)
            self.cell.core_cell.fedprllm_guard.streams.release(origin, future.get_stream_id())

    def end(self: Any, error: Any = None, notify: bool = True) -> None:
        stop(self, error, notify)
        if error is not None:
            self.cell.fedprllm_guard.streams.release(self.origin, self.sid)

    CoreCell.__init__, Cell.__init__ = core, cell
    CoreCell.process_message, Adapter.call, RxTask.stop = receive, answer, end


def recall(core_cell: Any, endpoint: Any, connection: Any) -> None:
    """Make an endpoint reachable again that FLARE lost although it is connected.

    If a connection is replaced by a new one of the same endpoint, FLARE may note the end of the old one last,
    and then sends nothing over the new one: a participant that reconnected would stay silent for good. A
    message that arrives over a connection shows that it exists.

    Args:
        core_cell: FLARE's endpoint of this process (a `CoreCell`).
        endpoint: The endpoint that a message came from.
        connection: The connection over which it came.
    """
    if endpoint.name in core_cell.agents:
        return  # as nearly always
    from nvflare.fuel.f3.endpoint import EndpointState

    manager = core_cell.communicator.conn_manager
    with manager.lock:
        known = manager.sfm_endpoints.get(endpoint.name)
        if known is not None and any(one.conn is connection for one in known.connections):
            known.endpoint.state = EndpointState.READY
            core_cell.state_change(known.endpoint)


def _close_handlers() -> None:
    """Skip the registration of handlers that no message may reach, so that the open ones can be listed."""
    from nvflare.fuel.f3.cellnet.core_cell import CoreCell
    from nvflare.fuel.f3.cellnet.defs import CellChannel
    from nvflare.fuel.f3.streaming.byte_receiver import ByteReceiver
    from nvflare.fuel.f3.streaming.stream_const import STREAM_CHANNEL

    register, register_stream = CoreCell.register_request_cb, ByteReceiver.register_callback

    def open_topic(self: Any, channel: str, topic: str, cb: Any, *arguments: Any, **options: Any) -> None:
        if channel == STREAM_CHANNEL or opens(self.my_info.fqcn, channel, topic):
            register(self, channel, topic, cb, *arguments, **options)

    def open_stream(self: Any, channel: str, topic: str, cb: Any, *arguments: Any, **options: Any) -> None:
        if channel == CellChannel.RETURN_ONLY or opens(self.cell.my_info.fqcn, channel, topic):
            register_stream(self, channel, topic, cb, *arguments, **options)

    CoreCell.register_request_cb, ByteReceiver.register_callback = open_topic, open_stream


def _refuse_super() -> None:
    """Deny the role 'super', to which FLARE grants every right "for testing"."""
    from nvflare.fuel.sec.authz import Authorizer

    authorize = Authorizer.authorize

    def refuse(self: Any, context: Any) -> tuple[bool, str]:
        roles = (
            [str(identity.role).strip().lower() for identity in (context.user, context.submitter)]
            if context
            else []
        )
        if "super" in roles:
            return False, "role 'super' has no rights in a fedprllm federation"
        return authorize(self, context)  # type: ignore[no-any-return]

    Authorizer.authorize = refuse


def _guard_job_processes() -> None:
    """Run the job processes that this process starts behind the guard too."""
    from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
    from nvflare.app_common.job_launcher.server_process_launcher import ServerProcessJobLauncher

    for launcher in (ClientProcessJobLauncher, ServerProcessJobLauncher):
        launcher.get_command = _guarded_command(launcher.get_command)


def _guarded_command(get_command: Callable[..., str]) -> Callable[..., str]:
    def guarded(self: Any, job_meta: Any, fl_ctx: Any) -> str:
        interpreter, found, rest = get_command(self, job_meta, fl_ctx).partition(" -m nvflare.")
        if not found:
            raise RuntimeError("the guard does not recognize the command by which FLARE starts a job")
        return f"{interpreter} -u -m {GUARDED} nvflare.{rest}"

    return guarded


def _limit_orders(requests: RequestLog) -> None:
    """Restrict a site to the orders of a run, each of which is logged before it is followed."""
    from nvflare.private.admin_defs import error_reply
    from nvflare.private.defs import RequestHeader, new_cell_message
    from nvflare.private.fed.client.admin import FedAdminAgent

    register, dispatch = FedAdminAgent.register_processor, FedAdminAgent._dispatch_request

    def keep(self: Any, processor: Any) -> None:
        if set(processor.get_topics()) <= SITE_ORDERS:
            register(self, processor)

    def obey(self: Any, request: Any) -> Any:
        order = request.payload
        job = order.get_header(RequestHeader.JOB_ID)
        reason = orders.refusal(order.topic, job, order.body)
        if reason is not None:
            requests.note_refused(Refused("server", str(order.topic)[:64], reason))
            self.cell.logger.error(f"refused order {str(order.topic)[:64]!a}: {reason}")
            return new_cell_message({}, error_reply(reason))
        requests.note("server", order.topic, job=job)
        return dispatch(self, request)

    FedAdminAgent.register_processor, FedAdminAgent._dispatch_request = keep, obey


def _end_jobs_when_turned_away() -> None:
    """End a participant's jobs when the server turns it away.

    The server ends the jobs of a run by messages, which no longer reach a participant that it has revoked.
    Its job process would wait for them, with all that it holds in memory.
    """
    from nvflare.private.fed.client.communicator import Communicator

    send_heartbeat = Communicator.send_heartbeat
    lock = threading.Lock()

    def end_jobs(engine: Any) -> None:
        if not lock.acquire(blocking=False):
            return  # they are being ended
        try:
            for job in engine.get_all_job_ids():
                engine.abort_app(job, heartbeat_cleanup=True)
        finally:
            lock.release()

    def beat(
        self: Any, servers: Any, task: Any, token: Any, ssid: Any, name: Any, engine: Any, every: Any
    ) -> None:
        def turned_away() -> None:
            # Ending a job takes as long as its process needs; messages arrive meanwhile.
            threading.Thread(target=end_jobs, args=[engine], daemon=True).start()

        self.cell.core_cell.fedprllm_guard.when_turned_away = turned_away
        send_heartbeat(self, servers, task, token, ssid, name, engine, every)

    Communicator.send_heartbeat = beat


def _communication(workspace: Path, *, is_site: bool) -> dict[str, Any]:
    kit = kit_of(workspace)
    if is_site:
        return site_configuration(max_message_mb(kit))["comm_config.json"]
    path = workspace / "local" / "comm_config.json"
    own = read_json(path) if path.exists() else {}
    own.pop("grpc", None)  # its options would override the frame limit
    return {"streaming_max_blob_size": DEFAULT_MESSAGE_MB * 1_000_000, **own, **HARDENING}


def main() -> None:
    """Start the module named on the command line."""
    module, sys.argv = sys.argv[1], sys.argv[1:]
    workspace = Path(sys.argv[sys.argv.index("-m") + 1]).resolve()
    is_site = ".client." in module
    kit = kit_of(workspace)
    path = work_folder(kit) / REQUESTS if is_site else kit / "refused.jsonl"
    # All messages from participants pass through the server's main process, even those to its job process.
    is_server = ".server.server_train" in module
    from fedprllm.federation.flare.results import exchange_results

    try:
        install(
            _communication(workspace, is_site=is_site),
            RequestLog(path),
            TurnedAway(RevokedFile(kit)) if is_server else None,
            lambda cell: exchange_results(cell, kit),
        )
    except FedprllmError as error:
        sys.exit(f"error: {error}")
    start_lean()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
