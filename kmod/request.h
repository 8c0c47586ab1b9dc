/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A MERGE request on its way: what request.c sets up, merge.c goes over, huge.c
 * and attach.c carry out.
 */
#ifndef MERGEMEM_REQUEST_H
#define MERGEMEM_REQUEST_H

#include <linux/mm_types.h>
#include <linux/uidgid.h>

#include "merge.h"

/*
 * Pages per PTL hold: one TLB flush serves so many. A page costs 0.4 to 1 µs,
 * nearly all of it the compare, which is how long a page fault in the same 2 MiB
 * may have to wait: some 0.1 ms.
 */
#define BATCH_PAGES 128

/* Not a result: the page has passed all checks so far. */
#define UNDECIDED 0xff
static_assert(__MERGEMEM_RESULT_COUNT < UNDECIDED);

/* A candidate, as the passes see it: sorted, no longer in the request's order. */
struct merge_page {
	unsigned long address;
	u32 process;
	u32 group;
	u32 index;		/* of the candidate in the request */
	bool is_donor;
	bool is_huge;		/* part of a large folio, in the survey */
	bool matches;		/* had its target's bytes when last compared */
};

/**
 * struct merge_group - pages that are believed to be equal
 *
 * The last group of a request has the pages that are believed to be zero. It
 * has nothing but a verdict: the kernel's zero page is its target.
 *
 * @target: the shared page they will map, with a reference; or NULL
 * @donor: the anonymous page to copy, with a reference, until @target exists
 * @frame: the first frame that was seen, to tell whether there is another;
 *	only compared, never followed, so it needs no reference
 * @uid: real user of the first process found; the others must have it too
 * @node: NUMA node to share within, or NUMA_NO_NODE: not known yet, or any
 * @viable: pages that passed the survey
 * @left_over: pages that differed from @target, or were on another node
 * @first: the group's first candidate in the order of the request
 * @verdict: result of the pages that passed the survey; UNDECIDED: attach them
 * @has_uid: @uid is set
 * @has_two_frames: there is something to gain
 * @has_huge: pages of large folios are among them
 * @matched: another page than the donor has the bytes of @target
 * @is_zero: the group of the zero page
 */
struct merge_group {
	struct page *target;
	struct page *donor;
	struct page *frame;
	kuid_t uid;
	int node;
	u32 viable;
	u32 left_over;
	u32 first;
	u8 verdict;
	bool has_uid;
	bool has_two_frames;
	bool has_huge;
	bool matched;
	bool is_zero;
};

struct merge_batch {
	struct page *old[BATCH_PAGES];		/* NULL: entry not cleared */
	pte_t entry[BATCH_PAGES];		/* as it was */
	struct page *replaced[BATCH_PAGES];	/* to be freed */
	unsigned int replaced_count;
};

struct merge_request {
	const struct mergemem_merge_call *call;
	struct mergemem_target *targets;
	struct merge_page *pages;
	struct merge_group *groups;	/* one more than candidates: zero */
	struct merge_batch *batch;
	u8 *results;
	unsigned int patience;
	bool needs_lru_drain;
	bool has_huge;
};

/* A part of a request: pages of one process in one page table and mapping. */
struct merge_run {
	struct vm_area_struct *vma;
	struct merge_page *pages;
	unsigned int count;
};

static inline struct merge_group *group_of(struct merge_request *request,
					   const struct merge_page *page)
{
	return &request->groups[page->group];
}

static inline u8 *result_of(struct merge_request *request,
			    const struct merge_page *page)
{
	return &request->results[page->index];
}

int mergemem_request_init(struct merge_request *request,
			  const struct mergemem_merge_call *call, u8 *results);
void mergemem_request_exit(struct merge_request *request);

#endif /* MERGEMEM_REQUEST_H */
