"""Fake values computed the quick way are those of FakeTensorMode: shape, strides, dtype, device, place in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Interpreter
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.multiprocessing.reductions import StorageWeakRef

from tests.harness import EAGER, study
from tests.zoo import CATALOGUE, ZOO
from tofu_fx.calibration.rehearsal import Rehearsal
from tofu_fx.fx import fakes
from tofu_fx.fx.fakes import compute
from tofu_fx.plan.options import Options
from tofu_fx.rewriting.token_count_inputs import fake_mode_of, faking
from tofu_fx.testing import capture

aten = torch.ops.aten
MODELS = [
    "timm: vit", "timm: eva02", "timm: relpos_cls", "timm: hiera", "timm: vit_map", "transformers: bert_padded",
    "transformers: dpt", "other: encoder_tokens_first", "other: einsum", "other: talking_heads", "other: cosine",
]  # fmt: skip


def form(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert isinstance(value, FakeTensor)
        sizes = [*value.shape, *value.stride(), value.storage_offset()]
        place = tuple(at_some(size) if isinstance(size, torch.SymInt) else size for size in sizes)
        return (*place, value.dtype, value.device, value.requires_grad, value.fake_mode)
    return [form(part) for part in value] if isinstance(value, (list, tuple)) else value


def at_some(size: torch.SymInt) -> list[int]:
    """A symbolic size at some values of its symbols: a comparison would be a guard, which makes sizes equal."""
    expr = size.node.expr
    return [int(expr.subs(dict.fromkeys(expr.free_symbols, value))) for value in (1, 5, 11)]


class Both(Interpreter):
    """Computes each node of a graph both ways."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        held = super().get_attr(target, args, kwargs)  # the matrices by which tokens are projected
        return torch.empty_strided(held.shape, held.stride(), dtype=held.dtype)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = compute(target, args, kwargs)
        assert form(value) == form(target(*args, **kwargs)), target
        return value


@pytest.fixture(autouse=True)
def _nothing_known() -> None:
    """Each op is computed at its first call, whatever was computed before."""
    fakes._KNOWN.clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was computed the quick way."""
    made: list[Any] = []
    wrapped = fakes._wrapped

    def noting(value: Any, like: Any) -> Any:
        made.append(value)
        return wrapped(value, like)

    monkeypatch.setattr(fakes, "_wrapped", noting)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_every_op_of_a_model_has_the_fake_value_that_the_mode_gives_it(name: str, quick: list[Any]) -> None:
    case = CATALOGUE[name]
    args, kwargs = case.inputs()
    with torch.no_grad():
        found = study(case.model(), *args, variants={"reduced": {"r": 2}}, proofs=False, **kwargs)
    for compilation in found.compilations("reduced"):
        gm, mode = compilation.gm, fake_mode_of(compilation.gm)
        for _ in ("computed", "remembered"):
            count, known = len(quick), len(fakes._KNOWN.get(mode, ()))
            with faking(mode):
                Both(gm).run(*(node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")))
            assert len(quick) - count > len(gm.graph.nodes) / 4, "the quick way is hardly taken"
        assert 0 < known == len(fakes._KNOWN[mode]), "nothing is remembered"


@pytest.mark.parametrize(
    "name",
    [
        "eva02",
        "grouped_query",
        "encoder_batch_first",
        *(pytest.param(n, marks=pytest.mark.nightly("its ops are those of the others")) for n in ("vit", "hf_beit")),
    ],
)
def test_every_op_of_a_rehearsed_model_with_symbolic_token_counts_too(name: str, quick: list[Any]) -> None:
    entry = ZOO[name]
    with torch.no_grad():
        gm, inputs = capture(entry.model(), entry.batch())
        rehearsed = Rehearsal.of(gm, inputs, Options.parse(EAGER)).gm
        symbolic = [node for node in rehearsed.graph.nodes if is_symbolic(node.meta.get("val"))]
        with faking(fake_mode_of(rehearsed)):
            Both(rehearsed).run(*(node.meta["val"] for node in rehearsed.graph.find_nodes(op="placeholder")))
    assert len(symbolic) > 20
    assert sum(map(is_symbolic, quick)) > len(symbolic) / 4, "the quick way is hardly taken"


def is_symbolic(value: Any) -> bool:
    return isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)


X = (2, 6, 8)
OPS: dict[str, Callable[..., Any]] = {
    "linear": lambda x, w, b: compute(aten.linear.default, (x, w, b), {}),
    "layer_norm": lambda x, w, b: compute(aten.layer_norm.default, (x, [8], b, b), {}),
    "gelu": lambda x, w, b: compute(aten.gelu.default, (x,), {"approximate": "tanh"}),
    "add": lambda x, w, b: compute(aten.add.Tensor, (x, b), {}),
    "twice": lambda x, w, b: compute(aten.add.Tensor, (x, x), {"alpha": 2}),
    "complex": lambda x, w, b: compute(aten.mul.Tensor, (x, 2j), {}),
    "number": lambda x, w, b: compute(aten.mul.Tensor, (x, 2.5), {}),
    "equal": lambda x, w, b: compute(aten.eq.Tensor, (x, x), {}),
    "reshape": lambda x, w, b: compute(aten.reshape.default, (x, [x.shape[0], -1]), {}),
    "view": lambda x, w, b: compute(aten.unsqueeze.default, (x, 1), {}),
    "heads": lambda x, w, b: compute(aten.unflatten.int, (x, -1, [2, 4]), {}),
    "softmax": lambda x, w, b: compute(aten.softmax.int, (x, -1, torch.float64), {}),
    "mean": lambda x, w, b: compute(aten.mean.dim, (x, [1], True), {}),
    "matmul": lambda x, w, b: compute(aten.matmul.default, (x, w), {}),
    "cat": lambda x, w, b: compute(aten.cat.default, ([x, x], 1), {}),
    "split": lambda x, w, b: compute(aten.split.Tensor, (x, 4, 1), {}),
    "dropout": lambda x, w, b: compute(aten.dropout.default, (x, 0.1, False), {}),
    "slice": lambda x, w, b: compute(aten.slice.Tensor, (x, 1, 1, -1), {}),
    "contiguous": lambda x, w, b: compute(aten.contiguous.default, (x,), {}),
    "cast": lambda x, w, b: compute(aten.to.dtype, (x, torch.float64), {}),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "turned": lambda x: x.transpose(0, 1),
    "one": lambda x: x[:, :1],
    "one, turned": lambda x: x[:1].transpose(0, 1),
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1),
    "cut": lambda x: x.repeat(1, 1, 2)[..., 3:11],
    "last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "half": lambda x: x.half(),
    "numbers": lambda x: x.long(),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("op", list(OPS))
def test_layouts_are_those_of_the_mode(op: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome() -> Any:
        with FakeTensorMode() as mode, torch.no_grad():
            x = LAYOUTS[layout](torch.empty(X))
            w, b = torch.empty(8, 8), torch.empty(8)
            if layout == "half" or (layout == "numbers" and op in ("linear", "matmul", "layer_norm")):
                w, b = w.to(x.dtype), b.to(x.dtype)
            try:
                found = form(OPS[op](x, w, b))
            except Exception as error:  # noqa: BLE001 - both must refuse alike
                return type(error)
            return str(found).replace(str(mode), "")

    found = outcome()
    monkeypatch.setattr(fakes, "_plain_name", lambda target: None)
    assert found == outcome()


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.layer_norm.default, [(2, 6, 8), [7]]),
        (aten.layer_norm.default, [(2, 6, 8), [5, 8]]),
        (aten.layer_norm.default, [(8,), [6, 8]]),
        (aten.layer_norm.default, [(2, 6, 8), [8], (7,), (7,)]),
        (aten.linear.default, [(2, 6, 8), (4, 7)]),
        (aten.linear.default, [(2, 6, 8), (4, 8), (5,)]),
        (aten.add.Tensor, [(2, 6, 8), (2, 5, 8)]),
        (aten.view.default, [(2, 6, 8), [2, 5, 8]]),
        (aten.cat.default, [[(2, 6, 8), (2, 6, 7)], 1]),
    ],
)
def test_shapes_that_do_not_fit_are_errors(target: Any, args: list[Any]) -> None:
    def made(value: Any) -> Any:
        if isinstance(value, tuple):
            return torch.empty(value)
        return [made(part) for part in value] if isinstance(value, list) else value

    with FakeTensorMode(), torch.no_grad(), pytest.raises(RuntimeError):
        compute(target, made(args), {})


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("op", list(OPS))
def test_what_is_remembered_is_what_was_computed(op: str, layout: str) -> None:
    with FakeTensorMode(), torch.no_grad():
        x, w, b = LAYOUTS[layout](torch.empty(X)), torch.empty(8, 8), torch.empty(8)
        try:
            first = OPS[op](x, w, b)
        except Exception:  # noqa: BLE001 - what is refused is refused again
            with pytest.raises(Exception):  # noqa: B017
                OPS[op](x, w, b)
            return
        second = OPS[op](x, w, b)
    assert form(first) == form(second)
    parts = list(zip(fakes._tensors([first]), fakes._tensors([second]), strict=True))
    assert parts
    for a, b in parts:  # views of the input are made anew, for they lie in its memory
        assert (memory(a) == memory(x)) == (memory(b) == memory(x))
        assert (memory(a) == memory(b)) == (memory(a) == memory(x))


def memory(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def test_numbers_that_are_equal_but_of_other_types_are_not_taken_for_one_another() -> None:
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, dtype=torch.long)
        dtypes = [compute(aten.mul.Tensor, (x, number), {}).dtype for number in (1, 1.0, True, 1, 1.0)]
    assert dtypes == [torch.long, torch.float, torch.long, torch.long, torch.float]


def test_complex_tensors_that_are_conjugated_lazily_are_not_taken_for_others() -> None:
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, dtype=torch.complex64)
        found = [compute(aten.resolve_conj.default, (value,), {}) for value in (x.conj(), x, x.conj())]
    assert [memory(value) == memory(x) for value in found] == [False, True, False]


def test_what_is_unusual_is_left_to_the_mode(quick: list[Any]) -> None:
    mode, other = FakeTensorMode(), FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        x, weight, constant = torch.empty(2, 3), torch.nn.Parameter(torch.empty(2, 3)), torch.tensor(1.0)
    assert compute(aten.add.Tensor, (x, weight), {}).requires_grad
    with torch.no_grad():
        assert not quick
        assert not compute(aten.add.Tensor, (x, weight), {}).requires_grad
    assert len(quick) == 1
    assert compute(aten.mul.Tensor, (constant, constant), {}).constant is not None
    with torch.autocast("cpu"):
        assert compute(aten.linear.default, (x, x), {}).dtype is torch.bfloat16
    symbolic = other.from_tensor(torch.empty(5, 3), static_shapes=False)
    with enable_python_dispatcher(), other:
        assert isinstance(compute(aten.reshape.default, (symbolic, [-1]), {}).shape[0], torch.SymInt)
    assert compute(aten.neg.default, (torch.ones(2),), {}).tolist() == [-1.0, -1.0]
    with mode:
        compute(aten.add_.Tensor, (x, 1), {})
    assert len(quick) == 1


def test_ops_that_take_objects_are_left_to_the_mode() -> None:
    packed = [op for op in (getattr(torch.ops.quantized, "linear", None),) if op is not None]
    assert packed
    assert not any(fakes._is_pure(op.default) for op in packed)
    assert fakes._is_pure(aten.linear.default)
    assert not fakes._is_pure(aten.add_.Tensor)
