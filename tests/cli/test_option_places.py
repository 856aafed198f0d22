"""A message about an option begins with what the user typed: the option, or the variable that gave its value."""

import pytest

TOKEN = "t0ken-" + "A" * 37

WRONG = {
    "token": (("release",), "-t", "--token", "BKPOOL_LEASE_TOKEN", "nonsense", "this is neither a token nor a file"),
    "file": (("renew",), "-t", "--token", "BKPOOL_LEASE_TOKEN", "./none", "there is no file none"),
    "issuer": (("oidc-token",), "--issuer", "--issuer", "BKCTL_OIDC_ISSUER", "http://x.example", "is not a URL with"),
    "release": (("release", "--worker", "w"), "-n", "--namespace", "BKCTL_NAMESPACE", "A B", "is no good"),
    "status": (("status", "-p", "x"), "-n", "--namespace", "BKCTL_NAMESPACE", "a-b", "is no good"),
}
"""Case to the command, the option as typed, its name, its variable, a wrong value, and what the message says."""


@pytest.mark.parametrize("by", ["option", "variable", "both"])
@pytest.mark.parametrize("case", WRONG)
def test_a_message_names_the_option_or_the_variable_that_gave_the_value(bkpool_here, api, appliance, case, by):
    arguments, typed, option, variable, value, message = WRONG[case]
    refusal = {"code": "InvalidInput", "field": "namespace", "message": "namespace: is no good"}
    api.answers |= {"release": (400, {"error": refusal}), "x": (400, {"error": refusal})}
    given = () if by == "variable" else (typed, value)
    variables = {} if by == "option" else {variable: value}
    done = bkpool_here(*arguments, *given, **variables)
    assert done.returncode in {2, 5}
    where = variable if by == "variable" else option
    assert done.stderr.startswith(f"error: {where}: {message}")


def test_the_issuer_of_older_options_is_named_by_its_variable(bkpool_here, appliance):
    done = bkpool_here("status", "--oidc-actor", "me", BKCTL_OIDC_ISSUER="http://issuer.example")
    assert done.stderr.startswith("error: BKCTL_OIDC_ISSUER: is not a URL with https://")


@pytest.mark.parametrize("value", [TOKEN * 40, TOKEN * 3, f"{TOKEN}\0"])
def test_a_mistyped_token_is_not_shown(called, value):
    code, out, err = called("release", "-t", value)
    assert (code, out) == (2, "")
    assert err.startswith("error: --token: this is neither a token nor a file\n")
    assert TOKEN not in err
