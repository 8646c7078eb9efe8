"""The options of ``torch.compile(model, backend="tofu", options={...})``: few, typed, checked before any compiling."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from numbers import Real
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tofu_fx.errors import OptionError
from tofu_fx.plan.plan import Plan
from tofu_fx.plan.words import MOST, MOST_SIDE, BranchKind, Match, Placement, Reuse, Strategy
from tofu_fx.wording import shown

#: what each option may be, in the words of its messages
EXPECTED: dict[str, str] = {
    "ratio": "a number in [0, 1), Python's or numpy's (of a tensor its .item())",
    "r": f"an int or a list of ints, none of them negative or above {MOST}",
    "strategy": "'auto', 'prune', 'mean' or 'mlerp'",
    "match": "'auto', 'keys', 'heads', 'queries_keys', 'features' or 'sketch'",
    "placement": "'auto', 'stream' or 'branch'",
    "branches": "a list of 'attention', and 'mlp' or 'cross' besides",
    "cell": f"a whole number (an integer) from 2 to {MOST_SIDE}, the side of a cell in tokens",
    "seed": f"a whole number from 0 to {MOST}",
    "grid": f"height and width of the image in tokens, as two ints from 1 to {MOST_SIDE}",
    "max_downsample": "1, 2, 4 or 8",
    "reuse": "'none', 'block' or 'resolution'",
    "proportional_attention": "'auto', True or False",
    "plan": "a tofu_fx.Plan, the path of one, or its dict",
    "unread": "'drop' or 'keep'",
    "profitable_only": "True or False",
    "on_error": "'fallback' or 'raise'",
    "inner_backend": "'inductor', 'aot_eager' or 'eager'",
    "mode": "the name of an inductor mode",
    "inductor": "a dict of inductor's options by their names",
}
#: options that decide something only where tokens are reduced in branches
OF_BRANCHES = ("branches", "cell", "seed", "grid", "max_downsample", "reuse")
#: options that the rows of a plan decide
OF_PLANS = ("strategy", "match", "placement", "branches", "cell")


Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]


class Options(BaseModel):
    """Every option, its type and its default. Frozen; unknown keys and wrong types are errors that name the key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )

    ratio: float | None = None
    """Share of the tokens gone by the last layer, in [0, 1). Default 0.5 (for a ViT of 197 tokens and 12 layers about
    the paper's r = 8). Spread evenly over the layers. Any real number (``numbers.Real``), Python's or
    numpy's; a bool, a text or a tensor is none."""

    r: Annotated[int, Field(ge=0, le=MOST)] | tuple[Annotated[int, Field(ge=0, le=MOST)], ...] | None = None
    """Tokens removed per layer, the paper's notation: one int for all attention sites, or one for each."""

    strategy: Strategy = "auto"
    """"prune", "mean" or "mlerp" everywhere; "auto" without a calibrated plan prunes in the first half of the layers
    and merges with MLERP after (arXiv 2312.01026, section 4); with placement "branch" it takes the mean."""

    match: Literal["auto"] | Match = "auto"
    """What tokens are compared by: the attention's "keys" averaged over its heads (the paper's, and "auto"), the keys
    of all "heads" side by side, "queries_keys" of all heads, the stream's own "features", or a "sketch" of these: at
    most 128 sums of neighbouring channels with alternating signs. The wider ones cost more and match better. With
    placement "branch", "auto" takes the features, of wide models (more than 128 channels) their sketch."""

    placement: Placement = "auto"
    """Where tokens are reduced: "stream" is the residual stream, after the attention's add. "branch" reduces what goes
    into the attention and restores it before the residual add, which keeps every token. "auto" takes branches where a
    stream must soon be whole again and where the model gives back what it was given (UNets, denoisers), else the
    stream."""

    branches: tuple[BranchKind, ...] = ("attention",)
    """With placement "branch": which branches of a block run on fewer tokens; "attention", and "mlp" or "cross" (the
    queries of cross-attention) besides."""

    cell: int = Field(default=2, ge=2, le=MOST_SIDE)
    """With placement "branch", where the tokens are an image's: one token stays in each cell of ``cell`` x ``cell``, so
    that ratios up to 1 - 1 / cell^2 are possible."""

    seed: int | None = Field(default=None, ge=0, le=MOST)
    """Which token of a cell stays: its first one (None), or one picked by the seed, the same on every run."""

    grid: tuple[Side, Side] | None = None
    """With placement "branch": height and width of the image's tokens, for models that get their tokens already
    flattened (Flux). It must agree with what the graph shows of the image; where the graph shows nothing of it, only
    the number of tokens can be checked, and that is said."""

    max_downsample: Literal[1, 2, 4, 8] | None = None
    """With placement "branch": sites whose image is more than so many times smaller (each side) than the largest that
    an attention sees are left alone. None: 1 in UNets (whose images get smaller and larger again), else no limit."""

    reuse: Reuse = "block"
    """With placement "branch": branches of one "block" share one match, all sites of one "resolution" do, or "none"."""

    proportional_attention: Literal["auto"] | bool = "auto"
    """Add log(size) to the logits of keys that stand for several tokens. "auto" does wherever sizes exist."""

    plan: Any = None
    """A :class:`tofu_fx.Plan`, or the path of one; then ``ratio``, ``r``, ``strategy``, ``match``, ``placement``,
    ``branches`` and ``cell`` come from it."""

    unread: Literal["drop", "keep"] = "drop"
    """What becomes of rows of tensors that nobody reads, such as all tokens but the class token in the last block of a
    ViT. "drop": they are not computed, with or without any reduction; the outputs are the same up to rounding, which is
    why it is the default. "keep": they are, and with ``ratio=0`` the bits are those of the plain graph."""

    profitable_only: bool = True
    """Decline sites whose reduction would cost more time than it saves, by a coarse cost model. Not asked of a plan."""

    on_error: Literal["fallback", "raise"] = "fallback"
    """When a pass fails: compile the untouched graph and warn once, or raise."""

    inner_backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """What compiles the rewritten graph."""

    mode: str | None = None
    """Inductor's mode ("max-autotune", ...): here because torch.compile refuses ``mode`` beside ``options``."""

    inductor: dict[str, Any] | None = None
    """Inductor's own options, passed through."""

    @field_validator("ratio", mode="before")
    @classmethod
    def _real_ratio(cls, value: Any) -> Any:
        if value is None:
            return None
        try:
            number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        except OverflowError:  # an int of hundreds of digits
            number = math.inf
        if not 0 <= number < 1:  # a NaN is not, either
            raise ValueError("no number in [0, 1)")
        return number

    @field_validator("r", mode="before")
    @classmethod
    def _listed_r(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("branches", "grid", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        given = [key for key in ("ratio", "r", "plan") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}, not both: each decides how many tokens go")
        for key in OF_PLANS:
            if self.plan is not None and key in self.chosen:
                raise ValueError(f"option {key!r} comes from the plan's rows; leave it out or edit the plan")
        for key in OF_BRANCHES:
            if self.placement == "stream" and key in self.chosen:
                raise ValueError(
                    f"option {key!r} does nothing with placement 'stream': it is of the branches of each block; leave "
                    "it out, or take placement 'branch'"
                )
        if "attention" not in self.branches:
            raise ValueError("'branches' must have 'attention': the others use its match")
        if self.inner_backend != "inductor" and (self.inductor or self.mode):
            raise ValueError(f"'mode' and 'inductor' need inner_backend 'inductor', not {self.inner_backend!r}")
        return self

    @property
    def chosen(self) -> set[str]:
        """The options that were given, and not as what they are by default."""
        return {key for key in self.model_fields_set if getattr(self, key) != type(self).model_fields[key].default}

    @classmethod
    def parse(cls, options: Options | Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Options from what the user passed to torch.compile.

        Raises:
            OptionError: naming every wrong key, what was expected there and what came.
            PlanError: the plan cannot be read.
        """
        if isinstance(options, Options):
            return options.with_plan()
        if not isinstance(options, Mapping | None):
            raise OptionError(f"options: expected a dict of options by their names, got {shown(options)}")
        values = dict(options or {})
        if mode is not None:
            if values.get("mode") not in (None, mode):
                raise OptionError(f"mode={shown(mode)} and options['mode']={shown(values['mode'])} disagree; give one")
            values["mode"] = mode
        wrong = [_unknown(key) for key in values if key not in cls.model_fields]
        try:
            parsed = cls.model_validate({key: value for key, value in values.items() if key in cls.model_fields})
        except ValidationError as error:
            wrong += [_explain(e) for e in error.errors()]
        if wrong:
            raise OptionError("; ".join(dict.fromkeys(wrong)))
        if parsed.mode is not None:
            _check_mode(parsed.mode)
        return parsed.with_plan()

    def with_plan(self) -> Options:
        """The same options with the plan itself: what was given may be its path, or its dict."""
        if self.plan is None or isinstance(self.plan, Plan):
            return self
        return self.model_copy(update={"plan": Plan.load(self.plan)})

    @property
    def changes(self) -> bool:
        """False when the options ask for no reduction and for no row to be left out: then the graph is not touched."""
        return self.reduces or self.unread == "drop"

    @property
    def reduces(self) -> bool:
        """False when the options ask for no reduction at all."""
        if self.plan is not None:
            return True
        if self.r is not None:
            return any(self.r) if isinstance(self.r, tuple) else self.r > 0
        return self.ratio != 0


def _unknown(key: Any) -> str:
    close = difflib.get_close_matches(key, Options.model_fields, n=1) if isinstance(key, str) and len(key) < 99 else ()
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown option {shown(key)}; {meant}known: {', '.join(Options.model_fields)}"


def _explain(error: Any) -> str:
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    key = str(error["loc"][0])
    return f"option {key!r}: expected {EXPECTED[key]}, got {shown(error['input'])}"


def _check_mode(mode: str) -> None:
    from torch._inductor import list_mode_options

    known = ["default", *list_mode_options()]
    if mode not in known:
        raise OptionError(f"option 'mode': expected one of {', '.join(dict.fromkeys(known))}, got {shown(mode)}")
