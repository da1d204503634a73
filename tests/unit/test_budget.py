"""A caller's budget: what waits, what is refused, and what a refusal costs."""

from __future__ import annotations

import pytest

from raysandbox.cluster.budget import LARGE_BYTES, Account, OverBudgetError
from raysandbox.cluster.settings import RoleLimit

LIMIT = RoleLimit(
    calls_per_s=10, calls_burst=5, read_bytes_per_s=1 << 20, read_burst_bytes=4 << 20,
    write_bytes_per_s=1 << 20, write_burst_bytes=4 << 20, in_flight=2,
    stored_bytes=1 << 20,
)  # fmt: skip


def test_calls_wait_and_are_refused_after_a_second_of_debt() -> None:
    """The burst is free, then each call waits longer, then comes the refusal."""
    account = Account(LIMIT, 0.0)
    waits = [account.count(0.0) for _ in range(15)]
    assert waits[:5] == [0.0] * 5
    assert waits[5:] == pytest.approx([0.1 * n for n in range(1, 11)])
    with pytest.raises(OverBudgetError) as error:
        account.count(0.0)
    assert error.value.retry


def test_refused_calls_cost_nothing_more() -> None:
    """Debt does not grow without end: a second later there is room again."""
    account = Account(LIMIT, 0.0)
    for _ in range(15):
        account.count(0.0)
    for _ in range(1000):
        with pytest.raises(OverBudgetError):
            account.count(0.0)
    assert account.count(1.0) <= 0.1 + 1e-9


def test_bytes_are_charged_before_the_call() -> None:
    """A read that is given up has cost what it would have cost the GCS."""
    account = Account(LIMIT, 0.0)
    assert account.charge(0.0, 4 << 20, 0, "a") == 0.0
    account.ended("a")
    assert account.charge(0.0, 1 << 20, 0, "b") == pytest.approx(1.0)
    with pytest.raises(OverBudgetError):
        account.charge(0.0, 1 << 20, 0, "c")


def test_too_much_at_once_is_refused_for_good() -> None:
    """And says which setting."""
    with pytest.raises(OverBudgetError, match="write_burst_bytes") as error:
        Account(LIMIT, 0.0).charge(0.0, 0, (4 << 20) + 1, "a")
    assert not error.value.retry


def test_large_calls_have_places_in_flight() -> None:
    """Small ones take none; a place is free when the call has ended."""
    account = Account(LIMIT, 0.0)
    for name in ("a", "b"):
        account.charge(0.0, LARGE_BYTES, 0, name)
        account.charge(0.0, LARGE_BYTES - 1, 0, f"small-{name}")
    with pytest.raises(OverBudgetError, match="in flight"):
        account.charge(0.0, LARGE_BYTES, 0, "c")
    account.ended("a")
    account.charge(0.0, LARGE_BYTES, 0, "c")
