"""What lm-eval and its libraries raise for data that a task cannot use."""

from __future__ import annotations

import datasets
from jinja2.exceptions import TemplateError

# Schemas, columns and templates that do not fit; prompts that cannot be made of them.
DATA_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    TemplateError,
    datasets.exceptions.DatasetsError,
)


def first_line(error: Exception) -> str:
    """Return the error's kind and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
