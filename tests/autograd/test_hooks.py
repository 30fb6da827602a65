"""Hooks on tensors, nodes and accumulated gradients, retain_grad, and saved-tensor hooks."""

from __future__ import annotations

import gc

import pytest

import vibetensor.torch as vt


def leaf(api, *values):
    return api.tensor(values or (1.0, 2.0, 3.0), requires_grad=True)


def test_tensor_hook_sees_and_replaces_the_gradient(api) -> None:
    x = leaf(api)
    y = x * 2
    seen = []
    y.register_hook(lambda g: seen.append(g.tolist()))
    y.register_hook(lambda g: g * 10)
    y.register_hook(lambda g: seen.append(g.tolist()))
    y.sum().backward()
    assert seen == [[1.0] * 3, [10.0] * 3]
    assert x.grad.tolist() == [20.0] * 3


def test_hook_on_a_leaf_runs_before_accumulation_and_for_grad(api) -> None:
    x = leaf(api)
    x.grad = api.ones(3)
    handle = x.register_hook(lambda g: g * 10)
    (x * 2).sum().backward()
    assert x.grad.tolist() == [21.0] * 3
    assert api.autograd.grad((x * 2).sum(), x)[0].tolist() == [20.0] * 3
    handle.remove()
    handle.remove()
    (x * 2).sum().backward()
    assert x.grad.tolist() == [23.0] * 3


def test_handle_is_a_context_manager(api) -> None:
    x = leaf(api)
    with x.register_hook(lambda g: g * 10):
        (x * 1).sum().backward()
    (x * 1).sum().backward()
    assert x.grad.tolist() == [11.0] * 3


def test_hook_runs_once_on_the_whole_gradient(api) -> None:
    x = leaf(api)
    y = x * 1
    seen = []
    y.register_hook(lambda g: seen.append(g.tolist()))
    (y.sum() + (y * y).sum()).backward()
    assert seen == [[3.0, 5.0, 7.0]]


def test_hooks_refuse_what_has_no_gradient(api) -> None:
    plain = api.ones(2)
    for register in (
        plain.register_hook,
        plain.register_post_accumulate_grad_hook,
    ):
        with pytest.raises(RuntimeError, match="doesn't require gradient"):
            register(lambda g: None)
    with pytest.raises(RuntimeError, match="non-leaf"):
        (leaf(api) * 2).register_post_accumulate_grad_hook(lambda t: None)


def test_post_accumulate_hook(api) -> None:
    x = leaf(api)
    seen = []

    def step(parameter):
        seen.append((parameter is x, parameter.grad.tolist()))
        parameter.grad = None

    handle = x.register_post_accumulate_grad_hook(step)
    (x * 2).sum().backward()
    (x * 3).sum().backward(inputs=[x])
    assert seen == [(True, [2.0] * 3), (True, [3.0] * 3)] and x.grad is None
    api.autograd.grad((x * 3).sum(), x)
    assert len(seen) == 2
    handle.remove()
    (x * 2).sum().backward()
    assert len(seen) == 2 and x.grad.tolist() == [2.0] * 3


def test_retain_grad(api) -> None:
    x = leaf(api)
    y = x * 2
    assert not y.retains_grad
    y.retain_grad()
    y.retain_grad()
    assert y.retains_grad and not x.retains_grad
    y.register_hook(lambda g: g * 10)
    (y * y).sum().backward(retain_graph=True)
    assert y.grad.tolist() == [40.0, 80.0, 120.0]
    with pytest.raises(
        RuntimeError, match="can't retain_grad on Tensor that has requires_grad=False"
    ):
        api.ones(1).retain_grad()
    x.retain_grad()  # a leaf keeps it anyway


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_gradient_of_a_non_leaf_is_not_kept(api) -> None:
    y = leaf(api) * 2
    y.sum().backward()
    assert y.grad is None


def test_node_hooks(api) -> None:
    x = leaf(api)
    y = (x * 2).exp()
    log = []
    before = y.grad_fn.register_prehook(lambda grads: log.append(("pre", grads[0].tolist())))
    after = y.grad_fn.register_hook(
        lambda inputs, outputs: log.append(("post", len(inputs), outputs[0].tolist()))
    )
    y.sum().backward(retain_graph=True)
    assert log == [("pre", [1.0] * 3), ("post", 1, [1.0] * 3)]
    before.remove()
    after.remove()
    first = x.grad.clone()
    y.grad_fn.register_prehook(lambda grads: (grads[0] * 2,))
    y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * 3,))
    y.sum().backward()
    assert len(log) == 2
    assert x.grad.tolist() == pytest.approx((first * 7).tolist())


def test_nodes_can_be_walked(api) -> None:
    x = leaf(api)
    y = (x * 2).sum()
    names = []
    node = y.grad_fn
    while node is not None:
        names.append(node.name().rstrip("0"))
        node = node.next_functions[0][0] if node.next_functions else None
    assert len(names) == 3 and names[0].startswith("Sum") and "AccumulateGrad" in names[2]
    assert names[1] == "MulBackward"
    assert y.grad_fn.next_functions[0][0].next_functions[0][0].variable is x
    edge = api.autograd.graph.get_gradient_edge(y)
    assert edge.node is y.grad_fn and edge.output_nr == 0


def test_error_in_a_hook_surfaces_and_the_graph_can_be_used_again(api) -> None:
    x = leaf(api)
    y = (x * x).sum()
    handle = y.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.backward(retain_graph=True)
    handle.remove()
    y.backward()
    assert x.grad.tolist() == [2.0, 4.0, 6.0]


def test_hook_may_run_backward(api) -> None:
    x, z = leaf(api), leaf(api, 5.0)

    def inner(g):
        with api.enable_grad():
            (z * z).backward()

    y = x * 2
    y.register_hook(inner)
    y.sum().backward()
    assert z.grad.tolist() == [10.0] and x.grad.tolist() == [2.0] * 3


@pytest.mark.parametrize("kind", ["leaf", "intermediate", "node", "accumulated"])
def test_hook_may_remove_itself_and_others(api, kind) -> None:
    x = leaf(api)
    y = x * 2
    target = {
        "leaf": x.register_hook,
        "intermediate": y.register_hook,
        "node": y.grad_fn.register_prehook,
        "accumulated": x.register_post_accumulate_grad_hook,
    }[kind]
    calls = []
    handles = []

    def remove_all(_):
        calls.append(len(handles))
        for handle in handles:
            handle.remove()

    handles += [target(remove_all) for _ in range(20)]
    y.sum().backward(retain_graph=True)
    first = len(calls)
    assert first >= 1
    y.sum().backward()
    assert len(calls) == first and x.grad.tolist() == [4.0] * 3


def test_hook_of_the_wrong_kind(api) -> None:
    x = leaf(api)
    with x.register_hook(lambda g: "text"), pytest.raises(TypeError):
        (x * 2).sum().backward()


# Saved tensors


def test_saved_tensors_hooks_pack_and_unpack(api) -> None:
    x = leaf(api)
    packed, unpacked = [], []

    def pack(t):
        packed.append(t.tolist())
        return ("box", t.detach().clone())

    def unpack(box):
        unpacked.append(box[0])
        return box[1]

    with api.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = x.exp()
        z = (y * x).sum()
    after = x.cos()
    z.backward()
    after.sum().backward()
    assert len(packed) == 3 and unpacked == ["box"] * 3
    expected = (x.detach().exp() * (1 + x.detach()) - x.detach().sin()).tolist()
    assert x.grad.tolist() == pytest.approx(expected)


def test_saved_tensors_hooks_nest_innermost_first(api) -> None:
    hooks = api.autograd.graph.saved_tensors_hooks
    x = leaf(api)
    with hooks(lambda t: "outer", lambda _: api.zeros(3)):
        with hooks(lambda t: "inner", lambda _: api.ones(3)):
            a = x.square()
        b = x.square()
    assert api.autograd.grad(a.sum(), x)[0].tolist() == [2.0] * 3
    assert api.autograd.grad(b.sum(), x)[0].tolist() == [0.0] * 3


def test_saved_tensors_hooks_keep_double_backward(api) -> None:
    x = leaf(api)
    with api.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        y = x**3
    (g,) = api.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = api.autograd.grad(g.sum(), x)
    assert second.tolist() == [6.0, 12.0, 18.0]


def test_error_in_a_pack_hook(api) -> None:
    def fail(t):
        raise KeyError("pack")

    x = leaf(api)
    with api.autograd.graph.saved_tensors_hooks(fail, lambda t: t):
        with pytest.raises(KeyError, match="pack"):
            x.exp()
        assert (x + 1).tolist() == [2.0, 3.0, 4.0]  # saves nothing
    x.exp().sum().backward()


def test_save_on_cpu(api) -> None:
    x = leaf(api)
    with api.autograd.graph.save_on_cpu():
        y = (x * x).sum()
    y.backward()
    assert x.grad.tolist() == [2.0, 4.0, 6.0]


def test_saved_tensor_hooks_do_not_see_python_numbers(api) -> None:
    x = leaf(api)
    packed = []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor.detach()

    with api.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = (x**3).sum()
    assert set(packed) == {(3,)}
    y.backward()
    assert x.grad.tolist() == [3.0, 12.0, 27.0]


def test_hooks_of_tensors_run_before_those_of_their_nodes(api) -> None:
    order: list[str] = []
    x = api.tensor([1.0, 2.0], requires_grad=True)
    y = x * 2
    accumulate = y.grad_fn.next_functions[0][0]
    for name, node, tensor in (("y", y.grad_fn, y), ("x", accumulate, x)):
        node.register_prehook(lambda grads, name=name: order.append(f"before node of {name}"))
        node.register_hook(lambda *grads, name=name: order.append(f"after node of {name}"))
        tensor.register_hook(lambda grad, name=name: order.append(name))
    x.register_post_accumulate_grad_hook(lambda leaf: order.append("accumulated"))
    y.sum().backward()
    assert order == ["y", "before node of y", "after node of y",
                     "x", "before node of x", "accumulated", "after node of x"]  # fmt: skip


def test_retained_gradient_has_passed_hooks_of_the_tensor_only(api) -> None:
    x = api.tensor([1.0, 2.0], requires_grad=True)
    y = x * 2
    y.grad_fn.register_prehook(lambda grads: (grads[0] * 10,))
    y.register_hook(lambda grad: grad + 1)
    y.retain_grad()
    y.sum().backward()
    assert y.grad.tolist() == [2.0, 2.0] and x.grad.tolist() == [40.0, 40.0]


def test_prehook_runs_only_with_its_node(api) -> None:
    calls: list[str] = []
    x = api.tensor([1.0, 2.0], requires_grad=True)
    y = x * 2
    y.grad_fn.register_prehook(lambda grads: calls.append("y"))
    accumulate = y.grad_fn.next_functions[0][0]
    accumulate.register_prehook(lambda grads: calls.append("x"))
    api.autograd.grad(y.sum(), y)
    assert calls == []
    api.autograd.grad(y.sum(), x, retain_graph=True)
    assert calls == ["y"]
    y.sum().backward(inputs=[x])
    assert calls == ["y", "y", "x"]


def test_hooks_must_keep_dtype_and_return_tensors(api) -> None:
    x = leaf(api)
    handle = x.register_hook(lambda g: g.double())
    with pytest.raises(RuntimeError, match="has changed the type of"):
        (x * 2).sum().backward()
    handle.remove()
    y = x * 2
    y.grad_fn.register_prehook(lambda grads: (3,))
    with pytest.raises((TypeError, RuntimeError)):
        y.sum().backward()
    (x * 2).sum().backward()
    assert x.grad.tolist() == [2.0] * 3


def live() -> dict[str, int]:
    gc.collect()
    return vt._C._live_counts()


def test_hooks_that_lead_back_to_their_tensor_do_not_keep_it() -> None:
    class Model(vt.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = vt.nn.Linear(5, 5)
            for p in self.parameters():
                p.register_hook(self.on_gradient)
                p.register_post_accumulate_grad_hook(self.after)

        def on_gradient(self, grad) -> None: ...

        def after(self, p) -> None: ...

    before = live()
    for _ in range(3):
        model = Model()
        model.layer(vt.ones(2, 5)).sum().backward()
        del model
    x = vt.ones(3, requires_grad=True)
    holder = [x]
    x.register_hook(lambda grad, holder=holder: holder[0] * 0)
    del x, holder
    assert live() == before


def test_handles_of_tensors_that_were_collected() -> None:
    """The collector takes the hooks away; a handle that is left has nothing to remove."""
    before = live()
    handles = []
    for _ in range(20):
        x = vt.ones(3, requires_grad=True)
        x.register_hook(lambda grad, holder=[x]: holder[0] * 0)
        handles.append(x.register_hook(print))
        handles.append(x.register_post_accumulate_grad_hook(print))
        del x
    assert live() == before
    others = [vt.ones(3, requires_grad=True) for _ in range(20)]  # in the memory of those
    calls = []
    for other in others:
        other.register_hook(lambda grad: calls.append(grad))
    for handle in handles:
        handle.remove()
    sum(other.sum() for other in others).backward()
    assert len(calls) == len(others)


def test_hooks_survive_the_collector() -> None:
    x = vt.ones(3, requires_grad=True)
    calls = []
    x.register_hook(lambda grad: calls.append(x.shape[0]))
    x.register_post_accumulate_grad_hook(lambda p: calls.append(p is x))
    for _ in range(2):
        gc.collect()
        (x * 2).sum().backward()
    y = x * 3  # the graph holds the tensor, too
    gc.collect()
    y.sum().backward()
    assert calls == [3, True] * 3


def test_handles_keep_neither_tensors_nor_graphs() -> None:
    before = live()
    x = vt.ones(1000, requires_grad=True)
    y = (x * 2).exp()
    handles = [
        x.register_hook(print),
        x.register_post_accumulate_grad_hook(print),
        y.register_hook(print),
        y.grad_fn.register_hook(print),
        y.grad_fn.register_prehook(print),
    ]
    del x, y
    assert live() == before
    for handle in handles:
        handle.remove()
        handle.remove()


def test_every_kind_of_handle_takes_its_hook_away(api) -> None:
    calls = []
    x = api.ones(3, requires_grad=True)
    y = x * 2
    node = y.grad_fn
    handles = [
        x.register_hook(lambda g: calls.append("leaf")),
        x.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated")),
        y.register_hook(lambda g: calls.append("tensor")),
        node.register_hook(lambda *_: calls.append("node")),
        node.register_prehook(lambda *_: calls.append("before node")),
    ]
    y.sum().backward(retain_graph=True)
    assert sorted(calls) == ["accumulated", "before node", "leaf", "node", "tensor"]
    calls.clear()
    for handle in handles:
        handle.remove()
    y.sum().backward(retain_graph=True)
    assert calls == []

    def once(grad) -> None:
        handle.remove()
        calls.append("once")

    handle = y.register_hook(once)
    for _ in range(3):
        y.sum().backward(retain_graph=True)
    assert calls == ["once"]
