/* SPDX-License-Identifier: GPL-2.0 */
#ifndef MERGEMEM_SHARED_H
#define MERGEMEM_SHARED_H

#include <linux/mm.h>

#include "uapi/mergemem.h"

/* The size of everything here: merging works on single pages of 4 KiB. */
static_assert(PAGE_SIZE == MERGEMEM_DEPTH_FULL_BYTES);

/*
 * A process could have all its memory on one frame and fork: each fork adds as
 * many references, and fork does not check for overflow. With 4096 mappings that
 * takes 2^31 / 2^12 = 524,288 processes that live at once, which limits on pids
 * prevent and memory rarely allows; the limit costs 1/4096 of the saving.
 */
#define MERGEMEM_MAX_MAPPINGS_DEFAULT	4096
#define MERGEMEM_SHARED_BYTES_DEFAULT	ULONG_MAX	/* half of the memory */

extern unsigned int mergemem_max_mappings;
extern unsigned long mergemem_max_shared_bytes;

/*
 * A shared page is marked by this constant mixed with its frame number in
 * page->private, which core mm leaves alone for a page that is neither on the
 * LRU nor in a page cache, and clears when the frame is allocated again. It is
 * the same for every load of the module, so pages merged before a reload are
 * known after it.
 */
#define MERGEMEM_MARK 0x6d657267656d656dUL	/* "mergemem" */

/* How many page-table entries map an order-0 page. */
static inline int mergemem_map_count(const struct page *page)
{
	return atomic_read(&page->_mapcount) + 1;
}

/* Whether a shared page has as many mappings as it may have. */
static inline bool mergemem_is_full(const struct page *page)
{
	return mergemem_map_count(page) >= READ_ONCE(mergemem_max_mappings);
}

/**
 * mergemem_page_is_shared - whether a page is one of ours
 *
 * Exact for a page that cannot be freed meanwhile: one found in a page table
 * whose lock is held, or one with a reference. The mark alone is not trusted:
 * a shared page has no mapping and is not on the LRU either.
 */
static inline bool mergemem_page_is_shared(struct page *page)
{
	return page_private(page) == (MERGEMEM_MARK ^ page_to_pfn(page)) &&
	       !page->mapping && !PageCompound(page) && !PageLRU(page);
}

int mergemem_shared_init(void);
void mergemem_shared_exit(void);

struct page *mergemem_shared_create(struct page *donor, bool any_node);
void mergemem_shared_take_charge(struct page *shared, struct page *old);
void mergemem_shared_reclaim_room(void);
void mergemem_shared_totals(struct mergemem_totals *totals);

#endif /* MERGEMEM_SHARED_H */
