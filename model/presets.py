"""The published shapes of LLaMA, Mistral and Mixtral, for estimates, benchmarks and fresh weights.

Sources: the `config.json` files of the releases, and Meta's params.json where a conversion
disagrees (the first LLaMA's token ids). The invariant: a preset is what `read_config` makes of the
published file, and has the published number of parameters.
"""

from dataclasses import replace

from model.config import DecoderConfig, Llama3Scaling


def _llama(width: int, inner: int, layers: int, heads: int, eps: float = 1e-5) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=128,
        max_position_embeddings=2048,
        rms_norm_eps=eps,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


_LLAMA_7B = _llama(4096, 11_008, 32, 32, 1e-6)
_LLAMA_13B = _llama(5120, 13_824, 40, 40, 1e-6)

_LLAMA_3_8B = replace(
    _llama(4096, 14_336, 32, 32),
    vocab_size=128_256,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_theta=500_000.0,
    bos_token_id=128_000,
    eos_token_ids=(128_001,),
)
_LLAMA_3_70B = replace(
    _LLAMA_3_8B,
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
)


def _llama_31(of: DecoderConfig, factor: float = 8.0) -> DecoderConfig:
    scaling = Llama3Scaling(
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    return replace(of, rope_scaling=scaling, max_position_embeddings=131_072)


_MISTRAL_7B = replace(
    _llama(4096, 14_336, 32, 32),
    model_type="mistral",
    num_key_value_heads=8,
    max_position_embeddings=32_768,
)

PRESETS = {
    "llama-7b": _LLAMA_7B,
    "llama-13b": _LLAMA_13B,
    "llama-30b": _llama(6656, 17_920, 60, 52, 1e-6),
    "llama-65b": _llama(8192, 22_016, 80, 64),
    "llama-2-7b": replace(_LLAMA_7B, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama-2-13b": replace(_LLAMA_13B, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama-2-70b": replace(
        _llama(8192, 28_672, 80, 64), num_key_value_heads=8, max_position_embeddings=4096
    ),
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3-70b": _LLAMA_3_70B,
    "llama-3.1-8b": _llama_31(_LLAMA_3_8B),
    "llama-3.1-70b": _llama_31(_LLAMA_3_70B),
    "llama-3.2-1b": replace(
        _llama_31(_LLAMA_3_8B, factor=32.0),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": replace(
        _llama_31(_LLAMA_3_8B, factor=32.0),
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
    ),
    "mistral-7b-v0.1": replace(_MISTRAL_7B, sliding_window=4096),
    "mistral-7b-v0.2": replace(_MISTRAL_7B, rope_theta=1e6),
    "mistral-7b-v0.3": replace(_MISTRAL_7B, rope_theta=1e6, vocab_size=32_768),
    "mixtral-8x7b": replace(
        _MISTRAL_7B,
        model_type="mixtral",
        rope_theta=1e6,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
    ),
}
