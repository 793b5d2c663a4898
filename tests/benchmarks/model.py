"""The Llama of 5.2M parameters that every benchmark runs, for each library; all of them import late."""

from typing import Any

VOCAB, DIM, LAYERS, HEADS, KV_HEADS, FFN = 1024, 256, 6, 8, 4, 768


def our_arch(context: int) -> Any:
    from nemojax.arch import uniform

    return uniform(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        ffn_width=FFN,
        context=context,
    )


def torch_model(context: int) -> Any:
    """Of transformers, with random weights and nothing that ends a sequence."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def tunix_model() -> Any:
    """Of Tunix. Its feed-forwards begin at zero: they are filled, lest a zero be cheaper."""
    import jax
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig  # pyright: ignore[reportMissingImports]

    config = ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=DIM,
        hidden_dim=FFN,
        num_heads=HEADS,
        head_dim=DIM // HEADS,
        num_kv_heads=KV_HEADS,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    model = Llama3(config, rngs=nnx.Rngs(0))
    for i, layer in enumerate(model.layers):
        for j, linear in enumerate((layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)):
            key = jax.random.fold_in(jax.random.key(1), 3 * i + j)
            linear.kernel.value = 0.02 * jax.random.normal(key, linear.kernel.value.shape)
    return model
