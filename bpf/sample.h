/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Which faults are counted: those on about one page in N, chosen by the number of the page alone,
 * so that the choice needs no memory of its own that every fault would have to write.
 *
 * Multiplied by the golden ratio, the numbers of neighbouring pages spread as evenly as they can:
 * of the 512 pages of a region, very nearly 512 / N are chosen. The choice has two steps. The
 * first is all that most faults cost: one page in 2^MERGEMEM_SAMPLING_BITS, always the same ones.
 * Of these the second takes as many as the agent wants, others after every drain, by a salt.
 */
#ifndef MERGEMEM_SAMPLE_H
#define MERGEMEM_SAMPLE_H

#include "region.h"

/* 2^32 divided by the golden ratio */
#define GOLDEN 0x9E3779B9u

static inline u32 page_place(u64 address)
{
	return (u32)(address >> PAGE_BITS) * GOLDEN;
}

static inline bool page_may_be_sampled(u64 address)
{
	return !((u64)page_place(address) >> (32 - MERGEMEM_SAMPLING_BITS));
}

/* `highest`: 2^32 / n - 1, for one page in n of those that the first step leaves */
static inline bool page_is_sampled(u64 address, u32 salt, u32 highest)
{
	return (u32)((page_place(address) << MERGEMEM_SAMPLING_BITS) + salt) <= highest;
}

#endif
