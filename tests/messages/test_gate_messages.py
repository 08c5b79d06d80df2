"""The full text of what `tpcheck gate` and tpcheck.gate say."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import tpcheck
from tests.gate_reports import NOW, report_json, verdict
from tpcheck.deployment_gate.decision import decide
from tpcheck.deployment_gate.gating import as_report, decision_json
from tpcheck.deployment_gate.policy import parse_policy
from tpcheck.render.gate import render_gate, render_gate_junit, render_gate_markdown

Json = dict[str, Any]

SMALL = {
    "tp": [2],
    "dtypes": ["bfloat16"],
    "backends": ["nccl"],
    "require": ["structural"],
    "max_age_days": 30,
}


def small_report(**changes: Any) -> Json:
    report = report_json() | {"verdicts": [verdict()]}
    report["sensitivity"]["tp_size"] = 2
    return report | changes


def decision(report: Json, policy: Json) -> Json:
    asked, evidence = parse_policy(policy), as_report(report)
    return decision_json(decide(evidence, asked, NOW), asked, evidence)


ALLOWED = """\
ALLOWED: models.py:build: all 9 requirements are met
report of 2026-03-09T12:00:00Z, PASS on nccl; policy 6d1a1af6bc67; decided 2026-03-10T12:00:00Z

policy                 where                  asked                   found                      met
---------------------  ---------------------  ----------------------  -------------------------  -----
report                                        no contradiction        none                       yes
backends               nccl                   evidence from nccl      evidence from nccl         yes
min_cases              tp=2 bfloat16 on nccl  1 case                  1 case                     yes
allow                  tp=2 bfloat16 on nccl  outcome PASS            so in 1 case               yes
require                tp=2 bfloat16 on nccl  check structural PASS   so in 1 case               yes
report                                        WRONG nowhere           nowhere else               yes
require_deployed_path                         the deployed path       it was exercised           yes
min_sensitivity                               0.95 of planted faults  116 of 116 caught          yes
max_age_days                                  at most 30 days old     made 2026-03-09T12:00:00Z  yes
"""  # noqa: E501

REFUSED = """\
REFUSED: models.py:build: 3 of 10 requirements are not met
report of 2026-01-01T12:00:00Z, ERROR on nccl; policy 9e5fe286a485; decided 2026-03-10T12:00:00Z

- tp=4 bfloat16 on nccl: not proven: the report has no verdict there
  settle: tpcheck run models.py:build --tp 2,4 --backend nccl --dtype bfloat16 --sensitivity --json REPORT.json

- sensitivity: was not measured
  settle: tpcheck run models.py:build --tp 2,4 --backend nccl --dtype bfloat16 --sensitivity --json REPORT.json

- age: the report is 68.0 days old, but should be at most 30
  settle: tpcheck run models.py:build --tp 2,4 --backend nccl --dtype bfloat16 --sensitivity --json REPORT.json

policy                 where                  asked                   found                        met
---------------------  ---------------------  ----------------------  ---------------------------  -----
report                                        no contradiction        none                         yes
backends               nccl                   evidence from nccl      evidence from nccl           yes
min_cases              tp=2 bfloat16 on nccl  1 case                  1 case                       yes
allow                  tp=2 bfloat16 on nccl  outcome PASS            so in 1 case                 yes
require                tp=2 bfloat16 on nccl  check structural PASS   so in 1 case                 yes
tp                     tp=4 bfloat16 on nccl  1 case                  0 cases                      NO
report                                        WRONG nowhere           nowhere else                 yes
require_deployed_path                         the deployed path       it was exercised             yes
min_sensitivity                               0.95 of planted faults  sensitivity: was not mea...  NO
max_age_days                                  at most 30 days old     age: the report is 68.0 ...  NO

note: tp=8 bfloat16: ERROR, in case s0-b2-t16; the policy does not ask for it
"""  # noqa: E501

RAISED = """\
REFUSED: models.py:build: 2 reasons
- sensitivity: was not measured
  settle: tpcheck run models.py:build --tp 2 --backend nccl --dtype bfloat16 --sensitivity --json REPORT.json
- age: created='soon', but should be a time with its zone like 2026-01-31T12:00:00Z
  settle: tpcheck run models.py:build --tp 2 --backend nccl --dtype bfloat16 --sensitivity --json REPORT.json
"""  # noqa: E501

MARKDOWN = """\
## REFUSED: models.py:build: 3 of 10 requirements are not met

report of 2026-01-01T12:00:00Z, ERROR on nccl; policy 9e5fe286a485; decided 2026-03-10T12:00:00Z

tp=4 bfloat16 on nccl: not proven: the report has no verdict there

```text
tpcheck run models.py:build --tp 2,4 --backend nccl --dtype bfloat16 --sensitivity --json REPORT.json
```

sensitivity: was not measured

```text
tpcheck run models.py:build --tp 2,4 --backend nccl --dtype bfloat16 --sensitivity --json REPORT.json
```

age: the report is 68.0 days old, but should be at most 30

```text
tpcheck run models.py:build --tp 2,4 --backend nccl --dtype bfloat16 --sensitivity --json REPORT.json
```

| policy | where | asked | found | met |
| --- | --- | --- | --- | --- |
| report |  | no contradiction | none | yes |
| backends | nccl | evidence from nccl | evidence from nccl | yes |
| min\\_cases | tp=2 bfloat16 on nccl | 1 case | 1 case | yes |
| allow | tp=2 bfloat16 on nccl | outcome PASS | so in 1 case | yes |
| require | tp=2 bfloat16 on nccl | check structural PASS | so in 1 case | yes |
| tp | tp=4 bfloat16 on nccl | 1 case | 0 cases | NO |
| report |  | WRONG nowhere | nowhere else | yes |
| require\\_deployed\\_path |  | the deployed path | it was exercised | yes |
| min\\_sensitivity |  | 0.95 of planted faults | sensitivity: was not measured | NO |
| max\\_age\\_days |  | at most 30 days old | age: the report is 68.0 days old, but should be at most 30 | NO |

- tp=8 bfloat16: ERROR, in case s0-b2-t16; the policy does not ask for it
"""  # noqa: E501


def test_an_allowed_decision_in_full() -> None:
    assert f"{render_gate(decision(small_report(), SMALL))}\n" == ALLOWED


def refused() -> Json:
    """Return a decision with a degree, the sensitivity and the age against it, and a note."""
    report = small_report(sensitivity=None, created="2026-01-01T12:00:00Z")
    broken = verdict(tp_size=8)
    broken["checks"]["schedule"] = {"outcome": "FAIL", "reason": "rank 3 died"}
    report["verdicts"].append(broken | {"outcome": "ERROR"})
    return decision(report | {"outcome": "ERROR"}, SMALL | {"tp": [2, 4]})


def test_a_refused_decision_in_full() -> None:
    assert f"{render_gate(refused())}\n" == REFUSED


def test_gate_refused_in_full() -> None:
    with pytest.raises(tpcheck.GateRefused) as error:
        tpcheck.gate(small_report(created="soon", sensitivity=None), SMALL)
    assert f"{error.value}\n" == RAISED


def test_a_job_summary_in_full() -> None:
    assert render_gate_markdown(refused()) == MARKDOWN


def test_junit_has_a_failure_for_every_requirement_that_is_not_met() -> None:
    found = refused()
    suite = ElementTree.fromstring(render_gate_junit(found))
    assert suite.get("name") == "tpcheck gate models.py:build"
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == [
        *("10", "3", "0", "0")
    ]
    failures = suite.findall("testcase/failure")
    assert [one.get("message") for one in failures] == [one["reason"] for one in found["refusals"]]
    assert [(one.text or "").splitlines()[1] for one in failures] == [
        f"settle: {one['settle']}" for one in found["refusals"]
    ]
    cases = [case.get("name") for case in suite.findall("testcase")]
    assert cases[5] == "tp tp=4 bfloat16 on nccl 1 case"


def test_junit_is_red_when_nothing_was_asked() -> None:
    nothing = refused() | {"requirements": [], "refusals": []}
    suite = ElementTree.fromstring(render_gate_junit(nothing))
    assert (suite.get("tests"), suite.get("errors")) == ("1", "1")


HOSTILE = "m.py:a|b`c\x1b[2J@all<b>\n# h"


def test_what_a_report_puts_into_a_name_stays_inside_its_place() -> None:
    report = small_report(subject=HOSTILE, sensitivity=None)
    report["environment"]["torch"] = "``` x\n| y"
    found = decision(report, SMALL | {"match": {"torch": "2"}, "subject": "m.py:b"})
    text, page = render_gate(found), render_gate_markdown(found)
    assert "\x1b" not in text + page
    assert text.splitlines()[0].startswith("REFUSED: m.py:a|b`c\\x1b[2J@all<b>\\n# h: ")
    assert "<b>" not in page
    assert "@all" not in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(found["requirements"])
    assert {line.replace("\\|", "").count("|") for line in rows} == {6}
    ElementTree.fromstring(render_gate_junit(found))


def test_a_policys_error_in_full(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[policy]\ntp = [2]\ndtypes = ["bfloat16"]\nbackend = ["nccl"]\n')
    with pytest.raises(tpcheck.TPCheckError) as error:
        tpcheck.gate(small_report(), path)
    expected = f"{path}: policy.backend: is no key of a policy; did you mean backends?"
    assert str(error.value) == expected
    path.write_text('[policy]\ntp = [2]\ndtypes = ["bfloat16"]\n')
    with pytest.raises(tpcheck.TPCheckError) as error:
        tpcheck.gate(small_report(), path)
    assert str(error.value) == (
        f"{path}: policy.backends: is missing, but should be a list of some of nccl,"
        " nccl-loopback, gloo, sim, endpoint: evidence from one never counts for another"
    )
