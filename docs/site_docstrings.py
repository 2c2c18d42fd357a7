"""Docstrings as the API reference shows them: their few marks of reStructuredText become Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Marks(Extension):
    """Turn ``::`` before an example into a colon, and roles, such as ``:class:`~atdiag.core.spec.Data```, into code."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rewrite an object's docstring, as soon as it is read."""
        if obj.docstring:
            text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"(\S)::(?=\s*\n)", r"\1:", text)
