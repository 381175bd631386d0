"""Runs a script in two processes of torch.distributed on this machine, and ends what it started there."""

import gc
import os
import subprocess
import sys
from pathlib import Path

from torch import distributed


def in_two_processes(script, place):
    """Run a script that leaves what it finds in a folder; return the folder."""
    paths = os.pathsep.join([str(Path(script).parents[1]), os.environ.get("PYTHONPATH", "")])
    # a process that is aborted says where it was
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONFAULTHANDLER": "1"}
    environment = {**os.environ, **own}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, script, place], capture_output=True, text=True, check=False, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return place


def leave_group():
    """End the process group: what still holds it goes first, and nobody leaves while the other works.

    A trainer's replica lies in a cycle of references; collected later, it would take down the threads of a group that
    is no more.
    """
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()
