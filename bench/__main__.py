"""The command that `nox -s bench` runs. It prints its tables.

usage: nox -s bench [-- --only PART] [-- --runs N] [-- --quick] [-- --json | --markdown] [-- --plot]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import busy, cluster, compare, decisions, plot, scale, table
from bench.appliance import PARTS as OF_THE_APPLIANCE
from bench.appliance import programs
from bench.cluster_figures import SIZE, ClusterSize
from bench.installation import Filling
from bench.loads import LOADS, SMOKE, Sizes
from bench.peers import LEGS
from bench.process import FaultError

PICTURE = Path("docs/bench-gateway.svg")
GATEWAY: dict[str, Callable[[compare.Plan, compare.Notes], list[dict[str, Any]]]] = {
    "gateway": compare.side_by_side,
    "scaling": compare.scaling,
}
SCALE = "scale"
"""The part that measures leases, decisions and steps of loops by the size of the installation."""
CLUSTER = "cluster"
"""The part that measures leases in a cluster, with a fake API server that counts."""
APPLIANCE = {part.__name__: part for part in OF_THE_APPLIANCE}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s bench --", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=[*GATEWAY, SCALE, CLUSTER, *APPLIANCE], help="measure only this part")
    parser.add_argument("--runs", type=int, default=5, help="interleaved runs of each figure")
    parser.add_argument("--quick", action="store_true", help="run the gateway's parts once, with little load")
    parser.add_argument("--size", type=float, default=Sizes.transfer / 1e9, help="GB that a transfer moves")
    parser.add_argument("--loads", help=f"the loads of the gateway's parts, separated by commas: {','.join(LOADS)}")
    parser.add_argument("--legs", help=f"the legs of the gateway's parts, separated by commas: {','.join(LEGS)}")
    parser.add_argument(
        "--sizes", type=_sizes, default=scale.SIZES, help=f"the sizes of {SCALE}: POOLSxWORKERS_OF_EACH,…"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"how long {SCALE} leases at each size ({scale.SECONDS:g}), and {CLUSTER} ({SIZE.seconds:g})",
    )
    parser.add_argument("--pools", type=int, default=SIZE.pools, help=f"the pools of {CLUSTER}")
    parser.add_argument("--workers", type=int, default=SIZE.workers, help=f"the workers of {CLUSTER} in all")
    parser.add_argument("--replicas", type=int, default=SIZE.replicas, help=f"the control replicas of {CLUSTER}")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop", help="the gateway's event loop")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing, but show this output of --json")
    parser.add_argument("--json", action="store_true", help="print the figures of every run")
    parser.add_argument("--markdown", action="store_true", help="print the table for docs/benchmarks.md")
    parser.add_argument("--plot", type=Path, nargs="?", const=PICTURE, help=f"draw the comparison ({PICTURE})")
    return parser.parse_args()


def _sizes(given: str) -> list[Filling]:
    return [Filling.parse(size) for size in given.split(",")]


def _chosen(given: str | None, all_of_them: dict[str, Any]) -> list[str]:
    names = given.split(",") if given else list(all_of_them)
    if unknown := set(names) - set(all_of_them):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(all_of_them)}")
    return names


def _plan(options: argparse.Namespace) -> compare.Plan:
    sizes = SMOKE if options.quick else Sizes(transfer=int(options.size * 1e9))
    runs = 1 if options.quick else options.runs
    loads, legs = _chosen(options.loads, LOADS), _chosen(options.legs, LEGS)
    return compare.Plan(runs, sizes, options.loop, legs, loads)


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the parts. A part that cannot be measured gives a note."""
    plan, notes = _plan(options), compare.Notes()
    document: dict[str, Any] = {"machine": _machine(), "runs": plan.runs}
    for name, compared in GATEWAY.items():
        if options.only in {None, name}:
            document["versions"] = compare.versions(plan)
            try:
                document[name] = compared(plan, notes)
            except FaultError as fault:
                notes.add(f"{name}: {fault}")
    if _is_wanted(SCALE, options):
        document["sizes"] = scale.by_size(options.sizes, options.seconds or scale.SECONDS)
        document["steps"] = busy.by_event(options.seconds or scale.SECONDS)
        document["decisions"] = decisions.by_change(decisions.WORKERS, options.runs)
    if _is_wanted(CLUSTER, options):
        seconds = options.seconds or SIZE.seconds
        size = ClusterSize(options.pools, options.workers, options.replicas, seconds)
        document[CLUSTER] = cluster.figures(size)
    wanted = [part for name, part in APPLIANCE.items() if _is_wanted(name, options)]
    if wanted:
        tools, document["figures"] = programs(), {}
        for part in wanted:
            print(f"measuring: {(part.__doc__ or '').splitlines()[0]}", file=sys.stderr)
            document["figures"] |= part(tools, options.runs)
    return document | {"notes": list(notes.texts)}


def _is_wanted(part: str, options: argparse.Namespace) -> bool:
    """Whether a part that is not the gateway's is measured."""
    return options.only == part or not (options.only or options.quick)


def _machine() -> dict[str, Any]:
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    model = next((value.strip() for key, _, value in lines if key.startswith("model name")), platform.machine())
    kernel = ".".join(platform.release().split(".")[:2])
    what = f"{os.cpu_count()} cores ({model}), Linux {kernel}, {' '.join(ssl.OPENSSL_VERSION.split()[:2])}"
    return {"what": what, "load": os.getloadavg()[0]}


def main() -> None:
    """Measures, or reads figures from a file, and prints them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything started is ended
    options = _options()
    document = json.loads(options.source.read_text()) if options.source else _measured(options)
    if options.json:
        print(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        print(table.markdown(document) if options.markdown else table.text(document))
    if options.plot:
        try:
            options.plot.write_text(plot.svg(document))
        except ValueError as error:
            sys.exit(f"no picture: {error}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
