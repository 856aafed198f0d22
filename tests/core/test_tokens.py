from hypothesis import given
from hypothesis import strategies as st

from bkpool.core import tokens


@given(st.binary(min_size=32, max_size=32), st.text(max_size=40), st.text(max_size=40))
def test_a_token_is_43_characters_and_always_the_same(key, uid, allocation):
    token = tokens.derive(key, uid, allocation)
    assert tokens.well_formed(token)
    assert token == tokens.derive(key, uid, allocation)


def test_key_uid_and_lease_each_change_the_token():
    made = {
        tokens.derive(key, uid, lease)
        for key in (b"k" * 32, b"l" * 32)
        for uid in ("u", "ua")
        for lease in ("ab", "b")
    }
    assert len(made) == 8


def test_a_token_fits_into_a_common_name():
    assert len("alloc:" + tokens.derive(b"k" * 32, "u", "a")) <= 64  # X.509's upper bound for a CN


@given(st.text())
def test_any_text_has_a_digest_and_only_tokens_are_well_formed(text):
    assert len(tokens.digest(text)) == 64
    assert tokens.well_formed(text) is (
        len(text) == 43 and all(c.isascii() and (c.isalnum() or c in "-_") for c in text)
    )


def test_identity_and_job_are_separated_in_a_request_key():
    assert tokens.request_key("ab", "c") != tokens.request_key("a", "bc")
