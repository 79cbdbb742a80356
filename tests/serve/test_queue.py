from __future__ import annotations

from dataclasses import dataclass

from ddlm.serve.queue import FairQueue


@dataclass(eq=False)
class Entry:
    client: str
    number: int


def test_clients_take_turns_and_keep_their_order() -> None:
    queue: FairQueue[Entry] = FairQueue(100, 100)
    for i in range(5):
        queue.put(Entry("a", i))
    for i in range(2):
        queue.put(Entry("b", i))
    queue.put(Entry("c", 0))
    order = [(e.client, e.number) for e in iter(queue.take, None)]
    assert order == [
        ("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2), ("a", 3), ("a", 4),
    ]  # fmt: skip


def test_places_are_held_until_they_are_given_back() -> None:
    queue: FairQueue[Entry] = FairQueue(3, 2)
    first, second = Entry("a", 0), Entry("a", 1)
    queue.put(first)
    queue.put(second)
    assert not queue.room("a", 1)
    assert queue.room("b", 1)
    assert not queue.room("b", 2)
    assert queue.take() is first
    assert queue.held == 2
    queue.sweep(lambda entry: entry.number < 2)
    assert queue.held == 1, "only what waits is swept, not what is at work"
    queue.release(first)
    assert queue.held == len(queue) == 0
    assert queue.take() is None


def test_a_sweep_keeps_turns_and_order() -> None:
    queue: FairQueue[Entry] = FairQueue(100, 3)
    for i in range(3):
        queue.put(Entry("a", i))
    queue.put(Entry("b", 0))
    queue.put(Entry("c", 0))
    queue.sweep(lambda entry: (entry.client, entry.number) in {("a", 1), ("b", 0)})
    assert (queue.held, len(queue)) == (3, 3)
    assert queue.room("a", 1)
    assert not queue.room("a", 2)
    assert [(e.client, e.number) for e in iter(queue.take, None)] == [("a", 0), ("c", 0), ("a", 2)]
