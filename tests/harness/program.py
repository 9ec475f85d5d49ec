"""What the tests of launchers start: a program that does what its first argument says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TOLD = (
    *("CUDA_VISIBLE_DEVICES", "MAMBABENCH_THREADS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GIVEN"),
    *("MAMBABENCH_SHARE", "HF_HUB_OFFLINE", "MAMBABENCH_PLUGINS_BLOCK"),
)
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def main(arguments):
    what, out = arguments
    if what == "tell":
        facts = {name: os.environ.get(name) for name in TOLD}
        facts |= {"argv": sys.argv, "path": sys.path, "group": os.getpgrp() == os.getpid(), "parent": os.getppid()}
        Path(out).write_text(json.dumps(facts))
        print("said on standard output")
        return 4
    if what == "kill":
        os.kill(os.getpid(), signal.SIGTERM)
    if what in ("hang", "leave"):
        from mambabench.harness.forkserver import watch

        watch()
        started = [subprocess.Popen(SLEEP), subprocess.Popen(SLEEP, start_new_session=True)]
        again = f"from subprocess import *; print(Popen({SLEEP!r}, start_new_session=True, stdout=-3, stderr=-3).pid)"
        orphan = int(subprocess.run([sys.executable, "-c", again], capture_output=True, check=True).stdout)
        Path(out + ".new").write_text(" ".join(map(str, [os.getpid(), *(each.pid for each in started), orphan])))
        os.rename(out + ".new", out)
        time.sleep(60 if what == "hang" else 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
