"""The host's memory: settings that make CPU training faster, and how much there is. Imports no torch: the settings
must come before it."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # version 2, as seen inside a container
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc


def tune_host_memory() -> None:
    """Let tensors live in huge pages, and let freed memory stay with the process.

    Every step frees and asks for the same memory; given back in between, each page of it faults again. Steps of a
    4-layer, 256-wide encoder on two cores: 1.04 to 1.19 times as fast in three alternating pairs. Does nothing outside
    Linux with glibc, and leaves THP_MEM_ALLOC_ENABLE as the environment sets it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 256 << 20)):
        mallopt(option, value)


def ram_bytes() -> int:
    """RAM that this process may use: the machine's, or less where its container is limited."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return machine
