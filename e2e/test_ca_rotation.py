"""`bkpool pki rotate` on this machine: real clients with earlier and with later leases build."""

from __future__ import annotations

import base64

from harness import only_on

pytestmark = only_on("process", "a cluster is shared with other tests; e2e/kind/test_in_cluster.py replaces its CAs")


def test_leases_of_before_and_after_a_rotation_both_build(make_appliance, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 2}})
    before = appliance.allocate(name="before")
    path = context.dockerfile("say rotated")
    appliance.build(appliance.builder(before, "before"), path).ok()
    assert appliance.cli("pki", "rotate").code != 0, "the appliance runs"
    appliance.down("--now").ok()
    rotated = appliance.cli("pki", "rotate").ok().json
    assert rotated["formerTrusted"] is True
    appliance.up()
    after = appliance.allocate(name="after")
    assert base64.b64decode(after.lease["caCert"]).count(b"BEGIN CERTIFICATE") == 2
    appliance.build(appliance.builder(before, "before-again"), path).ok()
    appliance.build(appliance.builder(after, "after"), path).ok()
    for certificates in (before, after):
        appliance.release(certificates.lease).ok()
