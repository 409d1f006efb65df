"""`python -m layerwise`, and `torchrun -m layerwise`: the command line."""

from __future__ import annotations

import os

from layerwise.cli import main

if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        record(main)(prog_name="layerwise")
    else:
        main(prog_name="layerwise")
