"""The commands that would settle a refusal: real ones, for this subject, ready to be pasted.

Requirement: what is printed to be pasted is built from our own words; of a report only the subject,
a case and a dtype go into it, quoted for a shell, so that a report from elsewhere cannot smuggle in
a command. One report has to prove everything, so what is missing is settled by the run that makes
the whole report anew. A subject that the command line cannot name gets the same call in Python.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace

from tpcheck.deployment_gate.case_ids import case_of
from tpcheck.deployment_gate.policy import Policy
from tpcheck.records import Report, Verdict

_NAMED = re.compile(
    r"(builtin|hf|ref):\S.*|[^\s:-][^:]*\.py:[A-Za-z_][\w.]*|[A-Za-z_][\w.]*:[\w.]+"
)
_NO_COMMAND = {
    "endpoint": "no command of this tpcheck makes evidence from endpoint; name another backend",
}


@dataclass(frozen=True, slots=True)
class Commands:
    """Says how to make what is missing. `report_path` is where a new report would be written."""

    report: Report
    policy: Policy
    report_path: str

    def everything(self, backend: str = "") -> str:
        """Return the command whose report could satisfy the policy, on one backend."""
        policy = self.policy
        asked = policy.backends
        here = self.report.path.backend
        backend = backend or (here if here in asked else asked[0])
        profiled = policy.max_argmax_flip_margin is not None
        return self._command(
            "drift" if profiled else "run",
            backend,
            policy.tp,
            policy.dtypes,
            cases=policy.min_cases,
            sensitivity=policy.min_sensitivity > 0,
        )

    def about(self, subject: str) -> str:
        """Return the command whose report could satisfy the policy, on another subject."""
        return Commands(
            replace(self.report, subject=subject), self.policy, self.report_path
        ).everything()

    def case(self, verdict: Verdict, verb: str = "run") -> str:
        """Return the command that repeats one verdict; `verb` drift says where an error is made."""
        here, case = self.report.path.backend, case_of(verdict.case_id)
        return self._command(verb, here, (verdict.tp_size,), (verdict.dtype,), case)

    def _command(
        self,
        verb: str,
        backend: str,
        tp_sizes: tuple[int, ...],
        dtypes: tuple[str, ...],
        case: str = "",
        *,
        cases: int = 1,
        sensitivity: bool = False,
    ) -> str:
        if backend in _NO_COMMAND:
            return _NO_COMMAND[backend]
        subject = self.report.subject
        loopback = backend == "nccl-loopback"
        options: list[tuple[str, str]] = [("--tp", ",".join(map(str, tp_sizes)))]
        if backend in ("nccl", "nccl-loopback", "gloo", "sim"):
            options.append(("--backend", "nccl" if loopback else backend))
        options += [("--ranks-per-gpu", str(max(tp_sizes)))] if loopback else []
        options += [("--dtype", dtype) for dtype in dtypes]
        options += [("--case", case)] if case else []
        options += [("--cases", str(cases))] if cases > 1 else []
        if not _NAMED.fullmatch(subject) or "__main__" in subject or not subject.isprintable():
            return self._in_python(verb, options, sensitivity, case)
        words = ["tpcheck", verb, subject, *(word for option in options for word in option)]
        words += ["--sensitivity"] if sensitivity else []
        words += [] if case else ["--json", self.report_path]
        return shlex.join(words)

    def _in_python(
        self, verb: str, options: list[tuple[str, str]], sensitivity: bool, case: str
    ) -> str:
        given = dict(options)
        name = self.report.subject.rpartition(":")[2].rpartition(".")[2]
        degrees = tuple(map(int, given["--tp"].split(",")))
        dtypes = tuple(value for option, value in options if option == "--dtype")
        arguments = [name if name.isidentifier() else "build", repr(degrees)]
        arguments += [f"backend={given['--backend']!r}"] if "--backend" in given else []
        arguments += [f"dtypes={dtypes!r}"]
        for option, word in {"--ranks-per-gpu": "ranks_per_gpu", "--cases": "cases"}.items():
            arguments += [f"{word}={given[option]}"] if option in given else []
        arguments += [f"case={case!r}"] if case else []
        arguments += ["sensitivity=True"] if sensitivity else []
        call = f"tpcheck.{verb}({', '.join(arguments)})"
        if case:
            return call
        return f"tpcheck.report.write_report({call}, {self.report_path!r})"
