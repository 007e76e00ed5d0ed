"""What a run may ask of a participant, and the participant's yes before anything is computed.

The limits are the participant's own settings: no message can change them. They are checked twice: against
what the coordinator asks, before the model and the text are read, and against the text that was really read.
Then the question is put to the participant in plain words, and nothing is computed until it is answered.

RUN/question.json   what is asked, in words; written once all limits hold
RUN/answer.json     the participant's answer
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedprllm.errors import RunError
from fedprllm.federation.plan import SiteSettings
from fedprllm.federation.protocol.messages import Code
from fedprllm.files import read_json, write_json, write_text

__all__ = [
    "Refused",
    "TextBudget",
    "answer",
    "ask",
    "check_request",
    "check_text",
    "open_questions",
    "own_seed",
    "text_identity",
]

_QUESTION, _ANSWER = "question.json", "answer.json"
_POLL_S = 0.2


class Refused(Exception):  # noqa: N818  a limit held, which is no defect
    """A run asks for more than this participant grants.

    Attributes:
        code: The word for it that the coordinator is told.
    """

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


# Limits ---------------------------------------------------------------------------------------------


def check_request(settings: SiteSettings, job: Mapping[str, Any]) -> None:
    """Refuse what a run asks for, from its request alone.

    Args:
        settings: The participant's own.
        job: The coordinator's request: ``config``, ``model`` and ``participants``.

    Raises:
        Refused: Too few participants, windows or tokens, or not the plan that the participant pinned.
    """
    n_participants = len(set(job["participants"]))
    if n_participants < settings.min_participants:
        raise Refused(
            "too few participants",
            f"the run names {n_participants} participants, this one asks for at least "
            f"{settings.min_participants} (--min-participants): the fewer there are, the more the result "
            "tells about each",
        )
    windows, length = job["config"]["windows"], job["config"]["window_length"]
    if windows:
        _check_amount(settings, windows, windows * (length or 0), "the run asks for")
    if settings.plan is not None:
        _check_plan(settings.plan, job)


def check_text(settings: SiteSettings, n_windows: int, n_tokens: int) -> None:
    """Refuse to share sums or masks of less text than the settings grant.

    Raises:
        Refused: The text gives too few windows or tokens.
    """
    _check_amount(settings, n_windows, n_tokens, "the text gives")


def _check_amount(settings: SiteSettings, n_windows: int, n_tokens: int, subject: str) -> None:
    if n_windows < settings.min_windows or n_tokens < settings.min_tokens:
        raise Refused(
            "too few tokens",
            f"{subject} {n_windows} windows with {n_tokens:,} tokens in all; this participant shares nothing "
            f"made of less than {settings.min_windows} windows and {settings.min_tokens:,} tokens "
            "(--min-windows, --min-tokens): an update of little text tells what the text is",
        )


def _check_plan(plan: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Compare a request with the plan that the participant was given beforehand."""
    for name, expected in plan["config"].items():
        found = job["config"].get(name)
        resolved = name == "window_length" and expected is None
        if found != expected and not resolved:
            raise Refused(
                "another plan",
                f"the run has {name.replace('_', '-')} {found!r}, this participant's plan has {expected!r}",
            )
    expected_names = sorted(plan["participants"])
    if expected_names and sorted(job["participants"]) != expected_names:
        raise Refused(
            "another plan",
            f"the run has the participants {', '.join(sorted(job['participants']))}, the plan of this "
            f"participant has {', '.join(expected_names)}",
        )
    if plan["model"] != job["model"]:
        raise Refused(
            "another plan", f"the run prunes {job['model']}, the plan of this participant has {plan['model']}"
        )


# The text, and how often it was used ------------------------------------------------------------------


def own_seed(folder: Path) -> int:
    """The seed by which this participant chooses its windows: drawn once, kept here, never sent.

    Args:
        folder: The participant's folder for ledger and runs.
    """
    path = folder / "windows-seed"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, f"{secrets.randbits(62)}\n")
        path.chmod(0o600)
    return int(path.read_text(encoding="utf-8"))


def text_identity(sources: Sequence[str]) -> str:
    """SHA-256 over the content of a text's files, wherever they lie; of a hub dataset, its name."""
    digest = hashlib.sha256()
    for part in sorted(_parts(sources)):
        digest.update(part)
    return digest.hexdigest()


def _parts(sources: Sequence[str]) -> Iterator[bytes]:
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            yield from (_digest(file) for file in files)
        elif path.exists():
            yield _digest(path)
        else:
            yield hashlib.sha256(source.encode()).digest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


class TextBudget:
    """How many runs each text was used in.

    Args:
        folder: The participant's folder for ledger and runs.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "texts.json"
        self._lock = FileLock(folder / ".texts.lock")

    def runs_of(self, text: str) -> list[str]:
        """Runs that a text was used in."""
        runs: list[str] = (read_json(self._path) if self._path.exists() else {}).get(text, [])
        return runs

    def spend(self, text: str, run: str, most: int) -> int:
        """Count a run against its text; the same run counts once, however often it is continued.

        Args:
            text: From `text_identity`.
            run: Hex digits of the run's id; a survey has one of its own.
            most: Runs that the participant grants to one text.

        Returns:
            Number of runs so far, this one included.

        Raises:
            Refused: The text was used in that many runs already.
        """
        with self._lock:
            known = read_json(self._path) if self._path.exists() else {}
            runs = known.setdefault(text, [])
            if run not in runs:
                if len(runs) >= most:
                    raise Refused(
                        "text used up",
                        f"this text was used in {len(runs)} runs, and {most} are granted (--runs-per-text): "
                        "what several runs tell about it adds up; grant more, or use other text",
                    )
                runs.append(run)
                write_json(self._path, known)
            return len(runs)


# The question -------------------------------------------------------------------------------------------


def ask(folder: Path, question: Mapping[str, Any], is_wanted: Callable[[], bool]) -> None:
    """Put a question to the participant, and wait for its answer.

    Args:
        folder: Folder of the run.
        question: What is asked, in words.
        is_wanted: Whether anyone still waits for the answer.

    Raises:
        Refused: The participant said no.
        RunError: No one waits for the answer any more.
    """
    if (folder / _ANSWER).exists() and read_json(folder / _QUESTION) != question:
        # What was confirmed before was something else.
        (folder / _ANSWER).unlink()
    write_json(folder / _QUESTION, question)
    while not (folder / _ANSWER).exists():
        if not is_wanted():
            raise RunError("the run went on without an answer")
        time.sleep(_POLL_S)
    if not read_json(folder / _ANSWER)["yes"]:
        raise Refused("not confirmed", "the participant did not agree to this run")


def answer(folder: Path, yes: bool) -> None:
    """Answer the question of a run."""
    write_json(folder / _ANSWER, {"yes": yes})


def open_questions(runs: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folders of runs whose question waits for an answer, each with the question."""
    for path in sorted(runs.glob(f"*/{_QUESTION}")):
        if not (path.parent / _ANSWER).exists():
            try:
                yield path.parent, read_json(path)
            except (OSError, json.JSONDecodeError):  # it is gone again
                continue
