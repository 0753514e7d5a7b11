"""The rule that accepts or refuses a tensor, and what it found.

A tensor passes when it is finite and
    max |ours - oracle|  <=  2 * max |hf - oracle|  + 2 * eps * max |oracle|
    mean |ours - oracle| <=  2 * mean |hf - oracle| +     eps * mean |oracle|
where the oracle is float64 on the same rounded inputs and hf is Hugging Face's eager block in the dtype under test. The
rule has no tolerance to tune and holds at every data scale (float32's own sums take a larger eps, see `Rounding`). It
is applied to each expert's weight gradients and to each token's row as well as to the whole: one wrong expert with
small values hides in a global maximum.

A reference that is itself far from the oracle would widen the bound until anything passes, so that is a failure too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# How far off Hugging Face's own block may be before a comparison with it means nothing, in eps of the tensor's largest
# value. Measured: 1 in float16 and bfloat16, 3 to 10 in float32; a swap of gate and up rows gives 1/eps.
SANE = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 128}


@dataclass(frozen=True)
class Comparison:
    """One verdict.

    Attributes:
        problem: ``unit`` (unit-scale data) or ``integer`` (exact sums).
        tensor: what was compared.
        part: ``all``, ``expert N`` or ``token N``.
        ok: whether it passes.
        error, hf_error, bound: largest absolute error of ours, of Hugging Face's eager path, and what is allowed.
        mean_error, hf_mean_error, mean_bound: the same for the mean.
        note: why it failed, or what is special about it.
    """

    problem: str
    tensor: str
    part: str
    ok: bool
    error: float = 0.0
    hf_error: float | None = None
    bound: float = 0.0
    mean_error: float = 0.0
    hf_mean_error: float | None = None
    mean_bound: float = 0.0
    note: str = ""


NUMBERS = ("error", "hf_error", "bound", "mean_error", "hf_mean_error", "mean_bound")


@dataclass(frozen=True)
class Rounding:
    """The numbers of the rule that depend on the dtype under test.

    Attributes:
        eps: of the rounding terms.
        least: the smallest number above zero: what underflows is off by that much.
        hf_counts: whether Hugging Face's own error widens the bound.
        sane: largest error of Hugging Face's, in units of the tensor's largest value, that makes a comparison worth
            anything.
    """

    eps: float
    least: float
    hf_counts: bool
    sane: float

    @classmethod
    def of(cls, dtype: torch.dtype, terms: int) -> Rounding:
        """The rule for `dtype`, with sums of up to `terms` terms.

        float16 and bfloat16 are accumulated in float32, so that eps is what storing the result costs. float32 is
        accumulated in float32: a chain of n additions is off by about sqrt(n) / 4 eps, a tree of them by less, and
        each sum takes what another made. float64 is judged by another float64, with sums of its own, and not by
        Hugging Face's error: that router computes its softmax in float32, whatever the dtype.
        """
        info = torch.finfo(dtype)
        least = info.smallest_normal * info.eps
        chain = info.eps * max(1.0, terms**0.5 / 2)
        if dtype is torch.float64:
            return cls(2 * chain, least, False, SANE[torch.float32] * 2**-23)
        return cls(chain if dtype is torch.float32 else info.eps, least, True, SANE[dtype] * info.eps)


@dataclass(frozen=True)
class Errors:
    """Largest and mean absolute value of each group: of our error, of Hugging Face's, and of the oracle; each [G]."""

    ours: tuple[Tensor, Tensor]
    hf: tuple[Tensor, Tensor]
    oracle: tuple[Tensor, Tensor]
    finite: Tensor

    @classmethod
    def of(cls, ours: Tensor, hf: Tensor, oracle: Tensor) -> Errors:
        """The errors of tensors [G, ...] against the oracle, group by group."""
        flat = [t.detach().double().flatten(1) for t in (ours, hf, oracle)]
        mine, theirs, true = flat
        finite = torch.isfinite(mine).all(1)
        return cls(_max_mean(mine - true), _max_mean(theirs - true), _max_mean(true), finite)

    def whole(self) -> Errors:
        """All groups as one; they have the same size."""

        def one(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return pair[0].amax(0, keepdim=True), pair[1].mean(0, keepdim=True)

        return Errors(one(self.ours), one(self.hf), one(self.oracle), self.finite.all(0, keepdim=True))

    def floored(self) -> Errors:
        """The same with Hugging Face's error at least what it is in the median group, relative to its values.

        A token's row or an expert with one token has few elements, and now and then rounding is kind to all of them.
        """

        def floor(hf: Tensor, oracle: Tensor) -> Tensor:
            some = oracle > 0
            typical = (hf[some] / oracle[some]).median() if bool(some.any()) else 0.0
            return torch.maximum(hf, typical * oracle)

        pairs = zip(self.hf, self.oracle, strict=True)
        top, middle = (floor(hf, oracle) for hf, oracle in pairs)
        return replace(self, hf=(top, middle))


def _max_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    size = values.abs()
    return size.amax(1), size.mean(1)


def judge(tensor: str, errors: Errors, rule: Rounding, parts: list[str] | None = None) -> list[Comparison]:
    """The rule for each group; without names for them, for the one group that is the whole tensor.

    The whole also tells whether Hugging Face's block is any reference: far from the oracle, it would excuse anything.
    """
    top, middle = errors.oracle
    bound = 2 * errors.hf[0] * rule.hf_counts + 2 * rule.eps * top + rule.least
    mean_bound = 2 * errors.hf[1] * rule.hf_counts + rule.eps * middle + rule.least
    near = (errors.ours[0] <= bound) & (errors.ours[1] <= mean_bound)
    astray = errors.hf[0] > rule.sane * top + rule.least
    table = torch.stack([errors.ours[0], errors.hf[0], bound, errors.ours[1], errors.hf[1], mean_bound], 1).tolist()
    marks = torch.stack([errors.finite, near, astray & (parts is None)], 1).tolist()
    found = []
    for part, numbers, (finite, is_near, is_astray) in zip(parts or ["all"], table, marks, strict=True):
        note = "" if is_near else "off by more than the bound"
        if is_astray:
            note = "Hugging Face's block and float64 disagree: not the same weights, routing or function"
        if not finite:
            note = "not finite"
        found.append(Comparison("unit", tensor, part, not note, **dict(zip(NUMBERS, numbers, strict=True)), note=note))
    return found


def judge_rows(
    tensor: str, ours: Tensor, hf: Tensor, oracle: Tensor, tokens: Tensor, rule: Rounding
) -> list[Comparison]:
    """The rule for a tensor [T, ...] as a whole, then for the token nearest to its bound and for those beyond theirs.

    `tokens` [n] are the rows to look at; the others were routed differently by Hugging Face's block.
    """
    if wrong := shape_or_dtype("unit", tensor, ours, hf):
        return [wrong]
    if not len(tokens):
        return [Comparison("unit", tensor, "all", False, note="no token is routed alike: nothing to compare")]
    errors = Errors.of(ours[tokens], hf[tokens], oracle[tokens])
    rows = judge(tensor, errors.floored(), rule, [f"token {t}" for t in tokens.tolist()])
    failed = [row for row in rows if not row.ok]
    return judge(tensor, errors.whole(), rule) + (failed or [max(rows, key=lambda row: row.error / row.bound)])


def shape_or_dtype(problem: str, tensor: str, ours: Tensor | None, wanted: Tensor) -> Comparison | None:
    """The failure of a tensor that is missing, or has not the shape and dtype of Hugging Face's."""
    if ours is None:
        return Comparison(problem, tensor, "all", False, note="is None")
    if ours.shape == wanted.shape and ours.dtype == wanted.dtype:
        return None
    came = f"{tuple(ours.shape)} {ours.dtype}"
    return Comparison(problem, tensor, "all", False, note=f"is {came}, needed {tuple(wanted.shape)} {wanted.dtype}")
