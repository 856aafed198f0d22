"""Makes many workers of a cluster out of one started worker of each pool, while no control replica runs.

To start 2,000 workers takes minutes, and is not what is measured. A copy has everything of its own: names, uids,
address and certificate; and it remembers as many leases as a worker that is used does. It decides nothing.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from bkpool.core.names import Key, Slot, slot_of
from bkpool.core.tokens import digest
from bkpool.core.worker import REMEMBERED_LEASES, EndedLease, EndReason, Worker
from bkpool.kube import paths
from bkpool.pki.bundle import ClusterSecrets
from bkpool.pki.pool_authority import PoolAuthorities

Doc = dict[str, Any]


def copies(
    documents: Iterable[Doc],
    secrets: Doc,
    each: int,
    next_address: Callable[[], str],
    next_version: Callable[[], int],
) -> Iterator[Doc]:
    """The objects of the workers that are missing for this many in each pool.

    Args:
        documents: All objects. The first worker of each pool has started.
        secrets: The Secret with the certificate authorities.
        each: How many workers each pool should have.
        next_address: The address of one more pod.
        next_version: The version of one more object.
    """
    authorities = PoolAuthorities(ClusterSecrets.of_data(_decoded(secrets)).backend)
    by_name: defaultdict[Key, list[Doc]] = defaultdict(list)
    for doc in documents:
        if doc["kind"] in {Worker.KIND, "Pod", "Secret"} and "namespace" in doc["metadata"]:
            by_name[paths.key_of(doc)].append(doc)
    for key, of_worker in by_name.items():
        if any(doc["kind"] == Worker.KIND for doc in of_worker):
            slot = slot_of(key)
            for number in range(1, each):
                copy = Slot(slot.namespace, slot.pool, number)
                for made in _copies(of_worker, slot, copy, authorities, next_address()):
                    made["metadata"]["resourceVersion"] = str(next_version())
                    yield made


def _copies(
    of_worker: list[Doc],
    slot: Slot,
    copy: Slot,
    authorities: PoolAuthorities,
    address: str,
) -> Iterator[Doc]:
    worker = next(doc for doc in of_worker if doc["kind"] == Worker.KIND)
    uid, now = str(uuid4()), datetime.now(UTC)
    changes = {
        slot.worker.name: copy.worker.name,
        worker["metadata"]["uid"]: uid,
        worker["status"]["podIP"]: address,
    }
    for doc in of_worker:
        text = json.dumps(doc)
        for before, after in changes.items():
            text = text.replace(before, after)
        made: Doc = json.loads(text)
        if doc["kind"] == Worker.KIND:
            _remember_leases(made, now)
        else:
            made["metadata"]["uid"] = str(uuid4())
        if doc["kind"] == "Secret":
            leaf = authorities.current(Key(slot.namespace, slot.pool)).issue_worker(uid, now)
            files = {"tls.crt": leaf.cert_pem, "tls.key": leaf.key_pem or b""}
            made["data"] |= {name: base64.b64encode(content).decode() for name, content in files.items()}
        yield made


def _remember_leases(worker: Doc, now: datetime) -> None:
    """Leases that have ended, where this version of bkpool keeps them."""
    part = worker["spec"] if "ended" in worker["spec"] else worker["status"]
    tokens = (f"{worker['metadata']['uid']}-{number}" for number in range(REMEMBERED_LEASES))
    ended = (EndedLease(token_sha256=digest(token), ended_at=now, reason=EndReason.RELEASED) for token in tokens)
    part["ended"] = [one.model_dump(mode="json", by_alias=True) for one in ended]


def _decoded(secret: Doc) -> dict[str, bytes]:
    return {name: base64.b64decode(content) for name, content in secret["data"].items()}
