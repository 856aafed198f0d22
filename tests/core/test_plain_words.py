"""What is wrong with a field is said in plain words, and not in those of the library that checks it."""

import json
import re

import pytest
from pydantic import ValidationError

from bkpool.api import models
from bkpool.api.models import AllocateBody, TokenBody
from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import InvalidInput
from bkpool.core.plain_words import PATTERNS
from bkpool.core.pool import Pool
from bkpool.core.resource import explain, parse_object
from bkpool.core.worker import Worker

SIZE = "must be a size such as 10GB, or a share of the disk such as 20%"
AMOUNT = "must be an amount as in Kubernetes, such as 500m, 2 or 4Gi"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"cache": {"gc": {"keepStorage": "much"}}}, f"spec.cache.gc.keepStorage: {SIZE} (given: 'much')"),
        ({"cache": {"gc": {"keepStorage": 5}}}, "spec.cache.gc.keepStorage: must be text (given: 5)"),
        ({"cache": {"gc": {"enabled": "no"}}}, "spec.cache.gc.enabled: must be true or false (given: 'no')"),
        ({"cache": {"reuse": "x"}}, "spec.cache.reuse: must be 'identity', 'pool' or 'never' (given: 'x')"),
        (
            {"cache": {"backends": [{"type": "x"}]}},
            "spec.cache.backends.0.type: must be 'registry', 's3' or 'local' (given: 'x')",
        ),
        ({"cache": {"backends": [{}]}}, "spec.cache.backends.0.type: is missing"),
        ({"cache": {"backends": 3}}, "spec.cache.backends: must be a list (given: 3)"),
        ({"cache": []}, "spec.cache: must be an object with fields"),
        ({"scaling": {"max": 0}}, "spec.scaling.max: must be at least 1 (given: 0)"),
        ({"scaling": {"max": 10_001}}, "spec.scaling.max: must be at most 10000 (given: 10001)"),
        ({"scaling": {"max": "3"}}, "spec.scaling.max: must be a whole number (given: '3')"),
        ({"scaling": {"max": 3.5}}, "spec.scaling.max: must be a whole number (given: 3.5)"),
        ({"scaling": {"min": 5, "max": 3}}, "spec.scaling: min (5) is greater than max (3)"),
        (
            {"scaling": {"max": 0}, "cache": []},
            "spec.scaling.max: must be at least 1 (given: 0), and 1 more",
        ),
        (
            {"networking": {"external": {"hostname": "a" * 300}}},
            f"spec.networking.external.hostname: must have at most 253 characters, and has 300 (given: '{'a' * 59})",
        ),
        (
            {"networking": {"external": {"hostname": "_"}}},
            "spec.networking.external.hostname: must be a DNS name or an IP address (given: '_')",
        ),
        (
            {"resources": {"buildkit": {"limits": {"cpu": "x"}}}},
            f"spec.resources.buildkit.limits.cpu: {AMOUNT} (given: 'x')",
        ),
        (
            {"resources": {"buildkit": {"limits": {"cpu": -1}}}},
            "spec.resources.buildkit.limits.cpu: must be at least 0 (given: -1)",
        ),
        (
            {"resources": {"buildkit": {"limits": {"cpu": []}}}},
            "spec.resources.buildkit.limits.cpu: must be a whole number or text",
        ),
        (
            {"gateway": {"tokenTTL": "0s"}},
            "spec.gateway.tokenTTL: must be more than 0s (given: '0s')",
        ),
        (
            {"auth": {"methods": [{"type": "oidc", "oidc": {"issuer": "", "audience": "a"}}]}},
            "spec.auth.methods.0.oidc.issuer: must not be empty (given: '')",
        ),
    ],
)
def test_a_wrong_field_of_a_pool_is_explained_in_plain_words(spec, message):
    with pytest.raises(InvalidInput) as caught:
        parse_object(Pool, {"metadata": {"name": "p"}, "spec": spec})
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"poolName": "p", "jobId": "x" * 500}, "jobId: must have at most 256 characters, and has 500"),
        (
            {"poolName": "p", "metadata": {str(n): "" for n in range(65)}},
            "metadata: must have at most 64 entries, and has 65",
        ),
        ({"poolName": "p", "colour": 1}, "colour: there is no such field"),
        ({}, "poolName: is missing"),
        ([], "the document: must be an object with fields"),
    ],
)
def test_a_wrong_field_of_a_request_is_explained_without_its_value(body, message):
    with pytest.raises(ValidationError) as caught:
        AllocateBody.model_validate(body, by_alias=True, by_name=False)
    assert explain(caught.value, show_value=False).message == message


def test_an_empty_text_is_called_empty():
    with pytest.raises(ValidationError) as caught:
        TokenBody.model_validate({"token": ""})
    assert explain(caught.value, show_value=False).message == "token: must not be empty"


def test_an_item_of_a_list_with_several_types_is_named_without_them():
    oidc = {"issuer": "https://x.example", "audience": "a", "conditions": [{"claim": "ref", "values": ["a", {}]}]}
    spec = {"auth": {"methods": [{"type": "oidc", "oidc": oidc}]}}
    with pytest.raises(InvalidInput) as caught:
        parse_object(Pool, {"metadata": {"name": "p"}, "spec": spec})
    field = "spec.auth.methods.0.oidc.conditions.0.values.1"
    assert caught.value.message == f"{field}: must be text or true or false or a whole number"


def test_every_pattern_of_a_model_has_a_meaning():
    kinds = [Pool, OIDCConfig, Worker, *(one for one in vars(models).values() if _is_body(one))]
    found = set()
    for kind in kinds:
        _collect(kind.__pydantic_core_schema__, found)
    assert found
    assert found <= PATTERNS.keys()


def _is_body(one):
    return isinstance(one, type) and issubclass(one, models.Body)


def _collect(schema, found):
    """The patterns in pydantic's own schema; that for OpenAPI has some more, which are only documentation."""
    text = json.dumps(schema, default=lambda _: None, skipkeys=True)
    found |= {json.loads(f'"{one}"') for one in re.findall(r'"pattern": "((?:[^"\\]|\\.)*)"', text)} - {
        f"^{models.DNS_LABEL}$",
        f"^$|^{models.DNS_LABEL}$",
    }
