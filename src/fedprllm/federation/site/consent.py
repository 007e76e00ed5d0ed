"""A participant's limits for a run, and its consent before anything is computed.

The limits are the participant's own settings, and no message can change them. They are checked twice: first
against the coordinator's request, before the model and the text are read, and then against the text that was
actually read. Finally the participant is asked in plain words. Nothing is computed until it has answered.

RUN/question.json   the question, in words; written once all limits hold
RUN/answer.json     the participant's answer
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedprllm.errors import RunError
from fedprllm.federation.plan import SiteSettings
from fedprllm.federation.protocol.messages import Code
from fedprllm.files import read_sealed, write_sealed

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


class Refused(Exception):  # noqa: N818  a limit held, which is not a defect
    """A run asks for more than this participant grants.

    Attributes:
        code: Reason sent to the coordinator. The message itself stays here.
    """

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


# Limits ---------------------------------------------------------------------------------------------


def check_request(settings: SiteSettings, job: Mapping[str, Any]) -> None:
    """Check a run's request against the participant's limits.

    Args:
        settings: The participant's own settings.
        job: The coordinator's request, with ``config``, ``model`` and ``participants``.

    Raises:
        Refused: Updates in the clear, too few participants, windows or tokens, or not the run that the
            participant pinned.
    """
    if settings.require_secure and not job["config"].get("secure"):
        raise Refused(
            "not secure",
            "the run asks for updates in the clear, and this participant shares sums only "
            "(--require-secure): ask the coordinator to run it with secure",
        )
    n_participants = len(set(job["participants"]))
    if n_participants < settings.min_participants:
        raise Refused(
            "too few participants",
            f"the run names {n_participants} participants, and this participant requires at least "
            f"{settings.min_participants} (--min-participants): the fewer participants there are, the more "
            "the result reveals about each",
        )
    windows, length = job["config"]["windows"], job["config"]["window_length"]
    if windows:
        _check_amount(settings, windows, windows * (length or 0), "the run asks for")
    if job.get("heal") is not None:
        _check_healing(settings, job["heal"])
    if settings.plan is not None:
        _check_plan(settings.plan, job)


def _check_healing(settings: SiteSettings, heal: Mapping[str, Any]) -> None:
    if heal["rounds"] > settings.max_rounds:
        raise Refused(
            "too many rounds",
            f"the run asks for {heal['rounds']} rounds, and this participant takes part in at most "
            f"{settings.max_rounds} (--max-rounds): every gradient tells something about the text",
        )
    n_tokens = heal["round_windows"] * ((heal["window_length"] or 1) - 1)
    if n_tokens < settings.min_gradient_tokens:
        raise Refused(
            "too few tokens",
            f"the run asks for gradients over {n_tokens} tokens, and this participant shares none over fewer "
            f"than {settings.min_gradient_tokens} (--min-gradient-tokens): the gradient of little text can "
            "reveal the text",
        )


def check_text(settings: SiteSettings, n_windows: int, n_tokens: int) -> None:
    """Check that the text is long enough to share an update computed from it.

    Args:
        settings: The participant's own settings.
        n_windows: Number of windows that the text gives.
        n_tokens: Number of tokens in these windows.

    Raises:
        Refused: There are too few windows or tokens.
    """
    _check_amount(settings, n_windows, n_tokens, "the text gives")


def _check_amount(settings: SiteSettings, n_windows: int, n_tokens: int, subject: str) -> None:
    if n_windows < settings.min_windows or n_tokens < settings.min_tokens:
        raise Refused(
            "too few tokens",
            f"{subject} {n_windows} windows with {n_tokens:,} tokens in all, and this participant shares "
            f"nothing computed from fewer than {settings.min_windows} windows and {settings.min_tokens:,} "
            "tokens (--min-windows, --min-tokens): an update computed from little text can reveal the text",
        )


def _check_plan(plan: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Compare a request with the plan that the participant pinned."""
    if (plan.get("heal") is None) != (job.get("heal") is None):
        does = "prunes" if job.get("heal") is None else "heals"
        raise Refused("another plan", f"the run {does}, and this participant's plan (--config) does not")
    options = [(plan["config"], job["config"])]
    if plan.get("heal") is not None:
        options.append((plan["heal"], job["heal"]))
    for name, expected, found in (
        (name, wanted, asked.get(name)) for wishes, asked in options for name, wanted in wishes.items()
    ):
        resolved = name == "window_length" and expected is None
        if found != expected and not resolved:
            raise Refused(
                "another plan",
                f"the run has {name.replace('_', '-')} {found!r}, and this participant's plan (--config) has "
                f"{expected!r}",
            )
    expected_names = sorted(plan["participants"])
    if expected_names and sorted(job["participants"]) != expected_names:
        raise Refused(
            "another plan",
            f"the run has the participants {', '.join(sorted(job['participants']))}, and this participant's "
            f"plan (--config) has {', '.join(expected_names)}",
        )
    if plan["model"] != job["model"] and not plan.get("of"):
        raise Refused(
            "another plan",
            f"the run prunes {job['model']}, and this participant's plan (--config) has {plan['model']}",
        )


# Use of the text --------------------------------------------------------------------------------------


def own_seed(folder: Path) -> int:
    """Seed with which this participant chooses its windows: drawn once, kept here and never sent.

    Args:
        folder: The participant's folder with its ledger and runs.

    Raises:
        RunError: The seed is damaged.
    """
    path = folder / "windows-seed"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(path, {"seed": secrets.randbits(62)})
        path.chmod(0o600)
    try:
        return int(read_sealed(path)["seed"])
    except RunError as error:
        raise RunError(
            f"{error}. This participant chooses its windows by it: restore it, since a run that has begun "
            "cannot go on without it; when no run is going on, delete it, and another is drawn"
        ) from None


def text_identity(sources: Sequence[str]) -> str:
    """SHA-256 of the content of a text's files, wherever they are stored. Hub datasets count by name."""
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
    """Counts the runs that have used each text.

    Args:
        folder: The participant's folder with its ledger and runs.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "texts.json"
        self._lock = FileLock(folder / ".texts.lock")

    def runs_of(self, text: str) -> list[str]:
        """Ids of the runs that have used a text, from `text_identity`."""
        runs: list[str] = self._known().get(text, [])
        return runs

    def _known(self) -> dict[str, Any]:
        try:
            return read_sealed(self._path)
        except FileNotFoundError:
            return {}
        except RunError as error:
            raise RunError(
                f"{error}. It counts the runs that used each text: restore it; if you accept that the count "
                "starts again, delete it"
            ) from None

    def spend(self, text: str, run: str, most: int) -> int:
        """Count a run against its text. A run counts once, however often it is continued.

        Args:
            text: Identity of the text, from `text_identity`.
            run: Id of the run in hexadecimal digits. A survey has an id of its own.
            most: Number of runs that may use one text.

        Returns:
            Number of runs so far, including this one.

        Raises:
            Refused: The text has already been used in as many runs as the participant grants.
        """
        with self._lock:
            known = self._known()
            runs = known.setdefault(text, [])
            if run not in runs:
                if len(runs) >= most:
                    raise Refused(
                        "text used up",
                        f"this text was used in {len(runs)} runs, and {most} are granted (--runs-per-text): "
                        "what runs reveal about a text adds up; grant more runs, or use another text",
                    )
                runs.append(run)
                write_sealed(self._path, known)
            return len(runs)


# The question -----------------------------------------------------------------------------------------


def ask(folder: Path, question: Mapping[str, Any], is_wanted: Callable[[], bool]) -> None:
    """Ask the participant whether to take part in a run, and wait for its answer.

    Args:
        folder: Folder of the run.
        question: The question, from `fedprllm.federation.site.question.question_of`.
        is_wanted: Returns whether the answer is still needed.

    Raises:
        Refused: The participant declined.
        RunError: The answer is no longer needed.
    """
    if _read(folder / _QUESTION) != question or _read(folder / _ANSWER) is None:
        # The existing answer is damaged, or to a different question.
        (folder / _ANSWER).unlink(missing_ok=True)
    write_sealed(folder / _QUESTION, question)
    while not (folder / _ANSWER).exists():
        if not is_wanted():
            raise RunError("the question was not answered in time: another process has taken over this run")
        time.sleep(_POLL_S)
    if not read_sealed(folder / _ANSWER)["yes"]:
        raise Refused("not confirmed", "the participant declined this run")


def answer(folder: Path, yes: bool) -> None:
    """Record the participant's answer to a run's question."""
    write_sealed(folder / _ANSWER, {"yes": yes})


def _read(path: Path) -> dict[str, Any] | None:
    """A sealed file; None if it is missing or damaged."""
    try:
        return read_sealed(path)
    except (FileNotFoundError, RunError):
        return None


def open_questions(runs: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield each run folder with an unanswered question, and the question."""
    for path in sorted(runs.glob(f"*/{_QUESTION}")):
        if not (path.parent / _ANSWER).exists():
            question = _read(path)
            if question is not None:  # it may have been removed in the meantime
                yield path.parent, question
