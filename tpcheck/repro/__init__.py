"""repro_script(subject, ...) -> str: a failing case as at most 40 lines that need torch only.

Requirement: a failure that has been shrunk can be sent to somebody who has no tpcheck. The script
is the torch program that the ranks ran, as far as it is needed, and it is run before it is shown:
one that does not give what was recorded, or does not show the failure, is never given out.
"""

from tpcheck.repro.scripts import MAX_LINES, Repro, make_repro, repro_script

__all__ = ["MAX_LINES", "Repro", "make_repro", "repro_script"]
