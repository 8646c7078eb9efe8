"""The faults that tests/mutations.py plants: literal texts of the package, and what replaces each.

A text must stand exactly once in its file. Where code has moved, the tool names the fault whose text is gone: write it
anew, or drop it if the code that it spoiled is no more.
"""

from __future__ import annotations

from dataclasses import dataclass

OPS, MASKS, DENSE = "tests/ops", "tests/sites/test_masks.py", "tests/models/test_dense_heads.py -k normed"
REFERENCE = "tests/properties/test_transformers.py -k every"
SKIPS = "tests/properties/test_transformers.py -k long_skip"
MATCHING, MERGING, RULES = f"{OPS}/test_matching.py", f"{OPS}/test_merging.py", "tests/axes/test_rules.py"


@dataclass(frozen=True)
class Mutant:
    """One planted fault.

    Args:
        name: what it does, in a few words.
        file: the file, from the root of the repository.
        old: its text, and ``new`` what stands there instead.
        models: the names (in tests/mutations.py) of the models that `prove` is run on.
        tests: what is given to pytest: files, and perhaps ``-k`` words.
        unseen: why `prove` does not see it, where it does not.
    """

    name: str
    file: str
    old: str
    new: str
    models: tuple[str, ...]
    tests: str
    unseen: str = ""


_TIES = "which of equal partners is taken is decided anew by the interpreter, and of two equal ones either will do"
_EAGER = "the proofs run without gradients"

MUTANTS = (
    # ---- rules
    Mutant("a mean over tokens is a plain one", "tofu_fx/axes/rules/reductions.py",
        "        return Pooled(left, mixed=atoms_of(*along), kind=kind)\n",
        "        return Dropped(left, mixed=atoms_of(*along))\n", ("mean",), REFERENCE),
    Mutant("a mean over tokens is weighted as a sum", "tofu_fx/axes/rules/reductions.py",
        "return Pooled(left, mixed=atoms_of(*along), kind=kind)",
        'return Pooled(left, mixed=atoms_of(*along), kind="sum")', ("mean",), REFERENCE),
    Mutant("a variance over tokens is no barrier", "tofu_fx/axes/rules/reductions.py",
        'if kind == "other":', 'if kind == "nothing":', ("variance",), RULES),
    Mutant("a maximum over tokens is weighted", "tofu_fx/axes/rules/reductions.py",
        'if kind == "max":', 'if kind == "nothing":', ("maximum",), RULES),
    Mutant("a softmax over tokens is no barrier", "tofu_fx/axes/rules/reductions.py",
        'raise Barrier("softmax over tokens outside of a recognised attention")', "pass", ("softmax",), RULES),
    Mutant("transposing leaves the axes", "tofu_fx/axes/rules/views.py",
        "    axes[a], axes[b] = axes[b], axes[a]\n", "", ("mean",), RULES),
    Mutant("any range of tokens is carried by a slice", "tofu_fx/axes/space.py",
        "if part.prefix >= 0 and part.suffix >= 0 and step == 1:", "if step == 1:", ("rolled",), RULES,
        unseen="the shapes do not fit, so the tokens are whole there: slower, but right"),
    # ---- companions
    Mutant("tables follow the first reduction only", "tofu_fx/rewriting/companions.py",
        "stream.kept(self.emit, version, dims[place][0])", "stream.kept(self.emit, min(version, 1), dims[place][0])",
        ("rotary", "places"), "tests/rewriting/test_companions.py"),
    Mutant("long skips are gathered, not merged", "tofu_fx/rewriting/companions.py",
        "if not is_table and self._is_older_feature(value, dims, streams[0]):", "if False:", ("skip",), SKIPS),
    Mutant("a table of pairs is merged as features are", "tofu_fx/rewriting/companions.py",
        "table = value in carried or _has_rows_of_pairs(node, value, places)", "table = value in carried", ("pairs",),
        "tests/testing/test_interpreter.py -k walk"),
    Mutant("nothing follows the stream", "tofu_fx/rewriting/rewriter.py",
        "        mapping.update(self.ctx.companions.rebased(node, newest, mapping))\n", "", ("relative", "rotary"),
        REFERENCE),
    # ---- streams and restoring
    Mutant("sizes are not carried to the next reduction", "tofu_fx/rewriting/versions.py",
        "size = self.size(emit, self.newest, x)", "size = self.size(emit, 0, x)", ("mean", "deep"), REFERENCE),
    Mutant("sizes are those from before the reduction", "tofu_fx/rewriting/versions.py",
        "size = self.versions[version - 1].size\n", "size = self.versions[version - 1].size_before\n",
        ("mean",), REFERENCE, unseen="the shapes do not fit, so the tokens are whole there: slower, but right"),
    Mutant("survivors of two reductions are those of the last", "tofu_fx/rewriting/versions.py",
        "if version > 1:", "if version > 2:", ("rotary", "places"), "tests/rewriting/test_versions.py"),
    Mutant("survivors are numbered without their prefix", "tofu_fx/rewriting/versions.py",
        "index = emit.once(aten.add.Scalar, index, ahead) if ahead else index", "index = index",
        ("rotary",), "tests/rewriting/test_versions.py"),
    Mutant("a stream that was replaced is restored as one that was added to", "tofu_fx/rewriting/versions.py",
        "additive = additive and step.additive", "additive = bool(additive)", ("replaced",), DENSE),
    Mutant("whole tokens are copies of their survivors", "tofu_fx/rewriting/versions.py",
        "(step.assignment, step.before, step.merged) if additive else (step.assignment,)", "(step.assignment,)",
        ("tokens",), REFERENCE),
    Mutant("features from before are pruned, not merged", "tofu_fx/rewriting/versions.py",
        'strategy = step.strategy if merges else "prune"', 'strategy = "prune"',
        ("skip",), SKIPS),
    Mutant("prefix tokens are merged", "tofu_fx/rewriting/reducer.py",
        "(step.run.prefix, step.run.suffix)", "(0, step.run.suffix)",
        ("mean", "rotary"), REFERENCE),
    Mutant("suffix tokens are merged", "tofu_fx/rewriting/reducer.py",
        "(step.run.prefix, step.run.suffix)", "(step.run.prefix, 0)",
        ("rotary", "suffix"), "tests/rewriting/test_reducer.py"),
    Mutant("prefix tokens are not found ahead of the stream", "tofu_fx/sites/residual.py",
        "prefix, suffix = max(0, tokens.prefix), max(0, tokens.suffix)", "prefix, suffix = 0, max(0, tokens.suffix)",
        ("mean", "registers"), REFERENCE, unseen="a class token that is merged is a loss, not a wrong merge"),
    # ---- what a token weighs
    Mutant("log2 for log", "tofu_fx/rewriting/versions.py", "aten.log.default", "aten.log2.default", ("mean",),
        REFERENCE),
    Mutant("no log(size) after the first reduction", "tofu_fx/rewriting/weights.py",
        "if stream is None or version == 0:", "if stream is None or version <= 1:", ("mean",),
        REFERENCE),
    Mutant("no log(size) beside an additive mask", "tofu_fx/rewriting/weights.py",
        "bias = emit.call(aten.add.Tensor, mask, bias)", "bias = mask", ("relative fused",), REFERENCE),
    Mutant("a flag mask hides nothing once there are sizes", "tofu_fx/rewriting/weights.py",
        'aten.where.ScalarOther, mask, bias, float("-inf")', "aten.where.ScalarOther, mask, bias, 0.0",
        ("bool", "padding"), REFERENCE),
    Mutant("sizes over their mean are plain sizes", "tofu_fx/rewriting/weights.py",
        'if context.tracer.pools[node] == "mean":', 'if context.tracer.pools[node] == "median":',
        ("mean",), REFERENCE),
    # ---- masks and patterns
    Mutant("only an infinite mask hides", "tofu_fx/sites/mask_values.py", "FAR_BELOW = 46.0", "FAR_BELOW = 1e30",
        ("finite", "finite padding"), MASKS),
    Mutant("a mask of pairs counts as padding", "tofu_fx/sites/mask_values.py",
        'return "pairs" if bool(hidden.any()) else "keys"', 'return "keys"', ("window",), MASKS),
    Mutant("what is hidden from one is hidden from all", "tofu_fx/sites/mask_values.py",
        "there = sees.any(-2)", "there = sees.all(-2)", ("causal",), MASKS),
    Mutant("a causal mask is one of pairs", "tofu_fx/sites/mask_values.py",
        "if bool((hidden & sees.transpose(-2, -1)).any()):", "if False:", ("causal",), MASKS,
        unseen="it is declined all the same; only the reason is another"),
    Mutant("other values of a mask's inputs are not asked", "tofu_fx/sites/masks.py",
        'found.append("unseen" if hides == "later" else hides)', 'found.append("nothing")', ("padding",), MASKS,
        unseen="the proofs make one call; what later calls may pass is not in it"),
    Mutant("the causal flag is not read", "tofu_fx/sites/attention.py",
        'causal=bool(argument(node, "is_causal"))', "causal=False", ("causal flag",), "tests/sites/test_attention.py"),
    Mutant("a product next to the softmax only is found", "tofu_fx/sites/attention.py",
        "if far > MOST_BETWEEN or", "if far > 0 or", ("bmm",), REFERENCE),
    # ---- layout and metric
    Mutant("per-token values stand in the batch's order", "tofu_fx/rewriting/layout.py",
        "if ahead < len(batch):", "if False:", ("NBC",), REFERENCE),
    Mutant("padding is compared with the rest", "tofu_fx/rewriting/similarity.py",
        "if not self.site.padding:", "if True:", ("padding", "finite padding"), "tests/rewriting/test_padding.py"),
    Mutant("keys are the largest of the heads, not the mean", "tofu_fx/rewriting/similarity.py",
        "context.emit.call(aten.mean.dim, node, heads)", "context.emit.call(aten.amax.default, node, heads)",
        ("mean",), REFERENCE),
    Mutant("queries are left out of queries_keys", "tofu_fx/rewriting/similarity.py",
        'if kind == "queries_keys":', 'if kind == "queries":', ("queries and keys",),
        "tests/rewriting/test_match.py"),
    # ---- rewriting
    Mutant("sums are multiplied by no size", "tofu_fx/rewriting/rewriter.py",
        "if node in self.ctx.tracer.pools:", "if False:", ("mean",), REFERENCE),
    Mutant("changes in place are made functional for all to see", "passes/functionalize_inplace.py",
        "return next(later, None) is None", "return True", ("views in place",), "tests/passes/test_slice_writes.py"),
    # ---- operators: Python, which float64 takes and every device but the CPU
    Mutant("sources are the least similar", "tofu_fx/ops/matching.py",
        "chosen = ranked[:, :r]", "chosen = ranked[:, -r:]", ("double",), MATCHING),
    Mutant("the last of equal partners is taken", "tofu_fx/ops/matching.py",
        "block = blocks.view(-1, blocks.shape[2]).index_select(0, winner).argmax(dim=-1)",
        "block = blocks.view(-1, blocks.shape[2]).index_select(0, winner).argmin(dim=-1)", ("double",), MATCHING,
        unseen=_TIES),
    Mutant("merged tokens keep the size of one", "tofu_fx/ops/merging.py",
        "    groups.write(new_size, place, total)\n", "", ("double",), MERGING),
    Mutant("the mean is not weighted by size", "tofu_fx/ops/merging.py",
        "summed = groups.sum(x, groups.member, weight.to(dtype))",
        "summed = groups.sum(x, groups.member, torch.ones_like(weight).to(dtype))", ("double",), MERGING),
    Mutant("MLERP has the smallest member's norm", "tofu_fx/ops/merging.py",
        'scatter_reduce_(0, self.group, values, "amax")', 'scatter_reduce_(0, self.group, values, "amin")',
        ("double",), MERGING),
    Mutant("restoring adds nothing of what a token was", "tofu_fx/ops/restore.py",
        "return whole + (before - gather_tokens(merged, assignment))", "return whole", ("tokens",), REFERENCE),
    Mutant("padding is marked by nothing", "tofu_fx/ops/separate.py",
        "_UNIT, _MARK = 0.8, 0.6", "_UNIT, _MARK = 1.0, 0.0", ("padding",), f"{OPS}/test_separate.py",
        unseen="padding is like padding all the same; only a token unlike all others would join it"),
    Mutant("features from before are merged without sizes", "tofu_fx/ops/rebase.py",
        "return merge_groups(x, size, assignment, kept, strategy)[0]",
        "return merge_groups(x, torch.ones_like(size), assignment, kept, strategy)[0]", ("skip",), SKIPS),
    Mutant("the mean's gradient is not shared by size", "tofu_fx/ops/gradient.py",
        "return (spread * share.unsqueeze(-1)).to(grad.dtype)", "return spread.to(grad.dtype)", ("mean",),
        f"{OPS}/test_gradients.py", unseen=_EAGER),
    Mutant("MLERP's gradient forgets who sets the norm", "tofu_fx/ops/merging.py",
        "    values += torch.where(sets_norm, by_norm, 0.0)\n", "", ("mean",),
        f"{OPS}/test_gradients.py", unseen=_EAGER),
    Mutant("partners of a grid are counted in columns", "tofu_fx/ops/matching.py",
        "((frame * grid.height + row) * grid.width + column)", "((frame * grid.height + row) * grid.height + column)",
        ("image",), f"{OPS}/test_grid.py"),
    # ---- operators: C++
    Mutant("C++: the destination counts as one token", "tofu_fx/ops/cpu.cpp",
        "const float weight = size[destination];", "const float weight = 1.0f;", ("mean", "deep"), MERGING),
    Mutant("C++: sizes do not add up", "tofu_fx/ops/cpu.cpp",
        "float total = size[destination];", "float total = 1.0f;", ("mean", "deep"), MERGING),
    Mutant("C++: MLERP has the smallest member's norm", "tofu_fx/ops/cpu.cpp",
        "largest = norm > largest ? norm : largest;", "largest = norm < largest ? norm : largest;", ("mean",), MERGING),
    Mutant("C++: sources are the least similar", "tofu_fx/ops/cpu.cpp",
        "best[a] > best[b] : a < b", "best[a] < best[b] : a < b", ("mean",), MATCHING),
    Mutant("C++: everyone joins the first partner", "tofu_fx/ops/cpu.cpp",
        "const int64_t p = std::find(row, row + partners, best[c]) - row;", "const int64_t p = 0;", ("mean",),
        MATCHING),
    Mutant("C++: sources are assigned to the first place", "tofu_fx/ops/cpu.cpp",
        "assignment[t] = assignment[joins[t]];", "assignment[t] = 0;", ("mean", "tokens"), MATCHING),
    Mutant("C++: tokens are compared by products, not cosines", "tofu_fx/ops/cpu.cpp",
        "const float unit = from[j] / norm;", "const float unit = from[j];", ("mean",), MATCHING),
    # ---- what counts as a token; fake values
    Mutant("samples of a batch are tokens", "passes/find_attention.py",
        "if site.matched and tracer", "if False and tracer", ("mean",), "tests/sites/test_samples_as_tokens.py",
        unseen="in a graph a sample is a row like a token; only the compiler knows where it comes from"),
    Mutant("fake values are remembered by shape alone", "tofu_fx/fx/fakes.py",
        "value.shape, value.stride(), value.dtype,", "value.shape,", ("mean",),
        "tests/fx/test_fakes.py -k 'remembered or model or another'",
        unseen="the ops of the models are given tensors of one dtype and layout each"),
)  # fmt: skip

#: planted by the test suite itself, with `prove` only: one or two of each part, in Python, whose models are quick
SAMPLE = (
    "a mean over tokens is a plain one",
    "tables follow the first reduction only",
    "nothing follows the stream",
    "sizes are not carried to the next reduction",
    "survivors of two reductions are those of the last",
    "log2 for log",
    "no log(size) beside an additive mask",
    "a mask of pairs counts as padding",
    "the causal flag is not read",
    "merged tokens keep the size of one",
)
