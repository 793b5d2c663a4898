"""Losses between next-token distributions, from hidden states and output matrices, in one pass of chunks.

Forward and reverse KL and the generalised Jensen-Shannon divergence between a student and a teacher (several
mixed, or one whose top k are cached), beside the cross-entropy. A chunk of positions at a time, the logits of
all heads are made, compared, and turned at once into the gradients of the student's hidden states and output
matrix; the backward pass only scales these. So no logits are ever made twice, [B, T, V] never exists, and the
teacher leaves nothing behind. Under a mesh every device takes chunks of its own rows and positions and its
own part of the vocabulary, and gradients of the matrix cross devices once, after the last chunk.

Shape letters: B batch, T length, C chunk, D model (E a teacher's), V vocabulary, K kept outcomes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nemojax.losses.tokens import logits_of, pieces
from nemojax.sharding import RULES, ways_of

DIVERGENCES = ("kl", "reverse_kl", "jsd")
TERMS = (*DIVERGENCES, "lm")
# log-probability of what is left out: finite, so that differences of two and products with 0 are too
NEVER = -1e30
# least tail mass: below it, what f32 leaves of 1 - (sum of the kept) is rounding
MIN_TAIL = 2.0**-24

Weighting = Literal["uniform", "entropy", "confidence"]


class Head(NamedTuple):
    """Where logits come from: final-normed hidden states and the output matrix."""

    x_BTD: jax.Array
    w_VD: jax.Array


class TopK(NamedTuple):
    """A teacher's most likely next tokens, descending, and their log-probabilities at the temperature."""

    ids_BTK: jax.Array
    logps_BTK: jax.Array


@dataclass(frozen=True)
class Comparison:
    """How next-token distributions are compared.

    `temperature` divides all logits, its square multiplies the divergences (Hinton et al., 2015). With
    `top_k` the outcomes are the teacher's k most likely tokens and one bucket of all others. `beta` is the
    generalised JSD's (`vocab_loss`). With `shared` only the first so many ids are compared, renormalised.
    `weighting` multiplies a position's divergences by the teacher's entropy over its maximum, or by the
    probability of its first choice.
    """

    temperature: float = 1.0
    top_k: int = 0
    beta: float = 0.5
    shared: int = 0
    weighting: Weighting = "uniform"


def vocab_loss(
    student: Head,
    teacher: Sequence[Head] | TopK,
    coefficients: Mapping[str, Any],
    weights_BT: jax.Array,
    *,
    targets_BT: jax.Array | None = None,
    compared_BT: jax.Array | None = None,
    how: Comparison = Comparison(),
    shares: Sequence[float] = (1.0,),
    chunk: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(sum of coefficient x term over weighted positions, {term: its weighted sum}), scalars in f32.

    `coefficients` (numbers, or traced scalars) name the terms: `kl` = KL(p || q), `reverse_kl` = KL(q || p),
    `jsd` = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv:2306.13649;
    p teacher, q student; beta = 0 and 1 stand for the limits of jsd / beta and jsd / (1 - beta), the forward
    and reverse KL), `lm` = the cross-entropy of `targets_BT`, at temperature 1. In nats a position.
    Divergences count by `compared_BT` (default: `weights_BT`). Several teachers are mixed, p = sum of
    share x p_i with shares that sum to 1. With a divergence come the sums `teacher_entropy` (of what is
    compared) and `agreement` (1 where both have the same first choice).

    Gradients reach the student's two arrays, and only through the first result; they are summed in the
    dtypes of these. `chunk` positions of a row have logits at once; 0: all.
    ValueError for vocabularies or a k that do not fit.
    """
    names = tuple(name for name in TERMS if name in coefficients)
    coefs = jnp.stack([jnp.asarray(coefficients[name], jnp.float32) for name in names])
    rows: dict[str, Any] = {"weights": weights_BT}
    if "lm" in names:
        assert targets_BT is not None
        rows["targets"] = targets_BT
    matrices: tuple[jax.Array, ...] = ()
    if names != ("lm",):
        rows["compared"] = weights_BT if compared_BT is None else compared_BT
        if isinstance(teacher, TopK):
            rows["cached"] = _first(teacher, how.top_k)
        else:
            rows["teachers"], matrices = tuple(t.x_BTD for t in teacher), tuple(t.w_VD for t in teacher)
    plan = _plan(student.w_VD.shape[0], matrices, how, shares, chunk, names)
    return _loss(plan, student.x_BTD, student.w_VD, rows, matrices, coefs)


def top_k_of(
    teachers: Sequence[Head],
    *,
    how: Comparison,
    shares: Sequence[float] = (1.0,),
    chunk: int = 0,
) -> TopK:
    """The teachers' `how.top_k` most likely next tokens: what `vocab_loss` selects, to be cached."""
    matrices = tuple(t.w_VD for t in teachers)
    plan = _plan(matrices[0].shape[0], matrices, how, shares, chunk, ("kl",))
    rows = {"teachers": tuple(t.x_BTD for t in teachers)}

    def local(axes: _Axes, rows: Any, matrices: Any) -> Any:
        split, join = pieces(rows["teachers"][0].shape[1], plan.chunk)

        def one(_: None, piece: Any) -> tuple[None, Any]:
            return None, _kept(plan, axes, _mixture(plan, axes, piece["teachers"], matrices))

        return jax.tree.map(join, jax.lax.scan(one, None, jax.tree.map(split, rows))[1])

    over = ("batch", "length")
    return _on_mesh(local, (over, ("vocab",)), over, rows, _cast(plan, rows, matrices))


class _Plan(NamedTuple):
    """All that is known before anything is traced."""

    terms: tuple[str, ...]
    how: Comparison
    shares: tuple[float, ...]
    chunk: int  # positions of a device
    num_ids: int  # the student's vocabulary
    compared: int  # ids that are compared, the first ones
    num_rows: int  # rows of the matrices as they are computed with: the vocabulary, so that devices divide it


class _Axes(NamedTuple):
    """Names of the mesh axes in scope, none without a mesh."""

    rows: tuple[str, ...] = ()  # over which batch and length are split
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()  # over which a matrix's gradient ends up split, some of `rows`


def _plan(
    num_ids: int,
    matrices: tuple[jax.Array, ...],
    how: Comparison,
    shares: Sequence[float],
    chunk: int,
    names: tuple[str, ...],
) -> _Plan:
    for size in (w.shape[0] for w in matrices):
        if how.shared > min(size, num_ids):
            raise ValueError(
                f"shared ids: expected at most the {min(size, num_ids)} of the smaller vocabulary, "
                f"got {how.shared}"
            )
        if not how.shared and size != num_ids:
            raise ValueError(
                f"vocabulary: expected a teacher of {num_ids} tokens as the student's, got {size}; if only "
                "added tokens differ, say how many ids are shared"
            )
    compared = how.shared or num_ids
    if how.top_k >= compared:
        raise ValueError(f"top_k: expected less than the {compared} ids compared, got {how.top_k}")
    ways = ways_of("vocab")
    return _Plan(
        names,
        how,
        tuple(shares),
        -(-chunk // ways_of("length")),
        num_ids,
        compared,
        -(-num_ids // ways) * ways,
    )


def _first(cached: TopK, k: int) -> TopK:
    """The first k of a cache that may hold more: descending, they are what k would have selected."""
    held = cached.ids_BTK.shape[-1]
    if not 0 < k <= held:
        raise ValueError(
            f"top_k: expected 1 to {held}, the outcomes that are cached of the teacher, got {k}; set it, or "
            "cache anew"
        )
    return TopK(cached.ids_BTK[..., :k], cached.logps_BTK[..., :k])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan: _Plan, x_BTD: jax.Array, w_VD: jax.Array, rows: Any, matrices: Any, coefs: jax.Array) -> Any:
    return _run(plan, False, x_BTD, w_VD, rows, matrices, coefs)[:2]


def _forward(plan: _Plan, x_BTD: jax.Array, w_VD: jax.Array, rows: Any, matrices: Any, coefs: jax.Array):
    loss, sums, dx_BTD, dw_VD = _run(plan, True, x_BTD, w_VD, rows, matrices, coefs)
    return (loss, sums), (dx_BTD, dw_VD)


def _backward(plan: _Plan, saved: tuple[jax.Array, jax.Array], cotangents: Any):
    def scaled(gradient: jax.Array) -> jax.Array:
        return (gradient.astype(jnp.float32) * cotangents[0]).astype(gradient.dtype)

    return *map(scaled, saved), None, None, None


_loss.defvjp(_forward, _backward)


def _run(
    plan: _Plan,
    gradients: bool,
    x_BTD: jax.Array,
    w_VD: jax.Array,
    rows: Any,
    matrices: Any,
    coefs: jax.Array,
) -> tuple[Any, ...]:
    """(loss, sums, gradient of x, gradient of w), the last two None without `gradients`."""
    dtype, num_ids, dim = w_VD.dtype, *w_VD.shape
    w_VD, *matrices = _cast(plan, {"teachers": (x_BTD, *rows.get("teachers", ()))}, (w_VD, *matrices))
    over, is_split = ("batch", "length"), dim % ways_of("embed") == 0

    def local(axes: _Axes, x: Any, w: Any, rows: Any, matrices: Any, coefs: Any) -> tuple[Any, ...]:
        split, join = pieces(x.shape[1], plan.chunk)
        chunk = functools.partial(_chunk, plan, axes, w, matrices, coefs)

        def body(dw: Any, piece: Any) -> tuple[Any, Any]:
            loss, sums, dx, more = chunk(*piece, gradients)
            return dw if more is None else (dw.astype(jnp.float32) + more).astype(dtype), (loss, sums, dx)

        dw = jnp.zeros(w.shape, dtype) if gradients else None
        if gradients and axes.vocab:
            dw = jax.lax.pcast(dw, (*axes.rows, *axes.vocab), to="varying")
        dw, (loss, sums, dx) = jax.lax.scan(body, dw, jax.tree.map(split, (x, rows)))
        loss, sums = jax.tree.map(lambda s: jax.lax.psum(jnp.sum(s), axes.rows), (loss, sums))
        if gradients:
            dx, others = join(dx), tuple(a for a in axes.rows if not is_split or a not in axes.embed)
            if is_split and axes.embed:
                dw = jax.lax.psum_scatter(dw, axes.embed, scatter_dimension=1, tiled=True)
            dw = jax.lax.psum(dw, others)
        return loss, sums, dx, dw

    ins = (over, ("vocab",), over, ("vocab",), ())
    outs = ((), (), over, ("vocab", "embed" if is_split else None))
    loss, sums, dx_BTD, dw_VD = _on_mesh(local, ins, outs, x_BTD, w_VD, rows, tuple(matrices), coefs)
    return loss, sums, dx_BTD, dw_VD[:num_ids] if gradients else None


def _chunk(
    plan: _Plan,
    axes: _Axes,
    w_VD: jax.Array,
    matrices: Sequence[jax.Array],
    coefs: jax.Array,
    x_BCD: jax.Array,
    rows: Any,
    gradients: bool,
) -> tuple[Any, ...]:
    """(loss, sums, gradient of x, gradient of w in f32) of one chunk; `w_VD` is this device's part."""
    against = None
    if "compared" in rows:
        kept = rows.get("cached")
        logp_BCV = None if kept else _mixture(plan, axes, rows["teachers"], matrices)
        if plan.how.top_k:
            kept = kept or _kept(plan, axes, logp_BCV)
            logp_BCV = _spread(plan, axes, kept, w_VD.shape[0])
        against = logp_BCV, kept

    def total(logits_BCV: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        values = _values(plan, axes, logits_BCV, against, rows)
        scale_BC = values.pop("scale", 1.0)
        sums = {k: jnp.sum(v * rows["weights" if k == "lm" else "compared"]) for k, v in values.items()}
        scaled = {k: jnp.sum(values[k] * scale_BC * rows["compared"]) for k in DIVERGENCES if k in values}
        return sum(c * (sums | scaled)[k] for c, k in zip(coefs, plan.terms, strict=True)), sums

    logits_BCV = logits_of(x_BCD, w_VD)
    if not gradients:
        return *total(logits_BCV), None, None
    (loss, sums), g_BCV = jax.value_and_grad(total, has_aux=True)(logits_BCV)
    g_BCV = g_BCV.astype(x_BCD.dtype)
    dx_BCD = jnp.einsum("BCV,VD->BCD", g_BCV, w_VD, preferred_element_type=jnp.float32)
    dx_BCD = jax.lax.psum(dx_BCD, axes.vocab).astype(x_BCD.dtype)
    return loss, sums, dx_BCD, jnp.einsum("BCV,BCD->VD", g_BCV, x_BCD, preferred_element_type=jnp.float32)


def _values(plan: _Plan, axes: _Axes, logits_BCV: jax.Array, against: Any, rows: Any) -> dict[str, jax.Array]:
    """Terms and metrics at every position, [B, C] f32, and `scale`, by which positions are weighted."""
    how, values = plan.how, {}
    if "lm" in plan.terms:
        logits = _only(plan.num_ids, axes, logits_BCV)
        hit_BCV = _ids(axes, logits.shape[-1]) == rows["targets"][..., None]
        picked_BC = jax.lax.psum(jnp.sum(jnp.where(hit_BCV, logits, 0.0), -1), axes.vocab)
        values["lm"] = _logsumexp(axes, logits) - picked_BC
    if against is None:
        return values
    p_BCV, kept = against
    q_BCV = _log_softmax(axes, _only(plan.compared, axes, logits_BCV / how.temperature))
    best_BC, own_best_BC = _max(axes, p_BCV), _max(axes, q_BCV)
    same_BC = _max(axes, jnp.where(p_BCV >= best_BC[..., None], q_BCV, NEVER)) >= own_best_BC
    tails = None
    if kept is not None:
        is_kept_BCV = p_BCV > NEVER / 2
        mass_BC = jnp.sum(jnp.exp(kept.logps_BTK), axis=-1)
        tails = (
            jnp.log(jnp.maximum(1 - mass_BC, MIN_TAIL)),
            _logsumexp(axes, jnp.where(is_kept_BCV, NEVER, q_BCV)),
        )
        q_BCV = jnp.where(is_kept_BCV, q_BCV, NEVER)

    def measure(name: str) -> jax.Array:
        at_BC = jax.lax.psum(jnp.sum(_integrand(name, p_BCV, q_BCV, how.beta), -1), axes.vocab)
        return at_BC if tails is None else at_BC + _integrand(name, *tails, how.beta)

    values |= {name: measure(name) * how.temperature**2 for name in plan.terms if name != "lm"}
    entropy_BC = measure("entropy")
    outcomes = plan.compared if kept is None else how.top_k + 1
    scales = {"entropy": entropy_BC / math.log(outcomes), "confidence": jnp.exp(best_BC)}
    if how.weighting != "uniform":
        values["scale"] = scales[how.weighting]
    return values | {"teacher_entropy": entropy_BC, "agreement": same_BC.astype(jnp.float32)}


def _integrand(name: str, p: jax.Array, q: jax.Array, beta: float) -> jax.Array:
    """What sums over outcomes to a divergence, from log-probabilities of teacher and student."""
    if name == "jsd" and beta in (0.0, 1.0):
        name = "reverse_kl" if beta else "kl"
    match name:
        case "kl":
            return jnp.exp(p) * (p - q)
        case "reverse_kl":
            return jnp.exp(q) * (q - p)
        case "jsd":
            m = jnp.logaddexp(math.log(beta) + p, math.log1p(-beta) + q)
            return beta * jnp.exp(p) * (p - m) + (1 - beta) * jnp.exp(q) * (q - m)
        case "entropy":
            return -jnp.exp(p) * p
    raise AssertionError(name)


def _mixture(plan: _Plan, axes: _Axes, xs: Sequence[jax.Array], matrices: Sequence[jax.Array]) -> jax.Array:
    """Log-probabilities of the mixed teachers on this device's part of the vocabulary, [B, C, V]."""
    mixed = None
    for x_BCE, w_VE, share in zip(xs, matrices, plan.shares, strict=True):
        logits_BCV = _only(plan.compared, axes, logits_of(x_BCE, w_VE) / plan.how.temperature)
        logp_BCV = _log_softmax(axes, logits_BCV)
        if len(xs) > 1:
            logp_BCV = logp_BCV + math.log(share)
        mixed = logp_BCV if mixed is None else jnp.logaddexp(mixed, logp_BCV)
    assert mixed is not None
    return mixed


def _kept(plan: _Plan, axes: _Axes, logp_BCV: jax.Array) -> TopK:
    """The k most likely outcomes over all devices, descending; among equals the lower id comes first."""
    k = plan.how.top_k
    logps, ids = jax.lax.top_k(logp_BCV, min(k, logp_BCV.shape[-1]))
    ids = ids + _ids(axes, logp_BCV.shape[-1])[0]
    if axes.vocab:
        ways, here = ways_of("vocab"), jax.lax.axis_index(axes.vocab)

        def gathered(x: jax.Array) -> jax.Array:
            # a sum of what is nothing elsewhere: every device gets all, and knows that all have the same
            everywhere = jnp.zeros((*x.shape[:2], ways, x.shape[2]), x.dtype).at[:, :, here].set(x)
            return jax.lax.psum(everywhere, axes.vocab).reshape(*x.shape[:2], -1)

        logps, order = jax.lax.top_k(gathered(logps), k)
        ids = jnp.take_along_axis(gathered(ids), order, axis=-1)
    return TopK(ids, logps)


def _spread(plan: _Plan, axes: _Axes, kept: TopK, size: int) -> jax.Array:
    """Kept log-probabilities at their place in this device's `size` ids, NEVER at all others, [B, C, V]."""
    places = kept.ids_BTK - _ids(axes, size)[0]
    places = jnp.where(places < 0, size, places)  # a negative index would count from the end
    b, c = kept.ids_BTK.shape[:2]
    at = (jnp.arange(b)[:, None, None], jnp.arange(c)[None, :, None], places)
    return jnp.full((b, c, size), NEVER).at[at].set(kept.logps_BTK, mode="drop")


def _ids(axes: _Axes, size: int) -> jax.Array:
    """The ids of this device's part of the vocabulary."""
    first = jax.lax.axis_index(axes.vocab) * size if axes.vocab else 0
    return first + jnp.arange(size)


def _only(count: int, axes: _Axes, logits_BCV: jax.Array) -> jax.Array:
    """Logits of which all but the first `count` ids of the vocabulary are impossible."""
    size = logits_BCV.shape[-1]
    if count == size * (ways_of("vocab") if axes.vocab else 1):
        return logits_BCV
    return jnp.where(_ids(axes, size) < count, logits_BCV, NEVER)


def _max(axes: _Axes, x_BCV: jax.Array) -> jax.Array:
    return jax.lax.pmax(jnp.max(jax.lax.stop_gradient(x_BCV), axis=-1), axes.vocab)


def _logsumexp(axes: _Axes, x_BCV: jax.Array) -> jax.Array:
    top_BC = _max(axes, x_BCV)
    return top_BC + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(x_BCV - top_BC[..., None]), -1), axes.vocab))


def _log_softmax(axes: _Axes, x_BCV: jax.Array) -> jax.Array:
    return x_BCV - _logsumexp(axes, x_BCV)[..., None]


def _cast(plan: _Plan, rows: Any, matrices: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Matrices in the dtypes of their hidden states and with the plan's rows, before they cross devices."""

    def one(x: jax.Array, w_VD: jax.Array) -> jax.Array:
        missing = plan.num_rows - w_VD.shape[0]
        w_VD = w_VD[: plan.num_rows].astype(x.dtype)
        return jnp.pad(w_VD, ((0, missing), (0, 0))) if missing > 0 else w_VD

    return tuple(one(x, w) for x, w in zip(rows["teachers"], matrices, strict=True))


def _on_mesh(fn: Any, ins: Any, outs: Any, *arrays: Any) -> Any:
    """fn(axes, *arrays) on every device's part of the arrays; `ins`, `outs`: logical axes of each."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn(_Axes(), *arrays)

    def names(logical: str) -> tuple[str, ...]:
        target = RULES[logical]
        return (target,) if isinstance(target, str) else tuple(target)

    def spec(logical: Any) -> Any:
        if all(isinstance(name, str | None) for name in logical):
            return PartitionSpec(*(RULES[name] if name else None for name in logical))
        return tuple(spec(one) for one in logical)

    axes = _Axes(names("batch") + names("length"), names("vocab"), names("embed"))
    return jax.shard_map(functools.partial(fn, axes), in_specs=spec(ins), out_specs=spec(outs))(*arrays)
