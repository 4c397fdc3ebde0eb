"""seed -> a random model over the catalogue's operators, with inputs and a configuration: the same ones every time.

A model is a list of steps over numbered values, each step an operator on earlier values whose shapes it fits. Values
are typed by their shape without the batch: ``[F]``, ``[T, F]`` (also a signal of T channels), ``[C, H, W]``. Any value
may be read again, returned, or never read at all; modules are reused where they fit.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpass import Config, PerTensor, PerToken, QuantizationSpec, presets
from qpass.observer import MinMaxObserver

BATCH = 4
VOCABULARY = 20


@dataclass(frozen=True)
class Step:
    """``values[own] = call(*values[inputs])``; ``module`` is the path of the module in it, "" where there is none."""

    name: str
    inputs: tuple[int, ...]
    call: Callable[..., Tensor]
    module: str = ""


class Model(nn.Module):
    """The steps in order; returns the values numbered in ``outputs``, bare when there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.outputs: tuple[int, ...] = ()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = list(inputs)
        for step in self.steps:
            values.append(step.call(*(values[i] for i in step.inputs)))
        results = tuple(values[i] for i in self.outputs)
        return results if len(results) > 1 else results[0]

    def live(self, inputs: int) -> set[int]:
        """The values that the outputs depend on."""
        needed = set(self.outputs)
        for own in range(inputs + len(self.steps) - 1, inputs - 1, -1):
            if own in needed:
                needed.update(self.steps[own - inputs].inputs)
        return needed


@dataclass(frozen=True)
class Case:
    """A generated model and all that a test needs besides it."""

    seed: int
    model: Model
    inputs: tuple[Tensor, ...]
    config: Config
    preset: str

    def batch(self, size: int, seed: int) -> tuple[Tensor, ...]:
        """Other inputs with a batch of ``size``."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(size, *x.shape[1:], generator=generator)
            if x.is_floating_point()
            else torch.randint(VOCABULARY, (size, *x.shape[1:]), generator=generator)
            for x in self.inputs
        )

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, {self.preset}, {self.config.overrides}"]
        lines += [f"  v{i}: input {list(x.shape)}" for i, x in enumerate(self.inputs)]
        for own, step in enumerate(self.model.steps, len(self.inputs)):
            module = f" ({step.module}: {self.model.get_submodule(step.module)})" if step.module else ""
            lines.append(f"  v{own} = {step.name}({', '.join(f'v{i}' for i in step.inputs)}){module}")
        return "\n".join([*lines, f"  return {', '.join(f'v{i}' for i in self.model.outputs)}"])


def generate(seed: int) -> Case:
    """The case of ``seed``."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        build = Builder(random.Random(seed))
        build.everything()
        model = build.model.eval()
        preset, config = build.config()
    return Case(seed, model, tuple(build.values[: build.number_of_inputs]), config, preset)


@dataclass
class Builder:
    """Grows a model step by step, computing every value as it goes, so that shapes need no rules of their own."""

    rng: random.Random
    model: Model = field(default_factory=Model)
    values: list[Tensor] = field(default_factory=list)
    number_of_inputs: int = 0

    def everything(self) -> None:
        """Inputs, steps, a linear head that no override touches, outputs."""
        for _ in range(self.rng.choice((1, 1, 2))):
            self.values.append(self._input())
        if self.rng.random() < 0.2:
            self.values.append(torch.randint(VOCABULARY, (BATCH, self.rng.randint(3, 6))))
        self.number_of_inputs = len(self.values)
        wanted = self.rng.randint(3, 9)
        while len(self.model.steps) < wanted:
            self._grow()
        head = self._pick(lambda x: x.is_floating_point() and x.shape[-1] <= 256)
        self.module_step("head", head, nn.Linear(self.values[head].shape[-1], self.rng.choice((5, 8))))
        last = len(self.values) - 1
        others = [i for i in range(self.number_of_inputs, last) if self.rng.random() < 0.12]
        self.model.outputs = (last, *others[:2])

    def _input(self) -> Tensor:
        size, rng = self.rng.choice, self.rng
        kind = rng.choice(("features", "sequence", "image", "image"))
        if kind == "features":
            return torch.randn(BATCH, size((8, 16, 24)))
        if kind == "sequence":
            return torch.randn(BATCH, rng.randint(3, 6), size((8, 16)))
        return torch.randn(BATCH, size((3, 4, 8)), rng.randint(6, 10), rng.randint(6, 10))

    def _grow(self) -> None:
        source = self._pick(lambda x: any(fits(x) for _, fits in OPERATORS))
        makers = [make for make, fits in OPERATORS if fits(self.values[source])]
        self.rng.choice(makers)(self, source)

    def _pick(self, fits: Callable[[Tensor], bool]) -> int:
        """A value that fits; later ones are likelier, so that models grow deep."""
        found = [i for i, value in enumerate(self.values) if fits(value)]
        return self.rng.choices(found, weights=[1 + 2 * place for place in range(len(found))])[0]

    def other(self, own: int) -> int:
        """A value of the same shape: itself, or another one where there is one."""
        shape = self.values[own].shape
        found = [i for i, value in enumerate(self.values) if value.shape == shape and value.is_floating_point()]
        return self.rng.choice(found)

    def step(self, name: str, inputs: tuple[int, ...] | int, call: Callable[..., Tensor], module: str = "") -> int:
        """Append a step; the number of its value."""
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self.model.steps.append(Step(name, inputs, call, module))
        self.values.append(call(*(self.values[i] for i in inputs)))
        return len(self.values) - 1

    def module_step(self, kind: str, source: int, module: nn.Module) -> int:
        """Append a step that calls a new module."""
        name = f"{kind}_{len(self.model.steps)}"
        self.model.add_module(name, module.eval())
        for parameter in module.parameters():
            parameter.mul_(1.5)  # the default initialisation lets the signal fade
        return self.step(kind, source, module, name)

    def reused(self, kind: type[nn.Module], fits: Callable[[nn.Module], bool]) -> tuple[str, nn.Module] | None:
        """A module of the model that fits, one time in four."""
        found = [(name, m) for name, m in self.model.named_children() if isinstance(m, kind) and fits(m)]
        return self.rng.choice(found) if found and self.rng.random() < 0.25 else None

    def config(self) -> tuple[str, Config]:
        """One of the configurations, half of the time with an override for a module that is there."""
        name = self.rng.choice(sorted(CONFIGS))
        config = CONFIGS[name]
        live = self.model.live(self.number_of_inputs)
        steps = [step for own, step in enumerate(self.model.steps, self.number_of_inputs) if own in live]
        paths = [s.module for s in steps if s.name in ("linear", "conv1d", "conv2d", "embedding") and s.module]
        if paths and self.rng.random() < 0.5:
            path = self.rng.choice(paths)
            if name.startswith("static") and self.rng.random() < 0.5:
                return name, config.override(module=path, activation=TOKENS)
            return name, config.keep_float(module=path)
        return name, config


# ---- configurations

TOKENS = QuantizationSpec(torch.int8, PerToken(), symmetric=True, dynamic=True)
_RANGE = QuantizationSpec(torch.uint8, PerTensor(), symmetric=False, observer=MinMaxObserver)
_SIGNED = QuantizationSpec(torch.int8, PerTensor(), symmetric=True, observer=MinMaxObserver)
_SEVEN_BITS = replace(_RANGE, quant_min=0, quant_max=127)

CONFIGS: dict[str, Config] = {
    "static": Config(activation=_RANGE, weight=presets.int8_static().weight, compute_dtype="auto"),
    "static, float32": Config(activation=_RANGE, weight=presets.int8_static().weight),
    "static, histogram": presets.int8_static(),
    "static, signed": Config(activation=_SIGNED, weight=presets.int8_static().weight),
    "static, 7 bits": Config(activation=_SEVEN_BITS, weight=presets.int8_static().weight),
    "dynamic, token": presets.int8_dynamic("token"),
    "dynamic, tensor": presets.int8_dynamic("tensor", compute_dtype=None),
    "weight only": presets.int8_weight_only(),
}


# ---- operators: how each extends a model at a value, and which values it fits


def linear(build: Builder, x: int) -> None:
    size = build.values[x].shape[-1]
    again = build.reused(nn.Linear, lambda m: m.in_features == size)  # type: ignore[attr-defined]
    if again is not None:
        build.step("linear", x, again[1], again[0])
        return
    build.module_step("linear", x, nn.Linear(size, build.rng.choice((8, 16, 24)), bias=build.rng.random() < 0.7))


def siblings(build: Builder, x: int) -> None:
    linear(build, x)
    linear(build, x)


def conv1d(build: Builder, x: int) -> None:
    channels = build.values[x].shape[1]
    kernel, groups = build.rng.choice((1, 3)), build.rng.choice((1, channels))
    outputs = channels if groups > 1 else build.rng.choice((4, 8))
    build.module_step("conv1d", x, nn.Conv1d(channels, outputs, kernel, padding=kernel // 2, groups=groups))


def conv2d(build: Builder, x: int) -> None:
    channels, rng = build.values[x].shape[1], build.rng
    again = build.reused(nn.Conv2d, lambda m: m.in_channels == channels and m.stride == (1, 1))  # type: ignore[attr-defined]
    if again is not None:
        y = build.step("conv2d", x, again[1], again[0])
    else:
        groups = rng.choice((1, 1, channels))
        kernel, stride = rng.choice((1, 3)), rng.choice((1, 1, 2))
        outputs = channels if groups > 1 else rng.choice((4, 8))
        module = nn.Conv2d(
            channels, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=rng.random() < 0.5,
            padding_mode="zeros",
        )  # fmt: skip
        y = build.module_step("conv2d", x, module)
    if rng.random() < 0.5:
        y = batch_norm(build, y)
    if rng.random() < 0.6:
        activation(build, y)


def residual(build: Builder, x: int) -> None:
    """``relu(x + conv(x))``: the block that residual networks are made of."""
    channels = build.values[x].shape[1]
    y = build.module_step("conv2d", x, nn.Conv2d(channels, channels, 3, padding=1, bias=False))
    y = batch_norm(build, y)
    y = build.step("add", (x, y) if build.rng.random() < 0.5 else (y, x), torch.add)
    if build.rng.random() < 0.7:
        build.step("relu", y, torch.relu)


def batch_norm(build: Builder, x: int) -> int:
    channels = build.values[x].shape[1]
    module = nn.BatchNorm2d(channels) if build.values[x].dim() == 4 else nn.BatchNorm1d(channels)
    nn.init.uniform_(module.weight, 0.4, 1.0)
    nn.init.normal_(module.bias, std=0.3)
    assert module.running_mean is not None
    assert module.running_var is not None
    module.running_mean.normal_(std=0.3)
    module.running_var.uniform_(0.5, 2.0)
    return build.module_step("batch_norm", x, module)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "hardswish": F.hardswish, "relu6": F.relu6,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "sigmoid": torch.sigmoid, "tanh": torch.tanh,
}  # fmt: skip


def activation(build: Builder, x: int) -> None:
    name = build.rng.choice(sorted(ACTIVATIONS))
    build.step(name, x, ACTIVATIONS[name])


def relu_in_place(build: Builder, x: int) -> None:
    """In place on a fresh value, which therefore changes for all its other readers, too."""
    build.step("relu_", build.step("mul_scalar", x, lambda v: v * 0.5), torch.relu_)


def add(build: Builder, x: int) -> None:
    build.step("add", (x, build.other(x)), torch.add)


def mul(build: Builder, x: int) -> None:
    build.step("mul", (x, build.other(x)), torch.mul)


def add_parameter(build: Builder, x: int) -> None:
    owner = nn.ParameterDict({"p": nn.Parameter(0.3 * torch.randn(build.values[x].shape[1:]))})
    name = f"shift_{len(build.model.steps)}"
    build.model.add_module(name, owner)
    build.step("add_parameter", x, lambda v: v + owner["p"])


def matmul_weight(build: Builder, x: int) -> None:
    size = build.values[x].shape[-1]
    owner = nn.ParameterDict({"p": nn.Parameter(torch.randn(size, 8) / size**0.5)})
    build.model.add_module(f"matrix_{len(build.model.steps)}", owner)
    if build.rng.random() < 0.5 and build.values[x].dim() == 2:
        owner["b"] = nn.Parameter(torch.randn(8))
        build.step("addmm", x, lambda v: torch.addmm(owner["b"], v, owner["p"]))
    else:
        build.step("matmul", x, lambda v: v @ owner["p"])


def scores(build: Builder, x: int) -> None:
    scale = build.values[x].shape[-1] ** -0.5
    build.step("scores", (x, build.other(x)), lambda a, b: torch.softmax(a @ b.transpose(-1, -2) * scale, -1))


def embedding(build: Builder, x: int) -> None:
    build.module_step("embedding", x, nn.Embedding(VOCABULARY, build.rng.choice((8, 16))))


def layer_norm(build: Builder, x: int) -> None:
    build.module_step("layer_norm", x, nn.LayerNorm(build.values[x].shape[-1]))


def attention(build: Builder, x: int) -> None:
    """Multi-head attention over ``[T, F]``, its three projections siblings."""
    size = build.values[x].shape[-1]
    q, k, v = (build.module_step("linear", x, nn.Linear(size, 16)) for _ in range(3))
    causal = build.rng.random() < 0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).flatten(2)

    build.step("attention", (q, k, v), attend)


def pool2d(build: Builder, x: int) -> None:
    name, call = build.rng.choice(
        [
            ("max_pool2d", lambda v: F.max_pool2d(v, 3, 2, 1)),
            ("max_pool2d", lambda v: F.max_pool2d(v, 2, 1)),
            ("avg_pool2d", lambda v: F.avg_pool2d(v, 2)),
            ("adaptive_avg_pool2d", lambda v: F.adaptive_avg_pool2d(v, 1)),
            ("adaptive_avg_pool2d", lambda v: F.adaptive_avg_pool2d(v, (2, 3))),
            ("mean", lambda v: v.mean((2, 3))),
        ]
    )
    build.step(name, x, call)


def pool1d(build: Builder, x: int) -> None:
    if build.rng.random() < 0.5:
        build.step("max_pool1d", x, lambda v: F.max_pool1d(v, 2))
    else:
        build.step("adaptive_avg_pool1d", x, lambda v: F.adaptive_avg_pool1d(v, 2))


def cat(build: Builder, x: int) -> None:
    dim = build.rng.choice((1, -1))
    count = build.rng.choice((1, 1, 2))
    build.step("cat", (x, *(build.other(x) for _ in range(count))), lambda *vs: torch.cat(vs, dim))  # type: ignore[arg-type]


def view(build: Builder, x: int) -> None:
    calls: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("unsqueeze", lambda v: v.unsqueeze(1).squeeze(1)),
        ("slice", lambda v: v[..., 1:]),
        ("contiguous", lambda v: v.contiguous()),
    ]
    if build.values[x].dim() > 2:
        calls += [
            ("transpose", lambda v: v.transpose(1, -1)),
            ("flatten", lambda v: v.flatten(1)),
            ("reshape", lambda v: v.reshape(v.shape[0], v.shape[2], -1)),
            ("select", lambda v: v[:, 0]),
            ("chunk", lambda v: v.chunk(2, -1)[0]),
            ("fold", lambda v: v.reshape(-1, v.shape[-1]).view(v.shape)),
        ]
    if build.values[x].dim() == 4:
        calls += 3 * [("permute", lambda v: v.permute(0, 2, 3, 1))]
    name, call = build.rng.choice(calls)
    build.step(name, x, call)


def real(*dims: int, largest: int = 512) -> Callable[[Tensor], bool]:
    """Whether a value is of floating dtype, has one of these ranks (batch included), and is not too wide or narrow."""
    return lambda x: x.is_floating_point() and x.dim() in dims and all(2 <= s <= largest for s in x.shape[1:])


OPERATORS: tuple[tuple[Callable[[Builder, int], object], Callable[[Tensor], bool]], ...] = (
    (linear, real(2, 3, 4)), (linear, real(2, 3)), (siblings, real(2, 3)), (conv1d, real(3, largest=16)),
    (conv2d, real(4, largest=24)), (conv2d, real(4, largest=24)), (conv2d, real(4, largest=24)),
    (residual, real(4, largest=24)), (residual, real(4, largest=24)), (batch_norm, real(2, 3, 4)),
    (activation, real(2, 3, 4)), (relu_in_place, real(2, 3, 4)), (add, real(2, 3, 4)), (add, real(4)),
    (mul, real(2, 3, 4)), (add_parameter, real(2, 3)), (matmul_weight, real(2, 3)), (scores, real(3)),
    (embedding, lambda x: not x.is_floating_point()), (layer_norm, real(2, 3)), (attention, real(3)),
    (attention, real(3)), (pool2d, real(4)), (pool2d, real(4)), (pool1d, real(3)), (cat, real(2, 3, 4, largest=32)),
    (view, real(2, 3, 4)), (view, real(2, 3, 4)),
)  # fmt: skip
"""An operator that stands here twice is drawn twice as often."""
