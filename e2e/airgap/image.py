#!/usr/bin/env python3
"""Writes a container image without an engine: an archive as `docker save` makes it, or an OCI layout directory.

Its files come from a tree and from single files. All belong to root and have no times, so that equal contents make an
equal image. It needs only Python.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def main() -> None:
    options = arguments()
    out = Path(options.out)
    layers: list[Path] = []
    if options.shared:
        layers.append(layer(out.with_name(out.name + ".layer0"), files=options.shared))
    if options.tree or options.dir or options.add or options.link or not layers:
        capabilities = dict(pair.split("=", 1) for pair in options.cap)
        layers.append(
            layer(
                out.with_name(out.name + ".layer1"),
                tree=options.tree,
                directories=options.dir,
                files=options.add,
                links=options.link,
                capabilities={name: int(number) for name, number in capabilities.items()},
            )
        )
    config = json.dumps(configuration(options, [digest(path) for path in layers])).encode()
    tags = [tag if ":" in tag.rpartition("/")[2] else f"{tag}:latest" for tag in options.tag]
    (write_layout if options.layout else write_archive)(out, tags, config, layers)
    for path in layers:
        path.unlink()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="the file or, with --layout, the directory")
    parser.add_argument(
        "--layout", action="store_true", help="write an OCI layout, named by the part of the tag after the colon"
    )
    parser.add_argument("--tag", action="append", required=True, metavar="NAME[:TAG]")
    parser.add_argument(
        "--shared",
        action="append",
        default=[],
        metavar="SRC:DST",
        help="a file that goes into a separate first layer",
    )
    parser.add_argument("--add", action="append", default=[], metavar="SRC:DST")
    parser.add_argument("--tree", metavar="DIR", type=Path)
    parser.add_argument("--dir", action="append", default=[], metavar="PATH")
    parser.add_argument("--link", action="append", default=[], metavar="TARGET:PATH")
    parser.add_argument("--cap", action="append", default=[], metavar="FILE=NUMBER", help="a file capability")
    parser.add_argument("--entrypoint", type=json.loads, metavar="JSON")
    parser.add_argument("--cmd", type=json.loads, metavar="JSON")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--user", default="")
    return parser.parse_args()


def configuration(options: argparse.Namespace, diff_ids: list[str]) -> dict[str, Any]:
    run = {"Env": [PATH, *options.env], "Entrypoint": options.entrypoint, "Cmd": options.cmd, "User": options.user}
    return {
        "architecture": ARCHITECTURE,
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {name: value for name, value in run.items() if value},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{each}" for each in diff_ids]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "e2e/airgap/image.py"} for _ in diff_ids],
    }


def layer(
    path: Path,
    *,
    tree: Path | None = None,
    directories: Iterable[str] = (),
    files: Iterable[str] = (),
    links: Iterable[str] = (),
    capabilities: dict[str, int] | None = None,
) -> Path:
    seen: set[str] = {""}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        if tree:
            _add_tree(tar, tree, seen, capabilities or {})
        _make_directory(tar, "tmp", seen, mode=0o1777)
        for directory in directories:
            _make_directory(tar, directory.strip("/"), seen)
        for pair in files:
            source, target = pair.split(":", 1)
            _make_directory(tar, str(Path(target.strip("/")).parent), seen)
            real = Path(source).resolve()
            info = tar.gettarinfo(real, target.strip("/"))
            info.type, info.linkname, info.size = tarfile.REGTYPE, "", real.stat().st_size
            with real.open("rb") as content:
                tar.addfile(_plain(info), content)
        for pair in links:
            target, name = pair.split(":", 1)
            _make_directory(tar, str(Path(name.strip("/")).parent), seen)
            info = tarfile.TarInfo(name.strip("/"))
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, target, 0o777
            tar.addfile(_plain(info))
    return path


def _add_tree(tar: tarfile.TarFile, tree: Path, seen: set[str], capabilities: dict[str, int]) -> None:
    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        name = info.name.rpartition("/")[2]
        if info.isreg() and name in capabilities:
            # xattr version 2 with the effective bit; permitted: one capability (linux/capability.h)
            value = struct.pack("<5I", 0x02000001, 1 << capabilities[name], 0, 0, 0)
            info.pax_headers["SCHILY.xattr.security.capability"] = value.decode("utf-8", "surrogateescape")
        return _plain(info)

    for directory, subdirectories, names in os.walk(tree):
        subdirectories.sort()
        relative = Path(directory).relative_to(tree)
        if relative != Path():
            seen.add(str(relative))
            tar.add(directory, str(relative), recursive=False, filter=plain)
        symlinks = [each for each in subdirectories if (Path(directory) / each).is_symlink()]
        for name in sorted(names + symlinks):
            tar.add(Path(directory) / name, str(relative / name), recursive=False, filter=plain)


def _make_directory(tar: tarfile.TarFile, path: str, seen: set[str], mode: int = 0o755) -> None:
    if path in seen or path == ".":
        return
    _make_directory(tar, str(Path(path).parent), seen)
    seen.add(path)
    info = tarfile.TarInfo(path)
    info.type, info.mode = tarfile.DIRTYPE, mode
    tar.addfile(_plain(info))


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def write_archive(out: Path, tags: list[str], config: bytes, layers: list[Path]) -> None:
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    places = [f"{digest(path)}/layer.tar" for path in layers]
    manifest = json.dumps([{"Config": name, "RepoTags": tags, "Layers": places}]).encode()
    draft = out.with_name(out.name + ".new")
    with tarfile.open(draft, "w") as tar:
        _put(tar, "manifest.json", manifest)
        _put(tar, name, config)
        for path, place in zip(layers, places, strict=True):
            info = tarfile.TarInfo(place)
            info.size = path.stat().st_size
            with path.open("rb") as content:
                tar.addfile(info, content)
    draft.replace(out)


def _put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_layout(out: Path, tags: list[str], config: bytes, layers: list[Path]) -> None:
    draft = out.with_name(out.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    blobs = draft / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(path: Path, media: str) -> dict[str, Any]:
        name, size = digest(path), path.stat().st_size
        path.replace(blobs / name)
        return {"mediaType": f"application/vnd.oci.image.{media}", "digest": f"sha256:{name}", "size": size}

    def text(data: bytes, media: str) -> dict[str, Any]:
        path = draft / "draft"
        path.write_bytes(data)
        return blob(path, media)

    packed = []
    for path in layers:
        small = draft / path.name
        # Without the name and time that gzip adds by default, equal contents make an equal image.
        with path.open("rb") as raw, small.open("wb") as file, gzip.GzipFile("", "wb", 3, file, mtime=0) as zipped:
            shutil.copyfileobj(raw, zipped)
        packed.append(blob(small, "layer.v1.tar+gzip"))
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": text(config, "config.v1+json"),
        "layers": packed,
    }
    entry = text(json.dumps(manifest).encode(), "manifest.v1+json")
    named = [entry | {"annotations": {"org.opencontainers.image.ref.name": tag.rpartition(":")[2]}} for tag in tags]
    (draft / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": named}))
    (draft / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    shutil.rmtree(out, ignore_errors=True)
    draft.replace(out)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
