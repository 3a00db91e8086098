"""The clock of whoever has minutes to spend: a process that is stopped does not pay for it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from mlx_specstream.train.awake import LONGEST_S, AwakeClock


def test_it_counts_as_any_clock_does() -> None:
    clock = AwakeClock()
    assert clock.now() == 0
    time.sleep(0.2)
    assert 0.2 <= clock.now() < 2


def test_a_stopped_process_does_not_grow_older() -> None:
    code = (
        "import sys, time\n"
        "from mlx_specstream.train.awake import awake_s\n"
        "awake_s()\n"
        "print('begun', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(awake_s(), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        began = time.monotonic()
        process.send_signal(signal.SIGSTOP)
        time.sleep(3 * LONGEST_S)
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        counted, passed = float(process.stdout.readline()), time.monotonic() - began
    assert counted <= passed - 2 * LONGEST_S + 0.5
