"""For all tests: Triton decides when it is imported, by whomever, whether kernels are interpreted; and what shells
differ in."""

import os
import signal

os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts what runs in its background with SIGINT ignored, and whoever is started from there ignores it, too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.rings"]
