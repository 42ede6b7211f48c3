"""The published techniques that work here, as data: `lath systems`, `docs/systems.md` and a test.

A technique is listed when its definition in NumPy, its kernels and its tests exist; each test is
named here and must exist. What a paper leaves to a model or a scheduler stays the caller's, and the
note says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal[
    "low-bit linear", "sparse weights", "rounding of weights", "8-bit attention",
    "key-value cache", "decoding", "sparse selection", "eviction", "ragged batches", "trees",
]  # fmt: skip


@dataclass(frozen=True)
class System:
    """name: as published. how: the combination of parts that it is here. tests: "file::test"."""

    name: str
    family: Family
    how: str
    tests: tuple[str, ...]
    note: str = ""


_TREE_TESTS = (
    "test_decode_attention.py::test_a_tree_row_reads_its_path",
    "test_decode_attention.py::test_wide_trees",
    "test_paged_kv.py::test_compact_keeps_pages_and_moves_loose_tokens_to_the_tail",
)


def _tree(name: str, note: str) -> System:
    how = "`kv.append` the nodes, `decode_attention(…, tree_mask=…)`, `kv.compact` to the path"
    return System(name, "trees", how, _TREE_TESTS, note)


def _selector(name: str, text: str, note: str, *tests: str) -> System:
    how = f'`select(q, kv, "{text}", budget)`, `patch(model, kv="int8", select="{text}:1024")`'
    common = ("test_selectors.py::test_equals_its_definition",)
    return System(name, "sparse selection", how, (*common, *tests), note)


def _linear(name: str, how: str, note: str, *tests: str) -> System:
    return System(name, "low-bit linear", how, tests, note)


_SPARSE_TESTS = (
    "test_sparse.py::test_the_decoded_tile_is_the_dense_tile",
    "test_triton_sparse.py::test_parity",
    "test_cpu_sparse.py::test_parity",
)


def _sparse(name: str, how: str, note: str, *tests: str) -> System:
    return System(name, "sparse weights", how, (*_SPARSE_TESTS, *tests), note)


SYSTEMS = (
    _linear(
        "FlexQ",
        '`linear(x, "int6-g128", activations="int6-g128")`, or "int8-g128" in some layers',
        "6-bit integers in int8 dots: the same sums as its bit planes on binary tensor cores",
        "test_activations.py::test_bit_planes_are_the_integer_matmul",
        "test_activations.py::test_flexq_stores_six_bits",
        "test_activations.py::test_flexq_patches_each_layer_as_it_asks",
        "test_activations.py::test_parity",
    ),
    _linear(
        "W8A8",
        '`linear(x, "int8", activations="int8")`: a scale per row and per token',
        "",
        "test_activations.py::test_parity",
        "test_linear.py::test_parity",
    ),
    _linear(
        "FP8 (E4M3, E5M2)",
        '`linear(x, "e4m3", activations="fp8")`, "e5m2" and "fp8-e5m2"',
        "an E4M3 dot where the GPU has one, fp16 that holds the same numbers elsewhere",
        "test_activations.py::test_no_other_code_is_nearer",
        "test_scaled_codes.py::test_fp16_stands_in_for_e4m3_exactly",
        "test_triton_tables.py::test_parity",
        "test_cpu_tables.py::test_bounds",
    ),
    _linear(
        "MatQuant",
        '`weight = quantize(w, "int8-g64-nested")`, `weight.nested(4)`, `weight.nested(2)`',
        "views of one store, half a step beside whole numbers so that no rounding is left to do; "
        "ordinary int8 codes are sliced as published and packed anew; training is not part of it",
        "test_nested.py::test_slices_of_all_codes",
        "test_nested.py::test_ordinary_codes_are_rounded",
        "test_nested.py::test_the_view_is_the_end_of_the_store",
        "test_nested.py::test_views_of_one_weight_run_and_read_their_share",
        "test_nested.py::test_parity",
    ),
    _linear(
        "DGQ",
        '`linear(x, "int4-g128-s8", activations="int8")`, `quantize(…, search=True)`',
        "scales of groups are multiplied into the codes: one int8 dot, summed in int32 over all K; "
        "the search is of the groups' scales, not of the rows' after it",
        "test_scaled_codes.py::test_dgq_is_one_integer_sum_over_all_groups",
        "test_scaled_codes.py::test_scales_that_leave_int8_are_refused",
        "test_tables.py::test_int8_group_scales_are_one_int8_matmul",
    ),
    System(
        "SageAttention",
        "8-bit attention",
        "`attention(q, k, v)`: int8 QKᵀ, keys centred, P·V in 16 bits; `precision=` is the ladder",
        (
            "test_attention_accuracy.py::test_biased_and_drifting_keys",
            "test_cpu_attention.py::test_parity",
            "test_triton_attention.py::test_parity",
        ),
        "the mean of a page of 64 keys, not of all keys",
    ),
    System(
        "Bitnet.cpp",
        "low-bit linear",
        '`quantize(weight, "ternary")` or `"ternary-1.6"`, `linear(…, activations="int8")`; '
        "`lath.integration.bitnet.load_bitnet` reads Hugging Face's checkpoints",
        (
            "test_ternary.py::test_kernels_give_the_integers_of_the_look_ups",
            "test_ternary.py::test_look_ups_are_the_product",
            "test_ternary.py::test_packing_is_the_definition_and_round_trips",
            "test_triton_tables.py::test_int8_sums_are_exact_at_every_split",
            "test_bitnet.py::test_every_layer_and_the_logits",
        ),
        "four codes a byte or five (1.6 bits, K padded to 160); TL1 and TL2 in the definition",
    ),
    System(
        "Vec-LUT",
        "low-bit linear",
        '`linear(x, w, activations="int8")` of a ternary weight on a CPU without VNNI, 8 tokens up',
        (
            "test_ternary.py::test_look_ups_on_a_cpu",
            "test_ternary.py::test_vector_look_ups_are_the_product",
            "test_ternary.py::test_other_instruction_sets",
        ),
        "four codes an index, entries of 16 tokens; LATH_ISA=avx2 or portable takes it elsewhere",
    ),
    System(
        "Tequila",
        "low-bit linear",
        "`packed, bias = tequila(weight)`, `linear(x, packed, bias)`",
        ("test_ternary.py::test_tequila",),
        "training is not part of it",
    ),
    System(
        "Prepacking",
        "8-bit attention",
        "`attention(…, cu_seqlens=…)`",
        ("test_attention.py::test_packed_is_a_loop",),
        "bin packing and positions are the caller's",
    ),
    System(
        "gpt-oss",
        "8-bit attention",
        "`attention(…, sink=…, window=…)`",
        ("test_hf_attention_models.py::test_float_pages_equal_eager",),
        "its attention only: MXFP4 experts are not here yet",
    ),
    System(
        "QuantSpec",
        "key-value cache",
        '`PagedKV(key_codec="int8-planes", value_codec="int8-planes")`, `draft=True`',
        (
            "test_decode_attention.py::test_draft_reads_the_upper_planes",
            "test_self_speculation.py::test_tokens_are_those_of_plain_decoding",
        ),
        "groups are pages of 64; scales are symmetric; one buffer of up to 64 tokens",
    ),
    System(
        "KV-AdaQuant",
        "key-value cache",
        '`PagedKV(key_codec="int4", value_codec="int2")`, `patch(model, kv="k4v2")`',
        ("test_decode_attention.py::test_codecs_are_within_their_rounding",),
    ),
    System(
        "FireQ",
        "key-value cache",
        '`PagedKV("int4", "int4", key_channel_scales=…)`, `decode_attention(…, query="e4m3")`; '
        '`linear(x, "int4-g128-fp8", activations="fp8")`',
        (
            "test_scaled_codes.py::test_fireq_entries_are_rounded_to_e4m3",
            "test_scaled_codes.py::test_fireq_scales_at_the_edge_of_e4m3",
            "test_triton_tables.py::test_parity",
            "test_decode_attention.py::test_e4m3_and_fireq",
            "test_channel_scales.py::test_scales_of_pairs_commute_with_rope",
        ),
        "codes times an E4M3 scale of the group, rounded to E4M3; a scale of the row in fp32",
    ),
    System(
        "CacheBlend",
        "key-value cache",
        "`kv.rerotate(delta, inverse_frequencies)`",
        ("test_paged_kv.py::test_rerotate_turns_decoded_keys",),
        "choosing what to recompute is the caller's",
    ),
    System(
        "SwiftKV",
        "key-value cache",
        "layers that hold one `PagedKV`, or `kv.fork()`",
        ("test_decode_contracts.py::test_layers_may_share_a_cache",),
        "distillation is not part of it",
    ),
    System(
        "Hogwild! Inference",
        "key-value cache",
        "`decode_attention` of a rotated query per segment, then `merge`",
        ("test_decode_contracts.py::test_segments_merge_into_the_whole",),
        "the shared loop of workers is the caller's",
    ),
    System(
        "FlashDecoding++",
        "decoding",
        '`decode_attention(…, scheme="unified")`: one maximum from the page bound, with a fallback',
        ("test_decode_attention.py::test_splits_and_schemes_change_nothing",),
        "the flat GEMM and its dataflow are `linear`'s plan",
    ),
    _selector(
        "Quest",
        "quest",
        "the bound of every page, or of its sub-pages (`quest-16`); `+outliers`",
        "test_selectors.py::test_quest_finds_the_page_of_the_largest_score",
    ),
    _selector(
        "TokenSelect",
        "tokenselect",
        "a soft vote of all heads; `Selection(reuse_cosine=0.9)`",
        "test_selectors.py::test_the_soft_vote_is_not_the_sum_of_the_scores",
        "test_selectors.py::test_the_selection_cache_serves_like_queries",
    ),
    _selector(
        "SparQ Attention",
        "sparq",
        'a copy of the keys by channel; `repair="mean"` is its α mix',
        "test_selectors.py::test_sparq_with_all_channels_is_the_exact_top_k",
        "test_selectors.py::test_sparq_mixes_in_the_mean_value",
    ),
    _selector(
        "Double Sparsity",
        "double_sparsity",
        "labels of 8 or 4 bits; `double_sparsity_channels`",
        "test_selectors.py::test_double_sparsity_finds_the_channels",
        "test_selectors.py::test_labels_take_their_share_of_the_bytes",
    ),
    _selector(
        "ClusterKV",
        "clusterkv",
        "cosine k-means of each KV head, whole clusters to the budget",
        "test_selectors_data.py::test_planted_clusters_are_found",
        "test_selectors_data.py::test_singleton_clusters_are_the_exact_top_k",
    ),
    _selector(
        "HGCA",
        "hgca",
        "recent pages, and old tokens of more than the mean weight; or `merge`",
        "test_selectors_data.py::test_hgca_is_a_merge_of_its_dense_and_its_sparse_part",
        "test_decode_contracts.py::test_segments_merge_into_the_whole",
    ),
    System(
        "AxFormer",
        "sparse selection",
        '`select(q, kv, "tokenselect", …, heads="query")` in some layers',
        ("test_selectors.py::test_everything_is_dense_attention",),
        "its hard attention only: pruning is not part of it",
    ),
    System(
        "PagedEviction",
        "eviction",
        '`lath.PagedEviction(budget).step(kv)`, or `select(q, kv, "paged_eviction", …)`',
        (
            "test_eviction.py::test_paged_eviction_step_by_step",
            "test_selectors_data.py::test_paged_eviction_reads_pages_of_large_values_and_small_keys",
        ),
        "pages are shared by the KV heads: one score for all of them",
    ),
    System(
        "SCOPE",
        "eviction",
        "`lath.Scope(budget, prefill, interval).step(kv, q)`",
        ("test_eviction.py::test_scope_leaves_the_prompt_and_bounds_the_rest",),
        "the sliding strategy, updated now and then; no growing pool",
    ),
    System(
        "PrefixKV",
        "eviction",
        "`lath.prefix_kv_budgets(masses, total)`, `Selection(layer_budgets=…)`",
        ("test_layer_budgets.py::test_equal_layers_get_equal_budgets_and_skewed_ones_fewer",),
    ),
    System(
        "ScaleKV",
        "eviction",
        "`lath.scale_kv_budgets(classes, large, small)`, `Selection(layer_budgets=…)`",
        ("test_layer_budgets.py::test_the_table_is_respected",),
        "classing the layers is the caller's",
    ),
    System(
        "FreqKV",
        "eviction",
        "`kv.compact_frequencies(keep)`",
        (
            "test_store_transforms.py::test_full_retention_changes_nothing",
            "test_store_transforms.py::test_smooth_signals_stay_and_noise_does_not",
        ),
        "keys as they are stored, after their rotation",
    ),
    System(
        "DeltaLLM",
        "eviction",
        "`kv.threshold_deltas(threshold, window)`",
        ("test_store_transforms.py::test_deltas_against_the_definition",),
        "says how sparse the deltas are; the loop reads whole pages all the same",
    ),
    *(
        System(
            name,
            "eviction",
            "`kv.compact(keep, renumber=False)`, `kv.append(…, keep=…)`",
            (
                "test_store_operations.py::test_compaction_is_masking_for_floats",
                "test_store_operations.py::test_keeping_everything_is_the_identity",
            ),
            "what to keep is the caller's list",
        )
        for name in ("METok", "Skip-Vision", "Dynamic-LLaVA")
    ),
    System(
        "BASS",
        "ragged batches",
        "`kv.append(…, lengths=…)`, `decode_attention(…, query_lengths=…)`",
        ("test_decode_attention.py::test_ragged_is_a_loop",),
        "drafting is the caller's",
    ),
    System(
        "EMS-SD",
        "ragged batches",
        "as BASS; accepted lengths differ by `kv.crop([…])`",
        (
            "test_decode_attention.py::test_ragged_is_a_loop",
            "test_paged_kv.py::test_crop_lists_and_short_sequences",
        ),
    ),
    System(
        "GWQ",
        "low-bit linear",
        '`quantize(w, "int4-g128+out1%", importance=…)`: fp16 outliers beside any other codec',
        (
            "test_sums.py::test_planted_outliers_are_kept_and_the_rest_is_nearer",
            "test_sums.py::test_outliers_anywhere",
            "test_sums.py::test_outliers_by_what_they_cost",
            "test_cpu_sums.py::test_a_sum_is_one_multiplication_by_what_it_decodes_to",
            "test_triton_sums.py::test_outliers_are_exact",
        ),
        "the largest importance · w²; gradients are the caller's (importance = their squares)",
    ),
    System(
        "SliM-LLM",
        "low-bit linear",
        '`quantize(w, "mix2-g128-asym", importance=…)`: M - 1, M, M + 1 bits by groups of columns',
        (
            "test_sums_codecs.py::test_mean_bits_are_those_of_the_bytes",
            "test_sums_codecs.py::test_every_pair_of_widths_round_trips",
            "test_sums_codecs.py::test_wide_groups_are_those_that_need_them",
            "test_sums_codecs.py::test_the_order_of_groups_does_not_matter",
            "test_cpu_sums.py::test_bounds",
            "test_triton_sums.py::test_parity",
        ),
        "a fixed eighth of the groups above and below: no search of it, no calibrated scales",
    ),
    System(
        "Fast 2-bit",
        "low-bit linear",
        '`quantize(w, "mix2:4-2.25-g64-s8+out0.5%")`: 2- and 4-bit groups, scales of two orders',
        (
            "test_sums_codecs.py::test_mean_bits_are_those_of_the_bytes",
            "test_sums_codecs.py::test_mixed_is_nearer_than_uniform_where_groups_differ",
            "test_cpu_sums.py::test_bounds",
            "test_aot_sums.py::test_sums_compile",
        ),
        "one launch for each width; its asynchronous loads are the compiler's pipelining here",
    ),
    System(
        "BiLLM",
        "low-bit linear",
        '`quantize(w, "billm10%-g128", importance=…)`, `"int1-g128+int1-g128"`: sums of signs',
        (
            "test_sums_codecs.py::test_a_mask_between_two_scales_is_two_sums_of_signs",
            "test_sums_codecs.py::test_two_signs_by_brute_force",
            "test_sums_codecs.py::test_second_signs_lower_the_error_and_a_split_more",
            "test_sums_codecs.py::test_the_mask_is_counted",
        ),
        "two bits a weight, the mask counted; salience by importance · w²; no error compensation",
    ),
    System(
        "TP-Aware Dequantization",
        "low-bit linear",
        "`sort_pairs(model, importance)`, then `patch`; `weight.shard(rank, ranks, axis)`",
        (
            "test_pairs.py::test_a_sorted_pair_needs_no_gather_on_any_rank",
            "test_pairs.py::test_ranks_add_up_exactly",
            "test_pairs.py::test_ranks_add_up_within_the_bound",
            "test_pairs.py::test_sorting_changes_nothing_and_is_undone_bit_for_bit",
        ),
        "ranks are simulated in one process; processes and all-reduce are the caller's",
    ),
    System(
        "VPTQ",
        "low-bit linear",
        '`quantize(weight, "vq8-65536+256")`, `linear`, `patch(model, weights="vq8-256")`',
        (
            "test_vectors.py::test_weighted_k_means_beats_scalar_codes_at_equal_bits",
            "test_vectors.py::test_importance_moves_the_error_where_it_counts_less",
            "test_triton_vectors.py::test_parity",
            "test_cpu_vectors.py::test_bounds",
        ),
        "vectors lie along the inputs; importance is the diagonal of the Hessian, the caller's; no "
        "outlier book, no error feedback between columns",
    ),
    System(
        "GLVQ",
        "low-bit linear",
        '`quantize(weight, "lattice2-d8-g128")`, `linear`: x G over the whole numbers z',
        (
            "test_lattice.py::test_a_point_of_the_lattice_is_its_own",
            "test_lattice.py::test_a_lattice_beats_scalar_codes_at_equal_bits",
            "test_lattice.py::test_singular_lattices_are_refused",
            "test_lattice.py::test_cpu_parity",
        ),
        "Babai's nearest plane, generators by alternating least squares; no companding, no mixed "
        "bits of groups, no calibration",
    ),
    _tree("Medusa", "heads are the caller's"),
    _tree("Sequoia", "the shape of the tree and its verification are the caller's"),
    _tree("ProPD", "dropping nodes between layers is the caller's"),
    _tree("Staged Speculative Decoding", "the stages are the caller's"),
    _tree("Lookahead (Alipay)", "the trie is the caller's"),
    _tree("LLMCad", "the small model is the caller's"),
    _tree("PPD", "prompt nodes: any boolean table"),
    _tree("RASD", "merging retrieval and draft trees is the caller's"),
    _tree("RSD (Recursive)", "sampling is the caller's"),
    _tree("Hydra", "heads are the caller's"),
    _tree("Clover", "the decoder over the heads is the caller's"),
    _tree("Jakiro", "the experts that draft are the caller's"),
    System(
        "GPTQ",
        "rounding of weights",
        '`quantize(w, codec, quantizer="gptq", hessian=…)`, `patch(…, quantizer="gptq")`',
        (
            "test_reference_quantizers.py::test_gptq_is_optimal_brain_quantisation_in_a_fixed_order",
            "test_quantizers.py::test_gptq_has_the_codes_of_the_definition",
            "test_calibration.py::"
            "test_each_layer_is_rounded_for_what_the_rounded_layers_before_return",
        ),
        "every codec of single weights; act-order with the groups of the unsorted columns",
    ),
    System(
        "AWQ",
        "rounding of weights",
        '`awq_scales(weights, codec, hessian)`, `patch(…, quantizer="awq")`',
        (
            "test_quantizers.py::test_awq_scales_equal_the_definition",
            "test_calibration.py::test_awq_scales_cancel_in_the_whole_model",
        ),
        "scales from rms(x), not mean |x|; the clipping of weights is `search=True`",
    ),
    System(
        "HQQ",
        "rounding of weights",
        '`quantize(w, "int4-g64-fzero", quantizer="hqq")`',
        ("test_quantizers.py::test_hqq_equals_the_definition",),
        "float minima; errors are split in steps of the scale",
    ),
    _sparse(
        "Flash-LLM",
        '`quantize(w, "sparse70-fp16")`, `linear`: read by a bitmap, multiplied as dense tiles',
        "a bit for each weight in place of an index for each kept one; numbers are gathered into "
        "registers, no thread writes a tile itself; magnitudes choose, or zeros of your own "
        "(`sparse0-…`)",
        "test_triton_sparse.py::test_sanitizer_is_clean_and_order_does_not_matter",
    ),
    _sparse(
        "SparAMX",
        '`patch(model, weights="sparse50-bf16")`; the bitmap expands 64 bytes with vpexpandb',
        "AVX512-VNNI, not AMX; linear layers only, its sparse cache is not here",
        "test_sparse_modules.py::test_a_patched_model_is_the_masked_model",
    ),
    _sparse(
        "Sparse Finetuning (SquareHead)",
        '`quantize(w, "sparse75-int8-g128")`, or "sparse0-int8" of a weight that was pruned before',
        "its use of sparse weights only: finetuning is the caller's",
        "test_sparse.py::test_sparse_is_dense_of_the_decoded_weights",
        "test_sparse_modules.py::test_a_model_that_was_pruned_before_keeps_its_own_zeros",
    ),
    _sparse(
        "LPViT",
        '`quantize(w, "sparse0-int8")` of a weight with blocks of zeros',
        "an empty tile of 16 x 128 costs its bits of the bitmap and 8 bytes to store; it is "
        "multiplied all the same: no product is saved",
        "test_sparse.py::test_blocks_of_zeros",
    ),
)


def systems_table() -> str:
    """`SYSTEMS` as a table in Markdown."""
    lines = ["| technique | family | here | note |", "|---|---|---|---|"]
    lines += [f"| {s.name} | {s.family} | {s.how} | {s.note} |" for s in SYSTEMS]
    return "\n".join(lines) + "\n"
