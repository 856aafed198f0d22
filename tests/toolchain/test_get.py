from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bkpool.core.errors import HostFault, InvalidInput
from bkpool.toolchain import Tool, Toolchain
from bkpool.toolchain.table import release_of

# A second bkpool: gets a tool and prints each step. At the given step it kills itself or waits for a line on stdin.
OTHER = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from bkpool.toolchain import Tool, Toolchain

    cache, mirror, tool, step, act = sys.argv[1:]

    def progress(_tool, text, _fraction):
        print(text, flush=True)
        if step in text and act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if step in text and act == "wait":
            sys.stdin.readline()

    print(Toolchain(Path(cache), search_path="", mirror=mirror, progress=progress).ensure(Tool(tool)))
""")


@contextmanager
def other(cache: Path, mirror: str, tool: Tool, step: str, act: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", OTHER, str(cache), mirror, tool, step, act]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        except BaseException:  # it may wait for another one, which waits for the end of this one
            process.kill()
            raise


def until(process: subprocess.Popen[str], text: str) -> str:
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"ended without saying {text!r}")


@pytest.fixture
def chain(tmp_path, releases, no_go) -> Toolchain:
    return Toolchain(tmp_path / "cache", search_path="", mirror=releases.url)


def left_over(chain: Toolchain) -> list[str]:
    return [path.name for path in (chain.cache / "tools" / "bin").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("tool", Tool)
def test_a_release_is_downloaded_verified_and_then_found(chain, tool):
    assert chain.find(tool) is None
    path = chain.ensure(tool)
    assert path == chain.cache / "tools" / "bin" / f"{tool}-{release_of(tool).version}"
    assert path.stat().st_mode & 0o777 == 0o755
    assert Toolchain(chain.cache, search_path="").find(tool) == path
    assert left_over(chain) == []


def test_tools_of_one_release_need_one_download(chain, releases):
    got = chain.ensure_all([Tool.BUILDKITD, Tool.BUILDCTL, Tool.RUNC])
    assert [path.name.partition("-")[0] for path in got.values()] == ["buildkitd", "buildctl", "runc"]
    asked = len(releases.asked)
    assert asked == 4  # two releases, a file of digests and an asset each
    Toolchain(chain.cache, search_path="", mirror=releases.url).ensure_all(list(got))
    assert len(releases.asked) == asked


def test_the_mirror_can_come_from_the_environment(chain, releases, monkeypatch):
    monkeypatch.setenv("BKPOOL_MIRROR", f"{releases.url}/")
    assert Toolchain(chain.cache, search_path="").ensure(Tool.RUNC).exists()


def test_progress_is_a_growing_fraction_that_ends_at_one(tmp_path, releases, no_go):
    steps = []
    chain = Toolchain(tmp_path, search_path="", mirror=releases.url, progress=lambda *step: steps.append(step))
    chain.ensure(Tool.BUILDX)
    fractions = [fraction for tool, text, fraction in steps if fraction is not None]
    assert fractions == sorted(fractions)
    assert steps[-1] == (Tool.BUILDX, "installed", 1.0)


def spoil_asset(releases, tool):
    releases.files[releases.asset(tool)] += b"# changed in transit\n"


def spoil_sums(releases, tool):
    releases.files[releases.sums(tool)] = b"not about this file\n"


def lose_sums(releases, tool):
    del releases.files[releases.sums(tool)]


def contradict_sums(releases, tool):
    name = releases.asset(tool).rpartition("/")[2]
    releases.files[releases.sums(tool)] += f"{'1' * 64}  {name}\n".encode()


def lose_asset(releases, tool):
    del releases.files[releases.asset(tool)]


def cut_asset(releases, tool):
    releases.cut.add(releases.asset(tool))


def send_elsewhere(releases, tool):
    releases.redirects[releases.asset(tool)] = "http://example.com/buildx"


def send_in_a_circle(releases, tool):
    releases.redirects[releases.asset(tool)] = releases.asset(tool)


def send_to_a_file(releases, tool):
    releases.redirects[releases.asset(tool)] = "file:///bin/sh"


def publish_another_version(releases, tool):
    releases.publish(release_of(tool), "9.9.9")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_asset, "instead of"),
        (spoil_sums, "has no digest for"),
        (lose_sums, "HTTP 404"),
        (contradict_sums, "has no digest for"),
        (lose_asset, "HTTP 404"),
        (cut_asset, "was cut after"),
        (send_elsewhere, "which is not https"),
        (send_in_a_circle, "HTTP 302"),
        (send_to_a_file, "is not allowed"),
        (publish_another_version, "reports the version 9.9.9"),
    ],
)
def test_an_unverified_download_is_not_used_and_the_error_has_the_reason(chain, releases, spoil, reason):
    spoil(releases, Tool.BUILDX)
    with pytest.raises(HostFault) as caught:
        chain.ensure(Tool.BUILDX)
    assert caught.value.code == "ToolMissing"
    assert caught.value.exit_code == 79
    assert reason in caught.value.message
    assert "go is not on PATH" in caught.value.message
    assert "go.dev/dl" in caught.value.hint
    assert chain.find(Tool.BUILDX) is None
    assert left_over(chain) == []


def test_redirects_are_followed_a_few_times(chain, releases):
    asset = releases.asset(Tool.BUILDX)
    releases.files["/elsewhere"] = releases.files.pop(asset)
    hops = [asset, *(f"/hop{n}" for n in range(4)), "/elsewhere"]
    releases.redirects.update(itertools.pairwise(hops))
    assert chain.ensure(Tool.BUILDX).exists()


def test_a_digest_in_the_table_comes_before_the_digests_file(chain, releases, monkeypatch):
    name = releases.asset(Tool.BUILDX).rpartition("/")[2]
    monkeypatch.setattr("bkpool.toolchain.download.DIGESTS", {f"buildx/{name}": "2" * 64})
    with pytest.raises(HostFault, match="2" * 64):
        chain.ensure(Tool.BUILDX)
    assert releases.sums(Tool.BUILDX) not in releases.asked


@pytest.mark.parametrize(
    "mirror", ["http://example.com", "ftp://localhost", "file:///srv", "example.com", "http://[", "https://"]
)
def test_a_mirror_without_tls_is_refused_unless_it_is_loopback(tmp_path, mirror):
    with pytest.raises(InvalidInput, match="BKPOOL_MIRROR"):
        Toolchain(tmp_path, search_path="", mirror=mirror).ensure(Tool.RUNC)


def test_a_host_that_cannot_be_reached_is_asked_once(tmp_path, releases, no_go):
    releases.close()
    steps = []
    chain = Toolchain(tmp_path, search_path="", mirror=releases.url, progress=lambda *step: steps.append(step[1]))
    for tool in (Tool.BUILDX, Tool.RUNC):
        with pytest.raises(HostFault, match="cannot be reached"):
            chain.ensure(tool)
    assert sum("asking for" in text for text in steps) == 1


@pytest.mark.parametrize("step", ["asking for", "downloading", "installed"])
def test_a_killed_download_leaves_no_incomplete_tool_and_the_next_one_cleans_up(chain, releases, step):
    with other(chain.cache, releases.url, Tool.BUILDKITD, step, "die") as killed:
        until(killed, step)
    assert killed.returncode == -signal.SIGKILL
    assert len(left_over(chain)) == 1
    # Killed between the renames of its two tools, the first is whole and the second is not there at all.
    assert (chain.find(Tool.BUILDKITD) is not None) == (step == "installed")
    assert chain.find(Tool.BUILDCTL) is None
    for path in chain.ensure_all([Tool.BUILDKITD, Tool.BUILDCTL]).values():
        assert b"moby/buildkit" in subprocess.check_output([path, "--version"])
    assert left_over(chain) == []


def test_two_processes_get_a_tool_once_and_the_second_says_that_it_waits(chain, releases):
    with other(chain.cache, releases.url, Tool.BUILDX, "downloading", "wait") as first:
        until(first, "downloading")
        with other(chain.cache, releases.url, Tool.BUILDX, "asking for", "die") as second:
            until(second, "waiting for another bkpool")
            assert chain.find(Tool.BUILDX) is None
            ends = [process.communicate("\n")[0].splitlines()[-1] for process in (first, second)]
    assert ends == [str(chain.find(Tool.BUILDX))] * 2
    assert releases.asked.count(releases.asset(Tool.BUILDX)) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, releases):
    (tmp_path / "cache").write_text("a file where a directory should be")
    with pytest.raises(HostFault) as caught:
        Toolchain(tmp_path / "cache", search_path="", mirror=releases.url).ensure(Tool.RUNC)
    assert caught.value.code == "Permission"
    assert "BKPOOL_CACHE" in caught.value.hint


def test_a_full_disk_is_reported_as_such(chain, monkeypatch):
    real = Path.open

    def on_a_full_disk(path: Path, mode: str):
        return real(Path("/dev/full") if path.name == "asset" else path, mode)

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    with pytest.raises(HostFault) as caught:
        chain.ensure(Tool.RUNC)
    assert caught.value.code == "DiskFull"
