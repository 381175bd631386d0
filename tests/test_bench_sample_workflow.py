"""The sample workflow: what it runs is what the command line takes, and its gate can fail and pass."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from etp_deploy.bench.gate import parse_rule
from etp_deploy.cli.program import cli

WORKFLOW = Path(__file__).parent.parent / "samples" / "github-actions" / "benchmark.yml"
STEP = re.compile(r"^( *)(?:- )?run: *(.*)$")


def commands():
    """Every `run:` of the workflow, read by its indentation, split as a shell would."""
    lines = WORKFLOW.read_text(encoding="utf-8").splitlines()
    found = []
    for at, line in enumerate(lines):
        if match := STEP.match(line):
            text = "" if match[2] in {">-", "|"} else match[2]
            for further in lines[at + 1 :]:
                if not further.startswith(match[1] + "  "):
                    break
                text += " " + further.strip()
            found.append(shlex.split(text))
    return found


def bench_commands():
    """Arguments of the benchmark alone."""
    return [words[2:] for words in commands() if words[:2] == ["etp-deploy", "bench"]]


def test_the_reader_agrees_with_yaml():
    """The commands read by indentation are those that a YAML parser sees, and the steps have no unknown key."""
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the dev extra only")
    (job,) = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()
    assert [shlex.split(step["run"]) for step in job["steps"] if "run" in step] == commands()
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step)
        assert step.keys() <= {"name", "run", "uses", "with", "if"}


def test_the_command_line_takes_its_commands():
    """Both commands parse, the second gates on what the first saved, in the same settings, by readable rules."""
    saved, gated = (
        cli.commands["bench"].make_context("bench", arguments).params for arguments in bench_commands()
    )
    assert saved["output"] == gated["baseline"]
    assert [str(parse_rule(rule)) for rule in gated["rules"]] == ["p50>5%", "memory>2%"]
    for option in ("threads", "batch", "shapes", "providers", "sessions", "max_seconds", "no_memory"):
        assert saved[option] == gated[option]


def test_an_option_that_is_none_is_refused():
    """The parser that the commands are held against refuses what it does not know."""
    with pytest.raises(Exception, match="No such option"):
        cli.commands["bench"].make_context("bench", [*bench_commands()[0], "--fail-when", "p50>5%"])


def test_later_steps_use_what_is_written():
    """Files shown and kept are those that the commands write."""
    text = WORKFLOW.read_text(encoding="utf-8")
    kept = re.findall(r"^            (\w+\.\w+)$", text, re.MULTILINE)
    written = {str(word) for arguments in bench_commands() for word in arguments}
    assert kept == ["baseline.json", "result.json", "result.html"]
    assert {*kept, "result.md"} <= written
