"""The first import of TRL and all that it needs, which takes most of the time of a short command."""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def fast_imports(absent: Sequence[str] = ()) -> Iterator[None]:
    """Around the first import of TRL: no garbage is collected meanwhile, which takes a fifth of it; later, no effect.

    What was imported is left out of later collections too. Packages in `absent` seem not to be installed to those that
    would import them on the side; only for a command that needs none of them until its end.
    """
    if "transformers" in sys.modules:
        yield
        return
    hidden = [name for name in absent if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        gc.freeze()
        if enabled:
            gc.enable()
