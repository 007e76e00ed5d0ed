"""What a participant's terminal shows while it takes part: requests, results, questions and complaints."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from fedprllm.cli.console import errors
from fedprllm.cli.line import StatusLine
from fedprllm.errors import RunError
from fedprllm.files import free_bytes

__all__ = ["Connection", "News", "Results"]

_AGAIN_S = 600.0  # until the same complaint is printed again
_OBSTACLE_S = 10.0  # between two looks for what is in the way to the server
_QUIET_S = 5.0  # a connection takes this long to be made, and nobody needs to know
_LITTLE_BYTES = 10_000_000
_LEFT_OUT = {
    "absent": "it did not answer in time when the run began",
    "deadline": "its update did not arrive in time",
    "failed": "its computation failed",
    "invalid updates": "its updates were not valid",
    "revoked": "the coordinator revoked it",
}


class News:
    """Prints what happens, and keeps a line with the state of connection and computation.

    Args:
        kit: The participant's kit.
        line: Where the state is shown.
    """

    def __init__(self, kit: Path, line: StatusLine) -> None:
        from fedprllm.federation.flare.request_log import REQUESTS, follow
        from fedprllm.federation.site.site import work_folder

        self._line, self._home = line, work_folder(kit)
        self._requests = follow(self._home / REQUESTS)
        self._complaints = _Complaints(self._home, line)
        self._results = Results(kit)
        self._connection = Connection(kit)

    def __call__(self) -> None:
        """Print what is new, and show the state."""
        from fedprllm.federation.flare.request_log import sentence

        for line in next(self._requests):
            style = "yellow" if "refused" in line or "reason" in line else "dim"
            errors.print(f"[{style}]{line['time'][11:19]}[/] {escape(sentence(line))}", soft_wrap=True)
        self._complaints()
        self._results()
        self._show()

    def _show(self) -> None:
        from fedprllm.federation.flare.activity import current_activity

        connection, passing = self._connection.words()
        activity = current_activity(self._home)
        if activity is None:
            self._line.show(connection, passing or "; no run is going on")
            return
        sent = f"; {activity.n_sent} updates sent"
        self._line.show(f"{connection}; run {activity.run[:8]}", f"{passing}: {activity.doing}{sent}")


class Connection:
    """Says since when the server answers, or why it does not.

    Args:
        kit: The participant's kit.
    """

    def __init__(self, kit: Path) -> None:
        from fedprllm.federation.site.site import work_folder

        self._kit, self._home = kit, work_folder(kit)
        self._begin, self._looked = time.time(), 0.0
        self._why = ""

    def words(self) -> tuple[str, str]:
        """The state of the connection, and the part of it that changes every second."""
        from fedprllm.federation.flare.contact import read_contact

        contact = read_contact(self._home)
        since = max(contact.get("since", self._begin), self._begin)
        if contact.get("connected") and contact["since"] >= self._begin:
            self._why = ""
            return f"connected since {time.strftime('%H:%M:%S', time.localtime(since))}", ""
        n_seconds = time.time() - since
        if n_seconds < _QUIET_S:
            return "connecting", ""
        self._look_now_and_then()
        if not self._why:
            return "connecting", f" (for {n_seconds:.0f} s)"
        return f"not connected: {self._why}", f" (for {n_seconds:.0f} s)"

    def _look_now_and_then(self) -> None:
        if time.time() - self._looked > _OBSTACLE_S:
            self._looked = time.time()
            # A step may take seconds, during which Ctrl-C and questions must be heard.
            threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        from fedprllm.federation.keys.reach import obstacle

        try:
            found = obstacle(self._kit)
        except (RunError, OSError, ValueError) as error:
            found = str(error)
        self._why = (
            found
            or self._turned_away()
            or (
                "the server accepts the certificate and does not answer: it may be starting, or be overloaded"
            )
        )

    def _turned_away(self) -> str:
        """What the server said to this participant last, if it turned it away."""
        from fedprllm.federation.flare.request_log import REQUESTS, read_requests

        said = [line for line in read_requests(self._home / REQUESTS) if line["what"] == "turned away"]
        return str(said[-1]["reason"]) if said else ""


class Results:
    """Prints what becomes of results, each state once.

    Args:
        kit: The participant's kit.
        awaited: Name of the run whose result is waited for; its end ends the command.
    """

    def __init__(self, kit: Path, awaited: str | None = None) -> None:
        from fedprllm.federation.site.results import results_folder
        from fedprllm.federation.site.site import work_folder

        self._folder, self._awaited = results_folder(work_folder(kit)), awaited
        self._begin = time.time()
        self._shown = {path: self._state(path) for path in self._folder.glob("*/status.json")}
        if awaited is not None:
            self._shown = {}

    def _state(self, path: Path) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        return {}

    def __call__(self) -> bool:
        """Print what is new; returns whether the awaited result has come to its end."""
        ended = False
        for path in sorted(self._folder.glob("*/status.json")):
            status = self._state(path)
            if not status or (self._awaited is not None and status["run"] != self._awaited):
                continue
            if status["state"] != self._shown.get(path, {}).get("state"):
                self._print(status)
            self._shown[path] = status
            ended |= status["state"] not in ("fetching", "building") and self._is_new(path)
        return self._awaited is not None and (ended or self._is_unknown())

    def _is_new(self, path: Path) -> bool:
        """A model that is there stays; a failure may be of an earlier attempt."""
        return self._state(path)["state"] == "received" or path.stat().st_mtime >= self._begin

    def _is_unknown(self) -> bool:
        path = self._folder / "offers.json"
        if not path.exists() or path.stat().st_mtime < self._begin:
            return False
        return self._awaited not in [offer["name"] for offer in json.loads(path.read_text(encoding="utf-8"))]

    def _print(self, status: dict[str, Any]) -> None:
        name, state = escape(status["run"]), status["state"]
        if state == "received":
            zeros = f"{status['sparsity']:.1%} zeros, " if status["sparsity"] else ""
            errors.print(
                f"[green]run {name} is complete[/]: {zeros}"
                f"{escape(status['model'])}; every tensor has the coordinator's digest",
                soft_wrap=True,
            )
        elif state in ("fetching", "building"):
            errors.print(f"run {name} is complete: {state} the model", soft_wrap=True)
        elif state != "declined":
            message = escape(status["message"])
            errors.print(f"[red]run {name}[/]: no model ({escape(state)}): {message}", soft_wrap=True)

    def conclude(self) -> None:
        """Check that the awaited result is there.

        Raises:
            RunError: It is not. The message says why.
        """
        states = [status for status in self._shown.values() if status.get("run") == self._awaited]
        if any(status["state"] == "received" for status in states):
            return
        if states:
            raise RunError(f"the model of run {self._awaited} was not built ({states[-1]['state']})")
        raise RunError(
            f"the server has no result named {self._awaited} for this participant: the run has not ended, "
            "its name is different, or its plan withholds the result from participants that were left out"
        )


class _Complaints:
    """Asks the participant for consent to runs, and prints once what fails in its computations.

    Args:
        home: The participant's folder with its ledger and runs.
        line: The line that must give way to a question.
    """

    def __init__(self, home: Path, line: StatusLine) -> None:
        self._home, self._runs, self._line = home, home / "runs", line
        # What was there before is known: it was printed when it happened.
        self._shown = {key for key, _ in self._files()}
        self._said: dict[str, float] = {}

    def _files(self) -> list[tuple[tuple[str, float], Path]]:
        found = []
        for name in ("notes.json", "status.json", "left-out.json"):
            for path in sorted(self._runs.glob(f"*/{name}")):
                with contextlib.suppress(FileNotFoundError):
                    found.append(((str(path), path.stat().st_mtime), path))
        return found

    def __call__(self) -> None:
        """Ask open questions, and print what is new."""
        self._ask()
        for key, path in self._files():
            if key not in self._shown:
                self._shown.add(key)
                with contextlib.suppress(FileNotFoundError, RunError, ValueError, LookupError):
                    self._print(path)
        if self._runs.exists() and free_bytes(self._runs) < _LITTLE_BYTES:
            self._say(
                f"[red]disk full[/]: {escape(str(self._home))} has less than 10 MB left: free some space"
            )

    def _print(self, path: Path) -> None:
        from fedprllm.files import read_sealed

        content, run = read_sealed(path), path.parent.name[:8]
        if path.name == "notes.json":
            for note in content["notes"]:
                self._say(f"note     {escape(note)}")
        elif path.name == "left-out.json":
            why = _LEFT_OUT.get(content["reason"], "the coordinator does not say why")
            self._say(f"[red]run {run} goes on without this participant[/]: {why}")
        elif content.get("message"):
            self._say(f"[red]{content['code']}[/]: {escape(content['message'])}")

    def _say(self, words: str) -> None:
        """Print something, unless it was said a moment ago."""
        if time.monotonic() - self._said.get(words, -_AGAIN_S) >= _AGAIN_S:
            self._said[words] = time.monotonic()
            errors.print(words, soft_wrap=True)

    def _ask(self) -> None:
        from fedprllm.federation.site.consent import answer, open_questions

        for folder, question in open_questions(self._runs):
            table = Table(title=f"request of run {question['run'][:8]}", show_header=False, box=SIMPLE)
            for name, text in question["lines"]:
                table.add_row(name, escape(text))
            with self._line.paused():
                errors.print(table)
                answer(folder, typer.confirm("Take part in this run?", err=True))
