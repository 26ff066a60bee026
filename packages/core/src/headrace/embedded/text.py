"""Tokens to text, piece by piece."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"


class LazyTokenizer:
    """A folder's tokenizer, loaded once, on first use: importing it takes seconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._loaded: PreTrainedTokenizerBase | None = None

    def get(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer; blocks while it is loaded.

        Raises:
            ConfigError: The folder has none that transformers can load.
        """
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def _load(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer  # noqa: PLC0415 - heavy, and no part of starting an engine

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._folder)
        except (OSError, ValueError) as error:
            message = f"{self._folder} has no tokenizer that transformers can load: {error}"
            raise ConfigError(message, name=str(self._folder)) from error
        if not tokenizer.encode("a"):  # transformers makes an empty one where files are missing
            message = f"{self._folder} has no tokenizer files; copy them beside config.json"
            raise ConfigError(message, name=str(self._folder))
        return tokenizer


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
