"""Has a model become worse than a saved result? The answer for a pipeline: passed, regressed or undecided.

Rules read like `p50>5%`: fail when the metric grew by more than five percent. Times are compared with a
confidence interval over sessions, so a noisy machine gives "undecided" where it cannot tell, never a false
alarm presented as a fact.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

from etp_deploy.bench import environment
from etp_deploy.bench.results import SCHEMA
from etp_deploy.bench.statistics import t_quantile
from etp_deploy.bench.text import setting
from etp_deploy.errors import BenchmarkError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TIMES = ("p50", "p90", "p95", "p99", "mean", "min")
# word in a rule -> where the number is
MEMORY = {
    "memory": "peak_rss_bytes",
    "activations": "activation_peak_bytes",
    "weights": "weights_bytes",
    "steady": "steady_rss_bytes",
    "load_peak": "load_peak_rss_bytes",
}
OTHERS = ("creation", "first_run", "size")
CONFIDENCE = 0.95
_RULE = re.compile(r"^\s*(\w+)\s*>\s*(\d+(?:\.\d+)?)\s*%\s*$")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Fail when a metric grew by more than `percent`."""

    metric: str
    percent: float

    def __str__(self) -> str:
        return f"{self.metric}>{self.percent:g}%"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one rule says of one model in one setting.

    Args:
        rule: the rule.
        model: the model's name in the new result.
        where: the setting in words.
        before: the metric in the saved result.
        after: the metric in the new result.
        low: lower bound of after over before.
        high: upper bound of after over before.
        outcome: "passed", "regressed" or "undecided".
    """

    rule: Rule
    model: str
    where: str
    before: float
    after: float
    low: float
    high: float
    outcome: str

    def __str__(self) -> str:
        change = self.after / self.before - 1 if self.before else math.inf if self.after else 0.0
        sure = "" if self.low == self.high else f" ({self.low - 1:+.1%} to {self.high - 1:+.1%})"
        seen = f"{self.rule.metric} {change:+.1%}{sure}, rule {self.rule}"
        return f"{self.outcome}: {self.model}, {self.where}: {seen}"


@dataclasses.dataclass(frozen=True)
class GateOutcome:
    """All findings together.

    Args:
        status: "passed", "regressed" or "undecided".
        findings: one for each rule, model and setting.
        environment: in what the two machines differ, in words; empty when they agree.
    """

    status: str
    findings: tuple[Finding, ...]
    environment: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """1 when regressed; undecided is no regression, and its message says so."""
        return 1 if self.status == "regressed" else 0

    @property
    def message(self) -> str:
        """One line for the pipeline's log."""
        counts = {o: sum(f.outcome == o for f in self.findings) for o in ("regressed", "undecided", "passed")}
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        if self.status == "undecided":
            return f"undecided: too noisy to tell ({said}); measure more sessions or a quieter machine"
        return f"{self.status}: {said}"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        findings = [{**dataclasses.asdict(f), "rule": str(f.rule)} for f in self.findings]
        return {"status": self.status, "findings": findings, "environment": list(self.environment)}


def parse_rule(text: str) -> Rule:
    """Read a rule such as `p50>5%` or `memory>2%`.

    Raises:
        UsageError: with the metrics there are.
    """
    found = _RULE.match(text)
    known = (*TIMES, *MEMORY, *OTHERS)
    if not found or found.group(1) not in known:
        raise UsageError(
            "not a rule", where=text, hint=f"write METRIC>PERCENT%, the metric one of {', '.join(known)}"
        )
    return Rule(found.group(1), float(found.group(2)))


def evaluate_gate(
    result: Mapping[str, Any],
    baseline: Mapping[str, Any],
    rules: Sequence[str],
    *,
    allow_other_environment: bool = False,
) -> GateOutcome:
    """Hold a new result against a saved one.

    Models are matched by name and setting; where both documents hold a single model, names may differ.

    Args:
        result: the new document.
        baseline: the saved document.
        rules: such as `p50>5%`.
        allow_other_environment: compare although the machines differ.

    Raises:
        UsageError: when a rule cannot be read.
        BenchmarkError: when the machines differ, a document is of another kind, or nothing matches.
    """
    parsed = [parse_rule(rule) for rule in rules]
    for document in (result, baseline):
        check_schema(document)
    apart = tuple(environment.differences(baseline["environment"], result["environment"]))
    if apart and not allow_other_environment:
        raise BenchmarkError(
            f"the baseline is from another environment: {'; '.join(apart)}",
            hint="measure the baseline here, or allow another environment",
        )
    pairs = list(_pairs(result, baseline))
    if not pairs:
        raise BenchmarkError(
            "the baseline holds none of these models in these settings", hint="names and settings must agree"
        )
    findings = tuple(_finding(rule, new, old) for new, old in pairs for rule in parsed)
    outcomes = {finding.outcome for finding in findings}
    status = next((o for o in ("regressed", "undecided") if o in outcomes), "passed")
    return GateOutcome(status, findings, apart)


def check_schema(document: Mapping[str, Any], *, where: str = "") -> None:
    """Refuse what is no result of this version.

    Raises:
        BenchmarkError: with the schema found.
    """
    found = document.get("schema")
    if found != SCHEMA:
        raise BenchmarkError(
            f"not a benchmark result: schema {found!r}", where=where, hint=f"wanted {SCHEMA}"
        )


@dataclasses.dataclass(frozen=True)
class _Side:
    """One model in one setting of one document."""

    model: Mapping[str, Any]
    measured: Mapping[str, Any]
    sessions: Sequence[Mapping[str, Any]]


def _sides(document: Mapping[str, Any]) -> Iterator[_Side]:
    raw = {(s["model"], setting(s)): s["sessions"] for s in document["samples"] if s["role"] == "model"}
    for model in document["models"]:
        for measured in model["measurements"]:
            yield _Side(model, measured, raw.get((model["name"], setting(measured)), ()))


def _pairs(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> Iterator[tuple[_Side, _Side]]:
    alone = len(result["models"]) == len(baseline["models"]) == 1
    for new in _sides(result):
        for old in _sides(baseline):
            same_name = alone or new.model["name"] == old.model["name"]
            same_work = new.measured["shapes"] == old.measured["shapes"]
            if same_name and same_work and setting(new.measured) == setting(old.measured):
                yield new, old


def _finding(rule: Rule, new: _Side, old: _Side) -> Finding:
    before, after = _value(rule.metric, old), _value(rule.metric, new)
    low = high = after / before if before else (math.inf if after else 1.0)
    if rule.metric in TIMES:
        low, high = _interval(rule.metric, new, old)
    limit = 1 + rule.percent / 100
    outcome = "regressed" if low > limit else "passed" if high <= limit else "undecided"
    return Finding(rule, new.model["name"], setting(new.measured), before, after, low, high, outcome)


def _value(metric: str, side: _Side) -> float:
    if metric in TIMES:
        return float((side.measured["cpu_time_ms"] or side.measured["latency_ms"])[metric])
    if metric in MEMORY:
        used = side.measured["memory"]
        number = used[MEMORY[metric]] if used else None
        if number is None:
            raise BenchmarkError(
                f"{metric} was not measured", where=side.model["name"], hint="measure memory"
            )
        return float(number)
    keys = {"creation": "session_creation_ms", "first_run": "first_run_ms"}
    return float(side.model["bytes"] if metric == "size" else side.measured[keys[metric]])


def _interval(metric: str, new: _Side, old: _Side) -> tuple[float, float]:
    """Welch's interval on the log ratio, the session as the unit on both sides."""
    clock = "cpu_ns" if new.measured["cpu_time_ms"] and old.measured["cpu_time_ms"] else "wall_ns"
    logs = [[math.log(_statistic(metric, s[clock])) for s in side.sessions] for side in (new, old)]
    if min(len(values) for values in logs) < 2:
        return 0.0, math.inf
    errors = [statistics.variance(values) / len(values) for values in logs]
    middle = statistics.mean(logs[0]) - statistics.mean(logs[1])
    if not any(errors):
        return math.exp(middle), math.exp(middle)
    degrees = sum(errors) ** 2 / sum(e**2 / (len(v) - 1) for e, v in zip(errors, logs, strict=True))
    half = t_quantile(max(int(degrees), 1), 0.5 + CONFIDENCE / 2) * math.sqrt(sum(errors))
    return math.exp(middle - half), math.exp(middle + half)


def _statistic(metric: str, times: Sequence[int]) -> float:
    if metric == "mean":
        return statistics.mean(times)
    return float(np.percentile(times, 0 if metric == "min" else int(metric[1:])))
