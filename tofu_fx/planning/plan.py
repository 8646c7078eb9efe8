"""A Plan: for every attention site how many tokens go, and how. JSON to save, read, edit and pass back."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tofu_fx.errors import PlanError
from tofu_fx.planning.site import Site


class PlanRow(BaseModel):
    """What happens at one site. ``tokens``, ``heads`` identify the site; ``strategy`` and ``r`` are the decision."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: str
    module_path: str
    tokens: int
    heads: int
    strategy: Literal["prune", "mean", "mlerp", "permute"]
    r: int = Field(ge=0)
    placement: Literal["stream"] = "stream"


class Plan(BaseModel):
    """The decisions for one model, in the order of its sites."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: Literal[1] = 1
    sites: list[PlanRow]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, plan: Any) -> Plan:
        """A plan from a Plan, the path of one, or its dict.

        Raises:
            PlanError: naming the file, the row and the key that is wrong.
        """
        if isinstance(plan, Plan):
            return plan
        where = "the plan"
        if isinstance(plan, (str, os.PathLike)):
            where = f"plan {os.fspath(plan)!r}"
            try:
                with open(plan, encoding="utf-8") as file:
                    plan = json.load(file)
            except OSError as error:
                raise PlanError(f"{where} cannot be read: {error.strerror}") from None
            except json.JSONDecodeError as error:
                raise PlanError(f"{where} is not JSON: {error}") from None
        try:
            return cls.model_validate(plan)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "its top level"
            raise PlanError(f"{where}: {key}: {first['msg']}, got {first['input']!r}") from None

    def check_fits(self, sites: Sequence[Site]) -> None:
        """Raise PlanError naming the first site that differs between the plan and the graph."""
        for i in range(max(len(self.sites), len(sites))):
            if i >= len(sites):
                raise PlanError(
                    f"the plan has {len(self.sites)} sites, the graph {len(sites)}: {self.sites[i].id!r} is not in it"
                )
            if i >= len(self.sites):
                raise PlanError(
                    f"the plan has {len(self.sites)} sites, the graph {len(sites)}: it says nothing of {sites[i].id!r}"
                )
            row, site = self.sites[i], sites[i]
            for key, got in (("id", site.id), ("tokens", site.tokens), ("heads", site.heads)):
                if getattr(row, key) != got:
                    raise PlanError(
                        f"the plan is of another model or input size: site {i} has {key} {got!r} in the graph, "
                        f"{getattr(row, key)!r} in the plan; make the plan again for this model"
                    )
