"""How many tokens a prompt is, from a model's headers and tokenizer alone: the model need not be loaded.

Of texts that are to be embedded it counts the longest.
"""

from __future__ import annotations

import os
from collections import OrderedDict

from engine.checkpoint import open_checkpoint, tokenizer_file, vocabulary_of
from engine.embedding.batcher import texts_of
from engine.embedding.loading import EmbeddingFiles
from engine.errors import EngineError
from engine.protocol import CountTokens, TokenCount
from engine.text.chat import prompt_tokens
from engine.text.tokenizer import Vocabulary

VOCABULARIES_MAX = 4
CONTEXT_ANY = 1 << 30  # as long as the model takes


class Counter:
    """Keeps the vocabularies of the files it saw last. Used by one thread."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str, int, int], Vocabulary | EmbeddingFiles] = OrderedDict()

    def count(self, message: CountTokens) -> TokenCount:
        """Never raises for what a file or a prompt may hold: `error` says it."""
        try:
            tokens, context = self._counted(message)
        except (EngineError, OSError) as error:
            return TokenCount(request_id=message.request_id, tokens=-1, context=0, error=str(error))
        return TokenCount(request_id=message.request_id, tokens=tokens, context=context)

    def _counted(self, message: CountTokens) -> tuple[int, int]:
        kind = "embedding" if "input" in message.parameters else "text"
        found = self._read(message.path, message.family, kind)
        if isinstance(found, Vocabulary):
            return len(prompt_tokens(found, message.parameters)), found.context_max
        return max(len(found.encoder.encode(text)) for text in texts_of(message.parameters)), found.context

    def _read(self, path: str, family: str, kind: str) -> Vocabulary | EmbeddingFiles:
        found = os.stat(tokenizer_file(path))
        key = (kind, path, found.st_mtime_ns, found.st_size)
        if key not in self._kept:
            if kind == "embedding":
                self._kept[key] = EmbeddingFiles.read(path, family, 1, CONTEXT_ANY)
            else:
                self._kept[key] = vocabulary_of(open_checkpoint(path))
            if len(self._kept) > VOCABULARIES_MAX:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
