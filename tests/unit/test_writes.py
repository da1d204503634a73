"""What is known of a key, beside what a GCS holds that does calls when it likes."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from raysandbox.cluster.writes import UNSURE_S, Write, Writes

KEYS = ("a", "b")
LARGEST = 9


class _Call:
    """A write on its way: of some keys, to a size, None to delete them."""

    def __init__(self, names: tuple[str, ...], size: int | None) -> None:
        self.names, self.size = names, size
        self.is_done = False


class _Model:
    """Counts as the access service does: the larger one, until it is certain."""

    def __init__(self, rng: random.Random) -> None:
        self.random, self.now, self.number = rng, 0.0, 0
        self.writes: Writes[str, list[int]] = Writes()
        self.known: dict[str, list[int]] = {}
        self.held: dict[str, int] = {}
        self.open: dict[str, _Call] = {}
        self.given_up: list[tuple[float, _Call]] = []

    def begin(self) -> None:
        self.number += 1
        if self.random.random() < 0.3:
            call = _Call(
                tuple(self.random.sample(KEYS, self.random.randint(1, 2))), None
            )
            before = {n: self.known[n] for n in call.names if n in self.known}
            write = Write("me", before, None)
        else:
            name = self.random.choice(KEYS)
            call = _Call((name,), self.random.randint(1, LARGEST))
            size = call.size or 0
            self.known[name] = [max(size, *self.known.get(name, [0]))]
            write = Write("me", {name: self.known[name]}, [size])
        self.open[str(self.number)] = call
        self.writes.begin(str(self.number), self.now, write)

    def do(self, call: _Call) -> None:
        """What the GCS does, once."""
        if call.is_done:
            return
        call.is_done = True
        for name in call.names:
            if call.size is None:
                self.held.pop(name, None)
            else:
                self.held[name] = call.size

    def end(self) -> None:
        name = self.random.choice(list(self.open))
        call = self.open.pop(name)
        answered = self.random.random() < 0.7
        if answered:
            self.do(call)
        else:
            self.given_up.append((self.now, call))
        write, certain = self.writes.end(name, self.now, done=answered)
        assert write is not None
        for key in certain:
            if self.known.get(key) is not write.before[key]:
                continue
            if write.made is None:
                del self.known[key]
            else:
                self.known[key] = list(write.made)

    def step(self) -> None:
        roll = self.random.random()
        if roll < 0.35:
            self.begin()
        elif roll < 0.65 and self.open:
            self.end()
        elif roll < 0.8 and self.open:
            self.do(self.random.choice(list(self.open.values())))
        elif roll < 0.9 and self.given_up:
            since, call = self.random.choice(self.given_up)
            if self.now - since < UNSURE_S:
                self.do(call)
        else:
            self.now += self.random.choice([0.1, UNSURE_S / 2, UNSURE_S])


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_no_key_holds_more_than_is_known(rng: random.Random) -> None:
    """However calls cross, are given up, and come late.

    And when all has been quiet, one write that is answered is believed.
    """
    model = _Model(rng)
    for _ in range(60):
        model.step()
        for name, size in model.held.items():
            assert model.known[name][0] >= size
    while model.open:
        model.end()
    model.now += UNSURE_S
    model.known["a"] = [LARGEST]
    write = Write("me", {"a": model.known["a"]}, [1])
    model.writes.begin("last", model.now, write)
    assert model.writes.end("last", model.now, done=True) == (write, ["a"])
    assert model.writes._keys.keys() <= {*KEYS} - {"a"}
