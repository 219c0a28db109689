"""encoderkit-pretrain with one fault in it, for processes that a launcher starts: victim.py FAULT run --config ...

killed: the last rank kills itself at step 9 of its first start. unaware: so it does, and what the launcher says of
restarts is hidden. hangs: the last rank sleeps at step 5.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import encoderkit.encoder.precision as precision
import encoderkit.pretrain.__main__ as commands
import encoderkit.pretrain.loop as loop
from encoderkit.kernels.matrix_route import Route


def plant(fault: str) -> None:
    is_last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    is_first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if fault == "unaware":
        commands._was_restarted = lambda: False
    precision.fastest_route = lambda: Route("mkl", "for comparison")  # as in children
    train_step = loop.train_step

    def faulty(job, batches):
        if is_last and fault == "hangs" and job.state.step == 5:
            time.sleep(3600)
        if is_last and is_first_start and fault != "hangs" and job.state.step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(job, batches)

    loop.train_step = faulty


if __name__ == "__main__":
    plant(sys.argv[1])
    sys.exit(commands.main(sys.argv[2:]))
