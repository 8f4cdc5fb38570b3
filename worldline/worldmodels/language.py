"""Instructions as vectors, by encoders that are never trained here.

`hashed` needs no weights: words and pairs of neighbouring words, each hashed to a random sign vector. Instructions that share
words are alike, paraphrases are not. Any text model of `transformers` (CLIP, T5, ...) can be named instead where its weights are
at hand; its last hidden states are averaged over the instruction's tokens.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from worldline.errors import CheckpointError

HASHED_DIM = 64


@runtime_checkable
class TextEncoder(Protocol):
    dim: int

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "n e"]:
        """One vector of length about sqrt(e) for each text."""
        ...


class HashedText:
    """Bag of words and word pairs under fixed random signs: sum, scaled to length sqrt(dim). No words give zeros."""

    def __init__(self, dim: int = HASHED_DIM) -> None:
        self.dim = dim

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "n e"]:
        return torch.stack([self._embed(text) for text in texts])

    def _embed(self, text: str) -> Tensor:
        words = re.findall(r"\w+", text.lower())
        pieces = words + [f"{a} {b}" for a, b in zip(words, words[1:])]
        total = sum((_signs(piece, self.dim) for piece in pieces), torch.zeros(self.dim))
        return F.normalize(total, dim=0) * self.dim**0.5


@lru_cache(maxsize=4096)
def _signs(piece: str, dim: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(piece.encode()).digest()[:8], "big") >> 1
    return torch.randint(2, (dim,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


class PretrainedText:
    """A frozen text model of `transformers`. Raises `CheckpointError` if its weights or the library are not there."""

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoConfig, AutoModel, AutoTokenizer

            config: Any = AutoConfig.from_pretrained(name)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModel.from_pretrained(name)
        except (ImportError, OSError, ValueError) as error:
            raise CheckpointError(
                f"text encoder {name!r} could not be loaded ({error}). Name a text model of transformers whose weights are on this "
                "machine or can be downloaded, or use `hashed`, which needs none."
            ) from error
        if hasattr(model, "text_model"):
            model = model.text_model  # CLIP has a picture side too
        elif hasattr(model, "encoder") and getattr(config, "is_encoder_decoder", False):
            model = model.encoder
        self._model = model.eval().requires_grad_(False)
        self.dim = int(model.config.hidden_size if hasattr(model.config, "hidden_size") else model.config.d_model)
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "n e"]:
        for text in texts:
            if text not in self._known:
                inputs = self._tokenizer(text, return_tensors="pt", truncation=True)
                hidden = self._model(**inputs).last_hidden_state[0].float().mean(0)
                self._known[text] = F.normalize(hidden, dim=0) * self.dim**0.5
        return torch.stack([self._known[text] for text in texts])


@lru_cache(maxsize=4)
def text_encoder(name: str) -> TextEncoder | None:
    """`none` (None), `hashed`, or the name of a text model of `transformers`."""
    if name == "none":
        return None
    return HashedText() if name == "hashed" else PretrainedText(name)
