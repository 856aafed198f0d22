"""`/openapi.json`, made from the same table of routes as the application.

It describes the routes and checks nothing.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from http import HTTPStatus
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from bkpool import __version__
from bkpool.api.audit import AuditTrail
from bkpool.api.models import NAME_PATTERN, ErrorAnswer

_STATUS_DESCRIPTIONS = {
    HTTPStatus.BAD_REQUEST: "The request is not valid; the error names the field",
    HTTPStatus.UNAUTHORIZED: "There is not exactly one bearer token, or it is not accepted; the error says why",
    HTTPStatus.FORBIDDEN: "The caller may not use this pool, or the pool does not exist; the error says why",
    HTTPStatus.NOT_FOUND: "There is no such pool or lease, or the lease is not the caller's",
    HTTPStatus.CONFLICT: "Others change the same object all the time, or it is not this appliance's to delete",
    HTTPStatus.GONE: "The lease has ended; the error says how",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is too large",
    HTTPStatus.TOO_MANY_REQUESTS: "A limit of the pool is reached (spec.auth.limits); the error names it",
    HTTPStatus.BAD_GATEWAY: "The worker does not come up; the error has the end of buildkitd's log",
    HTTPStatus.INSUFFICIENT_STORAGE: "The disk of the appliance is full; the error names the file system",
    HTTPStatus.SERVICE_UNAVAILABLE: "No worker became free in time, or the store does not answer",
}
_Model = tuple[type[BaseModel], Literal["validation", "serialization"]]
_RETRY = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})


class Bearer(Enum):
    """Whether a route needs an Authorization header."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    """A lease's token in the body can take its place."""
    NONE = "none"

    @property
    def security(self) -> list[dict[str, list[str]]]:
        """The `security` of an OpenAPI operation."""
        bearer: dict[str, list[str]] = {"bearer": []}
        return {Bearer.REQUIRED: [bearer], Bearer.OPTIONAL: [{}, bearer], Bearer.NONE: []}[self]


@dataclass(frozen=True, slots=True)
class ApiRoute:
    """One route. The docstring of its handler is its summary in `/openapi.json`."""

    method: str
    path: str
    handler: Callable[[web.Request, AuditTrail], Awaitable[BaseModel | web.StreamResponse]]
    """Returns the body of the answer, or the response if it was sent already (`answering.send_now`)."""
    body: type[BaseModel] | None
    answer: type[BaseModel]
    bearer: Bearer = Bearer.REQUIRED
    action: str = ""
    """Its name in the audit trail; empty if the route decides nothing."""
    errors: tuple[int, ...] = ()
    """Statuses of its errors, without those that follow from its body and bearer."""

    @property
    def all_errors(self) -> list[HTTPStatus]:
        """Every error status that a client should handle."""
        found = set(self.errors)
        found |= {400, 413} if self.body else set()
        found |= {401, 503} if self.bearer is Bearer.REQUIRED else set()
        found |= {403} if self.bearer is Bearer.REQUIRED and self.action != "pools" else set()
        return sorted(HTTPStatus(status) for status in found)


def document(routes: Sequence[ApiRoute]) -> dict[str, Any]:
    """The OpenAPI 3.1 description of these routes."""
    models: list[_Model] = [(ErrorAnswer, "serialization")]
    models += [(route.body, "validation") for route in routes if route.body]
    models += [(route.answer, "serialization") for route in routes]
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "bkpool", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": _schemas(tuple(models)),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An ID token of a configured issuer, a Kubernetes token, or the admin's token",
                }
            },
        },
    }


@cache
def _schemas(models: tuple[_Model, ...]) -> dict[str, Any]:
    """The JSON schemas of these models, made once: it takes 50 ms, and a process may make several applications."""
    _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = definitions.get("$defs", {})
    return schemas


def _operation(route: ApiRoute) -> dict[str, Any]:
    errors = {str(status.value): _error(status) for status in route.all_errors}
    operation: dict[str, Any] = {
        "summary": (route.handler.__doc__ or "").strip(),
        "responses": {
            "200": _content("Done", route.answer),
            **errors,
            "default": _content("Another error", ErrorAnswer),
        },
        "security": route.bearer.security,
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, **_content("", route.body)}
        del operation["requestBody"]["description"]
    names = re.findall(r"{(\w+)}", route.path)
    name = {"type": "string", "pattern": NAME_PATTERN}
    parameters = [{"name": field, "in": "path", "required": True, "schema": name} for field in names]
    if names:
        parameters.append({"name": "namespace", "in": "query", "required": False, "schema": name})
        operation["parameters"] = parameters
    return operation


def _error(status: HTTPStatus) -> dict[str, Any]:
    response = _content(_STATUS_DESCRIPTIONS[status], ErrorAnswer)
    if status in _RETRY:
        when = {"description": "Seconds to wait before a new attempt", "schema": {"type": "integer"}}
        response["headers"] = {"Retry-After": when}
    return response


def _content(description: str, model: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"description": description, "content": {"application/json": {"schema": reference}}}
