"""Schedules against torch: the same rates and momenta, bit for bit, at every step."""

import copy
import io
import json
import warnings

import pytest

import vibetensor.torch as vt


def lambda_a(epoch):
    return 0.95**epoch


def lambda_b(epoch):
    return 1.0 / (1 + epoch)


class Warmup:
    """A callable object: its attributes are part of the state dict."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, epoch):
        return min(1.0, (epoch + 1) / self.steps)


def sequential(api, optimizer):
    s = api.optim.lr_scheduler
    parts = [
        s.LinearLR(optimizer, 0.1, 1.0, 4),
        s.CosineAnnealingLR(optimizer, 8),
        s.ExponentialLR(optimizer, 0.9),
    ]
    return s.SequentialLR(optimizer, parts, milestones=[4, 12])


def nested(api, optimizer):
    s = api.optim.lr_scheduler
    inner = s.SequentialLR(
        optimizer,
        [s.ConstantLR(optimizer, 0.5, 2), s.StepLR(optimizer, 2, 0.5)],
        milestones=[3],
    )
    return s.SequentialLR(optimizer, [inner, s.ConstantLR(optimizer, 0.1, 3)], milestones=[8])


def ending_in_milestones(api, optimizer):
    s = api.optim.lr_scheduler
    parts = [s.ConstantLR(optimizer), s.MultiStepLR(optimizer, [3, 6])]
    return s.SequentialLR(optimizer, parts, milestones=[7])


def chained(api, optimizer):
    s = api.optim.lr_scheduler
    return s.ChainedScheduler(
        [s.ConstantLR(optimizer, 0.1, 4), s.ExponentialLR(optimizer, 0.9)], optimizer
    )


def by_name(name, *args, **kwargs):
    def make(api, optimizer):
        return getattr(api.optim.lr_scheduler, name)(optimizer, *args, **kwargs)

    make.__name__ = name
    return make


SCHEDULES = [
    by_name("StepLR", 3),
    by_name("StepLR", step_size=4, gamma=0.5),
    by_name("MultiStepLR", [2, 5, 5, 11]),
    by_name("ExponentialLR", 0.9),
    by_name("ConstantLR"),
    by_name("ConstantLR", factor=0.25, total_iters=7),
    by_name("LinearLR"),
    by_name("LinearLR", 0.2, 0.7, total_iters=10),
    by_name("PolynomialLR", total_iters=9, power=2.0),
    by_name("CosineAnnealingLR", 7),
    by_name("CosineAnnealingLR", T_max=20, eta_min=0.01),
    by_name("CosineAnnealingWarmRestarts", 4),
    by_name("CosineAnnealingWarmRestarts", 3, T_mult=2, eta_min=0.001),
    by_name("LambdaLR", lambda_a),
    by_name("LambdaLR", [lambda_a, lambda_b]),
    by_name("LambdaLR", Warmup(6)),
    by_name("MultiplicativeLR", lambda_a),
    by_name("OneCycleLR", 0.5, total_steps=25),
    by_name("OneCycleLR", [0.5, 0.7], epochs=5, steps_per_epoch=6, anneal_strategy="linear"),
    by_name("OneCycleLR", 0.5, total_steps=30, three_phase=True, pct_start=0.4),
    by_name("OneCycleLR", 0.5, total_steps=30, cycle_momentum=False),
    by_name("CyclicLR", 0.01, 0.2, step_size_up=4),
    by_name("CyclicLR", 0.01, 0.2, step_size_up=3, step_size_down=5, mode="triangular2"),
    by_name("CyclicLR", 0.01, 0.2, step_size_up=4, mode="exp_range", gamma=0.98),
    by_name("CyclicLR", 0.01, 0.2, step_size_up=4, scale_fn=lambda_b),
    sequential,
    nested,
    ending_in_milestones,
    chained,
]
SCHEDULE_IDS = [f"{i}-{make.__name__}" for i, make in enumerate(SCHEDULES)]


def make_optimizer(api, kind):
    a, b = (api.nn.Parameter(api.zeros(1)) for _ in range(2))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.3}]
    if kind == "SGD":
        return api.optim.SGD(groups, lr=0.1, momentum=0.9)
    return api.optim.AdamW(groups, lr=0.1)


def settings(optimizer):
    return [
        (g["lr"], g.get("momentum"), g.get("betas"), g["initial_lr"])
        for g in optimizer.param_groups
    ]


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("make", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_follows_torch(make, kind, torch):
    ours, theirs = make_optimizer(vt, kind), make_optimizer(torch, kind)
    a, b = make(vt, ours), make(torch, theirs)
    for _ in range(25):
        assert settings(ours) == settings(theirs)
        assert a.get_last_lr() == b.get_last_lr()
        ours.step()
        theirs.step()
        a.step()
        b.step()


@pytest.mark.parametrize("make", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_state_dict_is_torchs_and_resumes(make, torch):
    ours, theirs = make_optimizer(vt, "SGD"), make_optimizer(torch, "SGD")
    a, b = make(vt, ours), make(torch, theirs)
    for _ in range(6):
        ours.step()
        a.step()
        theirs.step()
        b.step()

    def plain(state):
        private = ("_scale_fn_ref", "_scale_fn_custom")
        return {
            k: [plain(s) for s in v] if k == "_schedulers" else v
            for k, v in state.items()
            if k not in private
        }

    assert plain(a.state_dict()) == plain(b.state_dict())

    resumed = make_optimizer(vt, "SGD")
    c = make(vt, resumed)
    resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    for _ in range(8):
        for optimizer, scheduler in ((ours, a), (resumed, c)):
            optimizer.step()
            scheduler.step()
        assert settings(ours) == settings(resumed)


def through_json(state):
    return json.loads(json.dumps(state))


def through_save(state):
    file = io.BytesIO()
    vt.save(state, file)
    file.seek(0)
    return vt.load(file)


@pytest.mark.parametrize("store", [through_json, through_save])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("make", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_a_stored_state_resumes(make, kind, store):
    whole = make_optimizer(vt, kind)
    a = make(vt, whole)
    for _ in range(6):
        whole.step()
        a.step()
    resumed = make_optimizer(vt, kind)
    c = make(vt, resumed)
    resumed.load_state_dict(store(whole.state_dict()))
    c.load_state_dict(store(a.state_dict()))
    for _ in range(12):
        for optimizer, scheduler in ((whole, a), (resumed, c)):
            optimizer.step()
            scheduler.step()
        assert rates_and_momenta(whole) == rates_and_momenta(resumed)
        assert a.get_last_lr() == c.get_last_lr()


def rates_and_momenta(optimizer):
    return [(lr, m, betas and list(betas)) for lr, m, betas, _ in settings(optimizer)]


@pytest.mark.parametrize("store", [through_json, through_save])
def test_a_stored_state_of_a_plateau_resumes(store):
    made = []
    for _ in range(2):
        optimizer = make_optimizer(vt, "SGD")
        made.append(vt.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1))
    whole, resumed = made
    resumed.load_state_dict(store(whole.state_dict()))  # its best metric is still infinite
    for metric in (1.0, 1.1, 1.2, 1.3, 0.5, 0.6, 0.7):
        whole.step(metric)
        resumed.step(metric)
        resumed.load_state_dict(store(whole.state_dict()))
        assert whole.get_last_lr() == resumed.get_last_lr()


@pytest.mark.parametrize("make", SCHEDULES[:-4], ids=SCHEDULE_IDS[:-4])
def test_last_epoch_resumes_like_torch(make, torch):
    def rates(api):
        first = make_optimizer(api, "SGD")
        scheduler = make(api, first)
        for _ in range(4):
            first.step()
            scheduler.step()
        second = make_optimizer(api, "SGD")
        second.load_state_dict(first.state_dict())
        name, kwargs = type(scheduler).__name__, {}
        again = make.__closure__
        cells = dict(zip(make.__code__.co_freevars, (c.cell_contents for c in again), strict=True))
        kwargs = {**cells["kwargs"], "last_epoch": scheduler.last_epoch}
        resumed = getattr(api.optim.lr_scheduler, name)(second, *cells["args"], **kwargs)
        seen = [settings(second)]
        for _ in range(5):
            second.step()
            resumed.step()
            seen.append(settings(second))
        return seen

    assert rates(vt) == rates(torch)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patience": 1, "factor": 0.5},
        {"mode": "max", "patience": 0, "cooldown": 2},
        {"threshold_mode": "abs", "threshold": 0.2, "patience": 1, "min_lr": 0.02},
        {"mode": "max", "threshold_mode": "abs", "threshold": 0.2, "patience": 1},
        {"patience": 0, "min_lr": [0.05, 0.01]},
    ],
)
def test_reduce_on_plateau(options, torch):
    metrics = [1.0, 0.9, 0.95, 0.94, 0.93, 0.5, 0.5, 0.6, 0.7, 0.4, 0.45, 0.5, 0.5, 0.5, 0.5, 0.6]
    ours, theirs = make_optimizer(vt, "SGD"), make_optimizer(torch, "SGD")
    a = vt.optim.lr_scheduler.ReduceLROnPlateau(ours, **options)
    b = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, **options)
    for metric in metrics:
        a.step(vt.tensor(metric))
        b.step(torch.tensor(metric))
        assert a.get_last_lr() == b.get_last_lr()
    state = {k: v for k, v in b.state_dict().items() if k != "optimizer"}
    assert {k: v for k, v in a.state_dict().items() if k != "optimizer"} == state


def test_fractional_epochs_of_warm_restarts(torch):
    ours, theirs = make_optimizer(vt, "SGD"), make_optimizer(torch, "SGD")
    a = vt.optim.lr_scheduler.CosineAnnealingWarmRestarts(ours, 3, T_mult=2)
    b = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(theirs, 3, T_mult=2)
    for i in range(40):
        a.step(i / 4)
        b.step(i / 4)
        assert a.get_last_lr() == b.get_last_lr()


def test_step_to_an_epoch_uses_the_closed_form(torch):
    for make in SCHEDULES[:10]:
        ours, theirs = make_optimizer(vt, "SGD"), make_optimizer(torch, "SGD")
        a, b = make(vt, ours), make(torch, theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for epoch in (3, 9, 2):
                a.step(epoch)
                b.step(epoch)
                assert a.get_last_lr() == b.get_last_lr()


def test_tensor_rate_is_written_in_place():
    lr = vt.tensor(0.5)
    p = vt.nn.Parameter(vt.zeros(1))
    optimizer = vt.optim.SGD([p], lr=lr)
    scheduler = vt.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25
    assert scheduler.base_lrs[0].item() == 0.5


def test_order_of_calls_is_checked():
    optimizer = make_optimizer(vt, "SGD")
    scheduler = vt.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()

    optimizer = make_optimizer(vt, "SGD")
    scheduler = vt.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()
        scheduler.step()


def test_get_lr_outside_of_a_step_warns():
    scheduler = vt.optim.lr_scheduler.StepLR(make_optimizer(vt, "SGD"), 1)
    with pytest.warns(UserWarning, match="get_last_lr"):
        scheduler.get_lr()


ERRORS = [
    lambda s, o: s.StepLR(None, 1),
    lambda s, o: s.LambdaLR(o, [lambda_a]),
    lambda s, o: s.ConstantLR(o, factor=2),
    lambda s, o: s.LinearLR(o, start_factor=0),
    lambda s, o: s.LinearLR(o, end_factor=2),
    lambda s, o: s.CosineAnnealingWarmRestarts(o, 0),
    lambda s, o: s.CosineAnnealingWarmRestarts(o, 1, T_mult=0),
    lambda s, o: s.OneCycleLR(o, 0.1),
    lambda s, o: s.OneCycleLR(o, 0.1, total_steps=0),
    lambda s, o: s.OneCycleLR(o, 0.1, total_steps=10, pct_start=2),
    lambda s, o: s.OneCycleLR(o, 0.1, total_steps=10, anneal_strategy="x"),
    lambda s, o: s.SequentialLR(o, [], []),
    lambda s, o: s.SequentialLR(o, [s.StepLR(o, 1)], [3]),
    lambda s, o: s.SequentialLR(o, [s.StepLR(o, 1), s.ReduceLROnPlateau(o)], [3]),
    lambda s, o: s.ReduceLROnPlateau(o, factor=1.0),
    lambda s, o: s.ReduceLROnPlateau(o, mode="x"),
    lambda s, o: s.CyclicLR(o, 0.1, 0.2, mode="x"),
    lambda s, o: s.StepLR(o, 1, last_epoch=3),
    lambda s, o: [s.OneCycleLR(o, 0.1, total_steps=2).step() for _ in range(1)] and None.x,
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors_are_torchs(case, torch):
    def error(api):
        with pytest.raises(Exception) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ERRORS[case](api.optim.lr_scheduler, make_optimizer(api, "SGD"))
        return type(caught.value)

    assert error(vt).__name__ == error(torch).__name__


def test_stepping_past_one_cycle_raises():
    optimizer = make_optimizer(vt, "SGD")
    scheduler = vt.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2)
    optimizer.step()
    scheduler.step()
    scheduler.step()
    with pytest.raises(ValueError, match="total steps is 2"):
        scheduler.step()


def test_rates_in_tensors_are_not_those_of_the_schedule(torch):
    """A schedule fills a group's tensor in place; what it was given stays."""

    def run(api, make):
        p = api.nn.Parameter(api.ones(2))
        rate = api.tensor(0.01)
        optimizer = api.optim.SGD([p], lr=rate, momentum=0.9)
        schedule = make(api.optim.lr_scheduler, optimizer, rate)
        rates = []
        for _ in range(8):
            optimizer.step()
            schedule.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return rates

    for make in (
        lambda s, o, t: s.CyclicLR(o, base_lr=t, max_lr=0.1, step_size_up=3),
        lambda s, o, t: s.OneCycleLR(o, max_lr=t, total_steps=10),
        lambda s, o, t: s.OneCycleLR(o, max_lr=[t], total_steps=10),
    ):
        assert run(vt, make) == run(torch, make)
