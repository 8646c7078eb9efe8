"""The models that the tests compile: small dims, random weights, every parameter made to matter.

``ZOO`` are the plain transformers that most tests use; ``CATALOGUE`` is every model that docs/models.md speaks of.
"""

from tests.zoo.case import Case
from tests.zoo.diffusion_catalogue import DIFFUSION_CASES
from tests.zoo.handwritten import HANDWRITTEN
from tests.zoo.other_catalogue import OTHER_CASES
from tests.zoo.timm_catalogue import TIMM_CASES
from tests.zoo.transformers_catalogue import TRANSFORMERS_CASES
from tests.zoo.vision import TIMM, TORCHVISION, TRANSFORMERS

ZOO: dict[str, Case] = {**TIMM, **TRANSFORMERS, **TORCHVISION, **HANDWRITTEN}
CATALOGUE: dict[str, Case] = {
    f"{library}: {name}": case
    for library, cases in (
        ("timm", TIMM_CASES),
        ("transformers", TRANSFORMERS_CASES),
        ("diffusers", DIFFUSION_CASES),
        ("other", OTHER_CASES),
    )
    for name, case in cases.items()
}

__all__ = ["CATALOGUE", "HANDWRITTEN", "TIMM", "TORCHVISION", "TRANSFORMERS", "ZOO", "Case"]
