"""What keeps the page safe: a strict policy, inert script text, and data that cannot end its block.

Tokens come from whatever text was examined, model names and notes from saved files; none of them is
trusted. Jinja2 escapes everything that is shown as HTML; the functions here look after the rest.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

# What may not appear between script tags, as the HTML standard says; U+2028 and U+2029 would end a
# line if the data were ever read as a script.
_MARKUP = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def script_text(source: str) -> Markup:
    """A trusted script as it may stand between script tags.

    ``</script`` and ``<!--`` would change how the HTML parser reads what follows. Scripts have them
    in strings and regular expressions only, where ``\\x3C`` means the same character.
    """
    unix = source.replace("\r\n", "\n").replace("\r", "\n")  # as the parser will read, and hash, it
    return Markup(re.sub(r"<(?=/script|!--)", r"\\x3C", unix, flags=re.IGNORECASE))


def json_text(value: Any) -> Markup:
    """JSON as it may stand in ``<script type="application/json">``, whatever its strings hold."""
    compact = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(compact.translate(_MARKUP))


def content_policy(scripts: Iterable[str]) -> str:
    """A policy that runs exactly these inline scripts and lets nothing leave or enter the page.

    Styles may be inline because Plotly and CircuitsVis write them.
    """
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
