"""Takes as long to import as a model stack, for the tests of launchers."""

import time

time.sleep(4.0)
