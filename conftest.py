"""Hypothesis profiles and the pytester fixture for every test.

HYPOTHESIS_PROFILE=ci (the default where CI is set) is derandomized: a red build can be repeated by
running it again. It draws half as many examples: they are the same ones in every build.
"""

import os
import signal

from hypothesis import settings

# many ranks share few cores; set before anything imports torch, and for every child process
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a shell starts background jobs with SIGINT ignored, and every process they start inherits that:
# what tests send Ctrl-C to has to get it wherever the tests run
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["pytester"]

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True, max_examples=50)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))
