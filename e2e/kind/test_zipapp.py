"""The single file `bkpool.pyz` does the main job on kind. Most other tests on kind use `python -m bkpool`."""

from __future__ import annotations

import sys

from harness import really_ran


def test_the_zipapp_does_the_main_job_on_kind(make_appliance, zipapp, context):
    appliance = make_appliance(program=[sys.executable, str(zipapp)])
    appliance.up_with({"scaling": {"max": 1}})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "zipapp")
    assert really_ran(appliance.build(builder, context.dockerfile("say zipped")).ok(), "zipped")
    appliance.release(certificates.lease).ok()
