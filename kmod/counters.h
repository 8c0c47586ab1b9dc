/* SPDX-License-Identifier: GPL-2.0 */
#ifndef MERGEMEM_COUNTERS_H
#define MERGEMEM_COUNTERS_H

#include <linux/atomic.h>

#include "uapi/mergemem.h"

/*
 * struct mergemem_counters of the contract, as atomics. Each is added to once
 * per batch, so sharing a cache line between CPUs costs nothing that matters.
 */
struct mergemem_counted {
	atomic64_t checksummed_pages;
	atomic64_t sampled_pages;
	atomic64_t merge_requests;
	atomic64_t unmerged_pages;
	atomic64_t tlb_flushes;
	atomic64_t lru_drains;
	atomic64_t results[32];
	atomic64_t split_folios;
	atomic64_t split_failures;
};

static_assert(sizeof(struct mergemem_counted) ==
	      sizeof(struct mergemem_counters));
static_assert(__MERGEMEM_RESULT_COUNT <= 32);

extern struct mergemem_counted mergemem_counted;

static inline void mergemem_count(atomic64_t *counter, s64 amount)
{
	atomic64_add(amount, counter);
}

#endif /* MERGEMEM_COUNTERS_H */
