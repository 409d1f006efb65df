"""What a figure was taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch


def machine() -> dict[str, Any]:
    """Processor, cores, threads, load, GPU and versions, as they are now."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def in_words(told: dict[str, Any]) -> str:
    """A line of it."""
    return (
        f"{told['device']}, {told['cores']} cores ({told['processor']}), {told['threads']} threads, load "
        f"{told['load']:.1f} when it began, torch {told['torch']}, numpy {told['numpy']}"
    )


def _processor() -> str:
    """As the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
