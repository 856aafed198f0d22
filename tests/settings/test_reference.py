"""The documentation of the settings is the one that the model gives."""

from pathlib import Path

from bkpool.settings.reference import markdown

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_what_the_model_says():
    assert PAGE.read_text() == markdown(), "run: bkpool config --markdown > docs/configuration.md"
