"""Notices: bounded, in order, from any thread."""

from stagescope.agent.events import OOM, EventQueue, Notice


def notice(at_ns: int) -> Notice:
    """One out of memory, at *at_ns*."""
    return Notice(OOM, 1, "", at_ns, "out of memory")


def test_notices_come_out_once_and_in_order() -> None:
    """What was put is taken oldest first, and only once."""
    notices = EventQueue()
    for number in (1, 2):
        notices.put(notice(number))
    assert [one.at_ns for one in notices.take()] == [1, 2]
    assert notices.take() == []
    assert notices.counters() == {"notices": 2, "notices_dropped": 0}


def test_what_finds_no_room_is_dropped_and_counted() -> None:
    """A full queue keeps what it has, drops the newest and counts it."""
    notices = EventQueue(most=2)
    for number in (1, 2, 3):
        notices.put(notice(number))
    assert [one.at_ns for one in notices.take()] == [1, 2]
    assert notices.counters() == {"notices": 2, "notices_dropped": 1}
