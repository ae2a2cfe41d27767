"""Python loads this at its start: peers' scripts then find a pretended GPU."""

import sys

if any("/peers/" in word for word in sys.orig_argv):
    import pretended_cuda  # noqa: F401
