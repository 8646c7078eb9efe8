"""A model on fewer tokens as a graph, and a pass of one's own over it.

    python examples/rewrite.py
    python examples/rewrite.py --model vit_small_patch16_224 --r 13

`tofu_fx.rewrite` returns a torch.fx GraphModule: it prints as code, runs as it is, trains, and goes through any
compiler or further pass. The pass here takes GELU by its tanh formula, which costs less and changes the outputs a
little.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.fx import GraphModule

import tofu_fx
from tofu_fx.extras import need


def cheaper_gelu(module: GraphModule) -> int:
    """Have every GELU computed by its tanh formula; returns how many there are."""
    nodes = module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)
    for node in nodes:
        node.kwargs = {"approximate": "tanh"}
    module.recompile()
    return len(nodes)


def run(model: str = "vit_tiny_patch16_224", r: int = 13, backend: str = "inductor", **make: Any) -> dict[str, float]:
    """Rewrite a timm model, run the pass, compile; how far the outputs are from the plain model's at each step.

    Args:
        model: a name of timm's; random weights.
        r: tokens that each layer takes.
        backend: what compiles the graph.
        make: arguments of `timm.create_model`.
    """
    plain = need("timm").create_model(model, **make).eval()
    size = plain.default_cfg["input_size"][-1] if "img_size" not in make else make["img_size"]
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module = tofu_fx.rewrite(plain, x, options={"r": r})
        outputs = {"rewritten": module(x)}
        count = cheaper_gelu(module)
        outputs["and passed over"] = module(x)
        outputs["and compiled"] = torch.compile(module, backend=backend)(x)
        wanted = plain(x)
    reductions = sum(node.target == torch.ops.tofu.fuse_tokens.default for node in module.graph.nodes)
    print(f"{model}: {reductions} reductions, {count} GELUs")
    apart = {name: float((found - wanted).norm() / wanted.norm()) for name, found in outputs.items()}
    for name, error in apart.items():
        print(f"  {name}: {error:.3g} from the plain model (relative)")
    return {"reductions": reductions, "gelus": count, **apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--r", type=int, default=13)
    args = parser.parse_args()
    run(args.model, args.r)


if __name__ == "__main__":
    main()
