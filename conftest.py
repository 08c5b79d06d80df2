"""Hypothesis profiles and the pytester fixture for every test.

HYPOTHESIS_PROFILE=ci (the default where CI is set) is derandomized: a red build can be repeated by
running it again.
"""

import os

from hypothesis import settings

# many ranks share few cores; set before anything imports torch, and for every child process
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester"]

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))
