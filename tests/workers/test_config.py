from __future__ import annotations

import re
import tomllib
from datetime import timedelta

import pytest

from bkpool.core.errors import WorkerFailed
from bkpool.core.pool import Cache, CacheGC, PoolSpec
from bkpool.workers.config import not_taken, render


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


@pytest.mark.parametrize(
    ("stored", "written"),
    [
        ("99999999TB", "512PB"),
        ("512.1PB", "512PB"),
        ("512 PiB", "512PiB"),
        ("9223372036854775808B", "512PB"),
        ("9" * 5000 + "kB", "512PB"),
        ("0." + "1" * 5000 + " GB", "0." + "1" * 5000 + "GB"),
        ("5PB", "5PB"),
        ("12.5%", "12%"),
        ("500 %", "100%"),
        ("9" * 30 + "%", "100%"),
    ],
)
def test_buildkitd_gets_no_size_that_it_cannot_hold(stored, written):
    """It would make a negative number of it and keep nothing, or not start."""
    sizes = oci(keep_storage=stored, reserved_space=stored, min_free_space=stored)
    assert {sizes[name] for name in ("maxUsedSpace", "reservedSpace", "minFreeSpace")} == {written}


@pytest.mark.parametrize("size", ["99999999TB", "12.5%", "101%"])
def test_a_size_of_the_pools_own_file_that_buildkitd_cannot_hold_is_not_taken(size):
    names = ("maxUsedSpace", "reservedSpace", "minFreeSpace")
    text = "[worker.oci]\n" + "".join(f'{name} = "{size}"\n' for name in names)
    gc = CacheGC(keep_storage="100%", min_free_space="1%") if "%" in size else CacheGC()
    spec = PoolSpec(buildkit_config=text, cache=Cache(gc=gc))
    assert not_taken(spec) == sorted(f"buildkitConfig.worker.oci.{name}" for name in names)
    assert size not in render(spec)


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


SIZES = {"reservedSpace": "1GB", "maxUsedSpace": "10GB", "minFreeSpace": "5GB"}


def merged(text: str, **spec) -> tuple[dict[str, object], list[str]]:
    """What a worker gets of a pool's own file, and what is named as not taken."""
    given = PoolSpec(buildkit_config=text, **spec)
    return tomllib.loads(render(given)), [path.removeprefix("buildkitConfig.") for path in not_taken(given)]


def test_a_mirror_in_the_users_file_leaves_everything_else_as_it_is():
    own = '# mine\n[registry."docker.io"]\nmirrors = ["mirror.example"]\n[worker.oci]\nmax-parallelism = 4\n'
    assert merged(own) == (
        {
            "registry": {"docker.io": {"mirrors": ["mirror.example"]}},
            "worker": {"oci": {"max-parallelism": 4, "gc": True, **SIZES}},
            "cdi": {"disabled": True},
        },
        [],
    )


UNSAFE = """
root = "/elsewhere"
[grpc]
address = ["tcp://0.0.0.0:1"]
debugAddress = "0.0.0.0:2"
[otel]
socketPath = "/elsewhere"
[worker.containerd]
enabled = true
[worker.oci]
enabled = false
rootless = false
noProcessSandbox = true
binary = "/bin/true"
proxySnapshotterPath = "/run/other.sock"
defaultCgroupParent = "/other"
networkMode = "cni"
cniBinaryPath = "/tmp"
gc = false
"""
NAMED = sorted(
    (
        *("grpc", "otel", "root", "worker.containerd"),
        *("worker.oci.binary", "worker.oci.cniBinaryPath", "worker.oci.defaultCgroupParent", "worker.oci.enabled"),
        *("worker.oci.gc", "worker.oci.networkMode", "worker.oci.noProcessSandbox"),
        *("worker.oci.proxySnapshotterPath", "worker.oci.rootless"),
    )
)


@pytest.mark.parametrize("spelling", [str, str.upper, str.title])
def test_what_a_pools_safety_depends_on_is_not_taken_however_it_is_spelt(spelling):
    keys = re.compile(r"^(\w+)( =)|^\[([\w.]+)\]", re.MULTILINE)  # buildkitd does not look at the case of names
    own = keys.sub(lambda found: found[0].replace(name := found[1] or found[3], spelling(name)), UNSAFE)
    assert merged(own) == ({"worker": {"oci": {"gc": True, **SIZES}}, "cdi": {"disabled": True}}, NAMED)


@pytest.mark.parametrize("own", ['[worker."oc\u0130"]\nbinary = "x"', '[worker.oci]\n"b\u0130nary" = "x"'])
def test_a_letter_that_only_go_makes_an_i_hides_nothing(own):
    assert merged(own)[1] == ["worker.oci.binary"]


def test_an_untrusted_pool_gets_no_entitlement_by_another_letter():
    with pytest.raises(WorkerFailed, match="insecure-entitlements"):
        merged('"\u0130nsecure-entitlements" = ["security.insecure"]', untrusted=True)


def test_two_spellings_of_one_table_are_one_table():
    own = '[worker.oci]\nlabels = {a = "b"}\n[Worker.OCI]\nmaxUsedSpace = "1GB"\nBINARY = "x"\n'
    taken, ignored = merged(own)
    assert taken["worker"] == {
        "oci": {"labels": {"a": "b"}, "gc": True, "maxUsedSpace": "1GB", "minFreeSpace": "5GB"}
    }
    assert ignored == ["worker.oci.binary"]


@pytest.mark.parametrize(
    ("given", "expected", "ignored"),
    [
        ('maxUsedSpace = "9 GB"', SIZES | {"maxUsedSpace": "9 GB", "reservedSpace": None}, []),
        ("maxUsedSpace = 1000000", SIZES | {"maxUsedSpace": 1000000, "reservedSpace": None}, []),
        ('maxUsedSpace = "11GB"', SIZES, ["maxUsedSpace"]),
        ('maxUsedSpace = "1%"', SIZES, ["maxUsedSpace"]),
        ('maxUsedSpace = "much"', SIZES, ["maxUsedSpace"]),
        ('minFreeSpace = "6GiB"', SIZES | {"minFreeSpace": "6GiB"}, []),
        ("minFreeSpace = 0", SIZES, ["minFreeSpace"]),
        ('reservedSpace = "10GB"', SIZES | {"reservedSpace": "10GB"}, []),
        ('reservedSpace = "1TB"', SIZES, ["reservedSpace"]),
        ("gckeepstorage = 90000000000", SIZES, ["gckeepstorage"]),
        ("gc = true", SIZES, []),
    ],
)
def test_a_users_file_may_let_less_be_kept_and_never_more(given, expected, ignored):
    taken, named = merged(f"[worker.oci]\n{given}")
    kept = {name: size for name, size in expected.items() if size is not None}
    assert taken["worker"] == {"oci": {"gc": True, **kept}}
    assert named == [f"worker.oci.{key}" for key in ignored]


def test_the_policies_of_a_user_come_before_those_that_keep_the_pools_limit():
    policy = '[[worker.oci.gcpolicy]]\nfilters = ["type==source.local"]\nmaxUsedSpace = "512MB"\n'
    (mine, by_size, internal), *_ = merged(policy)[0]["worker"]["oci"]["gcpolicy"], merged(policy)[1]
    assert mine == {"filters": ["type==source.local"], "maxUsedSpace": "512MB"}
    assert (by_size, internal) == (SIZES, {"all": True, **SIZES})
    assert merged("[worker.oci]\ngcpolicy = 3")[1] == ["worker.oci.gcpolicy"]


def test_without_collection_by_the_pool_the_users_is_used():
    own = '[worker.oci]\ngc = true\nmaxUsedSpace = "90GB"\n'
    taken, ignored = merged(own, cache=Cache(gc=CacheGC(enabled=False)))
    assert (taken["worker"], ignored) == ({"oci": {"gc": True, "maxUsedSpace": "90GB"}}, [])


def test_devices_of_the_machine_are_not_for_untrusted_pools():
    own = "[cdi]\ndisabled = false\n"
    assert merged(own)[0]["cdi"] == {"disabled": False}
    taken, ignored = merged(own, untrusted=True)
    assert (taken["cdi"], ignored) == ({"disabled": True}, ["cdi"])


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("[worker.oci]\nnonsense =", r"spec.buildkitConfig is not TOML: Invalid value"),
        ("worker = 3", r"spec.buildkitConfig: worker must be a table"),
        ("[Worker]\nOCI = 3", r"spec.buildkitConfig: worker.oci must be a table"),
        ('[grpc.tls]\ncert = "x"', r"\[grpc.tls\] cannot be set"),
        ('[GRPC.TLS]\ncert = "x"', r"\[grpc.tls\] cannot be set"),
    ],
)
def test_a_file_that_cannot_be_merged_is_an_error_of_its_field(own, message):
    with pytest.raises(WorkerFailed, match=message) as failure:
        render(PoolSpec(buildkit_config=own))
    assert failure.value.field == "spec.buildkitConfig"
    assert not_taken(PoolSpec(buildkit_config=own)) == []


def test_an_untrusted_pools_builds_get_no_more_rights():
    own = 'Insecure-Entitlements = ["security.insecure"]\n'
    assert merged(own)[0]["insecure-entitlements"] == ["security.insecure"]
    with pytest.raises(WorkerFailed, match="untrusted pool") as failure:
        render(PoolSpec(buildkit_config=own, untrusted=True))
    assert failure.value.field == "spec.buildkitConfig"
