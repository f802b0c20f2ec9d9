"""How what a .proto names is named in Python."""

from __future__ import annotations

import keyword
import re

# A capital begins a word after a small letter, and before one unless that is the s of a plural (`ListIDs`).
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z](?!s(?![a-z]))[a-z])")


def python_name(method: str) -> str:
    """Name of the Python method for an rpc: `CloseIO` is `close_io`, `ResizePty` is `resize_pty`, and `Import`, which would be a
    keyword, is `import_`.
    """
    name = _WORDS.sub("_", method).lower()
    return name + "_" if keyword.iskeyword(name) else name
