"""The web application: routes, guards, the page at `/`, a plain reference at `/docs`, and `/metrics`.

In: a `Backend` and the run's config. Out: a FastAPI app; `serve.app` puts it behind Ray Serve, tests call it directly.
A reader might question a reference page of our own: FastAPI's loads its scripts from another site, which a page that
handles tokens must not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles

from oppu_ray import __version__
from oppu_ray.config import Config
from oppu_ray.registry import Token
from serve.account import admin, me
from serve.api import router
from serve.guard import Bounds, Guard, add_error_handlers, signed_in
from serve.messages import Backend

STATIC = Path(str(files("serve"))) / "static"


def create_web(backend: Backend, config: Config, count: Callable[[str, int], None]) -> FastAPI:
    """The application.

    Args:
        count: Called with (route, status) of every response.
    """
    # A redirect to the path with a slash would echo the Host header, and fails for a query that is not UTF-8.
    app = FastAPI(title="oppu-ray", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.backend, app.state.config = backend, config
    app.state.bounds = Bounds(config, backend.vault)
    app.add_middleware(Guard, backend=backend, bounds=app.state.bounds, count=count)
    add_error_handlers(app)
    for part in (router, me, admin):
        app.include_router(part)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    reference = cache(lambda: HTMLResponse(_reference(app.openapi())))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return reference()

    @app.get("/metrics", tags=["operator"], response_class=PlainTextResponse)
    async def metrics(request: Request, token: Annotated[Token, Depends(signed_in("reader", "operator"))]) -> str:
        """The service's metrics in Prometheus' text format."""
        return await backend.metrics()

    return app


def _reference(openapi: dict[str, Any]) -> str:
    """The OpenAPI description as a page."""
    parts = []
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
            schema = content.get("schema", {})
            fields = openapi["components"]["schemas"].get(schema.get("$ref", "").rsplit("/", 1)[-1], schema)
            rows = "".join(
                f"<tr><td><code>{escape(field)}</code></td><td>{escape(_kind(schema))}</td></tr>"
                for field, schema in fields.get("properties", {}).items()
            )
            table = f"<p>{escape(fields.get('description', ''))}</p><table>{rows}</table>" if rows else ""
            text = escape(route.get("description", ""))
            parts.append(f"<section><h2>{method.upper()} {escape(path)}</h2><p>{text}</p>{table}</section>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>oppu-ray: HTTP reference</title>'
        '<link rel="stylesheet" href="/static/page.css"><main><h1>HTTP reference</h1>'
        "<p>Every route takes <code>Authorization: Bearer &lt;token&gt;</code>. For programs: "
        f'<a href="/openapi.json">openapi.json</a>.</p>{"".join(parts)}</main></html>'
    )


def _kind(schema: dict[str, Any]) -> str:
    """A field's type in a word or two."""
    options = schema.get("anyOf", [schema])
    names = [one.get("type") or one.get("$ref", "").rsplit("/", 1)[-1] or "constant" for one in options]
    default = f", default {schema['default']!r}" if schema.get("default") is not None else ""
    return " or ".join(name for name in names if name != "null") + default
