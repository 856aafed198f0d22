"""A small program that buildkitd runs instead of runc, and that takes capabilities from build steps.

BuildKit gives CAP_NET_RAW to every step and has no option for it. The program edits what runc is about to read, and
then becomes runc. If it does not find what it expects, the step fails: it never runs with the capability by mistake.
Nothing here writes or starts it. Pure.
"""

from __future__ import annotations

import shlex
from pathlib import Path

# BuildKit writes its files as one line of JSON without blanks. In there, the texts of a build have no quotation mark
# that is not escaped, so `"capabilities":{` is found nowhere else. A step with CAP_SYS_ADMIN has the entitlement
# security.insecure, which gives it every capability by intent.
_SCRIPT = r"""#!/bin/sh
# Written by bkpool at each start of the worker. It takes CAP_NET_RAW from build steps, and then becomes runc.
refuse() {
    echo "bkpool: $1, so CAP_NET_RAW cannot be taken from the step" >&2
    exit 1
}
starts= file= before=
for word; do
    case $before in
        --bundle) file=$word/config.json ;;
        --process) file=$word ;;
    esac
    case $word in
        run | create | restore | exec) starts=yes ;;
    esac
    before=$word
done
if [ "$starts" ]; then
    [ "$file" ] || refuse "runc is started without --bundle and --process"
    [ -f "$file" ] || refuse "$file is missing"
    edited=$(LC_ALL=C sed -n -E '
        /"capabilities":\{[^}]*"CAP_SYS_ADMIN"/ {
            p
            d
        }
        :again
        s/("capabilities":\{[^}]*)"CAP_NET_RAW",?/\1/
        t again
        s/("capabilities":\{[^}]*),\]/\1]/
        t again
        /"capabilities":\{[^}]*\}/p
    ' "$file") && [ "$edited" ] || refuse "the capabilities in $file are not where they are expected"
    printf '%s\n' "$edited" >"$file" || refuse "$file cannot be written"
fi
exec @RUNC@ "$@"
"""


def wrapper(runc: Path) -> str:
    """The program, as a script of the shell.

    Args:
        runc: The real runc.
    """
    return _SCRIPT.replace("@RUNC@", shlex.quote(str(runc)))
