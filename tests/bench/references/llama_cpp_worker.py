"""llama.cpp by its low-level API: `llama_cpp_worker.py MODEL CONTEXT SEQUENCES THREADS`.

One JSON object a line each way. It says `{"load_s": ...}` when the model is there, then answers requests one by one:

    {"do": "generate", "prompts": [[token, ...], ...], "tokens": n}   each prompt by itself, then all of them in one
                                                                      batch a step, greedily, past any end token
    {"do": "nll", "tokens": [...]}                                    sum of -log p of every token but the first
    {"do": "tokenize", "texts": [...], "special": bool}               its own tokenizer's ids, without a begin token

CONTEXT is tokens of each sequence. Batches of 512, flash attention where it thinks best, float16 cache: its defaults.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

import llama_cpp as llama
import numpy as np

BATCH = 512


class Model:
    def __init__(self, path: str, context: int, sequences: int, threads: int) -> None:
        params = llama.llama_model_default_params()
        self.model = llama.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        shape = llama.llama_context_default_params()
        shape.n_ctx, shape.n_seq_max = context * sequences, sequences
        shape.n_batch = shape.n_ubatch = BATCH
        shape.n_threads = shape.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, shape)
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.tokens = llama.llama_vocab_n_tokens(self.vocab)
        self.batch = llama.llama_batch_init(BATCH, 0, 1)
        self.memory = llama.llama_get_memory(self.context)

    def decode(self, rows: list[tuple[int, int, int]], wanted: list[bool]) -> None:
        """rows of (token, position, sequence)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for at, (token, position, sequence) in enumerate(rows):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = wanted[at]
        status = llama.llama_decode(self.context, batch)
        if status:
            raise SystemExit(f"llama_decode: {status}")

    def logits(self, row: int) -> np.ndarray:
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self.context, row), (self.tokens,))

    def prefill(self, prompt: list[int], sequence: int) -> int:
        """The token that follows."""
        for start in range(0, len(prompt), BATCH):
            part = prompt[start : start + BATCH]
            last = start + len(part) == len(prompt)
            rows = [(token, start + at, sequence) for at, token in enumerate(part)]
            self.decode(rows, [last and at == len(part) - 1 for at in range(len(part))])
        return int(self.logits(len(part) - 1).argmax())

    def generate(self, prompts: list[list[int]], tokens: int) -> dict[str, object]:
        """Seconds until each prompt's first token, and of the tokens - 1 steps that follow."""
        llama.llama_memory_clear(self.memory, True)
        began = time.perf_counter()
        texts, firsts = [], []
        for sequence, prompt in enumerate(prompts):
            texts.append([self.prefill(prompt, sequence)])
            firsts.append(time.perf_counter() - began)
        steps: list[float] = []
        for step in range(tokens - 1):
            at = time.perf_counter()
            rows = [(text[-1], len(prompts[s]) + step, s) for s, text in enumerate(texts)]
            self.decode(rows, [True] * len(rows))
            for sequence, text in enumerate(texts):
                text.append(int(self.logits(sequence).argmax()))
            steps.append(time.perf_counter() - at)
        return {"first_s": firsts, "decode_s": sum(steps), "tokens": texts}

    def nll(self, tokens: list[int]) -> dict[str, object]:
        llama.llama_memory_clear(self.memory, True)
        total = 0.0
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            self.decode([(token, start + at, 0) for at, token in enumerate(part)], [True] * len(part))
            for at, following in enumerate(tokens[start + 1 : start + 1 + len(part)]):
                logits = self.logits(at).astype(np.float64)
                best = logits.max()
                total += best + np.log(np.exp(logits - best).sum()) - logits[following]
        return {"nll": float(total), "count": len(tokens) - 1}

    def tokenize(self, texts: list[str], special: bool) -> dict[str, object]:
        made = []
        for text in texts:
            raw = text.encode()
            room = (llama.llama_token * (len(raw) + 8))()
            count = llama.llama_tokenize(self.vocab, raw, len(raw), room, len(room), False, special)
            if count < 0:
                raise SystemExit(f"{-count} tokens did not fit")
            made.append(list(room[:count]))
        return {"ids": made}


@llama.llama_log_callback
def quiet(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level >= 4:  # an error
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    began = time.perf_counter()
    llama.llama_backend_init()
    model = Model(sys.argv[1], *map(int, sys.argv[2:5]))
    print(json.dumps({"load_s": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(model, asked.pop("do"))(**asked)), flush=True)


if __name__ == "__main__":
    main()
