"""A buildkitd whose starts a test delays, or makes fail."""

from __future__ import annotations


class DelayedStart:
    """A script on the appliance's PATH that can delay each start of the real buildkitd or make it fail."""

    def __init__(self, appliance):
        self._shut, self._broken = appliance.base / "shut", appliance.base / "broken"
        body = f"""case "$*" in *--root=*)
while [ -e {self._shut} ]; do sleep 0.05; done
if [ -e {self._broken} ]; then echo 'the disk is missing' >&2; exit 3; fi
esac
exec {appliance.tools["buildkitd"]} "$@\""""
        appliance._script("buildkitd", body)

    def shut(self):
        """Delays each start until `open`."""
        self._shut.touch()

    def open(self):
        self._shut.unlink()

    def break_(self):
        """Makes each start fail from now on."""
        self._broken.touch()
