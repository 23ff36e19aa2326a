"""What an engine is made for: lengths, memory, rows of a step."""

from __future__ import annotations

from dataclasses import dataclass

MOST_DRAFTS = 4
"""More drafts than that are hardly ever all right."""


@dataclass(frozen=True)
class Options:
    """Sizes of an engine. All but `page` change its speed only, not one bit of an answer."""

    max_model_len: int | None = None
    """Tokens of prompt and answer together; None: what the model was built for."""
    cache_bytes: int | None = None
    """Memory of the KV cache; None: what `max_requests` requests of `max_model_len` need."""
    page: int = 64
    """Tokens of a block of the cache, over which attention sums one after the other."""
    max_requests: int = 64
    """Requests that run at once."""
    step_tokens: int = 512
    """Rows of a step: tokens of running requests first, then parts of prompts."""
    prefix_cache: bool = True
    """Whether blocks of ended requests serve others that begin alike."""
    speculate: int = 0
    """Tokens that MTP modules draft for the next step; the last goes on where there are fewer."""

    def __post_init__(self) -> None:
        """Raises ValueError for sizes below 1."""
        for name in ("max_model_len", "cache_bytes", "page", "max_requests", "step_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if not 0 <= self.speculate <= MOST_DRAFTS:
            raise ValueError(f"speculate must be from 0 to {MOST_DRAFTS}, got {self.speculate}")
