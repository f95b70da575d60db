"""Runs the command that follows with Ctrl-C switched on.

A process that a script starts in the background ignores SIGINT, and so do its children: a test that
sends one must not depend on how the tests were started.
"""

import os
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
