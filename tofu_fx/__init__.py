"""tofu_fx: a torch.compile backend that makes transformers faster by pruning and merging redundant tokens.

``torch.compile(model, backend="tofu", options={"ratio": 0.5})`` is all most users need; nothing has to be imported.
"""

from tofu_fx.calibration.calibrate import calibrate
from tofu_fx.errors import CalibrationError, OptionError, PassError, PlanError, TofuError, TofuWarning, Unsupported
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.report.explain import Explanation, explain
from tofu_fx.report.sweep import sweep
from tofu_fx.report.swept import Sweep
from tofu_fx.report.tokens import token_groups
from tofu_fx.standalone.export import export
from tofu_fx.standalone.rewrite import rewrite

__all__ = [
    "CalibrationError",
    "Explanation",
    "OptionError",
    "Options",
    "PassError",
    "Plan",
    "PlanError",
    "Sweep",
    "TofuError",
    "TofuWarning",
    "Unsupported",
    "calibrate",
    "explain",
    "export",
    "rewrite",
    "sweep",
    "token_groups",
]
__version__ = "0.1.0"
