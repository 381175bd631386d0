"""Everything that can make a measurement doubtful, by name, with what to do about it."""

from __future__ import annotations

import dataclasses

HINTS = {
    "load": "stop what else runs on the machine, or read the CPU-clock ratio only",
    "preempted": "the ratio is on the CPU clock, which this does not touch; wall times are too long",
    "governor": "set the governor to performance (cpupower frequency-set -g performance)",
    "frequency": "let the machine cool, or fix its frequency",
    "drift": "let the machine cool, or measure for longer; ratios are drift-free, absolute times are not",
    "few_sessions": "raise the time limit or lower the batch size",
    "few_samples": "high percentiles need more samples: raise the number of sessions",
    "noisy_control": "the same model differed from itself: read no difference smaller than that",
    "spinning_off": "threads do not spin while models are compared; a deployment that lets them is quicker",
    "more_threads_than_cores": "use as many threads as physical cores, or fewer",
    "cpu_quota": "the container's CPU quota throttles: raise it or use fewer threads",
    "overhead_dominates": "the call from Python takes a visible share: raise the batch size",
    "copies_dominate": "inputs and outputs take most of the time: keep them on the device (IO binding)",
    "inputs_dominate": "the inputs are larger than the weights: measure with the sizes that you deploy",
    "inputs_differ": "the models take different inputs, so their outputs could not be compared",
    "outputs_differ": "a faster model that computes something else is no comparison: verify first",
    "no_contest": "outputs could not be compared",
    "dead_unknown": "the measurements hold; etp-deploy inspect MODEL says more",
    "low_memory": "close other programs: the models are all loaded at the same time",
    "partial_provider": "nodes that the provider does not take run on the CPU, with copies in between",
    "static_batch": "the model fixes its batch size: export it with a dynamic one",
    "memory_unavailable": "memory by phase needs Linux",
    "energy_unavailable": "energy needs readable RAPL counters or an NVIDIA GPU",
}


@dataclasses.dataclass(frozen=True, order=True)
class Caution:
    """One reason for doubt.

    Args:
        name: one of the names in `HINTS`.
        message: what was seen, with its numbers.
    """

    name: str
    message: str

    @property
    def hint(self) -> str:
        """What to do about it."""
        return HINTS[self.name]

    def to_json(self) -> dict[str, str]:
        """Name, message and hint."""
        return {"name": self.name, "message": self.message, "hint": self.hint}


def distinct(cautions: list[Caution]) -> tuple[Caution, ...]:
    """Each message once, in order of appearance."""
    return tuple(dict.fromkeys(cautions))
