"""A process does not read again what it has written itself, and reads everything else."""

from __future__ import annotations

import copy

import pytest

from bkpool.core.pool import Pool
from bkpool.core.unreadable import UnreadableObject
from bkpool.core.worker import Worker
from bkpool.store.own_writes import MOST, OwnWrites


def a_pool(number=0, version=1):
    metadata = {"name": f"p{number}", "namespace": "default", "uid": f"u{number}", "resourceVersion": str(version)}
    return {"apiVersion": "buildkit.smrt-devops.net/v1alpha1", "kind": "BuildKitPool", "metadata": metadata}


def test_the_same_document_is_the_same_object():
    own = OwnWrites()
    written = own.read(Pool, a_pool())
    assert own.object_of(Pool, a_pool()) is written
    assert own.object_of(Worker, a_pool()) is None


@pytest.mark.parametrize("other", [a_pool(version=2), a_pool(1), {**a_pool(), "status": {"idle": 1}}, {}])
def test_another_document_is_read(other):
    own = OwnWrites()
    own.read(Pool, a_pool())
    assert own.object_of(Pool, other) is None


def test_the_last_write_counts():
    own = OwnWrites()
    own.read(Pool, a_pool())
    last = own.read(Pool, a_pool(version=2))
    assert own.object_of(Pool, a_pool()) is None
    assert own.object_of(Pool, a_pool(version=2)) is last


def test_what_cannot_be_read_is_not_remembered():
    own, wrong = OwnWrites(), {**a_pool(), "spec": {"scaling": {"max": "x"}}}
    with pytest.raises(UnreadableObject):
        own.read(Pool, wrong)
    assert own.object_of(Pool, copy.deepcopy(wrong)) is None


def test_the_number_of_objects_has_a_bound():
    own = OwnWrites()
    for number in range(MOST + 1):
        own.read(Pool, a_pool(number))
    assert own.object_of(Pool, a_pool(0)) is None
    assert own.object_of(Pool, a_pool(1)) is not None
