"""Open MLflow's pages on this machine: light, with one worker and no job runner."""

import os
import socket

from tttlab.errors import UserError
from tttlab.workflow import places


def is_taken(port: int) -> bool:
    """Tell whether something answers at a port of this machine, or nobody may."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            return True
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def open_pages(first: int) -> None:
    """Find a free port and serve there until Ctrl-C.

    Args:
        first: the first port to try.

    Raises:
        UserError: there is nothing to show, or no free port.
    """
    store = places.ROOT / "mlflow.db"
    if not store.is_file():
        raise UserError(
            f"{store}: expected MLflow's runs, found no file; run `make repro` first; "
            "after the file was moved away, `make repro ARGS='-s -f report'`"
        )
    serve(find_port(first))


def find_port(first: int) -> int:
    """Find a free port among fifty.

    Raises:
        UserError: there is none.
    """
    ports = (port for port in range(first, first + 50) if 0 < port < 65536)
    port = next((port for port in ports if not is_taken(port)), None)
    if port is None:
        raise UserError(
            f"--port {first}: expected a free port among the 50 from there on, found none; "
            "name another"
        )
    return port


def serve(port: int) -> None:
    """Print the addresses of the pages, and replace this process by the server.

    Ctrl-C then reaches the server, and no other process is left behind.
    """
    from tttlab.tracking.executions import close_abandoned
    from tttlab.tracking.pages import ui_command, ui_pages

    close_abandoned(places.ROOT)
    print("MLflow comes up in some 15 seconds; Ctrl-C ends it")
    for name, address in ui_pages(places.ROOT).items():
        print(f"{name:12}http://127.0.0.1:{port}/{address}", flush=True)
    command = ui_command(places.ROOT, port)
    light = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
    os.execve(command[0], command, os.environ | light)
