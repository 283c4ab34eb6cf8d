"""Measurements on which no result depends; see docs/speed.md and docs/statistics.md."""

import os

# Silences the profiler's own log, of levels up to 5. It reads this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
