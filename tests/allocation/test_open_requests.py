"""Which leases must end because no caller knows them."""

from bkpool.allocation.open_requests import OpenRequests


def test_a_lease_must_end_when_its_last_request_leaves_without_an_answer():
    requests = OpenRequests()
    requests.add("lease", known=False)
    requests.add("lease", known=True)
    assert requests.remove("lease") is False, "another request still waits for it"
    assert requests.remove("lease") is True
    assert len(requests) == 0


def test_an_answered_lease_stays():
    requests = OpenRequests()
    requests.add("lease", known=False)
    requests.answered("lease")
    assert requests.remove("lease") is False


def test_a_lease_that_existed_before_its_first_request_here_stays():
    requests = OpenRequests()
    requests.add("lease", known=True)
    assert requests.remove("lease") is False
    assert len(requests) == 0
