"""Every attack of the catalogue whose probe shares a jail with others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from tests.attacks.catalogue import ATTACKS, Attack
from tests.attacks.harness import Actor
from tests.attacks.probes.base import PROBES

_SHARED = [attack for attack in ATTACKS if attack.control != "own"]


@pytest.mark.parametrize("attack", _SHARED, ids=[attack.id for attack in _SHARED])
def test_attack(attack: Attack, withstand: Callable[[Attack], None]) -> None:
    """It works outside; inside it meets exactly what the catalogue says."""
    withstand(attack)


# `strict` has no named sockets at all. Where a profile has them (`standard`), this
# is what each attempt meets; the last two say why `strict` has none.
_NAMED_SOCKETS = {
    "files.service_socket": "ENOENT",
    "files.ray_session_socket": "ENOENT",
    "network.pathname_socket_of_host": "ENOENT",
    "network.abstract_socket_of_host": "ECONNREFUSED",
    "network.abstract_datagram_to_host": "ECONNREFUSED",
    "network.descriptors_by_abstract_socket": "ECONNREFUSED",
    "network.bind_abstract_name": "blocked",
    "network.pathname_socket_in_readonly": "ok",
    "network.descriptors_by_socket_in_readonly": "ok",
}


def test_named_sockets_where_a_profile_has_them(actor: Actor) -> None:
    """Absence and the network namespace stop what the filter lets pass."""
    found = actor.attacks(_NAMED_SOCKETS, profile="sockets")
    assert {name: one.outcome for name, one in found.items()} == _NAMED_SOCKETS


def test_catalogue_and_probes_agree() -> None:
    """No probe without a row, no row without a probe, no row twice."""
    rows = Counter(attack.id for attack in _SHARED)
    assert set(rows) == set(PROBES)
    assert not [name for name, count in rows.items() if count > 1]
