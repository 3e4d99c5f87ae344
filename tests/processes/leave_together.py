"""Run by test_processes.py in two processes: the second is late for the last collective, so that a thread of gloo lets go of
its tensor when Python is about to shut down in the first.

    leave_together.py gently | as-it-is
"""

import atexit
import ctypes

# Registered first, so called last before Python shuts down: 0.6 s in which no other thread gets Python's lock (`PyDLL`
# keeps it), and no bytecode after, at which it could be handed over.
atexit.register(ctypes.PyDLL(None).usleep, 600_000)

import os
import sys
import time

import torch
import torch.distributed as dist

from trl_cpo.engine import shutdown

dist.init_process_group("gloo")
if sys.argv[1] == "gently":
    # Long enough for a machine under load: the second process must get to its collective within it.
    shutdown.PAUSE = 2.0
    shutdown.pause_at_exit()
dist.barrier()
if os.environ["RANK"] == "1":
    time.sleep(0.1)
dist.all_reduce(torch.zeros(4), async_op=True)
print("left", flush=True)
