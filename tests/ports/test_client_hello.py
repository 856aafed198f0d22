"""The groups of a ClientHello are found however it is cut, and what is no ClientHello is left to OpenSSL."""

from __future__ import annotations

import contextlib
import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.ports.client_hello import HelloReader, OfferedGroups, offered_groups
from support.hellos import FIRST_BYTES, GROUPS, client_hello, hello_with_groups, in_records

SLOW = hello_with_groups(["X25519", "ffdhe8192"], ["P-256", "X25519", "ffdhe8192"])
SLOW_GROUPS = OfferedGroups((0x17, 0x1D, 0x104), (0x1D, 0x104))


def read(*segments: bytes) -> list[OfferedGroups]:
    """The groups that are found in these segments of TCP."""
    reader = HelloReader()
    found = [reader.feed(segment) for segment in segments]
    return [offered_groups(hello) for hello in found if hello is not None]


@given(record=st.integers(20, 2000), cuts=st.lists(st.integers(0, 2000), max_size=30))
def test_a_hello_is_found_in_any_records_and_segments(record, cuts):
    data = in_records(SLOW, record)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    segments = [data[begin:end] for begin, end in itertools.pairwise(places)]
    assert read(*segments) == [SLOW_GROUPS]


def test_a_hello_is_found_when_each_byte_comes_alone():
    assert read(*(bytes([byte]) for byte in in_records(SLOW, 100))) == [SLOW_GROUPS]


def test_a_hello_is_found_after_warnings_which_openssl_ignores():
    assert read(b"\x15\3\3\0\2\1\x5a" * 3 + in_records(SLOW)) == [SLOW_GROUPS]


def test_a_hello_is_found_once_and_later_records_are_not_read():
    reader = HelloReader()
    assert reader.feed(in_records(SLOW) + b"\x17\3\3\0\1x") is not None
    assert reader.done
    assert reader.feed(in_records(SLOW)) is None


@pytest.mark.parametrize("name", FIRST_BYTES)
def test_other_first_bytes_have_a_hello_only_if_openssl_sees_one_too(name):
    if name == "no TLS: a ClientHello of 10 KB":
        with pytest.raises(ValueError, match="more than 8192 bytes"):
            read(FIRST_BYTES[name])
    else:
        whole = ("a ClientHello and no more", "TLS 1.2", "a share of ffdhe8192", "garbage after a ClientHello")
        assert bool(read(FIRST_BYTES[name])) == name.endswith(whole)


def test_a_hello_in_very_many_records_is_too_much_work():
    with pytest.raises(ValueError, match="more than 64 records"):
        read(in_records(SLOW, 1))
    with pytest.raises(ValueError, match="more than 64 records"):
        read(b"\x15\3\3\0\2\1\x5a" * 100)


@pytest.mark.parametrize("cut", range(0, len(SLOW) - 4, 9))
def test_a_hello_that_ends_too_early_is_an_error(cut):
    with pytest.raises(ValueError, match="longer than its message"):
        offered_groups(SLOW[4 : 4 + cut])


@given(st.binary(max_size=300))
def test_noise_is_no_hello_or_an_error(noise):
    try:
        read(noise)
        offered_groups(noise)
    except ValueError:
        pass


@given(place=st.integers(0, len(SLOW) - 5), value=st.integers(0, 255))
def test_a_damaged_hello_has_groups_or_is_an_error(place, value):
    damaged = bytearray(SLOW[4:])
    damaged[place] = value
    with contextlib.suppress(ValueError):
        offered_groups(bytes(damaged))


def test_a_hello_of_openssl_has_the_groups_that_it_was_told():
    assert read(client_hello())[0].shared == (GROUPS["X25519"][0],)


def test_a_hello_without_extensions_has_no_groups():
    body = b"\3\1" + os.urandom(32) + b"\0" + b"\0\2\0\x2f" + b"\1\0"
    assert offered_groups(body) == OfferedGroups((), ())
