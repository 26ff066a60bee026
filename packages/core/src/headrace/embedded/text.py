"""Tokens to text, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"


class TextStream:
    """Turns tokens into text as they come; holds back the bytes of an unfinished character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._begin = 0
        self._done = 0

    def push(self, token: int) -> str:
        """Take a token and return the text that is certain now; may be empty."""
        self._tokens.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """Return what is left at the end."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        """Decode from a token before the last whole piece, since tokenizers trim the start of a text."""
        before = self._decode(self._tokens[self._begin : self._done])
        text = self._decode(self._tokens[self._begin :])
        if len(text) <= len(before) or (text.endswith(_REPLACEMENT) and not final):
            return ""
        self._begin, self._done = self._done, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
