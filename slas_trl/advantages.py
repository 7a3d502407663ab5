"""
Super-Linear Advantage Shaping: the rewards of groups of images in, one advantage per image out.

    center   Δr = r - mean_group(r)             Eq. 9
    scale    x  = Δr / s                        s = std of the group (Eq. 1) or of the batch (text after Eq. 20)
    shape    A  = sign(x) * abs(x)^(1 + γ)      Eq. 20, Theorem 3

`scale_rewards="group", gamma=0` is GRPO and DanceGRPO, `"batch", gamma=0` the linear ascent of Theorem 2, and
`"batch", gamma>0` is SLAS. Equations are those of "Power Reinforcement Post-Training of Text-to-Image Models with
Super-Linear Advantage Shaping". Where it is silent, or we depart from it:

- Order: the paper does not say whether to scale or to shape first; the two differ by one scalar per batch. We scale
  first, so that differences above one batch std are amplified and those below it damped. It gives no γ; 0.5 is ours.
- Batch std: that of the centered Δr, so without the variance between prompts that TRL's and Flow-GRPO's contains.
  Every std has ddof 0, as in the paper's ±1.342 example; TRL, DanceGRPO and Lemma 1 have ddof 1.
- No additive eps: it would eat gaps of 5e-3. A group whose std is below float32 resolution of its rewards gets 0.
- Clipping comes before shaping, in std units: a bound of 5 after it would cut at 2.24 std for γ = 1.
- Zero sum: Theorem 3 needs it (Eq. 13), but skewed rewards, shaped around their mean, leave a residual push.
  `shaping_baseline="zero_sum"` leaves none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor


# Numbers and their intervals, checked when they are read.
Count = Annotated[int, "[1, inf)"]
Positive = Annotated[float, "(0, inf)"]
NotNegative = Annotated[float, "[0, inf)"]


def option(default: Any, help: str, choices: Sequence[str] = ()) -> Any:
    """A field of a dataclass, with what the command line says of it."""
    return field(default=default, metadata={"help": help} | ({"choices": [*choices]} if choices else {}))


@dataclass(frozen=True, eq=False)
class Advantages:
    """Advantages of N rows in groups of G, and what there is to log of them. Tensors are float32."""

    advantages: Tensor  # (N,): A, what the policy gradient is multiplied by
    scaled: Tensor  # (N,): x, after clipping and before shaping
    rewards: Tensor  # (N,): weighted sum of the rewards, NaN where a row has no score
    group_std: Tensor  # (N / G,): std of `rewards` by group, NaN with fewer than two scored rows
    batch_std: float  # std of `rewards` over the batch, of the kind `batch_std_of` names
    clip_fraction: float  # share of the rows that `advantage_clip` cut
    effective_share: float  # see the function of that name
    frac_reward_zero_std: float  # share of the groups without any difference
    frac_groups_filtered: float  # share of the groups below `min_group_std`

    @property
    def group_abs_advantages(self) -> Tensor:
        """(N / G,): Σ|A| of each group."""
        return self.advantages.view(len(self.group_std), -1).abs().sum(dim=1)


@dataclass
class AdvantageOptions:
    """
    What advantages depend on beside the rewards. A field of this class is an argument of [`slas_advantages`], of
    [`~slas_trl.trainer.SLASConfig`] and of the command line, and is written into model cards and checkpoints. Each has
    its meaning as `help`.

    `scale_rewards="batch"` is SLAS, `"group"` or `True` GRPO, `"none"` or `False` no scaling; the std is always about
    the mean. `batch_std_of="raw"` is TRL's. `shaping_baseline="zero_sum"` shapes around the root of Eq. 13, so that a
    group's shaped advantages sum to 0 before clipping. `advantage_clip` is in std units (the batch's for `"none"`),
    `min_group_std` in units of the reward. A reward of weight 0 is logged and not trained on. `"normalize_then_sum"`
    centers and scales each reward by itself, then sums, as DanceGRPO does; with a batch std the sum is divided by its
    own, before it is shaped.
    """

    scale_rewards: str = option(
        "batch", "Divide centered rewards by the std of the batch or the group.", choices=["batch", "group", "none"]
    )
    gamma: NotNegative = option(0.5, "A = sign(x)|x|^(1+gamma) of scaled rewards x.")
    batch_std_of: str = option("centered", "Rewards the batch std is taken of.", choices=["centered", "raw"])
    shaping_baseline: str = option("mean", "Baseline of a group before shaping.", choices=["mean", "zero_sum"])
    advantage_clip: Positive | None = option(5.0, "Bound on scaled rewards before shaping, in standard deviations.")
    min_group_std: NotNegative = option(0.0, "Groups with a smaller std get advantage 0.")
    reward_weights: Annotated[list[float], "(-inf, inf)"] | None = option(None, "One weight for each reward.")
    multi_objective_aggregation: str = option(
        "sum_then_normalize", "How several rewards meet.", choices=["sum_then_normalize", "normalize_then_sum"]
    )

    def __post_init__(self):
        if isinstance(self.scale_rewards, bool):  # as TRL accepts it
            self.scale_rewards = "group" if self.scale_rewards else "none"
        check_fields(self, AdvantageOptions)


def slas_advantages(rewards: Tensor | Sequence, num_generations: int, **options: Any) -> Tensor:
    """
    Shaped advantages (Eq. 20), which do not change under `r -> k * r + c`, k > 0 (unless scaling is `"none"`).

    Args:
        rewards (`torch.Tensor`, array or list of shape `(N,)` or `(N, K)`):
            Scores of a rollout's N images (of all processes) by K reward functions, images of a prompt consecutive.
            NaN is "no score", and so is a score of weight 0. A missing one counts as the mean of that reward over the
            row's group, and not at all where the whole group lacks it. A row without any score gets 0, and so does a
            group with fewer than two scored rows.
        num_generations (`int`):
            Images per prompt, G >= 2. Divides N.
        options: fields of [`AdvantageOptions`], by name.

    Returns a float32 `torch.Tensor` of shape `(N,)` on the device of `rewards`. The arithmetic is float64, on the CPU.
    Raises `ValueError` (shapes, infinite rewards, unknown options, values out of range) or `TypeError` (other types).
    """
    return compute_advantages(rewards, num_generations, **options).advantages


def compute_advantages(
    rewards: Tensor | Sequence, num_generations: int, options: AdvantageOptions | None = None, **changed: Any
) -> Advantages:
    """[`slas_advantages`], together with the statistics to log; `changed` are options in place of `options`' own."""
    if options is not None:
        changed = {option.name: getattr(options, option.name) for option in fields(AdvantageOptions)} | changed
    options = AdvantageOptions(**changed)
    scale_rewards, gamma, batch_std_of = options.scale_rewards, options.gamma, options.batch_std_of
    r, weights = _check_rewards(rewards, num_generations, options.reward_weights)  # (K, groups, G), (K, 1, 1)

    total = weighted_sum(r, weights)
    scored = ~total.isnan()

    # x = Δr / s (Eq. 9 and 1) of the summed rewards, or the sum of each reward's own x.
    x, group_std, batch_std = _center_and_scale(total, (weights * r).abs().nansum(dim=0), scale_rewards, batch_std_of)
    if options.multi_objective_aggregation == "normalize_then_sum":
        parts = weights * _center_and_scale(r, r.abs().nan_to_num(), scale_rewards, batch_std_of)[0]
        x = parts.sum(dim=0)
        if scale_rewards == "batch":  # again one batch std is the pivot of the shaping, whatever the weights
            summed = x.masked_fill(~scored, math.nan)
            x = _center_and_scale(summed, parts.abs().sum(dim=0), scale_rewards, batch_std_of)[0]
    baseline = _zero_sum_baseline(x, scored, gamma) if options.shaping_baseline == "zero_sum" and gamma > 0 else 0.0
    x = (x - baseline) * scored

    # Clip in std units. Unscaled, x is in units of the reward, and so has to be the bound.
    unit = batch_std.item() if scale_rewards == "none" else 1.0
    bound = math.inf if options.advantage_clip is None else options.advantage_clip * unit
    clip_fraction = (x.abs() > bound).double().mean().item()
    x = x.clamp(-bound, bound)

    advantages = x * x.abs().pow(gamma)  # sign(x) |x|^(1 + γ), Eq. 20

    # Section 4.2, Imp1. Filtered groups still count in the batch std: the others' advantages do not depend on them.
    filtered = group_std < options.min_group_std
    advantages, x = advantages.masked_fill(filtered, 0.0), x.masked_fill(filtered, 0.0)
    if advantages.abs().max() > torch.finfo(torch.float32).max:
        raise ValueError(f"gamma={gamma} makes the advantages overflow; lower it (0.25 to 1) or set advantage_clip.")

    device = rewards.device if isinstance(rewards, Tensor) else "cpu"
    return Advantages(
        advantages=advantages.flatten().float().to(device),
        scaled=x.flatten().float().to(device),
        rewards=total.flatten().float().to(device),
        group_std=group_std.flatten().float().to(device),
        batch_std=batch_std.item(),
        clip_fraction=clip_fraction,
        effective_share=effective_share(advantages),
        frac_reward_zero_std=(group_std == 0).double().mean().item(),
        frac_groups_filtered=filtered.double().mean().item(),
    )


def weighted_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """
    Sum of the rewards `(K, groups, G)` by their weights `(K, 1, 1)`, as `(groups, G)`. NaN, a missing score, counts as
    the mean of that reward over its group (left out, it would count as 0), or not at all where the whole group lacks
    it. A row without any is NaN.
    """
    filled = torch.where(rewards.isnan(), rewards.nanmean(dim=-1, keepdim=True), rewards)
    return (weights * filled).nansum(dim=0).masked_fill(rewards.isnan().all(dim=0), math.nan)


def effective_share(advantages: Tensor) -> float:
    """Share of the rows that carry the update, (Σ|A|)² / (N ΣA²). N counts rows of advantage 0; 0 if all are."""
    size = advantages.abs() / advantages.abs().max()  # relative: small squares underflow. NaN if all are 0
    return (size.sum().square() / (size.numel() * size.square().sum())).nan_to_num().item()


def _center_and_scale(r: Tensor, magnitude: Tensor, scale_rewards: str, batch_std_of: str):
    """x (..., groups, G), 0 where r is NaN, with its group std (..., groups, 1) and batch std (..., 1, 1)."""
    count = (~r.isnan()).sum(dim=-1, keepdim=True)
    delta = (r - r.nanmean(dim=-1, keepdim=True)).nan_to_num()  # Δr, Eq. 9
    group_std = (delta.square().sum(dim=-1, keepdim=True) / count).sqrt()
    # The mean of equal rewards may round, so "no difference" is relative to their size.
    resolution = torch.finfo(torch.float32).eps * magnitude.amax(dim=-1, keepdim=True)
    group_std = group_std.masked_fill(group_std <= resolution, 0.0).masked_fill(count < 2, math.nan)
    delta = torch.where(group_std > 0, delta, 0.0)

    if batch_std_of == "centered":  # one scored row says nothing of the spread within its group
        rows = count.masked_fill(count < 2, 0).sum(dim=-2, keepdim=True)
        variance = delta.square().sum(dim=(-2, -1), keepdim=True) / rows
    else:
        variance = (r - r.nanmean(dim=(-2, -1), keepdim=True)).square().nanmean(dim=(-2, -1), keepdim=True)
    batch_std = variance.nan_to_num().sqrt()

    s = group_std if scale_rewards == "group" else batch_std if scale_rewards == "batch" else torch.ones(())
    return delta / torch.where(s > 0, s, 1.0), group_std, batch_std


def _zero_sum_baseline(x: Tensor, scored: Tensor, gamma: float) -> Tensor:
    """b (groups, 1) with Σ sign(x - b) |x - b|^(1 + γ) = 0 over the scored rows of each group (Eq. 13)."""
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    b = torch.zeros_like(low)  # the mean of x
    for _ in range(100):
        distance = (x - b) * scored
        weight = distance.abs().pow(gamma)  # Φ_γ, Eq. 17
        push = (distance * weight).sum(dim=-1, keepdim=True)
        if (push.abs() <= 1e-12 * (distance * weight).abs().sum(dim=-1, keepdim=True)).all():
            break
        low, high = torch.where(push > 0, b, low), torch.where(push < 0, b, high)
        # Bisection, sped up by Newton's step wherever that stays within the bracket.
        newton = b + push / ((1 + gamma) * weight.sum(dim=-1, keepdim=True))
        b = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
    return b


def check_number(name: str, value: Any, interval: str, whole: bool = False) -> None:
    """
    Raises `TypeError` for what is no number, or no `whole` one, and `ValueError` for one that is not in `interval`,
    such as "[0, inf)"; NaN is in none.
    """
    if not isinstance(value, Integral if whole else Real) or isinstance(value, bool):
        kind = "whole number" if whole else "number"
        raise TypeError(f"{name} must be a {kind}, got {value!r} of type {type(value).__name__}.")
    number, (low, high) = float(value), map(float, interval[1:-1].split(","))
    if not (low < number < high or (number == low and interval[0] == "[") or (number == high and interval[-1] == "]")):
        raise ValueError(f"{name} must be in {interval}, got {value!r}.")


def check_fields(values: Any, kind: type, intervals: Mapping[str, str] = MappingProxyType({})) -> None:
    """
    Raises `ValueError` or `TypeError` for the first field of the dataclass `kind` whose value in `values` is none of
    its "choices", or outside of its interval, which is annotated, or in `intervals` by name; any other number is
    finite.
    """
    for name, hint in get_type_hints(kind, include_extras=True).items():
        value, choices = getattr(values, name), kind.__dataclass_fields__[name].metadata.get("choices")
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if isinstance(value, Tensor | np.generic | np.ndarray):  # which JSON knows nothing of
            setattr(values, name, value := value.tolist())
        if choices and value is not None and value not in choices:
            raise ValueError(f"{name} must be one of {choices}, but it is {value!r}.")
        for one in kinds:
            interval = intervals.get(name, "(-inf, inf)") if one in (int, float) else None
            if get_origin(one) is Annotated:
                one, interval = get_args(one)
            for number in value if isinstance(value, list | tuple) else [value]:
                if interval is not None and not (number is None and type(None) in kinds):
                    check_number(name, number, interval, whole=one is int)


def _check_rewards(rewards: Tensor | Sequence, num_generations: int, reward_weights) -> tuple[Tensor, Tensor]:
    """Rewards as (K, groups, G) and weights as (K, 1, 1)."""
    if not isinstance(num_generations, int) or num_generations < 2:
        raise ValueError(f"num_generations must be an int of at least 2, to compare images, got {num_generations!r}.")
    r = _to_float64("rewards", rewards)
    if r.ndim not in (1, 2) or r.numel() == 0:
        raise ValueError(f"rewards must be non-empty, of shape (N,) or (N, K), got {tuple(r.shape)}.")
    r = r.reshape(len(r), -1)
    rows, num_rewards = r.shape
    if rows % num_generations:
        raise ValueError(f"num_generations={num_generations} must divide the {rows} rewards. Pass whole groups.")
    infinite = r.isinf().any(dim=1).nonzero().flatten().tolist()
    if infinite:
        raise ValueError(f"rewards must be finite or nan ('no score'); {len(infinite)} rows are not: {infinite[:9]}.")
    w = _to_float64("reward_weights", [1.0] * num_rewards if reward_weights is None else reward_weights)
    if w.shape != (num_rewards,) or not w.isfinite().all():
        raise ValueError(f"reward_weights must be {num_rewards} finite numbers, one per reward, got {w.tolist()}.")
    return r.masked_fill(w == 0, math.nan).T.reshape(num_rewards, -1, num_generations), w.view(-1, 1, 1)


def _to_float64(name: str, values: Tensor | Sequence) -> Tensor:
    try:  # on the CPU, as some devices have no float64
        return torch.as_tensor(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be numbers (float('nan') for 'no score'), got {values!r}: {error}.") from error
