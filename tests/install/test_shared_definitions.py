"""Installations of different versions share one set of definitions: the older one takes nothing away."""

from __future__ import annotations

import copy
from functools import cache

import pytest

from bkpool.core.errors import NotFound
from bkpool.install import crds

ESTABLISHED = {"conditions": [{"type": "Established", "status": "True"}]}


class Served:
    """An API server that has some definitions."""

    def __init__(self, definitions) -> None:
        self.definitions = {doc["metadata"]["name"]: doc for doc in definitions}
        self.applied: list[str] = []

    async def get(self, path):
        name = path.rpartition("/")[2]
        if name not in self.definitions:
            raise NotFound(name)
        return {**self.definitions[name], "status": ESTABLISHED}

    async def apply(self, path, definition):
        self.applied.append(path.rpartition("/")[2])
        return {**definition, "status": ESTABLISHED}


parsed = cache(crds.definitions)


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """The names of the definitions, which are parsed once for all tests: it takes half a second."""
    monkeypatch.setattr(crds, "definitions", parsed)
    return [definition["metadata"]["name"] for definition in parsed()]


def worker_spec(definition):
    return definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]


@pytest.fixture
def newer():
    """The definitions of a later version: with one more field, another text, and what the server adds."""
    found = copy.deepcopy(crds.definitions())
    for definition in found:
        spec = worker_spec(definition)
        spec["description"] = "Written anew."
        spec["properties"]["later"] = {"type": "string"}
        definition["spec"]["conversion"] = {"strategy": "None"}
    return found


async def test_missing_definitions_are_applied(names):
    server = Served([])
    await crds.install(server)
    assert server.applied == names


async def test_a_definition_that_has_everything_is_left_alone(newer):
    server = Served(newer)
    await crds.install(server)
    assert server.applied == []


async def test_an_older_definition_gets_the_new_fields(newer, names):
    older = copy.deepcopy(newer)
    for definition in older:
        properties = worker_spec(definition)["properties"]
        del properties[next(iter(properties))]
    server = Served(older)
    await crds.install(server)
    assert server.applied == names


async def test_a_bound_that_differs_is_applied(names):
    live = copy.deepcopy(crds.definitions())
    name = live[1]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["poolRef"]
    name["properties"]["name"]["maxLength"] = 7
    server = Served(live)
    await crds.install(server)
    assert server.applied == [names[1]]


@pytest.mark.parametrize(
    "stricter",
    [
        {"required": ["poolRef", "audience"]},
        {"minProperties": 1},
        {"x-kubernetes-validations": [{"rule": "has(self.audience)"}]},
    ],
)
async def test_an_older_definition_that_is_stricter_is_replaced(stricter, names):
    live = copy.deepcopy(crds.definitions())
    worker_spec(live[1]).update(stricter)
    server = Served(live)
    await crds.install(server)
    assert server.applied == [names[1]]


@pytest.mark.parametrize(
    ("live", "wanted", "has"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"columns": [{"name": "a", "priority": 0}]}, {"columns": [{"name": "a"}]}, True),
        ({"columns": []}, {"columns": [{"name": "a"}]}, False),
    ],
)
def test_what_counts_as_everything(live, wanted, has):
    assert crds.covers(live, wanted) is has


TEXT = {"type": "string"}


@pytest.mark.parametrize(
    ("live", "wanted", "has"),
    [
        ({**TEXT, "enum": ["x", "y"]}, {**TEXT, "enum": ["y"]}, True),
        ({**TEXT, "enum": ["x"]}, {**TEXT, "enum": ["x", "y"]}, False),
        ({**TEXT, "enum": ["x"]}, TEXT, False),
        (TEXT, {**TEXT, "enum": ["x"]}, False),
        ({**TEXT, "description": "old"}, {**TEXT, "description": "new"}, True),
        (TEXT, {**TEXT, "description": "new"}, True),
        ({"properties": {}}, {"properties": {"description": TEXT}}, False),
        (
            {"properties": {"a": TEXT, "b": TEXT}, "required": []},
            {"properties": {"a": TEXT}, "required": ["a"]},
            True,
        ),
        ({"properties": {"a": TEXT}, "required": ["a"]}, {"properties": {"a": TEXT}}, False),
        ({**TEXT, "maxLength": 63}, TEXT, False),
        ({"items": {**TEXT, "pattern": "x"}}, {"items": TEXT}, False),
        ({"items": {"properties": {"a": TEXT, "b": TEXT}}}, {"items": {"properties": {"a": TEXT}}}, True),
    ],
)
def test_a_schema_may_have_more_fields_and_values_but_not_be_stricter(live, wanted, has):
    assert crds.covers({"schema": {"openAPIV3Schema": live}}, {"schema": {"openAPIV3Schema": wanted}}) is has
