"""How much of a build step's output is shown, as the pool's spec says."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from bkpool.workers.pods import pod_spec
from bkpool.workers.pods.pod_spec import ROOTLESS_IMAGE, PodRequest, pod_digest
from bkpool.workers.step_log import step_log_environment
from support.objects import pool, slot


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("unlimited", "-1"),
        ("10B", "10"),
        ("1.5kB", "1536"),
        ("200KiB", "204800"),
        ("10MB", "10485760"),
        ("1 G", "1073741824"),
        ("99GB", "2147483647"),
    ],
)
def test_sizes_are_those_of_buildkitd_toml_and_fit_the_number_that_buildkit_reads(given, wanted):
    spec = pool(stepLog={"maxSize": given}).spec
    assert step_log_environment(spec) == {"BUILDKIT_STEP_LOG_MAX_SIZE": wanted}


def test_each_field_stands_for_itself_and_none_is_set_by_default():
    assert step_log_environment(pool().spec) == {}
    assert step_log_environment(pool(stepLog={"maxSpeed": "1MB"}).spec) == {"BUILDKIT_STEP_LOG_MAX_SPEED": "1048576"}


@pytest.mark.parametrize("wrong", ["10", "10%", "-1", "lots", "10TB"])
def test_another_value_is_refused(wrong):
    with pytest.raises(ValidationError):
        pool(stepLog={"maxSize": wrong})


def test_a_pod_has_them_in_its_environment_and_another_digest():
    limited = pool(stepLog={"maxSize": "unlimited"})
    made = pod_spec.pod(PodRequest(slot(0), "uid-1", None, limited, ROOTLESS_IMAGE))
    (container,) = made["spec"]["containers"]
    assert {"name": "BUILDKIT_STEP_LOG_MAX_SIZE", "value": "-1"} in container["env"]
    assert pod_digest(limited, ROOTLESS_IMAGE, "") != pod_digest(pool(), ROOTLESS_IMAGE, "")
