"""How many tokens a prompt is, from a model's headers and tokenizer alone: the model need not be loaded."""

from __future__ import annotations

import os
from collections import OrderedDict

from engine.chat import prompt_tokens
from engine.checkpoint import open_checkpoint, tokenizer_file, vocabulary_of
from engine.errors import EngineError
from engine.protocol import CountTokens, TokenCount
from engine.tokenizer import Vocabulary

VOCABULARIES_MAX = 4


class Counter:
    """Keeps the vocabularies of the files it saw last. Used by one thread."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, int], Vocabulary] = OrderedDict()

    def count(self, message: CountTokens) -> TokenCount:
        """Never raises for what a file or a prompt may hold: `error` says it."""
        try:
            vocabulary = self._vocabulary(message.path)
            tokens = len(prompt_tokens(vocabulary, message.parameters))
        except (EngineError, OSError) as error:
            return TokenCount(request_id=message.request_id, tokens=-1, context=0, error=str(error))
        return TokenCount(request_id=message.request_id, tokens=tokens, context=vocabulary.context_max)

    def _vocabulary(self, path: str) -> Vocabulary:
        found = os.stat(tokenizer_file(path))
        key = (path, found.st_mtime_ns, found.st_size)
        if key not in self._kept:
            self._kept[key] = vocabulary_of(open_checkpoint(path))
            if len(self._kept) > VOCABULARIES_MAX:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
