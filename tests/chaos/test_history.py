"""The judge of a chaos run finds nothing in correct histories, and the violation in each wrong one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chaos.history import HUNG, Event, builds, dump, holds, judge, load, stragglers
from chaos.timeline import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from support.examples import examples

pytestmark = pytest.mark.any_python

EOF_TOLD = "ERROR: failed to build: error reading from server: EOF"


class Story:
    """A history that is built event by event. Times are in seconds."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.calls = 0

    def note(self, at: float, who: str, what: str, **of) -> Story:
        self.events.append(Event(at, who, what, of))
        return self

    def lease(self, at: float, who: str, lease: str, worker: str = "w-0", took: float = 0.1) -> Story:
        self.calls += 1
        self.note(at - took, who, "ask", call=f"c{self.calls}")
        of = {"outcome": "lease", "lease": lease, "worker": worker, "wait": 60}
        return self.note(at, who, "answer", call=f"c{self.calls}", **of)

    def refused(self, at: float, who: str, outcome: str, message: str, took: float = 0.1) -> Story:
        self.calls += 1
        self.note(at - took, who, "ask", call=f"c{self.calls}")
        return self.note(at, who, "answer", call=f"c{self.calls}", outcome=outcome, message=message, wait=60)

    def build(self, name: str, lease: str, begin: float, end: float, worker: str = "w-0", **changes) -> Story:
        who = ".".join(name.split(".")[:2])
        normal = {"ok": True, "hung": False, "connected": begin + 0.1, "correct": True, "sentence": "", "lost": False}
        self.note(begin, who, "build", build=name, lease=lease, worker=worker)
        more = {"before": [], "beside": []} | normal | changes
        return self.note(end, who, "build-end", build=name, lease=lease, worker=worker, **more)

    def release(self, at: float, who: str, lease: str) -> Story:
        self.calls += 1
        self.note(at, who, "release", call=f"c{self.calls}", lease=lease)
        return self.note(at + 0.1, who, "released", call=f"c{self.calls}", outcome="released", wait=10)

    def whole(self, name: str, lease: str, begin: float, end: float, worker: str = "w-0", **changes) -> Story:
        """Adds a lease, one build and the release."""
        who = ".".join(name.split(".")[:2])
        self.lease(begin, who, lease, worker)
        self.build(name, lease, begin + 0.1, end - 0.1, worker, **changes)
        return self.release(end, who, lease)

    def fault(
        self, number: int, kind: str, begin: float, end: float, worker: str = "", done: float | None = None
    ) -> Story:
        self.note(begin, "driver", "fault", number=number, kind=kind, worker=worker)
        self.note(begin if done is None else done, "driver", "fault-done", number=number)
        return self.note(end, "driver", "fault-end", number=number)

    def over(self, calm: float) -> Story:
        return self.note(calm, "driver", "calm").note(calm + 100, "driver", "healed", seconds=1)

    @property
    def violations(self) -> list[str]:
        return judge(self.events)


def ending_well(story: Story, *who: str, calm: float = 100) -> list[str]:
    """Returns the violations, after the faults have ended and each of these clients has built again."""
    for number, name in enumerate(who):
        story.whole(f"{name}.99.1", f"last-{number}", calm + 1, calm + 3, f"last-{number}")
    return story.over(calm).violations


def test_a_history_without_faults_has_no_violation():
    story = Story().whole("ann.1.1.1", "a", 1, 3).whole("bob.1.1.1", "b", 4, 6)
    assert ending_well(story, "ann.1", "bob.1") == []


# --- never two holders ----------------------------------------------------------------------------------------------


def test_two_holders_of_a_worker_at_once_are_found():
    story = Story().whole("ann.1.1.1", "a", 1, 5).whole("ann.2.1.1", "b", 4, 6)
    (found,) = ending_well(story, "ann.1", "ann.2")
    assert found.startswith("4.00: w-0 was given to ann.2 (b) while ann.1 (a) held it until 5.00")


def test_the_same_answer_twice_is_one_lease():
    story = Story().lease(1, "ann.1", "a").whole("ann.1.1.1", "a", 2, 5)
    assert ending_well(story, "ann.1") == []
    assert next((hold.begin, hold.end) for hold in holds(story.events)) == (1, 5)


def test_a_client_holds_nothing_after_its_lease_was_lost():
    story = Story().lease(1, "ann.1", "a").fault(0, "kill-worker", 1, 1, "w-0")
    story.build("ann.1.1.1", "a", 1.1, 9, ok=False, connected=None, lost=True, sentence="ERROR: the lease was lost")
    story.whole("bob.1.1.1", "b", 8, 10).release(10, "ann.1", "a")
    assert ending_well(story, "ann.1", "bob.1") == []


def test_another_build_seen_in_the_cache_counts_more_than_the_answers_of_the_api():
    """According to the answers, the leases are on different workers. The cache shows otherwise."""
    story = Story().whole("ann.1.1.1", "a", 1, 5, "w-0").whole("ann.2.1.1", "b", 2, 6, "w-1", beside=["ann.1.1.1"])
    assert any("saw ann.1.1.1 at work beside it" in text for text in ending_well(story, "ann.1", "ann.2"))


def test_a_step_that_outlives_its_lease_is_a_violation_only_beside_another_tenant():
    story = Story().whole("ann.1.1.1", "a", 1, 3).whole("ann.2.1.1", "b", 4, 6, beside=["ann.1.1.1"])
    assert ending_well(story, "ann.1", "ann.2") == []
    assert len(stragglers(story.events)) == 1
    story = Story().whole("ann.1.1.1", "a", 1, 3).whole("bob.1.1.1", "b", 4, 6, beside=["ann.1.1.1"])
    assert len(ending_well(story, "ann.1", "bob.1")) == 1


def hung(end: float) -> list[str]:
    """The violations of a build that began before its worker hung at 2 s and that ended at this time."""
    story = Story().lease(1, "ann.1", "a").fault(0, "hang-worker", 2, 27, "w-0")
    story.build("ann.1.1.1", "a", 1.1, end, ok=False, sentence=EOF_TOLD)
    return ending_well(story.release(end + 1, "ann.1", "a"), "ann.1")


def test_a_build_on_a_worker_that_hangs_must_end_soon():
    assert hung(20) == []
    (found,) = hung(30)
    assert "was cut by hang-worker at 2.00 and ended 28.0 s later" in found


def test_a_log_that_nobody_reads_explains_no_failure():
    story = Story().fault(0, "unread-log", 1, 6).refused(5, "ann.1", "refused", "503: the pool has no idle worker")
    (found,) = ending_well(story, "ann.1")
    assert "was refused with no fault to cause it" in found


def test_an_earlier_try_of_the_same_holder_may_still_run():
    story = Story().lease(1, "ann.1", "a").fault(0, "kill-appliance", 2, 3)
    story.build("ann.1.1.1", "a", 1.1, 2.1, ok=False, sentence=EOF_TOLD)
    story.build("ann.1.1.2", "a", 3, 5, beside=["ann.1.1.1"]).release(5, "ann.1", "a")
    assert ending_well(story, "ann.1") == []


def test_traces_of_another_tenant_in_a_cache_are_found_and_those_of_the_same_are_not():
    story = Story().whole("ann.1.1.1", "a", 1, 3).whole("ann.2.1.1", "b", 4, 6, before=["ann.1.1.1"])
    assert ending_well(story, "ann.1", "ann.2") == []
    story = Story().whole("ann.1.1.1", "a", 1, 3).whole("bob.1.1.1", "b", 4, 6, before=["ann.1.1.1"])
    (found,) = ending_well(story, "ann.1", "bob.1")
    assert "found in its cache what ann.1.1.1 of another tenant had left" in found


# --- every waiter answered ------------------------------------------------------------------------------------------


def test_a_request_without_an_answer_is_found():
    story = Story().note(1, "ann.1", "ask", call="x")
    assert ending_well(story, "ann.1") == ["1.00: ann.1 asked (ask) and was never answered"]


def test_a_wait_longer_than_requested_is_found():
    story = Story().lease(70, "ann.1", "a", took=66).release(71, "ann.1", "a")
    (found,) = ending_well(story, "ann.1")
    assert "waited 66.0 s" in found


@pytest.mark.parametrize(
    ("outcome", "message", "fault", "fine"),
    [
        ("refused", "503: the appliance is stopping", "end-appliance", True),
        ("refused", "503: the appliance is stopping", None, False),
        ("refused", "503", "end-appliance", False),
        ("cut", "ConnectionResetError", "kill-appliance", True),
        ("cut", "ConnectionResetError", "stop-worker", False),
        ("cut", "ConnectionResetError", None, False),
    ],
)
def test_a_refusal_needs_a_message_and_a_fault(outcome, message, fault, fine):
    story = Story()
    if fault:
        story.fault(0, fault, 9, 11)
    story.refused(10, "ann.1", outcome, message)
    assert (ending_well(story, "ann.1") == []) is fine


def test_a_request_cut_long_after_the_appliance_died_is_found():
    story = Story().fault(0, "kill-appliance", 9, 11).refused(17, "ann.1", "cut", "RemoteDisconnected", took=9)
    assert len(ending_well(story, "ann.1")) == 1


# --- builds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "worker", "at", "fine"),
    [
        ("kill-appliance", "", 4, True),
        ("kill-worker", "w-0", 4, True),
        ("kill-worker", "w-1", 4, False),
        ("kill-worker", "w-0", 6, False),
        ("delete-pod", "w-0", 4, True),
        ("cut-pods", "", 4, True),
        ("end-appliance", "", 4, False),
        ("stop-worker", "w-0", 4, False),
        ("cut-api", "", 4, False),
    ],
)
def test_an_open_build_may_fail_only_because_of_a_fault_that_cuts_it(fault, worker, at, fine):
    story = Story().fault(0, fault, at, at + 0.5, worker)
    story.whole("ann.1.1.1", "a", 1, 5, ok=False, correct=False, sentence=EOF_TOLD)
    found = ending_well(story, "ann.1")
    assert (found == []) is fine
    assert all("failed with no fault to cause it" in text for text in found)


@pytest.mark.parametrize(("ends", "fine"), [(8.9, True), (9.3, False)])
@pytest.mark.parametrize("ok", [True, False])
def test_a_cut_build_must_end_within_five_seconds(ends, fine, ok):
    story = Story().fault(0, "kill-worker", 4, 4, "w-0")
    story.whole("ann.1.1.1", "a", 1, ends + 0.1, ok=ok, correct=ok, sentence="" if ok else EOF_TOLD)
    assert (ending_well(story, "ann.1") == []) is fine


def test_the_time_of_a_cut_is_when_the_fault_was_carried_out():
    """A deleted pod runs until its kubelet knows about the deletion."""
    story = Story().fault(0, "delete-pod", 4, 7, "w-0", done=7)
    assert (
        ending_well(story.whole("ann.1.1.1", "a", 1, 11, ok=False, correct=False, sentence=EOF_TOLD), "ann.1") == []
    )
    story = Story().fault(0, "delete-pod", 4, 7, "w-0", done=7)
    story.whole("ann.1.1.1", "a", 1, 12.5, ok=False, correct=False, sentence=EOF_TOLD)
    assert any("was cut by delete-pod at 7.00" in text for text in ending_well(story, "ann.1"))


@pytest.mark.parametrize(("begin", "end", "fine"), [(5, 30, True), (5, 40, False), (36, 40, False)])
def test_a_build_that_is_not_connected_must_end_after_the_waits_at_the_gateway(begin, end, fine):
    story = Story().fault(0, "kill-worker", 4, 4, "w-0")
    changes = {"ok": False, "correct": False, "connected": None, "sentence": "ERROR: worker w-0 is not back yet"}
    story.whole("ann.1.1.1", "a", begin, end, **changes)
    assert (ending_well(story, "ann.1") == []) is fine


@pytest.mark.parametrize(
    ("fault", "worker", "begin", "end", "fine"),
    [
        ("end-appliance", "", 10, 20, True),
        ("kill-appliance", "", 10, 20, True),
        ("hang-worker", "w-0", 10, 20, True),
        ("hang-worker", "w-1", 10, 20, False),  # another worker
        ("stop-worker", "w-0", 10, 20, False),
        ("end-appliance", "", 10, 16, False),  # too short: 34 s remain
        ("hang-worker", "w-0", 4, 30, True),  # it is noticed after 20 s
        ("hang-worker", "w-0", -10, 16, False),
    ],
)
def test_the_time_without_anybody_who_answers_is_no_wait_at_the_gateway(fault, worker, begin, end, fine):
    story = Story().fault(0, "kill-worker", 4, 4, "w-0").fault(1, fault, begin, end, worker)
    changes = {"ok": False, "correct": False, "connected": None, "sentence": "ERROR: context deadline exceeded"}
    story.whole("ann.1.1.1", "a", 5, 45.2, **changes)
    assert (ending_well(story, "ann.1") == []) is fine


def test_such_times_count_once_if_they_overlap():
    story = Story().fault(0, "hang-worker", 10, 30, "w-0").fault(1, "end-appliance", 12, 16)
    story.fault(2, "kill-appliance", 14, 20)
    changes = {"ok": False, "correct": False, "connected": None, "sentence": "ERROR: context deadline exceeded"}
    story.whole("ann.1.1.1", "a", 5, 59, **changes)
    (found,) = ending_well(story, "ann.1")
    assert "was not connected, and ended only after 53.8 s" in found


@pytest.mark.parametrize("message", ["", "ERROR: 14", "Traceback (most recent call last): something is wrong here"])
def test_a_failure_without_a_readable_message_is_found(message):
    story = Story().fault(0, "kill-worker", 4, 4, "w-0")
    story.whole("ann.1.1.1", "a", 1, 5, ok=False, correct=False, sentence=message)
    (found,) = ending_well(story, "ann.1")
    assert "failed without a sentence" in found


def test_a_build_that_never_ends_is_found_with_any_fault():
    story = Story().fault(0, "stop-worker", 4, 40, "w-0")
    story.whole("ann.1.1.1", "a", 1, 1 + HUNG, ok=False, correct=False, hung=True, sentence="")
    (found,) = ending_well(story, "ann.1", calm=200)
    assert "never ended" in found


def test_a_wrong_result_is_found():
    (found,) = ending_well(Story().whole("ann.1.1.1", "a", 1, 5, correct=False), "ann.1")
    assert "wrong result" in found


# --- afterwards -----------------------------------------------------------------------------------------------------


def test_leftovers_are_found():
    story = Story().whole("ann.1.1.1", "a", 1, 5).note(200, "driver", "left", text="process 7 of a worker")
    assert ending_well(story, "ann.1") == ["200.00: left over: process 7 of a worker"]


def test_a_pool_that_never_recovers_is_found():
    story = Story().whole("ann.1.1.1", "a", 1, 5).note(10, "driver", "calm")
    assert judge(story.events) == [
        "after the faults the pool never recovered",
        "ann.1 had no successful build after the faults had ended",
    ]


# --- at random ------------------------------------------------------------------------------------------------------


@st.composite
def right_histories(draw) -> Story:
    """Draws a correct history: clients hold workers one after the other, and some workers are killed."""
    story = Story()
    free = {f"w-{number}": 0.0 for number in range(draw(st.integers(1, 3)))}
    at = 0.0
    for number in range(draw(st.integers(1, 12))):
        worker = draw(st.sampled_from(sorted(free)))
        at = free[worker] + draw(st.floats(0.2, 3))
        end = at + draw(st.floats(1, 10))
        changes = {}
        if draw(st.booleans()):
            killed = end - 0.1 - draw(st.floats(0, 0.5))
            story.fault(number, "kill-worker", killed, killed, worker)
            changes = {"ok": False, "correct": False, "sentence": EOF_TOLD}
        who = draw(st.sampled_from(["ann.1", "ann.2", "bob.1"]))
        story.whole(f"{who}.{number}.1", f"lease-{number}", at, end, worker, **changes)
        free[worker] = end
    return story


@settings(max_examples=examples(20))
@given(right_histories())
def test_a_correct_history_has_no_violation_also_after_its_file_is_read(story):
    assert ending_well(story, "ann.1", "ann.2", "bob.1", calm=200) == []
    assert load(dump(story.events)) == story.events
    picture = draw(story.events, [])
    assert picture.count("<title>") >= len(builds(story.events))


@settings(max_examples=examples(20))
@given(right_histories(), st.randoms(use_true_random=False))
def test_an_overlap_is_found_anywhere(story, chance):
    hold = chance.choice(holds(story.events))
    intruder = (hold.begin + hold.end) / 2
    story.whole("bob.2.500.1", "intruder", intruder, intruder + 0.5, hold.worker)
    found = ending_well(story, "ann.1", "ann.2", "bob.1", "bob.2", calm=200)
    assert any("(intruder)" in text and hold.lease in text for text in found)


@settings(max_examples=examples(20))
@given(right_histories(), st.randoms(use_true_random=False))
def test_a_lost_answer_is_found_anywhere(story, chance):
    answers = [event for event in story.events if event.what == "released"]
    story.events.remove(lost := chance.choice(answers))
    found = ending_well(story, "ann.1", "ann.2", "bob.1", calm=200)
    assert [text for text in found if "never answered" in text and lost.who in text]


@settings(max_examples=examples(20))
@given(right_histories(), st.randoms(use_true_random=False))
def test_a_failure_without_a_fault_is_found_anywhere(story, chance):
    story.events = [event for event in story.events if event.who != "driver"]
    ends = [number for number, event in enumerate(story.events) if event.what == "build-end"]
    one = chance.choice(ends)
    event = story.events[one]
    wrong = {"ok": False, "correct": False, "sentence": EOF_TOLD}
    story.events[one] = replace(event, of={**event.of, **wrong})
    found = ending_well(story, "ann.1", "ann.2", "bob.1", calm=200)
    assert any(event.of["build"] in text and "no fault to cause it" in text for text in found)
