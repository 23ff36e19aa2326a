"""How a server starts to listen, and how it ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from .service import Service


def listen(host: str, port: int) -> socket.socket:
    """The socket of the server; port 0 is any free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


class Server(uvicorn.Server):
    """Ends on a signal: running answers get `drain` seconds, a second signal ends at once."""

    def __init__(self, service: Service, app: ASGIApp, drain: float = 30.0) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(drain) + 5,
            )
        )
        self._service, self._drain = service, drain
        service.worker.on_death = self.stop

    def stop(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not recorded as uvicorn does it: it would raise the signal again at the end.
        self.force_exit = self.should_exit
        self.stop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.draining = True
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._drain, self._service.worker.abort_all)
        await super().shutdown(sockets)
        timer.cancel()


async def run(
    service: Service,
    app: ASGIApp,
    listener: socket.socket,
    drain: float = 30.0,
    ready: Callable[[Server], None] = lambda server: None,
) -> int:
    """Starts the engine and serves until a signal or the engine's end; gives the exit status.

    0: ended by a signal, 1: the engine ended. Raises Unavailable if the engine cannot be made.
    """
    worker = service.worker
    try:
        await worker.start()
        server = Server(service, app, drain)
        ready(server)
        await server.serve(sockets=[listener])
        return 0 if worker.death is None else 1
    finally:
        listener.close()
        await worker.stop()
