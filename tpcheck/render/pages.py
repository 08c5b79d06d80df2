"""The pages: one base template, one style, whatever the report is.

Requirement: a page opens from a disk or a CI artefact years later and shows the same: no script, no
font, no picture from elsewhere, which its own content security policy enforces; light and dark as
the reader's system is. Everything a template is given is text: control characters become escapes,
markup is escaped; only an SVG that figures.py has cleaned is taken as it is.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from tpcheck.errors import TPCheckError
from tpcheck.render.palette import DARK, LIGHT, variables
from tpcheck.render.text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_FINDINGS = 50
"""Failing verdicts shown in full."""

MAX_VERDICT_ROWS = 200


def assert_jinja2() -> None:
    """Raise before a run what rendering would raise after it.

    Raises:
        TPCheckError: jinja2 cannot be imported.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise TPCheckError(
            f"--html: jinja2 is missing ({error}), but pages are made with it;"
            " pip install 'tpcheck[report]'"
        ) from error


def page(template: str, **values: Any) -> str:
    """Return a template of this package, filled."""
    schemes = {"light": variables(LIGHT), "dark": variables(DARK)}
    return _environment().get_template(template).render(**schemes, **values)


@cache
def _environment() -> Environment:
    assert_jinja2()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("tpcheck.render"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _text(value: Any) -> Any:
    """Show control characters as escapes; what is marked as markup was made here."""
    return value if hasattr(value, "__html__") else printable(str(value))
