"""An error of the API in the words of the command line."""

import pytest

from bkpool.cli.api_errors import error_of
from bkpool.core.errors import InvalidInput


@pytest.mark.parametrize(
    ("answer", "message", "hint", "field"),
    [
        (
            {"field": "poolName", "message": "there is no pool default/x"},
            *("--pool: there is no pool default/x", "", "--pool"),
        ),
        (
            {
                "field": "wait",
                "message": "the request is not valid: must be at most 1h",
                "hint": "Ask for a shorter wait.",
            },
            *("--wait: must be at most 1h", "Ask for a shorter wait.", "--wait"),
        ),
        ({"field": "ttl", "message": "ttl: '5' is not a duration"}, "--ttl: '5' is not a duration", "", "--ttl"),
        (
            {"message": "no worker became free", "hint": "Wait longer."},
            *("no worker became free", "Wait longer.", None),
        ),
        (
            {"field": "spec.scaling.max", "message": "spec.scaling.max: 0 is too small", "hint": "Use `bkpool up`."},
            *("spec.scaling.max: 0 is too small", "Use `bkpool up`.", "spec.scaling.max"),
        ),
    ],
)
def test_a_field_of_the_request_is_shown_as_its_option(answer, message, hint, field):
    error = error_of(400, {"code": "InvalidInput", **answer})
    assert isinstance(error, InvalidInput)
    assert (error.message, error.hint, error.field) == (message, hint, field)


def test_a_command_can_have_another_option_for_a_field():
    error = error_of(400, {"field": "token", "message": "is empty"}, {"token": "--token-file"})
    assert error.message == "--token-file: is empty"
