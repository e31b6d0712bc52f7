"""Secrets taken out of what people and MLflow get to see: errors, logs, parameters, pages."""

from __future__ import annotations

import os
import re

MASK = "***"
# user:password@ of an address, and the parameters of one that are keys or signatures.
_USERINFO = re.compile(r"(?<=://)[^/\s@:'\"]*:[^/\s@'\"]+(?=@)")
_PARAMETER = re.compile(
    r"([?&][\w.%-]*(?:token|secret|signature|password|passwd|credential|api_?key|access_?key|\bsig)[\w.%-]*=)[^&\s'\"]+",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_FEWEST_SIGNS = 8  # of a variable's value: a shorter one may be a word, and one that begins with / is a file's path


def masked(text: str) -> str:
    """`text` without passwords and keys: those in addresses, and the values of variables that are named as such."""
    for name, value in os.environ.items():
        is_secret = len(value) >= _FEWEST_SIGNS and _VARIABLE.search(name) and not value.startswith("/")
        if is_secret and value in text:
            text = text.replace(value, MASK)
    return _PARAMETER.sub(rf"\1{MASK}", _USERINFO.sub(MASK, text))


def holds_password(uri: str) -> bool:
    """Whether an address holds a password."""
    return _USERINFO.search(uri) is not None
