"""The same scenario on both libraries: order of hooks, what they see, and texts of errors."""

import numpy as np
import pytest

import vibetensor.torch as vt

pytestmark = pytest.mark.torch


def value(x):
    if isinstance(x, tuple):
        return tuple(value(v) for v in x)
    return x.tolist() if hasattr(x, "tolist") else x


def forward_hooks(torch):
    events = []
    m = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    glob = torch.nn.modules.module
    handles = [
        glob.register_module_forward_pre_hook(
            lambda mod, args: events.append(("global pre", type(mod).__name__))
        ),
        glob.register_module_forward_hook(
            lambda mod, args, out: events.append(("global post", type(mod).__name__))
        ),
    ]
    m[0].register_forward_pre_hook(lambda mod, args: events.append(("pre 1", value(args))))
    m[0].register_forward_pre_hook(lambda mod, args: args[0] + 1)
    m[0].register_forward_pre_hook(
        lambda mod, args: events.append(("pre first", value(args))), prepend=True
    )
    m[0].register_forward_pre_hook(
        lambda mod, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
    )
    m[1].register_forward_hook(lambda mod, args, out: events.append(("post", value(out))))
    m[1].register_forward_hook(lambda mod, args, out: out + 10)
    m[1].register_forward_hook(
        lambda mod, args, kwargs, out: events.append(("last", value(args), kwargs, value(out))),
        with_kwargs=True,
    )
    try:
        events.append(value(m(torch.ones(2))))
    finally:
        for handle in handles:
            handle.remove()
    events.append(value(m(torch.ones(2))))
    return events


def always_called(torch):
    events = []

    class Fails(torch.nn.Module):
        def forward(self, x):
            raise ValueError("no")

    m = Fails()
    m.register_forward_hook(lambda mod, args, out: events.append("plain"))
    m.register_forward_hook(lambda mod, args, out: events.append(("always", out)), always_call=True)
    m.register_forward_hook(
        lambda mod, args, kw, out: events.append(("with kwargs", kw, out)),
        always_call=True,
        with_kwargs=True,
    )
    try:
        m(torch.ones(1))
    except ValueError as error:
        events.append(str(error))
    return events


def backward_hooks(torch):
    events = []
    m = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    with torch.no_grad():
        for p in m.parameters():
            p.fill_(0.5)
    for name, layer in m.named_children():
        layer.register_full_backward_pre_hook(
            lambda mod, go, name=name: events.append((name, "pre", value(go)))
        )
        layer.register_full_backward_hook(
            lambda mod, gi, go, name=name: events.append((name, value(gi), value(go)))
        )
    handle = m[1].register_full_backward_hook(lambda mod, gi, go: (gi[0] * 2,))
    m[0].register_full_backward_pre_hook(lambda mod, go: (go[0] * 10,))
    x = torch.ones(1, 2, requires_grad=True)
    m(x).sum().backward()
    events.append(value(x.grad))
    events.append([value(p.grad) for p in m.parameters()])
    handle.remove()
    # No input needs a gradient: hooks see None for it.
    m(torch.ones(1, 2)).sum().backward()
    return events


def backward_hooks_of_many(torch):
    events = []

    class Two(torch.nn.Module):
        def forward(self, a, b, c):
            return a * b, b + 1, c

    m = Two()
    m.register_full_backward_hook(lambda mod, gi, go: events.append((value(gi), value(go))))
    a = torch.ones(1, requires_grad=True)
    b = torch.full((1,), 3.0, requires_grad=True)
    x, y, _ = m(a, b, 5)
    (x * 2).sum().backward()
    events.append((value(a.grad), value(b.grad)))
    x, y, _ = m(a, b, 5)
    (x * 2 + y).sum().backward()
    return events


def state_dict_hooks(torch):
    events = []
    m = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    m[0].register_load_state_dict_pre_hook(
        lambda mod, state, prefix, *rest: events.append(("pre", prefix, sorted(state)))
    )
    m.register_load_state_dict_post_hook(
        lambda mod, keys: events.append(("post", list(keys.missing_keys)))
    )
    m[1].register_load_state_dict_post_hook(lambda mod, keys: keys.missing_keys.clear())
    m[1].register_state_dict_post_hook(
        lambda mod, state, prefix, meta: events.append((prefix, meta, list(state)))
    )
    state = m.state_dict()
    del state["1.bias"]
    events.append(str(m.load_state_dict(state)))
    return events


def old_batch_norm(torch):
    m = torch.nn.BatchNorm1d(2)
    state = m.state_dict()
    del state["num_batches_tracked"]
    state._metadata.clear()
    return str(m.load_state_dict(state))


SCENARIOS = [
    forward_hooks,
    always_called,
    backward_hooks,
    backward_hooks_of_many,
    state_dict_hooks,
    old_batch_norm,
]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(against_torch, scenario):
    assert scenario(vt) == scenario(against_torch.torch)


def wrong_state(change):
    def run(torch):
        net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        state = net.state_dict()
        change(torch, state)
        net.load_state_dict(state)

    return run


def missing(torch, state):
    del state["0.weight"], state["1.bias"]


def unexpected(torch, state):
    state["extra"] = state["2.weight"] = state["0.more"] = torch.ones(1)


def missing_and_unexpected(torch, state):
    del state["0.weight"]
    state["extra"] = torch.ones(1)
    state["1.bias"] = torch.ones(2)


def wrong_size(torch, state):
    state["0.weight"] = torch.ones(2, 2)
    state["1.bias"] = torch.ones(2)
    del state["0.bias"]


def not_a_tensor(torch, state):
    state["0.bias"] = [1, 2, 3]


@pytest.mark.parametrize(
    "change", [missing, unexpected, missing_and_unexpected, wrong_size, not_a_tensor]
)
def test_load_state_dict_errors(against_torch, change):
    run = wrong_state(change)
    against_torch.same_error(lambda: run(vt), lambda: run(against_torch.torch))


def test_not_strict(against_torch):
    def run(torch):
        net = torch.nn.Linear(2, 2)
        return str(net.load_state_dict({"weight": torch.ones(2, 2), "x": 1}, strict=False))

    assert run(vt) == run(against_torch.torch)


def module(change):
    def run(torch):
        change(torch, torch.nn.Linear(2, 2))

    return run


WRONG = {
    "a tensor for a parameter": lambda t, m: setattr(m, "weight", t.ones(2, 2)),
    "a number for a module": lambda t, m: (m.add_module("a", t.nn.ReLU()), setattr(m, "a", 3)),
    "a number for a buffer": lambda t, m: (m.register_buffer("b", None), setattr(m, "b", 3)),
    "name taken": lambda t, m: m.register_buffer("weight", None),
    "dotted name": lambda t, m: m.register_parameter("a.b", None),
    "empty name": lambda t, m: m.add_module("", None),
    "not a string": lambda t, m: m.register_buffer(3, None),
    "no module": lambda t, m: m.add_module("a", 3),
    "no buffer": lambda t, m: m.register_buffer("a", 3),
    "unknown attribute": lambda t, m: m.nothing,
    "history": lambda t, m: m.register_parameter("p", m.weight * 2),
    "not a mapping": lambda t, m: m.load_state_dict([1]),
    "mode": lambda t, m: m.train(1),
    "dtype": lambda t, m: m.to(t.int64),
    "pre-hook": lambda t, m: (
        m.register_forward_pre_hook(lambda m, a, k: 3, with_kwargs=True),
        m(t.ones(1, 2)),
    ),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_errors(against_torch, what):
    run = module(WRONG[what])
    against_torch.same_error(
        lambda: run(vt),
        lambda: run(against_torch.torch),
        text=what not in ("history", "pre-hook", "dtype", "no module"),
    )


def test_a_training_step_of_a_small_gpt(against_torch):
    def build(torch):
        nn, F = torch.nn, torch.nn.functional

        class Block(nn.Module):
            def __init__(self, d, heads):
                super().__init__()
                self.heads = heads
                self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d, bias=False)
                self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
                self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

            def forward(self, x):
                b, t, c = x.shape
                q, k, v = self.qkv(self.ln1(x)).split(c, dim=2)
                q, k, v = (
                    z.view(b, t, self.heads, c // self.heads).transpose(1, 2) for z in (q, k, v)
                )
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + self.proj(y.transpose(1, 2).contiguous().view(b, t, c))
                return x + self.mlp(self.ln2(x))

        class GPT(nn.Module):
            def __init__(self):
                super().__init__()
                self.wte, self.wpe = nn.Embedding(11, 16), nn.Embedding(8, 16)
                self.h = nn.ModuleList([Block(16, 2) for _ in range(2)])
                self.head = nn.Linear(16, 11, bias=False)
                self.head.weight = self.wte.weight

            def forward(self, index, targets):
                x = self.wte(index) + self.wpe(torch.arange(index.size(1)))
                for block in self.h:
                    x = block(x)
                logits = self.head(x)
                return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

        return GPT()

    reference, net = build(against_torch.torch), build(vt)
    assert repr(net) == repr(reference)
    against_torch.copy_weights(reference, net)
    index = np.random.default_rng(0).integers(0, 11, (3, 8))
    target = np.random.default_rng(1).integers(0, 11, (3, 8))
    for torch, model, give in (
        (vt, net, against_torch.ours),
        (against_torch.torch, reference, against_torch.theirs),
    ):
        loss = model(give(index), give(target))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        model.result = (loss, norm)
    for mine, theirs in zip(net.result, reference.result):
        against_torch.close(mine, theirs, rtol=1e-4)
    for mine, theirs in zip(net.parameters(), reference.parameters()):
        against_torch.close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
