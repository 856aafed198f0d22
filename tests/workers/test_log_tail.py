"""The lines of buildkitd's log that are shown: never a credential that a caller gave for a cache."""

import pytest

from bkpool.workers.log_tail import informative_lines


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('level=error msg="it failed"', 'level=error msg="it failed"'),
        ("FrontendAttrs: map[build-arg:KEY:top secret filename:Dockerfile]", "FrontendAttrs: map[build-arg:***"),
        ("opts build-arg:KEY=secret", "opts build-arg:***"),
        ('cache-imports:[{"Type":"s3","Attrs":{"secret_access_key":"secret"}}]', "cache-imports***"),
        ("type=s3,access_key_id=secret,bucket=b", "type=s3,access_key_id=***,bucket=b"),
        ('error="{\\"secret_access_key\\": \\"secret\\"}"', 'error="{\\"secret_access_key\\": \\"***\\"}"'),
        ("Get https://b/x?X-Amz-Signature=secret&a=b", "Get https://b/x?X-Amz-Signature=***&a=b"),
        ("Get https://b/x?se=1&sig=secret: EOF", "Get https://b/x?se=1&sig=*** EOF"),
        ("failed to fetch oauth token: unexpected status", "failed to fetch oauth token: unexpected status"),
    ],
)
def test_credentials_are_not_shown(line, shown):
    assert informative_lines(line) == [shown]


def test_a_hostile_line_costs_no_time():
    (shown,) = informative_lines("access_key_id" * 20_000)
    assert len(shown) < 400
