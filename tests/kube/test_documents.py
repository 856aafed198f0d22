"""What an API server sends becomes documents without managedFields, and with everything else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.kube.deep_documents import TOO_DEEP
from bkpool.kube.documents import document, text_without_managed_fields, without_managed_fields

ODD = [
    '}],"name":"',
    '"}]},"spec":{"',
    'x}]},"a',
    "\\",
    '"',
    "}]",
    '},"managedFields":[{"manager":"x"}],"name":"y"',
    ',"managedFields":[{"',
]
TEXT = st.one_of(st.sampled_from(ODD), st.text(max_size=8))


def written(fields: dict) -> list[dict]:
    """managedFields as an API server sends them for its own kinds."""
    entry = {"manager": "bkpool", "operation": "Update", "apiVersion": "v1", "time": "2030-01-01T00:00:00Z"}
    return [
        {**entry, "fieldsType": "FieldsV1", "fieldsV1": fields},
        {**entry, "fieldsV1": {}, "subresource": "status"},
    ]


def custom(name: str, fields: dict, spec: object) -> dict:
    """A custom resource: the API server sorts all of its fields."""
    metadata = {"creationTimestamp": "x", "labels": {"a": name}, "managedFields": written(fields), "name": name}
    return {"apiVersion": "g/v1", "kind": "K", "metadata": metadata, "spec": spec}


def built_in(name: str, fields: dict, spec: object) -> dict:
    """A pod: managedFields are the last of the metadata."""
    metadata = {"name": name, "uid": "u", "annotations": {"a": name}, "managedFields": written(fields)}
    return {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": spec}


def sent(doc: dict, *, is_sorted: bool) -> bytes:
    return json.dumps(doc, sort_keys=is_sorted, separators=(",", ":"), ensure_ascii=False).encode()


def plain(doc: dict) -> dict:
    return {**doc, "metadata": {name: value for name, value in doc["metadata"].items() if name != "managedFields"}}


FIELDS = st.dictionaries(TEXT.map("f:".__add__), st.just({}), max_size=4).map(lambda inner: {"f:spec": inner})


@given(TEXT, FIELDS, st.dictionaries(TEXT, TEXT, max_size=4))
def test_only_the_managed_fields_are_left_out_whatever_the_texts_are(name, fields, spec):
    for make, is_sorted in ((custom, True), (built_in, False)):
        doc = make(name, fields, spec)
        raw = sent(doc, is_sorted=is_sorted)
        assert without_managed_fields(document(raw)) == plain(doc)
        event = b'{"type":"MODIFIED","object":' + raw + b"}\n"
        assert document(event)["object"] == plain(doc), "they cost no objects"
        assert b'"manager":"bkpool"' not in text_without_managed_fields(raw)


@given(st.lists(st.tuples(TEXT, FIELDS), max_size=4))
def test_every_object_of_a_list_is_rid_of_them(items):
    for make, is_sorted in ((custom, True), (built_in, False)):
        docs = [make(name, fields, {}) for name, fields in items]
        raw = sent({"kind": "List", "metadata": {"resourceVersion": "7"}, "items": docs}, is_sorted=is_sorted)
        assert document(raw)["items"] == [plain(doc) for doc in docs]


@pytest.mark.parametrize(
    "doc",
    [
        {"metadata": {"name": "x", "annotations": {"a": ',"managedFields":[{"manager":"x"}],"name":"y'}}},
        {"metadata": {"name": "x", "managedFields": []}},
        {"metadata": {"name": "x", "managedFields": None}},
        {"metadata": {"name": "x"}, "spec": {"managedFields": ["mine"]}},
    ],
)
def test_what_is_not_certain_to_be_managed_fields_stays(doc):
    raw = sent(doc, is_sorted=False)
    assert text_without_managed_fields(raw) == raw
    assert document(raw) == doc


def test_they_are_found_at_the_end_of_an_object_too():
    doc = {"metadata": {"name": "x", "managedFields": written({})}}
    assert without_managed_fields(document(sent(doc, is_sorted=False))) == plain(doc)


@given(TEXT, st.integers(181, 300))
def test_only_the_field_that_is_too_deep_becomes_a_text(name, levels):
    raw = sent(custom(name, {}, "HERE"), is_sorted=True).replace(
        b'"HERE"', b'[{"a":' * levels + b"1" + b"}]" * levels
    )
    whole = {**plain(custom(name, {}, {})), "spec": TOO_DEEP}
    assert without_managed_fields(document(raw)) == whole
    assert document(b'{"type":"MODIFIED","object":' + raw + b"}\n") == {"type": "MODIFIED", "object": whole}
    other = sent(custom("other", {}, name), is_sorted=True)
    listing = document(b'{"items":[' + other + b"," + raw + b"," + other + b'],"metadata":{}}')
    assert listing["items"] == [plain(custom("other", {}, name)), whole, plain(custom("other", {}, name))]


def test_what_is_no_json_is_an_error():
    with pytest.raises(ValueError, match="EOF"):
        document(b'{"type":')
