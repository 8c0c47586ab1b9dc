/* SPDX-License-Identifier: GPL-2.0 */
#ifndef MERGEMEM_CHECKSUM_H
#define MERGEMEM_CHECKSUM_H

#include <linux/mm_types.h>

#include "uapi/mergemem.h"

void mergemem_checksum_init(void);

/**
 * struct mergemem_run - one message of a checksum dump
 * @address: the first page of the run
 * @pages: how many pages it covers
 * @refused: the run lies in a mapping that is never merged; there are no records
 */
struct mergemem_run {
	unsigned long address;
	unsigned long pages;
	bool refused;
};

/**
 * struct mergemem_depths - how much of each page enters its checksum
 * @full: bitmap of pages that are read in full; NULL: none is apart
 * @full_start: address of the page of its first bit; it covers whatever run it
 *	is used with
 * @others_bytes: of all other pages; with a bitmap, of those that are not merged
 *	pages, which are not read then; 0: no page
 */
struct mergemem_depths {
	const u8 *full;
	unsigned long full_start;
	unsigned int others_bytes;
};

int mergemem_checksum_next_run(struct mm_struct *mm, unsigned long start,
			       unsigned long end, struct mergemem_run *run);
void mergemem_checksum_fill(struct mm_struct *mm, const struct mergemem_run *run,
			    const struct mergemem_depths *depths,
			    struct mergemem_record *records);

#endif /* MERGEMEM_CHECKSUM_H */
