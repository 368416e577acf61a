"""A proxy in front of a Redis server that loses replies: the request is executed, the answer is not heard."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class FaultyProxy:
    """`lose` names functions whose next reply is lost, once for each entry; `lost` counts them."""

    url: str
    lose: list[str] = field(default_factory=list)
    lost: int = 0

    def takes(self, request: bytes) -> bool:
        """Whether the reply to `request` is to be lost."""
        for name in self.lose:
            if b"sinkserve_" + name.encode() in request:
                self.lose.remove(name)
                self.lost += 1
                return True
        return False


@contextlib.asynccontextmanager
async def faulty_proxy(server_url: str, socket: str) -> AsyncIterator[FaultyProxy]:
    """Listens on the unix socket `socket`; the real server is at the unix URL `server_url`."""
    proxy = FaultyProxy(f"unix://{socket}")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_unix_connection(server_url.removeprefix("unix://"))
        try:
            while request := await reader.read(1 << 20):
                losing = proxy.takes(request)
                upstream[1].write(request)
                reply = await upstream[0].read(1 << 20)
                if losing or not reply:
                    break
                writer.write(reply)
        finally:
            upstream[1].close()
            writer.close()

    server = await asyncio.start_unix_server(serve, socket, limit=1 << 22)
    try:
        yield proxy
    finally:
        server.close()
