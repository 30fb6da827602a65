"""Optimizers against torch: the same parameters, gradients and options, step for step."""

import copy
import gc
import inspect
import pickle
import warnings
import weakref

import numpy as np
import pytest

import vibetensor.torch as vt

SHAPES = [(3, 5), (7,), (), (2, 3, 4)]

ADAM_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.05},
    {"betas": (0.5, 0.8), "eps": 1e-3, "lr": 0.1},
]
SGD_OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True},
]
CASES = (
    [("Adam", o) for o in ADAM_OPTIONS]
    + [("AdamW", o) for o in ADAM_OPTIONS]
    + [("SGD", o) for o in SGD_OPTIONS]
)


def arrays(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape), dtype=dtype) for shape in SHAPES]


def make_params(api, dtype="float32"):
    return [api.nn.Parameter(api.tensor(a)) for a in arrays(0, dtype)]


def set_grads(api, params, seed, skip=()):
    for i, (p, g) in enumerate(zip(params, arrays(seed), strict=True)):
        p.grad = None if i in skip else api.tensor(g)


def assert_close(ours, theirs, rtol=1e-5, atol=1e-6):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("form", [{}, {"foreach": False}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("name,options", CASES)
def test_follows_torch(name, options, form, torch):
    ours, theirs = make_params(vt), make_params(torch)
    a = getattr(vt.optim, name)(ours, **options, **form)
    b = getattr(torch.optim, name)(theirs, **options, foreach=False)
    for step in range(6):
        skip = (1,) if step in (2, 3) else (3,) if step == 0 else ()
        set_grads(vt, ours, step + 1, skip)
        set_grads(torch, theirs, step + 1, skip)
        a.step()
        b.step()
        assert_close(ours, theirs)
    sa, sb = a.state_dict(), b.state_dict()
    assert sa["state"].keys() == sb["state"].keys()
    for i in sa["state"]:
        assert sa["state"][i].keys() == sb["state"][i].keys()
        for key, value in sa["state"][i].items():
            assert str(value.dtype) == str(sb["state"][i][key].dtype)
            assert tuple(value.shape) == tuple(sb["state"][i][key].shape)
            assert_close([value], [sb["state"][i][key]])
    theirs_groups = [{**g, "foreach": None, "fused": None} for g in sb["param_groups"]]
    ours_groups = [{**g, "foreach": None, "fused": None} for g in sa["param_groups"]]
    assert ours_groups == theirs_groups


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_dtypes(name, dtype, torch):
    def build(api):
        params = [p.detach().to(getattr(api, dtype)).requires_grad_() for p in make_params(api)]
        for p, g in zip(params, arrays(1), strict=True):
            p.grad = api.tensor(g).to(getattr(api, dtype))
        return params

    ours, theirs = build(vt), build(torch)
    extra = {"momentum": 0.9} if name == "SGD" else {"eps": 1e-3}
    a = getattr(vt.optim, name)(ours, lr=0.01, **extra)
    b = getattr(torch.optim, name)(theirs, lr=0.01, **extra)
    for _ in range(3):
        a.step()
        b.step()
    tolerance = 1e-12 if dtype == "float64" else 2e-2
    assert all(str(p.dtype) == f"torch.{dtype}" for p in ours)
    assert_close([p.double() for p in ours], [p.double() for p in theirs], tolerance, tolerance)


def test_mixed_dtypes_in_one_group():
    ours = [vt.nn.Parameter(vt.ones(3)), vt.nn.Parameter(vt.ones(3, dtype=vt.float64))]
    optimizer = vt.optim.SGD(ours, lr=0.5)
    for p in ours:
        p.grad = vt.ones_like(p)
    optimizer.step()
    assert [p.tolist() for p in ours] == [[0.5] * 3] * 2


def test_strided_parameter_and_gradient(torch):
    def build(api):
        p = api.tensor(np.arange(12, dtype=np.float32).reshape(3, 4)).t().requires_grad_()
        p.grad = api.tensor(np.arange(12, dtype=np.float32).reshape(4, 3))
        return p

    ours, theirs = build(vt), build(torch)
    a, b = vt.optim.AdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for _ in range(3):
        a.step()
        b.step()
    assert_close([ours], [theirs])


def test_fused_is_in_the_signature(torch):
    for cls in (vt.optim.AdamW, vt.optim.Adam, vt.optim.SGD):
        signature = inspect.signature(cls)
        assert {"fused", "foreach", "differentiable", "maximize"} <= set(signature.parameters)
        reference = inspect.signature(getattr(torch.optim, cls.__name__))
        ours = [name for name in signature.parameters if name != "stochastic_rounding"]
        assert ours == list(reference.parameters)
        for name in ours:
            assert signature.parameters[name].default == reference.parameters[name].default


def test_groups_with_own_options(torch):
    def build(api):
        p = make_params(api)
        groups = [{"params": p[:2], "weight_decay": 0.5}, {"params": p[2:], "lr": 0.3}]
        return p, api.optim.AdamW(groups, lr=0.1, weight_decay=0.0)

    (ours, a), (theirs, b) = build(vt), build(torch)
    for step in range(3):
        set_grads(vt, ours, step)
        set_grads(torch, theirs, step)
        a.step()
        b.step()
    assert_close(ours, theirs)


def test_parameters_added_and_replaced_between_steps():
    """The plan of a step is dropped when what it describes changes."""
    first, second, third = (vt.nn.Parameter(vt.zeros(2)) for _ in range(3))
    optimizer = vt.optim.SGD([first], lr=1.0)
    for p in (first, second, third):
        p.grad = vt.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = third
    optimizer.step()
    assert [p.tolist() for p in (first, second, third)] == [[-2.0] * 2, [-2.0] * 2, [-1.0] * 2]


@pytest.mark.parametrize("form", [{}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("more", [{}, {"nesterov": True}, {"dampening": 0.5}])
def test_momentum_switched_on_and_off_between_steps(form, more, torch):
    ours, theirs = make_params(vt), make_params(torch)
    a = vt.optim.SGD(ours, lr=0.1, **form)
    b = torch.optim.SGD(theirs, lr=0.1, foreach=False)
    for step in range(8):
        on = {"momentum": 0.9, **more}
        off = {"momentum": 0, "nesterov": False, "dampening": 0}
        for optimizer in (a, b):
            optimizer.param_groups[0].update(on if step in (2, 3, 6, 7) else off)
        skip = (1,) if step in (2, 4) else ()
        set_grads(vt, ours, step, skip)
        set_grads(torch, theirs, step, skip)
        a.step()
        b.step()
        assert_close(ours, theirs)
        assert a.state_dict()["state"].keys() == b.state_dict()["state"].keys()


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_amsgrad_switched_on_between_steps_is_an_error_like_torchs(name, torch):
    for api in (vt, torch):
        params = make_params(api)
        optimizer = getattr(api.optim, name)(params)
        set_grads(api, params, 1)
        optimizer.step()
        optimizer.param_groups[0]["amsgrad"] = True
        with pytest.raises(KeyError, match="max_exp_avg_sq"):
            optimizer.step()


def test_state_tensors_replaced_by_hand_are_used():
    p = vt.nn.Parameter(vt.ones(2))
    optimizer = vt.optim.SGD([p], lr=1.0, momentum=1.0)
    p.grad = vt.ones(2)
    optimizer.step()
    optimizer.state[p]["momentum_buffer"] = vt.full((2,), 10.0)
    optimizer.step()
    assert p.tolist() == [-11.0, -11.0]
    optimizer.state.clear()
    optimizer.step()
    assert p.tolist() == [-12.0, -12.0]


def test_gradients_are_not_kept_alive():
    p = vt.nn.Parameter(vt.ones(2))
    optimizer = vt.optim.AdamW([p])
    p.grad = vt.ones(2)
    optimizer.step()
    grad = weakref.ref(p.grad)
    optimizer.zero_grad()
    gc.collect()
    assert p.grad is None
    assert grad() is None


def test_zero_grad_in_place():
    p = vt.nn.Parameter(vt.ones(2))
    p.grad = grad = vt.ones(2)
    vt.optim.SGD([p]).zero_grad(set_to_none=False)
    assert p.grad is grad
    assert grad.tolist() == [0.0, 0.0]


def test_closure_runs_with_gradients():
    p = vt.nn.Parameter(vt.ones(2))
    optimizer = vt.optim.SGD([p], lr=0.25)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with vt.no_grad():
        assert optimizer.step(closure).item() == 2.0
    assert p.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_differentiable(name, torch):
    """Gradients flow through an update: d(new p)/d(p) against torch's."""

    def meta_gradient(api):
        w = api.tensor([0.5, -1.0], requires_grad=True)
        p = w.clone()
        extra = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(api.optim, name)([p], lr=0.1, differentiable=True, **extra)
        p.grad = w * w
        optimizer.step()
        (p * p).sum().backward()
        return w.grad

    assert_close([meta_gradient(vt)], [meta_gradient(torch)], 1e-4)


def test_tensor_lr():
    p = vt.nn.Parameter(vt.ones(2))
    p.grad = vt.ones(2)
    lr = vt.tensor(0.5)
    optimizer = vt.optim.SGD([p], lr=lr)
    optimizer.step()
    lr.fill_(0.25)
    optimizer.step()
    assert p.tolist() == [0.25, 0.25]


# State dicts


@pytest.mark.parametrize("name,options", CASES[::3])
def test_resuming_from_a_state_dict_changes_nothing(name, options):
    make = getattr(vt.optim, name)
    ours = make_params(vt)
    a = make(ours, **options)
    for step in range(3):
        set_grads(vt, ours, step)
        a.step()
    copies = [vt.nn.Parameter(p.detach().clone()) for p in ours]
    b = make(copies, lr=123.0)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for step in range(3):
        for params, optimizer in ((ours, a), (copies, b)):
            set_grads(vt, params, step)
            optimizer.step()
    assert_close(ours, copies, 0, 0)


def test_load_casts_like_torch():
    p = vt.nn.Parameter(vt.ones(2, dtype=vt.float64))
    q = vt.nn.Parameter(vt.ones(2))
    q.grad = vt.ones(2)
    source, target = vt.optim.AdamW([q]), vt.optim.AdamW([p])
    source.step()
    target.load_state_dict(source.state_dict())
    state = target.state[p]
    assert state["exp_avg"].dtype == vt.float64
    assert state["step"].dtype == vt.float32
    assert state["step"].item() == 1.0


def test_state_dict_hooks():
    seen = []
    p = vt.nn.Parameter(vt.ones(2))
    optimizer = vt.optim.SGD([p], lr=0.1)
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, sd: {**sd, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: seen.append(sorted(sd)))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", ["extra", "param_groups", "state"], "loaded"]


def test_named_parameters():
    pairs = [("w", vt.nn.Parameter(vt.ones(2))), ("b", vt.nn.Parameter(vt.ones(1)))]
    group = vt.optim.SGD(pairs, lr=0.1).state_dict()["param_groups"][0]
    assert group["param_names"] == ["w", "b"]
    assert group["params"] == [0, 1]


def test_pickle_and_deepcopy():
    p = vt.nn.Parameter(vt.ones(2))
    p.grad = vt.ones(2)
    optimizer = vt.optim.AdamW([p], lr=0.1)
    optimizer.step()
    clone = copy.deepcopy(optimizer)
    (q,) = clone.param_groups[0]["params"]
    assert clone.state[q]["step"].item() == 1.0
    q.grad = vt.ones(2)
    clone.step()
    optimizer.step()
    assert p.tolist() == q.tolist()


# Hooks, repr, errors


def test_step_hooks():
    seen = []
    p = vt.nn.Parameter(vt.zeros(1))
    p.grad = vt.ones(1)
    optimizer = vt.optim.SGD([p], lr=1.0)
    before = optimizer.register_step_pre_hook(lambda o, a, k: seen.append(("pre", p.item())))
    optimizer.register_step_post_hook(lambda o, a, k: seen.append(("post", p.item())))
    every = vt.optim.optimizer.register_optimizer_step_post_hook(
        lambda o, a, k: seen.append("every")
    )
    optimizer.step()
    assert seen == [("pre", 0.0), ("post", -1.0), "every"]
    before.remove()
    every.remove()
    optimizer.step()
    assert seen[3:] == [("post", -2.0)]


@pytest.mark.parametrize("library", ["vibetensor", "torch"])
def test_step_hooks_get_and_give_all_arguments(library, torch):
    api = vt if library == "vibetensor" else torch
    p = api.nn.Parameter(api.zeros(1))
    p.grad = api.ones(1)
    optimizer = api.optim.SGD([p], lr=1.0)
    counts = []
    optimizer.register_step_post_hook(lambda o, args, kwargs: counts.append(len(args)))
    optimizer.step()
    optimizer.step(lambda: 2.0)
    optimizer.step(closure=lambda: 2.0)
    assert counts == [1, 2, 1]

    def other_closure(o, args, kwargs):
        itself, *_ = args
        assert itself is optimizer
        return (itself, lambda: 5.0), kwargs

    optimizer.register_step_pre_hook(other_closure)
    assert optimizer.step() == 5.0


def test_hooks_run_once_for_a_subclass_that_calls_super():
    class Twice(vt.optim.SGD):
        def step(self, closure=None):
            super().step()
            return super().step(closure)

    p = vt.nn.Parameter(vt.zeros(1))
    p.grad = vt.ones(1)
    optimizer = Twice([p], lr=1.0)
    count = []
    optimizer.register_step_post_hook(lambda *a: count.append(1))
    optimizer.step()
    assert count == [1]
    assert p.item() == -2.0


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_repr(name, torch):
    ours = getattr(vt.optim, name)(make_params(vt), lr=0.01)
    theirs = getattr(torch.optim, name)(make_params(torch), lr=0.01)
    assert repr(ours) == repr(theirs)


def test_repr_of_groups(torch):
    def made(api):
        groups = [{"params": [p]} for p in make_params(api)]
        return api.optim.SGD(groups, lr=0.01)

    assert repr(made(vt)) == repr(made(torch))


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_infinite_weights_stay_infinite(name, decay, options, torch):
    def run(api):
        p = api.nn.Parameter(api.tensor([float("inf"), 1.0, -float("inf")]))
        optimizer = getattr(api.optim, name)([p], lr=0.1, weight_decay=decay, **options)
        for _ in range(2):
            p.grad = api.ones(3)
            optimizer.step()
        return p.detach().numpy()

    np.testing.assert_allclose(run(vt), run(torch), rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_autograd_through_several_steps(name, decay, torch):
    def run(api):
        p = api.nn.Parameter(api.ones(2, dtype=api.float64))
        w = p * 1.0
        options = {"differentiable": True, "weight_decay": decay}
        optimizer = getattr(api.optim, name)([w], lr=0.1, **options)
        for _ in range(3):
            (w.grad,) = api.autograd.grad((w.clone() ** 3).sum(), w, create_graph=True)
            optimizer.step()
        w.sum().backward()
        return p.grad.numpy()

    # Step counts, and so bias corrections, are float32.
    np.testing.assert_allclose(run(vt), run(torch), rtol=1e-6)


def test_autograd_to_options_of_a_step(torch):
    def decay(api):
        value = api.tensor(0.1, dtype=api.float64, requires_grad=True)
        w = api.ones(2, dtype=api.float64, requires_grad=True) * 1.0
        w.grad = api.zeros(2, dtype=api.float64)
        api.optim.SGD([w], lr=0.1, weight_decay=value, differentiable=True).step()
        w.sum().backward()
        return value.grad.item()

    def betas(api):
        values = [api.tensor(v, dtype=api.float64, requires_grad=True) for v in (0.9, 0.99)]
        w = api.ones(2, dtype=api.float64, requires_grad=True) * 1.0
        rate = api.tensor(0.1, dtype=api.float64)
        optimizer = api.optim.Adam([w], lr=rate, betas=tuple(values), differentiable=True)
        for k in (2.0, 3.0):
            w.grad = w.detach() * k
            optimizer.step()
        w.sum().backward()
        return [v.grad.item() for v in values]

    for run in (decay, betas):
        np.testing.assert_allclose(run(vt), run(torch), rtol=1e-6)


ERRORS = [
    lambda t, p: t.optim.AdamW([]),
    lambda t, p: t.optim.AdamW(p),
    lambda t, p: t.optim.AdamW([p], lr=-1),
    lambda t, p: t.optim.AdamW([p], eps=-1),
    lambda t, p: t.optim.AdamW([p], betas=(1.0, 0.9)),
    lambda t, p: t.optim.AdamW([p], betas=(0.1, -0.9)),
    lambda t, p: t.optim.AdamW([p], weight_decay=-1),
    lambda t, p: t.optim.AdamW([{"params": [p]}, {"params": [p]}]),
    lambda t, p: t.optim.AdamW([p * 2]),
    lambda t, p: t.optim.AdamW([1]),
    lambda t, p: t.optim.AdamW([{"params": {p}}]),
    lambda t, p: t.optim.AdamW([p], fused=True, foreach=True),
    lambda t, p: t.optim.AdamW([p], fused=True, differentiable=True),
    lambda t, p: t.optim.AdamW([p], lr=t.tensor([0.1, 0.2])),
    lambda t, p: t.optim.AdamW([p], lr=t.tensor(0.1), foreach=True),
    lambda t, p: t.optim.AdamW([p], betas=(t.tensor(0.1), 0.2)),
    lambda t, p: t.optim.SGD([p], lr=-1),
    lambda t, p: t.optim.SGD([p], momentum=-1),
    lambda t, p: t.optim.SGD([p], weight_decay=-1),
    lambda t, p: t.optim.SGD([p], nesterov=True),
    lambda t, p: t.optim.SGD([p]).load_state_dict({"state": {}, "param_groups": []}),
    lambda t, p: t.optim.SGD([p]).load_state_dict(
        {"state": {}, "param_groups": [{"params": [0, 1]}]}
    ),
    lambda t, p: t.optim.SGD([{"lr": 1}]),
    lambda t, p: t.optim.SGD([("a", p), t.nn.Parameter(t.ones(2))]),
    lambda t, p: t.optim.SGD([p]).add_param_group([1]),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors_are_torchs(case, torch):
    def error(api):
        with pytest.raises(Exception) as caught:
            ERRORS[case](api, api.nn.Parameter(api.ones(2)))
        return type(caught.value).__name__, str(caught.value)

    assert error(vt) == error(torch)


def test_duplicate_parameters_warn_and_update_once_each():
    p = vt.nn.Parameter(vt.zeros(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = vt.optim.SGD([p, p], lr=1.0)
    p.grad = vt.ones(2)
    optimizer.step()
    assert p.tolist() == [-2.0, -2.0]


def test_step_without_gradients_does_nothing():
    p = vt.nn.Parameter(vt.ones(2))
    optimizer = vt.optim.AdamW([p])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert p.tolist() == [1.0, 1.0]
    assert optimizer.state_dict()["state"] == {}


def test_base_class_step_is_not_implemented():
    with pytest.raises(NotImplementedError, match="Optimizer"):
        vt.optim.Optimizer([vt.nn.Parameter(vt.ones(1))], {}).step()


def test_handle_pickles():
    optimizer = vt.optim.SGD([vt.nn.Parameter(vt.ones(1))], lr=1.0)
    handle = optimizer.register_step_pre_hook(print)
    clone = pickle.loads(pickle.dumps(handle))
    assert clone.id == handle.id
    assert vt.utils.hooks.RemovableHandle(optimizer._optimizer_step_pre_hooks).id > handle.id


def test_required_options():
    p = vt.nn.Parameter(vt.ones(1))
    with pytest.raises(ValueError, match="required optimization parameter lr"):
        vt.optim.Optimizer([p], {"lr": vt.optim.optimizer.required})


@pytest.mark.parametrize("at", range(3))
def test_a_first_step_that_fails_half_way_can_be_done_again(at):
    """As without memory for the moments of one parameter."""
    fresh, failed = ([vt.nn.Parameter(vt.ones(2)) for _ in range(2)] for _ in range(2))
    optimizers = [vt.optim.AdamW(params) for params in (fresh, failed)]
    for p in (*fresh, *failed):
        p.grad = vt.full((2,), 0.5)
    left = [at]

    def fail(original, name, args):
        left[0] -= 1
        if left[0] == -1:
            raise MemoryError
        return original()

    with vt.library.override("zeros_like", fail), pytest.raises(MemoryError):
        optimizers[1].step()
    for optimizer in optimizers:
        optimizer.step()
    assert [p.tolist() for p in failed] == [p.tolist() for p in fresh]
