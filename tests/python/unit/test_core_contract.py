"""The compiled module is what its stub says, and no argument makes it panic."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import icecache
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from icecache import _core

STUB = Path(icecache.__file__).with_name("_core.pyi")
#: Classes that only the core makes.
NOT_CONSTRUCTIBLE = {"Mailbox", "Selection"}
POOL = _core.Pool(1)


def stub_parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return [name for name in names if name not in ("self", "cls")]


def stub_tree() -> dict[str, ast.stmt]:
    tree = ast.parse(STUB.read_text())
    return {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def members(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


def test_stub_and_module_have_the_same_names():
    public = {name for name in dir(_core) if not name.startswith("_")}
    assert public == set(stub_tree())


@pytest.mark.parametrize("name", sorted(stub_tree()))
def test_stub_and_module_agree_on_members_and_parameters(name):
    node, value = stub_tree()[name], getattr(_core, name)
    if isinstance(node, ast.FunctionDef):
        assert list(inspect.signature(value).parameters) == stub_parameters(node)
        return
    stubbed = members(node)
    actual = {member for member in vars(value) if not member.startswith("_")}
    assert {member for member in stubbed if not member.startswith("_")} == actual
    for member, function in stubbed.items():
        if any(isinstance(d, ast.Name) and d.id == "property" for d in function.decorator_list):
            assert inspect.isgetsetdescriptor(vars(value)[member]), member
        elif member == "__init__":
            assert name not in NOT_CONSTRUCTIBLE
            assert list(inspect.signature(value).parameters) == stub_parameters(function)
        elif not member.startswith("__"):
            parameters = [p for p in inspect.signature(getattr(value, member)).parameters if p != "self"]
            assert parameters == stub_parameters(function), member


def test_every_stubbed_name_has_a_docstring():
    for name, node in stub_tree().items():
        assert ast.get_docstring(node), name
        assert getattr(_core, name).__doc__, name


def a_forest(heads: int = 2, n: int = 40, dim: int = 8):
    store = _core.PageStore(dim, dim, "float32")
    forest = _core.Forest(store, heads)
    rows = np.random.default_rng(0).standard_normal((heads, n, dim), dtype=np.float32).view(np.uint8)
    _core.extend(POOL, [forest], [rows], [rows])
    return forest


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.sampled_from([[], {}, object(), 1j, np.float32(2), np.int64(-1)]),
)
odd_arrays = st.builds(
    lambda shape, dtype, order, step: np.zeros(shape, dtype, order)[..., ::step],
    st.lists(st.integers(0, 9), min_size=0, max_size=5).map(tuple).filter(bool),
    st.sampled_from(["uint8", "int64", "float32", "float64", "bool", "complex64", "S3", "O"]),
    st.sampled_from("CF"),
    st.sampled_from([1, 2, -1]),
)
anything = st.one_of(odd, odd_arrays, st.lists(odd_arrays, max_size=3))
CALLS = {
    "Pool": lambda a, _b, _c: _core.Pool(a),
    "PageStore": lambda a, b, c: _core.PageStore(a, b, c),
    "PageStore sizes": lambda a, b, _c: _core.PageStore(8, b, "float32", limit_bytes=a),
    "Forest": lambda a, b, _c: _core.Forest(a, b),
    "Forest heads": lambda a, _b, _c: _core.Forest(_core.PageStore(8, 8, "float32"), a),
    "extend": lambda a, b, _c: _core.extend(POOL, [a_forest()], [a], [b]),
    "extend lists": lambda a, b, c: _core.extend(POOL, a, b, c),
    "search": lambda a, _b, _c: _core.search(POOL, [a_forest()], a, 2, scaling=1.0),
    "search options": lambda a, b, c: _core.search(
        POOL, [a_forest()], np.zeros((1, 2, 1, 8), np.float32), a, scaling=b, softcap=c
    ),
    "search more options": lambda a, b, c: _core.search(
        POOL,
        [a_forest()],
        np.zeros((1, 2, 1, 8), np.float32),
        2,
        scaling=1.0,
        candidates=a,
        probe_mass=b,
        exact=c,
    ),
    "select_pages": lambda a, _b, _c: _core.select_pages([a_forest()], a),
    "random_pages": lambda a, b, _c: _core.random_pages([a_forest()], a, b),
    "all_pages": lambda a, _b, _c: _core.all_pages(a),
    "crop": lambda a, _b, _c: a_forest().crop(a),
    "read": lambda a, b, c: a_forest().read(a, b, c, c),
    "read arrays": lambda a, b, _c: a_forest().read(0, 4, a, b),
    "read columns": lambda a, b, c: a_forest().read(0, 4, a, b, c, c),
    "gather columns": lambda a, b, c: _core.all_pages([a_forest()]).gather(POOL, 0, 1, a, b, c, c),
    "gather": lambda a, b, _c: _core.all_pages([a_forest()]).gather(POOL, 0, 1, a, b),
    "gather range": lambda a, b, _c: _core.all_pages([a_forest()]).gather(
        POOL, a, b, np.zeros((1, 2, 1, 16, 32), np.uint8), np.zeros((1, 2, 1, 16, 32), np.uint8)
    ),
    "VectorIndex": lambda a, b, c: _core.VectorIndex(a, b, c),
    "VectorIndex.add": lambda a, b, _c: _core.VectorIndex(8, "ip", "float32").add(POOL, a, b, "error"),
    "VectorIndex.search": lambda a, b, c: _core.VectorIndex(8, "ip", "float32").search(None, a, b, c),
    "VectorIndex.remove": lambda a, b, _c: _core.VectorIndex(8, "ip", "float32").remove(POOL, a, b),
    "VectorIndex.get": lambda a, _b, _c: _core.VectorIndex(8, "ip", "float32").get(a),
    "VectorIndex.from_bytes": lambda a, _b, _c: _core.VectorIndex.from_bytes(POOL, a),
}
EXPECTED = (TypeError, ValueError, OverflowError, MemoryError, KeyError)


@pytest.mark.parametrize("name", CALLS)
def test_odd_arguments_give_ordinary_errors(name):
    @settings(max_examples=60)
    @given(anything, anything, anything)
    def check(a, b, c):
        if name == "Pool" and isinstance(a, int) and a > 64:
            return  # a legal wish for very many threads; not one to grant in a test
        try:
            CALLS[name](a, b, c)
        except EXPECTED:
            pass
        except BaseException as error:  # PanicException is a BaseException that `except Exception` misses
            pytest.fail(f"{type(error).__name__}: {error}")

    check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: np.asfortranarray(rows), "contiguous"),
        (lambda rows: rows[:, ::2], "contiguous"),
        (lambda rows: rows.view(np.int8), "uint8"),
        (lambda rows: rows[0], "shape"),
        (lambda rows: np.ascontiguousarray(rows[..., :16]), "shape"),
        (lambda rows: np.concatenate([rows, rows]), "shape"),
        (lambda rows: rows.tolist(), "array"),
    ],
)
def test_a_wrong_key_array_is_refused_by_name(change, message):
    forest = a_forest()
    rows = np.random.default_rng(1).standard_normal((2, 6, 8), dtype=np.float32).view(np.uint8)
    with pytest.raises((TypeError, ValueError), match=rf"keys\[0\].*{message}"):
        _core.extend(POOL, [forest], [change(rows)], [rows])
    assert len(forest) == 40


def test_an_output_that_cannot_be_written_is_refused():
    forest = a_forest()
    out = np.zeros((2, 4, 32), np.uint8)
    frozen = out.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"out_values.*(read-only|writ)"):
        forest.read(0, 4, out, frozen)
    with pytest.raises(ValueError, match="out_values"):
        forest.read(0, 4, out, out)  # both outputs in the same memory
    with pytest.raises(ValueError, match="out_keys"):
        forest.read(0, 5, out, out.copy())


def test_unaligned_bytes_are_read_as_they_are():
    base = np.random.default_rng(1).standard_normal((2, 6, 8), dtype=np.float32).view(np.uint8)
    shifted = np.zeros(base.size + 1, np.uint8)[1:].reshape(base.shape)
    shifted[:] = base
    store = _core.PageStore(8, 8, "float32")
    forests = [_core.Forest(store, 2), _core.Forest(store, 2)]
    _core.extend(POOL, forests, [base, shifted], [base, shifted])
    assert forests[0].digest() == forests[1].digest()


def test_the_instruction_set_has_a_name():
    assert _core.simd() in ("scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "neon")
