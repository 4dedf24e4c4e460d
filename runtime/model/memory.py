"""How many bytes this process may still allocate. Unknown systems answer None, and no check is made."""

from __future__ import annotations

import os
from pathlib import Path

from caesura.runtime.errors import NotEnoughMemory

_CGROUPS = (  # limit, usage, and the statistic that names the file cache within the usage
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_memory_bytes() -> int | None:
    """The smaller of the system's available memory and what the control group still allows."""
    candidates = [value for value in (_system_bytes(), _cgroup_bytes()) if value is not None]
    return min(candidates) if candidates else None


def require_memory(needed_bytes: int, what: str, advice: str, available_bytes: int | None = None) -> None:
    """Raise NotEnoughMemory unless ``needed_bytes`` fit. ``available_bytes`` None: ask the system."""
    available = available_memory_bytes() if available_bytes is None else available_bytes
    if available is not None and needed_bytes > available:
        gib = 1 << 30
        raise NotEnoughMemory(
            f"{what} needs {needed_bytes / gib:.2f} GiB and {available / gib:.2f} GiB are available; {advice}"
        )


def _system_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _cgroup_bytes() -> int | None:
    for limit_file, usage_file, statistics_file, cache_name in _CGROUPS:
        try:
            limit, usage = int(Path(limit_file).read_text()), int(Path(usage_file).read_text())
            statistics = dict(line.split() for line in Path(statistics_file).read_text().splitlines())
            reclaimable = int(statistics.get(cache_name, 0))
        except (OSError, ValueError):  # no such group, or "max"
            continue
        return max(0, limit - usage + reclaimable)
    return None
