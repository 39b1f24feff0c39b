"""Run by test_pods.py: one host of a run of several; `python pod_run.py FAULT HEARTBEAT`, then the options of main.

FAULT: "none", or KIND:INDEX:COUNT, what befalls which host as it puts its bins on its devices for the COUNT-th time.
"""

import os
import signal
import sys
import time

from absl import app

from cgrpo_jax import main
from cgrpo_jax.config import flags
from cgrpo_jax.learning import steps
from cgrpo_jax.process import pod, stopping

fault, heartbeat = sys.argv[1], float(sys.argv[2])
del sys.argv[1:3]
index = int(next(option for option in sys.argv if option.startswith("--hosts=")).rsplit(",", 1)[1])
kind, host, left = [*fault.split(":"), "-1", "0"][:3]
count = int(left)
put_bins = steps.put_bins


def faulty(mesh, bins):
    global count
    count -= 1
    if index == int(host) and count == 0:
        if kind == "error":
            raise RuntimeError(f"a fault of host {index}")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "stop": signal.SIGTERM}[kind])
        time.sleep(0.5 if kind == "stop" else 0)
    return put_bins(mesh, bins)


steps.put_bins = faulty
pod.HEARTBEAT = heartbeat
stopping.for_this_process()
app.run(main.main, flags_parser=flags.parse_flags)
