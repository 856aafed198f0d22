"""Runs first in bkpool.pyz: if it cannot run here, it says why in one sentence, before pex's own code would fail.

Every Python must be able to parse it, also 2.7, so it uses only what all of them have in common.
"""

# ruff: noqa: ANN001, ANN202, PTH100, PTH103, PTH107, PTH111, PTH117, PTH118, PTH123, PTH207, PTH208, RUF005, UP031 - see above
import glob
import os
import platform
import sys
import zlib

SUPPORTS = {"pythons": ["3.11", "3.12", "3.13"], "machine": "x86_64", "glibc": "2.28"}
BUILD = "a random name"
NEEDS = 300 * 2**20  # bytes: what is unpacked once, and some reserve
OS_FAULT = 71  # bkpool.core.errors.HostFault
NOT_PERMITTED = 77


def _wrong_python():
    here = "%d.%d" % sys.version_info[:2]
    kind = platform.python_implementation()
    free_threaded = "t" in getattr(sys, "abiflags", "")
    if here in SUPPORTS["pythons"] and kind == "CPython" and not free_threaded:
        return None
    wanted = ", ".join(SUPPORTS["pythons"])
    return "bkpool needs Python 3.11 or newer: this file is for CPython %s, and this is %s %s%s (%s)." % (
        wanted,
        kind,
        platform.python_version(),
        " (free-threaded)" if free_threaded else "",
        sys.executable,
    )


def _wrong_machine():
    here = "%s %s, %d bits" % (platform.system(), platform.machine(), 64 if sys.maxsize > 2**32 else 32)
    wanted = "Linux %s, 64 bits" % SUPPORTS["machine"]
    if here != wanted:
        return "this bkpool.pyz is for %s, and this is %s: build one here with scripts/build-zipapp." % (wanted, here)
    try:
        libc, version = os.confstr("CS_GNU_LIBC_VERSION").split()
    except (ValueError, OSError, AttributeError):
        libc, version = "another libc", "0"
    if libc != "glibc" or _numbers(version) < _numbers(SUPPORTS["glibc"]):
        shown = libc if version == "0" else "%s %s" % (libc, version)
        return "this bkpool.pyz needs glibc %s or newer, and this machine has %s." % (SUPPORTS["glibc"], shown)
    return None


def _unusable_cache(cache):
    fix = "set BKPOOL_CACHE to a directory that you may write and run programs from"
    probe = os.path.join(cache, "probe-%d" % os.getpid())
    try:
        os.makedirs(cache, 0o700, exist_ok=True)
        open(probe, "w").close()
        os.remove(probe)
        about = os.statvfs(cache)
    except OSError as error:
        return "bkpool unpacks itself once to %s, which cannot be written (%s): %s." % (cache, error.strerror, fix)
    if about.f_flag & os.ST_NOEXEC:
        return "bkpool unpacks itself once to %s, which is mounted noexec: %s." % (cache, fix)
    if not os.listdir(cache) and about.f_bavail * about.f_frsize < NEEDS:
        return "bkpool unpacks itself once to %s, where less than %d MB are free: %s." % (cache, NEEDS >> 20, fix)
    return None


def _numbers(version):
    return [int(part) for part in version.split(".") if part.isdigit()]


def _cache():
    """The directory into which pex unpacks: one for each Python and each build, so nothing else is in it."""
    cache = os.environ.get("BKPOOL_CACHE")
    if not cache:
        base = os.environ.get("XDG_CACHE_HOME", "")
        base = base if os.path.isabs(base) else os.path.join(os.path.expanduser("~"), ".cache")
        cache = os.path.join(base, "bkpool")
    who = "%s %s" % (os.path.realpath(sys.executable), BUILD)
    name = "%d.%d-%08x" % (sys.version_info[:2] + (zlib.crc32(who.encode()),))
    return os.path.join(os.path.abspath(cache), "pyz", name)


def _check():
    fault = _wrong_python() or _wrong_machine()
    if fault:
        sys.stderr.write("error: %s\n" % fault)
        sys.exit(OS_FAULT)
    cache = _cache()
    fault = _unusable_cache(cache)
    if fault:
        sys.stderr.write("error: %s\n" % fault)
        sys.exit(NOT_PERMITTED)
    os.environ["PEX_ROOT"] = cache
    os.environ["BKPOOL_ZIPAPP_SUPPORTS"] = "CPython %s on Linux %s with glibc %s or newer" % (
        ", ".join(SUPPORTS["pythons"]),
        SUPPORTS["machine"],
        SUPPORTS["glibc"],
    )


def _run_unpacked():
    """Runs what pex unpacked before. pex itself needs a tenth of a second to find it.

    The layout is pex's (`venvs/*/*/*/pex`, made in one rename). If it is different, pex does everything.
    """
    found = glob.glob(os.path.join(os.environ["PEX_ROOT"], "venvs", "*", "*", "*", "pex"))
    if len(found) != 1 or os.environ.get("PEX_TOOLS") or os.environ.get("PEX_INTERPRETER"):
        return
    with open(found[0]) as script:
        command = script.readline()[2:].split()
    if command and os.access(command[0], os.X_OK):
        os.environ["PEX"] = os.path.abspath(sys.argv[0])
        os.execv(command[0], command + [found[0]] + sys.argv[1:])


_check()
_run_unpacked()
