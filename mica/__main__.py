"""``python -m mica``: the same as the ``mica`` command, also for ``torchrun -m mica``."""

import sys

from mica.cli import main

if __name__ == "__main__":
    sys.exit(main())
