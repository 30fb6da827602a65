"""Module by itself: attributes, traversal, conversion, copies, the straight call."""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from types import MappingProxyType

import pytest

import vibetensor.torch as vt
from vibetensor.torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.register_buffer("steps", vt.zeros(1))
        self.register_buffer("cache", vt.ones(2), persistent=False)

    def forward(self, index):
        x = self.embed(index)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_tied_weights_are_one_parameter():
    net = Net()
    assert net.head.weight is net.embed.weight
    names = [name for name, _ in net.named_parameters()]
    assert names == [
        "embed.weight", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias",
    ]  # fmt: skip
    every = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    assert "head.weight" in every and len(every) == 6
    assert list(net.state_dict()) == [
        "steps", "embed.weight", "head.weight",
        "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias",
    ]  # fmt: skip
    copied = copy.deepcopy(net)
    assert copied.head.weight is copied.embed.weight
    assert copied.head.weight is not net.head.weight
    net.double()
    assert net.head.weight is net.embed.weight and net.head.weight.dtype is vt.float64
    assert net.steps.dtype is vt.float64 and net.cache.dtype is vt.float64


def test_copies_of_parameters_have_no_gradients():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].weight.note = "kept by the original"
    net(vt.ones(1, 2)).sum().backward()
    again = copy.deepcopy(net)
    for p, q in zip(net.parameters(), again.parameters()):
        assert p.grad is not None and q.grad is None
        assert q.requires_grad and vt.equal(p, q) and q.data_ptr() != p.data_ptr()
    assert not hasattr(again[0].weight, "note")


def test_copies_of_tensors_have_gradients_of_their_own():
    tensors = [vt.ones(size, requires_grad=True) for size in (2, 3, 5, 3, 2) * 16]
    for number, t in enumerate(tensors):
        t.grad = vt.full(t.shape, float(number))
    for again in (copy.deepcopy(tensors), copy.deepcopy(copy.deepcopy(tensors))):
        for number, (t, other) in enumerate(zip(tensors, again)):
            assert other.grad is not t.grad and (other.grad == number).all().item()
            assert other.grad.shape == t.shape


def test_attributes_move_between_registries():
    m = nn.Module()
    m.x = 1
    m.x = nn.Parameter(vt.ones(2))
    assert "x" in m._parameters and "x" not in m.__dict__
    m.x = None
    assert m.x is None and "x" in m._parameters
    m.x = nn.Linear(1, 1)
    assert "x" in m._modules and "x" not in m._parameters
    m.b = nn.Buffer(vt.ones(2), persistent=False)
    assert isinstance(m.b, nn.Buffer) and "b" not in m.state_dict()
    m.b = vt.zeros(2)
    assert m._buffers["b"] is m.b
    del m.b, m.x
    assert not hasattr(m, "b") and not hasattr(m, "x")
    m.x = nn.Buffer(vt.ones(1))
    assert list(m.state_dict()) == ["x"]
    assert "x" in dir(m)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_new_buffer_brings_its_own_persistence(before, after):
    m = nn.Module()
    m.b = nn.Buffer(vt.ones(2), persistent=before)
    assert list(m.state_dict()) == ["b"] * before
    m.b = nn.Buffer(vt.zeros(2), persistent=after)
    assert list(m.state_dict()) == ["b"] * after and m.b.tolist() == [0, 0]
    m.b = vt.ones(2)  # a plain tensor keeps what is
    assert list(m.state_dict()) == ["b"] * after
    m.b = None
    m.b = nn.Buffer(vt.ones(1))
    assert list(m.state_dict()) == ["b"]


@pytest.mark.parametrize("persistent", [False, True])
def test_copies_and_pickles_of_a_buffer_know_their_persistence(persistent):
    buffer = nn.Buffer(vt.tensor([1.0, 2.0]), persistent=persistent)
    for other in (
        copy.deepcopy(buffer), copy.deepcopy([buffer, buffer])[1], copy.copy(buffer),
        pickle.loads(pickle.dumps(buffer)),
    ):  # fmt: skip
        assert type(other) is nn.Buffer and other.tolist() == [1, 2]
        assert other.persistent is persistent
        m = nn.Module()
        m.b = other
        assert list(m.state_dict()) == ["b"] * persistent
    pair = copy.deepcopy([buffer, buffer])
    assert pair[0] is pair[1]
    assert nn.Buffer.persistent


def test_parameter_is_a_leaf_that_shares_memory():
    data = vt.ones(2, requires_grad=True) * 1
    p = nn.Parameter(data)
    assert p.is_leaf and p.requires_grad and isinstance(p, vt.Tensor)
    assert p.data_ptr() == data.data_ptr()
    assert type(p + 1) is vt.Tensor
    assert not nn.Parameter(vt.zeros(1, dtype=vt.int64), requires_grad=False).requires_grad
    with pytest.raises(RuntimeError):
        nn.Parameter(vt.zeros(1, dtype=vt.int64))
    assert nn.Parameter().shape == (0,)
    again = copy.deepcopy(p)
    assert type(again) is nn.Parameter and again.requires_grad
    assert type(pickle.loads(pickle.dumps(p))) is nn.Parameter


def test_straight_path_and_hooks_after_removal():
    calls = []

    class Twice(nn.Module):
        def forward(self, x, *, factor=2):
            calls.append(factor)
            return x * factor

    m = Twice()
    assert m(vt.ones(1), factor=3).item() == 3 and not m._hooked
    handle = m.register_forward_hook(lambda m, a, out: out + 1)
    assert m(vt.ones(1)).item() == 3
    handle.remove()
    assert m(vt.ones(1)).item() == 2
    with m.register_forward_hook(lambda m, a, out: out + 1):
        assert m(vt.ones(1)).item() == 3
    assert calls == [3, 2, 2, 2]


def gradient_of_twice(module):
    x = vt.tensor([-1.0, 1.0], requires_grad=True)
    y = x * 2
    z = module(y)
    (z.sum() + 10 * y.sum()).backward()
    return x.grad.tolist()


def test_in_place_modules_and_backward_hooks():
    # y is changed: the 10 is of what ReLU left of it.
    assert gradient_of_twice(nn.ReLU(inplace=True)) == [0, 22]
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        for inner in (nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)):
            for module in (inner, nn.Sequential(nn.Identity(), inner)):
                handle = getattr(module, register)(lambda *a: None)
                with pytest.raises(
                    RuntimeError, match=f"{type(module).__name__} changed its input 0"
                ):
                    gradient_of_twice(module)
                handle.remove()
        module = nn.ReLU()
        getattr(module, register)(lambda *a: None)
        assert gradient_of_twice(module) == [20, 22]


def test_changes_in_place_that_hooks_allow():
    relu = nn.ReLU(inplace=True)
    relu.register_full_backward_hook(lambda *a: None)
    x = vt.tensor([-1.0, 1.0])
    relu(x)
    assert x.tolist() == [0, 1]
    y = vt.tensor([-1.0, 1.0], requires_grad=True) * 1
    with vt.no_grad():
        relu(y)
    assert y.tolist() == [0, 1]

    class Counts(nn.Module):
        def forward(self, x, count):
            count += 1
            return x * 2

    module, count = Counts(), vt.zeros(1)
    module.register_full_backward_hook(lambda *a: None)
    x = vt.ones(1, requires_grad=True)
    module(x, count).sum().backward()
    assert x.grad.item() == 2 and count.item() == 1


def test_a_backward_hook_without_gradients_of_inputs_warns():
    module, seen = nn.Linear(1, 1), []
    module.register_full_backward_hook(lambda m, gi, go: seen.append(gi))
    with pytest.warns(UserWarning, match="Full backward hook is firing"):
        module(vt.ones(1, 1)).sum().backward()
    module(vt.ones(1, 1, requires_grad=True)).sum().backward()
    assert seen[0] == (None,) and seen[1][0].shape == (1, 1)


def test_train_eval_apply_requires_grad_zero_grad():
    net = Net()
    seen = []
    assert net.apply(lambda m: seen.append(type(m).__name__)) is net
    assert seen == ["Embedding", "Linear", "Linear", "Linear", "ModuleList", "Net"]
    assert not net.eval().blocks[1].training and net.train().blocks[1].training
    net.requires_grad_(False)
    assert not any(p.requires_grad for p in net.parameters())
    net.requires_grad_()
    net(vt.tensor([1, 2])).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.zero_grad(set_to_none=False)
    assert all(bool((p.grad == 0).all()) for p in net.parameters())
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_conversion_keeps_identity_and_moves_gradients():
    net = Net()
    before = list(net.parameters())
    net(vt.tensor([1, 2])).sum().backward()
    net.to(vt.bfloat16)
    for old, new in zip(before, net.parameters()):
        assert old is new and new.dtype is vt.bfloat16
        assert new.grad is not None and new.grad.dtype is vt.bfloat16 and new.is_leaf
    assert net.to("cpu", vt.float32).embed.weight.dtype is vt.float32
    assert net.half().head.weight.dtype is vt.float16
    assert net.float().head.weight.dtype is vt.float32
    with pytest.raises(TypeError):
        net.to(vt.int32)
    net.to_empty(device="cpu")
    counter = nn.BatchNorm1d(2).half()
    assert counter.num_batches_tracked.dtype is vt.int64


def test_pickle_and_deepcopy_of_a_module():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4)).eval()
    x = vt.randn(2, 3)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert bool((other(x) == net(x)).all())
        assert not other.training
        with vt.no_grad():
            other[0].weight.zero_()
        assert not bool((net[0].weight == 0).all())


def test_a_model_is_freed_without_the_garbage_collector():
    gc.disable()
    try:
        net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        net.register_full_backward_hook(lambda m, gi, go: None)
        loss = net(vt.ones(1, 3, requires_grad=True)).sum()
        loss.backward()
        alive = weakref.ref(net)
        del net, loss
        assert alive() is None
    finally:
        gc.enable()


def test_get_and_set_submodule():
    net = Net()
    assert net.get_submodule("blocks.1") is net.blocks[1]
    assert net.get_submodule("") is net
    assert net.get_parameter("blocks.0.bias") is net.blocks[0].bias
    assert net.get_buffer("cache") is net.cache
    net.set_submodule("blocks.0", nn.Identity())
    assert isinstance(net.blocks[0], nn.Identity)
    for path in ("blocks.7", "nothing", "steps"):
        with pytest.raises(AttributeError):
            net.get_submodule(path)
    with pytest.raises(AttributeError):
        net.get_parameter("steps")
    with pytest.raises(AttributeError):
        net.get_buffer("embed.weight")


def test_sequential_is_a_list():
    a, b, c = nn.Linear(1, 1), nn.ReLU(), nn.Tanh()
    s = nn.Sequential(a, b)
    assert len(s) == 2 and s[-1] is b and list(s[:1]) == [a] and type(s[:1]) is nn.Sequential
    s.append(c)
    s.insert(1, nn.Identity())
    assert [type(m).__name__ for m in s] == ["Linear", "Identity", "ReLU", "Tanh"]
    del s[1]
    assert list(s._modules) == ["0", "1", "2"]
    assert s.pop(-1) is c and len(s + nn.Sequential(c)) == 3 and len(s * 2) == 4
    s[0] = nn.Identity()
    assert isinstance(s[0], nn.Identity)
    named = nn.Sequential({"first": a, "second": b})
    assert named.first is a and named[1] is b
    with pytest.raises(IndexError):
        s[5]


def test_module_list_and_dict():
    a, b, c = nn.Linear(1, 1), nn.ReLU(), nn.Tanh()
    modules = nn.ModuleList([a])
    modules.extend([b]).append(c)
    modules += [nn.Identity()]
    assert len(modules) == 4 and modules[1:3][0] is b and c in modules
    modules.insert(0, nn.Identity())
    del modules[1:3]
    assert [type(m).__name__ for m in modules] == ["Identity", "Tanh", "Identity"]
    with pytest.raises(NotImplementedError):
        modules(1)
    named = nn.ModuleDict({"a": a, "b": b})
    named.update([("c", c)])
    assert list(named) == ["a", "b", "c"] and "b" in named and named.pop("b") is b
    assert list(named.keys()) == ["a", "c"] and named["a"] is a
    del named["a"]
    named.clear()
    assert len(named) == 0


def test_parameter_containers():
    values = nn.ParameterList([vt.ones(2), 3])
    values.append(nn.Parameter(vt.zeros(1)))
    values += [vt.ones(1)]
    assert len(values) == 4 and len(list(values.parameters())) == 3 and values[1] == 3
    assert list(values.state_dict()) == ["0", "2", "3"] and len(values[2:]) == 2
    named = nn.ParameterDict({"w": vt.ones(2)})
    named["b"] = vt.zeros(1)
    assert list(named) == ["w", "b"] and isinstance(named["b"], nn.Parameter)
    assert named.get("x") is None and named.pop("w").shape == (2,) and "w" not in named
    assert list((named | {"z": vt.ones(1)}).keys()) == ["b", "z"]


def test_order_of_a_parameter_dict():
    one = vt.ones(1)
    assert list(nn.ParameterDict({"b": one, "a": one})) == ["a", "b"]
    pairs = nn.ParameterDict([("b", one), ("a", one)])
    assert list(pairs) == list(pairs.copy()) == list(nn.ParameterDict(pairs)) == ["b", "a"]
    assert list(nn.ParameterDict(OrderedDict([("b", one), ("a", one)]))) == ["b", "a"]
    assert list(nn.ParameterDict(MappingProxyType({"b": one, "a": one}))) == ["a", "b"]
    assert list(pairs.fromkeys(["d", "c"], one)) == ["d", "c"]
    assert list(pairs | {"d": one, "c": one}) == ["b", "a", "c", "d"]
    pairs |= {"d": one, "c": one}
    assert list(pairs) == ["b", "a", "c", "d"]
    with pytest.raises(TypeError, match="key"):
        nn.ParameterDict({1: one})


def test_a_dict_or_a_parameter_dict():
    named = nn.ParameterDict({"a": vt.ones(1) * 2})
    made = {"d": 3, "a": 4} | named
    assert type(made) is dict and list(made) == ["d", "a"]
    assert made["d"] == 3 and made["a"] is named["a"] and list(named) == ["a"]
    with pytest.raises(TypeError):
        [("a", 1)] | named


def test_extra_state_and_hooks_of_the_state_dict():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = 3

        def get_extra_state(self):
            return {"count": self.count}

        def set_extra_state(self, state):
            self.count = state["count"]

    net = nn.Sequential(Counter(), nn.Linear(1, 1))
    net[1].register_state_dict_post_hook(lambda m, s, prefix, meta: s.pop(prefix + "bias"))
    with pytest.raises(RuntimeError):
        net.state_dict()
    net[1]._state_dict_hooks.clear()
    net[1].register_state_dict_pre_hook(lambda m, prefix, keep: seen.append(prefix))
    seen = []
    state = net.state_dict()
    assert state["0._extra_state"] == {"count": 3} and seen == ["1."]
    net[0].count = 7
    assert repr(net.load_state_dict(state)) == "<All keys matched successfully>"
    assert net[0].count == 3


def test_order_of_what_load_state_dict_reports():
    with pytest.raises(RuntimeError) as error:
        nn.Linear(2, 2).load_state_dict({"x": vt.ones(1), "weight": vt.ones(3)})
    places = [str(error.value).index(word) for word in ("Missing", "Unexpected", "size mismatch")]
    assert places == sorted(places)


def test_positional_arguments_of_state_dict_are_deprecated():
    layer, into = nn.Linear(1, 1), {}
    with pytest.warns(FutureWarning, match="positional"):
        assert layer.state_dict(into, "a.") is into
    assert list(into) == ["a.weight", "a.bias"] == list(layer.state_dict(prefix="a."))


def test_load_state_dict_assign():
    net = nn.Linear(2, 2)
    state = {"weight": vt.ones(2, 2, dtype=vt.float64), "bias": vt.zeros(2)}
    net.load_state_dict(state, assign=True)
    assert net.weight.dtype is vt.float64 and isinstance(net.weight, nn.Parameter)
    assert net.weight.data_ptr() == state["weight"].data_ptr() and net.weight.requires_grad
    weight = net.weight
    net.load_state_dict({"weight": vt.zeros(2, 2), "bias": vt.ones(2)})
    assert net.weight is weight and bool((weight == 0).all())


def test_a_reparametrised_layer_uses_its_attribute():
    layer = nn.Linear(2, 2, bias=False)
    weight = layer.weight
    del layer.weight
    layer.weight = weight.detach() * 0 + 1
    assert bool((layer(vt.ones(1, 2)) == 2).all())


def test_module_without_forward_or_init():
    with pytest.raises(NotImplementedError, match="forward"):
        nn.Module()(1)

    class NoInit(nn.Module):
        def __init__(self):
            self.layer = nn.Linear(1, 1)

    with pytest.raises(AttributeError, match="before Module.__init__"):
        NoInit()
    with pytest.raises(TypeError):
        nn.Module(1)


class Slotted(nn.Module):
    __slots__ = ("factor",)

    def __init__(self) -> None:
        super().__init__()
        self.factor = 3


def test_modules_with_slots_copy_and_pickle() -> None:
    module = Slotted()
    for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.factor == 3 and other.training
