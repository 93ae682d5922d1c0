"""The kernels against the plain operations: interpreted by Triton on the CPU, and on a GPU if there is one.

Triton decides whether to interpret when it is imported. Other tests import it, so the interpreter has its own process.
It shows that the kernels are right, not that they compile: a second process compiles them for GPUs that need not be
here.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from prefixtune_cli import adapter
from prefixtune_cli.adapter import read, triton_read
from prefixtune_cli.adapter.feature_map import FeatureMap, features
from prefixtune_cli.adapter.read import Weights

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

KERNELS = "prefixtune_cli.adapter.triton_kernels"
# The tolerance of float32 is four times as large: a GPU's exponential and inverse root are less exact.
UNIT_ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}

Run = Callable[..., Any]


class Case(NamedTuple):
    """A call: its sizes, the layout of the queries, and the dtypes of queries and output, of M, and of the products."""

    batch: int = 2
    positions: int = 37
    heads: int = 3
    group: int = 1
    d: int = 16
    v: int = 16
    phi: str = "elu"
    normalize: bool = False
    layout: str = "transposed"
    dtype: torch.dtype = torch.float32
    memory: torch.dtype = torch.float32
    computed: torch.dtype | None = None
    scale: float = 1.0

    def map(self) -> FeatureMap:
        return FeatureMap(self.phi, self.normalize)

    def precision(self) -> torch.dtype:
        return self.computed or self.dtype


MAPS = [(phi, normalize) for phi in ("elu", "gelu") for normalize in (False, True)]
SHAPES = {
    "rows that share tiles": Case(),
    "three query heads to an M": Case(heads=6, group=3),
    "decoding": Case(batch=3, positions=1, heads=6, group=3, v=80),
    "widths that are no power of two": Case(heads=2, d=80, v=24),
    "several blocks of v": Case(heads=1, positions=20, d=24, v=160),
    "several shares of the tokens": Case(batch=3, positions=100, heads=2, group=2),
    "full tiles": Case(batch=1, positions=64, heads=2, group=2, d=32, v=32),
    "less than the smallest tile": Case(batch=1, positions=5, heads=2, d=5, v=3),
}
LAID_OUT = {
    layout: Case(3, 25, 4, 2, v=24, normalize=True, layout=layout)
    for layout in ("transposed", "contiguous", "fused", "gapped", "last is not 1", "expanded")
}
LAID_OUT["far apart"] = Case(3, 5, 4, 2, v=24, layout="far apart", dtype=torch.float16)
PRECISIONS = {
    "bfloat16": Case(dtype=torch.bfloat16, memory=torch.bfloat16),
    "bfloat16 with a float32 M": Case(dtype=torch.bfloat16),
    "float16 with a float32 M": Case(dtype=torch.float16),
    "autocast of float32": Case(computed=torch.bfloat16),
    "a large float16": Case(dtype=torch.float16, normalize=True, scale=300.0),
    "widest": Case(positions=5, heads=1, d=256, v=256, dtype=torch.bfloat16),
}


class Inputs(NamedTuple):
    output: Tensor
    query: Tensor
    M: Tensor
    grad: Tensor


def inputs(case: Case, device: str) -> Inputs:
    """Random tensors; every call gives the same."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype).to(device)

    def queries(*shape: int) -> Tensor:
        return case.scale * normal(*shape)

    b, s, h, d, v = case.batch, case.positions, case.heads, case.d, case.v
    query = {
        "transposed": lambda: queries(b, s, h, d).transpose(1, 2),
        "contiguous": lambda: queries(b, h, s, d),
        "fused": lambda: queries(b, s, h + 2, d)[:, :, 1 : h + 1].transpose(1, 2),
        "gapped": lambda: queries(b, h, 2 * s, d + 3)[:, :, ::2, 3:],
        "last is not 1": lambda: queries(b, h, d, s).mT,
        "far apart": lambda: queries(b, h, s, d),
        "expanded": lambda: queries(1, h, s, d).expand(b, h, s, d),
    }[case.layout]()
    output, grad = normal(b, s, h, v), normal(b, s, h, v)
    if case.layout in ("contiguous", "fused"):
        output, grad = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (output, grad))
    if case.layout == "last is not 1":
        output, grad = (x.mT.contiguous().mT for x in (output, grad))
    if case.layout == "far apart":
        query, output, grad = far_apart(query, output, grad)
    M = 0.3 * torch.randn((h // case.group, d, v), generator=generator)
    return Inputs(output, query, M.to(case.memory).to(device), grad)


def far_apart(*tensors: Tensor) -> Iterator[Tensor]:
    """Batch rows are 2³⁰ elements apart, so 32 bits cannot address the third. Untouched memory takes no space."""
    sizes = [x[0].numel() for x in tensors]
    base = tensors[0].new_empty((len(tensors[0]) - 1) * 2**30 + sum(sizes))
    for x, start in zip(tensors, itertools.accumulate(sizes, initial=0), strict=False):
        place = base.as_strided(x.shape, (2**30, *x[0].contiguous().stride()), start)
        yield place.copy_(x)


def compare_forward(case: Case, device: str = "cpu") -> None:
    """Each factor is rounded at most once, and so is the sum."""
    output, query, M, _ = inputs(case, device)
    assert triton_read.takes(output, query, M, case.map())
    actual = triton_read.forward(output, query, M, case.map(), case.precision())
    expected = read._forward(
        output.double(), query.double(), Weights(M.double()), case.map(), torch.float64
    )
    value = features(case.map(), wide(query)).unflatten(1, (case.batch, -1))
    of_heads = M.double().abs().repeat_interleave(case.group, 0)
    factors = torch.einsum("hbsd,hdv->bshv", value.abs(), of_heads)
    assert actual.is_contiguous()
    close(actual, expected, factors, case)


def compare_gradients(case: Case, device: str = "cpu", grad: Tensor | None = None) -> None:
    _, query, M, random = inputs(case, device)
    g = random if grad is None else grad
    phi, weights = case.map(), Weights(M.double())
    dq, dM = triton_read.backward(g, query, M, phi, case.precision(), True, True)
    expected = read._backward(g.double(), query.double(), weights, phi, torch.float64, [True, True])
    assert dq is not None
    assert dM is not None
    assert expected[0] is not None
    assert expected[1] is not None
    assert dq.shape == query.shape
    assert dq.stride() == torch.empty_like(query).stride()
    assert (dM.dtype, dM.shape) == (M.dtype, M.shape)

    by_head = g.double().abs().permute(2, 0, 1, 3).flatten(1, 2)
    value = features(phi, wide(query)).abs()
    close(dM, expected[1], (value.mT @ by_head).unflatten(0, (len(M), -1)).sum(1), case)

    # The slope is at most 1.13. The normalization subtracts the mean of the gradient that came through φ.
    factors = 1.13 * by_head @ M.double().abs().repeat_interleave(case.group, 0).mT
    if case.normalize:
        inverse = (wide(query).square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        seen = (wide(query) * inverse).abs()
        factors = inverse * (factors + seen * (factors * seen).mean(-1, keepdim=True))
    close(dq, expected[0], factors.unflatten(1, (case.batch, -1)).transpose(0, 1), case)


def wide(query: Tensor) -> Tensor:
    return query.double().transpose(0, 1).flatten(1, 2)


def close(actual: Tensor, expected: Tensor, factors: Tensor, case: Case) -> None:
    """Within the rounding of two factors to the compute dtype and of the result to its own; `factors` is Σ|a||b|.

    The interpreter truncates to bfloat16, while a GPU rounds; that doubles the error.
    """
    roundoff = UNIT_ROUNDOFF if actual.is_cuda else {**UNIT_ROUNDOFF, torch.bfloat16: 2**-7}
    of_factors, of_result = roundoff[case.precision()], roundoff[actual.dtype]
    allowed = 2.1 * of_factors * factors + 1.1 * of_result * expected.abs() + 1e-5
    excess = ((actual.double() - expected).abs() / allowed).max().item()
    assert excess <= 1, f"{excess:.2f} times the rounding"


def twice_the_same(case: Case, device: str = "cpu") -> None:
    _, query, M, grad = inputs(case, device)
    first, second = (
        triton_read.backward(grad, query, M, case.map(), case.precision(), False, True)[1]
        for _ in range(2)
    )
    assert first is not None
    assert torch.equal(first, second)


def inputs_are_left(case: Case, device: str = "cpu") -> None:
    given, before = inputs(case, device), inputs(case, device)
    output, query, M, grad = given
    triton_read.forward(output, query, M, case.map(), case.precision())
    triton_read.backward(grad, query, M, case.map(), case.precision(), True, True)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def only_the_wanted(case: Case, device: str = "cpu") -> None:
    _, query, M, grad = inputs(case, device)
    for wanted in ((True, False), (False, True), (False, False)):
        found = triton_read.backward(grad, query, M, case.map(), case.precision(), *wanted)
        assert tuple(gradient is not None for gradient in found) == wanted


def no_tokens(case: Case, device: str = "cpu") -> None:
    output, query, M, grad = inputs(case, device)
    assert triton_read.forward(output, query, M, case.map(), case.precision()).shape == output.shape
    dq, dM = triton_read.backward(grad, query, M, case.map(), case.precision(), True, True)
    assert dq is not None
    assert dM is not None
    assert dq.shape == query.shape
    assert torch.equal(dM, torch.zeros_like(M))


def launched_again(case: Case, device: str = "cpu") -> None:
    """Other tensors of the same kind, and tensors from which a GPU cannot load several elements at once."""
    output, query, M, _ = inputs(case, device)

    def product(query: Tensor, M: Tensor, output: Tensor) -> Tensor:
        return triton_read.forward(output, query, M, case.map(), case.precision())

    zero = torch.zeros_like(output)
    first = product(query, M, zero)
    assert torch.equal(product(query.clone(), -M, zero.clone()), -first)
    assert torch.equal(product(odd(query), odd(M), odd(zero)), first)
    assert torch.equal(product(query, M, zero), first)


def odd(tensor: Tensor) -> Tensor:
    """A copy that begins one element after the start of its memory."""
    base = tensor.new_empty(tensor.numel() + 1)
    strides = torch.empty_like(tensor).stride()
    return base.as_strided(tensor.shape, strides, 1).copy_(tensor)


def expanded_gradients(case: Case, device: str = "cpu") -> None:
    """The gradient of the result's sum, expanded in all of its dimensions or in some."""
    shape = (case.batch, case.positions, case.heads, case.v)
    one = torch.full((), 0.7, dtype=case.dtype, device=device)
    compare_gradients(case, device, one.expand(shape))
    column = torch.linspace(-1, 1, case.v, dtype=case.dtype, device=device)
    compare_gradients(case, device, column.expand(shape))


def takes_what_it_computes() -> None:
    output, query, M, _ = inputs(Case(), "cpu")
    elu = FeatureMap("elu")
    assert triton_read.takes(output, query, M, elu)
    assert triton_read.takes(output, query, torch.nn.Parameter(M), FeatureMap("gelu", True))
    assert not triton_read.takes(output, query, M, FeatureMap("mlp"))
    assert not triton_read.takes(*(x.double() for x in (output, query, M)), elu)
    assert not triton_read.takes(output, query.new_zeros(2, 3, 37, 257), M, elu)
    assert not triton_read.takes(output, query, M.new_zeros(3, 16, 257), elu)
    assert not triton_read.takes(output, query, M.to("meta"), elu)
    # A kernel that took these for fitting would read past their end.
    assert not triton_read.takes(output[..., :15], query, M, elu)
    assert not triton_read.takes(output[:, :36], query, M, elu)
    assert not triton_read.takes(output, query[:1], M, elu)
    assert not triton_read.takes(output, query, M[:, :15], elu)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not triton_read.takes(*(mode.from_tensor(x) for x in (output, query, M)), elu)


def leaves_compilation_alone() -> None:
    output, query, M, _ = inputs(Case(), "cpu")
    seen = []

    def asked(query: Tensor) -> Tensor:
        seen.append(triton_read.takes(output, query, M, FeatureMap("elu")))
        return query + 1

    torch.compile(asked, backend="eager", fullgraph=True)(query)
    assert seen == [False]


def compile_kernels(
    capability: int, dtype: str, width: int, phi: str, normalize: bool
) -> list[int]:
    """The kernels as machine code for an absent GPU, and the shared memory that each takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prefixtune_cli.adapter import triton_kernels

    stored = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    constants = {
        "d": width,
        "v": width,
        "D": width,
        "BLOCK_V": 32,
        "PHI": phi,
        "NORMALIZE": normalize,
        "EPSILON": 1e-6,
        "PRECISION": dtype,
        "BLOCK_N": 32,
    }
    pointers = {"output": stored, "query": stored, "grad": stored, "dq": stored, "result": stored}
    pointers |= {"M": "*fp32", "partial": "*fp32"}
    found = []
    for tuned in (triton_kernels.read, triton_kernels.of_query, triton_kernels.of_memory):
        kernel = tuned.fn
        signature = {
            name: "constexpr" if name in constants else pointers.get(name, "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        built = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4})
        assert built.asm["cubin"]
        found.append(built.metadata.shared)
    return found


@contextmanager
def process(**environment: str) -> Iterator[Run]:
    """Another process with additional environment variables, which runs functions of this module."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        pool.submit(int).result()  # starts the process
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    with process(TRITON_INTERPRET="1") as run:
        yield run


@pytest.mark.parametrize(("phi", "normalize"), MAPS)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_forward_is_the_plain_read(interpreted: Run, case: Case, phi: str, normalize: bool) -> None:
    interpreted(compare_forward, case._replace(phi=phi, normalize=normalize))


@pytest.mark.parametrize(("phi", "normalize"), MAPS)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_gradients_are_the_plain_ones(
    interpreted: Run, case: Case, phi: str, normalize: bool
) -> None:
    interpreted(compare_gradients, case._replace(phi=phi, normalize=normalize))


@pytest.mark.parametrize("case", LAID_OUT.values(), ids=LAID_OUT)
def test_queries_are_read_where_they_lie(interpreted: Run, case: Case) -> None:
    interpreted(compare_forward, case)
    interpreted(compare_gradients, case)


@pytest.mark.parametrize("case", PRECISIONS.values(), ids=PRECISIONS)
def test_half_precision_rounds_each_factor_and_the_sum_once(interpreted: Run, case: Case) -> None:
    interpreted(compare_forward, case)
    interpreted(compare_gradients, case)


def test_gradient_that_is_expanded_is_taken_as_it_is(interpreted: Run) -> None:
    interpreted(expanded_gradients, Case(heads=4, group=2, normalize=True))


def test_gradient_that_is_not_wanted_is_none(interpreted: Run) -> None:
    interpreted(only_the_wanted, Case())


@pytest.mark.parametrize("case", [Case(batch=0), Case(positions=0)], ids=["rows", "positions"])
def test_of_no_tokens_the_gradient_of_m_is_zero(interpreted: Run, case: Case) -> None:
    interpreted(no_tokens, case)


def test_decoding_reads_the_tensors_of_each_step(interpreted: Run) -> None:
    interpreted(launched_again, SHAPES["decoding"])


def test_inputs_are_left_as_they_are(interpreted: Run) -> None:
    interpreted(inputs_are_left, Case(normalize=True))


def test_gradient_of_m_is_the_same_bit_for_bit(interpreted: Run) -> None:
    interpreted(twice_the_same, SHAPES["several shares of the tokens"])


def test_kernels_take_what_they_compute_and_nothing_else(interpreted: Run) -> None:
    interpreted(takes_what_it_computes)


def test_torch_compile_is_left_to_fuse_the_plain_operations(interpreted: Run) -> None:
    interpreted(leaves_compilation_alone)


def test_without_a_gpu_nothing_is_taken_and_the_kernels_are_not_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    output, query, M, _ = inputs(Case(), "cpu")
    known = KERNELS in sys.modules
    assert not triton_read.takes(output, query, M, FeatureMap("elu"))
    assert (KERNELS in sys.modules) == known


def test_without_triton_nothing_is_taken(monkeypatch: pytest.MonkeyPatch, anew: None) -> None:
    monkeypatch.delattr(adapter, "triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)
    assert not triton_read._runs_on(torch.device("cpu"))


def test_where_triton_cannot_run_a_kernel_nothing_is_taken_and_a_warning_says_so(
    anew: None,
) -> None:
    cpu = torch.device("cpu")  # Triton has no compiler for it
    with pytest.warns(RuntimeWarning, match="Triton cannot run a kernel on cpu"):
        assert not triton_read._runs_on(cpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton_read._runs_on(cpu)


@pytest.fixture
def anew() -> Iterator[None]:
    """Clear what is cached about Triton and the devices, for the test and after it."""
    forget()
    yield
    forget()


def forget() -> None:
    triton_read._kernels.cache_clear()
    triton_read._runs_on.cache_clear()


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """Into less shared memory than the 99 KiB of the smallest GPU of this kind."""
    targets = (
        (80, "bfloat16", 64, "gelu", True),
        (90, "float16", 128, "elu", False),
        (120, "float32", 32, "elu", True),
    )
    with process(TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0") as run:
        shared = [run(compile_kernels, *target) for target in targets]
    assert max(max(sizes) for sizes in shared) <= 99 * 1024


ON_GPU = {
    **{
        f"{name}, {phi}{', normalized' if normalize else ''}": case._replace(
            phi=phi, normalize=normalize
        )
        for name, case in SHAPES.items()
        for phi, normalize in MAPS
    },
    **LAID_OUT,
    **PRECISIONS,
    "a layer": Case(2, 1000, 32, 4, 128, 128, "elu", True, dtype=torch.bfloat16),
    "widest in float32": Case(positions=300, heads=2, d=256, v=256),
}


LAYER = ON_GPU["a layer"]


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    there_is_none = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
    return pytest.mark.gpu(there_is_none(test))


@on_gpu
@pytest.mark.parametrize("case", ON_GPU.values(), ids=ON_GPU)
def test_on_a_gpu_the_kernels_are_the_plain_operations(case: Case) -> None:
    compare_forward(case, "cuda")
    compare_gradients(case, "cuda")


@on_gpu
@pytest.mark.parametrize(
    "check", [twice_the_same, inputs_are_left, only_the_wanted, expanded_gradients]
)
def test_on_a_gpu_holds_what_holds_in_the_interpreter(
    check: Callable[[Case, str], None],
) -> None:
    check(LAYER, "cuda")


@on_gpu
def test_on_a_gpu_the_gradient_of_m_of_no_tokens_is_zero() -> None:
    no_tokens(Case(batch=0), "cuda")


@on_gpu
def test_on_a_gpu_decoding_reads_the_tensors_of_each_step() -> None:
    launched_again(LAYER._replace(positions=1, normalize=False), "cuda")


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here at most")
def test_kernels_run_on_the_gpu_that_holds_the_tensors() -> None:
    for case in (LAYER, LAYER._replace(positions=1)):
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            compare_forward(case, device)
        compare_gradients(case, "cuda:1")


@on_gpu
@pytest.mark.parametrize("positions", [1, 64])
def test_graph_captured_after_a_warm_up_reads_new_values(
    positions: int,
) -> None:
    case = LAYER._replace(positions=positions)
    output, query, M, _ = inputs(case, "cuda")
    call = (output, query, M, case.map(), case.precision())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        triton_read.forward(*call)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton_read.forward(*call)
    for x in (output, query, M):
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, triton_read.forward(*call))


@on_gpu
@pytest.mark.parametrize("normalize", [False, True])
def test_compiled_read_gives_the_same(normalize: bool) -> None:
    case = Case(heads=4, group=2, d=64, v=64, normalize=normalize)
    results = []
    for function in (read.add_read, torch.compile(read.add_read, fullgraph=True)):
        output, query, M, grad = inputs(case, "cuda")
        trained = [x.detach().requires_grad_() for x in (output, query, M)]
        found = function(trained[0], trained[1], Weights(trained[2]), case.map())
        found.backward(grad)
        results.append([found, *(x.grad for x in trained)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
