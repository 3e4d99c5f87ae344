"""Works around a gloo crash (SIGABRT) at interpreter exit of runs with several processes on CPUs."""

import atexit
import time

import torch.distributed as dist

#: Seconds that a process pauses at exit, for gloo's threads to release their tensors.
PAUSE = 0.3


def pause_at_exit() -> None:
    """Registers a short pause at exit if this process belongs to a gloo process group; communicates with no other process.

    In PyTorch 2.13 a gloo thread may still hold a tensor of the last collective when Python shuts down. To release it, the
    thread needs the GIL; Python then ends the thread, which C++ answers with `std::terminate`. The process dies with SIGABRT
    ("terminate called without an active exception") after all its work is done, and the launcher reports a failed run.
    Destroying the process group does not help: it does not wait for the thread while a wrapped model still holds the group.
    """
    if dist.is_available() and dist.is_initialized() and "gloo" in dist.get_backend_config():
        atexit.unregister(_pause)
        atexit.register(_pause)


def _pause() -> None:
    # A sleeping main thread does not hold the GIL.
    time.sleep(PAUSE)
