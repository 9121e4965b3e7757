"""Keys of a `config.json` that are not read: harmless ones, and such as ask for another computation.

A key is known if a family reads it or if it stands here; any other is warned about by name
(`config_reader.Fields.unknown`). `tests/models/test_config_keys.py` holds this against the config
classes of transformers.
"""

from typing import Any

REFUSED: dict[str, tuple[Any, str]] = {
    "attention_chunk_size": (0, "attention in chunks is not supported"),
    "num_kv_shared_layers": (0, "layers that share keys and values are not supported"),
    "kv_sharing_modes": ([], "layers that share keys and values are not supported"),
    "is_causal": (True, "attention to later tokens is not supported"),
    "use_bidirectional_attention": (False, "attention to later tokens is not supported"),
    "is_encoder_decoder": (False, "only decoders are supported"),
    "add_cross_attention": (False, "only decoders are supported"),
    "per_layer_config": ({}, "layers of different shapes are not supported"),
    "pruned_heads": ({}, "heads cannot be pruned while loading; save the pruned model"),
    "use_mrope": (False, "rotary positions of several dimensions are not supported"),
    "rope_interleaved": (False, "rotary pairs must be the two halves of a head"),
    "transformers_weights": ("", "weights must be in model.safetensors or in what its index names"),
}
"""Key -> the value that changes nothing, and why no other can be. null and an empty value change
nothing either.
"""

_TRAINING = """
attention_dropout attention_probs_dropout_prob chunk_size_feed_forward embd_pdrop finetuning_task gradient_checkpointing
hidden_dropout id2label initializer_range label2id num_labels pretraining_tp problem_type resid_pdrop
task_specific_params tf_legacy_loss tie_encoder_decoder use_bfloat16
"""
_RUNNING = """
attn_implementation cache_implementation experts_implementation output_attentions output_hidden_states return_dict
return_dict_in_generate output_scores torchscript use_cache
"""
_ABOUT_THE_FILE = """
architectures bos_token decoder_start_token_id eos_token is_decoder is_llama_config is_matryoshka
matryoshka_dimensions model_type name_or_path
pad_token_id prefix sep_token_id tokenizer_class transformers_version transformers.js_config unsloth_fixed
unsloth_version cross_attention_hidden_size
"""
_GENERATION = """
bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty
suppress_tokens temperature top_k top_p typical_p
"""  # transformers 5 drops them too: they count in generation_config.json alone
_VISION = "boi_token_index eoi_token_index image_token_index mm_tokens_per_image vision_config"
_READ_BUT_NOT_APPLIED = "attn_logit_softcapping"  # of Gemma 3, by transformers and by llama.cpp

_READ_ELSEWHERE = "quantization_config"  # by octavo.weights.quantization

HARMLESS = frozenset(
    " ".join(
        (_READ_ELSEWHERE, _TRAINING, _RUNNING, _ABOUT_THE_FILE, _GENERATION, _VISION, _READ_BUT_NOT_APPLIED)
    ).split()
)
"""Keys that do not change what the text model computes. Those that begin with an underscore are
transformers' own notes.
"""
