"""`/openapi.json`, made from the same table of routes that the application is made from.

It describes; it checks nothing.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from bkpool import __version__
from bkpool.api.models import ErrorAnswer


@dataclass(frozen=True, slots=True)
class Route:
    """One route: its handler's docstring is its summary."""

    method: str
    path: str
    handler: Callable[[web.Request], Awaitable[BaseModel]]
    body: type[BaseModel] | None
    answer: type[BaseModel]
    open: bool = False
    """Whether no Authorization header is asked for (the token in the body is the right to ask)."""


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 description of these routes."""
    models: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [(ErrorAnswer, "serialization")]
    models += [(route.body, "validation") for route in routes if route.body]
    models += [(route.answer, "serialization") for route in routes]
    _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "bkpool", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": (route.handler.__doc__ or "").strip(),
        "responses": {"200": _content("Done", route.answer), "default": _content("An error", ErrorAnswer)},
        "security": [] if route.open else [{"bearer": []}],
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, **_content("", route.body)}
        del operation["requestBody"]["description"]
    names = re.findall(r"{(\w+)}", route.path)
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    if names:
        parameters.append({"name": "namespace", "in": "query", "required": False, "schema": {"type": "string"}})
        operation["parameters"] = parameters
    return operation


def _content(description: str, model: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"description": description, "content": {"application/json": {"schema": reference}}}
