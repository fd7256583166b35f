"""Text and tokens: tokenizers, templates of conversations, and grammars that generated text obeys."""
