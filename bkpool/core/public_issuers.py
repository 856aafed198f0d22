"""Which claims of a public issuer say whose job a token is from, and whether a condition holds one of them literally.

A public issuer gives tokens to everybody with an account there. A condition that leaves the owner open, such as a
branch or a pattern that ends inside a name, lets in strangers. Pure: nothing here asks an issuer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from bkpool.core.wildcards import literal_start


class RequiredClaim(Protocol):
    """A claim, and what it must be: a condition of an issuer's configuration (`core.auth.ClaimCondition`)."""

    @property
    def claim(self) -> str:
        """The name of the claim."""

    @property
    def values(self) -> tuple[str | bool | int, ...]:
        """Values that fulfil it, taken literally."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns that fulfil it (`core.wildcards`)."""


@dataclass(frozen=True, slots=True)
class OwnerClaim:
    """A claim that says whose job it is, as a whole or in its first part."""

    name: str
    delimiter: str = ""
    """What ends the owner's name within the claim; "": the whole claim is the owner."""
    prefixes: tuple[str, ...] = ("",)
    """What the owner's name follows; the claim says nothing of the owner if it begins with something else."""

    def holds_owner(self, text: str, *, is_whole: bool) -> bool:
        """Whether the owner's name is complete in this text.

        Args:
            text: What the claim must begin with, without wildcards.
            is_whole: Whether the claim must equal it.
        """
        if not self.delimiter:
            return is_whole and bool(text)
        prefix = next((one for one in self.prefixes if text.startswith(one)), None)
        if prefix is None:
            return False
        owner, delimiter, _ = text[len(prefix) :].partition(self.delimiter)
        return bool(owner) and (bool(delimiter) or is_whole)


@dataclass(frozen=True, slots=True)
class PublicIssuer:
    """The owner claims of an issuer, the safest first, and an example of what that one may hold."""

    claims: tuple[OwnerClaim, ...]
    example_owner: str

    @property
    def example(self) -> str:
        """A condition that would do."""
        return f'{{claim: {self.claims[0].name}, values: ["{self.example_owner}"]}}'


def _whole(*names: str) -> tuple[OwnerClaim, ...]:
    return tuple(OwnerClaim(name) for name in names)


# Not among the claims: `actor` and `user_login` (somebody of yours can start a job of a stranger's project),
# `job_workflow_ref` and `ci_config_ref_uri` (a stranger's job can use a public workflow of yours).
_GITHUB = PublicIssuer(
    (
        *_whole("repository_owner_id", "repository_id", "repository_owner"),
        OwnerClaim("repository", "/"),
        OwnerClaim("sub", "/", ("repo:", "repository:")),
        # The forms of a subject that its owner has customised.
        OwnerClaim("sub", ":", ("repository_owner:", "repository_owner_id:", "repository_id:")),
        *_whole("enterprise_id", "enterprise"),
    ),
    "1234567",
)
_GITLAB = PublicIssuer(
    (
        *_whole("namespace_id", "project_id"),
        OwnerClaim("namespace_path", "/"),
        OwnerClaim("project_path", "/"),
        OwnerClaim("sub", "/", ("project_path:",)),
    ),
    "1234567",
)
_BUILDKITE = PublicIssuer(
    (*_whole("organization_id", "pipeline_id", "organization_slug"), OwnerClaim("sub", ":", ("organization:",))),
    "0184990a-477b-4fa8-9968-496074483cee",
)
_CODEFRESH = PublicIssuer(
    (*_whole("account_id", "pipeline_id"), OwnerClaim("sub", ":", ("account:",))), "628a80b693a15c0f9c13ab75"
)
_TERRAFORM = PublicIssuer(
    (
        *_whole("terraform_organization_id", "terraform_workspace_id", "terraform_project_id"),
        *_whole("terraform_organization_name"),
        OwnerClaim("sub", ":", ("organization:",)),
    ),
    "org-EXAMPLE",
)
# `email` is no such claim at Microsoft: a user can change it to a stranger's.
_MICROSOFT = PublicIssuer(_whole("tid", "oid", "sub"), "00000000-1111-2222-3333-444444444444")
_MICROSOFT_PERSONAL = PublicIssuer(_whole("oid", "sub"), "00000000-0000-0000-1111-222222222222")

PUBLIC_ISSUERS: dict[str, PublicIssuer] = {
    "https://token.actions.githubusercontent.com": _GITHUB,
    "https://gitlab.com": _GITLAB,
    "https://accounts.google.com": PublicIssuer(_whole("hd", "sub", "email"), "example.com"),
    "https://agent.buildkite.com": _BUILDKITE,
    "https://oidc.codefresh.io": _CODEFRESH,
    "https://app.terraform.io": _TERRAFORM,
    "https://oauth2.sigstore.dev/auth": PublicIssuer(_whole("email", "sub"), "me@example.com"),
    "https://login.microsoftonline.com/common/v2.0": _MICROSOFT,
    "https://login.microsoftonline.com/organizations/v2.0": _MICROSOFT,
    "https://login.microsoftonline.com/consumers/v2.0": _MICROSOFT_PERSONAL,
    "https://login.microsoftonline.com/9188040d-6c67-4c5b-b112-36a304b66dad/v2.0": _MICROSOFT_PERSONAL,
}
"""Issuers that give tokens to every user with an account there, according to their documentation.

CircleCI and Bitbucket are not among them: their issuers have a URL for each organization or workspace.
"""


def lets_strangers_in(issuer: str, conditions: Iterable[RequiredClaim]) -> str | None:
    """Why the configuration of a public issuer would let in strangers; None if it would not.

    Args:
        issuer: The URL of the issuer. One that is not public lets in nobody but its own users.
        conditions: All of these must be fulfilled, so one that holds the owner is enough.

    Returns:
        Sentences that name the conditions, the claims that would do, and an example.
    """
    public = PUBLIC_ISSUERS.get(issuer.rstrip("/"))
    given = tuple(conditions)
    if public is None or any(_holds_owner(one, public) for one in given):
        return None
    claims = ", ".join(dict.fromkeys(one.name for one in public.claims))
    return (
        f"{issuer} gives tokens to everybody with an account there, and {_complaint(given, public)}, so strangers "
        f"would be let in. Add a condition that has the owner literally, in one of the claims {claims}; for "
        f"example {public.example}"
    )


def _holds_owner(condition: RequiredClaim, public: PublicIssuer) -> bool:
    """Whether each value and each pattern names the owner: one of them is enough for a token to be accepted."""
    values = map(str, condition.values)
    closed = all(_text_holds_owner(condition.claim, value, public, is_whole=True) for value in values)
    return closed and not _open_patterns(condition, public)


def _open_patterns(condition: RequiredClaim, public: PublicIssuer) -> list[str]:
    """The patterns that leave the owner open."""
    starts = {pattern: literal_start(pattern) for pattern in condition.patterns}
    return [
        pattern
        for pattern, start in starts.items()
        if not _text_holds_owner(condition.claim, start, public, is_whole=start == pattern)
    ]


def _text_holds_owner(claim: str, text: str, public: PublicIssuer, *, is_whole: bool) -> bool:
    return any(one.holds_owner(text, is_whole=is_whole) for one in public.claims if one.name == claim)


def _complaint(conditions: tuple[RequiredClaim, ...], public: PublicIssuer) -> str:
    names = {one.name for one in public.claims}
    for condition in conditions:
        if condition.claim in names and (patterns := _open_patterns(condition, public)):
            return f"the pattern {patterns[0]!r} of the claim {condition.claim} does not hold the whole owner"
    if not conditions:
        return "there is no condition"
    return f"no condition holds the owner: there are only conditions on {', '.join(one.claim for one in conditions)}"
