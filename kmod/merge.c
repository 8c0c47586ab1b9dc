// SPDX-License-Identifier: GPL-2.0
/*
 * MERGE: make pages that are believed to be equal share one frame.
 *
 * A request names groups of pages, each by process and address. It goes over
 * them in passes, each sorted by process and address, holding one mmap_lock for
 * reading and one page-table lock (PTL) at a time:
 *
 *   survey   Look at every page. Pages that cannot be merged get their result;
 *            each group remembers a merged page to join, if it has one, or else
 *            its first anonymous page, the donor.
 *
 *   prepare  Give each group with at least two frames its target: the merged
 *            page, or a fresh shared page with the donor's bytes (shared.c).
 *            No lock is held.
 *
 *   match, weigh, split
 *            Only where the request lets huge pages be split: count how many
 *            pages of each have the bytes of their targets, and split it if
 *            these are enough (huge.c).
 *
 *   attach   Map the target in the place of every page of its group that still
 *            has the same bytes. The donor may have changed since it was copied,
 *            so it is compared like the rest; but it comes last, and only if
 *            another page has come, since nothing is gained by a page that
 *            shares with nobody. attach.c tells how.
 *
 * Pages that turned out to differ from their group's target, or to be on another
 * NUMA node, may still be equal to each other: one bad donor must not fail its
 * neighbours. Where two or more are left, they make another round, up to
 * MAX_ROUNDS.
 */
#include <linux/sched/signal.h>

#include "attach.h"
#include "counters.h"
#include "huge.h"
#include "merge.h"
#include "shared.h"
#include "symbols.h"
#include "target.h"

/*
 * Each round costs the pages that are left another compare; groups whose pages
 * all differ, as a confused client may send them, must not take forever.
 */
#define MAX_ROUNDS 4

/* ---- survey ---- */

/* Returns UNDECIDED, or the page's result. */
static u8 survey_page(struct merge_request *request, struct merge_page *page,
		      struct page *found)
{
	struct merge_group *group = group_of(request, page);
	bool is_shared = mergemem_page_is_shared(found);

	if (group->is_zero)
		return UNDECIDED;
	if (!(request->call->flags & MERGEMEM_MERGE_ANY_NODE)) {
		if (group->node == NUMA_NO_NODE)
			group->node = page_to_nid(found);
		if (group->node != page_to_nid(found))
			return MERGEMEM_NODE;
	}
	/* A full one stays what it is; the others make a new one. */
	if (is_shared && mergemem_is_full(found))
		return MERGEMEM_ALREADYSH;
	group->viable++;
	if (!group->frame)
		group->frame = found;
	else if (group->frame != found)
		group->has_two_frames = true;

	if (is_shared) {
		if (!group->target) {
			get_page(found);
			group->target = found;
		}
		return UNDECIDED;
	}
	if (!group->donor) {
		get_page(found);
		group->donor = found;
		page->is_donor = true;
	}
	return UNDECIDED;
}

/*
 * A page that was just faulted in, or read back from swap, waits in a list of
 * its CPU, which holds a reference that would be taken for I/O. Real I/O mostly
 * pins pages, and such references no drain will end.
 */
static bool waits_for_drain(struct folio *folio)
{
	return !folio_test_large(folio) && folio_test_anon(folio) &&
	       folio_ref_count(folio) > mergemem_map_count(&folio->page) +
						folio_test_swapcache(folio) &&
	       !folio_maybe_dma_pinned(folio);
}

/* Counts a page in, if its kind may be merged. Its entry is locked. */
static u8 survey_found(struct merge_request *request, struct merge_page *page,
		       struct page *found, u8 verdict)
{
	if (verdict == MERGEMEM_HUGE && request->call->split_percent) {
		page->is_huge = true;
		group_of(request, page)->has_huge = true;
		request->has_huge = true;
	} else if (verdict != UNDECIDED) {
		return verdict;
	}
	/* Before a donor gets a reference of ours. */
	if (waits_for_drain(page_folio(found)))
		request->needs_lru_drain = true;
	return survey_page(request, page, found);
}

static void survey_huge(struct merge_request *request,
			const struct merge_run *run)
{
	unsigned long start = run->pages[0].address;
	spinlock_t *ptl;
	struct page *first = mergemem_huge_lock(run->vma->vm_mm, start, &ptl);
	unsigned int i;

	for (i = 0; i < run->count; i++) {
		struct merge_page *page = &run->pages[i];
		u8 *result = result_of(request, page);
		struct page *found;

		found = first + ((page->address - start) >> PAGE_SHIFT);
		/* Nothing there, or the huge zero page. */
		if (!first || !PageAnon(found))
			*result = mergemem_no_page(request, page);
		else if (!vma_is_accessible(run->vma))
			*result = MERGEMEM_REFUSED;
		else
			*result = survey_found(request, page, found,
					       mergemem_judge(found));
	}
	if (first)
		spin_unlock(ptl);
}

static void survey_run(struct merge_request *request,
		       const struct merge_run *run)
{
	unsigned long start = run->pages[0].address;
	spinlock_t *ptl;
	pte_t *pte = mergemem_pte_lock(run->vma->vm_mm, start, &ptl);
	unsigned int i;

	if (!pte) {
		survey_huge(request, run);
		return;
	}
	for (i = 0; i < run->count; i++) {
		struct merge_page *page = &run->pages[i];
		u8 *result = result_of(request, page);
		struct page *found;

		*result = mergemem_look(request, run, page,
			       ptep_get(pte + ((page->address - start) >>
					       PAGE_SHIFT)),
			       &found);
		if (*result == UNDECIDED || *result == MERGEMEM_HUGE)
			*result = survey_found(request, page, found, *result);
	}
	pte_unmap_unlock(pte, ptl);
}

/* ---- prepare ---- */

/* The result of a whole group, or UNDECIDED when it has a target now. */
static u8 prepare_group(struct merge_group *group, u32 flags)
{
	if (group->is_zero || !group->viable)
		return UNDECIDED;
	if (group->viable == 1)
		return MERGEMEM_ALONE;
	if (!group->has_two_frames)
		return MERGEMEM_ALREADYSH;
	if (!group->target)
		group->target = mergemem_shared_create(group->donor,
						       flags & MERGEMEM_MERGE_ANY_NODE);
	return group->target ? UNDECIDED : MERGEMEM_NOMEM;
}

/* A merged page to join has been shared before: nobody need come first. */
static bool shares_with_nobody(const struct merge_group *group)
{
	return !group->is_zero && !mergemem_map_count(group->target);
}

/* Finds the groups that have something to merge besides the donor. */
static void find_matched(struct merge_request *request)
{
	unsigned int count = request->call->candidate_count;
	unsigned int i;

	for (i = 0; i < count; i++)
		group_of(request, &request->pages[i])->matched = false;
	for (i = 0; i < count; i++) {
		const struct merge_page *page = &request->pages[i];

		if (page->matches && *result_of(request, page) == UNDECIDED)
			group_of(request, page)->matched = true;
	}
}

/* Huge pages that stay whole have left their groups: who is alone now? */
static void dismiss_lonely(struct merge_request *request)
{
	unsigned int count = request->call->candidate_count;
	unsigned int i;

	for (i = 0; i < count; i++)
		group_of(request, &request->pages[i])->viable = 0;
	for (i = 0; i < count; i++)
		if (*result_of(request, &request->pages[i]) == UNDECIDED)
			group_of(request, &request->pages[i])->viable++;
	for (i = 0; i < count; i++) {
		struct merge_group *group = group_of(request, &request->pages[i]);
		u8 *result = result_of(request, &request->pages[i]);

		if (*result == UNDECIDED && group->viable == 1 &&
		    shares_with_nobody(group))
			*result = MERGEMEM_ALONE;
	}
}

static void prepare(struct merge_request *request)
{
	unsigned int count = request->call->candidate_count;
	unsigned int i;

	mergemem_shared_reclaim_room();
	for (i = 0; i < count; i++) {
		struct merge_page *page = &request->pages[i];
		struct merge_group *group = group_of(request, page);

		/* Once per group: at its first candidate. */
		if (page->index != group->first)
			continue;
		group->verdict = prepare_group(group, request->call->flags);
		/* This reference would make attaching believe in I/O. */
		if (group->donor)
			put_page(group->donor);
		group->donor = NULL;
		cond_resched();
	}
	for (i = 0; i < count; i++) {
		u8 *result = result_of(request, &request->pages[i]);

		if (*result == UNDECIDED)
			*result = group_of(request, &request->pages[i])->verdict;
	}
	if (request->needs_lru_drain) {
		kernel_call(lru_add_drain_all)();
		mergemem_count(&mergemem_counted.lru_drains, 1);
	}
}

/* ---- passes ---- */

enum pass {
	SURVEY,
	MATCH,
	WEIGH,
	SPLIT,
	ATTACH,
	ATTACH_DONORS,
};

/*
 * What a pass does with a run, of how many pages at most; and whether runs have
 * all pages of a page table, or only those whose turn it is.
 */
static const struct {
	void (*act)(struct merge_request *request, const struct merge_run *run);
	unsigned int run_pages;
	bool takes_all;
} passes[] = {
	[SURVEY] = { survey_run, PTRS_PER_PTE },
	[MATCH] = { mergemem_match_run, PTRS_PER_PTE },
	[WEIGH] = { mergemem_weigh_run, MERGEMEM_MAX_CANDIDATES, true },
	[SPLIT] = { mergemem_split_run, MERGEMEM_MAX_CANDIDATES, true },
	[ATTACH] = { mergemem_attach_run, BATCH_PAGES },
	[ATTACH_DONORS] = { mergemem_attach_run, BATCH_PAGES },
};

/* Whether it is this page's turn. Donors are attached after all others. */
static bool is_due(struct merge_request *request, const struct merge_page *page,
		   enum pass pass)
{
	const struct merge_group *group = group_of(request, page);

	if (*result_of(request, page) != UNDECIDED)
		return false;
	switch (pass) {
	case MATCH:
		/* A donor that was copied would match itself. */
		return group->has_huge &&
		       !(page->is_donor && shares_with_nobody(group));
	case WEIGH:
	case SPLIT:
		return page->is_huge;
	default:
		return page->is_donor == (pass == ATTACH_DONORS);
	}
}

/*
 * How many pages from here make one run: same process, same page table, same
 * mapping, and no address twice. (An address that is named twice comes first in
 * the next run, and then finds a merged page.)
 */
static unsigned int run_length(const struct merge_page *pages,
			       unsigned int available, unsigned long end,
			       bool any_address)
{
	unsigned long stop = min(end, (pages[0].address | ~PMD_MASK) + 1);
	unsigned int count = 1;

	while (count < available && pages[count].process == pages[0].process &&
	       pages[count].address < stop &&
	       (any_address ||
		pages[count].address != pages[count - 1].address))
		count++;
	return count;
}

/*
 * One run of undecided pages from here on: lock, act, unlock. The lock is
 * dropped after each run, so that a writer waits for one batch at most.
 * Returns how many pages are dealt with.
 */
static unsigned int do_run(struct merge_request *request,
			   struct merge_page *pages, unsigned int available,
			   enum pass pass)
{
	struct mergemem_target *target = &request->targets[pages[0].process];
	struct merge_run run = { .pages = pages, .count = 1 };
	struct mm_struct *mm = target->mm;

	/* One wait per process and request: a busy one stays busy. */
	if (target->busy || signal_pending(current) ||
	    mergemem_mm_lock(mm, &request->patience)) {
		target->busy = true;
		*result_of(request, pages) = MERGEMEM_BUSY;
		return 1;
	}
	run.vma = find_vma(mm, pages[0].address);
	if (!run.vma || pages[0].address < run.vma->vm_start) {
		*result_of(request, pages) = mergemem_no_page(request, pages);
	} else if (!mergemem_vma_mergeable(run.vma)) {
		*result_of(request, pages) = MERGEMEM_REFUSED;
	} else {
		run.count = run_length(pages, available, run.vma->vm_end,
				       passes[pass].takes_all);
		passes[pass].act(request, &run);
	}
	mergemem_mm_unlock(mm);
	cond_resched();
	return run.count;
}


/* Goes over the pages that are due, in the largest runs that they make. */
static void do_pass(struct merge_request *request, enum pass pass)
{
	struct merge_page *page = request->pages;
	struct merge_page *end = page + request->call->candidate_count;
	struct merge_page *stop;

	while (page < end) {
		if (!is_due(request, page, pass)) {
			page++;
			continue;
		}
		for (stop = page + 1;
		     stop < min(end, page + passes[pass].run_pages); stop++)
			if (!passes[pass].takes_all &&
			    !is_due(request, stop, pass))
				break;
		page += do_run(request, page, stop - page, pass);
	}
}

/* Donors whose groups came to nothing have nobody to share with. */
static void dismiss_donors(struct merge_request *request)
{
	unsigned int i;

	for (i = 0; i < request->call->candidate_count; i++) {
		struct merge_page *page = &request->pages[i];

		if (is_due(request, page, ATTACH_DONORS) &&
		    shares_with_nobody(group_of(request, page)))
			*result_of(request, page) = MERGEMEM_ALONE;
	}
}

static void do_round(struct merge_request *request)
{
	do_pass(request, SURVEY);
	prepare(request);
	if (request->has_huge) {
		do_pass(request, MATCH);
		find_matched(request);
		do_pass(request, WEIGH);
		find_matched(request);
		do_pass(request, SPLIT);
		dismiss_lonely(request);
	}
	do_pass(request, ATTACH);
	dismiss_donors(request);
	do_pass(request, ATTACH_DONORS);
}

/* Whether a page did not fit its group's target, but may fit another. */
static bool is_left_over(struct merge_request *request,
			 const struct merge_page *page)
{
	u8 result = *result_of(request, page);

	return !group_of(request, page)->is_zero &&
	       (result == MERGEMEM_NOTEQUAL || result == MERGEMEM_NODE);
}

/*
 * Makes those pages of each group undecided again that did not fit its target,
 * if they are two or more. Returns whether there are any.
 */
static bool regroup(struct merge_request *request)
{
	unsigned int count = request->call->candidate_count;
	bool again = false;
	unsigned int i;

	for (i = 0; i < count; i++) {
		group_of(request, &request->pages[i])->viable = 0;
		group_of(request, &request->pages[i])->left_over = 0;
	}
	for (i = 0; i < count; i++)
		if (is_left_over(request, &request->pages[i]))
			group_of(request, &request->pages[i])->left_over++;
	for (i = 0; i < count; i++) {
		struct merge_page *page = &request->pages[i];
		struct merge_group *group = group_of(request, page);

		if (!is_left_over(request, page) || group->left_over < 2)
			continue;
		if (group->target)
			put_page(group->target);
		group->target = NULL;
		group->frame = NULL;
		group->node = NUMA_NO_NODE;
		group->has_two_frames = false;
		group->has_huge = false;
		page->is_donor = false;
		page->is_huge = false;
		page->matches = false;
		*result_of(request, page) = UNDECIDED;
		again = true;
	}
	request->needs_lru_drain = false;
	request->has_huge = false;
	return again;
}

static void count_results(const u8 *results, unsigned int count)
{
	unsigned int counts[__MERGEMEM_RESULT_COUNT] = {};
	unsigned int i;

	for (i = 0; i < count; i++)
		if (!WARN_ON_ONCE(results[i] >= ARRAY_SIZE(counts)))
			counts[results[i]]++;
	for (i = 0; i < __MERGEMEM_RESULT_COUNT; i++)
		if (counts[i])
			mergemem_count(&mergemem_counted.results[i], counts[i]);
	mergemem_count(&mergemem_counted.merge_requests, 1);
}

/**
 * mergemem_merge - carry out a MERGE request
 * @call: the request
 * @results: receives an enum mergemem_result per candidate
 *
 * A pending signal ends the work early: pages not reached yet get
 * MERGEMEM_BUSY, those that are merged stay so.
 *
 * Return: 0, or -ENOMEM before anything was touched
 */
int mergemem_merge(const struct mergemem_merge_call *call, u8 *results)
{
	struct merge_request request;
	int err = mergemem_request_init(&request, call, results);
	unsigned int round = 0;

	if (!err) {
		do
			do_round(&request);
		while (++round < MAX_ROUNDS && regroup(&request));
		count_results(results, call->candidate_count);
	}
	mergemem_request_exit(&request);
	return err;
}
