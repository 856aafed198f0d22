"""The table and the picture of bench/: figures of a run end up where they belong. Measuring is no test's business."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import pytest

from bench import plot, table

FIGURES = {"nginx": [2.0, 4.0, 1.0], "HAProxy": [1.0, None, 1.0], "ghostunnel": [None] * 3, "bkpool": [3.0, 4.0, 0.5]}


def document(figures: dict[str, list[float | None]] = FIGURES) -> dict[str, Any]:
    row = {"leg": "unix", "load": "up", "title": "up", "unit": "GB", "more_is_better": True, "figures": figures}
    row |= {"busy": {"nginx": [0.9]}, "ciphers": {}}
    machine = {"what": "2 cores", "load": 0.0}
    return {"machine": machine, "runs": 3, "gateway": [row], "notes": ["no ghostunnel"], "figures": {"CLI, ms": "5"}}


def test_a_ratio_is_of_two_figures_of_the_same_run() -> None:
    [row] = document()["gateway"]
    assert table.ratios(row, "bkpool") == [1.5, 1.0, 0.5]
    assert table.ratios(row, "HAProxy") == [0.5, 1.0], "the run that gave no figure counts for nothing"


def test_the_table_has_nginx_and_bkpool_as_measured_and_the_others_as_ratios() -> None:
    heading, compared, _, appliance = table.lines(document())
    assert heading == ("TLS → Unix socket", "", "", "", "", "")
    assert compared == ("up; GB", "2 (1 – 4)", "0.75 (0.5 – 1)", "–", "1 (0.5 – 1.5)", "3 (0.5 – 4)")
    assert appliance == ("CLI, ms", "", "", "", "", "5")


@pytest.mark.parametrize("form", [table.text, table.markdown])
def test_a_proxy_that_is_missing_is_said_below_the_table(form: Any) -> None:
    assert "no ghostunnel" in form(document()).splitlines()[-1]


def test_without_nginx_there_are_no_ratios_and_no_picture() -> None:
    alone = document({"bkpool": [1.0]})
    assert table.lines(alone)[1] == ("up; GB", "–", "–", "–", "–", "1")
    with pytest.raises(ValueError, match="no comparison"):
        plot.svg(alone)


def test_the_picture_has_a_mark_for_each_proxy_that_was_measured() -> None:
    root = ET.fromstring(plot.svg(document()))
    kinds = [mark.get("class") for mark in root if mark.tag.endswith("}line")]
    assert (kinds.count("bkpool"), kinds.count("HAProxy"), kinds.count("ghostunnel")) == (1, 1, 0)
    lines = {mark.get("class"): mark for mark in root if mark.tag.endswith("}line")}
    nginx = float(lines["nginx"].get("x1", ""))
    assert float(lines["bkpool"].get("x1", "")) < nginx < float(lines["bkpool"].get("x2", ""))
