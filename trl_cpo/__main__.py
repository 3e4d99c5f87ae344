"""`python -m trl_cpo` is `trl-cpo`; with `accelerate launch -m trl_cpo` it starts on several processes."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
