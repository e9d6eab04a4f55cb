"""Any stack of blocks, any options, any row of calls: the same as the interpreter, which is sixty lines of eager."""

from __future__ import annotations

import string
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cache_dit
from cache_dit.errors import NoBlocksError
from cache_dit.messages import CacheDitWarning
from cache_dit.options import CacheOptions

from .generations import EXACT, hits_of, prompted, tensor
from .interpreter import Interpreter, State, run

WIDTH = 6
KINDS = ("residual", "gated", "skips", "inputs", "tuple", "indexed", "shared")


pytestmark = pytest.mark.usefixtures("compiled_for_this_module_alone")


class AnyBlock(nn.Module):
    """One block of any kind: a list of streams in, the same streams out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.mlp, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.side = nn.Linear(WIDTH, WIDTH) if kind == "tuple" else None
        self.merge = nn.Linear(2 * WIDTH, WIDTH) if kind == "skips" else None

    def forward(self, h: Tensor, t: Tensor, *more: Tensor) -> Any:
        if self.merge is not None and more:
            h = self.merge(torch.cat([h, more[0]], -1))
        added = torch.tanh(self.mlp(h)) * t
        if self.kind == "gated":
            added = added * torch.sigmoid(self.gate(t.expand(h.shape[0], 1, WIDTH)))
        if self.kind == "inputs":
            added = added + self.gate(more[0])
        if self.side is not None:
            (context,) = more
            return h + added + context.mean(1, keepdim=True), context + torch.tanh(self.side(context)) * t
        return h + added


class AnyStack(nn.Module):
    """A model of any kind that can be run piece by piece."""

    def __init__(self, kind: str, depth: int) -> None:
        super().__init__()
        self.kind, self.depth = kind, depth
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(AnyBlock(kind) for _ in range(depth if kind != "shared" else (depth + 1) // 2))
        self.extra = nn.Parameter(torch.randn(max(depth, 1), 1, WIDTH)) if kind == "inputs" else None

    def before(self, x: Tensor, t: Tensor) -> State:
        h = self.embed(x)
        return (h, 0.5 * h[:, :2]) if self.kind == "tuple" else (h,)

    def block(self, place: int, state: State, entered: list[State], t: Tensor) -> State:
        t = t[:, None, None]
        entered.append(state)
        more = state[1:]
        if self.extra is not None:
            more = (self.extra[place][None].expand(state[0].shape[0], 1, WIDTH),)
        if self.kind == "skips" and place >= (self.depth + 1) // 2:
            more = entered[self.depth - 1 - place]
        made = self.blocks[place % len(self.blocks)](state[0], t, *more)
        return made if isinstance(made, tuple) else (made,)

    def after(self, state: State, t: Tensor) -> Tensor:
        # multiplied, so that both streams leave the blocks by themselves and not as their sum
        return self.head(state[0]) * torch.sigmoid(self.head(state[-1])).mean(1, keepdim=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        state, entered = self.before(x, t), []
        if self.kind in ("indexed", "shared", "skips", "inputs"):
            for place in range(self.depth):
                state = self.block(place, state, entered, t)
        else:
            for place, _ in enumerate(self.blocks):
                state = self.block(place, state, entered, t)
        return self.after(state, t)


options = st.fixed_dictionaries(
    {
        "front_blocks": st.integers(0, 2),
        "back_blocks": st.integers(0, 1),
        "warmup_steps": st.integers(0, 3),
        "skip_interval": st.integers(1, 4),
        "max_consecutive_hits": st.integers(1, 3),
        "schedule": st.none() | st.text("01", min_size=1, max_size=12),
        "lowering": st.sampled_from(["specialize", "pieces", "cond"]),
    }
)
# Skips whenever it may.
GREEDY: dict[str, Any] = {
    "front_blocks": 1,
    "back_blocks": 0,
    "warmup_steps": 0,
    "skip_interval": 2,
    "max_consecutive_hits": 3,
    "schedule": "10000000",
    "lowering": "specialize",
}
names_of_events = [*["call"] * 8, "jump", "new_run", "weights", "batch", "fault", "again"]
events = st.lists(st.sampled_from(names_of_events), min_size=6, max_size=24)


@pytest.mark.slow
@given(kind=st.sampled_from(KINDS), depth=st.integers(0, 5), options=options, events=events)
@example(kind="skips", depth=4, options=GREEDY, events=["call"] * 6)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_stack_gives_what_the_interpreter_gives(kind: str, depth: int, options: dict[str, Any], events: list[str]) -> None:
    # a block used twice has its two places counted as one name: skipped outputs are those of no simple interpreter
    front, back = options["front_blocks"], options["back_blocks"]
    assume(not (kind == "skips" and back))
    torch._dynamo.reset()
    torch.manual_seed(depth)
    model = AnyStack(kind, depth).eval()
    given_options = {**EXACT, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheDitWarning)
        try:
            cache_dit.enable_cache(model, **given_options)
        except NoBlocksError:
            assert len(model.blocks) < 2
            return
        rules = [options[name] for name in ("warmup_steps", "skip_interval", "max_consecutive_hits", "schedule")]
        # a stream that a long skip is mixed into is cached whole
        interpreter = Interpreter(model, front, back, *rules, whole=kind == "skips")
        step, batch = 0, 2
        for n, event in enumerate(events):
            # a timestep repeated by the second call of a run would be a second context
            if event == "jump" and len(interpreter.times) > 1:
                step = 0
            elif event == "new_run":
                cache_dit.new_run(model)
                interpreter.begin_run()
            elif event == "weights":
                with torch.no_grad():
                    model.head.bias.add_(0.1)
                interpreter.forget()
            elif event == "batch":
                batch = 5 - batch
                interpreter.forget()
            elif event == "fault":
                with pytest.raises(TypeError):
                    model(no_such_argument=1)
                interpreter.begin_run()
            elif event == "again":
                cache_dit.disable_cache(model)
                cache_dit.enable_cache(model, **given_options)
                interpreter.begin_run()
            x, t = tensor(n, batch, 5, 4), torch.full((batch,), 1.0 - step / 30)
            step += 1
            before = hits_of(model)
            with torch.no_grad():
                output = model(x, t)
            hit = hits_of(model) > before
            cached = cache_dit.explain(model).region is not None
            if n == 0:
                assert cached == (depth - front - back > 0 and depth > 1) or kind == "shared"
            skips, wanted = run(interpreter, x, t)
            if not cached:
                assert not hit
                torch.testing.assert_close(output, model.forward(x, t).detach(), rtol=1e-5, atol=1e-6)
            elif kind == "shared":
                assert hit == skips
                if not hit:
                    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
            else:
                assert hit == skips, (n, event)
                torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)


# Hostile options.

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.integers(),
    st.floats(),
    st.text(string.printable, max_size=8),
    st.sampled_from(["fixed", "dynamic", "adaptive", "auto", "eager", "inductor", "cond", "zh", "../x", "__import__('os')"]),
    st.lists(st.integers(0, 1), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.binary(max_size=3),
    st.just(object()),
    st.just(torch.float16),
    st.just(torch.ones(2)),
)
names = [name for name in CacheOptions.__init__.__kwdefaults__ if name != "inner_options"]


@given(st.dictionaries(st.sampled_from([*names, "backend", "cache_config", "rel_l1_thresh"]), anything, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_options_are_taken_or_refused_in_our_words(chosen: dict[str, Any]) -> None:
    """Nothing but our errors and plain `ValueError` and `TypeError` comes out, and a refusal leaves the model as it was."""
    model = prompted()
    before = dict(vars(model))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheDitWarning)
            cache_dit.enable_cache(model, **chosen)
    except (cache_dit.CacheDitError, ValueError, TypeError) as error:
        assert str(error)
        assert {**vars(model)}.keys() == before.keys()
    else:
        cache_dit.disable_cache(model)
    cache_dit.enable_cache(model, **EXACT)
    assert cache_dit.get_stats(model).calls == 0
