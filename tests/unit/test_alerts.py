"""The example alert rules: what Prometheus reads, of what the page has."""

from __future__ import annotations

import ast
import re
from importlib import resources
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from raysandbox.cluster import supervisor
from raysandbox.cluster.metrics import ALERTS, Metrics

RULES = resources.files("raysandbox.cluster").joinpath("alerts.yml").read_text()


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES)["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _selectors(node: Any) -> list[Any]:
    """Return every selector of a series in an expression."""
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    found = []
    for name in ("lhs", "rhs", "expr", "args", "vector_selector"):
        inner = getattr(node, name, None)
        for each in inner if isinstance(inner, list) else [inner]:
            if each is not None:
                found += _selectors(each)
    return found


@pytest.mark.parametrize("rule", _rules(), ids=lambda rule: rule["alert"])
def test_rule_is_one_that_can_fire(rule: dict[str, Any]) -> None:
    """It parses, names series and labels of the page, and says what to do.

    Guards against a rule on a misspelt series, which is silent for ever.
    """
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    metrics = Metrics()
    metrics.call("driver", False, 1)
    metrics.expires.labels("guard").set(1)
    series = {
        sample.name: {*sample.labels}
        for family in metrics.registry.collect()
        for sample in family.samples
    }
    selectors = _selectors(promql_parser.parse(rule["expr"]))
    assert selectors
    for selector in selectors:
        assert selector.name in series, selector.name
        for matcher in selector.matchers.matchers:
            assert matcher.name in series[selector.name]
            if matcher.name == "alert":
                assert set(matcher.value.split("|")) <= set(ALERTS)


def test_rule_that_does_not_parse_is_found() -> None:
    """Positive control of the parser."""
    with pytest.raises(ValueError, match="brackets"):
        promql_parser.parse("increase(rsb_alerts_total[5m) > 0")


def test_every_alert_begins_at_zero() -> None:
    """A series that is first seen at 1 has not increased, says Prometheus."""
    tree = ast.parse(Path(supervisor.__file__).read_text())
    raised = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.alert":
            raised |= set(re.findall(r"'([a-z_]+)'", ast.unparse(node.args[0])))
    raised -= {"RegisterNode"}
    assert len(raised) > 5
    assert raised <= set(ALERTS)
    page = Metrics().page().decode()
    for alert in ALERTS:
        assert f'rsb_alerts_total{{alert="{alert}"}} 0.0' in page
