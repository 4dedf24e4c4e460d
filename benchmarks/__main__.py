"""``python -m benchmarks [NAME ...]``."""

from benchmarks.common import main

raise SystemExit(main())
