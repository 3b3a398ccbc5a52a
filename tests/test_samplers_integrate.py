"""The solvers: order, direction, cost, tolerance, callback, dtypes, non-finite states, errors."""

import importlib.util
import math
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diff2flow_nodes.samplers import SOLVERS, Counted, NonFiniteStateError, evaluations, integrate, time_grid

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 2}
every_fixed_solver = pytest.mark.parametrize("solver", ORDERS)
every_solver = pytest.mark.parametrize("solver", SOLVERS)

START = torch.tensor([[0.5, 1.0], [1.5, 2.0]], dtype=torch.float64)


def bend(x, t):
    """Smooth, nonlinear, depends on t: dx/dt = -x²·cos(2t), solved by 1/(1/x_0 + sin(2t)/2)."""
    return -(x**2) * torch.cos(2 * t)


def bend_solution(t, start=START):
    return 1 / (1 / start + math.sin(2 * t) / 2)


def bend_error(solver, times, start=START):
    found = integrate(bend, bend_solution(times[0].item(), start), times, solver)
    return (found - bend_solution(times[-1].item(), start)).abs().max().item()


@every_fixed_solver
@pytest.mark.parametrize("shape", ["uniform", "cosine", "u_shaped", "alternating"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_observed_order(solver, shape, direction):
    """Also where each step is three times, then a third of, the one before: that is hard on ab2."""

    def error(steps):
        if shape == "alternating":
            lengths = torch.tensor([1.0, 3.0] * (steps // 2), dtype=torch.float64)
            times = torch.cat([torch.zeros(1, dtype=torch.float64), lengths.cumsum(0) / lengths.sum()])
        else:
            times = time_grid(steps, shape)
        return bend_error(solver, times if direction == "forward" else times.flip(0))

    assert math.log2(error(128) / error(256)) == pytest.approx(ORDERS[solver], abs=0.2)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_dopri5_meets_its_tolerance(direction, tolerance):
    times = time_grid(4)
    times = times if direction == "forward" else times.flip(0)
    start = bend_solution(times[0].item())
    found = integrate(bend, start, times, "dopri5", rtol=tolerance, atol=tolerance)
    end = bend_solution(times[-1].item())
    # The tolerance holds in each inner step; over four intervals the errors add up to a few times that.
    assert ((found - end).abs() / (tolerance + tolerance * end.abs())).max() <= 5
    assert not torch.equal(found, end)


def test_dopri5_takes_the_steps_its_tolerance_asks_for():
    cost = []
    for tolerance in (1e-3, 1e-10):
        counted = Counted(lambda x, t: bend(x, t) + torch.cos(20 * t))
        integrate(counted, START, time_grid(2), "dopri5", rtol=tolerance, atol=tolerance)
        cost.append(counted.evaluations)
    assert 2 * 7 <= cost[0] < cost[1] / 3


def test_dopri5_smooth_intervals_cost_seven_evaluations():
    counted = Counted(bend)
    integrate(counted, START, time_grid(8), "dopri5")
    assert counted.evaluations == 8 * 7


@every_solver
def test_the_velocity_is_never_asked_for_outside_the_interval(solver):
    seen = []

    def slow(x, t):
        seen.append(t.item())
        return torch.full_like(x, 1e-4)  # so slow that an adaptive solver would like longer steps

    for times in (time_grid(5), time_grid(5).flip(0), time_grid(3, start=0.3, end=0.6)):
        seen.clear()
        integrate(slow, START, times, solver)
        assert min(seen) >= times.min() and max(seen) <= times.max()


@every_solver
def test_the_whole_batch_is_one_call(solver):
    shapes, times_seen = [], []

    def velocity(x, t):
        shapes.append(x.shape)
        times_seen.append((t.shape, t.dtype, t.device))
        return -x

    x = torch.randn(5, 4, 2, 3, 3)
    result = integrate(velocity, x, time_grid(3), solver)
    assert set(shapes) == {x.shape} and {(shape, device) for shape, _, device in times_seen} == {((), x.device)}
    assert result.shape == x.shape
    if solver != "dopri5":
        assert {dtype for _, dtype, _ in times_seen} == {torch.float64}
        single = torch.cat([integrate(velocity, x[i : i + 1], time_grid(3), solver) for i in range(5)])
        torch.testing.assert_close(result, single)


@every_fixed_solver
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluations_are_as_announced(solver, steps):
    counted = Counted(bend)
    integrate(counted, START, time_grid(steps), solver)
    per_step = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 1}[solver]
    assert counted.evaluations == evaluations(solver, steps) == per_step * steps + (solver == "ab2")


def test_one_euler_step():
    x = integrate(lambda x, t: 2 * x + t, torch.tensor([3.0]), torch.tensor([0.25, 0.75]))
    assert x.item() == 3.0 + 0.5 * (6.0 + 0.25)


@pytest.mark.parametrize(("solver", "bound"), [("rk4", 1e-7), ("dopri5", 1e-7), ("heun", 1e-3), ("ab2", 1e-3)])
def test_forward_then_backward_comes_home(solver, bound):
    times = time_grid(40)
    there = integrate(bend, START, times, solver, rtol=1e-9, atol=1e-9)
    back = integrate(bend, there, times.flip(0), solver, rtol=1e-9, atol=1e-9)
    assert (there - START).abs().max() > 0.1
    assert (back - START).abs().max() < bound


@every_solver
def test_callback_after_every_step(solver):
    calls = []
    times = time_grid(6, "cosine")
    result = integrate(bend, START, times, solver, lambda *call: calls.append(call))
    assert [index for index, *_ in calls] == list(range(6))
    assert [t for _, t, *_ in calls] == times[1:].tolist()
    assert torch.equal(calls[-1][2], result)
    before = START
    for (_, _, x, slope), h in zip(calls, times.diff(), strict=True):
        torch.testing.assert_close(before + h * slope, x)
        before = x
    assert torch.equal(result, integrate(bend, START, times, solver))


@every_solver
def test_what_the_callback_raises_ends_the_run(solver):
    class Interrupt(BaseException):
        pass

    counted = Counted(bend)

    def callback(index, t, x, velocity):
        if index == 1:
            raise Interrupt

    with pytest.raises(Interrupt):
        integrate(counted, START, time_grid(100), solver, callback)
    assert counted.evaluations <= 20


@every_solver
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_state_is_float32_at_least(solver, dtype):
    seen = set()

    def velocity(x, t):
        seen.add(x.dtype)
        return torch.ones_like(x, dtype=torch.bfloat16)  # as a network in low precision answers

    result = integrate(velocity, torch.zeros(2, 3, dtype=dtype), time_grid(1000 if solver == "euler" else 5), solver)
    assert seen == {torch.promote_types(dtype, torch.float32)} and result.dtype == dtype
    torch.testing.assert_close(result.double(), torch.ones(2, 3).double(), rtol=0, atol=1e-5)


@every_solver
def test_works_in_inference_mode_and_lets_gradients_through(solver):
    with torch.inference_mode():
        inferred = integrate(bend, START, time_grid(4), solver)
    x = START.clone().requires_grad_()
    integrate(bend, x, time_grid(50), solver).sum().backward()
    torch.testing.assert_close(inferred, integrate(bend, START, time_grid(4), solver))
    slope = bend_solution(1.0, START) ** 2 / START**2
    assert (x.grad - slope).abs().max() < 0.05


@every_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_state_is_an_error_that_names_its_step(solver, bad):
    def velocity(x, t):
        return torch.where(t > 0.44, bad, torch.ones_like(x)) * torch.tensor([1.0, 0.0])

    times = time_grid(10)
    with pytest.raises(NonFiniteStateError, match="step 5 of 10|step 6 of 10") as caught:
        integrate(velocity, torch.zeros(2, 2), times, solver)
    assert caught.value.step == {"euler": 5, "ab2": 5}.get(solver, 4)  # the others look ahead, or halfway


@every_solver
def test_a_non_finite_start_is_told_from_a_bad_step(solver):
    with pytest.raises(NonFiniteStateError) as caught:
        integrate(lambda x, t: torch.zeros_like(x), torch.tensor([1.0, math.nan]), time_grid(3), solver)
    assert caught.value.step == -1 and "initial" in str(caught.value)


@every_fixed_solver
def test_a_state_that_overflows_is_not_finite_either(solver):
    with pytest.raises(NonFiniteStateError) as caught:
        integrate(lambda x, t: torch.full_like(x, 5e37), torch.zeros(2), torch.tensor([0.0, 1.0, 10.0, 11.0]), solver)
    assert caught.value.step == 1


def test_dopri5_stops_where_the_solution_ends():
    """dx/dt = x² from 1 is infinite at t = 1."""
    with pytest.raises(RuntimeError, match="step 2 of 2"):
        integrate(lambda x, t: x**2, torch.ones(1), torch.tensor([0.0, 0.9, 1.5]), "dopri5")


class Reads(TorchDispatchMode):
    """Counts the values read back from the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@every_fixed_solver
def test_no_step_waits_for_the_device(solver):
    reads = []
    for steps in (2, 20):
        with Reads() as mode:
            integrate(bend, START, time_grid(steps), solver)
        reads.append(mode.count)
    assert reads[0] == reads[1] == 0


def test_dopri5_gives_up_with_advice(monkeypatch):
    monkeypatch.setattr("diff2flow_nodes.samplers.steps.MAX_ADAPTIVE_STEPS", 100)
    generator = torch.Generator().manual_seed(0)

    def noisy(x, t):
        return torch.randn(x.shape, generator=generator)

    with pytest.raises(RuntimeError, match="cannot meet rtol=1e-12.*step 1 of 1"):
        integrate(noisy, START.float(), time_grid(1), "dopri5", rtol=1e-12, atol=1e-12)


def test_an_assertion_of_the_velocity_is_its_own():
    def velocity(x, t):
        raise AssertionError("mine")

    with pytest.raises(AssertionError, match="mine"):
        integrate(velocity, START, time_grid(1), "dopri5")


@pytest.mark.parametrize(
    ("arguments", "offender"),
    [
        ({"solver": "rk5"}, "'rk5'"),
        ({"x": torch.tensor(1.0)}, r"\(\)"),
        ({"x": torch.ones(2, dtype=torch.int64)}, "int64"),
        ({"times": torch.tensor(0.5)}, r"\(\)"),
        ({"times": torch.tensor([0.5])}, r"\(1,\)"),
        ({"times": torch.zeros(2, 2)}, r"\(2, 2\)"),
        ({"times": torch.tensor([0.0, 0.5, 0.5])}, "0.5, 0.5"),
        ({"times": torch.tensor([0.0, 0.75, 0.5])}, "0.75, 0.5"),
        ({"times": torch.tensor([0.0, math.nan])}, "nan"),
        ({"times": torch.tensor([0.0, math.inf])}, "inf"),
        ({"velocity": lambda x, t: x[:1]}, r"\(1,\)"),
        ({"solver": "dopri5", "rtol": 0.0}, "rtol.*0.0"),
        ({"solver": "dopri5", "atol": -1.0}, "atol.*-1.0"),
    ],
)
def test_errors_name_the_value(arguments, offender):
    with pytest.raises(ValueError, match=offender):
        integrate(**{"velocity": lambda x, t: x, "x": torch.ones(3), "times": time_grid(2), **arguments})


@pytest.mark.parametrize(("solver", "steps"), [("dopri5", 3), ("rk5", 3), ("euler", 0)])
def test_evaluations_refuses_what_it_cannot_know(solver, steps):
    with pytest.raises(ValueError, match=f"{solver}|{steps}"):
        evaluations(solver, steps)


def test_torchdiffeq_is_needed_for_dopri5_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)  # as if it were not installed
    for module in ("grids", "steps", "solvers"):
        spec = importlib.util.find_spec(f"diff2flow_nodes.samplers.{module}")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for solver in ORDERS:
        integrate(bend, START, time_grid(2), solver)
    with pytest.raises(ImportError):
        integrate(bend, START, time_grid(2), "dopri5")
