"""Kernels that have TensorFlow loaded already, for tests that run whole suites.

Loading it takes 6 s of processor time, more than all else in a smoke run. One process loads it,
and each kernel is a fork of that process: with an environment and a folder of its own, started,
talked to and ended by Jupyter as any other. TensorFlow makes its threads when it first
computes, which is after the fork.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

# Stands before the module of this name that Jupyter starts kernels with.
LAUNCHER = """
import sys
sys.path.insert(0, {here!r})
import warm_kernel
sys.exit(warm_kernel.ask({place!r}, sys.argv[1:]))
"""


@contextlib.contextmanager
def warm_kernels(folder: Path):
    "The environment in which Jupyter's kernels are forks of one process, here started."
    from dermnb.runs.runner import MEMORY

    if sys.platform != "linux":  # elsewhere, libraries do not survive a fork
        yield {}
        return
    place, here = str(folder / "line"), str(Path(__file__).parent)
    launcher = LAUNCHER.format(here=here, place=place)
    (folder / "ipykernel_launcher.py").write_text(launcher)
    old = os.environ.get("PYTHONPATH")
    server = subprocess.Popen(
        [sys.executable, __file__, place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | MEMORY,
    )
    try:
        assert server.stdout.readline() == b"ready\n"
        yield {"PYTHONPATH": f"{folder}{os.pathsep}{old}" if old else str(folder)}
    finally:
        server.communicate()  # closes its stdin, and it ends


def serve(place: str) -> None:
    "Load what the experiments import; then a fork for each that asks, until stdin is closed."
    import keras  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    from ipykernel import kernelapp

    import dermnb.runs.train
    import dermnb.serve.explain  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    print("ready", flush=True)
    while select.select([sys.stdin, listener], [], [])[0] == [listener]:
        line, _ = listener.accept()
        text, outputs, *_ = socket.recv_fds(line, 1 << 20, 2)
        if not os.fork():
            listener.close()
            become_kernel(kernelapp, line, json.loads(text), outputs)
        for held in (*outputs, line.detach()):
            os.close(held)


def become_kernel(kernelapp, line: socket.socket, asked: dict, outputs: list[int]) -> None:
    "Be the process that Jupyter wanted, as long as the one that it started is there."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for place, given in enumerate(outputs, 1):
        os.dup2(given, place)
        os.close(given)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    threading.Thread(target=lambda: line.recv(1) or os._exit(1), daemon=True).start()
    status = 1
    try:
        kernelapp.launch_new_instance(asked["argv"], parent_handle=os.getppid())
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        line.send(bytes([status]))
        os._exit(status)


def ask(place: str, arguments: list[str]) -> int:
    "Get a kernel with this process's output, and end when it ends, with its status."
    asked = {"argv": arguments, "cwd": os.getcwd(), "env": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(place)
        socket.send_fds(line, [json.dumps(asked).encode()], [1, 2])
        line.settimeout(1)
        parent = os.getppid()
        while os.getppid() == parent:  # who started this may be killed
            with contextlib.suppress(TimeoutError):
                return (line.recv(1) or b"\x01")[0]
    return 1


if __name__ == "__main__":
    serve(sys.argv[1])
