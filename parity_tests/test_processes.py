"""Two real processes on loopback, with gloo collectives, give the single-process answer."""

import socket

from parity_tests.commands import start_python


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_linear_cross_entropy_over_two_processes():
    port = str(free_port())
    processes = [start_python("-m", "parity_tests.two_processes", port, str(i)) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (output, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output + error
        assert output.count("equal") == 6, output + error
