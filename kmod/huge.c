// SPDX-License-Identifier: GPL-2.0
/*
 * Huge pages and other large folios: split them where that pays.
 *
 * A page of a large folio cannot be replaced on its own. Splitting gives that
 * up for good (khugepaged may build another one, but not over merged pages), and
 * with it the cheap translation that huge pages are for. So a folio is split
 * only when enough of its pages would be merged at once, by what their bytes say
 * at this moment, not by what the client believes. In three passes:
 *
 *   match   Compare the pages of every group that has huge ones with its target.
 *   weigh   Of each folio, count the pages that match; folios with too few stay
 *           whole, and their pages leave their groups.
 *   split   Count once more, without those that left, and split.
 *
 * A donor was copied to be the target; that it matches says nothing. It counts
 * if another page of its group does.
 *
 * The split itself is core mm's. It unmaps the folio with migration entries,
 * gives up when anybody but page tables, the swap cache and the caller refers to
 * it (I/O), and maps its pages one by one. It may sleep, so no page-table lock is
 * held; what has been seen under that lock is void afterwards, and attaching
 * judges every page anew.
 */
#include <linux/highmem.h>
#include <linux/pagemap.h>

#include "counters.h"
#include "huge.h"
#include "merge.h"
#include "symbols.h"
#include "target.h"

/* A page table, or the huge page in its place, with its entries locked. */
struct locked_table {
	unsigned long start;
	pte_t *first_entry;	/* of the address start */
	struct page *first_page;
	spinlock_t *ptl;
};

static bool lock_table(struct locked_table *table, struct mm_struct *mm,
		       unsigned long address)
{
	*table = (struct locked_table){ .start = address };
	table->first_entry = mergemem_pte_lock(mm, address, &table->ptl);
	if (!table->first_entry)
		table->first_page = mergemem_huge_lock(mm, address, &table->ptl);
	return table->first_entry || table->first_page;
}

static void unlock_table(struct locked_table *table)
{
	if (table->first_entry)
		pte_unmap_unlock(table->first_entry, table->ptl);
	else
		spin_unlock(table->ptl);
}

/* The page of a candidate, and whether it belongs to a large folio. */
static struct page *page_at(struct merge_request *request,
			    const struct merge_run *run,
			    const struct locked_table *table,
			    const struct merge_page *candidate, bool *is_large)
{
	unsigned long n = (candidate->address - table->start) >> PAGE_SHIFT;
	struct page *page;
	u8 verdict;

	if (table->first_page) {
		page = table->first_page + n;
		verdict = mergemem_judge(page);
	} else {
		verdict = mergemem_look(request, run, candidate,
					ptep_get(table->first_entry + n), &page);
	}
	*is_large = verdict == MERGEMEM_HUGE;
	return *is_large || verdict == UNDECIDED ? page : NULL;
}

/**
 * mergemem_match_run - compare pages with the targets of their groups
 * @request: the request; every group of a page in the run has its target
 * @run: undecided pages
 *
 * Decides on those that differ. What cannot be looked at now is left undecided;
 * so is all that has changed by the time it is attached, where it is judged anew.
 */
void mergemem_match_run(struct merge_request *request,
			const struct merge_run *run)
{
	struct locked_table table;
	unsigned int i;

	if (!lock_table(&table, run->vma->vm_mm, run->pages[0].address))
		return;
	for (i = 0; i < run->count; i++) {
		struct merge_page *candidate = &run->pages[i];
		bool is_large;
		struct page *page = page_at(request, run, &table, candidate,
					    &is_large);

		if (!page)
			continue;
		candidate->matches = mergemem_has_target_bytes(
			group_of(request, candidate), page);
		if (!candidate->matches)
			*result_of(request, candidate) = MERGEMEM_NOTEQUAL;
	}
	unlock_table(&table);
}

/**
 * struct weighed - the candidates of a run that lie in one large folio
 * @folio: the folio, with a reference; NULL: not (or no longer) a large one
 * @end: index of the first candidate behind them
 * @matching: how many pages of the folio would be merged
 */
struct weighed {
	struct folio *folio;
	unsigned int end;
	unsigned int matching;
};

static bool is_undecided_huge(struct merge_request *request,
			      const struct merge_page *candidate)
{
	return candidate->is_huge && *result_of(request, candidate) == UNDECIDED;
}

static bool would_merge(struct merge_request *request,
			const struct merge_page *candidate)
{
	return candidate->matches ||
	       (candidate->is_donor && group_of(request, candidate)->matched);
}

/*
 * Weighs the folio of the candidate @first: all candidates from there on that
 * lie in it, though others, which are decided, lie between. The locked entries
 * keep the folio mapped, hence allocated; the reference is for afterwards.
 */
static struct weighed weigh(struct merge_request *request,
			    const struct merge_run *run, unsigned int first)
{
	struct weighed weighed = { .end = first + 1 };
	unsigned long counted_address = 0;
	struct locked_table table;
	unsigned int i;

	if (!lock_table(&table, run->vma->vm_mm, run->pages[first].address))
		return weighed;
	for (i = first; i < run->count; i++) {
		struct merge_page *candidate = &run->pages[i];
		struct page *page;
		bool is_large;

		if (!is_undecided_huge(request, candidate))
			continue;
		page = page_at(request, run, &table, candidate, &is_large);
		/* Migrating or the like: of this folio perhaps, as others are. */
		if (!page && weighed.folio)
			continue;
		if (!page || !is_large ||
		    (weighed.folio && page_folio(page) != weighed.folio))
			break;
		weighed.folio = page_folio(page);
		weighed.end = i + 1;
		/* An address that is named twice counts once. */
		if (candidate->address != counted_address &&
		    would_merge(request, candidate)) {
			weighed.matching++;
			counted_address = candidate->address;
		}
	}
	if (weighed.folio)
		folio_get(weighed.folio);
	unlock_table(&table);
	return weighed;
}

static bool pays(const struct merge_request *request,
		 const struct weighed *weighed)
{
	return weighed->matching * 100 >=
	       request->call->split_percent * folio_nr_pages(weighed->folio);
}

/*
 * The folio lock is what splitting asks for; trylock, because whoever holds it
 * (reclaim, migration) may hold it for long. The reference of weigh() is the one
 * that the caller of a split may have; it ends up on the folio of the first page.
 */
static bool split(struct folio *folio)
{
	bool is_large, done;

	if (!folio_trylock(folio))
		return false;
	/* Others may have split it since; from here on they cannot. */
	is_large = folio_test_large(folio);
	done = !is_large || !compat_split_folio(folio);
	folio_unlock(folio);
	if (is_large && done)
		mergemem_count(&mergemem_counted.split_folios, 1);
	return done;
}

/*
 * Deals with one folio, and leaves its candidates undecided if they can be merged
 * (with @may_split), or could (without). Returns the index to go on from.
 */
static unsigned int do_folio(struct merge_request *request,
			     const struct merge_run *run, unsigned int first,
			     bool may_split)
{
	struct weighed weighed = weigh(request, run, first);
	bool stays_whole;
	unsigned int i;

	if (!weighed.folio)
		return weighed.end;
	stays_whole = !pays(request, &weighed);
	if (!stays_whole && may_split) {
		stays_whole = !split(weighed.folio);
		if (stays_whole)
			mergemem_count(&mergemem_counted.split_failures, 1);
	}
	folio_put(weighed.folio);
	for (i = first; i < weighed.end && stays_whole; i++)
		if (is_undecided_huge(request, &run->pages[i]))
			*result_of(request, &run->pages[i]) = MERGEMEM_HUGE;
	return weighed.end;
}

static void do_folios(struct merge_request *request,
		      const struct merge_run *run, bool may_split)
{
	unsigned int next = 0;

	while (next < run->count) {
		if (is_undecided_huge(request, &run->pages[next]))
			next = do_folio(request, run, next, may_split);
		else
			next++;
		cond_resched();
	}
}

/**
 * mergemem_weigh_run - see which large folios of a run are worth splitting
 * @request: the request, after the matching
 * @run: all candidates of a page table
 *
 * Pages of the others get their result. A folio that straddles two page tables
 * is weighed by its part in each.
 */
void mergemem_weigh_run(struct merge_request *request,
			const struct merge_run *run)
{
	do_folios(request, run, false);
}

/* The same, and then splits them. */
void mergemem_split_run(struct merge_request *request,
			const struct merge_run *run)
{
	do_folios(request, run, true);
}
