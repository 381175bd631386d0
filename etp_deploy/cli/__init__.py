"""The command line: one module for each command; what is heavy loads only once a command really works."""

from __future__ import annotations

from etp_deploy.cli.program import main

__all__ = ["main"]
