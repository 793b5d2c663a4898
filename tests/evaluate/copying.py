"""A model written down, not trained: it looks for the last few tokens further up and says what came next."""

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec, Attention, BlockSpec, Llama3Scaling, NoOp, Rope
from nemojax.model import layout, llama

_BACK, _CODE = 8, 32  # tokens that are compared, numbers that stand for a token
_SHARP = 1e5  # of the heads that look back by a fixed distance: 44 tokens are nearly seven turns
_MATCH, _SURE = 40.0, 60.0


def copying_model(vocab_size: int, context: int, window: int | None = None) -> tuple[ArchSpec, llama.Params]:
    """Two layers. The first notes the tokens 1 to 8 places back, a head each; the second compares them with
    the latest ones (an induction head, Olsson et al., arXiv:2209.11895) and fetches the token there.

    window: how far the second looks.
    """
    dim, head_dim = (_BACK + 2) * _CODE + 8, _BACK * _CODE + 2
    # one pair turns by a radian a token, for distances; the others stand still, for contents
    arch = ArchSpec(
        vocab_size=vocab_size,
        dim=dim,
        num_heads=_BACK,
        head_dim=head_dim,
        blocks=(BlockSpec(Attention(_BACK), NoOp()), BlockSpec(Attention(_BACK, window), NoOp())),
        context=context,
        rope=Rope(theta=1e30, scaling=Llama3Scaling(1e9, 10.0, 10.5, 70)),
    )
    codes_VE = np.random.default_rng(0).normal(size=(vocab_size, _CODE))
    codes_VE /= np.linalg.norm(codes_VE, axis=1, keepdims=True)
    shapes = llama.abstract_params(arch)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    layers = layout.unstack(params, arch)["layers"]  # views
    back, match = layers["0"]["attn"], layers["1"]["attn"]
    constant, slots = dim - 1, [slice(i * _CODE, (i + 1) * _CODE) for i in range(_BACK + 2)]
    contents = np.delete(np.arange(head_dim), [0, head_dim // 2])

    params["embed"]["weight"][:, slots[0]] = codes_VE
    params["embed"]["weight"][:, constant] = 1.0
    params["head"]["weight"][:, slots[-1]] = _SURE * codes_VE
    params["norm"]["scale"][:] = 1.0
    # undoes the division: first there are a code and the constant, then a code for each place back as well
    back["norm"][:], match["norm"][:] = np.sqrt(2 / dim), np.sqrt((_BACK + 2) / dim)
    for head in range(_BACK):
        angle = -(head + 1.0)
        back["q"][constant, head, [0, head_dim // 2]] = np.cos(angle) * _SHARP, np.sin(angle) * _SHARP
        back["k"][constant, head, 0] = np.sqrt(head_dim)
        back["v"][slots[0], head, :_CODE] = np.eye(_CODE)
        back["o"][head, :_CODE, slots[head + 1]] = np.eye(_CODE)
    for place in range(_BACK):
        here = contents[place * _CODE : (place + 1) * _CODE]
        match["q"][slots[place], 0, here] = np.eye(_CODE) * _MATCH
        match["k"][slots[place + 1], 0, here] = np.eye(_CODE) * np.sqrt(head_dim)
    match["v"][slots[0], 0, :_CODE] = np.eye(_CODE)
    match["o"][0, :_CODE, slots[-1]] = np.eye(_CODE)
    return arch, jax.tree.map(jnp.asarray, params)
