"""``python -m benchmarks [NAME ...]``."""

import sys

from benchmarks.common import main

try:
    raise SystemExit(main())
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    raise SystemExit(130) from None
