"""Does what a researcher asks for: one call, one answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.attempt.drift import check_for_drift
from agent.attempt.lab import Lab, hashes_of
from agent.attempt.smoke import run_smoke
from agent.candidate.workspace import WorkspaceError
from agent.night.budget import is_refused_too_often, reason_to_stop
from agent.night.waiting import (
    is_asked_to_pause,
    is_asked_to_stop,
    run_with_retries,
    with_retries,
)
from agent.record.attempts import Attempt
from agent.record.history import find_settled
from agent.researcher.answers import history_answer, run_answer, smoke_answer, sweep_answer, to_json
from agent.researcher.arguments import (
    Arguments,
    Delete,
    Edit,
    Finish,
    ListFiles,
    Read,
    Rename,
    Run,
    Search,
    ShowHistory,
    Suggest,
    Sweep,
    ToolRefused,
    Write,
    parsed,
)
from agent.researcher.tools import FileTools
from agent.text import one_line
from sandbox.contract.errors import BoxLost

if TYPE_CHECKING:
    from agent.researcher.tpe import TpeModel  # which takes a second to import


@dataclass(frozen=True)
class ToolResult:
    """What a tool answers."""

    text: str
    is_error: bool = False
    finished: str | None = None
    """Why the session should end, if the tool was `finish`."""


class Toolbox:
    """The tools of one session.

    Args:
        lab: of the session.
        sampler: whom `suggest` and `sweep` ask.
    """

    def __init__(self, lab: Lab, sampler: TpeModel) -> None:
        self._lab = lab
        self._sampler = sampler
        self.files = FileTools(lab.workspace, lab.ledger)
        self._others: dict[type[Arguments], Callable[[Any], str]] = {
            Read: self.files.read,
            Write: self.files.write,
            Edit: self.files.edit,
            Delete: self.files.delete,
            Rename: self.files.rename,
            ListFiles: self.files.list,
            Search: self.files.search,
            ShowHistory: self._history,
            Suggest: self._suggest,
            Sweep: self._sweep,
        }

    def call(self, name: str, arguments: dict[str, Any], researcher: str) -> ToolResult:
        """Do what a researcher asks for.

        Raises:
            SandboxError: nightlab or the engine failed while a candidate ran.
            SessionOver: the session had to end while a candidate waited.
        """
        try:
            call = parsed(name, arguments)
            if isinstance(call, Finish):
                return ToolResult(to_json({"ok": True}), finished=call.reason)
            return ToolResult(self._answer(call, researcher))
        except (ToolRefused, WorkspaceError) as error:
            answer = {"error": error.code, "message": error.message, "hint": error.hint}
            return ToolResult(to_json(answer), is_error=True)

    def _answer(self, call: Arguments, researcher: str) -> str:
        if isinstance(call, Run):
            return self._smoke() if call.smoke else self._run(call, researcher)
        return self._others[type(call)](call)

    def _run(self, call: Run, researcher: str) -> str:
        # The same files give the same verdict within the noise: the budget has better uses.
        known = find_settled(self._lab.history, hashes_of(self._lab.workspace.candidate()))
        if known is not None:
            return run_answer(known, self._lab.history, repeated=True)
        self._check_best()
        attempt = self._attempt(call.hypothesis, researcher)
        return run_answer(attempt, self._lab.history, repeated=False)

    def _check_best(self) -> None:
        """Measure the best again if it is time; what builds on one that fell is not run."""
        before = self._lab.history.best
        check_for_drift(self._lab)
        if before is not None and before is not self._lab.history.best:
            self.files.forget_reads()
            message = f"attempt {before.number}, on which these files build, was just refused"
            hint = "the workspace holds the files of the best again: make the change anew"
            raise ToolRefused("best_dethroned", message, hint)

    def _attempt(self, hypothesis: str, researcher: str) -> Attempt:
        attempt = run_with_retries(self._lab, "candidate", hypothesis, researcher)
        # It has put the best files in place, and its answer says so: nothing is stale.
        self.files.forget_reads()
        return attempt

    def _smoke(self) -> str:
        lab, candidate = self._lab, self._lab.workspace.candidate()
        most = lab.settings.economy.max_smokes
        left = most - lab.history.smokes_in_a_row
        known = lab.history.find_smoke(hashes_of(candidate))
        if known is not None:  # free, so it costs none of the smoke runs that are left
            return smoke_answer(known, lab.history, left, repeated=True)
        if left <= 0:
            message = f"{most} smoke runs since the last attempt are enough"
            raise ToolRefused("too_many_smokes", message, "run without smoke, or change less")
        try:
            due = len(lab.history.attempts)
            smoked = with_retries(
                lab, lambda: run_smoke(lab, candidate, asked_by="researcher", attempt=due)
            )
        except BoxLost as error:
            hint = "change what may bring it about"
            raise ToolRefused("box_lost", error.message, hint) from error
        return smoke_answer(smoked, lab.history, left - 1, repeated=False)

    def _history(self, call: ShowHistory) -> str:
        if (call.attempt is not None) != (call.select == "attempt"):
            hint = 'give attempt together with select = "attempt", and neither without the other'
            raise ToolRefused("bad_arguments", "attempt and select do not fit together", hint)
        try:
            return history_answer(self._lab.history, self._lab.ledger.get_blob, call)
        except KeyError:
            message = f"there is no attempt {call.attempt}"
            raise ToolRefused("not_found", message, 'see select = "recent"') from None

    def _suggest(self, _: Suggest) -> str:
        proposal = self._sampler.propose()
        if proposal is None:
            message = "the files have no knobs left to turn"
            hint = "a knob is a module-level NAME = literal; or change the code instead"
            raise ToolRefused("nothing_to_suggest", message, hint)
        changes = [
            {
                "file": move.knob.file,
                "knob": one_line(move.knob.name, 80),
                "from": move.old[:80],
                "to": move.new[:80],
            }
            for move in proposal.moves
        ]
        return to_json({"changes": changes, "reason": proposal.reason})

    def _sweep(self, call: Sweep) -> str:
        lab = self._lab
        best = lab.history.best
        # The sampler moves knobs of the best; a researcher's own edits would be lost in silence.
        if best is not None and best.started.files != hashes_of(lab.workspace.candidate()):
            message = "the workspace holds changes that were not run"
            raise ToolRefused("unsaved_changes", message, "run them, or undo them, then sweep")
        attempts: list[Attempt] = []
        ended = "all done"
        while len(attempts) < call.attempts:
            check_for_drift(lab)  # whoever is the best afterwards is what the sampler starts from
            if self._has_to_stop():
                ended = "the session has to stop"
                break
            limits = lab.settings.session
            if over := is_refused_too_often(lab.history, limits, self._sampler.name):
                ended = over[1]
                break
            proposal = self._sampler.propose(tuple(call.knobs))
            if proposal is None:
                ended = "no point is left to try with these knobs"
                break
            lab.workspace.restore(proposal.candidate)
            attempts.append(self._attempt(proposal.hypothesis, proposal.sampler))
        if not attempts:
            hint = "a knob is a module-level NAME = literal; see suggest for those there are"
            raise ToolRefused("nothing_to_sweep", ended, hint)
        return sweep_answer(attempts, lab.history, ended)

    def _has_to_stop(self) -> bool:
        directory = self._lab.worker.directory
        if is_asked_to_stop(directory) or is_asked_to_pause(directory):
            return True
        return reason_to_stop(self._lab.history, self._lab.settings.session) is not None
