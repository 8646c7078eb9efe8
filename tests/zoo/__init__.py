"""The models that the tests compile: small dims, random weights, every parameter made to matter."""

from tests.zoo.handwritten import HANDWRITTEN
from tests.zoo.registry import Entry
from tests.zoo.vision import TIMM, TORCHVISION, TRANSFORMERS

ZOO: dict[str, Entry] = {**TIMM, **TRANSFORMERS, **TORCHVISION, **HANDWRITTEN}

__all__ = ["HANDWRITTEN", "TIMM", "TORCHVISION", "TRANSFORMERS", "ZOO", "Entry"]
