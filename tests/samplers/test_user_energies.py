"""Energies as users write them: functions of every kind, with models behind them, under whatever state torch is in."""

import functools
import gc
import math
import sys
import types
import warnings
import weakref

import pytest
import torch
from torch import nn

from fastanila import HMC, MALA, AdjustedAniLA, AniLA, GradientDescent, Langevin, calibrate
from fastanila import graphs as graphs_
from fastanila.models import callables
from fastanila.models.score import evaluator, sampling
from fastanila.samplers import chain, stepwise
from fastanila.samplers import kept as kept_samplers

WRONG = "energy must be differentiable in z, but its value does not depend on z"
SAMPLERS = [AniLA(0.5, 0.1), Langevin(0.1), MALA(0.1), AdjustedAniLA(0.5, 0.1), HMC(0.1, 2), GradientDescent(0.1)]


def start(chains=64, dim=2):
    return torch.randn(chains, dim, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------- the batch that is given


def labelled(chains=64):
    labels, table = torch.arange(chains) % 3, torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    return lambda x: (x - table[labels]).square().sum(1)


def tempered(chains=64):
    temperatures = torch.linspace(1, 2, chains)
    return lambda x: x.square().sum(1) / temperatures


class Labelled(nn.Module):
    def __init__(self, chains=64):
        super().__init__()
        self.labels, self.table = torch.arange(chains) % 3, nn.Embedding(3, 2)

    def forward(self, x):
        return (x - self.table(self.labels)).square().sum(1)


class Squeezing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x).squeeze()  # (B,) of many chains, and of one a scalar


@pytest.mark.parametrize(
    "sampler, make",
    [
        *((AniLA(0.5, 0.1), make) for make in (tempered, Labelled, Squeezing)),
        (MALA(0.1), labelled),
        (HMC(0.1, 2), labelled),
    ],
)
def test_an_energy_is_called_with_the_chains_that_are_given_and_no_others(make, sampler, graphs):
    energy, seen = make(), []

    def watched(x):
        seen.append(x.shape)
        return energy(x)

    z = sampler.run(watched, start(), steps=2, seed=0)
    torch.testing.assert_close(z, sampler.run(energy, start(), steps=2, seed=0, compile=False))
    calibrate(watched, start())
    if sampler.is_exact:
        sampler.adapt(watched, start(), steps=2, seed=0, compile=False)
    assert graphs and set(seen) == {(64, 2)}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "energy, error, message",
    [
        (lambda x: x.detach().sum(1), ValueError, WRONG),
        (lambda x: torch.zeros(len(x)), ValueError, WRONG),
        (lambda x: nn.Parameter(torch.ones(len(x))).exp(), ValueError, WRONG),
        (lambda x: x.sum(1).long(), ValueError, WRONG),
        (lambda x: x.sum(), ValueError, r"energy must map \(B, ...\) to \(B,\) = \(64,\), got \(\)"),
        (lambda x: x[:1].sum(1), ValueError, r"= \(64,\), got \(1,\)"),
        (lambda x: 1.0, TypeError, r"energy must map \(B, ...\) to a tensor \(B,\), got float"),
        (lambda x: None, TypeError, "got NoneType"),
        (lambda x: x @ torch.ones(3), RuntimeError, "size mismatch"),
    ],
)
def test_what_is_wrong_with_an_energy_is_said_and_nothing_else(energy, error, message, compile, graphs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # and is no reason to run it eagerly
            with pytest.raises(error, match=message):
                AniLA().run(energy, start(), steps=2, seed=0, compile=compile)
    assert kept_samplers.kept_of(energy).refusal is None


# -------------------------------------------------------------------------------------- arguments, ahead of compiling


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(z=start().double()), TypeError, "z must be float32, bfloat16 or float16, got torch.float64"),
        (dict(z=start().long()), TypeError, "z must be float32, bfloat16 or float16, got torch.int64"),
        (dict(z=start() > 0), TypeError, "z must be float32, bfloat16 or float16, got torch.bool"),
        (dict(z=torch.tensor(1.0)), ValueError, "z must have a dimension of chains, .* got a 0-dim tensor"),
        (dict(z=torch.eye(2).to_sparse()), TypeError, "z must be a dense tensor, got one of layout torch.sparse_coo"),
        (dict(z=[[1.0, 2.0]]), TypeError, "z must be a tensor, got list"),
        (dict(mask=torch.ones(2)), TypeError, "mask must be a bool tensor, got torch.float32"),
        (dict(mask=torch.ones(3) > 0), ValueError, r"mask must broadcast to z's shape \(64, 2\), got \(3,\)"),
        (dict(mask=[True, False]), TypeError, "mask must be a tensor, got list"),
        (dict(energy=1.0), TypeError, "energy must be a callable, got float"),
        (dict(callback=1), TypeError, "callback must be a callable, got int"),
        (dict(seed=0.5), TypeError, "seed must be an int, got float"),
    ],
)
def test_arguments_are_checked_ahead_of_compiling(sampler, change, error, message, compile, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *args, **options: pytest.fail("compiled"))
    arguments = dict(energy=quadratic, z=start(), steps=1, seed=0, compile=compile) | change
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message):
            sampler.run(**arguments)
        if sampler.is_exact and "callback" not in change:
            with pytest.raises(error, match=message):
                sampler.adapt(**arguments)


def quadratic(x):
    return 0.5 * x.square().flatten(1).sum(1)


def test_arguments_of_the_norm_and_of_calibrate():
    with pytest.raises(ValueError, match="norm='channel' needs z of at least two dimensions"):
        AniLA(norm="channel").run(lambda x: x, torch.zeros(3), steps=1, seed=0)
    with pytest.raises(TypeError, match=r"z must be float32, .* got torch.float64"):
        AniLA().calibrate(quadratic, start().double())
    with pytest.raises(ValueError, match="0-dim"):
        calibrate(quadratic, torch.tensor(1.0))
    with pytest.raises(TypeError, match="score must be a callable, got Tensor"):
        calibrate(None, start(), score=start())
    with pytest.raises(ValueError, match="energy must be given, for MALA compares energies"):
        MALA().adapt(None, start(), steps=1, seed=0)


def test_the_reason_that_stands_on_the_next_line_is_said():
    inner = FileNotFoundError("[Errno 2] No such file or directory: '/nowhere'")
    failed = RuntimeError(f"backend='_inductor' raised:\n{type(inner).__name__}: {inner}\n\nand much more")
    assert graphs_.first_line(failed) == f"backend='_inductor' raised: FileNotFoundError: {inner}"
    assert graphs_.first_line(RuntimeError("\n  one\n two")) == "one"
    assert graphs_.first_line(RuntimeError("one:\n\n two:\n three\nfour")) == "one: two: three"
    assert graphs_.first_line(RuntimeError("only:")) == "only:" and graphs_.first_line(KeyError()) == "KeyError"


# ------------------------------------------------------------------------------------------------------ what is kept


def scaled(scale):
    return lambda x: scale * quadratic(x)


def test_functions_made_anew_share_what_was_compiled(graphs):
    model = Squeezing()

    def run(energy, z=None):
        return AniLA(0.5, 0.1).run(energy, start() if z is None else z, steps=3, seed=0)

    def about(centre):
        return lambda x: (x - centre).square().sum(1)

    for make in (
        lambda: lambda x: model(x),
        lambda: functools.partial(Squeezing.forward, model),
        lambda: model.forward,
    ):
        before = len(graphs)
        run(make()), run(make())
        assert len(graphs) == before + 1
    before = len(graphs)
    ends = [run(about(torch.tensor(c))) for c in ([0.0, 0.0], [1.0, 2.0])]  # an input of the graph
    assert len(graphs) == before + 1
    want = AniLA(0.5, 0.1).run(about(torch.tensor([1.0, 2.0])), start(), steps=3, seed=0, compile=False)
    torch.testing.assert_close(ends[1], want)
    for scale in (1.0, 2.0, 1.0):  # a constant of the graph
        torch.testing.assert_close(
            run(scaled(scale)), AniLA(0.5, 0.1).run(scaled(scale), start(), steps=3, seed=0, compile=False)
        )
    assert len(graphs) == before + 3


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_functions_of_one_code_than_dynamo_has_variants(graphs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in range(4):
            GradientDescent(0.1).run(scaled(1.0 + scale), start(3), steps=1, seed=0)


def test_an_energy_that_does_not_compile_is_tried_once_and_says_so_once(graphs, monkeypatch):
    def untraceable():
        def energy(x):
            torch._dynamo.graph_break()
            return quadratic(x)

        return energy

    with pytest.warns(UserWarning, match=r"runs eagerly \(.*graph_break") as said:
        first = AniLA().run(untraceable(), start(), steps=3, seed=0)
        traced = []
        monkeypatch.setattr(stepwise, "_compiled_transition", lambda *which: traced.append(which))
        for sampler in (AniLA(), AniLA(threshold=2.0)):
            again = sampler.run(untraceable(), start(), steps=3, seed=0)
            torch.testing.assert_close(again, sampler.run(quadratic, start(), steps=3, seed=0, compile=False))
    assert len(said) == 1 and not traced and torch.isfinite(first).all()


class Callable_:
    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return self.model(x)


HOLDERS = {
    "module": lambda model: model,
    "method": lambda model: model.forward,
    "lambda": lambda model: lambda x: model(x),
    "partial": lambda model: functools.partial(lambda m, x: m(x), model),
    "object": Callable_,
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_what_is_kept_keeps_no_energy_and_ends_with_it(kind, graphs):
    model = Squeezing()
    energy = HOLDERS[kind](model)
    AniLA().run(energy, start(), steps=2, seed=0)
    assert graphs and len(kept_samplers.energies) == 1
    gone = weakref.ref(model)
    del model, energy
    graphs.clear()
    gc.collect()
    assert gone() is None and not kept_samplers.energies


def test_only_so_many_energies_are_remembered(monkeypatch):
    monkeypatch.setattr(kept_samplers, "energies", type(kept_samplers.energies)())
    models = [Squeezing() for _ in range(kept_samplers.ENERGIES + 3)]
    kept = [kept_samplers.kept_of(m) for m in models]
    assert len(kept_samplers.energies) == kept_samplers.ENERGIES
    assert kept_samplers.kept_of(models[-1]) is kept[-1] and kept_samplers.kept_of(models[0]) is not kept[0]
    assert all(not end.alive for end in kept[1].ends) and all(end.alive for end in kept[-1].ends)


def test_graphs_are_kept_by_the_tensors_an_energy_was_given(monkeypatch):
    monkeypatch.setattr(kept_samplers, "energies", type(kept_samplers.energies)())
    a, b = torch.zeros(2), torch.ones(2)

    def about(centre):
        return lambda x: (x - centre).square().sum(1)

    def replays(centre):
        return stepwise.compiled_transition(AniLA(), about(centre))

    assert replays(a).advance is replays(b).advance
    assert replays(a).replays is replays(a).replays is not replays(b).replays
    many = [torch.zeros(2) for _ in range(9)]
    first = replays(a).replays
    for centre in many:
        replays(centre)
    assert replays(a).replays is not first  # forgotten
    (made,) = kept_samplers.kept_of(about(a)).transitions.values()
    assert len(made.replays) == kept_samplers.SHAPES


def test_identities():
    model, other = Squeezing(), Squeezing()
    key = lambda f: callables.identity(f).key  # noqa: E731

    def over(x):
        return lambda: x

    assert key(over(model)) == key(over(model)) != key(over(other))
    assert key(over(1)) == key(over(1)) != key(over(1.0)) != key(over(True))
    assert key(model.forward) == key(model.forward) != key(other.forward)
    assert key(functools.partial(over, model)) == key(functools.partial(over, model)) != key(functools.partial(over))
    assert key(over(torch.zeros(2))) == key(over(torch.ones(3)))
    assert key(lambda x=model: x) != key(lambda x=other: x)
    looped = over(None)
    looped.__closure__[0].cell_contents = looped
    assert hash(key(looped)) == hash(key(looped))


def test_where_torch_compile_is_switched_off_nothing_says_otherwise(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *args, **options: pytest.fail("compiled"))
    want = AniLA().run(quadratic, start(), steps=2, seed=0, compile=False)
    words = "cpu: plain definition, eager, for torch.compile is switched off"

    def check():
        for sampler in (AniLA(), HMC()):
            assert chain.describe(sampler, quadratic, start(), fused=True) == words
        assert chain.describe(AniLA(), quadratic, start(), fused=False) == "cpu: plain definition, eager"
        assert torch.equal(AniLA().run(quadratic, start(), steps=2, seed=0), want)

    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        with monkeypatch.context() as patch, torch._dynamo.config.patch(disable=name == "TORCH_COMPILE_DISABLE"):
            patch.setenv(name, "1")
            check()
    with torch.compiler.set_stance("force_eager"):
        check()
    assert chain.describe(AniLA(), quadratic, start(), fused=True) == "cpu: compiled reference"


# ------------------------------------------------------------------------------------------ the models behind callables

_global_model = None
_models = {}


class Trainer:
    """What users bind an energy to: a model among other things."""

    __slots__ = ("__dict__", "slotted")
    of_class = None

    def __init__(self, model=None, slotted=None):
        self.model, self.models, self.steps, self.data = model, [model], 3, torch.zeros(3)
        self.slotted = slotted

    def energy(self, x):
        return self.model(x)

    def by_helper(self, x):
        return self._helped(x)

    def _helped(self, x):
        return self.best(x)

    @property
    def best(self):
        return self.models[0]

    @functools.cached_property
    def kept(self):
        return self.model

    def by_cached(self, x):
        return self.kept(x)

    def by_slot(self, x):
        return self.slotted(x)

    def by_class(self, x):
        return type(self).of_class(x) + self.of_class(x)

    def of_none(self, x):
        return x.square().sum(1)


def by_global(x):
    return _global_model(x)


def by_function(x):
    return (lambda y: by_global(y))(x)


def by_container(x):
    return _models["a"](x)


def _module_with(model):
    module = types.ModuleType("my_models")
    module.net = model
    return module


def _hidden(model):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = [model]  # not registered

        def forward(self, x):
            return self.nets[0](x)

    return Outer()


def _recursive(model):
    def energy(x, deep=2):
        return energy(x, deep - 1) if deep else model(x)

    return energy


BEHIND = {
    "module": lambda m: m,
    "method": lambda m: m.forward,
    "called method": lambda m: m.__call__,
    "lambda": lambda m: lambda x: m(x),
    "lambda in a lambda": lambda m: (lambda f: lambda x: f(x) / 2.0)(lambda x: m(x)),
    "default": lambda m: lambda x, net=m: net(x),
    "keyword default": lambda m: lambda x, *, net=m: net(x),
    "partial": lambda m: functools.partial(lambda net, x: net(x), m),
    "partial by keyword": lambda m: functools.partial(lambda x, net: net(x), net=m),
    "partial of a partial": lambda m: functools.partial(functools.partial(lambda a, net, x: a * net(x), 2.0), m),
    "global": lambda m: by_global,
    "global in a function": lambda m: by_function,
    "global in a dict": lambda m: by_container,
    "list": lambda m: (lambda nets: lambda x: nets[0](x))([m]),
    "dict": lambda m: (lambda nets: lambda x: nets["a"](x))({"a": m}),
    "tuple in a dict": lambda m: (lambda nets: lambda x: nets["a"][0](x))({"a": (m, 1)}),
    "object": Callable_,
    "bound to an object": lambda m: Trainer(m).energy,
    "object in a lambda": lambda m: (lambda trainer: lambda x: trainer.model(x))(Trainer(m)),
    "method and property": lambda m: Trainer(m).by_helper,
    "slot": lambda m: Trainer(slotted=m).by_slot,
    "attribute of a class": lambda m: Trainer().by_class,
    "imported": lambda m: (lambda my: lambda x: my.net(x))(_module_with(m)),
    "vmap": lambda m: torch.func.vmap(lambda x: m(x[None])[0], randomness="different"),
    "wrapped": lambda m: functools.wraps(by_function)(lambda x: m(x)),
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled lambda": lambda m: torch.compile(lambda x: m(x), backend="eager"),
    "unregistered": _hidden,
    "cached property": lambda m: Trainer(m).by_cached,
    "weak reference": lambda m: (lambda ref: lambda x: ref()(x))(weakref.ref(m)),
    "cached function": lambda m: functools.lru_cache(lambda x: m(x)),
    "recursive": _recursive,
    "other module": lambda m: Through(lambda x: m(x)),
}


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Fussy(nn.Module):
    """With dropout and batch normalisation, which tell and remember in which mode they ran."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.net[3].eval()
        self.net[0].bias.requires_grad_(False)
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, self.net[2].training, any(p.requires_grad for p in self.parameters())))
        return self.net(x).squeeze(-1)


@pytest.mark.parametrize("kind", BEHIND)
def test_the_model_behind_a_callable_is_in_eval_mode_while_sampling(kind, monkeypatch):
    model = Fussy()
    monkeypatch.setattr(sys.modules[__name__], "_global_model", model)
    monkeypatch.setattr(sys.modules[__name__], "_models", {"a": model})
    monkeypatch.setattr(Trainer, "of_class", model)
    energy = BEHIND[kind](model)
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    with sampling(energy):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    with pytest.raises(ArithmeticError), sampling(energy):
        raise ArithmeticError
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("kind", ["method", "lambda", "partial", "bound to an object"])
def test_sampling_behind_a_callable_leaves_the_model_as_it_was(kind):
    model = Fussy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    energy = BEHIND[kind](model)
    for sampler in (AniLA(), MALA()):
        z = sampler.run(energy, start(), steps=2, seed=0, compile=False)
        assert torch.equal(z, sampler.run(model, start(), steps=2, seed=0, compile=False))  # no dropout
    AniLA().run(None, start(), score=lambda x: -evaluator(energy)(x)[1], steps=1, seed=0, compile=False)
    calibrate(energy, start())
    MALA().adapt(energy, start(), steps=1, seed=0, compile=False)
    assert set(model.modes) == {(False, False, False)} and model.training and model.net[0].weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_has_no_model_behind_it_is_looked_at_briefly():
    big = {i: [i] * 50 for i in range(100_000)}
    for function in (Trainer(Fussy()).of_none, torch.sum, math.sin, None, lambda x: len(big), "text", torch.zeros(2)):
        assert callables.modules(function) == []
    deep = Fussy()
    model = deep
    for _ in range(50):
        deep = (lambda f: lambda x: f(x))(deep)
    assert model not in callables.modules(deep)  # bounded
    looped = []
    looped.append(looped)
    assert callables.modules(lambda: looped) == []
