"""The published techniques of attention, its caches, selection and trees of drafts."""

from __future__ import annotations

from lath.formats.system import System

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


ATTENTION_SYSTEMS: tuple[System, ...] = (
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
        '`decode_attention(…, scheme="unified")`: one maximum from the page bound, a fallback; '
        "`plan(…)`: gemv, flat, tiled or decode-then-matmul by predicted crossovers, with a reason",
        (
            "test_decode_attention.py::test_splits_and_schemes_change_nothing",
            "test_plan.py::test_dataflows_follow_one_another_as_m_grows",
        ),
        "the flat tile is padded to 8 tokens; K is split by a workspace that is summed in order",
    ),
    _selector(
        "Quest",
        "quest",
        "the bound of pages of 64 tokens, or of 8, 16 or 32 (`quest-16`); `+outliers`, `+tokens`",
        "test_selectors.py::test_quest_finds_the_page_of_the_largest_score",
        "test_strata.py::test_rows_say_what_is_true_of_their_tokens",
        "test_refined.py::test_a_needle_among_tokens_that_score_less",
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
        "cosine k-means of each KV head, whole clusters to the budget; repair by clusters",
        "test_selectors_data.py::test_planted_clusters_are_found",
        "test_selectors_data.py::test_singleton_clusters_are_the_exact_top_k",
        "test_strata.py::test_repair_goes_by_clusters",
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
)
