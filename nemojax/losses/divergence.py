"""Losses between next-token distributions, from hidden states and output matrices, in one pass of chunks.

Forward and reverse KL and the generalised Jensen-Shannon divergence between a student and a teacher (several
mixed, or one whose top k are cached), the cross-entropy, and the policy loss of sampled tokens. A chunk of
positions at a time, the logits of all heads are made, compared, and turned at once into the gradients of the
student's hidden states and output matrix; the backward pass only scales these. So no logits are ever made
twice, [B, T, V] never exists, and the teacher leaves nothing behind. Under a mesh every device takes chunks
of its own rows and positions and its own part of the vocabulary, and gradients of the matrix cross devices
once, after the last chunk.

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

from nemojax.backends.contract import exact
from nemojax.losses.distributions import NEVER, Axes, TopK, axes_of, integrand, mixture
from nemojax.losses.policy import PolicyLossConfig, policy_terms
from nemojax.losses.tokens import logits_of, pieces
from nemojax.sharding import ways_of

DIVERGENCES = ("kl", "reverse_kl", "jsd")
_COMPARED = (*DIVERGENCES, "teacher_entropy", "agreement")
TERMS = (*DIVERGENCES, "lm", "z", "policy")
Weighting = Literal["uniform", "entropy", "confidence"]


class Head(NamedTuple):
    """Where logits come from: final-normed hidden states and the output matrix."""

    x_BTD: jax.Array
    w_VD: jax.Array


class Policy(NamedTuple):
    """What the policy loss needs beside the student: its settings, and the rows that `policy_terms` names,
    without the weights."""

    cfg: PolicyLossConfig
    rows: Mapping[str, jax.Array]


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
    policy: Policy | None = None,
    how: Comparison = Comparison(),
    shares: Sequence[float] = (1.0,),
    chunk: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(sum of coefficient x term over weighted positions, {term: its weighted sum}), scalars in f32.

    `coefficients` (numbers, or traced scalars) name the terms: `kl` = KL(p || q), `reverse_kl` = KL(q || p),
    `jsd` = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv:2306.13649;
    p teacher, q student; beta = 0 and 1 stand for the limits of jsd / beta and jsd / (1 - beta), the forward
    and reverse KL), `lm` = the cross-entropy of `targets_BT`, at temperature 1. In nats a position. `z` =
    log(Z)^2 of the student at temperature 1 (PaLM, arXiv:2204.02311, section 5). `policy` = the loss of
    `policy_terms` for `targets_BT` sampled at the temperature, with its metrics among the sums.
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
    if {"lm", "policy"} & set(names):
        assert targets_BT is not None
        rows["targets"] = targets_BT
    if "policy" in names:
        assert policy is not None
        rows["policy"] = dict(policy.rows)
    matrices: tuple[jax.Array, ...] = ()
    if set(names) & set(DIVERGENCES):
        rows["compared"] = weights_BT if compared_BT is None else compared_BT
        if isinstance(teacher, TopK):
            rows["cached"] = _first(teacher, how.top_k)
        else:
            rows["teachers"], matrices = tuple(t.x_BTD for t in teacher), tuple(t.w_VD for t in teacher)
    plan = _plan(student.w_VD.shape[0], matrices, how, shares, chunk, names, policy and policy.cfg)
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
    axes = axes_of(teachers[0].x_BTD)

    def local(rows: Any, matrices: Any) -> Any:
        split, join = pieces(rows["teachers"][0].shape[1], plan.chunk)

        def one(_: None, piece: Any) -> tuple[None, Any]:
            return None, axes.top_k(_teacher(plan, axes, piece["teachers"], matrices), how.top_k)

        return jax.tree.map(join, jax.lax.scan(one, None, jax.tree.map(split, rows))[1])

    matrices = _cast(plan, rows["teachers"], matrices)
    return _on_mesh(axes, local, (axes.of_rows, axes.of_matrix), axes.of_rows, rows, matrices)


class _Plan(NamedTuple):
    """All that is known before anything is traced."""

    terms: tuple[str, ...]
    how: Comparison
    shares: tuple[float, ...]
    chunk: int  # positions of a device
    num_ids: int  # the student's vocabulary
    compared: int  # ids that are compared, the first ones
    num_rows: int  # rows of the matrices as they are computed with: the vocabulary, so that devices divide it
    policy: PolicyLossConfig | None


def _plan(
    num_ids: int,
    matrices: tuple[jax.Array, ...],
    how: Comparison,
    shares: Sequence[float],
    chunk: int,
    names: tuple[str, ...],
    policy: PolicyLossConfig | None = None,
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
        max(1, chunk // ways_of("length")) if chunk > 0 else 0,
        num_ids,
        compared,
        -(-num_ids // ways) * ways,
        policy,
    )


def _first(cached: TopK, k: int) -> TopK:
    """The first k of a cache that may hold more: descending, they are what k would have selected. The
    others join the tail."""
    held = cached.ids_BTK.shape[-1]
    if not 0 < k <= held:
        raise ValueError(
            f"top_k: expected 1 to {held}, the outcomes that are cached of the teacher, got {k}; set it, or "
            "cache anew"
        )
    logps_BTK = cached.logps_BTK.astype(jnp.float32)
    if cached.tail_BT is None:
        return TopK(cached.ids_BTK[..., :k], logps_BTK[..., :k])
    all_BTK = jnp.concatenate([logps_BTK, cached.tail_BT[..., None].astype(jnp.float32)], axis=-1)
    all_BTK = jax.nn.log_softmax(all_BTK)  # kept in fewer bits they do not sum to 1
    return TopK(cached.ids_BTK[..., :k], all_BTK[..., :k], jax.nn.logsumexp(all_BTK[..., k:], axis=-1))


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
    dtype, num_ids, axes = w_VD.dtype, w_VD.shape[0], axes_of(x_BTD)
    w_VD, *matrices = _cast(plan, (x_BTD, *rows.get("teachers", ())), (w_VD, *matrices))

    def local(x: Any, w: Any, rows: Any, matrices: Any, coefs: Any) -> tuple[Any, ...]:
        split, join = pieces(x.shape[1], plan.chunk)
        chunk = functools.partial(_chunk, plan, axes, w, matrices, coefs, dtype if gradients else None)

        def body(dw: Any, piece: Any) -> tuple[Any, Any]:
            loss, sums, dx, more = chunk(*piece)
            return dw if more is None else dw + more, (loss, sums, dx)

        dw = jnp.zeros(w.shape, dtype) if gradients else None
        if gradients and axes.vocab:
            dw = jax.lax.pcast(dw, (*axes.rows, *axes.vocab), to="varying")
        dw, (loss, sums, dx) = jax.lax.scan(body, dw, jax.tree.map(split, (x, rows)))
        loss, sums = jax.tree.map(lambda s: jax.lax.psum(jnp.sum(s), axes.rows), (loss, sums))
        if gradients:
            dx, others = join(dx), tuple(name for name in axes.rows if name not in axes.embed)
            if axes.embed:
                dw = jax.lax.psum_scatter(dw, axes.embed, scatter_dimension=1, tiled=True)
            dw = jax.lax.psum(dw, others)
        return loss, sums, dx, dw

    everywhere = PartitionSpec()
    ins = (axes.of_rows, axes.of_matrix, axes.of_rows, axes.of_matrix, everywhere)
    outs = (everywhere, everywhere, axes.of_rows, axes.of_gradient)
    out = _on_mesh(axes, local, ins, outs, x_BTD, w_VD, rows, tuple(matrices), coefs)
    loss, sums, dx_BTD, dw_VD = out
    return loss, sums, dx_BTD, dw_VD[:num_ids] if gradients else None


def _chunk(
    plan: _Plan,
    axes: Axes,
    w_VD: jax.Array,
    matrices: Sequence[jax.Array],
    coefs: jax.Array,
    dtype: Any,
    x_BCD: jax.Array,
    rows: Any,
) -> tuple[Any, ...]:
    """(loss, sums, gradient of x, gradient of w in `dtype`) of one chunk, without gradients if it is None;
    `w_VD` is this device's part."""
    against = None
    if "compared" in rows:
        kept, logp_BCV = rows.get("cached"), None
        if kept is None:
            logp_BCV = _teacher(plan, axes, rows["teachers"], matrices)
            kept = axes.top_k(logp_BCV, plan.how.top_k) if plan.how.top_k else None
        against = (logp_BCV if kept is None else axes.spread(kept, w_VD.shape[0])), kept

    def total(logits_BCV: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        values = _values(plan, axes, logits_BCV, against, rows)
        scale_BC = values.pop("scale", 1.0)
        sums = {k: jnp.sum(v * rows["compared" if k in _COMPARED else "weights"]) for k, v in values.items()}
        scaled = {k: jnp.sum(values[k] * scale_BC * rows["compared"]) for k in DIVERGENCES if k in values}
        return jnp.sum(coefs * jnp.stack([(sums | scaled)[name] for name in plan.terms])), sums

    logits_BCV = logits_of(x_BCD, w_VD)
    if dtype is None:
        return *total(logits_BCV), None, None
    (loss, sums), g_BCV = jax.value_and_grad(total, has_aux=True)(logits_BCV)
    g_BCV = g_BCV.astype(x_BCD.dtype)
    product = functools.partial(jnp.einsum, precision=exact(g_BCV, w_VD))
    dx_BCD = product("BCV,VD->BCD", g_BCV, w_VD, preferred_element_type=jnp.float32)
    dx_BCD = jax.lax.psum(dx_BCD, axes.vocab).astype(x_BCD.dtype)
    # in the dtype of the sum over chunks: a compiler then adds within the product, in f32
    wide = jnp.promote_types(dtype, x_BCD.dtype)
    dw_VD = product("BCV,BCD->VD", g_BCV, x_BCD, preferred_element_type=wide).astype(dtype)
    return loss, sums, dx_BCD, dw_VD


def _values(plan: _Plan, axes: Axes, logits_BCV: jax.Array, against: Any, rows: Any) -> dict[str, jax.Array]:
    """Terms and metrics at every position, [B, C] f32, and `scale`, by which positions are weighted."""
    how, values = plan.how, {}
    if {"lm", "z"} & set(plan.terms):
        all_BCV = axes.only(plan.num_ids, logits_BCV)
        lse_BC = axes.logsumexp(all_BCV)
        values |= {"z": lse_BC**2} if "z" in plan.terms else {}
        values |= {"lm": lse_BC - axes.pick(all_BCV, rows["targets"])} if "lm" in plan.terms else {}
    if "policy" in plan.terms:
        assert plan.policy is not None
        scaled_BCV = axes.only(plan.num_ids, logits_BCV / how.temperature)
        logps_BC = axes.pick(scaled_BCV, rows["targets"]) - axes.logsumexp(scaled_BCV)
        inputs = rows["policy"] | {"weights": rows["weights"]}
        values["policy"], metrics = policy_terms(logps_BC, inputs, plan.policy)
        values |= metrics
    if against is None:
        return values
    p_BCV, kept = against
    q_BCV = axes.log_softmax(axes.only(plan.compared, logits_BCV / how.temperature))
    best_BC, outcomes = axes.max(p_BCV), plan.compared
    agrees_BC = axes.max(jnp.where(p_BCV >= best_BC[..., None], q_BCV, NEVER)) >= axes.max(q_BCV)
    tails = None
    if kept is not None:
        outcomes = how.top_k + 1
        tails = kept.tail(), axes.logsumexp(axes.others(p_BCV, q_BCV))
        q_BCV = jnp.where(p_BCV > NEVER / 2, q_BCV, NEVER)

    def measure(name: str) -> jax.Array:
        at_BC = axes.sum(integrand(name, p_BCV, q_BCV, how.beta))
        return at_BC if tails is None else at_BC + integrand(name, *tails, how.beta)

    values |= {name: measure(name) * how.temperature**2 for name in plan.terms if name in DIVERGENCES}
    values |= {"teacher_entropy": measure("entropy"), "agreement": agrees_BC.astype(jnp.float32)}
    match how.weighting:
        case "entropy":
            values["scale"] = values["teacher_entropy"] / math.log(outcomes)
        case "confidence":
            values["scale"] = jnp.exp(best_BC)
    return values


def _teacher(plan: _Plan, axes: Axes, xs: Sequence[jax.Array], matrices: Sequence[jax.Array]) -> jax.Array:
    """Log-probabilities of the mixed teachers on this device's part of the vocabulary, [B, C, V]."""
    logits = (logits_of(x, w) / plan.how.temperature for x, w in zip(xs, matrices, strict=True))
    return mixture((axes.log_softmax(axes.only(plan.compared, one)) for one in logits), plan.shares)


def _cast(plan: _Plan, xs: Sequence[jax.Array], matrices: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Matrices in the dtypes of their hidden states and with the plan's rows, before they cross devices."""

    def one(x: jax.Array, w_VD: jax.Array) -> jax.Array:
        missing = plan.num_rows - w_VD.shape[0]
        w_VD = w_VD[: plan.num_rows].astype(x.dtype)
        return jnp.pad(w_VD, ((0, missing), (0, 0))) if missing > 0 else w_VD

    return tuple(one(x, w) for x, w in zip(xs, matrices, strict=True))


def _on_mesh(axes: Axes, fn: Any, ins: Any, outs: Any, *arrays: Any) -> Any:
    """`fn` on every device's part of the arrays; `ins`, `outs`: their partitions."""
    return jax.shard_map(fn, in_specs=ins, out_specs=outs)(*arrays) if axes.vocab else fn(*arrays)
