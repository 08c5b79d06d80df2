"""`tpcheck gate`: may this be deployed? Read a report and a policy, decide, print. Torch-free.

Requirement: exit code 0 means that everything the policy asks for is proven, 1 that something is
not, 2 that the report or the policy could not be read; there is no other way to 0 but a receipt
that holds (--verify) and a key that was made (--new-key). A decision never overwrites what it was
made from.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from tpcheck.cli_commands import options as options
from tpcheck.cli_commands import receipts as receipts
from tpcheck.cli_commands.output import Outputs
from tpcheck.errors import TPCheckError
from tpcheck.files import write_text
from tpcheck.records import EXIT_CODES, PASS

ReportPath = Annotated[
    Path | None, typer.Argument(help="The JSON that `tpcheck run` or `drift` wrote.")
]
PolicyPath = Annotated[
    Path | None, typer.Option("--policy", metavar="FILE", help="What has to be proven, in TOML.")
]


def gate(
    report: ReportPath = None,
    policy: PolicyPath = None,
    receipt: receipts.ReceiptPath = None,
    sign: receipts.SignKey = None,
    new_key: receipts.NewKey = None,
    verify: receipts.Verify = None,
    public_key: receipts.PublicKey = None,
    model: receipts.ModelDir = None,
    tp: receipts.Degree = None,
    dtype: receipts.Deployed = None,
    paranoid: receipts.Paranoid = False,
    json_path: options.JsonPath = None,
    junit: options.JunitPath = None,
    markdown: options.MarkdownPath = None,
    quiet: options.Quiet = False,
) -> None:
    """May the subject of REPORT.json be deployed? Refuses whatever POLICY asks and lacks proof."""
    outputs = Outputs(json_path, junit=junit, markdown=markdown, inputs={"--model": model})
    own = {"--json": json_path, "--junit": junit, "--markdown": markdown}
    deciding = {"REPORT.json": report, "--policy": policy, "--receipt": receipt, "--sign": sign}
    start = receipts.Start(verify, public_key, model, tp, dtype, paranoid)
    receipts.assert_one_thing({"--new-key": new_key, **start.given, **deciding, **own})
    if new_key is not None:
        receipts.make_key(new_key, quiet=quiet)
        return
    if verify is not None:
        receipts.assert_apart(own, {"--verify": verify, "--public-key": public_key})
        outputs.assert_writable()
        raise typer.Exit(receipts.verify_and_show(start, outputs, quiet=quiet))
    if report is None:
        raise TPCheckError("REPORT.json is missing; `tpcheck run SUBJECT --json` writes one")
    if policy is None:
        raise TPCheckError("--policy is missing; it names the TOML file that says what to prove")
    read = {str(report): report, "--policy": policy, "--sign": sign}
    if sign is not None:
        read[f"{sign}.pub"] = Path(f"{sign}.pub")
    receipts.assert_apart({**own, "--receipt": receipt}, read)
    outputs.assert_writable()
    if receipt is not None:
        receipts.prepare(receipt, sign)
    raise typer.Exit(decide_and_show(report, policy, outputs, receipt, sign, quiet=quiet))


def decide_and_show(
    report: Path,
    policy: Path,
    outputs: Outputs,
    receipt: Path | None = None,
    key: Path | None = None,
    *,
    quiet: bool,
) -> int:
    """Hold a report against a policy, publish the decision and return the exit code.

    What was allowed is written to `receipt`, signed with `key`, if they are given.
    """
    from tpcheck.deployment_gate.decision import decide
    from tpcheck.deployment_gate.gating import decision_json
    from tpcheck.deployment_gate.policy import read_policy
    from tpcheck.render.gate import render_gate, render_gate_junit, render_gate_markdown
    from tpcheck.report import read_report

    asked, sha256 = read_policy(policy), ""
    if receipt is None:
        evidence = read_report(report)
    else:
        evidence, sha256 = receipts.read_evidence(report)
    decision = decide(evidence, asked, datetime.now(UTC), report_path=str(report))
    made = None
    if receipt is not None:
        made = receipts.issue(evidence, asked, decision, sha256, key)
    found = decision_json(decision, asked, evidence)
    if outputs.junit is not None:
        write_text(render_gate_junit(found), outputs.junit)
    if outputs.markdown is not None:
        write_text(render_gate_markdown(found), outputs.markdown)
    outputs.publish(found, render_gate(found), quiet=quiet)
    if receipt is not None:
        receipts.store(made, receipt, quiet=quiet)
    return EXIT_CODES[PASS if decision.allowed else "WRONG"]
