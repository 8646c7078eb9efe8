"""The matrices of a plan: by which the tokens of a site are projected before they are compared ("fisher").

They stand beside the plan's JSON, in a .safetensors file of the same name, whose hash the JSON has.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from tofu_fx.errors import PlanError
from tofu_fx.plan.records import PlanRow
from tofu_fx.wording import shown

SUFFIX = ".safetensors"

#: (number of the graph, site's id) -> ``[C, k]``
Projections = Mapping[tuple[int, str], torch.Tensor]


def packed(projections: Projections) -> bytes:
    """The file: float16, one tensor for each site, called ``graph:id``. The same matrices give the same bytes."""
    named = {
        f"{graph}:{site}": value.detach().cpu().half().contiguous() for (graph, site), value in projections.items()
    }
    return save(dict(sorted(named.items())))


def hash_of(projections: Projections) -> str | None:
    """What the JSON says of them; None where there are none."""
    return _hash(packed(projections)) if projections else None


def described(matrix: torch.Tensor) -> str:
    """A matrix in a few words: its columns, and what tells it from others."""
    return f"{matrix.shape[1]} columns, {_hash(matrix.contiguous().numpy().tobytes())[:8]}"


def path_beside(plan: str | os.PathLike[str]) -> Path:
    """Where the matrices of a plan are looked for.

    Raises:
        PlanError: the plan has the name itself.
    """
    path = Path(plan)
    if path.suffix == SUFFIX:
        raise PlanError(f"plan {os.fspath(plan)!r}: a plan is JSON, its matrices are in the {SUFFIX} file beside it")
    return path.with_suffix(SUFFIX)


def read(plan: str | os.PathLike[str], expected: str) -> dict[tuple[int, str], torch.Tensor]:
    """The matrices of the plan at a path, whose JSON says that their hash is ``expected``.

    Raises:
        PlanError: there is no such file, or it is another one.
    """
    path, where = path_beside(plan), f"plan {os.fspath(plan)!r}"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise PlanError(
            f"{where}: its matrices are missing: there is no {path.name!r} beside it; the two files are one plan, keep "
            "them together"
        ) from None
    except OSError as error:
        raise PlanError(f"{where}: its matrices in {path.name!r} cannot be read: {error.strerror}") from None
    if _hash(content) != expected:
        raise PlanError(
            f"{where}: {path.name!r} is not the file that was saved with it (its hash is another): it was damaged, or "
            "is of another plan; save the plan again, or calibrate again"
        )
    try:
        named = load(content)
    except SafetensorError as error:
        raise PlanError(f"{where}: {path.name!r} is no {SUFFIX} file: {error}") from None
    return {(int(name.split(":", 1)[0]), name.split(":", 1)[1]): value for name, value in named.items()}


def check(rows: Sequence[PlanRow], projections: Projections, where: str) -> None:
    """Raise PlanError unless each row of "fisher" has a matrix, and all are sound."""
    for row in rows:
        found = projections.get((row.graph, row.id))
        if row.match != "fisher":
            continue
        if found is None:
            raise PlanError(
                f"{where}: {shown(row.id)} compares tokens by 'fisher', but has no matrix: only calibration "
                "makes them; take another 'match', or calibrate again"
            )
        fits = found.dim() == 2 and 1 <= found.shape[1] <= found.shape[0] and found.is_floating_point()
        if not fits:
            given = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
            raise PlanError(
                f"{where}: the matrix of {shown(row.id)} must be floating point [C, k], with k <= C, got {given}"
            )
        if not bool(found.isfinite().all()):
            raise PlanError(f"{where}: the matrix of {shown(row.id)} holds NaN or infinity; calibrate again")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
