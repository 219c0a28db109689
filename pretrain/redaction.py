"""Secrets are kept out of everything that is shown or written: messages, tracebacks, run.json, manifests."""

from __future__ import annotations

import os
import re

SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)(?:_|$)", re.IGNORECASE)
SHORTEST = 8  # characters of an environment variable's value that is looked for: shorter ones are flags and names


def without_secrets(text: str) -> str:
    """The text without users, passwords and queries of URLs, and *** for the value of each variable named as a secret.

    A query may be a signature; a password may hold @, so all before the last @ of a host goes.
    """
    text = re.sub(r"(\w:/{1,2})[^/\s'\"]*@", r"\1", text)  # one slash in what was taken for a path
    text = re.sub(r"(\w:/{1,2}[^?\s'\"]*)\?[^\s'\"]*?(?=[:;,.]?(?:[\s'\"]|$))", r"\1", text)
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text
