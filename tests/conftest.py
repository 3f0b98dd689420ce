"""For all tests: Triton decides when it is imported, by whomever, whether kernels are interpreted."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
