"""Every route of the OpenAPI description, with whatever it allows and much that it does not: no answer of 500.

The replica and the trainer behind it are the real ones, on a tiny model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from serve_tools import real_web_of, token_of
from tiny import tiny_base

from serve.messages import INTERNAL_ERROR

_folder = tempfile.TemporaryDirectory(prefix="oppu-test-")
BACKEND, CLIENT = real_web_of(Path(_folder.name), tiny_base(Path(_folder.name) / "base"))
schema = schemathesis.openapi.from_asgi("/openapi.json", CLIENT(None).app)
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


def call(case: Any) -> None:
    role = "operator" if case.path.startswith(("/v1/admin", "/metrics")) else "user"
    user = None if role == "operator" else "ann"
    if user:
        BACKEND.vault.add_users([user])  # whom the case before may have forgotten
    headers = {"Authorization": f"Bearer {token_of(BACKEND.vault, user, role)}"}
    response = case.call(headers=headers)
    assert response.status_code < 500, f"{case.method} {case.path}: {response.status_code}"
    if response.status_code >= 400:
        assert response.json()["error"]["message"] and _folder.name not in response.text
    if response.content.startswith(b"data: "):
        assert response.content.endswith(b"data: [DONE]\n\n") and b'"error"' not in response.content
    BACKEND.replica.loop.check()
    assert INTERNAL_ERROR.message not in BACKEND.trainer.status(BACKEND.vault.user_hash("ann")).error


@schema.parametrize()
@settings(max_examples=3, phases=[Phase.generate], **RELAXED)
def test_whatever_the_schema_allows_is_answered_or_refused(case: Any) -> None:
    call(case)


@pytest.mark.chaos
@schema.parametrize()
@settings(max_examples=200, **RELAXED)
def test_the_same_for_long(case: Any) -> None:
    call(case)
