"""`/openapi.json`: made of the routes and the very types that validate and serialise. Any key reads it."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from api import errors
from api.http import COMMON_ERRORS, Call, Param, Reply, Route
from peer.version import VERSION

_REF = "#/components/schemas/{name}"
_SEGMENT = re.compile(r"{(\w+)}")
ID_SCHEMA = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._:@-]*$", "minLength": 1, "maxLength": 128}

MEANINGS = {
    400: "Bad Request - invalid parameters",
    401: "Unauthorized - missing or invalid API key, or one without the scope",
    404: "Not Found - resource not found",
    405: "Method Not Allowed",
    409: "Conflict - resource conflict",
    413: "Payload Too Large",
    415: "Unsupported Media Type",
    429: "Too Many Requests - rate limit exceeded",
    500: "Internal Server Error",
    503: "Service Unavailable - cluster overloaded",
}

RATE_HEADERS = {
    "X-RateLimit-Limit": "Requests in the window that is nearest to its limit",
    "X-RateLimit-Remaining": "Requests left in it",
    "X-RateLimit-Reset": "Seconds until it is empty again",
}


def statuses_of(route: Route) -> list[int]:
    """Every error that the route can answer with."""
    found = {*route.errors, 400, 500, 503}
    if route.scope is not None:
        found |= {401, 429}
    if route.body is not None:
        found |= {413, 415}
    if "{" in route.path:
        found.add(404)
    return sorted(found)


def _parameter(param: Param, place: str, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": param.name,
        "in": place,
        "required": False,
        "description": param.description,
        "schema": schemas[id(param)],
    }


def _responses(route: Route, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    headers: dict[str, Any] = {"X-Request-ID": {"$ref": "#/components/headers/X-Request-ID"}}
    if route.scope is not None:
        headers |= {name: {"$ref": f"#/components/headers/{name}"} for name in RATE_HEADERS}
    answer: dict[str, Any] = {"description": "Success", "headers": dict(headers)}
    for param in route.response_headers:
        answer["headers"][param.name] = {"description": param.description, "schema": schemas[id(param)]}
    if route.answer is not None and route.status != 101:
        answer["content"] = {route.content_type: {"schema": schemas[id(route)]}}
    elif route.content_type != "application/json":
        answer["content"] = {route.content_type: {}}  # what it is, the route's description says
    responses = {str(route.status): answer}
    for status in statuses_of(route):
        responses[str(status)] = {"$ref": f"#/components/responses/{status}"}
    return responses


def _operation(route: Route, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"$ref": _REF.format(name="Id")}}
        for name in _SEGMENT.findall(route.path)
    ]
    parameters += [_parameter(param, "query", schemas) for param in route.query]
    parameters += [_parameter(param, "header", schemas) for param in route.headers]
    parameters.append({"$ref": "#/components/parameters/RequestId"})
    operation: dict[str, Any] = {
        "operationId": route.handler.__module__.rpartition(".")[2] + "." + route.handler.__name__,
        "summary": route.summary,
        "description": " ".join(
            (route.description, f"Scope: {route.scope}." if route.scope else "No key needed.")
        ).strip(),
        "parameters": parameters,
        "responses": _responses(route, schemas),
        "security": [{"bearer": []}] if route.scope is not None else [],
    }
    if route.body is not None:
        content: dict[str, Any] = {"schema": schemas[id(route.body)]}
        if route.example is not None:
            content["example"] = route.example
        operation["requestBody"] = {
            "required": not route.body_optional,
            "content": {"application/json": content},
        }
    return operation


def _tighten(components: dict[str, Any]) -> None:
    """What msgspec's types cannot say but the handlers check, and what JSON Schema spells differently."""
    one_of = [
        {"type": "object", "required": [name], "properties": {name: {"type": type_}}}
        for name, type_ in (("prompt", "string"), ("messages", "array"))
    ]
    components["TextGeneration"]["oneOf"] = one_of
    for schema in components.values():
        _python_patterns(schema)


def _python_patterns(node: Any) -> None:
    """JSON Schema's regular expressions know `$`, not `\\Z`."""
    if isinstance(node, dict):
        if isinstance(node.get("pattern"), str):
            node["pattern"] = node["pattern"].replace(r"\Z", "$")
        for child in node.values():
            _python_patterns(child)
    elif isinstance(node, list):
        for child in node:
            _python_patterns(child)


def build(routes: tuple[Route, ...]) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    wanted: list[tuple[int, Any]] = [(0, errors.ErrorBody)]
    for route in routes:
        wanted += [
            (id(param), param.type) for param in (*route.query, *route.headers, *route.response_headers)
        ]
        if route.body is not None:
            wanted.append((id(route.body), route.body))
        if route.answer is not None:
            wanted.append((id(route), route.answer))
    made, components = msgspec.json.schema_components([type_ for _, type_ in wanted], ref_template=_REF)
    schemas: dict[Any, dict[str, Any]] = {key: schema for (key, _), schema in zip(wanted, made, strict=True)}
    _tighten(components)
    components["Id"] = dict(ID_SCHEMA)
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bitinglip",
            "version": VERSION,
            "description": "Peer-to-peer cluster manager for AMD GPU hosts.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "parameters": {
                "RequestId": {
                    "name": "X-Request-ID",
                    "in": "header",
                    "required": False,
                    "description": "Comes back in the answer and is in the logs, if it is of the form"
                    " [A-Za-z0-9][A-Za-z0-9._:-]{0,127}; else one is made up",
                    "schema": {"type": "string"},
                }
            },
            "headers": {
                "X-Request-ID": {"description": "The request's id", "schema": {"type": "string"}},
                "Retry-After": {"description": "Seconds", "schema": {"type": "integer"}},
            }
            | {
                name: {
                    "description": text + "; absent for a key without limits",
                    "schema": {"type": "integer"},
                }
                for name, text in RATE_HEADERS.items()
            },
            "responses": {
                str(status): _error_response(status) for status in sorted({*MEANINGS, *COMMON_ERRORS})
            },
        },
    }


def _error_response(status: int) -> dict[str, Any]:
    headers = {"X-Request-ID": {"$ref": "#/components/headers/X-Request-ID"}}
    if status in (429, 503):
        headers["Retry-After"] = {"$ref": "#/components/headers/Retry-After"}
    return {
        "description": MEANINGS[status],
        "headers": headers,
        "content": {"application/json": {"schema": {"$ref": _REF.format(name="ErrorBody")}}},
    }


async def openapi(call: Call) -> Reply:
    api = call.api
    if not api.openapi:
        api.openapi = msgspec.json.encode(build(api.router.routes))
    return Reply(api.openapi)


ROUTES = (Route("GET", "/openapi.json", openapi, "read", "This description", dict[str, Any]),)
