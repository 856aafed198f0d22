from __future__ import annotations

import tomllib
from datetime import timedelta

import pytest

from bkpool.core.errors import WorkerFailed
from bkpool.core.pool import Cache, CacheGC, PoolSpec
from bkpool.workers.config import render


def oci(**gc) -> dict[str, object]:
    text = render(PoolSpec(cache=Cache(gc=CacheGC(**gc))))
    assert "gckeepstorage" not in text.lower()
    return tomllib.loads(text)["worker"]["oci"]


def test_every_size_has_a_unit_also_without_settings_of_the_pool():
    assert oci() == {
        "gc": True,
        "reservedSpace": "1GB",
        "maxUsedSpace": "10GB",
        "minFreeSpace": "5GB",
    }


def test_buildkitd_gets_the_settings_of_the_pool():
    written = oci(keep_storage="20 GB", reserved_space="2GiB", min_free_space="10 %")
    assert (written["maxUsedSpace"], written["reservedSpace"], written["minFreeSpace"]) == ("20GB", "2GiB", "10%")


def test_with_a_small_maximum_there_is_no_default_reserve():
    assert "reservedSpace" not in oci(keep_storage="500MB")


def test_collection_by_age_comes_before_collection_by_size():
    by_age, by_size, internal = oci(keep_duration=timedelta(hours=36), keep_storage="3GB")["gcpolicy"]
    assert by_age == {"all": True, "keepDuration": "36h"}
    assert by_size == {"maxUsedSpace": "3GB", "minFreeSpace": "5GB"}
    assert internal == {"all": True, **by_size}


OPERATORS = CacheGC(keep_storage="40%", reserved_space="3 GB", min_free_space="7GB", keep_duration=timedelta(hours=5))


def operators(**gc) -> dict[str, object]:
    text = render(PoolSpec(cache=Cache(gc=CacheGC(**gc))), OPERATORS)
    return tomllib.loads(text)["worker"]["oci"]


def test_the_operators_defaults_apply_where_the_pool_says_nothing():
    sizes = {"maxUsedSpace": "40%", "reservedSpace": "3GB", "minFreeSpace": "7GB"}
    by_age, by_size, _ = operators()["gcpolicy"]
    assert (by_age["keepDuration"], by_size) == ("5h", sizes)
    assert operators(min_free_space="1GB")["gcpolicy"][1] == sizes | {"minFreeSpace": "1GB"}
    assert operators(keep_storage="9GB")["gcpolicy"][1] == {"maxUsedSpace": "9GB", "minFreeSpace": "7GB"}
    assert operators(keep_duration=timedelta(hours=1))["gcpolicy"][0]["keepDuration"] == "1h"
    assert operators(enabled=False) == {"gc": False}


def test_a_pool_may_say_that_the_age_does_not_matter():
    assert "gcpolicy" not in operators(keep_duration=timedelta())
    assert "gcpolicy" not in oci(keep_duration=timedelta())


def test_collection_can_be_switched_off():
    assert oci(enabled=False) == {"gc": False}


def test_a_file_of_the_user_is_used_as_it_is():
    own = '# mine\n[registry."docker.io"]\nmirrors = ["mirror.example"]\n'
    assert render(PoolSpec(buildkit_config=own)) == own


def test_tls_on_a_workers_socket_is_refused_with_the_field():
    with pytest.raises(WorkerFailed, match=r"\[grpc.tls\]") as failure:
        render(PoolSpec(buildkit_config='[grpc.tls]\ncert = "x"'))
    assert failure.value.field == "spec.buildkitConfig"


def test_an_untrusted_pools_builds_get_no_more_rights():
    own = 'insecure-entitlements = ["security.insecure"]\n'
    assert render(PoolSpec(buildkit_config=own)) == own
    with pytest.raises(WorkerFailed, match="untrusted pool") as failure:
        render(PoolSpec(buildkit_config=own, untrusted=True))
    assert failure.value.field == "spec.buildkitConfig"
