"""The benchmark: cases.py says what is timed, run.py times it into JSON, plot.py draws that JSON.

`onepass bench`, `python -m onepass.bench`, and `pytest bench/test_speed.py` run the same cases.
Nothing here is imported by the rest of the package; importing it loads neither torch nor a peer.
"""

from __future__ import annotations

MODES = ("forward", "backward", "full")
DTYPES = ("float32", "bfloat16", "float16")
