"""Runs a script in two processes of torch.distributed on this machine."""

import os
import subprocess
import sys
from pathlib import Path


def in_two_processes(script, place):
    """Run a script that leaves what it finds in a folder; return the folder."""
    paths = os.pathsep.join([str(Path(script).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, script, place], capture_output=True, text=True, check=False, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return place
