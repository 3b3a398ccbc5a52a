"""The maps between a diffusion model and its flow (Diff2Flow, arXiv 2506.02221, Eq. 10-16)."""

import torch
from torch import Tensor

from .precision import FLOAT64, state_dtype, wide, wide_dtype
from .schedule import SIGNAL_FLOOR, NoiseSchedule

PREDICTIONS = ("eps", "v", "x0")
# x0 prediction divides by 1-t, which nears 0 beyond t_max; it is kept above this part of 1-t_max.
X0_FLOOR = 0.1


class Alignment:
    """A diffusion network seen as a flow: times, states and the velocity, exact in closed form.

    t is the flow time, 0 (noise) to 1 (data), x_flow = t·x_data + (1-t)·x_noise. With the coefficients

        VP: alpha = t/n, sigma = (1-t)/n, n = sqrt(t² + (1-t)²)        VE: alpha = 1, sigma = (1-t)/t

    the diffusion state is x_diff = alpha·x_data + sigma·x_noise = (alpha+sigma)·x_flow. Only the network's timestep
    tau needs a table, and that is built once and kept on each device it is asked for.

    The network was trained for t in `t_range` = [t_min, t_max]. All of [0, 1] is legal: below t_min everything is
    evaluated at t_min (and tau = T-1); above t_max the coefficients keep their closed form and tau = 0.

    Wherever `t` or `tau` appears it is a tensor () or (B,) (a number is taken as ()), and states are (B, *dims) with
    any number of dims. Coefficients are computed in float64 (float32 on devices that have no float64), applied in
    x's dtype, float32 at least, and the result has x's dtype. A NaN stays a NaN.

    Args:
        schedule: the noise schedule the network was trained on.
        prediction: what the network returns: "eps" (x_noise), "v" (alpha·eps - sigma·x_data) or "x0" (x_data).
            With a VE schedule alpha = 1 in "v" as well: v_pred = eps - sigma·x_data. The raw output of SVD's network
            (EDM's c_skip and c_out with data std 1) is this divided by sqrt(1+sigma²).

    Raises:
        ValueError: an unknown prediction, or "eps" on a schedule without signal at its terminal (t_min < 0.001):
            its velocity (x_flow - eps)/t is not finite there, or only rounding error.
    """

    def __init__(self, schedule: NoiseSchedule, prediction: str = "eps") -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
        times = schedule.flow_times.tolist()
        if prediction == "eps" and schedule.is_zero_terminal_snr:
            raise ValueError(
                f"an eps network has no usable velocity on the zero-terminal-SNR schedule {schedule.describe()}:"
                f" its t_min = {times[-1]:.3g} lies below {SIGNAL_FLOOR}; choose v or x0 prediction, or turn zero"
                " terminal SNR off"
            )
        self._schedule = schedule
        self._prediction = prediction
        self._t_range = (times[-1], times[0])
        self._tables: dict[torch.device, Tensor] = {}

    def __repr__(self) -> str:
        return f"Alignment({self.schedule.describe()}, prediction={self.prediction!r})"

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return self._schedule

    @property
    def prediction(self) -> str:
        """What the network predicts: "eps", "v" or "x0"."""
        return self._prediction

    @property
    def t_range(self) -> tuple[float, float]:
        """(t_min, t_max): the flow times of tau = T-1 and tau = 0, between which the network was trained."""
        return self._t_range

    def flow_time(self, tau: Tensor) -> Tensor:
        """Return the flow time of a network timestep, f_t (Eq. 11), linear in tau between integers.

        Args:
            tau: () or (B,), fractional timestep in [0, T-1]; outside it is clamped.

        Returns:
            t, shape of tau, in [t_min, t_max]; float32 for float32 and below, else float64.
        """
        tau, dtype = _as_time(tau)
        table = self._table(tau.device)
        steps = len(table)
        place = (steps - 1 - tau).clamp(0, steps - 1)
        left = place.floor().long().clamp(0, steps - 2)
        return torch.lerp(_entries(table, left), _entries(table, left + 1), place - left).to(dtype)

    def timestep(self, t: Tensor) -> Tensor:
        """Return the fractional network timestep of a flow time, f_t⁻¹ (Eq. 12): the exact inverse of `flow_time`.

        Args:
            t: () or (B,), flow time in [0, 1]; below t_min gives T-1, above t_max gives 0.

        Returns:
            tau, shape of t, in [0, T-1]; float32 for float32 and below, else float64.
        """
        t, dtype = _as_time(t)
        table = self._table(t.device)
        t = t.clamp(*self.t_range)
        right = torch.searchsorted(table, t.contiguous()).clamp(1, len(table) - 1)
        before, after = _entries(table, right - 1), _entries(table, right)
        return (len(table) - right - (t - before) / (after - before)).to(dtype)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) of x_diff = alpha·x_data + sigma·x_noise at flow time t, in closed form.

        Args:
            t: () or (B,), flow time in [0, 1]; below t_min the coefficients are those of t_min.

        Returns:
            alpha, sigma: shape of t, float64 (float32 on devices that have no float64).
        """
        t = self._covered(t)
        if self.schedule.kind == "ve":
            return torch.ones_like(t), (1 - t) / t
        n = torch.hypot(t, 1 - t)
        return t / n, (1 - t) / n

    def to_flow(self, x_diff: Tensor, tau: Tensor) -> Tensor:
        """Return x_flow = x_diff/(alpha+sigma) (Eq. 10), with the coefficients at `flow_time(tau)`.

        Args:
            x_diff: (B, *dims), the diffusion state.
            tau: () or (B,), its timestep in [0, T-1].
        """
        alpha, sigma = self.coefficients(self.flow_time(_as_time(tau)[0]))
        return (_state(x_diff) / _like(alpha + sigma, x_diff)).to(x_diff.dtype)

    def to_diffusion(self, x_flow: Tensor, t: Tensor) -> Tensor:
        """Return x_diff = (alpha+sigma)·x_flow (Eq. 13): what the network is fed, together with `timestep(t)`.

        Args:
            x_flow: (B, *dims), the flow state.
            t: () or (B,), its flow time in [0, 1].
        """
        alpha, sigma = self.coefficients(t)
        return (_state(x_flow) * _like(alpha + sigma, x_flow)).to(x_flow.dtype)

    def velocity(self, output: Tensor, x_flow: Tensor, t: Tensor) -> Tensor:
        """Return the velocity dx/dt = x_data - x_noise that the network's output stands for (Eq. 16, sign corrected).

            eps:  (x_flow - eps)/t
            v:    ((alpha-sigma)·x_diff - (alpha+sigma)·v_pred)/(alpha²+sigma²)
            x0:   (x_data_hat - x_flow)/(1-t), its denominator never below a tenth of 1-t_max

        All are affine in `output`, so classifier-free guidance may be applied before or after. The floor for x0 keeps
        the velocity continuous, and finite at t = 1. Short of it an Euler step to t = 1 lands on x_data_hat; no Euler
        step to t <= 1 overshoots it.

        Args:
            output: (B, *dims), the network's prediction at (to_diffusion(x_flow, t), timestep(t)).
            x_flow: (B, *dims), the flow state.
            t: () or (B,), flow time in [0, 1].

        Raises:
            ValueError: output and x_flow differ in shape.
        """
        if output.shape != x_flow.shape:
            raise ValueError(f"output has shape {tuple(output.shape)}, x_flow {tuple(x_flow.shape)}: they must agree")
        from_prediction = {"eps": self._from_eps, "v": self._from_v, "x0": self._from_x0}[self.prediction]
        return from_prediction(output.to(state_dtype(x_flow.dtype)), _state(x_flow), t).to(x_flow.dtype)

    def _from_eps(self, eps: Tensor, x_flow: Tensor, t: Tensor) -> Tensor:
        return (x_flow - eps) / _like(self._covered(t), x_flow)

    def _from_v(self, v_pred: Tensor, x_flow: Tensor, t: Tensor) -> Tensor:
        # x_data and eps solve v_pred = alpha·eps - sigma·x_data and x_diff = alpha·x_data + sigma·eps.
        alpha, sigma = self.coefficients(t)
        power = alpha**2 + sigma**2
        x_gain, v_gain = (alpha - sigma) * (alpha + sigma) / power, (alpha + sigma) / power
        return _like(x_gain, x_flow) * x_flow - _like(v_gain, x_flow) * v_pred

    def _from_x0(self, x_data_hat: Tensor, x_flow: Tensor, t: Tensor) -> Tensor:
        remaining = (1 - self._covered(t)).clamp(min=X0_FLOOR * (1 - self.t_range[1]))
        return (x_data_hat - x_flow) / _like(remaining, x_flow)

    def _covered(self, t: Tensor) -> Tensor:
        """Return t in the time dtype, at least t_min and at most 1."""
        return _as_time(t)[0].clamp(self.t_range[0], 1.0)

    def _table(self, device: torch.device) -> Tensor:
        """Return the increasing flow times of tau = T-1 ... 0 on `device`, copied there the first time only."""
        if device not in self._tables:
            with torch.inference_mode(False):  # sampling in inference mode may come first, training after it
                self._tables[device] = self.schedule.flow_times.flip(0).to(wide_dtype(device)).to(device)
        return self._tables[device]


def _as_time(t: Tensor) -> tuple[Tensor, torch.dtype]:
    """Return a time in the time dtype of its device, and the dtype to give results in."""
    if not isinstance(t, Tensor):
        t = torch.as_tensor(t, dtype=FLOAT64)
    if t.ndim > 1:
        raise ValueError(f"a time has shape () or (B,), got {tuple(t.shape)}")
    time = wide(t)
    return time, state_dtype(t.dtype) if t.is_floating_point() else time.dtype


def _entries(table: Tensor, places: Tensor) -> Tensor:
    """The table's entries at () or (B,) places. An index of shape () would be read by the host, which waits for it."""
    return table[places.reshape(-1)].reshape(places.shape)


def _state(x: Tensor) -> Tensor:
    return x.to(state_dtype(x.dtype))


def _like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Return a () or (B,) coefficient that broadcasts over x (B, *dims), in x's computing dtype and on its device."""
    if coefficient.ndim == 1:
        if len(coefficient) not in (1, len(x)):
            raise ValueError(f"got {len(coefficient)} times for a batch of {len(x)}")
        coefficient = coefficient.reshape(-1, *[1] * (x.ndim - 1))
    return coefficient.to(state_dtype(x.dtype)).to(x.device)
