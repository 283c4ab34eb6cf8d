"""Measurements, none of which any result depends on; see docs/speed.md and docs/statistics.md."""

import os

# PyTorch's profiler logs its own starts and stops between the rows, at up to level 5; it reads this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
