"""tinygrad 0.13.0's own server: `tinygrad_server.py MODEL PORT CONTEXT` is `python -m tinygrad.llm --serve` but for

- its tokenizer, which refuses the name of SmolLM2's pre-tokenizer: it is told the name of Qwen 2's, whose chat format
  SmolLM2 has too. Words are cut a little differently, which changes no figure;
- its address, which is loopback only, and its socket's queue, in which five connections would have room;
- its compiler: LLVM by llvmlite as the engine has it, with the same flags, where tinygrad would look for clang.

Run with the repository on PYTHONPATH for the last of these.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("DEV", "CPU:LLVM")

from tinygrad.llm import cli
from tinygrad.viz.serve import TCPServerWithReuse

from engine.compilers import llvm

_from_gguf_kv = cli.SimpleTokenizer.from_gguf_kv


def from_gguf_kv(kv: dict) -> cli.SimpleTokenizer:
    return _from_gguf_kv(kv | {"tokenizer.ggml.pre": "qwen2"})


def serve_loopback(self: cli.LLMServer, address: tuple, model: object, name: str, tok: object) -> None:
    self.model, self.model_name, self.tok = model, name, tok
    TCPServerWithReuse.__init__(self, ("127.0.0.1", address[1]), cli.Handler)


if __name__ == "__main__":
    llvm.install()
    cli.SimpleTokenizer.from_gguf_kv = staticmethod(from_gguf_kv)
    cli.LLMServer.__init__ = serve_loopback
    cli.LLMServer.request_queue_size = 64
    model, port, context = sys.argv[1:4]
    sys.argv[1:] = ["--model", model, "--serve", port, "--max_context", context]
    cli.main()
