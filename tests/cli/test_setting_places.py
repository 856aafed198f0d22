"""A message about a setting begins with what the user typed: an option, a variable, or a place in a file."""

import pytest

WRONG = {
    "api.address": (
        ("--api-address", "BKPOOL_API_ADDRESS", "0.0.0.0:8082"),
        {},
        "other machines can reach 0.0.0.0, and the API would be served in clear",
    ),
    "api.key": (("--api-key", "BKPOOL_API_KEY", "api.key"), {}, "--api-cert is missing"),
    "dev_issuer.address": (
        ("--dev-issuer-address", "BKPOOL_DEV_ISSUER_ADDRESS", "127.0.0.1:0"),
        {"BKPOOL_DEV_ISSUER_ENABLED": "true"},
        "the port must not be 0",
    ),
}
"""Setting to its option, its variable and a wrong value; other variables; and what the message says."""


@pytest.mark.parametrize("source", ["option", "variable", "config.toml", "remembered.toml"])
@pytest.mark.parametrize("name", WRONG)
def test_a_message_names_where_the_user_gave_the_setting(bkpool_here, home, tmp_path, name, source):
    (option, variable, value), variables, message = WRONG[name]
    for directory in (home, tmp_path):
        (directory / "api.key").touch()
    arguments = ()
    match source:
        case "option":
            arguments, where = (option, value), option
        case "variable":
            variables, where = variables | {variable: value}, variable
        case _:
            section, field = name.split(".")
            (home / source).write_text(f'[{section}]\n{field} = "{value}"\n')
            where = f"{home / source}: [{section}] {field}"
    done = bkpool_here("up", *arguments, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {where}: {message}\n" in done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"BKPOOL_APPLIANCE_ROLES": "gateway"},
            "--pool: missing; the role gateway (BKPOOL_APPLIANCE_ROLES) serves one pool",
        ),
        (
            {"BKPOOL_APPLIANCE_ROLES": "gateway,api"},
            "BKPOOL_APPLIANCE_ROLES: gateway runs alone, or together with both api and controller",
        ),
        (
            {"BKPOOL_APPLIANCE_ROLES": "api", "BKPOOL_DEV_ISSUER_ENABLED": "true"},
            "BKPOOL_DEV_ISSUER_ENABLED: cannot be used together with BKPOOL_APPLIANCE_ROLES",
        ),
        ({"BKPOOL_API_CERT": "pem"}, "BKPOOL_API_CERT: --api-key is missing"),
    ],
)
def test_a_message_about_two_settings_names_both(bkpool_here, tmp_path, variables, message):
    """One that was not given is named by its option."""
    (tmp_path / "pem").touch()
    done = bkpool_here("up", **variables)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}\n")
