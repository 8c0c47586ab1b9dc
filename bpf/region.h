/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The key of a region, in one word: mergemem_agent/hint_source.py takes it apart.
 */
#ifndef MERGEMEM_REGION_H
#define MERGEMEM_REGION_H

#define PAGE_BITS	12
#define REGION_BITS	21

/* Of 57 bits of address, with five levels of page tables; a pid has 22 at most. */
#define REGION_NUMBER_BITS (57 - REGION_BITS)

static inline u64 region_key(u32 tgid, u64 address)
{
	return (u64)tgid << REGION_NUMBER_BITS | address >> REGION_BITS;
}

#endif
