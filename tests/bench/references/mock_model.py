"""A model server that speaks OpenAI's chat completions: answers each request with TOKENS streamed words.

`mock_model.py PORT TOKENS TOKENS_PER_S`: standard library only, one write a token, paced (0: all at once).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(delta: dict[str, str], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    body = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "mock", "choices": [choice]}
    return chunk(b"data: " + json.dumps(body).encode() + b"\n\n")


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    tokens, rate = int(sys.argv[2]), float(sys.argv[3])
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = (
                int(head.split(b"content-length:")[1].split(b"\r\n")[0]) if b"content-length:" in head else 0
            )
            await reader.readexactly(length)
            began = time.monotonic()
            writer.write(HEAD)
            for number in range(tokens):
                if rate:
                    await asyncio.sleep(max(0.0, began + (number + 1) / rate - time.monotonic()))
                writer.write(event({"role": "assistant", "content": f"w{number} "}))
                await writer.drain()
            writer.write(event({}, "stop") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
