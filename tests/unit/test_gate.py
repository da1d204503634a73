"""What a worker believes of itself against what a job asks for."""

from __future__ import annotations

import pytest

from raysandbox import policy as policies
from raysandbox.policy import Policy
from raysandbox.worker.gate import Gate

NAMED = {
    "image_uri": {"docker.example/x": "/srv/x"},
    "conda": {"ml": "/opt/ml"},
    "nsight": "/opt/nsys-python",
    "why": "a test",
}


@pytest.mark.parametrize(
    ("wanted", "interpreter"),
    [
        ({}, ""),
        ({"pip": ["x"]}, ""),
        ({"image_uri": "docker.example/x"}, "image_uri:docker.example/x"),
        ({"conda": "ml"}, "/opt/ml/bin/python"),
        ({"nsight": "default"}, "nsight:/opt/nsys-python"),
    ],
)
def test_a_worker_serves_those_who_asked_for_its_interpreter(wanted, interpreter):
    """Anybody else is refused, by name, and not served by another."""
    policy = Policy.model_validate({"runtime_env": NAMED})
    node = policies.resolve(policy)
    gate = Gate.__new__(Gate)
    gate.launched, gate.interpreter = True, interpreter
    assert gate._other_interpreter(node, wanted) == ""
    gate.interpreter = "/opt/other/bin/python"
    why = gate._other_interpreter(node, wanted)
    assert why.endswith("this worker has /opt/other/bin/python")
    # With the hook alone nobody but Ray could put it there; never an image.
    gate.launched, gate.interpreter = False, ""
    is_refused = bool(gate._other_interpreter(node, wanted))
    assert is_refused == ("image_uri" in wanted)
