"""A public issuer makes tokens for everybody: a condition must hold the owner, or strangers are let in.

Each refused case is an attack: the token of a stranger that would fulfil every condition.
"""

from types import SimpleNamespace

import pytest

from bkpool.core.auth import OIDC, ClaimCondition
from bkpool.core.public_issuers import PUBLIC_ISSUERS, lets_strangers_in
from bkpool.identity.claims import identify

GITHUB = "https://token.actions.githubusercontent.com"
GITLAB = "https://gitlab.com"
BUILDKITE = "https://agent.buildkite.com"
GOOGLE = "https://accounts.google.com"
TERRAFORM = "https://app.terraform.io"
MICROSOFT = "https://login.microsoftonline.com/common/v2.0"
PERSONAL = "https://login.microsoftonline.com/consumers/v2.0"

STRANGER = {
    GITHUB: {
        "sub": "repo:my-org-evil/x:ref:refs/heads/main",
        "repository": "my-org-evil/x",
        "repository_owner": "my-org-evil",
        "repository_owner_id": "12345678",
        "repository_id": "99",
        "ref": "refs/heads/main",
        "event_name": "push",
        "actor": "alice",
        "job_workflow_ref": "my-org/shared/.github/workflows/build.yml@refs/heads/main",
    },
    GITLAB: {
        "sub": "project_path:my-group-evil/x:ref_type:branch:ref:main",
        "namespace_path": "my-group-evil",
        "namespace_id": "12345678",
        "project_path": "my-group-evil/x",
        "user_login": "alice",
        "ref_protected": "true",
        "ci_config_ref_uri": "gitlab.com/my-group/ci//build.yml@refs/heads/main",
    },
    BUILDKITE: {"sub": "organization:acme-evil:pipeline:x:ref:main", "organization_slug": "acme-evil"},
    GOOGLE: {"sub": "118", "email": "eve@example.com.evil.example", "hd": "example.com.evil.example"},
    PERSONAL: {"sub": "AAAA", "tid": "9188040d-6c67-4c5b-b112-36a304b66dad", "email": "boss@example.com"},
}


@pytest.mark.parametrize(
    ("issuer", "conditions"),
    [
        (GITHUB, []),
        (GITHUB, [{"claim": "ref", "patterns": ["refs/heads/*"]}]),
        (GITHUB, [{"claim": "event_name", "values": ["push"]}]),
        (GITHUB, [{"claim": "sub", "patterns": ["repo:*"]}]),
        (GITHUB, [{"claim": "sub", "patterns": ["repo:my-org*"]}]),
        (GITHUB, [{"claim": "sub", "patterns": ["*:ref:refs/heads/main"]}]),
        (GITHUB, [{"claim": "sub", "patterns": ["repo:my-org?evil/*"]}]),
        (GITHUB, [{"claim": "repository", "patterns": ["*/*"]}]),
        (GITHUB, [{"claim": "repository", "patterns": ["my-org*/x"]}]),
        (GITHUB, [{"claim": "repository", "patterns": ["my-org/*", "*"]}]),
        (GITHUB, [{"claim": "repository", "values": ["my-org/x"], "patterns": ["?*"]}]),
        (GITHUB, [{"claim": "repository_owner", "patterns": ["my-org*"]}]),
        (GITHUB, [{"claim": "repository_owner_id", "patterns": ["1234567*"]}]),
        (GITHUB, [{"claim": "actor", "values": ["alice"]}]),
        (GITHUB, [{"claim": "job_workflow_ref", "patterns": ["my-org/shared/*"]}]),
        (GITHUB, [{"claim": "ref", "patterns": ["refs/heads/*"]}, {"claim": "sub", "patterns": ["repo:my-org-*"]}]),
        (GITLAB, [{"claim": "ref_protected", "values": ["true"]}]),
        (GITLAB, [{"claim": "namespace_path", "patterns": ["my-group*"]}]),
        (GITLAB, [{"claim": "project_path", "values": ["my-group/x"], "patterns": ["*/x"]}]),
        (GITLAB, [{"claim": "sub", "patterns": ["project_path:my-group*:ref:main"]}]),
        (GITLAB, [{"claim": "user_login", "values": ["alice"]}]),
        (GITLAB, [{"claim": "ci_config_ref_uri", "patterns": ["gitlab.com/my-group/*"]}]),
        (BUILDKITE, [{"claim": "sub", "patterns": ["organization:acme*"]}]),
        (BUILDKITE, [{"claim": "organization_slug", "patterns": ["acme*"]}]),
        (GOOGLE, [{"claim": "email", "patterns": ["*@example.com*"]}]),
        (GOOGLE, [{"claim": "hd", "patterns": ["example.com*"]}]),
        (PERSONAL, [{"claim": "tid", "values": ["9188040d-6c67-4c5b-b112-36a304b66dad"]}]),
        (PERSONAL, [{"claim": "email", "values": ["boss@example.com"]}]),
    ],
)
def test_conditions_that_a_stranger_fulfils_are_refused(issuer, conditions):
    settings = OIDC(issuer=issuer, audience="a", conditions=conditions)
    assert identify(STRANGER[issuer], settings.but(tenant_claim="sub")).name, "the attack works with these conditions"
    assert settings.rejection_reason


@pytest.mark.parametrize(
    ("issuer", "conditions"),
    [
        (GITHUB, [{"claim": "repository_owner_id", "values": ["1234567"]}]),
        (GITHUB, [{"claim": "repository_owner_id", "patterns": ["1234567"]}]),
        (GITHUB, [{"claim": "repository_id", "values": ["1", "2"]}]),
        (GITHUB, [{"claim": "repository_owner", "values": ["my-org"]}]),
        (GITHUB, [{"claim": "repository", "values": ["my-org/x"], "patterns": ["my-org/*", "other/lib-?"]}]),
        (GITHUB, [{"claim": "sub", "patterns": ["repo:my-org/*"]}]),
        (GITHUB, [{"claim": "sub", "values": ["repo:my-org@12/x@34:ref:refs/heads/main"]}]),
        (GITHUB, [{"claim": "sub", "patterns": ["repository_owner_id:12:*"]}]),
        (GITHUB, [{"claim": "aud", "values": ["a"]}, {"claim": "repository_owner", "values": ["my-org"]}]),
        (GITHUB, [{"claim": "sub", "patterns": ["*"]}, {"claim": "sub", "patterns": ["repo:my-org/*"]}]),
        (GITLAB, [{"claim": "namespace_path", "values": ["my-group"], "patterns": ["my-group/*"]}]),
        (GITLAB, [{"claim": "project_id", "values": ["7"]}]),
        (GITLAB, [{"claim": "sub", "patterns": ["project_path:my-group/*"]}]),
        (BUILDKITE, [{"claim": "sub", "patterns": ["organization:acme:*"]}]),
        (TERRAFORM, [{"claim": "terraform_organization_name", "values": ["acme"]}]),
        (GOOGLE, [{"claim": "hd", "values": ["example.com"]}]),
        (MICROSOFT, [{"claim": "tid", "values": ["00000000-1111-2222-3333-444444444444"]}]),
        ("https://oidc.circleci.com/org/1b7f", []),
        ("https://gitlab.example.com", [{"claim": "ref", "patterns": ["*"]}]),
    ],
)
def test_conditions_that_hold_the_owner_are_accepted(issuer, conditions):
    assert OIDC(issuer=issuer, audience="a", conditions=conditions).rejection_reason is None


@pytest.mark.parametrize("text", ["repo:my-org", "repo:/x", "repo:", "environment:my-org/x", ""])
def test_a_subject_in_which_the_owner_is_not_complete_holds_no_owner(text):
    assert lets_strangers_in(GITHUB, [SimpleNamespace(claim="sub", values=(), patterns=(f"{text}*",))])


@pytest.mark.parametrize("issuer", sorted(PUBLIC_ISSUERS))
def test_every_public_issuer_has_an_example_that_it_accepts(issuer):
    reason = OIDC(issuer=issuer, audience="a").rejection_reason
    assert OIDC(issuer=f"{issuer}/", audience="a").rejection_reason
    claim = PUBLIC_ISSUERS[issuer].claims[0]
    assert f"in one of the claims {claim.name}, " in reason
    assert reason.endswith(f'for example {{claim: {claim.name}, values: ["{PUBLIC_ISSUERS[issuer].example_owner}"]}}')
    for one in PUBLIC_ISSUERS[issuer].claims:
        text = f"{one.prefixes[0]}me{one.delimiter}*"
        condition = ClaimCondition(claim=one.name, **({"patterns": [text]} if one.delimiter else {"values": ["me"]}))
        assert OIDC(issuer=issuer, audience="a", conditions=[condition]).rejection_reason is None


@pytest.mark.parametrize(
    ("conditions", "complaint"),
    [
        ([], "there is no condition"),
        (
            [{"claim": "ref", "values": ["a"]}, {"claim": "actor", "values": ["a"]}],
            "no condition holds the owner: there are only conditions on ref, actor",
        ),
        (
            [{"claim": "ref", "values": ["a"]}, {"claim": "sub", "patterns": ["repo:my-org/*", "repo:my-org*"]}],
            "the pattern 'repo:my-org*' of the claim sub does not hold the whole owner",
        ),
    ],
)
def test_the_refusal_names_what_is_wrong_and_what_would_do(conditions, complaint):
    reason = OIDC(issuer=GITHUB, audience="a", conditions=conditions).rejection_reason
    assert complaint in reason
    assert "repository_owner_id, repository_id, repository_owner, repository, sub" in reason
    assert reason.endswith('for example {claim: repository_owner_id, values: ["1234567"]}')
