"""How large the effect is, and how long an experiment would have to be: what is shown beside the decision.

The anytime-valid interval and the harm e-value may be looked at after every pair without spoiling their
level. Differences are in log units, negative where the challenger is better.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

from store.interval import DEFAULT_G, Interval, anytime_interval

__all__ = [
    "Interval", "anytime_interval", "effect_ratio", "gain_as_log", "log_harm_e_value", "log_normal_cdf",
    "log_t_mixture", "min_detectable_gain", "pairs_constant", "pairs_needed",
]  # fmt: skip

PAIRS_CONSTANT = 11.0  # pairs = 11 (sd / effect)^2: 80 % power of the sign-flip test, 5 %, cap 60 (simulated)
POWER = 0.8
E_VALUE_PAIRS = 20  # the number of pairs for which the e-process is tuned
E_VALUE_RHO = 8.78  # (-2 ln 0.05 + ln(-2 ln 0.05) + 1): the mixture that is best at that many pairs and 5 %


def log_t_mixture(t_squared: float, num_pairs: int, g: float = DEFAULT_G) -> float:
    """ln of the e-value that `anytime_interval` inverts: the interval holds the means where it is < 1 / alpha."""
    nu, a = num_pairs - 1, 1.0 + num_pairs * g
    return -0.5 * math.log(a) + 0.5 * (nu + 1) * (
        math.log1p(t_squared / nu) - math.log1p(t_squared / (nu * a))
    )


def log_harm_e_value(differences: Sequence[float], sd: float) -> float:
    """ln E against "the challenger is no worse": act at E >= 1 / alpha, after any pair.

    S = sum d, V = sum d^2, eta^2 = 8.78 / (20 sd^2) with `sd` of champion pairs fixed beforehand, q = 1 + eta^2 V:
    ln E = ln 2 - ln(q) / 2 + eta^2 S^2 / (2 q) + ln Phi(S eta / sqrt(q)).
    Valid for signs that are coins, whatever the tails and the dependence; a wrong `sd` costs speed, not validity.
    Source: Howard, Ramdas, McAuliffe and Sekhon (arXiv 1810.08240), half-normal mixture, symmetric increments.
    """
    eta_squared = E_VALUE_RHO / (E_VALUE_PAIRS * sd * sd)
    total, squares = math.fsum(differences), math.fsum(d * d for d in differences)
    q = 1.0 + eta_squared * squares
    x = total * math.sqrt(eta_squared / q)
    return math.log(2.0) - 0.5 * math.log(q) + 0.5 * x * x + log_normal_cdf(x)


def log_normal_cdf(x: float) -> float:
    """ln Phi(x); below -30 by its leading asymptotic term, where erfc would underflow."""
    if x > -30.0:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2.0)))
    return -0.5 * x * x - math.log(-x * math.sqrt(2.0 * math.pi))


def gain_as_log(gain: float) -> float:
    """A gain of 0.10 (10 % lower latency) as the size of its log difference, 0.105."""
    return -math.log1p(-gain)


def effect_ratio(log_difference: float) -> float:
    """A log difference as a relative change: -0.105 becomes -0.10, ten percent lower latency."""
    return math.expm1(log_difference)


def pairs_constant(alpha: float) -> float:
    """c in pairs = c (sd / effect)^2 for 80 % power at level `alpha`.

    The simulated 11 at 5 %, scaled to other levels by ((z_alpha + z_power) / (z_0.05 + z_power))^2, which is
    how a normal test scales; read it as a plan, not as a promise.
    """
    z = NormalDist().inv_cdf
    return PAIRS_CONSTANT * ((z(1.0 - alpha) + z(POWER)) / (z(0.95) + z(POWER))) ** 2


def pairs_needed(sd: float, gain: float, alpha: float = 0.05) -> int:
    """Pairs for 80 % power to prove a true `gain` (0.10 is 10 %) when pairs have this sd (log units)."""
    return max(1, math.ceil(pairs_constant(alpha) * (sd / gain_as_log(gain)) ** 2))


def min_detectable_gain(sd: float, num_pairs: int, alpha: float = 0.05) -> float:
    """The smallest true gain that `num_pairs` pairs find with 80 % power; 0.10 is 10 %."""
    return -math.expm1(-sd * math.sqrt(pairs_constant(alpha) / num_pairs))
