"""The lucid-shaped names: `Tensor`, `randn`, dtypes, `manual_seed`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lucid

NAMES = {
    "Int8": "int8", "Int16": "int16", "Int32": "int32", "Int64": "int64",
    "Float16": "float16", "Float32": "float32", "Float64": "float64",
    "BFloat16": "bfloat16", "Bool": "bool",
}  # fmt: skip


def aligned(shape, fill=1.0):
    """A float32 NumPy array at a 64-byte boundary, which JAX on CPU can take over without a copy."""
    size = int(np.prod(shape))
    room = np.empty(size + 16, np.float32)
    start = (-room.ctypes.data % 64) // 4
    array = room[start : start + size].reshape(shape)
    array[...] = fill
    return array


class OnlyArray:
    """Has `__array__` and nothing else."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self._array, dtype)


class OnlyDLPack:
    """Has `__dlpack__` (and the device query that belongs to it) and nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_name_makes_a_tensor_of_that_dtype(name):
    """64-bit dtypes become 32-bit without a warning (warnings are errors here)."""
    dtype = getattr(lucid, name)
    assert jnp.dtype(dtype).name == NAMES[name]
    x = lucid.Tensor([0, 1], dtype=dtype)
    assert x.dtype == jax.dtypes.canonicalize_dtype(dtype)
    assert x.tolist() == [0, 1]
    assert (name in lucid.__all__) == (name != "Int8")  # codecs.Int8 is what people should see


def test_tensor_is_a_jax_array():
    """There is no class of its own behind the name."""
    x = lucid.Tensor([[1.0, 2.0]])
    assert type(x) is type(jnp.ones(1))
    assert isinstance(x, lucid.Tensor)
    assert isinstance(jnp.ones(3), lucid.Tensor)
    assert not isinstance(np.ones(3), lucid.Tensor)
    assert not isinstance([1.0], lucid.Tensor)


def test_a_tracer_is_a_tensor():
    """`isinstance` says the same inside jit."""
    assert jax.jit(lambda x: jnp.asarray(isinstance(x, lucid.Tensor)))(jnp.ones(1)).item()


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        ([3, 1, 0], "int32"),
        ([0.5], "float32"),
        ([True], "bool"),
        (7, "int32"),
        (np.arange(3), "int32"),
        (np.ones(2), "float32"),
        (np.ones(2, np.float16), "float16"),
        (OnlyArray(np.ones(2, np.float32)), "float32"),
        (OnlyDLPack(np.ones(2, np.float32)), "float32"),
        (jnp.ones(2, jnp.bfloat16), "bfloat16"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_tensor_takes_anything_array_like(data, dtype):
    """Without dtype= the data's own is kept, 64-bit ones narrowed."""
    x = lucid.Tensor(data)
    assert isinstance(x, jax.Array)
    assert x.dtype == dtype


def test_tensor_converts_a_dtype():
    """dtype= casts, from NumPy and from JAX arrays."""
    assert lucid.Tensor(np.array([1.75]), dtype=lucid.Int64).tolist() == [1]
    assert lucid.Tensor(jnp.array([2]), dtype=lucid.BFloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("wrap", [lambda x: x, OnlyDLPack], ids=["numpy", "dlpack"])
def test_a_tensor_does_not_follow_the_array_it_was_made_from(wrap):
    """A jax.Array is immutable; sharing memory with a mutable array would break that."""
    for _ in range(5):
        source = aligned((64, 64))
        x = lucid.Tensor(wrap(source))
        source[...] = 7.0
        assert float(x.max()) == 1.0


def test_randn_is_standard_normal_float32():
    """Shape as given, mean 0, deviation 1."""
    x = lucid.randn(100, 100)
    assert (x.shape, x.dtype, isinstance(x, jax.Array)) == ((100, 100), jnp.float32, True)
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.std()) - 1) < 0.05
    assert lucid.randn().shape == ()
    assert lucid.randn(2, 0, 3).shape == (2, 0, 3)


def test_manual_seed_repeats_the_numbers():
    """The same seed the same numbers, another seed others, and the stream moves on."""
    lucid.manual_seed(7)
    first, second = lucid.randn(4), lucid.randn(4)
    lucid.manual_seed(7)
    assert (lucid.randn(4) == first).all()
    assert (lucid.randn(4) == second).all()
    assert not (first == second).any()
    lucid.manual_seed(8)
    assert not (lucid.randn(4) == first).any()


def test_randn_compiles_nothing_per_shape(compilations):
    """Drawn on the host: a notebook that asks for many shapes does not wait for XLA."""
    before = compilations()
    for n in range(1, 6):
        lucid.randn(n, 3, n + 1)
    assert compilations() == before


def test_tensor_compiles_nothing_per_shape(compilations):
    """Bringing an array to the device is a transfer, not a program."""
    before = compilations()
    for n in range(1, 6):
        lucid.Tensor(np.ones((n, 5, n + 2), np.float32))
    assert compilations() == before
