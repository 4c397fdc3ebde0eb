"""What a codec promises: its bound, its bits, its noise, and what becomes of values that are no numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qpass import comm
from qpass.comm.wire import compiled_kernels as wire_compiled
from qpass.comm.wire.codec import NAMES, Codec
from qpass.comm.wire.format import WireFormat, parse
from qpass.errors import ConfigError, InputError

FORMS = [
    *(str(codec) for codec in dict.fromkeys(NAMES.values())), "int8:512:fp32:stochastic", "int8:100:bf16",
    "int6:32:bf16:stochastic", "int6:64:e8m0:stochastic", "int4:128:bf16", "int4:5:fp32", "int4:32:bf16:hadamard",
    "int8:128:bf16:hadamard", "int8:256:fp32:hadamard:stochastic", "fp8_e4m3:64:fp32",
]  # fmt: skip
BLOCKED = [form for form in FORMS if not parse(form).is_cast]


def there_and_back(codec: Codec, x: Tensor, seed: int = 0) -> Tensor:
    return codec.decode(codec.encode(x, seed), x.numel()).view(x.shape)


def gradients(activation: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Parameter -> its gradient, for a transformer of two layers after one step on random tokens."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(128, 4, 512, 0.0, activation, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = torch.nn.Sequential(torch.nn.Embedding(64, 128), encoder, torch.nn.Linear(128, 64))
    tokens = torch.randint(64, (16, 33))
    torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: parameter.grad.flatten() for name, parameter in model.named_parameters()}


def samples() -> dict[str, Tensor]:
    normal = torch.randn(1 << 18)
    # Four times as many: tails as heavy as these are most of the noise, and few values are most of the tails.
    student = torch.randn(1 << 20) / torch.randn(3, 1 << 20).square().mean(0).sqrt()
    outliers = torch.randn(32, 16384)
    outliers[:, torch.randperm(16384)[:164]] *= 40
    return {
        "normal": normal,
        "student_t3": student,
        "outliers": outliers.flatten(),
        "gradients": torch.cat(list(gradients(torch.tanh).values())),
    }


# Noise: 10 log10(sum (decoded - x)^2 / sum x^2), dB. The columns are `samples`.
NMSE = {
    "int8": (-43.7, -37.1, -32.7, -43.9),
    "int8:128:bf16:hadamard": (-43.7, -44.3, -48.3, -43.8),
    "mxint8": (-41.6, -37.9, -35.0, -42.2),
    "mxfp8": (-31.5, -31.7, -31.5, -31.6),
    "int4": (-20.2, -16.8, -19.5, -20.4),
    "int4:32:bf16:hadamard": (-20.2, -20.7, -23.8, -20.2),
}


def test_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_compiled, "COMPILE_FROM", math.inf)  # the same bits (test_kernels), without the compiler
    found = {name: tuple(noise(comm.codec(name), x) for x in samples().values()) for name in NMSE}
    for name, expected in NMSE.items():
        print(f"{name:24s}", *(f"{value:7.2f}" for value in found[name]))
        # Half a dB is what samples differ by; a scale rounded the wrong way costs 0.9, a lost bit 6.
        assert found[name] == pytest.approx(expected, abs=0.5), name


@pytest.mark.parametrize(("name", "usual"), [("int8:128:bf16:hadamard", -43.8), ("int4:32:bf16:hadamard", -20.2)])
def test_a_rotation_costs_gradients_of_one_sign(monkeypatch: pytest.MonkeyPatch, name: str, usual: float) -> None:
    """Weights behind a ReLU see values of one sign, so a row of their gradient has one, too.

    A rotation gathers what 128 elements have in common in one of them. It is the input that makes the noise: all other
    gradients have the usual one, and so have these once every element's sign is drawn at random.
    """
    monkeypatch.setattr(wire_compiled, "COMPILE_FROM", math.inf)
    codec, found = comm.codec(name), gradients(torch.relu)
    for parameter, gradient in found.items():
        if parameter.endswith("linear2.weight"):
            assert noise(codec, gradient) > usual + 3, parameter
            assert noise(codec, gradient * torch.randn(len(gradient)).sign()) == pytest.approx(usual, abs=0.5)
        elif parameter.endswith("weight") and len(gradient) > 1000:
            assert noise(codec, gradient) == pytest.approx(usual, abs=0.5), parameter


def noise(codec: Codec, x: Tensor) -> float:
    error = there_and_back(codec, x).double() - x.double()
    return 10 * math.log10(error.square().sum().item() / x.double().square().sum().item())


@pytest.mark.parametrize("form", FORMS)
def test_no_element_is_further_off_than_the_bound(form: str) -> None:
    codec = comm.codec(form)
    tight = 0.0
    for x in (torch.randn(5000), torch.randn(4001).exp() * torch.randn(4001).sign(), 1e-30 * torch.randn(700)):
        error, bound = (there_and_back(codec, x).double() - x.double()).abs(), codec.error_bound(x)
        assert (error <= bound).all(), (error / bound).max()
        tight = max(tight, (error / bound).max().item())
    if codec.format == "fp32":
        assert tight == 0
    else:  # a bound that nothing comes near bounds nothing; errors of a rotation rarely add up
        assert tight > (0.1 if codec.hadamard else 0.4)


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        ("int8", 8.125), ("int6", 6.125), ("int4", 4.5), ("mxint8", 8.25), ("fp8_e4m3", 8.125), ("bf16", 16),
        ("int8:512:fp32", 8.0625), ("int4:128:bf16", 4.125),
    ],
)  # fmt: skip
def test_bits_on_the_wire(form: str, bits: float) -> None:
    codec = comm.codec(form)
    assert codec.bits_per_element == bits
    assert codec.payload_bytes(128 * 512) == 128 * 512 * bits / 8
    assert codec.payload_bytes(0) == 0
    assert codec.encode(torch.randn(10_001)).numel() == codec.payload_bytes(10_001)
    assert f"{bits:.4g} bits" in codec.describe()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_shape_and_strides(form: str, dtype: torch.dtype) -> None:
    codec = comm.codec(form)
    x = torch.randn(30, 7, 11, dtype=dtype)
    turned = x.transpose(0, 2)
    assert torch.equal(codec.encode(turned, 3), codec.encode(turned.contiguous(), 3))
    values = codec.decode(codec.encode(x, 3), x.numel(), dtype)
    assert values.dtype == dtype
    assert torch.equal(values, codec.decode(codec.encode(x, 3), x.numel()).to(dtype))
    empty = codec.encode(torch.empty(0, 5, dtype=dtype))
    assert empty.shape == (0,)
    assert codec.decode(empty, 0, dtype).shape == (0,)
    assert torch.equal(codec.encode(x[0, 0, 0]), codec.encode(x[0, 0, :1]))  # no dimension at all


@pytest.mark.parametrize("form", BLOCKED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_loses_its_block_and_no_other(form: str, bad: float) -> None:
    codec = comm.codec(form)
    span = max(codec.block, 128) if codec.hadamard else codec.block  # a rotation mixes 128
    x = torch.randn(10 * span + 3)
    x[3 * span + 1] = bad
    x[-1] = bad
    values = there_and_back(codec, x)
    lost = torch.zeros(len(x), dtype=torch.bool)
    lost[3 * span : 4 * span] = True
    lost[10 * span :] = True
    assert torch.equal(values.isnan(), lost)
    assert not values.isinf().any()
    clean = torch.where(lost, 0, x)
    assert torch.equal(values[~lost], there_and_back(codec, clean)[~lost])
    assert torch.equal(codec.error_bound(x).isnan(), lost)


@pytest.mark.parametrize("form", BLOCKED)
def test_small_values_keep_their_digits(form: str) -> None:
    """No epsilon: down to 1e-30, values are rounded like those near 1, by powers of two exactly so."""
    codec = comm.codec(form)
    x = torch.randn(1000)
    if codec.format == "int8" and not codec.stochastic:
        tiny = 1e-10 * x
        assert (there_and_back(codec, tiny) - tiny).norm() <= 0.01 * tiny.norm()
    power = 2.0**-100
    assert torch.equal(there_and_back(codec, power * x), power * there_and_back(codec, x))
    zeros = there_and_back(codec, torch.zeros(300))
    assert torch.equal(zeros, torch.zeros(300))


@pytest.mark.parametrize("form", BLOCKED)
def test_padding_neither_changes_a_scale_nor_carries_memory(form: str) -> None:
    codec = comm.codec(form)
    x = torch.randn(5 * codec.row + 1)
    whole = torch.zeros(6 * codec.row)
    whole[: len(x)] = x
    assert torch.equal(codec.encode(x, 1), codec.encode(whole, 1))


def test_stochastic_rounding_is_right_on_average() -> None:
    codec = comm.codec("int4", stochastic=True)
    x = torch.linspace(-1, 1, 256)
    draws = torch.stack([there_and_back(codec, x, seed) for seed in range(1000)]).double()
    step = 1.0 / 7 * (1 + 2.0**-7)  # of the blocks whose largest value is 1, the largest of all
    off = (draws.mean(0) - x.double()).abs()
    # A draw lies within one step, so its deviation is at most half of one; six deviations of the mean of 1000.
    assert (off < 6 * 0.5 * step / 1000**0.5).all()
    nearest = (there_and_back(comm.codec("int4"), x).double() - x.double()).abs()
    assert off.mean() < 0.1 * nearest.mean()
    assert torch.equal(there_and_back(codec, x, 5), there_and_back(codec, x, 5))
    assert not torch.equal(there_and_back(codec, x, 5), there_and_back(codec, x, 6))


def test_random_numbers_are_uniform_and_unrelated() -> None:
    from qpass.comm.wire.kernels import uniform

    index = torch.arange(1 << 16)
    u = torch.stack([uniform(index + shift, torch.tensor(seed)) for seed, shift in ((0, 0), (1, 0), (0, 1 << 33))])
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.stack([torch.histc(row, 64, 0, 1) for row in u])
    chi_square = ((counts - 1024) ** 2 / 1024).sum(1)
    assert (chi_square < 63 + 6 * (2 * 63) ** 0.5).all()  # mean 63, deviation sqrt(126): six deviations
    centred = u.double() - 0.5
    lags = [(row[:-lag] * row[lag:]).mean() * 12 for row in centred for lag in (1, 2, 32, 128)]
    pairs = [(centred[a] * centred[b]).mean() * 12 for a, b in ((0, 1), (0, 2), (1, 2))]
    assert max(abs(value) for value in lags + pairs) < 6 / (1 << 16) ** 0.5  # correlations; deviation 1 / sqrt(n)


def test_names() -> None:
    assert comm.codec("int8") == Codec("int8")
    assert comm.codec("int4").block == 32
    assert comm.codec("int8", hadamard=True, block=256) == comm.codec("int8:256:bf16:hadamard")
    assert comm.codec(comm.codec("mxint8")) == Codec("int8", block=32, scale="e8m0")
    assert comm.codec("bfp16") == comm.codec("bf16")  # torch's DQuantType.BFP16 is bfloat16
    assert all(parse(form) == WireFormat(*vars(comm.codec(form)).values()) for form in FORMS)
    assert [str(comm.codec(form)) for form in FORMS] == FORMS


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("int7", {}, ConfigError, "did you mean 'int"),
        ("INT8", {}, ConfigError, "did you mean 'int8'"),
        ("int8:128:bf17", {}, ConfigError, "did you mean 'bf16'"),
        ("int8", {"hadamar": True}, ConfigError, "did you mean 'hadamard'"),
        ("int8", {"scale": "e8m1"}, ConfigError, "did you mean 'e8m0'"),
        ("int8", {"block": 0}, ConfigError, "positive number of elements, not 0"),
        ("int8", {"block": 100, "hadamard": True}, ConfigError, "do not fit blocks of 100"),
        ("bf16", {"stochastic": True}, ConfigError, "bf16 is a cast"),
        ("fp8_e4m3", {"stochastic": True}, ConfigError, "no stochastic rounding"),
        (8, {}, InputError, "not int"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest_right_one(
    name: str, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        comm.codec(name, **options)
