"""The errors a caller can handle, each with what happened, where, and what to do next.

Exit codes of the command line: 0 done, 1 the answer is no (verification failed, regression found), 2 usage,
3 an error of ours or of the model's.
"""

from __future__ import annotations


class EtpError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what happened, one line.
        where: the file, node, tensor or option concerned; empty when there is none.
        hint: what the reader can do next; empty when there is nothing.
    """

    exit_code = 3

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message, where, hint)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        line = f"{self.where}: {self.message}" if self.where else self.message
        return f"{line} ({self.hint})" if self.hint else line


class UsageError(EtpError):
    """An option or argument that cannot be meant."""

    exit_code = 2


class ModelError(EtpError):
    """A model file that cannot be read, or that is not valid ONNX."""


class InputError(EtpError):
    """A file of inputs that is missing, or that cannot be read."""


class ExportError(EtpError):
    """A PyTorch module that could not be exported, or whose export computes something else."""


class PlanError(EtpError):
    """A removal plan that contradicts the graph; a defect of ours."""


class VerificationError(EtpError):
    """Two models that should agree do not."""

    exit_code = 1


class ProviderError(EtpError):
    """An execution provider that was asked for and not got."""


class BundleError(EtpError):
    """A bundle that is incomplete, altered or of an unknown version."""


class BenchmarkError(EtpError):
    """A measurement that could not be taken."""


class OutputError(EtpError):
    """A place that cannot be written to, or that must not be."""
