"""A run of several processes on CPUs ends as it went: gloo's threads let go of their tensors before Python does."""

import atexit
import time

import torch.distributed as dist

#: Seconds that a process lends its threads at its end.
PAUSE = 0.3


def pause_at_exit() -> None:
    """Makes this process pause at its exit if it belongs to a process group of gloo; says nothing and talks to nobody.

    In PyTorch 2.13 a thread of gloo may still hold a tensor of the last collective when Python shuts down. To let go of
    it the thread needs Python's lock, which Python then answers by ending the thread, and C++ by `std::terminate`: the
    process dies with SIGABRT, "terminate called without an active exception", after all its work is done, and the
    launcher calls the run failed. Destroying the group does not wait for the thread where a wrapped model still holds it.
    """
    if dist.is_available() and dist.is_initialized() and "gloo" in dist.get_backend_config():
        atexit.unregister(_pause)
        atexit.register(_pause)


def _pause() -> None:
    # Asleep, the main thread does not hold the lock.
    time.sleep(PAUSE)
