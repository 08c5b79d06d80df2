"""Which case and subject a verdict is about, whoever ran it.

Requirement: a case is one piece of evidence, however often it ran. A report of pytest puts the test
in front of a case's id, and a number behind it where a test ran it again (plugin/summary.py); it is
the same seed, batch and length all the same, and the same for `--case`. Such a report may be of
several subjects, of which it keeps the count and not who is who.
"""

from __future__ import annotations

import re

_IN_A_TEST = re.compile(r".*?\s(s\d+-b\d+-t\d+(?:\+\{.*\})?)(?: #\d+)?", re.DOTALL)
_SEVERAL = re.compile(r"pytest, [0-9]+ subjects")


def case_of(case_id: str) -> str:
    """Return the id of a case without the test that ran it.

    Example:
        >>> case_of("s0-b2-t16"), case_of("tests/test_x.py::test_y s0-b2-t16 #2")
        ('s0-b2-t16', 's0-b2-t16')
    """
    found = _IN_A_TEST.fullmatch(case_id)
    return case_id if found is None else found[1]


def is_of_several(subject: str) -> bool:
    """Say whether a report's subject stands for several.

    Example:
        >>> is_of_several("pytest, 2 subjects"), is_of_several("models.py:build")
        (True, False)
    """
    return _SEVERAL.fullmatch(subject) is not None
