"""A command by several processes, as torchrun starts them, each of which a test can end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def started(count: int, *words: str, folder: Path, module: bool = True) -> list[subprocess.Popen[str]]:
    """So many processes of `layerwise WORDS` (or of a script), which find each other on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cache")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *(["-m", "layerwise"] if module else []), *words],
            env=common | ({} if count == 1 else {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        for rank in range(count)
    ]


def ended(processes: Sequence[subprocess.Popen[str]], timeout: float = 180) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    until = time.monotonic() + timeout
    found = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=max(1.0, until - time.monotonic()))
            found.append((process.returncode, output))
    finally:
        for process in processes:
            process.kill()
    return found


def once(condition: Callable[[], object], processes: Sequence[subprocess.Popen[str]], timeout: float = 120) -> bool:
    """Wait for a condition; whether it came before all processes ended."""
    until = time.monotonic() + timeout
    while not condition():
        if all(process.poll() is not None for process in processes):
            return bool(condition())
        assert time.monotonic() < until, "it did not come in time"
        time.sleep(0.005)
    return True
