"""One way to write a URL, so that two of them can be compared."""

import pytest

from bkpool.core.urls import canonical


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("https://a.example", "https://a.example"),
        ("HTTPS://A.Example:443/", "https://a.example"),
        ("http://a.example:80", "http://a.example"),
        ("http://a.example:443/x/", "http://a.example:443/x"),
        ("https://[2001:DB8::1]:8082", "https://[2001:db8::1]:8082"),
    ],
)
def test_a_url_is_written_in_one_way(url, same):
    assert canonical(url) == canonical(same) == same


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "a.example",
            "//a.example",
            "ftp://a.example",
            "https://",
            "https://u@a.example",
            "https://a.example?q",
        ),
        *("https://a.example#f", "https://a.example:x", "https://a example", "https://a.example/\n", "https://[a"),
    ],
)
def test_what_is_no_url_of_a_server(url):
    with pytest.raises(ValueError):
        canonical(url)
